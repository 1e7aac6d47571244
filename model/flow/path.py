"""Flow paths: the mean and the standard deviation of the latents at every flow time, and the velocity between them.

Flow time r = t/T runs from `start` to 1; on [0, 1] it is the clip itself. The curve of a clip is m(r) on [0, 1]; a path
is asked with m(max(r, 0)) and m'(max(r, 0)), per unit of r, and assembles from them what the flow needs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class WarmupPath:
    """From noise to the first frame on [-warmup, 0], then along the clip at a constant standard deviation.

    With q = (r + w)/w and a = q^2 (3 - 2q): before 0 the mean is a m(0) and sigma is 1 - (1 - sigma_end) a; from 0 on
    they are m(r) and sigma_end. Mean and sigma are continuous, sigma is C1, each piece is smooth.
    """

    warmup: float = 0.25
    """Length w of the way from noise to the first frame, in units of the clip's duration; > 0."""
    sigma_end: float = 0.1
    """Standard deviation at every time of the clip, in latents of unit variance; in (0, 1]."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.warmup) and self.warmup > 0):
            raise ValueError(f"warmup is {self.warmup}; it must be above 0, in units of the clip's duration")
        if not 0 < self.sigma_end <= 1:
            raise ValueError(f"sigma_end is {self.sigma_end}; it must lie in (0, 1]")

    @property
    def start(self) -> float:
        """Flow time at which the latents are pure noise."""
        return -self.warmup

    @property
    def end(self) -> float:
        """Flow time of the clip's end."""
        return 1.0

    @property
    def breakpoints(self) -> tuple[float, ...]:
        """Flow times inside the path where the mean has a kink: points of every solver grid."""
        return (0.0,)

    def evaluate(self, flow_time: float | Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latents.

        Args:
            flow_time: r in [start, 1], a number or a tensor that broadcasts with `mean`.
            mean: m(max(r, 0)).

        Returns:
            The path's mean, of the shape of `mean`, and sigma, of the shape of `flow_time`.
        """
        rise = _smoothstep(_fraction(flow_time, self.warmup))
        return rise * mean, 1 - (1 - self.sigma_end) * rise

    def derivative(
        self, flow_time: float | Tensor, mean: Tensor, mean_derivative: Tensor, left: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Derivatives of mean and standard deviation per unit of flow time.

        Args:
            flow_time, mean: as for `evaluate`.
            mean_derivative: m'(max(r, 0)) per unit of r.
            left: at the kink r = 0 take the warm-up's derivative, as a solver's step that ends there must.
        """
        fraction = _fraction(flow_time, self.warmup)
        slope = 6 * fraction * (1 - fraction) / self.warmup
        sigma_slope = -(1 - self.sigma_end) * slope
        on_clip = flow_time > 0 if left else flow_time >= 0
        if isinstance(on_clip, Tensor):
            return torch.where(on_clip, mean_derivative, slope * mean), sigma_slope
        return mean_derivative if on_clip else slope * mean, sigma_slope

    def velocity(
        self, x: Tensor, flow_time: float | Tensor, mean: Tensor, mean_derivative: Tensor, left: bool = False
    ) -> Tensor:
        """Velocity of the flow at x, given the clip: arXiv 2502.00500, Theorem 4.1; arguments as for `derivative`."""
        return _velocity(
            x, self.evaluate(flow_time, mean), self.derivative(flow_time, mean, mean_derivative, left=left)
        )

    def warmup_times(self, place: Tensor, least: float) -> Tensor:
        """Flow times in [start, 0], of the shape of `place` in [0, 1]: even in the logarithm of signal to noise.

        place: 0 is pure noise, 1 is r = 0.
        least: about the ratio of signal to noise, per value of the latents, from which on they are told apart. A
            picture of d values shows itself in noise from about 1/sqrt(d) on (the more values, the earlier; Hoogeboom
            et al. 2023, arXiv 2301.11093): a sampler that steps over it never chooses, and takes the average.
        """
        most, even = 1 / self.sigma_end, place.double()
        ratio = least * torch.expm1(even * math.log1p(most / least))
        rise = (ratio / (1 + (1 - self.sigma_end) * ratio)).clamp(0, 1)
        return torch.where(even >= 1, 0.0, self.time_of(rise)).to(place.dtype)

    def time_of(self, rise: Tensor) -> Tensor:
        """Flow times in [start, 0] at which the mean is `rise` (in [0, 1], float64) times the first frame.

        The rise is the place on the straight line from noise to the frame, the time of rectified flows.
        """
        fraction = 0.5 - torch.sin(torch.asin(1 - 2 * rise) / 3)  # the inverse of _smoothstep
        return (self.warmup * (fraction - 1)).clamp(self.start, 0)


@dataclass(frozen=True)
class PaperPath:
    """The path as arXiv 2502.00500 prints it (section 4.2), for comparison: t = r T, from r = 0.

    sigma = (1 - sigma_min) (sin^2(pi N t/T) + exp(-alpha t)) + sigma_min: it exceeds 1, it has not decayed at the first
    frames, and half-way between frames it is 1, so that frames between the observed ones are noise.
    """

    frames: int = 48
    """Number N of observed frames in the window."""
    duration: float = 2.0
    """Length T of the window in seconds."""
    sigma_min: float = 0.01
    """Standard deviation meant for the frames."""
    alpha: float = 10.0
    """Rate of the decay from the noise, per second."""

    def __post_init__(self) -> None:
        if self.frames < 1:
            raise ValueError(f"frames is {self.frames}; it must be at least 1")
        if not (math.isfinite(self.duration) and self.duration > 0):
            raise ValueError(f"duration is {self.duration}; it must be a finite number of seconds above 0")
        if not 0 < self.sigma_min <= 1:
            raise ValueError(f"sigma_min is {self.sigma_min}; it must lie in (0, 1]")
        if not self.alpha > 0:
            raise ValueError(f"alpha is {self.alpha}; it must be above 0, per second")

    @property
    def start(self) -> float:
        """Flow time of the noise; the mean there is m(0), not 0 as the paper requires."""
        return 0.0

    @property
    def end(self) -> float:
        """Flow time of the clip's end."""
        return 1.0

    @property
    def breakpoints(self) -> tuple[float, ...]:
        """None: the path is smooth."""
        return ()

    def evaluate(self, flow_time: float | Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation; arguments and shapes as for `WarmupPath.evaluate`, r in [0, 1]."""
        time = _as_tensor(flow_time)
        swing = torch.sin(math.pi * self.frames * time).square()
        return mean, (1 - self.sigma_min) * (swing + torch.exp(-self.alpha * self.duration * time)) + self.sigma_min

    def derivative(
        self, flow_time: float | Tensor, mean: Tensor, mean_derivative: Tensor, left: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Derivatives of mean and sigma per unit of flow time; there is no kink, so `left` changes nothing."""
        time = _as_tensor(flow_time)
        swing = math.pi * self.frames * torch.sin(2 * math.pi * self.frames * time)
        decay = self.alpha * self.duration * torch.exp(-self.alpha * self.duration * time)
        return mean_derivative, (1 - self.sigma_min) * (swing - decay)

    def velocity(
        self, x: Tensor, flow_time: float | Tensor, mean: Tensor, mean_derivative: Tensor, left: bool = False
    ) -> Tensor:
        """Velocity of the flow at x, given the clip: arXiv 2502.00500, Theorem 4.1."""
        return _velocity(
            x, self.evaluate(flow_time, mean), self.derivative(flow_time, mean, mean_derivative, left=left)
        )


def _velocity(x: Tensor, value: tuple[Tensor, Tensor], derivative: tuple[Tensor, Tensor]) -> Tensor:
    (mean, sigma), (mean_slope, sigma_slope) = value, derivative
    return mean_slope + sigma_slope / sigma * (x - mean)


def _as_tensor(flow_time: float | Tensor) -> Tensor:
    """A plain number becomes a float64 scalar, which does not raise the dtype of what it multiplies."""
    return flow_time if isinstance(flow_time, Tensor) else torch.tensor(flow_time, dtype=torch.float64)


def _fraction(flow_time: float | Tensor, warmup: float) -> Tensor:
    return ((_as_tensor(flow_time) + warmup) / warmup).clamp(0, 1)


def _smoothstep(fraction: Tensor) -> Tensor:
    return fraction.square() * (3 - 2 * fraction)
