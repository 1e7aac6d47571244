"""HiPPO-LegS of films too long to hold: two streaming forms, both equal to the one-shot projection, both resumable.

`ChunkedProjection` knows the times beforehand and adds `W_k^T U_k` chunk by chunk, with any method. `GrowingProjection`
knows nothing of what will come: its window grows with every frame, by exact dilation of the path so far.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import ArrayLike, NDArray

from model.legs.basis import Float64, gauss_legendre, legendre_basis, legendre_integral
from model.legs.projection import _refuse_frames, checked_times, projection_matrix


@dataclass
class ChunkedProjection:
    """A projection whose frames arrive in chunks, at times known beforehand; the sum is kept in float64."""

    times: Float64
    """(N,) seconds of all frames in the window."""
    duration: float
    """Length of the window in seconds."""
    order: int
    """Number of coefficients."""
    method: str = "cubic"
    """Any method of `projection_matrix`."""
    received: int = 0
    """Frames added so far."""
    total: Float64 | None = None
    """(order, ...) the sum so far; None before the first chunk."""

    def __post_init__(self) -> None:
        self.times = checked_times("times", self.times, self.duration, increasing=True)
        self.matrix = projection_matrix(self.times, self.duration, self.order, self.method)

    def add(self, chunk: NDArray[np.generic]) -> None:
        """Add the next frames, (K, ...).

        Raises:
            ValueError: more frames than times, frames of another shape, or frames that are not finite.
        """
        last = self.received + len(chunk)
        if last > len(self.times):
            raise ValueError(
                f"chunk holds {len(chunk)} frames; only {len(self.times) - self.received} are still to come"
            )
        if self.total is not None and chunk.shape[1:] != self.total.shape[1:]:
            raise ValueError(f"chunk has frames of shape {chunk.shape[1:]}; those before had {self.total.shape[1:]}")
        if not np.isfinite(chunk).all():
            _refuse_frames(chunk, 1)
        flat = chunk.reshape(len(chunk), math.prod(chunk.shape[1:])).astype(np.float64, copy=False)
        part = (self.matrix[self.received : last].T @ flat).reshape(self.order, *chunk.shape[1:])
        self.total = part if self.total is None else self.total + part
        self.received = last

    def coefficients(self) -> Float64:
        """(order, ...) float64, once every frame has come.

        Raises:
            ValueError: frames are missing.
        """
        if self.total is None or self.received < len(self.times):
            raise ValueError(f"{self.received} of {len(self.times)} frames have come; add the others first")
        return self.total

    def save(self, file: Path | BinaryIO) -> None:
        """Write the state as .npz, to go on later with `load`."""
        fields = {name: value for name, value in vars(self).items() if name != "matrix" and value is not None}
        np.savez(file, allow_pickle=False, **fields)

    @classmethod
    def load(cls, file: Path | BinaryIO) -> ChunkedProjection:
        """The state that `save` wrote."""
        with np.load(file, allow_pickle=False) as saved:
            return cls(
                times=saved["times"],
                duration=float(saved["duration"]),
                order=int(saved["order"]),
                method=str(saved["method"]),
                received=int(saved["received"]),
                total=saved.get("total"),
            )


@dataclass
class GrowingProjection:
    """A projection whose window grows with its frames: after each, the coefficients of all that is behind it.

    Methods `hold` and `linear` only: a later frame changes a spline everywhere. One frame is carried. When the window
    grows from c to c' the path so far keeps its first `order` coefficients exactly (the dilation maps polynomials to
    polynomials of the same degree), and the map never enlarges an error, so that streaming loses nothing.
    """

    order: int
    """Number of coefficients."""
    method: str = "linear"
    """`linear` or `hold`."""
    covered: float = 0.0
    """Seconds of the window that `state` covers."""
    last_time: float = -math.inf
    """Seconds of the newest frame."""
    last_frame: Float64 | None = None
    """(...) the newest frame, float64."""
    state: Float64 | None = None
    """(order, ...) coefficients on [0, covered], float64."""

    def __post_init__(self) -> None:
        if self.method not in ("linear", "hold"):
            raise ValueError(f"method is {self.method!r}; a growing window takes 'linear' or 'hold'")
        if self.order < 1:
            raise ValueError(f"order is {self.order}; it must be at least 1")

    def add(self, frame: NDArray[np.generic], time: float) -> None:
        """Add the next frame (...) at `time` seconds >= 0.

        Raises:
            ValueError: a time that is not after the last one, a frame of another shape or one that is not finite.
        """
        if not (math.isfinite(time) and time >= 0 and time > self.last_time):
            raise ValueError(f"time is {time}; it must be at least 0 and after the last frame's, {self.last_time}")
        if self.last_frame is not None and frame.shape != self.last_frame.shape:
            raise ValueError(f"frame has the shape {frame.shape}; those before had {self.last_frame.shape}")
        if not np.isfinite(frame).all():
            raise ValueError(f"frame at {time} s holds values that are not finite")
        current = frame.astype(np.float64)
        if self.last_frame is None:
            self.state = np.zeros((self.order, *frame.shape))
            if self.method == "linear":
                self._extend(time, current, current)
        elif self.method == "linear":
            self._extend(time, self.last_frame, current)
        else:
            self._extend((self.last_time + time) / 2, self.last_frame, self.last_frame)
        self.last_time, self.last_frame = time, current

    def coefficients(self, duration: float | None = None) -> Float64:
        """(order, ...) float64 on the window [0, duration], the newest frame held to its end; adding may go on.

        Args:
            duration: seconds, at least the newest frame's time, which is the default.

        Raises:
            ValueError: no frames yet, or a window that ends before the newest frame or is empty.
        """
        end = self.last_time if duration is None else duration
        if self.state is None or self.last_frame is None:
            raise ValueError("no frames have come; add at least one")
        if not (math.isfinite(end) and end >= self.last_time and end > 0):
            raise ValueError(f"duration is {duration}; it must be above 0 and at least {self.last_time}, the last time")
        finished = GrowingProjection(self.order, self.method, self.covered, self.last_time, self.last_frame, self.state)
        finished._extend(end, self.last_frame, self.last_frame)
        return finished.state if finished.state is not None else self.state

    def save(self, file: Path | BinaryIO) -> None:
        """Write the state as .npz, to go on later with `load`."""
        np.savez(file, allow_pickle=False, **{name: value for name, value in vars(self).items() if value is not None})

    @classmethod
    def load(cls, file: Path | BinaryIO) -> GrowingProjection:
        """The state that `save` wrote."""
        with np.load(file, allow_pickle=False) as saved:
            return cls(
                order=int(saved["order"]),
                method=str(saved["method"]),
                covered=float(saved["covered"]),
                last_time=float(saved["last_time"]),
                last_frame=saved.get("last_frame"),
                state=saved.get("state"),
            )

    def _extend(self, end: float, first: Float64, last: Float64) -> None:
        """Grow the window to `end`, along the straight line from `first` to `last`."""
        if end <= self.covered or self.state is None:
            return
        ratio = self.covered / end
        piece = legendre_integral(np.array([ratio, 1.0]), self.order)
        constant = piece[1] - piece[0]
        nodes, weights = gauss_legendre(self.order // 2 + 2)
        ramp = (1 - ratio) * (weights * nodes) @ legendre_basis(ratio + (1 - ratio) * nodes, self.order)
        flat = self.state.reshape(self.order, math.prod(self.state.shape[1:]))
        grown = dilation(ratio, self.order) @ flat + np.outer(constant, first) + np.outer(ramp, last - first)
        self.state, self.covered = grown.reshape(self.state.shape), end


def dilation(ratio: float, order: int) -> Float64:
    """(order, order): coefficients on [0, 1] of a path that ends at `ratio` (0 after it), from those on [0, ratio].

    `E_nm = ratio * integral of g_n(ratio y) g_m(y)`, by a quadrature that is exact; the LegS recurrence's `ratio^A`.
    """
    nodes, weights = gauss_legendre(order)
    dilated: Float64 = ratio * (legendre_basis(ratio * nodes, order).T * weights) @ legendre_basis(nodes, order)
    return dilated


def growing_matrix(times: ArrayLike, duration: float, order: int, method: str = "linear") -> Float64:
    """W (N, order) as the growing form makes it: what `projection_matrix` must equal."""
    seconds = checked_times("times", times, duration, increasing=True)
    stream = GrowingProjection(order, method)
    for row, time in zip(np.eye(len(seconds)), seconds, strict=True):
        stream.add(row, float(time))
    return stream.coefficients(duration).T
