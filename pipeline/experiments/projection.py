"""Which order and which method of projection: frames of films held out, each method's path read at their times.

A window holds 2N - 1 neighbouring frames of a film, without a cut; every second one, N of them, is projected, and the
path is read at the others. Figures are PSNR in dB of the latents (peak 2: for the codec `pixels` the usual PSNR of
pictures), against the latents of the held-out frames. `auto` sees the projected frames only: it takes the method with
the least leave-one-out error, for each clip by itself or, as `recipe`, one for all clips of the table.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from model.legs import derivative, evaluate, project, projection_matrix
from model.legs.select import choose, clip_method, residual_operators
from model.program import run_program
from model.progress import Progress
from pipeline.interpolate.film import codec_named, frame_size
from pipeline.media.decode import decode, probe, window_of
from pipeline.media.shots import shot_starts
from pipeline.sources.folders import films_in
from pipeline.stages.invert import SharedCodec, to_signed

COUNTS = (13, 25, 49)
"""N, the frames that are projected."""
METHODS = ("linear", "cubic", "hold", "auto", "recipe")
ORDERS = (0.5, 0.75, 1.0, 1.5, 2.0)
"""Orders, in frames, among which the column `order too` chooses, for each clip, together with the method."""


@dataclass(frozen=True)
class Clip:
    """A window of a film."""

    film: str
    start: float
    """Seconds since the film's first frame."""
    times: np.ndarray
    """(2N - 1,) seconds in the window."""
    latents: np.ndarray
    """(2N - 1, C, h, w) float32."""

    @property
    def duration(self) -> float:
        """Seconds from the first frame until the last one disappears."""
        return float(self.times[-1] + np.diff(self.times).mean())


@dataclass(frozen=True)
class Film:
    """A film in memory."""

    name: str
    times: np.ndarray
    """(frames,) seconds since the first one."""
    frames: np.ndarray
    """(frames, H, W, 3) uint8."""
    starts: np.ndarray
    """(frames,) whether it begins a shot."""


def read_film(path: Path, size: tuple[int, int]) -> Film:
    """A whole film at this size; DecodeError where it cannot be used."""
    film = probe(path)
    total = len(film.ticks)
    windows = [window_of(film, np.arange(k, min(k + 16, total))) for k in range(0, total, 16)]
    found = list(shot_starts(frame for part in decode(path, windows, size) for frame in part))
    return Film(path.name, film.times, np.stack([frame for frame, _ in found]), np.array([cut for _, cut in found]))


def clips_of(film: Film, count: int, windows: int, codec: SharedCodec) -> list[Clip]:
    """At most `windows` clips of 2 count - 1 frames without a cut, spread evenly over the film."""
    span = 2 * count - 1
    chosen: list[int] = []
    for first in range(len(film.times) - span + 1):
        whole = not film.starts[first + 1 : first + span].any()
        if whole and (not chosen or first >= chosen[-1] + span):
            chosen.append(first)
    clips = []
    for place in np.linspace(0, len(chosen) - 1, min(windows, len(chosen))).round().astype(int):
        part = slice(chosen[place], chosen[place] + span)
        latents = codec.encode(to_signed(film.frames[part], codec.device), [""] * span).latents.float().cpu().numpy()
        start = float(film.times[part][0])
        clips.append(Clip(film.name, round(start, 3), film.times[part] - start, latents))
    return clips


def clip_row(clip: Clip, recipe_methods: dict[str, str]) -> dict[str, Any]:
    """A clip's figures: PSNR by column, the choice of `auto`, and how steeply paths begin.

    recipe_methods: what `recipe` takes, by column, chosen from all clips.
    """
    seen, hidden = clip.latents[::2], clip.latents[1::2]
    times, count = clip.times[::2], len(seen)
    figures = {"previous": _psnr(seen[:-1], hidden), "interpolation": _psnr(_straight(clip), hidden)}
    slopes: dict[str, float] = {}
    steps = math.sqrt(float(np.square(np.diff(seen, axis=0)).mean())) / float(np.diff(times).mean())
    started = time.process_time()
    auto = {f"s={name}": clip_method(seen, times, clip.duration, order, "auto") for name, order in _orders(count)}
    seconds = (time.process_time() - started) / len(auto)
    for name, order in _orders(count):
        for method in METHODS:
            named = {"auto": auto[f"s={name}"], "recipe": recipe_methods[f"s={name}"]}.get(method, method)
            path = project(seen, projection_matrix(times, clip.duration, order, named))
            figures[f"{method} s={name}"] = _psnr(evaluate(path, clip.times[1::2], clip.duration), hidden)
            start = np.asarray(derivative(path, times[:1], clip.duration))
            slopes[f"{method} s={name}"] = math.sqrt(float(np.square(start).mean())) / steps if steps else math.nan
    orders = tuple(round(share * count) for share in ORDERS)
    best = choose(seen, times, clip.duration, orders=orders)
    path = project(seen, best.matrix(times, clip.duration))
    figures["order too"] = _psnr(evaluate(path, clip.times[1::2], clip.duration), hidden)
    return {
        "film": clip.film, "start": clip.start, "frames": count, "psnr": figures, "auto": auto["s=2N"],
        "order": best.order, "seconds": seconds, "slope": slopes,
    }  # fmt: skip


def rows_of(clips: Sequence[Clip]) -> list[dict[str, Any]]:
    """Figures of clips of one number of frames."""
    errors: dict[tuple[str, str], list[float]] = {}
    for clip in clips:
        for name, order in _orders(len(clip.times) // 2 + 1):
            known = choose(clip.latents[::2], clip.times[::2], clip.duration, orders=(order,))
            for (method, _), error in known.errors.items():
                errors.setdefault((f"s={name}", method), []).append(error)
    # A method that the times of some clip rule out is none for all of them.
    sums = {key: sum(found) for key, found in errors.items() if len(found) == len(clips)}
    recipe = {column: min((total, method) for (name, method), total in sums.items() if name == column)[1]
              for column, _ in sums}  # fmt: skip
    return [clip_row(clip, recipe) for clip in clips]


def _orders(count: int) -> tuple[tuple[str, int], ...]:
    return ("N", count), ("2N", 2 * count)


def _straight(clip: Clip) -> np.ndarray:
    """Linear interpolation at the held-out times."""
    before, after = clip.times[:-2:2], clip.times[2::2]
    share = ((clip.times[1::2] - before) / (after - before)).astype(np.float32)[:, None, None, None]
    return np.asarray((1 - share) * clip.latents[:-2:2] + share * clip.latents[2::2])


def _psnr(made: np.ndarray, true: np.ndarray) -> float:
    error = float(np.square(made.astype(np.float64) - true).mean())
    return 10 * math.log10(4 / max(error, 1e-10))


def operator_seconds(count: int) -> float:
    """Processor time to make the operators of one grid of times, which all clips of those times share."""
    times = np.arange(count) / (count + time.process_time() % 1e-3)  # a grid that no clip had: nothing is cached
    started = time.process_time()
    for method in ("cubic", "linear"):
        residual_operators(times, 2.0, (2 * count,), method)
    return time.process_time() - started


def mean_gains(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Mean over clips of the difference in dB to linear interpolation, by column."""
    return {
        name: statistics.fmean(row["psnr"][name] - row["psnr"]["interpolation"] for row in rows)
        for name in rows[0]["psnr"]
        if name != "interpolation"
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as tables in Markdown, one for each N; all columns but `interpolation` are differences to that one."""
    lines = []
    for count in sorted({row["frames"] for row in rows}):
        part = [row for row in rows if row["frames"] == count]
        names = list(mean_gains(part))
        lines += [f"N = {count}", "", "| clip | interpolation | " + " | ".join(names) + " | auto |"]
        lines += ["|---" * (3 + len(names)) + "|"]
        for row in part:
            straight = row["psnr"]["interpolation"]
            cells = [f"{row['film']} {row['start']:g} s", f"{straight:.2f}"]
            cells += [f"{row['psnr'][name] - straight:+.2f}" for name in names]
            lines.append("| " + " | ".join([*cells, f"{row['auto']}, order {row['order']}"]) + " |")
        straight = statistics.fmean(row["psnr"]["interpolation"] for row in part)
        gains = [f"{gain:+.3f}" for gain in mean_gains(part).values()]
        spline = sum(row["auto"] == "cubic" for row in part)
        lines.append("| " + " | ".join(["mean", f"{straight:.2f}", *gains, f"cubic {spline} of {len(part)}"]) + " |")
        slopes = {name: statistics.median(row["slope"][name] for row in part) for name in part[0]["slope"]}
        told = ", ".join(f"{name} {slope:.1f}" for name, slope in slopes.items())
        cost = f"{1000 * statistics.fmean(row['seconds'] for row in part):.1f} ms a clip and order"
        once = f"{1000 * operator_seconds(count):.0f} ms once for each grid of times"
        lines += ["", f"slope at the start, in mean steps, median: {told}", "", f"auto: {cost}, {once}", ""]
    return "\n".join(lines).rstrip()


def arguments(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], int]:
    """Add the experiment's options to a parser; returns what runs them."""
    parser.add_argument("film", nargs="+", metavar="FILM", help="films, or folders of them; each is whole in memory")
    parser.add_argument("--size", default="48x64", metavar="HxW", help="size in pixels (default 48x64)")
    parser.add_argument("--codec", default="pixels", metavar="NAME", help="as for vlfm interpolate (default pixels)")
    parser.add_argument("--windows", type=int, default=3, metavar="K", help="most windows of a film (default 3)")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    return run_arguments


def run_arguments(options: argparse.Namespace) -> int:
    """Measure the films and print their tables; a film too short for N gives no clip of it."""
    if options.windows < 1:
        raise ValueError(f"--windows is {options.windows}; it must be at least 1")
    size, codec = frame_size(options.size, (1, 1)), SharedCodec(codec_named(options.codec))
    films = films_in(options.film)
    progress = Progress("project", len(films), "films")
    clips: dict[int, list[Clip]] = {count: [] for count in COUNTS}
    for path in films:
        film = read_film(path, size)
        for count in COUNTS:
            clips[count] += clips_of(film, count, options.windows, codec)
        progress.advance()
    rows = [row for found in clips.values() if found for row in rows_of(found)]
    if not rows:
        raise ValueError(f"no film has {2 * COUNTS[0] - 1} frames without a cut; name longer films")
    print(json.dumps(rows) if options.json else table(rows))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry of `vlfm experiment projection`."""
    return run_program("vlfm experiment projection", str(__doc__).partition("\n")[0], arguments, argv)
