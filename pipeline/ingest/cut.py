"""Which parts of a film become clips: windows of one length, or whole shots and caption spans."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.media.decode import Probe, decode, window_count, window_of, window_starts
from pipeline.media.faults import MediaLimits
from pipeline.media.shots import shot_starts
from pipeline.recipes import DataRecipe
from pipeline.sources.entries import FilmEntry

LOOKED_AT = (36, 64)
"""Height and width at which a film is searched for cuts: a colour histogram needs no more."""
DECODED = 1024
"""Frames that one ffmpeg process is asked for: it is told each by name, and a command has a longest length."""


@dataclass(frozen=True)
class Span:
    """A part of a film."""

    start: float
    """Seconds since the film's first frame."""
    duration: float
    """Seconds."""
    shot_end: float = math.inf
    """Where the film's next shot begins, as far as cuts were looked for; seconds since the film's first frame."""


@dataclass(frozen=True)
class Cut:
    """A film as it is cut."""

    spans: tuple[Span, ...]
    missing: int = 0
    """Windows that hold no frame, because the film's times jump."""


def cut_film(film: Probe, entry: FilmEntry, recipe: DataRecipe, file: Path) -> Cut:
    """The parts of a film that the recipe makes clips of, in order, whatever number of frames they have.

    With `shots` a part that the table names is a clip as it is. A whole film is decoded once, small, to find its cuts,
    unless `shots.detect` is false: then it is one clip. A file of latents is one shot: nobody looks for cuts in it.
    `file` is the film on this machine.

    Raises:
        DecodeError: the film cannot be decoded.
    """
    if recipe.whole_shots is None and recipe.split_at_cuts and not entry.latents:
        return _split(film, file, entry, recipe)
    if recipe.whole_shots is None:
        starts = window_starts(film, recipe.duration, entry.start, entry.end)
        count = window_count(film, recipe.duration, entry.start, entry.end)
        return Cut(tuple(Span(start, recipe.duration) for start in starts), count - len(starts))
    if entry.latents or entry.start > 0 or entry.end is not None or not recipe.whole_shots.detect:
        end = film.seconds if entry.end is None else min(entry.end, film.seconds)
        spans = (Span(entry.start, end - entry.start),) if end > entry.start else ()
        return Cut(spans)
    firsts = find_cuts(file, film, recipe.limits)
    edges = [*(float(film.times[first]) for first in firsts), film.seconds]
    return Cut(tuple(Span(start, end - start) for start, end in itertools.pairwise(edges)))


def _split(film: Probe, file: Path, entry: FilmEntry, recipe: DataRecipe) -> Cut:
    """The full windows of each shot, from its first frame on."""
    last = film.seconds if entry.end is None else min(entry.end, film.seconds)
    edges = [float(film.times[first]) for first in find_cuts(file, film, recipe.limits)]
    spans: list[Span] = []
    missing = 0
    for begin, end in itertools.pairwise([*edges, film.seconds]):
        part = max(begin, entry.start), min(end, last)
        starts = window_starts(film, recipe.duration, *part)
        missing += window_count(film, recipe.duration, *part) - len(starts)
        spans += [Span(start, recipe.duration, end) for start in starts]
    return Cut(tuple(spans), missing)


def find_cuts(path: Path, film: Probe, limits: MediaLimits | None = None) -> list[int]:
    """The numbers of the frames that begin a shot, 0 first. Raises DecodeError where the film cannot be decoded."""

    def frames() -> Iterator[np.ndarray]:
        for first in range(0, len(film.ticks), DECODED):
            kept = np.arange(first, min(first + DECODED, len(film.ticks)))
            for part in decode(path, [window_of(film, kept)], LOOKED_AT, limits):
                yield from part

    return [number for number, (_, begins) in enumerate(shot_starts(frames())) if begins]
