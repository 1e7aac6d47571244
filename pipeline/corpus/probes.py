"""Reading the attributes back from frames, by formula: nothing here is learnt, and nothing but the frames is looked at.

The background is the colour of the border, the object what differs from it. Its shape and size are those of the
drawing that correlates best with it over all places of the picture, which also gives its place in every frame; motion,
direction and speed come from a straight line or a circle through the places.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product

import numpy as np

from pipeline.corpus.drawing import SHAPES, draw_masks
from pipeline.corpus.grammar import BACKGROUNDS, COLOURS, OPEN_SPEED, OPEN_SPEEDS, SIZES, SPEEDS, Attributes

GROUND_TOLERANCE, COLOUR_TOLERANCE = 0.2, 0.35
"""How far the background's and the object's colour may be from its name's: distance of RGB values in [0, 1], Euclidean.
Codecs fade what is small."""
LEAST_CONTRAST = 0.2
"""Least distance of an object's colour from the background, likewise."""
LEAST_MATCH = 0.8
"""Least correlation with a drawn object, mean over the frames."""
PATH_TOLERANCE = 0.04
"""How far the places may lie off a line or circle, rms in picture widths."""
LEAST_SPEED = 0.08
"""Picture widths per second below which nothing moves."""
SPEED_TOLERANCE = 1.3
"""Factor by which a speed may be off."""
BLURS = (0.0, 0.025, 0.05)
"""Blurs in which drawings are compared, standard deviations in picture widths: a codec softens edges."""
JUDGES = 8
"""Number of frames, spread evenly, that decide on shape and size; the others cost time and change nothing."""


@dataclass(frozen=True)
class Reading:
    """What frames show. None stands for what cannot be told: no such colour, no single object, no such motion."""

    background: str | None
    colour: str | None
    object: str | None
    size: str | None
    motion: str | None
    direction: str | None
    phase: float
    """As in `drawing.Path`, at time 0; NaN without a motion, as are lane and speed."""
    lane: float
    speed: float
    match: float
    """Correlation with the best drawing, mean over the frames, -1 to 1."""

    def right(self, wanted: Attributes) -> dict[str, bool]:
        """Whether each attribute is as wanted. An open speed is right anywhere in its range."""
        names = ("background", "colour", "object", "size", "motion", "direction")
        least, most = OPEN_SPEEDS if wanted.speed == OPEN_SPEED else (SPEEDS[wanted.speed],) * 2
        speed = least / SPEED_TOLERANCE <= self.speed <= most * SPEED_TOLERANCE
        return {**{name: getattr(self, name) == getattr(wanted, name) for name in names}, "speed": speed}


def read_attributes(frames: np.ndarray, times: Sequence[float] | np.ndarray) -> Reading:
    """Reads frames, uint8 (N, S, S, 3), shown at times (N,) in seconds, an eighth of a second apart at most.

    Raises:
        ValueError: there are fewer than 4 frames, or they are not uint8, not square or not as many as times.
    """
    times = np.asarray(times, dtype=np.float64)
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or frames.shape[1] != frames.shape[2]:
        raise ValueError(f"frames are {frames.dtype} {frames.shape}; pass uint8 (N, S, S, 3)")
    if not 4 <= len(frames) == len(times):
        raise ValueError(f"{len(frames)} frames at {len(times)} times; pass at least 4 frames and a time for each")
    pixels = frames.astype(np.float32) / 255
    border = np.concatenate([pixels[:, 0], pixels[:, -1], pixels[:, :, 0], pixels[:, :, -1]], axis=1)
    ground = np.median(border, axis=(0, 1))
    contrast = pixels - ground
    colour = _strongest(contrast)
    background = _nearest(ground, BACKGROUNDS)
    strength = float(colour @ colour)
    if strength < LEAST_CONTRAST**2:
        return Reading(background, None, None, None, None, None, math.nan, math.nan, math.nan, 0.0)
    shape, size, match, places = _locate(contrast @ (colour / strength))
    if match < LEAST_MATCH:
        return Reading(background, None, None, None, None, None, math.nan, math.nan, math.nan, match)
    name = _nearest(ground + colour, COLOURS, ground)
    return Reading(background, name, shape, size, *_follow(places, times), match)


def spread(values: Sequence[float] | np.ndarray, period: float | None = None) -> float:
    """Mean distance of all pairs of values, the short way round where they have a period (1 for phases)."""
    values = np.asarray(values, dtype=np.float64)
    distance = abs(values[:, None] - values)
    if period is not None:
        distance = np.minimum(distance % period, -distance % period)
    return float(distance.sum() / max(len(values) * (len(values) - 1), 1))


def _strongest(contrast: np.ndarray) -> np.ndarray:
    """The mean contrast (3,) of the hundredth of each frame's pixels that differs most from the background."""
    flat = contrast.reshape(len(contrast), -1, 3)
    kept = max(flat.shape[1] // 100, 1)
    order = np.argpartition((flat**2).sum(axis=2), -kept, axis=1)[:, -kept:]
    mean: np.ndarray = np.take_along_axis(flat, order[..., None], axis=1).mean(axis=(0, 1))
    return mean


def _nearest(
    colour: np.ndarray, names: Mapping[str, tuple[int, int, int]], ground: np.ndarray | None = None
) -> str | None:
    """The name of the nearest colour, None where it is too far. On a ground a colour may also be fainter or stronger,
    as thin objects are after a blur: it is then compared along its line from the ground."""
    found, least = None, GROUND_TOLERANCE if ground is None else COLOUR_TOLERANCE
    for name, value in names.items():
        wanted = np.array(value) / 255
        if ground is not None:
            share = (colour - ground) @ (wanted - ground) / ((wanted - ground) @ (wanted - ground))
            wanted = ground + np.clip(share, 0.6, 1.2) * (wanted - ground)
        distance = float(np.linalg.norm(colour - wanted))
        if distance < least:
            found, least = name, distance
    return found


@cache
def _templates(side: int) -> tuple[list[tuple[str, str]], np.ndarray]:
    """(shape, size) of every drawing, and the conjugate spectra (drawings, side, side // 2 + 1) at pixel (0, 0)."""
    waves = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)) * side  # cycles in a picture width
    names, spectra = [], []
    for shape, size, blur in product(SHAPES, SIZES, BLURS):
        drawing = draw_masks(shape, size, np.full((1, 2), 0.5 / side), side)[0]
        spectrum = np.fft.rfft2(drawing - drawing.mean()) * np.exp(-2 * (math.pi * blur * waves) ** 2)
        names.append((shape, size))
        spectra.append((np.conj(spectrum) / np.linalg.norm(np.fft.irfft2(spectrum, (side, side)))).astype(np.complex64))
    return names, np.stack(spectra)


def _locate(masks: np.ndarray) -> tuple[str, str, float, np.ndarray]:
    """Shape and size of the drawing that correlates best with masks (N, S, S) over all frames, each at its best place;
    that correlation; and the places (N, 2) as x and y in [0, 1)."""
    side = masks.shape[1]
    names, spectra = _templates(side)
    masks = masks - masks.mean(axis=(1, 2), keepdims=True)
    masks /= np.maximum(np.sqrt((masks**2).sum(axis=(1, 2), keepdims=True)), 1e-6)
    waves = np.fft.rfft2(masks)
    judges = waves[np.linspace(0, len(waves) - 1, min(len(waves), JUDGES)).round().astype(int)]
    scores = [np.fft.irfft2(judges * spectrum, (side, side)).max(axis=(1, 2)).mean() for spectrum in spectra]
    best = int(np.argmax(scores))
    maps = np.fft.irfft2(waves * spectra[best], (side, side))
    rows, columns = np.unravel_index(maps.reshape(len(maps), -1).argmax(axis=1), (side, side))
    each = np.arange(len(maps))
    x = columns + _peak(*(maps[each, rows, (columns + step) % side] for step in (-1, 0, 1)))
    y = rows + _peak(*(maps[each, (rows + step) % side, columns] for step in (-1, 0, 1)))
    match = float(maps.max(axis=(1, 2)).mean())
    return *names[best], match, ((np.stack([x, y], axis=1) + 0.5) / side) % 1.0


def _peak(before: np.ndarray, top: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Where the parabola through three neighbours has its top, in (-1/2, 1/2)."""
    offset: np.ndarray = 0.5 * (before - after) / np.minimum(before - 2 * top + after, -1e-9)
    return offset


def _follow(places: np.ndarray, times: np.ndarray) -> tuple[str | None, str | None, float, float, float]:
    """Motion, direction, phase, lane and speed of the line or the circle that lies nearer to the places (N, 2)."""
    nothing = (None, None, math.nan, math.nan, math.nan)
    line = np.unwrap(places, period=1.0, axis=0)
    slopes, starts = np.polyfit(times, line, 1)
    off_line = _rms(line - starts - np.outer(times, slopes))

    x, y = (places - 0.5).T
    radius = float(np.hypot(x, y).mean())
    angles = np.unwrap(np.arctan2(y, x))
    turning, first = np.polyfit(times, angles, 1)
    ideal = first + turning * times
    off_circle = _rms(places - 0.5 - radius * np.stack([np.cos(ideal), np.sin(ideal)], axis=1))

    if min(off_line, off_circle) > PATH_TOLERANCE:
        return nothing
    if off_circle < off_line:
        if abs(turning) * radius < LEAST_SPEED:
            return nothing
        sense = "clockwise" if turning > 0 else "anticlockwise"
        return "circles", sense, float(first / (2 * math.pi) % 1.0), radius, float(abs(turning) * radius)
    main = int(abs(slopes[1]) > abs(slopes[0]))
    if abs(slopes[main]) < LEAST_SPEED or abs(slopes[main]) < 2 * abs(slopes[1 - main]):
        return nothing
    direction = (("to the left", "to the right"), ("upwards", "downwards"))[main][int(slopes[main] > 0)]
    across = float(line[:, 1 - main].mean() % 1.0)
    return "slides", direction, float(starts[main] % 1.0), across, float(abs(slopes[main]))


def _rms(offsets: np.ndarray) -> float:
    """Root mean square of the lengths of offsets (N, 2)."""
    return float(np.sqrt((offsets**2).sum(axis=1).mean()))
