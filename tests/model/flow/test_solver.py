"""The solver against closed forms: orders of convergence, re-anchoring, readout, counted calls, refusals."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from model.flow.path import PaperPath, WarmupPath
from model.flow.solver import METHODS, Trajectory, hermite, integrate, solve

SPEED = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
NOISE = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
CALLS = {"euler": 1, "midpoint": 2, "heun": 2, "rk4": 4}
ORDERS = {"euler": 1, "midpoint": 2, "heun": 2, "rk4": 4}


def mean(r: float) -> Tensor:
    return torch.sin(SPEED * r + torch.tensor([[0.5], [1.5]]))


def slope(r: float) -> Tensor:
    return SPEED * torch.cos(SPEED * r + torch.tensor([[0.5], [1.5]]))


def one_video(x: Tensor, r: float) -> tuple[Tensor, Tensor]:
    """The exact network of a single video: it need not look at x."""
    return mean(max(r, 0.0)), slope(max(r, 0.0))


def grid_of(steps: int, warmup_steps: int | None = None) -> Tensor:
    early = torch.linspace(-0.25, 0, (warmup_steps or steps // 2) + 1, dtype=torch.float64)
    return torch.cat([early[:-1], torch.linspace(0, 1, steps + 1, dtype=torch.float64)])


def fitted_order(steps: list[int], errors: list[float]) -> float:
    return -float(np.polyfit(np.log(steps), np.log(errors), 1)[0])


@pytest.mark.parametrize("method", CALLS)
def test_convergence_order_on_a_linear_equation(method: str) -> None:
    """x' = -3 x + 4 sin(2 r), with the closed form of its solution."""

    def field(x: Tensor, r: float) -> Tensor:
        return -3 * x + 4 * math.sin(2 * r)

    particular = (12 * math.sin(2.0) - 8 * math.cos(2.0)) / 13
    exact = particular + (1 + 8 / 13) * math.exp(-3.0)
    steps = [32, 64, 128, 256]
    start = torch.ones(1, dtype=torch.float64)
    errors = [abs(float(integrate(field, start, torch.linspace(0, 1, n + 1), method)[-1]) - exact) for n in steps]
    assert fitted_order(steps, errors) == pytest.approx(ORDERS[method], abs=0.15)


@pytest.mark.parametrize("method", CALLS)
def test_convergence_order_across_the_kink(method: str) -> None:
    """The whole flow of one video ends at m(1) + sigma_end z; a stage at r = 0 must use the warm-up's side."""
    steps = [32, 64, 128]
    errors = []
    for n in steps:
        trajectory = solve(WarmupPath(), one_video, NOISE, grid_of(n), method, reanchor=False)
        errors.append(float((trajectory.states[-1] - mean(1.0) - 0.1 * NOISE).abs().max()))
    assert fitted_order(steps, errors) > ORDERS[method] - 0.25
    zero = int(torch.searchsorted(trajectory.grid, 0.0))
    warm = float((trajectory.states[zero] - mean(0.0) - 0.1 * NOISE).abs().max())
    assert warm < {"euler": 0.1, "midpoint": 2e-3, "heun": 5e-3, "rk4": 1e-5}[method]


def test_adaptive_meets_its_tolerance_without_crossing_the_kink() -> None:
    for tolerance in (1e-4, 1e-7):
        trajectory = solve(
            WarmupPath(), one_video, NOISE, [-0.25, 0.0, 1.0], "adaptive", reanchor=False, tolerance=tolerance
        )
        for k, r in ((1, 0.0), (2, 1.0)):
            assert (trajectory.states[k] - mean(r) - 0.1 * NOISE).abs().max() < 30 * tolerance
    decay = integrate(lambda x, r: -x, torch.ones(1), [0.0, 0.5, 1.0], "adaptive")
    torch.testing.assert_close(decay[:, 0], torch.exp(-torch.tensor([0.0, 0.5, 1.0])), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("reanchor", [True, False])
def test_the_number_of_calls_is_known_and_not_the_frame_rates(method: str, reanchor: bool) -> None:
    calls = 0

    def predict(x: Tensor, r: float) -> tuple[Tensor, Tensor]:
        nonlocal calls
        calls += 1
        return one_video(x, r)

    trajectory = solve(WarmupPath(), predict, NOISE, grid_of(8), method, reanchor=reanchor)
    assert trajectory.network_calls == calls
    if method in CALLS:
        assert calls == CALLS[method] * 12 + 1
    for rate in (8, 64):
        assert trajectory.read(torch.linspace(0, 1, rate)).shape == (rate, 2, 3)
    assert trajectory.network_calls == calls


@pytest.mark.parametrize("source", ["mean", "state"])
def test_dense_output_is_of_fourth_order(source: str) -> None:
    """Hermite from exact means and derivatives; from exact states less their noise it is the same curve."""
    times = torch.linspace(0, 1, 201, dtype=torch.float64)
    truth = torch.stack([mean(float(r)) for r in times])
    steps, errors = [4, 8, 16, 32], []
    for n in steps:
        grid = torch.linspace(0, 1, n + 1, dtype=torch.float64)
        means, slopes = (torch.stack([f(float(r)) for r in grid]) for f in (mean, slope))
        trajectory = Trajectory(WarmupPath(), grid, means, slopes, means + 0.1 * NOISE, NOISE, 0)
        errors.append(float((trajectory.read(times, source) - truth).abs().max()))
    assert fitted_order(steps, errors) == pytest.approx(4, abs=0.2)


def test_readout_passes_through_the_grid_points_in_any_sequence() -> None:
    grid = torch.tensor([0.0, 0.2, 0.7, 1.0], dtype=torch.float64)
    values, slopes = torch.randn(2, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    order = torch.tensor([3, 0, 2, 1])
    torch.testing.assert_close(hermite(grid, values, slopes, grid[order]), values[order])
    h = 1e-6
    around = hermite(grid, values, slopes, torch.tensor([0.2 - h, 0.2 + h, 0.7 - h, 0.7 + h], dtype=torch.float64))
    torch.testing.assert_close((around[1::2] - around[::2]) / (2 * h), slopes[1:3], rtol=1e-3, atol=1e-3)


def test_reanchoring_stops_the_drift() -> None:
    """A network whose derivative is 20 % off: the state drifts with it, the re-anchored state does not."""

    def predict(x: Tensor, r: float) -> tuple[Tensor, Tensor]:
        true_mean, true_slope = one_video(x, r)
        return true_mean, 1.2 * true_slope

    drift = {}
    for reanchor in (True, False):
        trajectory = solve(WarmupPath(), predict, NOISE, grid_of(32), reanchor=reanchor)
        drift[reanchor] = float((trajectory.states[-1] - mean(1.0) - 0.1 * NOISE).abs().max())
    assert drift[True] < 0.05
    assert drift[False] > 0.2
    # Re-anchoring uses the noise the flow started from, the same z at every point.
    exact = solve(WarmupPath(), lambda x, r: (mean(max(r, 0.0)), 0 * x), NOISE, grid_of(4))
    zero = int(torch.searchsorted(exact.grid, 0.0))
    for k in range(zero + 1, len(exact.grid)):
        torch.testing.assert_close(exact.states[k], mean(float(exact.grid[k - 1])) + 0.1 * NOISE)


def test_starting_from_a_known_frame() -> None:
    grid = torch.linspace(0, 1, 9, dtype=torch.float64)
    trajectory = solve(WarmupPath(), one_video, NOISE, grid, "rk4", start_mean=mean(0.0))
    torch.testing.assert_close(trajectory.states[0], mean(0.0) + 0.1 * NOISE)
    torch.testing.assert_close(trajectory.read([0.0, 1.0]), torch.stack([mean(0.0), mean(1.0)]))


def test_the_papers_path_and_its_readout() -> None:
    """x_t - sigma_t x_0 gives the frames when the flow is integrated finely enough."""
    path = PaperPath(frames=4, duration=1.0, sigma_min=0.1)
    grid = torch.linspace(0, 1, 801, dtype=torch.float64)
    started = solve(path, one_video, NOISE, grid, "rk4", reanchor=False, start_mean=mean(0.0))
    times = [0.25, 0.5, 1.0]
    torch.testing.assert_close(
        started.read(times, "state"), torch.stack([mean(r) for r in times]), rtol=1e-5, atol=1e-5
    )
    # As printed the flow starts at z alone, because mu_0 = 0 is required; but mu_0 is m(0), which is then missing.
    printed = solve(path, one_video, NOISE, grid, "rk4", reanchor=False)
    missing = (printed.read(times, "state") - torch.stack([mean(r) for r in times])).abs()
    assert missing.max() > 0.05


def test_float32_batches_of_latents() -> None:
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    trajectory = solve(WarmupPath(), lambda x, r: (0.5 * x, 0.1 * x), noise, grid_of(4))
    assert trajectory.means.shape == (7, 2, 4, 8, 8)
    assert trajectory.means.dtype == trajectory.read([0.3]).dtype == torch.float32
    assert trajectory.read([0.1, 0.9], "state").shape == (2, 2, 4, 8, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grid": [-0.25, -0.1, 0.1, 1.0]}, "lacks the flow time 0.0, where the path has a kink"),
        ({"grid": [-0.25, 0.0, 0.0, 1.0]}, "must hold at least two flow times that strictly increase"),
        ({"grid": [-0.25]}, "must hold at least two"),
        ({"grid": [-0.25, float("nan"), 1.0]}, "strictly increase"),
        ({"grid": [-0.5, 0.0, 1.0]}, "grid runs from -0.5 to 1.0; the path runs from -0.25 to 1.0"),
        ({"grid": [-0.25, 0.0, 1.5]}, "grid runs from -0.25 to 1.5"),
        ({"grid": [0.0, 1.0]}, "grid starts at 0.0, the noise is at -0.25; to start later give start_mean"),
        ({"method": "leapfrog"}, "method is 'leapfrog'; it must be one of ddim"),
        ({"predict": lambda x, r: (x[:1], x)}, r"predict returned shapes \(1, 3\) and \(2, 3\) for latents \(2, 3\)"),
    ],
)
def test_bad_input_is_refused(change: dict, message: str) -> None:
    arguments = {"predict": one_video, "grid": [-0.25, 0.0, 1.0], "method": "euler", **change}
    with pytest.raises(ValueError, match=message):
        solve(WarmupPath(), arguments["predict"], NOISE, arguments["grid"], arguments["method"])


def test_reading_outside_the_clip_is_refused() -> None:
    trajectory = solve(WarmupPath(), one_video, NOISE, [-0.25, 0.0, 0.5])
    for times in ([-0.1], [0.6], [float("nan")]):
        with pytest.raises(ValueError, match=r"the trajectory covers \[0.0, 0.5\]"):
            trajectory.read(times)
    with pytest.raises(ValueError, match="source is 'noise'"):
        trajectory.read([0.1], "noise")
    with pytest.raises(ValueError, match="method is 'leapfrog'"):
        integrate(lambda x, r: x, NOISE, [0.0, 1.0], "leapfrog")


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_ddim_steps_are_exact_on_the_warm_up_while_the_prediction_stays(steps: int) -> None:
    """And Euler's are not: its first one leads nowhere."""
    path, generator = WarmupPath(), torch.Generator().manual_seed(0)
    mean, noise = (torch.randn(3, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    grid = torch.linspace(path.start, 0, steps + 1, dtype=torch.float64)

    def predict(x: Tensor, time: float) -> tuple[Tensor, Tensor]:
        return mean, torch.zeros_like(mean)

    ends = {method: solve(path, predict, noise, grid, method).states[-1] for method in ("ddim", "euler")}
    exact = mean + path.sigma_end * noise
    torch.testing.assert_close(ends["ddim"], exact)
    assert float((ends["euler"] - exact).abs().max()) > 0.01


def test_two_trajectories_join_where_one_ends() -> None:
    path, noise = WarmupPath(), torch.ones(2, 3, dtype=torch.float64)

    def predict(x: Tensor, time: float) -> tuple[Tensor, Tensor]:
        return x + time, torch.ones_like(x)

    before = solve(path, predict, noise, [path.start, -0.1, 0.0])
    after = solve(path, predict, noise, [0.0, 0.5, 1.0], start_state=before.states[-1])
    whole, joined = solve(path, predict, noise, [path.start, -0.1, 0.0, 0.5, 1.0]), after.after(before)
    torch.testing.assert_close(joined.grid, whole.grid)
    for name in ("means", "derivatives", "states"):
        torch.testing.assert_close(getattr(joined, name), getattr(whole, name))
    assert joined.network_calls == whole.network_calls + 1
