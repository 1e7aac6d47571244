"""The required properties of a flow path (method.md, section 4): they hold for `warmup` and fail for `paper`."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.flow.path import PaperPath, WarmupPath

PAPER = PaperPath(frames=48, duration=2.0)


def curve(r: Tensor) -> tuple[Tensor, Tensor]:
    """m and m' of a smooth clip of two latents at max(r, 0), (..., 2), not zero at the start."""
    at = r.clamp(min=0)[..., None]
    speed = torch.tensor([3.0, 5.0], dtype=r.dtype)
    return torch.cos(speed * at) + 1, -speed * torch.sin(speed * at)


def value(path: WarmupPath | PaperPath, r: Tensor) -> tuple[Tensor, Tensor]:
    return path.evaluate(r[..., None], curve(r)[0])


def test_warmup_starts_as_noise_and_paper_does_not() -> None:
    for path, holds in ((WarmupPath(), True), (PAPER, False)):
        mean, sigma = value(path, torch.tensor([path.start], dtype=torch.float64))
        assert float(sigma[0, 0]) == pytest.approx(1.0, abs=1e-12)
        assert bool((mean == 0).all()) is holds, "the mean at the start must be exactly 0"


@settings(deadline=None, max_examples=25)
@given(warmup=st.floats(0.05, 2), sigma_end=st.floats(0.01, 1))
def test_warmup_has_sigma_end_at_every_time_of_the_clip(warmup: float, sigma_end: float) -> None:
    r = torch.linspace(0, 1, 997, dtype=torch.float64)
    path = WarmupPath(warmup, sigma_end)
    assert (value(path, r)[1] - sigma_end).abs().max() < 1e-15
    before = torch.linspace(-warmup, 0, 101, dtype=torch.float64)
    sigma = value(path, before)[1][:, 0]
    assert ((sigma[1:] <= sigma[:-1]) & (sigma[1:] >= sigma_end - 1e-12) & (sigma[:-1] <= 1 + 1e-12)).all()


def test_paper_is_noise_between_frames() -> None:
    r = torch.linspace(0.2, 1, 997, dtype=torch.float64)
    assert float(value(PAPER, r)[1].max()) > 0.99
    assert float(value(PAPER, r)[1].min()) < 0.2


@pytest.mark.parametrize("path", [WarmupPath(), WarmupPath(0.7, 0.3), PAPER])
def test_velocities_are_exact_derivatives(path: WarmupPath | PaperPath) -> None:
    """Against central differences in float64, and Theorem 4.1 against the motion of x = mean + sigma z at fixed z."""
    random = np.random.default_rng(0)
    r = torch.from_numpy(random.uniform(path.start + 1e-3, 0.999, 400))
    r = r[r.abs() > 1e-3]
    step = 1e-6
    (before, sigma_before), (after, sigma_after) = value(path, r - step), value(path, r + step)
    mean, mean_slope = curve(r)
    slope, sigma_slope = path.derivative(r[:, None], mean, mean_slope)
    assert (slope - (after - before) / (2 * step)).abs().max() < 1e-6
    assert (sigma_slope - (sigma_after - sigma_before) / (2 * step)).abs().max() < 1e-5
    z = torch.from_numpy(random.standard_normal((len(r), 2)))
    centre, sigma = path.evaluate(r[:, None], mean)
    moved = (after + sigma_after * z - before - sigma_before * z) / (2 * step)
    assert (path.velocity(centre + sigma * z, r[:, None], mean, mean_slope) - moved).abs().max() < 1e-4


def test_warmup_is_continuous_and_its_sigma_smooth() -> None:
    path, zero = WarmupPath(), torch.zeros(1, dtype=torch.float64)
    (left, sigma_left), (right, sigma_right) = value(path, zero - 1e-9), value(path, zero + 1e-9)
    assert (left - right).abs().max() < 1e-7
    assert (sigma_left - sigma_right).abs().max() < 1e-7
    mean, slope = curve(zero)
    on_left = path.derivative(zero[:, None], mean, slope, left=True)
    on_right = path.derivative(zero[:, None], mean, slope)
    assert on_left[1].item() == on_right[1].item() == 0
    assert (on_left[0] == 0).all()
    assert (on_right[0] == slope).all()
    assert path.breakpoints == (0.0,)


def test_numbers_and_tensors_agree_and_keep_the_dtype() -> None:
    x, mean, slope = (
        torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(k), dtype=torch.float64) for k in range(3)
    )
    for path in (WarmupPath(), PAPER):
        for r in (-0.2, -0.1, 0.0, 0.4, 1.0):
            for left in (False, True) if r >= path.start else ():
                by_number = path.velocity(x, r, mean, slope, left=left)
                by_tensor = path.velocity(x, torch.full((3, 1, 1), r, dtype=torch.float64), mean, slope, left=left)
                torch.testing.assert_close(by_number, by_tensor, rtol=1e-12, atol=1e-12)
                single = path.velocity(x.float(), r, mean.float(), slope.float(), left=left)
                assert single.dtype == torch.float32
                torch.testing.assert_close(single.double(), by_number, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: WarmupPath(warmup=0), "warmup is 0"),
        (lambda: WarmupPath(sigma_end=0), "sigma_end is 0"),
        (lambda: WarmupPath(sigma_end=1.5), "sigma_end is 1.5"),
        (lambda: PaperPath(frames=0), "frames is 0"),
        (lambda: PaperPath(duration=-1), "duration is -1"),
        (lambda: PaperPath(sigma_min=0), "sigma_min is 0"),
        (lambda: PaperPath(alpha=0), "alpha is 0"),
    ],
)
def test_bad_paths_are_refused(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("least", [0.1, 0.002])
@pytest.mark.parametrize("sigma_end", [0.1, 1.0])
def test_warm_up_times_lie_evenly_in_the_logarithm_of_signal_to_noise(least: float, sigma_end: float) -> None:
    path = WarmupPath(warmup=0.4, sigma_end=sigma_end)
    place = torch.linspace(0, 1, 65, dtype=torch.float64)
    times = path.warmup_times(place, least)
    assert float(times[0]) == path.start
    assert float(times[-1]) == 0.0
    assert bool((times.diff() > 0).all())
    signal, sigma = path.evaluate(times, torch.ones(65, dtype=torch.float64))
    ratio = signal / sigma
    steps = (ratio + least).log().diff()  # log(ratio / least + 1) is even: log(ratio) far above `least`, linear below
    torch.testing.assert_close(steps, steps.mean().expand(64), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(path.warmup_times(place.float(), least).double(), times, atol=2e-6, rtol=0)
