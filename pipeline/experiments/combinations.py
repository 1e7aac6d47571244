"""What a model trained on the compositional corpus makes of captions that it never saw, read back by probes.

Every row is judged by the same probes (pipeline/corpus/probes.py), which read the attributes from decoded frames by
formula. Beside the samples stand true films through the codec, which is the most that can be had, and what a model
would score that ignores its caption, or that recalls the training film of the nearest caption.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any

import numpy as np
import torch

from model.methods.base import SampleSettings
from model.metrics.pictures import pooled_psnr
from model.program import run_program
from model.sample import Sampler
from model.spread import spread_evenly
from model.video import Frames, from_frames, to_frames
from pipeline.corpus.combinations import LONG, plan_combinations, plan_film
from pipeline.corpus.drawing import Path, draw_frames
from pipeline.corpus.grammar import OPEN_SPEED, Attributes, combinations
from pipeline.corpus.probes import Reading, read_attributes, spread
from storage.layout import write_atomic

RATE = 8.0
"""Frames per second that are judged."""
AT_ONCE = 32
"""Clips that are sampled together."""
OPEN = {"phase": 1.0, "lane": None, "speed": None}
"""What captions leave open, with its period where it has one."""
DRAWN = 400
"""Films of a caption whose spread is the data's; drawing no frame costs nothing."""


@dataclass(frozen=True)
class Row:
    """A line of the table: the share of videos with each attribute right, `whole` for all of them."""

    name: str
    videos: int
    right: Mapping[str, float]
    error: float = float("nan")
    """Median rms difference from the nearest film of the asked combination, in grey levels; of those wholly right."""


class Judge:
    """Samples of a run, decoded and read."""

    def __init__(self, run: str | FilePath, settings: SampleSettings | None = None) -> None:
        self.sampler = Sampler(run)
        self.settings = settings or SampleSettings()
        self.times = np.arange(round(self.sampler.window * RATE)) / RATE

    def sample(
        self, wanted: Sequence[Attributes], seeds: Sequence[int], settings: SampleSettings | None = None
    ) -> list[Frames]:
        """A video (N, H, W, 3) of each caption with its own seed."""
        found: list[Frames] = []
        at = torch.from_numpy(self.times / self.sampler.window)
        for first in range(0, len(wanted), AT_ONCE):
            part = slice(first, first + AT_ONCE)
            captions = [one.caption for one in wanted[part]]
            made = self.sampler.sample(captions, None, list(seeds[part]), settings or self.settings)
            latents = made.read(at)
            found += [
                to_frames(self.sampler.codec.decode(latents[:, k], text=caption)) for k, caption in enumerate(captions)
            ]
        return found

    def through_codec(self, frames: Frames, caption: str = "") -> Frames:
        """The frames encoded and decoded."""
        codec = self.sampler.codec
        return to_frames(codec.decode(codec.encode(from_frames(frames), text=caption).latents, text=caption))

    def read(self, videos: Sequence[Frames]) -> list[Reading]:
        """The probes' readings."""
        return [read_attributes(frames, self.times) for frames in videos]

    def row(self, name: str, wanted: Sequence[Attributes], videos: Sequence[Frames]) -> Row:
        """The table's line for videos that were asked to show `wanted`."""
        readings = self.read(videos)
        right = [reading.right(one) for reading, one in zip(readings, wanted, strict=True)]
        shares = {key: statistics.fmean(each[key] for each in right) for key in right[0]}
        shares["whole"] = statistics.fmean(all(each.values()) for each in right)
        errors = [
            self.error(frames, self.times, reading, one)
            for frames, reading, one, each in zip(videos, readings, wanted, right, strict=True)
            if all(each.values())
        ]
        return Row(name, len(videos), shares, statistics.median(errors) if errors else float("nan"))

    @staticmethod
    def error(frames: Frames, times: np.ndarray, reading: Reading, wanted: Attributes) -> float:
        """Rms difference, in grey levels, from the film of these attributes with the start and speed that were read.

        times: (N,) seconds of the frames (N, H, W, 3).
        """
        path = Path(wanted.motion, wanted.direction, reading.phase, reading.lane, reading.speed)
        true = draw_frames(wanted, path, times, side=frames.shape[1])
        return float(np.sqrt(np.square(frames.astype(np.float64) - true).mean()))


def experiment(
    run: str | FilePath,
    captions: int = 48,
    seeds: int = 4,
    corpus_seed: int = 0,
    films: int = 900,
    films_per_caption: int = 3,
    guidance: float = 3.0,
    diverse: int = 16,
    longest: int = 8,
) -> dict[str, Any]:
    """Everything that the experiment measures, ready for JSON.

    captions: how many that are held out. corpus_seed, films, films_per_caption: of `make_combinations`, which drew the
    training films. guidance: of the rows that are guided. diverse: seeds of each caption whose spread is measured.
    longest: long films that are continued, at most.
    """
    judge = Judge(run)
    held = spread_evenly(combinations(held_out=True), captions)
    seen = list(
        dict.fromkeys(film.attributes for film in plan_combinations(corpus_seed, films, False, films_per_caption))
    )
    drawn = list(range(seeds))

    def several(of: Sequence[Attributes]) -> tuple[list[Attributes], list[int]]:
        return [one for one in of for _ in drawn], [1000 * k + seed for k in range(len(of)) for seed in drawn]

    asked, noise = several(held)
    made = judge.sample(asked, noise)
    guide = SampleSettings(guidance=guidance)
    guided = judge.sample(asked, noise, guide)
    known, known_noise = several(seen[:captions])
    true = [plan_film(one, seed=k) for k, one in enumerate(held)]
    nearest = [plan_film(_nearest(one, seen), seed=k) for k, one in enumerate(held)]
    times = judge.times
    rows = [
        judge.row("held-out captions", asked, made),
        judge.row(f"the same, guidance {guidance:g}", asked, guided),
        judge.row("captions of the training films", known, judge.sample(known, known_noise)),
        judge.row(f"the same, guidance {guidance:g}", known, judge.sample(known, known_noise, guide)),
        judge.row(
            "true films through the codec (ceiling)",
            held,
            [judge.through_codec(draw_frames(film.attributes, film.path, times)) for film in true],
        ),
        judge.row("held-out samples, captions shuffled (floor)", asked[seeds:] + asked[:seeds], made),
        judge.row(
            "the nearest training caption's film (floor)",
            held,
            [draw_frames(film.attributes, film.path, times) for film in nearest],
        ),
    ]
    return {
        "run": str(run),
        "step": judge.sampler.step,
        "rows": [vars(row) | {"right": dict(row.right)} for row in rows],
        "diversity": diversity(judge, seeds=diverse),
        "between": between(judge, held[:8]),
        "long": long_videos(judge, held, longest),
    }


def diversity(judge: Judge, captions: int = 4, seeds: int = 16) -> dict[str, Any]:
    """Mean pairwise distance of what captions leave open, over the same of the data: 1 is as wide as the data.

    Of held-out captions that name no speed, half of them sliding; samples whose motion cannot be read are left out.
    """
    wanted = [one for one in combinations(held_out=True) if one.speed == OPEN_SPEED]
    slides, circles = ([one for one in wanted if one.motion == motion] for motion in ("slides", "circles"))
    chosen = spread_evenly(slides, captions // 2) + spread_evenly(circles, captions - captions // 2)
    found: dict[str, list[float]] = {name: [] for name in OPEN}
    readable = 0
    for number, one in enumerate(chosen):
        videos = judge.sample([one] * seeds, [5000 + 100 * number + seed for seed in range(seeds)])
        read = [reading for reading in judge.read(videos) if reading.motion == one.motion]
        readable += len(read)
        paths = [plan_film(one, seed=seed).path for seed in range(DRAWN)]
        for name, period in OPEN.items():
            if len(read) > 1:
                data = spread([getattr(path, name) for path in paths], period)
                found[name].append(spread([getattr(reading, name) for reading in read], period) / data)
    figures = {name: statistics.fmean(values) if values else float("nan") for name, values in found.items()}
    return {**figures, "captions": len(chosen), "samples": len(chosen) * seeds, "readable": readable}


def between(judge: Judge, wanted: Sequence[Attributes]) -> dict[str, float]:
    """How frames half-way between the solver's grid points compare with those on them.

    `ratio`: median rms difference from the film of the read start and speed, between over on; 1 is as good.
    """
    steps = judge.settings.steps
    window = judge.sampler.window
    on, off = np.arange(steps) / steps, (np.arange(steps) + 0.5) / steps
    captions = [one.caption for one in wanted]
    made = judge.sampler.sample(captions, None, list(range(len(wanted))), judge.settings)
    ratios = []
    for k, one in enumerate(wanted):
        errors = []
        reading = None
        for places in (on, off):
            latents = made.read(torch.from_numpy(places))[:, k]
            frames = to_frames(judge.sampler.codec.decode(latents, text=captions[k]))
            reading = reading or read_attributes(frames, places * window)
            if np.isfinite(reading.phase) and reading.motion == one.motion:
                errors.append(judge.error(frames, places * window, reading, one))
        if len(errors) == 2:
            ratios.append(errors[1] / errors[0])
    return {"ratio": statistics.median(ratios) if ratios else float("nan"), "videos": len(ratios)}


def long_videos(judge: Judge, wanted: Sequence[Attributes], most: int = 8, windows: int = 3) -> dict[str, float]:
    """Long films with a named speed, continued from their first frame for three windows, in dB against the truth.

    `third_window` beside `hold_first` (the given frame, held) and `hold_window` (the true last frame of the window
    before, held). `seam`: rms difference across a window's end over the video's median difference of neighbours.
    """
    chosen = spread_evenly([one for one in wanted if one.speed != OPEN_SPEED], most)
    window, sampler = judge.sampler.window, judge.sampler
    times = np.arange(round(windows * window * RATE)) / RATE
    per = len(times) // windows
    figures: dict[str, list[float]] = {"third_window": [], "hold_first": [], "hold_window": [], "seam": []}
    for number, one in enumerate(chosen):
        film = plan_film(one, seed=number, seconds=LONG)
        true = draw_frames(one, film.path, times)
        image = from_frames(true[:1])[0]
        (made,) = sampler.videos([one.caption], RATE, windows * window, judge.settings, image=image)
        last = slice(2 * per, 3 * per)
        held = {"hold_first": true[:1], "hold_window": true[2 * per - 1 : 2 * per]}
        for name, frames in {"third_window": made[last], **held}.items():
            shown = from_frames(np.broadcast_to(frames, true[last].shape))
            figures[name].append(pooled_psnr(shown, from_frames(true[last])))
        steps = np.sqrt(np.square(np.diff(made.astype(np.float64), axis=0)).mean(axis=(1, 2, 3)))
        figures["seam"].append(max(steps[per - 1], steps[2 * per - 1]) / float(np.median(steps)))
    return {name: statistics.fmean(values) for name, values in figures.items()} | {"films": len(chosen)}


def _nearest(wanted: Attributes, seen: Sequence[Attributes]) -> Attributes:
    """The first of `seen` that shares most attributes."""
    return max(seen, key=lambda one: sum(getattr(one, name) == value for name, value in vars(wanted).items()))


def table(found: Mapping[str, Any]) -> str:
    """The figures as text."""
    names = list(found["rows"][0]["right"])
    lines = ["| videos of | " + " | ".join(names) + " | error | n |", "|---|" + "---|" * (len(names) + 2)]
    for row in found["rows"]:
        shares = " | ".join(f"{100 * row['right'][name]:.0f}" for name in names)
        lines.append(f"| {row['name']} | {shares} | {row['error']:.1f} | {row['videos']} |")
    spreads = ", ".join(f"{name} {found['diversity'][name]:.2f}" for name in OPEN)
    diverse, long = found["diversity"], found["long"]
    return "\n".join(
        [
            *lines,
            "",
            "Shares of videos in % by the probes; error: median rms difference from the nearest film of the asked "
            "combination, grey levels, of the videos that are wholly right.",
            f"Diversity, samples over data: {spreads} ({diverse['readable']} of {diverse['samples']} readable).",
            f"Frames between the solver's grid points: error {found['between']['ratio']:.2f} times that on them.",
            f"Three windows from one frame: third window {long['third_window']:.1f} dB, first frame held "
            f"{long['hold_first']:.1f} dB, the window before's true last frame held {long['hold_window']:.1f} dB; "
            f"seam {long['seam']:.2f} times the median step.",
        ]
    )


def arguments(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], int]:
    """Add the experiment's options to a parser; returns what runs them."""
    parser.add_argument("--run", required=True, metavar="DIR", help="a run trained on make_combinations' films")
    parser.add_argument("--captions", type=int, default=48, help="held-out captions (default 48)")
    parser.add_argument("--seeds", type=int, default=4, help="samples of each (default 4)")
    parser.add_argument("--corpus-seed", type=int, default=0, help="seed of the training films (default 0)")
    parser.add_argument("--films", type=int, default=900, help="how many they are (default 900)")
    parser.add_argument("--films-per-caption", type=int, default=3, help="films of each caption (default 3)")
    parser.add_argument("--guidance", type=float, default=3.0, help="of the guided rows (default 3)")
    parser.add_argument("--json", metavar="FILE", help="write the figures there too")
    return run_arguments


def run_arguments(options: argparse.Namespace) -> int:
    """Run the experiment as the options say, and print its table."""
    if options.captions < 1 or options.seeds < 1:
        raise ValueError(f"--captions {options.captions} --seeds {options.seeds}: both must be at least 1")
    found = experiment(
        options.run, options.captions, options.seeds, options.corpus_seed, options.films, options.films_per_caption,
        options.guidance,
    )  # fmt: skip
    if options.json:
        write_atomic(FilePath(options.json), json.dumps(found, indent=1).encode())
    print(table(found))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry of `vlfm experiment combinations`."""
    return run_program("vlfm experiment combinations", str(__doc__).partition("\n")[0], arguments, argv)


if __name__ == "__main__":
    sys.exit(main())
