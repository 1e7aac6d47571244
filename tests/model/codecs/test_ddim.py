"""DDIM against diffusers' schedulers, against the slow reference, and inverted on noise predictors known exactly."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from model.codecs.ddim import (
    SCHEDULER_VALUES,
    DDIMSchedule,
    disagreements,
    guided,
    inverse_step,
    invert,
    invert_checked,
    regenerate,
    round_trip_db,
    step,
)
from tests.reference.ddim_reference import GaussianMixture, sample

# Written out once more, so that a wrong value in the module cannot agree with itself.
STABLE_DIFFUSION: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "prediction_type": "epsilon",
}


def noise_of(latents: Tensor, ddim_step: Tensor | int) -> Tensor:
    """Some smooth eps that depends on both arguments; what it means does not matter to an equality."""
    return 0.8 * torch.sin(1.3 * latents + 0.002 * float(ddim_step)) + 0.3 * latents


def largest_difference(values: dict[str, Any], ddim_steps: int = 50) -> float:
    """Largest difference between our steps and diffusers', up and down, over every level, on latents beyond [-1, 1]."""
    from diffusers import DDIMInverseScheduler, DDIMScheduler

    schedule = DDIMSchedule(ddim_steps)
    down, up = DDIMScheduler(**values), DDIMInverseScheduler(**values)
    down.set_timesteps(ddim_steps)
    up.set_timesteps(ddim_steps)
    latents = 2 * torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    if [*map(int, down.timesteps)][::-1] != list(schedule.timesteps) or [*map(int, up.timesteps)] != list(
        schedule.timesteps
    ):
        return math.inf
    worst = 0.0
    for level, ddim_step in enumerate(schedule.timesteps):
        noise = noise_of(latents, ddim_step)
        theirs = down.step(noise, ddim_step, latents).prev_sample
        worst = max(worst, float((theirs - step(latents, noise, schedule, level)).abs().max()))
        theirs = up.step(noise, ddim_step, latents).prev_sample
        worst = max(worst, float((theirs - inverse_step(latents, noise, schedule, level)).abs().max()))
    return worst


@pytest.mark.parametrize("ddim_steps", [10, 50, 250])
def test_our_step_equals_diffusers_schedulers(ddim_steps: int) -> None:
    assert largest_difference(STABLE_DIFFUSION, ddim_steps) < 1e-5


@pytest.mark.parametrize(
    ("key", "wrong"),
    [
        ("num_train_timesteps", 500),
        ("beta_start", 0.0001),
        ("beta_end", 0.02),
        ("beta_schedule", "linear"),
        ("clip_sample", True),
        ("set_alpha_to_one", True),
        ("steps_offset", 0),
        ("timestep_spacing", "trailing"),
        ("prediction_type", "v_prediction"),
    ],
)
def test_each_scheduler_value_set_wrong_breaks_the_equality(key: str, wrong: object) -> None:
    assert largest_difference({**STABLE_DIFFUSION, key: wrong}) > 1e-3
    assert disagreements({**STABLE_DIFFUSION, key: wrong}) == [
        f"{key} is {wrong!r} in the folder, {SCHEDULER_VALUES[key]!r} is used"
    ]


def test_the_values_in_use_are_stable_diffusions_and_absent_keys_are_no_disagreement() -> None:
    assert disagreements(STABLE_DIFFUSION) == []
    assert disagreements({"_class_name": "PNDMScheduler", "skip_prk_steps": True}) == []


def test_the_grid_starts_at_one_and_ends_at_981() -> None:
    assert DDIMSchedule(50).timesteps[:2] == (1, 21)
    assert DDIMSchedule(50).timesteps[-1] == 981
    # A_1 / A_0 from methods-reference.md, 4.1: .998296 and .999150.
    assert DDIMSchedule(50).steps[0][0] == pytest.approx(math.sqrt(0.999150 / 0.998296), abs=1e-6)


@pytest.mark.parametrize("depth", [1, 7, 20])
def test_regenerate_equals_the_slow_reference(depth: int) -> None:
    mixture = GaussianMixture(40, seed=0)
    noisy = torch.randn(3, 4, 4, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    ours = regenerate(noisy, mixture, DDIMSchedule(20), depth)

    def predict(x: Any, t: int) -> Any:
        return mixture(torch.from_numpy(x), t).numpy()

    np.testing.assert_allclose(ours.numpy(), sample(noisy.numpy(), predict, 20, depth), rtol=0, atol=1e-10)


@pytest.mark.parametrize("modes", [40, 150])
def test_inversion_comes_back_within_60_db(modes: int) -> None:
    mixture = GaussianMixture(modes, seed=0)
    clean = mixture.draw(16, seed=1)
    schedule = DDIMSchedule(50)
    plain = round_trip_db(clean, invert(clean, mixture, schedule, refinements=0).latents, mixture, schedule)
    refined = round_trip_db(clean, invert(clean, mixture, schedule, refinements=3).latents, mixture, schedule)
    assert plain.max() < 40, "the plain inversion is not exact: otherwise this test shows nothing"
    assert refined.min() >= 60


@pytest.mark.parametrize("modes", [40, 150])
@pytest.mark.parametrize("ddim_steps", [10, 20, 50])
def test_no_sample_ends_below_its_own_plain_inversion(modes: int, ddim_steps: int) -> None:
    # Two by two by two with narrow modes: the hard case, where single samples leave the basin.
    mixture = GaussianMixture(modes, seed=0, shape=(2, 2, 2), spread=0.2)
    clean = mixture.draw(12, seed=1)
    schedule = DDIMSchedule(ddim_steps)
    plain = round_trip_db(clean, invert(clean, mixture, schedule, refinements=0).latents, mixture, schedule)
    for refinements in (1, 2, 3, 5, 10):
        found = invert_checked(clean, mixture, schedule, refinements=refinements)
        measured = round_trip_db(clean, found.latents, mixture, schedule)
        assert (measured >= plain - 0.1).all(), f"{refinements} refinements"
        torch.testing.assert_close(found.round_trip, measured, rtol=0, atol=1e-6)


def test_the_check_mends_samples_that_left_the_basin() -> None:
    mixture = GaussianMixture(40, seed=0)
    clean = mixture.draw(16, seed=1)
    schedule = DDIMSchedule(10)
    unchecked = round_trip_db(clean, invert(clean, mixture, schedule, refinements=2).latents, mixture, schedule)
    assert unchecked.min() < 5, "a sample diverges at ten steps and two refinements"
    assert invert_checked(clean, mixture, schedule, refinements=2).round_trip.min() > 15


def test_the_residual_falls_with_refinements_and_is_unknown_without() -> None:
    mixture = GaussianMixture(40, seed=0)
    clean = mixture.draw(4, seed=1)
    few, many = (invert(clean, mixture, DDIMSchedule(50), refinements=k).residual for k in (1, 5))
    assert (many < 0.01 * few).all()
    assert invert(clean, mixture, DDIMSchedule(50), refinements=0).residual.isnan().all()


def test_eps_is_called_once_a_level_and_refinement_and_depth_counts_levels() -> None:
    mixture = GaussianMixture(10, seed=0)
    clean = mixture.draw(2, seed=1)
    schedule = DDIMSchedule(20)
    noisy = invert(clean, mixture, schedule, inversion_depth=6, refinements=2).latents
    assert mixture.calls == 6 * 3
    mixture.calls = 0
    back = regenerate(noisy, mixture, schedule, inversion_depth=6)
    assert mixture.calls == 6
    assert (back - clean).abs().max() < 0.05
    assert torch.equal(invert(clean, mixture, schedule, inversion_depth=0).latents, clean)
    assert torch.equal(regenerate(clean, mixture, schedule, inversion_depth=0), clean)


def test_inverted_latents_are_noise() -> None:
    mixture = GaussianMixture(150, seed=0)
    noisy = invert(mixture.draw(64, seed=1), mixture, DDIMSchedule(50)).latents
    assert 0.9 < float(noisy.std()) < 1.15


class HostReads(TorchDispatchMode):
    """Writes down in order when a tensor's value was read by Python, which on a GPU waits for the device."""

    def __init__(self, events: list[str]) -> None:
        super().__init__()
        self.events = events

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            self.events.append("read")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("loop", [regenerate, invert])
def test_nothing_in_the_loops_waits_for_the_device(loop: Callable[..., Any]) -> None:
    events: list[str] = []

    def predict_noise(latents: Tensor, ddim_step: Tensor) -> Tensor:
        events.append("eps")
        return torch.sin(latents + ddim_step / 1000)

    with HostReads(events):
        loop(torch.randn(2, 4, 4, 4), predict_noise, DDIMSchedule(10))
    last = len(events) - events[::-1].index("eps")
    assert "read" not in events[:last]
    assert "read" in events[last:], "the check for NaN, after the loop, reads: the recorder works"


def test_arithmetic_stays_float32_around_a_bfloat16_network() -> None:
    types = []

    def predict_noise(latents: Tensor, ddim_step: Tensor) -> Tensor:
        types.append(latents.dtype)
        return (0.1 * latents).bfloat16()

    clean = torch.randn(2, 4, 4, 4)
    noisy = invert(clean, predict_noise, DDIMSchedule(10)).latents
    assert noisy.dtype == torch.float32
    assert regenerate(noisy, predict_noise, DDIMSchedule(10)).dtype == torch.float32
    assert set(types) == {torch.float32}


def test_a_predictor_that_returns_nan_is_named_and_nothing_is_returned() -> None:
    def predict_noise(latents: Tensor, ddim_step: Tensor) -> Tensor:
        noise = torch.zeros_like(latents)
        noise[1] = math.nan
        return noise

    with pytest.raises(ValueError, match=r"samples \[1\] hold NaN.*inversion_depth to 0"):
        invert(torch.randn(3, 4, 4, 4), predict_noise, DDIMSchedule(10))
    with pytest.raises(ValueError, match=r"samples \[1\] hold NaN"):
        regenerate(torch.randn(3, 4, 4, 4), predict_noise, DDIMSchedule(10))


def test_samples_with_predictors_of_their_own_are_redone_with_theirs() -> None:
    mixtures = [GaussianMixture(40, seed, shape=(2, 2, 2), spread=0.2) for seed in range(4)]
    clean = torch.cat([mixture.draw(1, seed=5) for mixture in mixtures])

    def for_samples(rows: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        def predict_noise(latents: Tensor, ddim_step: Tensor) -> Tensor:
            assert len(latents) == len(rows)
            return torch.cat([mixtures[row](latents[i : i + 1], ddim_step) for i, row in enumerate(rows.tolist())])

        return predict_noise

    schedule = DDIMSchedule(10)
    together = invert_checked(clean, for_samples(torch.arange(4)), schedule, for_samples=for_samples)
    for row in range(4):
        alone = invert_checked(clean[row : row + 1], mixtures[row], schedule)
        torch.testing.assert_close(together.latents[row : row + 1], alone.latents, rtol=0, atol=1e-8)


def test_guidance_mixes_two_predictors_and_one_is_the_caption_alone() -> None:
    def one(latents: Tensor, ddim_step: Tensor) -> Tensor:
        return torch.ones_like(latents)

    def zero(latents: Tensor, ddim_step: Tensor) -> Tensor:
        return torch.zeros_like(latents)

    latents, ddim_step = torch.zeros(1, 1, 1, 1), torch.tensor(1)
    assert guided(one, zero, 1.0) is one
    assert float(guided(one, zero, 7.5)(latents, ddim_step)) == 7.5


@pytest.mark.parametrize("ddim_steps", [0, 30, 1000, -10])
def test_a_grid_that_does_not_fit_is_refused(ddim_steps: int) -> None:
    with pytest.raises(ValueError, match="divisor of 1000"):
        DDIMSchedule(ddim_steps)


def test_values_out_of_range_are_refused() -> None:
    clean = torch.zeros(1, 4, 4, 4)
    with pytest.raises(ValueError, match="inversion_depth is 11"):
        invert(clean, noise_of, DDIMSchedule(10), inversion_depth=11)
    with pytest.raises(ValueError, match="refinements is -1"):
        invert(clean, noise_of, DDIMSchedule(10), refinements=-1)
    with pytest.raises(ValueError, match="damping 0"):
        invert(clean, noise_of, DDIMSchedule(10), damping=0)
