"""Draws are functions of seed, call and position in the batch: the same on any number of processes, and random."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from model.methods.draws import Draws, _mixed, _wrapped


def drawn(draws: Draws) -> list[torch.Tensor]:
    again = draws.repeated(2)
    return [draws.rand(), draws.randn(3, 7), draws.even(5), draws.rand(1, 2), again.randn(2), again.even(3)]


@pytest.mark.parametrize("world", [2, 3, 6])
def test_a_clip_has_its_draws_on_any_number_of_processes(world: int) -> None:
    whole = drawn(Draws(11, 6))
    for rank in range(world):
        for one, part in zip(whole, drawn(Draws(11, 6, rank, world)), strict=True):
            times = len(one) // 6  # 2 where clips are repeated
            assert torch.equal(one.unflatten(0, (6, times))[rank::world].flatten(0, 1), part)


def test_the_whole_batch_is_stratified() -> None:
    draws = Draws(5, 12)
    for even in (draws.even(7), draws.even(7), draws.repeated(3).even(2)):
        assert sorted((even.flatten() * even.numel()).long().tolist()) == list(range(even.numel()))
        assert even.flatten().argsort().tolist() != list(range(even.numel()))


def test_calls_clips_steps_and_repeats_have_draws_of_their_own() -> None:
    draws = Draws(1, 3)
    rows = [*draws.rand(4), *draws.rand(4), *draws.repeated(2).rand(4), *draws.repeated(2).rand(4)]
    rows += [*Draws(2, 3).rand(4), *Draws(1, 3).repeated(2).rand(4)[:0]]
    values = torch.cat(rows)
    assert len(values.unique()) == len(values)
    assert torch.equal(Draws(1, 3).rand(4), torch.stack(rows[:3]))


def test_they_are_uniform_and_normal() -> None:
    """Means, spreads and tails, and no correlation of clips, elements or calls, at six standard errors."""
    draws, count = Draws(3, 500), 500 * 401  # odd: pairs of normal numbers are cut
    uniform, normal = draws.rand(401).double(), draws.randn(401).double()
    assert 0 <= float(uniform.min()) < 1e-3 < 0.999 < float(uniform.max()) < 1
    moments: list[tuple[Callable[[torch.Tensor], torch.Tensor], torch.Tensor, float, float]] = [
        (torch.mean, uniform, 1 / 2, 1 / math.sqrt(12)),
        (torch.var, uniform, 1 / 12, 1 / math.sqrt(180)),
        (torch.mean, normal, 0.0, 1.0),
        (torch.var, normal, 1.0, math.sqrt(2)),
        (torch.mean, normal**3, 0.0, math.sqrt(15)),
        (torch.mean, normal**4, 3.0, math.sqrt(96)),
        (torch.mean, (normal.abs() > 3).double(), math.erfc(3 / math.sqrt(2)), 0.052),
        (torch.mean, normal[1:] * normal[:-1], 0.0, 1.0),
        (torch.mean, normal[:, 1:] * normal[:, :-1], 0.0, 1.0),
        (torch.mean, normal[:, :200] * normal[:, 201:], 0.0, 1.0),
        (torch.mean, normal * draws.randn(401), 0.0, 1.0),
        (torch.mean, normal * (uniform - 0.5), 0.0, 1 / math.sqrt(12)),
    ]
    for figure, values, expected, spread in moments:
        assert float(figure(values)) == pytest.approx(expected, abs=6 * spread / math.sqrt(count - 1000))


def test_they_are_splitmix64() -> None:
    """The first outputs of the published generator for the seed 1234567."""
    states = torch.tensor([_wrapped(1234567 + k * 0x9E3779B97F4A7C15) for k in (1, 2, 3)])
    found = [value % 2**64 for value in _mixed(states).tolist()]
    assert found == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_float64_has_the_draws_of_float32() -> None:
    single, double = Draws(4, 5), Draws(4, 5, dtype=torch.float64)
    for name, shape in (("rand", (3,)), ("randn", (2, 3)), ("even", (4,))):
        one, other = getattr(single, name)(*shape), getattr(double, name)(*shape)
        assert (one.dtype, other.dtype) == (torch.float32, torch.float64)
        torch.testing.assert_close(one.double(), other, rtol=0, atol=0 if name != "even" else 1e-7)


def test_a_mean_is_over_the_whole_batch_and_takes_no_gradient() -> None:
    values = torch.arange(12.0, requires_grad=True).view(6, 2)
    other = values.detach()[1::2].sum()  # what another process would add
    draws = Draws(0, 6, 0, 2, total=lambda own: own + other)
    found = draws.mean(values[0::2])
    assert float(found) == 5.5
    assert not found.requires_grad
