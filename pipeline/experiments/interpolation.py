"""What `vlfm interpolate` makes of frames it has not seen: every second frame of real films is hidden and made again.

Beside it stand the frame before, held, and the even blend of the two neighbours. PSNR in dB is over all hidden frames
of a film together. Those beside a cut (within `NEAR` seconds of it) stand alone, too, and those across it, which lie
between the two frames that the cut parts and belong to either shot.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from model.program import run_program
from model.progress import Progress
from pipeline.interpolate.film import FilmReader, codec_named
from pipeline.media.decode import decode, window_of
from pipeline.sources.folders import films_in

WAYS: dict[str, dict[str, Any]] = {
    "auto": {},
    "cubic": {"method": "cubic"},
    "linear": {"method": "linear"},
    "blend cuts": {"blend_cuts": True},
}
"""Settings of a FilmReader, by the name of their column."""
NEAR = 0.3
"""Seconds around a cut in which its effect is looked for."""


def hidden_frames(path: Path, size: str | None, codec: dict[str, Any]) -> dict[str, Any]:
    """The figures of one film of at least 3 frames; size and codec as for FilmReader."""
    reader = FilmReader(path, size=size, codec=codec)
    times = reader.probe.times
    windows = [window_of(reader.probe, np.arange(k, min(k + 16, len(times)))) for k in range(0, len(times), 16)]
    every = np.concatenate(list(decode(path, windows, reader.size)))
    seen = np.arange(0, len(times), 2)
    hidden = np.arange(1, seen[-1], 2)
    true = every[hidden]
    made = {"hold": every[seen[:-1]], "blend": _even_blend(every[seen])}
    cuts: list[float] = []
    for name, settings in WAYS.items():
        reader = FilmReader(path, size=size, codec=codec, **settings)
        made[name] = np.concatenate(list(reader.frames_at(times[hidden], seen)))
        cuts = reader.cuts or cuts
    later = np.array([*cuts, np.inf]) - times[hidden, None]  # (hidden, cuts) seconds
    across = ((later > 0) & (later < 1.5 * np.diff(times).max())).any(axis=1)
    beside = (np.abs(later).min(axis=1) < NEAR) & ~across
    parts = {"all": np.full(len(hidden), True), "across": across, "beside": beside}
    return {
        "film": path.name,
        "cuts": cuts,
        "frames": {part: int(chosen.sum()) for part, chosen in parts.items()},
        "psnr": {
            part: {name: _psnr(frames[chosen], true[chosen]) for name, frames in made.items()}
            for part, chosen in parts.items()
            if chosen.any()
        },
    }


def _even_blend(frames: np.ndarray) -> np.ndarray:
    return np.asarray((frames[:-1].astype(np.uint16) + frames[1:] + 1) // 2, dtype=np.uint8)


def _psnr(frames: np.ndarray, true: np.ndarray) -> float:
    errors = [float(np.square(a.astype(np.float32) - b).mean()) for a, b in zip(frames, true, strict=True)]
    return round(10 * math.log10(255**2 / max(statistics.fmean(errors), 1e-6)), 3)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a table in Markdown: all hidden frames of a film, then those beside and across its cuts."""
    names = list(rows[0]["psnr"]["all"])
    lines = ["| film | frames | " + " | ".join(names) + " |", "|---" * (2 + len(names)) + "|"]
    for part, title in (("all", ""), ("beside", ", beside cuts"), ("across", ", across cuts")):
        there = [(row["film"] + title, row["frames"][part], row["psnr"][part]) for row in rows if part in row["psnr"]]
        if there:
            means = {name: statistics.fmean(figures[name] for _, _, figures in there) for name in names}
            there.append((f"mean{title}", sum(count for _, count, _ in there), means))
        for film, count, figures in there:
            lines.append(f"| {film} | {count} | " + " | ".join(f"{figures[name]:.2f}" for name in names) + " |")
    return "\n".join(lines)


def arguments(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], int]:
    """Add the experiment's options to a parser; returns what runs them."""
    parser.add_argument("film", nargs="+", metavar="FILM", help="films, or folders of them; each is whole in memory")
    parser.add_argument("--size", default="144", metavar="HxW", help="size in pixels, or the short side (default 144)")
    parser.add_argument("--codec", default="pixels", metavar="NAME", help="as for vlfm interpolate (default pixels)")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    return run_arguments


def run_arguments(options: argparse.Namespace) -> int:
    """Measure the films and print their table."""
    codec, films, rows = codec_named(options.codec), films_in(options.film), []
    progress = Progress("film", len(films), "films")
    for film in films:
        rows.append(hidden_frames(film, options.size, codec))
        progress.advance()
    print(json.dumps(rows) if options.json else table(rows))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry of `vlfm experiment interpolation`."""
    return run_program("vlfm experiment interpolation", str(__doc__).partition("\n")[0], arguments, argv)
