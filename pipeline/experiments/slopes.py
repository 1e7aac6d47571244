"""How well a projection knows the slope of a clip, at the window's ends and between: a model learns what is stored.

Clips of the compositional corpus are drawn, so the true latents and their derivative are known at every time. They are
projected from their frames as a recipe does it, and the path is compared with the truth.

With a folder of films the same question is asked of frames that no projection sees: those inside their window, those
after its last kept frame, and the one at its end, with and without the frame after the window (`next_frame` of a data
recipe). Figures are PSNR in dB of pictures of 32x32 pixels; windows with a cut are left out.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from model import legs
from model.codecs.linear import LinearCodec, LinearSettings
from model.legs.select import AUTO, clip_method
from model.program import run_program
from model.video import from_frames
from pipeline.corpus.combinations import Film, plan_combinations
from pipeline.corpus.drawing import draw_frames
from pipeline.experiments.projection import read_film
from pipeline.media.decode import probe, select_frames, window_starts, with_next_frame
from pipeline.rows import observed_frames
from pipeline.sources.folders import films_in

WINDOW = 2.0
"""Seconds of a clip."""
CODEC = LinearSettings(factor=8, channels=12, scale=0.5)
"""That of the recipe `combinations`."""
READ = np.linspace(0, 1, 41)
"""Flow times that are compared."""
STEP = 1e-3
"""Half a central difference, in flow time."""


@dataclass(frozen=True)
class Grid:
    """What is projected, and how."""

    rate: int
    """Frames a second."""
    per_frame: float
    """Order over frames."""
    method: str
    next_frame: bool = False
    """Whether the frame at the window's very end, the next window's first, is known too."""

    @property
    def times(self) -> np.ndarray:
        """(N,) seconds of the frames."""
        return np.arange(round(WINDOW * self.rate) + self.next_frame) / self.rate

    @property
    def order(self) -> int:
        """s, the number of coefficients."""
        return round(WINDOW * self.rate * self.per_frame)

    @property
    def name(self) -> str:
        """As the table calls it."""
        return f"{self.method}, s = {self.per_frame:g} N, {self.rate} a second" + (", next frame" * self.next_frame)


GRIDS = (
    Grid(8, 2, "cubic"),
    Grid(8, 2, "linear"),
    Grid(8, 1, "cubic"),
    Grid(16, 2, "cubic"),
    Grid(16, 1, "cubic"),
    Grid(8, 2, "cubic", next_frame=True),
)


def latents_at(film: Film, flow_times: np.ndarray) -> torch.Tensor:
    """(L, C, h, w) float64: the true latents. Frames are rounded to whole grey levels, as those of a film are."""
    frames = draw_frames(film.attributes, film.path, flow_times * WINDOW)
    return LinearCodec(CODEC).encode(from_frames(frames)).latents.double()


def figures(grid: Grid, films: Sequence[Film]) -> dict[str, float]:
    """Errors of one way to project.

    `slope_inside`, `slope_start`, `slope_end`: mean squared error of the derivative over its true mean square, for flow
    times 0.1 to 0.9, 0 and 1. `frame_inside`, `frame_start`, `frame_end`: rms error of the latents over their rms.
    """
    matrix = legs.projection_matrix(grid.times, WINDOW, grid.order, method=grid.method)
    slopes, frames, size, moving = [], [], [], []
    for film in films:
        true = latents_at(film, READ)
        derivative = (latents_at(film, READ + STEP) - latents_at(film, READ - STEP)) / (2 * STEP)
        stored = legs.project(latents_at(film, grid.times / WINDOW), matrix)
        path, slope = legs.evaluate(stored, READ, 1.0), legs.derivative(stored, READ, 1.0)
        frames.append((path - true).square().mean((1, 2, 3)))
        slopes.append((slope - derivative).square().mean((1, 2, 3)))
        size.append(true.square().mean())
        moving.append(derivative.square().mean())
    of_frames = torch.stack(frames).mean(0) / torch.stack(size).mean()
    of_slopes = torch.stack(slopes).mean(0) / torch.stack(moving).mean()
    inside = torch.from_numpy((READ > 0.099) & (READ < 0.901))
    places = {"inside": inside, "start": torch.from_numpy(READ == 0), "end": torch.from_numpy(READ == 1)}
    return {
        **{f"slope_{name}": float(of_slopes[place].mean()) for name, place in places.items()},
        **{f"frame_{name}": float(of_frames[place].mean().sqrt()) for name, place in places.items()},
    }


def experiment(films: int = 24, seed: int = 0, grids: Sequence[Grid] = GRIDS) -> dict[str, dict[str, float]]:
    """The figures of each way to project, by its name, on films of as many captions of training."""
    chosen = plan_combinations(seed, films, films_per_caption=1)
    return {grid.name: figures(grid, chosen) for grid in grids}


OBSERVED = ((8.0, "all"), (16.0, "every_second"))
"""Frames a second that are kept, and which of them are observed: the recipe `combinations`, and the other ones."""
SIDE = 32
"""Pixels."""
PLACES = ("inside", "after", "end")
"""Of frames that are read."""


def film_figures(path: Path, rate: float, observe: str) -> dict[str, float]:
    """PSNR of frames of a film that are not projected, windows by windows as a recipe cuts them, by `auto`.

    `inside`, `after` (the last kept frame, before the window's end) and `end` (the first frame of the window that
    follows), without the next frame, and the same with it as `inside_next` and so on; `windows` that were measured.
    """
    film, shown = probe(path), read_film(path, (SIDE, SIDE))
    pictures = from_frames(shown.frames).double().numpy()
    errors: dict[str, list[float]] = {f"{place}{known}": [] for place in PLACES for known in ("", "_next")}
    windows = 0
    for start in window_starts(film, WINDOW):
        window = with_next_frame(film, select_frames(film, start, WINDOW, rate), WINDOW, rate)
        index = np.searchsorted(film.ticks, window.decoded)
        if not window.next_ticks or shown.starts[index[0] + 1 : index[-1] + 1].any():
            continue
        windows += 1
        seen = index[:-1][observed_frames(len(index) - 1, observe, "0")]
        between = np.setdiff1d(np.arange(index[0], index[-2]), seen)
        hidden = {"inside": between, "after": np.arange(index[-2] + 1, index[-1]), "end": index[-1:]}
        for known in ("", "_next"):
            used = np.append(seen, index[-1]) if known else seen
            times = np.append(film.times[seen] - start, window.next_time[: len(used) - len(seen)])
            method = clip_method(pictures[used], times, WINDOW, 2 * len(seen), AUTO, bool(known))
            matrix = legs.projection_matrix(times, WINDOW, 2 * len(seen), method, outside=bool(known))
            stored = legs.project(pictures[used], matrix)
            for place, frames in hidden.items():
                at = np.minimum(film.times[frames] - start, WINDOW)
                difference = legs.evaluate(stored, at, WINDOW) - pictures[frames]
                errors[place + known] += np.square(difference).mean((1, 2, 3)).tolist()
    psnr = {name: 10 * math.log10(4 / np.mean(found)) if found else math.nan for name, found in errors.items()}
    return {"windows": windows, **psnr}


def film_table(folder: Path) -> dict[str, dict[str, float]]:
    """`film_figures` of every film of a folder, and their mean."""
    found: dict[str, dict[str, float]] = {}
    for rate, observe in OBSERVED:
        own = {path.name: film_figures(path, rate, observe) for path in films_in([folder])}
        own = {name: row for name, row in own.items() if row["windows"]}
        mean = {key: float(np.nanmean([row[key] for row in own.values()])) for key in next(iter(own.values()), {})}
        rows = {**own, "mean": mean} if own else {}
        found |= {f"{name}, {rate:g} a second, {observe}": row for name, row in rows.items()}
    return found


def table(found: Mapping[str, Mapping[str, float]]) -> str:
    """The figures as text."""
    names = list(next(iter(found.values())))
    lines = ["| path of | " + " | ".join(name.replace("_", ", ") for name in names) + " |"]
    lines.append("|---|" + "---|" * len(names))
    lines += [f"| {name} | " + " | ".join(f"{row[key]:.3f}" for key in names) + " |" for name, row in found.items()]
    return "\n".join(lines)


def arguments(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], int]:
    """Add the experiment's options to a parser; returns what runs them."""
    parser.add_argument("videos", nargs="?", type=Path, help="a folder of films to measure in place of drawn ones")
    parser.add_argument("--films", type=int, default=24, metavar="N", help="films of as many captions (default 24)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the films (default 0)")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    return run_arguments


def run_arguments(options: argparse.Namespace) -> int:
    """Measure, and print the table."""
    found: dict[str, Any]
    found = film_table(options.videos) if options.videos else experiment(options.films, options.seed)
    print(json.dumps(found) if options.json else table(found))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry of `vlfm experiment slopes`."""
    return run_program("vlfm experiment slopes", str(__doc__).partition("\n")[0], arguments, argv)


if __name__ == "__main__":
    sys.exit(main())
