"""Films of 3x3 pixels that are 15, 20, 25 or 30 frames long: what a model that chooses a length is tried on.

The eight pixels of the border show a gradient between two colours that turns evenly, a whole number of times in the
film; the pixel in the centre has one colour, and from some frame on another. So a frame depends on how long the film
is, and the caption says it in half of the films (after Appendix F of arXiv 2512.11438).
"""

from __future__ import annotations

import math
import random
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np

from model.ffmpeg import Ffmpeg, find_ffmpeg
from pipeline.corpus.folder import Drawing, Progress, make_films, run_ffmpeg
from storage.fingerprint import fingerprint

DRAWING = 1  # raise when the pictures change, so that folders made by an older drawing are made anew
RATE = 8
"""Frames per second."""
LENGTHS = (15, 20, 25, 30)
"""Frames of a film, each as often as the others."""
TURNS = {"once": 1, "twice": 2}
"""How often the border turns, by the caption's word."""
COLOURS = {
    "red": (230, 40, 40),
    "yellow": (240, 220, 40),
    "green": (40, 190, 60),
    "blue": (50, 80, 240),
    "white": (245, 245, 245),
    "black": (15, 15, 15),
}
"""Name to red, green and blue, 0 to 255."""
BORDER = ((0, 0), (0, 1), (0, 2), (1, 2), (2, 2), (2, 1), (2, 0), (1, 0))
"""Row and column of the border's pixels, clockwise."""


@dataclass(frozen=True)
class Turning:
    """One film and the whole truth of what it shows."""

    file: str
    frames: int
    turns: int
    """Whole turns, clockwise."""
    first: str
    second: str
    """The two colours of the border."""
    before: str
    after: str
    """The centre's colours."""
    jump: int
    """The first frame of the centre's second colour, in [1, frames)."""
    phase: float
    """Where the border's first colour is in the first frame, in turns."""
    told: bool
    """Whether the caption says how long the film is."""

    @property
    def caption(self) -> str:
        """What the film is called; its length comes first, where a text encoder that reads from left to right has the
        same rows for it whatever follows."""
        word = {count: word for word, count in TURNS.items()}[self.turns]
        words = f"a {self.first} and {self.second} ring that turns {word}"
        return f"{self.frames} frames, {words}" if self.told else words

    def draw(self) -> np.ndarray:
        """The frames, uint8 (N, 3, 3, 3)."""
        first, second, before, after = (
            np.array(COLOURS[name], dtype=np.float64) for name in (self.first, self.second, self.before, self.after)
        )
        time = np.arange(self.frames)[:, None] / self.frames
        place = np.arange(len(BORDER)) / len(BORDER)
        share = (1 + np.cos(2 * math.pi * (place - self.phase - self.turns * time))) / 2  # (N, 8) of the first colour
        picture = np.empty((self.frames, 3, 3, 3))
        rows, columns = zip(*BORDER, strict=True)
        picture[:, rows, columns] = second + share[..., None] * (first - second)
        picture[:, 1, 1] = np.where(np.arange(self.frames)[:, None] < self.jump, before, after)
        return np.rint(picture).astype(np.uint8)


@dataclass(frozen=True)
class TurningReading:
    """What frames show, read by formula."""

    frames: int
    turns: float
    """Turns from the first frame to one after the last, at the mean speed; NaN of fewer than 2 frames."""
    unevenness: float
    """Rms deviation of the steps between frames from their mean, in steps."""
    jumps: int
    """Changes of the centre by more than a quarter of a colour's range."""


def plan_turning(seed: int = 0, films: int = 512, told: float = 0.5) -> list[Turning]:
    """The films of a corpus, in order; a pure function of its arguments.

    told: share of the films whose caption says how long they are. Raises ValueError for fewer than 1 film or a share
    outside [0, 1].
    """
    if films < 1 or not 0 <= told <= 1:
        raise ValueError(f"films = {films}, told = {told}: the first must be at least 1, the second in [0, 1]")
    plans = []
    for index in range(films):
        draw = random.Random(f"turning/{seed}/{index}")
        frames = LENGTHS[index % len(LENGTHS)]
        first, second = draw.sample(sorted(COLOURS), 2)
        before, after = draw.sample(sorted(COLOURS), 2)
        plans.append(
            Turning(
                file=f"{index + 1:04d}-{first}-{second}-{frames}.mkv",
                frames=frames,
                turns=draw.choice(sorted(TURNS.values())),
                first=first,
                second=second,
                before=before,
                after=after,
                jump=draw.randrange(1, frames),
                phase=draw.random(),
                told=draw.random() < told,
            )
        )
    return plans


def make_turning(
    folder: Path, seed: int = 0, films: int = 512, told: float = 0.5, progress: Progress | None = None
) -> Path:
    """Draws the films of `plan_turning` and writes `captions.csv` beside them; returns its path.

    Films of an earlier run are kept and removed as by `make_films`. `progress(done, total, file)` is called after each.

    Raises:
        ValueError: as `plan_turning`.
        NoFfmpeg: there is no ffmpeg that works.
        OSError: ffmpeg could not make a film (a full disk too); its message is in it.
    """
    plans = plan_turning(seed, films, told)
    ffmpeg = find_ffmpeg()
    drawings = {
        film.file: Drawing(fingerprint({"drawing": DRAWING, "film": asdict(film)}), partial(_write, ffmpeg, film))
        for film in plans
    }
    columns = [name for name in asdict(plans[0]) if name not in ("file", "told")]
    rows = [(film.file, film.caption, *(getattr(film, name) for name in columns)) for film in plans]
    return make_films(folder, drawings, ("file", "caption", *columns), rows, progress)


def read_turning(frames: np.ndarray) -> TurningReading:
    """What frames (N, 3, 3, 3), uint8, show.

    The border's phase is that of its first harmonic, of the difference of colours that varies most.
    """
    count = len(frames)
    if count < 2:
        return TurningReading(count, math.nan, math.nan, 0)
    values = frames.astype(np.float64) / 255
    rows, columns = zip(*BORDER, strict=True)
    border = values[:, rows, columns]  # (N, 8, 3)
    spread = border - border.mean(axis=(0, 1))
    axis = np.linalg.svd(spread.reshape(-1, 3), full_matrices=False)[2][0]
    wave = np.exp(-2j * math.pi * np.arange(len(BORDER)) / len(BORDER))
    harmonic = (spread @ axis) @ wave  # (N,)
    steps = -np.angle(harmonic[1:] * harmonic[:-1].conj()) / (2 * math.pi)  # turns
    centre = np.abs(np.diff(values[:, 1, 1], axis=0)).max(axis=1)
    return TurningReading(
        frames=count,
        turns=float(steps.mean() * count),
        unevenness=float(np.sqrt(np.square(steps - steps.mean()).mean()) / max(abs(steps.mean()), 1e-9)),
        jumps=int((centre > 0.25).sum()),
    )


def _write(ffmpeg: Ffmpeg, film: Turning, target: Path) -> None:
    """Writes the film losslessly, in RGB and with every frame a keyframe."""
    command = [ffmpeg.path, "-hide_banner", "-loglevel", "error", "-y", "-f", "rawvideo", "-pix_fmt", "rgb24"]
    command += ["-s", "3x3", "-r", str(RATE), "-i", "pipe:", "-an", "-c:v", "ffv1", "-threads", "1"]
    command += ["-g", "1", "-pix_fmt", "bgr0", "-fflags", "+bitexact", "-flags:v", "+bitexact", str(target)]
    run_ffmpeg(ffmpeg, command, film.draw().tobytes())
