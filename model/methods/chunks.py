"""Windows over a growing video that is longer than what the network learned (arXiv 2512.11438, Algorithm 3).

All windows share the sampler's clock. Where they overlap their velocities are blended, each slot takes its insertions
from one of them alone, and they are cut anew as the video grows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Window:
    """Frames [start, end) of one clip, as a chunk's network sees them."""

    clip: int
    start: int
    end: int


def cut(frames: int, chunks: int, chunk: int, overlap: int) -> list[tuple[int, int]]:
    """Boundaries [start, end) of windows over `frames` frames: at least `chunks` of them, none above `chunk` frames.

    While a video grows the windows share as large a part of their frames as at its end, `overlap / chunk`.
    """
    chunks = max(chunks, math.ceil((frames - overlap) / (chunk - overlap)), 1)
    if chunks == 1:
        return [(0, frames)]
    width = min(chunk, math.ceil(frames / (chunks - (chunks - 1) * overlap / chunk)))
    starts = [k * (frames - width) // (chunks - 1) for k in range(chunks)]
    return [(start, start + width) for start in starts]


@dataclass(frozen=True)
class Chunks:
    """Cuts clips into windows (Algorithm 3): `chunks` of them for each clip, or more where they would be too long."""

    chunks: int
    chunk: int
    overlap: int

    @classmethod
    def of(cls, frames: int, chunk: int, overlap: int) -> Chunks:
        """As many as a video of `frames` frames needs."""
        return cls(max(1, math.ceil((frames - overlap) / (chunk - overlap))), chunk, overlap)

    def together(self, frames: int) -> int:
        """Frames of a video whose windows have `frames` each."""
        return round(frames * (self.chunks - (self.chunks - 1) * self.overlap / self.chunk))

    def cut(self, frames: int) -> list[tuple[int, int]]:
        """Boundaries over a clip of `frames` frames."""
        return cut(frames, self.chunks, self.chunk, self.overlap)

    def windows(self, counts: Sequence[int]) -> list[Window]:
        """Those of clips of `counts` frames."""
        cuts = [self.cut(count) for count in counts]
        return [Window(clip, start, end) for clip, found in enumerate(cuts) for start, end in found]


def blended(windows: Sequence[Window], values: Tensor, shape: Sequence[int]) -> Tensor:
    """Values (K, W, ...) of windows as values (B, L, ...) of the clips' frames, `shape` = (B, L).

    Where windows overlap each counts by its frames to its nearer edge; a frame of one window has exactly its value.
    """
    total = values.new_zeros((*shape, *values.shape[2:]))
    weights = values.new_zeros(tuple(shape))
    ramps = []
    for window in windows:
        at = torch.arange(window.end - window.start, device=values.device)
        ramps.append((torch.minimum(at, window.end - window.start - 1 - at) + 1).to(values.dtype))
        weights[window.clip, window.start : window.end] += ramps[-1]
    for row, (window, ramp) in enumerate(zip(windows, ramps, strict=True)):
        share = ramp / weights[window.clip, window.start : window.end]
        part = values[row, : window.end - window.start] * share.view(-1, *[1] * (values.ndim - 2))
        total[window.clip, window.start : window.end] += part
    return total


def owned(windows: Sequence[Window], values: Tensor, shape: Sequence[int]) -> Tensor:
    """Values (K, W) of windows' slots as values (B, L) of the clips': each slot's from the one window that has it
    farthest from its edges."""
    found = values.new_zeros(tuple(shape))
    margins = torch.full(tuple(shape), -math.inf, device=values.device)
    for row, window in enumerate(windows):
        at = torch.arange(window.start, window.end, device=values.device) + 0.5  # slots lie right of their frames
        margin = torch.minimum(at - window.start, window.end - 1 - at)
        here = margins[window.clip, window.start : window.end]
        better = margin > here
        here[better] = margin[better]
        part = found[window.clip, window.start : window.end]
        part[better] = values[row, : window.end - window.start][better]
    return found
