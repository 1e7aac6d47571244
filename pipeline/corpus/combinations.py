"""The compositional corpus: films of combinations of attributes, several for each caption, with the truth beside them.

`pipeline.corpus.grammar` says what can be combined, `pipeline.corpus.drawing` draws it; here films are planned, written
and listed. Films of combinations held out are planned apart, and no film of the others shows one.
"""

from __future__ import annotations

import csv
import math
import random
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path as FilePath

import numpy as np

from model.ffmpeg import Ffmpeg, find_ffmpeg
from pipeline.corpus.drawing import SIDE, Path, draw_frames
from pipeline.corpus.folder import Drawing, Progress, make_films, run_ffmpeg
from pipeline.corpus.grammar import OPEN_SPEEDS, SPEEDS, Attributes, combinations
from storage.fingerprint import fingerprint

DRAWING = 1  # raise when the pictures change, so that folders made by an older drawing are made anew
RATE = 16
"""Frames per second."""
SHORT, LONG = 2.15, 9.0
"""Seconds of a film that holds one window of two seconds, and of one that holds four, for long videos."""
LANES = {"slides": (0.3, 0.7), "circles": (0.16, 0.25)}
"""What a path's lane is drawn from evenly: the whole object is in the picture, but for what slides out of it."""
ATTRIBUTES = tuple(field.name for field in fields(Attributes))
NUMBERS = ("phase", "lane", "widths_per_second", "seconds")
"""The columns of `captions.csv` behind file and caption. `speed` is the word, `widths_per_second` the path's speed."""


@dataclass(frozen=True)
class Film:
    """One film of the corpus and the whole truth of what it shows."""

    file: str
    attributes: Attributes
    path: Path
    seconds: float

    @property
    def times(self) -> np.ndarray:
        """(N,) times of the frames in seconds, all those before the end."""
        return np.arange(math.ceil(self.seconds * RATE - 1e-9)) / RATE

    def draw(self) -> np.ndarray:
        """The frames, uint8 (N, 64, 64, 3)."""
        return draw_frames(self.attributes, self.path, self.times)


def plan_combinations(
    seed: int = 0, films: int = 600, held_out: bool = False, films_per_caption: int = 3, seconds: float = SHORT
) -> list[Film]:
    """The films of a corpus, in order; a pure function of its arguments.

    held_out: whether all films show combinations that are held out, else none does. Films of one caption differ in what
    it leaves open, and follow each other; captions come in a random order without repetition until all have come.
    Raises ValueError for fewer than 1 film or film per caption, or seconds outside (0, 60].
    """
    if films < 1 or films_per_caption < 1 or not 0 < seconds <= 60:
        raise ValueError(
            f"films = {films}, films_per_caption = {films_per_caption}, seconds = {seconds}: the first two must be at "
            "least 1, seconds above 0 and at most 60"
        )
    chosen = combinations(held_out)
    random.Random(f"{seed}/{held_out}").shuffle(chosen)
    return [
        _plan(f"{seed}/{held_out}/{index}", index, chosen[index // films_per_caption % len(chosen)], seconds)
        for index in range(films)
    ]


def plan_film(attributes: Attributes, seed: int = 0, seconds: float = SHORT) -> Film:
    """A film of given attributes; the seed draws what the caption leaves open."""
    return _plan(f"{seed}/{attributes.caption}", 0, attributes, seconds)


def _plan(key: str, index: int, attributes: Attributes, seconds: float) -> Film:
    draw = random.Random(key)
    path = Path(
        attributes.motion,
        attributes.direction,
        phase=draw.random(),
        lane=draw.uniform(*LANES[attributes.motion]),
        speed=SPEEDS.get(attributes.speed) or draw.uniform(*OPEN_SPEEDS),
    )
    name = f"{index + 1:04d}-{attributes.colour}-{attributes.object.replace(' ', '-')}-{attributes.motion}.mkv"
    return Film(name, attributes, path, seconds)


def make_combinations(
    folder: FilePath,
    seed: int = 0,
    films: int = 600,
    held_out: bool = False,
    films_per_caption: int = 3,
    seconds: float = SHORT,
    progress: Progress | None = None,
) -> FilePath:
    """Draws the films of `plan_combinations` and writes `captions.csv` beside them; returns its path.

    Its columns are the file, the caption and all else that `read_combinations` returns. Films of an earlier run are
    kept and removed as by `make_films`. `progress(done, total, file)` is called after each film.

    Raises:
        ValueError: as `plan_combinations`.
        NoFfmpeg: there is no ffmpeg that works.
        OSError: ffmpeg could not make a film (a full disk too); its message is in it.
    """
    plans = plan_combinations(seed, films, held_out, films_per_caption, seconds)
    ffmpeg = find_ffmpeg()
    drawings = {
        film.file: Drawing(fingerprint({"drawing": DRAWING, "film": asdict(film)}), partial(_write, ffmpeg, film))
        for film in plans
    }
    rows = [(film.file, film.attributes.caption, *asdict(film.attributes).values(), *_numbers(film)) for film in plans]
    return make_films(folder, drawings, ("file", "caption", *ATTRIBUTES, *NUMBERS), rows, progress)


def read_combinations(captions: FilePath) -> list[Film]:
    """The films that a `captions.csv` of `make_combinations` lists, without decoding one.

    Raises:
        OSError: it cannot be read.
        ValueError: it is none of `make_combinations`.
    """
    films = []
    with open(captions, encoding="utf-8", newline="") as table:
        for row in csv.DictReader(table):
            try:
                attributes = Attributes(**{name: row[name] for name in ATTRIBUTES})
                phase, lane, speed, seconds = (float(row[name]) for name in NUMBERS)
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{captions} was not written by make_combinations: {error!r} in {row}") from error
            path = Path(attributes.motion, attributes.direction, phase, lane, speed)
            films.append(Film(row["file"], attributes, path, seconds))
    return films


def _numbers(film: Film) -> tuple[float, float, float, float]:
    return film.path.phase, film.path.lane, film.path.speed, film.seconds


def _write(ffmpeg: Ffmpeg, film: Film, target: FilePath) -> None:
    """Writes the film losslessly, in RGB and with every frame a keyframe."""
    command = [ffmpeg.path, "-hide_banner", "-loglevel", "error", "-y", "-f", "rawvideo", "-pix_fmt", "rgb24"]
    command += ["-s", f"{SIDE}x{SIDE}", "-r", str(RATE), "-i", "pipe:", "-an", "-c:v", "ffv1", "-threads", "1"]
    command += ["-g", "1", "-pix_fmt", "bgr0", "-fflags", "+bitexact", "-flags:v", "+bitexact", str(target)]
    run_ffmpeg(ffmpeg, command, film.draw().tobytes())
