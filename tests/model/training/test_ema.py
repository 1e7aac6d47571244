"""The moving average of a module's weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from model.training.ema import MovingAverage


def layer(value: float) -> nn.Linear:
    module = nn.Linear(2, 2)
    for parameter in module.parameters():
        nn.init.constant_(parameter, value)
    return module


def set_to(module: nn.Module, value: float) -> None:
    for parameter in module.parameters():
        nn.init.constant_(parameter, value)


def test_the_average_follows_its_recurrence() -> None:
    module = layer(1.0)
    average = MovingAverage(module, 0.5)
    expected = 1.0
    for n, value in enumerate([3.0, -2.0, 8.0, 0.0, 5.0, 5.0, 1.0, 9.0, 4.0, 2.0, 7.0, 6.0], start=1):
        set_to(module, value)
        average.update(module)
        decay = min(0.5, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * value
        assert float(average.tensors["weight"].mean()) == pytest.approx(expected, rel=1e-5)
    assert average.updates == 12


def test_the_first_weights_are_forgotten() -> None:
    module = layer(100.0)
    average = MovingAverage(module, 0.999)
    set_to(module, 0.0)
    for _ in range(60):
        average.update(module)
    assert 0 < float(average.tensors["bias"].max()) < 1e-3


def test_it_is_its_own_and_goes_back() -> None:
    module, other = layer(1.0), layer(-1.0)
    average = MovingAverage(module, 0.9)
    set_to(module, 4.0)
    assert bool((average.tensors["weight"] == 1.0).all()), "a copy, not the module's own memory"
    average.copy_to(other)
    assert all(bool((parameter == 1.0).all()) for parameter in other.parameters())
    assert all(parameter.requires_grad for parameter in other.parameters())


def test_frozen_weights_are_left_alone() -> None:
    module = layer(1.0)
    module.bias.requires_grad_(False)
    average = MovingAverage(module, 0.9)
    assert set(average.tensors) == {"weight"}
    set_to(module, 2.0)
    other = layer(7.0)
    average.copy_to(other)
    assert bool((other.bias == 7.0).all())


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_a_decay_that_never_or_wrongly_moves_is_refused(decay: float) -> None:
    with pytest.raises(ValueError, match=rf"ema_decay is {decay}; it must be in \[0, 1\)"):
        MovingAverage(layer(0.0), decay)


def test_decay_zero_is_the_module_itself() -> None:
    module = layer(1.0)
    average = MovingAverage(module, 0.0)
    set_to(module, 3.5)
    average.update(module)
    assert torch.equal(average.tensors["weight"], module.weight)
