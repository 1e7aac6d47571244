"""The frames of a compositional film: one object with soft edges, on a picture whose borders are joined.

Lengths are in picture widths and places run from 0 to 1, x to the right and y downwards. Edges are polynomials and
places are rounded, so that every machine computes the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.corpus.grammar import BACKGROUNDS, COLOURS, SIZES, Attributes

SIDE = 64
"""Pixels a side of the films."""
EDGE = 0.1
"""Width of a soft edge from nothing to all, in picture widths."""
GRID = 2.0**20
"""Places are rounded to this many steps in a picture width, since sine and cosine differ in their last bit."""

Distance = Callable[[np.ndarray, np.ndarray, float], np.ndarray]

# Distance to the outline at the offsets (u, v) from the centre, negative inside, for an object of half length r.
SHAPES: dict[str, Distance] = {
    "ring": lambda u, v, r: abs(np.sqrt(u * u + v * v) - 0.75 * r) - 0.25 * r,
    "cross": lambda u, v, r: np.minimum(_box(u, v, r, 0.3 * r), _box(u, v, 0.3 * r, r)),
    "wide bar": lambda u, v, r: _box(u, v, r, 0.4 * r),
    "tall bar": lambda u, v, r: _box(u, v, 0.4 * r, r),
}


def _box(u: np.ndarray, v: np.ndarray, half_width: float, half_height: float) -> np.ndarray:
    distance: np.ndarray = np.maximum(abs(u) - half_width, abs(v) - half_height)
    return distance


@dataclass(frozen=True)
class Path:
    """Where an object is at every time: its motion and direction, and what the caption leaves open."""

    motion: str
    direction: str
    phase: float
    """At time 0: the coordinate along a slide, from 0 to 1, or the share of a turn, clockwise from the right."""
    lane: float
    """The coordinate across a slide, or the radius of a circle around the picture's centre, in picture widths."""
    speed: float
    """Picture widths per second, along the path."""

    def at(self, times: Sequence[float] | np.ndarray) -> np.ndarray:
        """The object's centre (N, 2) as x and y, in [0, 1), at times (N,) in seconds."""
        moved = self.speed * np.asarray(times, dtype=np.float64)
        if self.motion == "circles":
            sense = 1 if self.direction == "clockwise" else -1
            angles = 2 * math.pi * self.phase + sense * moved / self.lane
            place = 0.5 + self.lane * np.stack([np.cos(angles), np.sin(angles)], axis=1)
        else:
            sense = 1 if self.direction in ("to the right", "downwards") else -1
            along, across = self.phase + sense * moved, np.full(len(moved), self.lane)
            upright = self.direction in ("upwards", "downwards")
            place = np.stack([across, along] if upright else [along, across], axis=1)
        return np.round(place * GRID) / GRID % 1.0


def draw_masks(shape: str, size: str, places: np.ndarray, side: int = SIDE) -> np.ndarray:
    """How much of each pixel the object covers, (N, side, side) float64 in [0, 1], its centre at places (N, 2)."""
    centres = (np.arange(side) + 0.5) / side
    offsets = (centres - places[:, :, None] + 0.5) % 1.0 - 0.5  # (N, 2, side), the short way round
    distance = SHAPES[shape](offsets[:, 0, None, :], offsets[:, 1, :, None], SIZES[size] / 2)
    cover = np.clip(0.5 - distance / EDGE, 0.0, 1.0)
    return cover * cover * (3.0 - 2.0 * cover)


def draw_frames(
    attributes: Attributes, path: Path, times: Sequence[float] | np.ndarray, side: int = SIDE
) -> np.ndarray:
    """The frames at times (N,) in seconds, uint8 (N, side, side, 3)."""
    masks = draw_masks(attributes.object, attributes.size, path.at(times), side)
    ground = np.array(BACKGROUNDS[attributes.background], dtype=np.float64)
    colour = np.array(COLOURS[attributes.colour], dtype=np.float64)
    return np.round(ground + masks[..., None] * (colour - ground)).astype(np.uint8)
