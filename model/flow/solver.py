"""Integrating the flow on an explicit grid of flow times, and reading the clip at any time afterwards.

The network is asked a fixed number of times, whatever the frame rate: frames are read by cubic Hermite interpolation
of what it predicted at the grid points.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

Predict = Callable[[Tensor, float], tuple[Tensor, Tensor]]
"""The network: latents (B, ...) at a flow time r to (m, m') at max(r, 0), each (B, ...), m' per unit of r."""
Field = Callable[[Tensor, float], Tensor]
"""A velocity: state and flow time to the state's derivative."""
METHODS = ("ddim", "euler", "midpoint", "heun", "rk4", "adaptive")


class Path(Protocol):
    """What the solver needs of a flow path; model/flow/path.py has two."""

    @property
    def start(self) -> float: ...
    @property
    def end(self) -> float: ...
    @property
    def breakpoints(self) -> tuple[float, ...]: ...
    def evaluate(self, flow_time: float | Tensor, mean: Tensor) -> tuple[Tensor, Tensor]: ...
    def derivative(
        self, flow_time: float | Tensor, mean: Tensor, mean_derivative: Tensor, left: bool = False
    ) -> tuple[Tensor, Tensor]: ...
    def velocity(
        self, x: Tensor, flow_time: float | Tensor, mean: Tensor, mean_derivative: Tensor, left: bool = False
    ) -> Tensor: ...


@dataclass(frozen=True)
class Trajectory:
    """What the network said along the flow, at the K points of the solver's grid."""

    path: Path
    """The flow's path."""
    grid: Tensor
    """(K,) float64 on the CPU: flow times, strictly increasing."""
    means: Tensor
    """(K, B, ...): predicted m(max(r, 0))."""
    derivatives: Tensor
    """(K, B, ...): predicted m'(max(r, 0)), per unit of flow time."""
    states: Tensor
    """(K, B, ...): the state that arrived at each point, before re-anchoring: what the network saw."""
    noise: Tensor
    """(B, ...): z of the path, the same all along."""
    network_calls: int
    """How often the network was asked."""
    source: str = "mean"
    """What frames are read from where `read` is not told."""

    def read(self, flow_times: Sequence[float] | Tensor, source: str | None = None) -> Tensor:
        """The clip at any flow times of [0, 1], by cubic Hermite between the grid points; asks no network.

        Args:
            flow_times: (L,) flow times in [0, the grid's end], in any sequence.
            source: `mean` reads the predicted mean; `state` reads the integrated state less its noise, `x - sigma z`
                (the readout of arXiv 2502.00500 where z = x_0); None takes the trajectory's own.

        Returns:
            (L, B, ...).

        Raises:
            ValueError: times outside the grid's part of the clip, or an unknown source.
        """
        source = source or self.source
        first = int(torch.searchsorted(self.grid, 0.0))
        grid = self.grid[first:]
        times = torch.as_tensor(flow_times, dtype=torch.float64, device="cpu").reshape(-1)
        if len(grid) == 0 or not bool(((times >= grid[0]) & (times <= grid[-1])).all()):
            span = f"[{grid[0]}, {grid[-1]}]" if len(grid) else "nothing of the clip"
            raise ValueError(f"flow_times are {times.tolist()}; the trajectory covers {span}")
        if source == "mean":
            values, slopes = self.means[first:], self.derivatives[first:]
        elif source == "state":
            values, slopes = self._less_noise(first)
        else:
            raise ValueError(f"source is {source!r}; it must be 'mean' or 'state'")
        return hermite(grid, values, slopes, times)

    def after(self, before: Trajectory) -> Trajectory:
        """This one behind another that ends where it begins; at the point they share, this one's answers stand."""
        return dataclasses.replace(
            self,
            grid=torch.cat([before.grid[:-1], self.grid]),
            means=torch.cat([before.means[:-1], self.means]),
            derivatives=torch.cat([before.derivatives[:-1], self.derivatives]),
            states=torch.cat([before.states[:-1], self.states]),
            network_calls=before.network_calls + self.network_calls,
        )

    def of_frame(self, index: int) -> Trajectory:
        """That of one frame, where states are (B, frames, ...)."""
        return dataclasses.replace(
            self,
            means=self.means[:, :, index],
            derivatives=self.derivatives[:, :, index],
            states=self.states[:, :, index],
            noise=self.noise[:, index],
        )

    def _less_noise(self, first: int) -> tuple[Tensor, Tensor]:
        values, slopes = [], []
        for k in range(first, len(self.grid)):
            at, x, mean, slope = float(self.grid[k]), self.states[k], self.means[k], self.derivatives[k]
            values.append(x - self.path.evaluate(at, mean)[1] * self.noise)
            slopes.append(
                self.path.velocity(x, at, mean, slope) - self.path.derivative(at, mean, slope)[1] * self.noise
            )
        return torch.stack(values), torch.stack(slopes)


def solve(
    path: Path,
    predict: Predict,
    noise: Tensor,
    grid: Sequence[float] | Tensor,
    method: str = "euler",
    *,
    reanchor: bool = True,
    start_mean: Tensor | None = None,
    start_state: Tensor | None = None,
    tolerance: float = 1e-5,
) -> Trajectory:
    """Integrate the flow from noise along `grid`.

    At each grid point of the clip the network predicts (m, m'), and with `reanchor` the state becomes m + sigma z with
    the noise z it started from, which is known: the drift of the state is then cut at every point, not summed.

    Args:
        path: the flow's path; its breakpoints (0 for the warm-up) must be grid points.
        predict: the network; every call counts.
        noise: (B, ...) standard normal latents z.
        grid: (K,) flow times, strictly increasing, K >= 2, from `path.start`; or from a later time with `start_mean` or
            `start_state`.
        method: one of METHODS; 1, 1, 2, 2, 4 calls a step and one at the end, as many as it takes for `adaptive`
            (torchdiffeq's dopri5, from grid point to grid point). `ddim` is Euler's but for the warm-up, where it is
            exact while the predicted mean stays.
        reanchor: whether the state is re-anchored on the predicted mean at the clip's grid points.
        start_mean: (B, ...) m at the grid's first point, where the flow starts from a known frame: x = mean + sigma z.
        start_state: (B, ...) x at the grid's first point, where the flow goes on.
        tolerance: relative and absolute error allowed to `adaptive`, per step.

    Raises:
        ValueError: a grid that does not fit the path, an unknown method, or predictions of another shape.
    """
    times = _checked_grid(path, grid, start_mean is not None or start_state is not None)
    if method not in METHODS:
        raise ValueError(f"method is {method!r}; it must be one of {', '.join(METHODS)}")
    calls = 0

    def ask(x: Tensor, time: float) -> tuple[Tensor, Tensor]:
        nonlocal calls
        calls += 1
        mean, slope = predict(x, time)
        if mean.shape != x.shape or slope.shape != x.shape:
            raise ValueError(
                f"predict returned shapes {tuple(mean.shape)} and {tuple(slope.shape)} for latents {tuple(x.shape)}; "
                "all three must be equal"
            )
        return mean, slope

    x = noise if start_state is None else start_state
    if start_mean is not None:
        centre, sigma = path.evaluate(times[0], start_mean)
        x = centre + sigma * noise
    means, slopes, states = [], [], []
    for k, time in enumerate(times):
        mean, slope = ask(x, time)
        means.append(mean)
        slopes.append(slope)
        states.append(x)
        if k == len(times) - 1:
            break
        if reanchor and time >= 0:
            centre, sigma = path.evaluate(time, mean)
            x = centre + sigma * noise
        left = times[k + 1] <= 0  # the whole step lies on the warm-up, its end at the kink too

        def field(at: Tensor, when: float, left: bool = left) -> Tensor:
            return path.velocity(at, when, *ask(at, when), left=left)

        if left and method == "ddim":
            x = _warmup_step(path, x, time, times[k + 1], mean)
            continue
        first = path.velocity(x, time, mean, slope, left=left)
        x = _step(method, field, x, time, times[k + 1], first, tolerance)
    return Trajectory(
        path=path,
        grid=torch.tensor(times, dtype=torch.float64),
        means=torch.stack(means),
        derivatives=torch.stack(slopes),
        states=torch.stack(states),
        noise=noise,
        network_calls=calls,
    )


def integrate(
    field: Field, x: Tensor, grid: Sequence[float] | Tensor, method: str = "rk4", tolerance: float = 1e-5
) -> Tensor:
    """States (K, ...) at the grid's points of dx/dr = field(x, r), from `x` (...) at the first: no path.

    Raises:
        ValueError: an unknown method, or a grid that does not strictly increase.
    """
    times = _increasing(grid)
    if method not in METHODS:
        raise ValueError(f"method is {method!r}; it must be one of {', '.join(METHODS)}")
    states = [x]
    for time, following in pairwise(times):
        states.append(_step(method, field, states[-1], time, following, field(states[-1], time), tolerance))
    return torch.stack(states)


def hermite(grid: Tensor, values: Tensor, slopes: Tensor, times: Tensor) -> Tensor:
    """Cubic Hermite interpolation: (K,) grid, (K, ...) values and slopes, (L,) times in the grid's span to (L, ...)."""
    if len(grid) == 1:
        return values[torch.zeros(len(times), dtype=torch.long, device=values.device)]
    before = (torch.searchsorted(grid, times, right=True) - 1).clamp(0, len(grid) - 2)
    step = grid[before + 1] - grid[before]
    q = (times - grid[before]) / step
    # One product with a matrix of four weights a row is quicker than gathering four frames for each that is read.
    row = torch.arange(len(times))
    on_values = torch.zeros(len(times), len(grid), dtype=torch.float64)
    on_slopes = torch.zeros_like(on_values)
    on_values[row, before], on_values[row, before + 1] = (1 + 2 * q) * (1 - q) ** 2, q**2 * (3 - 2 * q)
    on_slopes[row, before], on_slopes[row, before + 1] = step * q * (1 - q) ** 2, step * q**2 * (q - 1)
    with torch.autocast(values.device.type, enabled=False):
        read = torch.addmm(on_values.to(values) @ values.flatten(1), on_slopes.to(slopes), slopes.flatten(1))
    return read.reshape(len(times), *values.shape[1:])


def _step(method: str, field: Field, x: Tensor, r: float, end: float, first: Tensor, tolerance: float) -> Tensor:
    """The state at `end`; `first` is the velocity at (x, r), already known."""
    h = end - r
    match method:
        case "euler" | "ddim":
            return x + h * first
        case "midpoint":
            return x + h * field(x + h / 2 * first, r + h / 2)
        case "heun":
            return x + h / 2 * (first + field(x + h * first, end))
        case "rk4":
            second = field(x + h / 2 * first, r + h / 2)
            third = field(x + h / 2 * second, r + h / 2)
            fourth = field(x + h * third, end)
            return x + h / 6 * (first + 2 * second + 2 * third + fourth)
        case _:
            return _adaptive(field, x, r, end, tolerance)


def _warmup_step(path: Path, x: Tensor, r: float, end: float, mean: Tensor) -> Tensor:
    """The state at `end` on the warm-up: exact where the predicted mean stays what it is at r.

    It is DDIM's step (Song et al. 2021, arXiv 2010.02502, eq. 12 with eta 0): the noise that x holds beside the mean is
    kept and mixed anew. Euler's first step would lead nowhere, since the path begins with a slope of 0.
    """
    centre, sigma = path.evaluate(r, mean)
    centre_then, sigma_then = path.evaluate(end, mean)
    return centre_then + sigma_then / sigma * (x - centre)


def _adaptive(field: Field, x: Tensor, r: float, end: float, tolerance: float) -> Tensor:
    from torchdiffeq import odeint

    def on_span(when: Tensor, at: Tensor) -> Tensor:
        # torchdiffeq's own times may pass the end by a rounding, where the next piece of the path begins.
        return field(at, min(max(float(when), r), end))

    span = torch.tensor([r, end], dtype=torch.float64, device=x.device)
    # step_t makes the end a step: dopri5 would otherwise run past it, into the next piece, and interpolate back.
    options = {"step_t": span}
    states: Tensor = odeint(on_span, x, span, rtol=tolerance, atol=tolerance, method="dopri5", options=options)
    return states[-1]


def _increasing(grid: Sequence[float] | Tensor) -> list[float]:
    times = torch.as_tensor(grid, dtype=torch.float64).reshape(-1).tolist()
    if len(times) < 2 or not all(a < b for a, b in pairwise(times)):
        raise ValueError(f"grid is {times}; it must hold at least two flow times that strictly increase")
    return times


def _checked_grid(path: Path, grid: Sequence[float] | Tensor, started: bool) -> list[float]:
    times = _increasing(grid)
    first, last = times[0], times[-1]
    if first < path.start - 1e-9 or last > path.end + 1e-9 or not math.isfinite(last):
        raise ValueError(f"grid runs from {first} to {last}; the path runs from {path.start} to {path.end}")
    if not started and abs(first - path.start) > 1e-9:
        raise ValueError(
            f"grid starts at {first}, the noise is at {path.start}; to start later give start_mean, the mean there"
        )
    for kink in path.breakpoints:
        if first < kink < last and kink not in times:
            raise ValueError(f"grid {times} lacks the flow time {kink}, where the path has a kink; add it")
    return times
