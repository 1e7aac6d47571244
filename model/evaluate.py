"""Evaluation: what a run reproduces of the clips it learned, measured and shown. Needs the shards, no film."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from model.evaluation.figures import GOALS, METRICS, ClipResult, Shown, headline, measure, show, summarise
from model.evaluation.report import certificates, write_report
from model.methods.base import SampleSettings
from model.program import run_program
from model.progress import Progress
from model.sample import Sampler
from model.training.data import Clip, Clips, lake_and_version
from model.training.log import read_log
from storage.fingerprint import fingerprint, finite_json
from storage.layout import write_atomic
from storage.version import read_manifest

FORMAT = 4
"""Raise when figures or page change, so that reports of an older program are made anew."""


def evaluate(
    run: str | Path,
    lake: str | Path,
    out: str | Path,
    settings: SampleSettings | None = None,
    most: int = 64,
    shown: int = 10,
    step: int | None = None,
) -> dict[str, Any]:
    """Sample training pairs (caption, clip_start), at most `most`, and write report.html and metrics.json.

    An evaluation that has been made of this checkpoint with these settings is not made again.

    Args:
        run: folder of a training run.
        lake: the lake it trained on; the version is the run's own.
        out: folder of the report.
        settings: how to integrate.
        most: training clips to sample, spread evenly over those that kept their frames.
        shown: clips whose pictures are in the report.
        step: checkpoint, the newest by default.

    Returns:
        The metrics, as in metrics.json: None stands where there is no finite figure.

    Raises:
        ValueError: no clip is asked for, the lake is another one, or no clip kept its frames and latents; the message
            says the remedy.
    """
    if most < 1 or shown < 0:
        raise ValueError(f"{most} clips, {shown} of them shown, cannot be; --clips must be at least 1, --shown 0")
    settings = settings or SampleSettings()
    out = Path(out)
    sampler = Sampler(run, step)
    about = sampler.record.to_json()
    asked = {"step": sampler.step, "settings": asdict(settings), "most": most, "shown": shown}
    made_of = fingerprint({"format": FORMAT, "run": about, **asked})
    if (before := _made_before(out, made_of)) is not None:
        return before

    opened, version = lake_and_version(lake, sampler.record.version.number)
    if version.merkle_root != sampler.record.version.merkle_root:
        raise ValueError(
            f"version {version.number} of {lake} is not the one that {run} was trained on; give the right --lake"
        )
    train = [clip for clip in Clips(opened, version, "train").every() if _complete(clip)]
    unseen = [clip for clip in Clips(opened, version, "validation").every() if _complete(clip)]
    if not train:
        raise ValueError(
            f"no training clip of version {version.number} kept its frames and latents; "
            "ingest with --set store_latents=true --set preview_clips=64"
        )
    chosen = [train[i] for i in np.unique(np.linspace(0, len(train) - 1, min(most, len(train))).astype(int))]
    chosen += unseen[: max(1, most // 8)]
    pictures = {clip.clip_id for clip in _spread(chosen, shown)}

    results: list[ClipResult] = []
    views: list[Shown] = []
    progress = Progress("evaluate", len(chosen), "clips")
    for first in range(0, len(chosen), 16):
        part = chosen[first : first + 16]
        sample = sampler.sample(
            [clip.about["caption"] for clip in part],
            [clip.about["clip_start"] for clip in part],
            [settings.seed + first + index for index in range(len(part))],
            settings,
        )
        for index, clip in enumerate(part):
            result = measure(clip, sample, index, sampler)
            results.append(result)
            if clip.clip_id in pictures:
                views.append(show(clip, sample, index, sampler, result))
            progress.advance(note=f"{result.figures['sample_all']:.1f} dB")
        calls = sample.network_calls
    side = sampler.clip["frame_shape"][0]
    measured = {
        "made_of": made_of,
        "step": sampler.step,
        "settings": asdict(settings),
        "network_calls_per_window": calls,
        "run": about,
        "counts": version.counts,
        "certificates": certificates(read_manifest(opened, version).to_pylist()),
        "summary": summarise([r for r in results if r.split == "train"], side),
        "unseen": summarise([r for r in results if r.split != "train"], side),
        "goals": GOALS,
        "metrics": {name: asdict(metric) for name, metric in METRICS.items()},
        "clips": [result.to_json() for result in results],
    }
    metrics: dict[str, Any] = finite_json(measured)
    out.mkdir(parents=True, exist_ok=True)
    write_report(out / "report.html", metrics, results, views, read_log(sampler.run.log))
    # Written last: its presence says that the report is whole.
    write_atomic(out / "metrics.json", json.dumps(metrics, indent=1).encode())
    return metrics


def _complete(clip: Clip) -> bool:
    return "preview" in clip.members and "latents" in clip.members


def _spread(clips: Sequence[Clip], count: int) -> list[Clip]:
    """Clips from different films as far as there are any."""
    films: dict[str, list[Clip]] = {}
    for clip in clips:
        films.setdefault(clip.about["film"], []).append(clip)
    firsts = [group[len(group) // 2] for group in films.values()]
    if len(firsts) < count:
        taken = {clip.clip_id for clip in firsts}
        firsts += [clip for clip in clips if clip.clip_id not in taken][: count - len(firsts)]
    return [firsts[i] for i in np.unique(np.linspace(0, len(firsts) - 1, min(count, len(firsts))).astype(int))]


def _made_before(out: Path, made_of: str) -> dict[str, Any] | None:
    try:
        metrics: dict[str, Any] = json.loads((out / "metrics.json").read_text())
    except (OSError, json.JSONDecodeError):
        return None
    return metrics if metrics.get("made_of") == made_of and (out / "report.html").is_file() else None


def arguments(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], int]:
    """Add the evaluation's options to a parser; returns what runs them."""
    parser.add_argument("--run", required=True, metavar="DIR", help="folder of a training run")
    parser.add_argument("--lake", required=True, metavar="DIR", help="the lake it was trained on")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for report.html and metrics.json")
    parser.add_argument("--clips", type=int, default=64, metavar="N", help="training clips to sample (default 64)")
    parser.add_argument("--shown", type=int, default=10, metavar="N", help="clips with pictures (default 10)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise (default 0)")
    parser.add_argument("--step", type=int, metavar="N", help="checkpoint to use (default: the newest)")
    parser.add_argument("--json", action="store_true", help="print the metrics as JSON instead of five lines")
    return run_arguments


def run_arguments(options: argparse.Namespace) -> int:
    """Evaluate as the options say."""
    settings = SampleSettings(seed=options.seed)
    metrics = evaluate(options.run, options.lake, options.out, settings, options.clips, options.shown, options.step)
    if options.json:
        print(json.dumps(metrics))
    else:
        print("\n".join(headline(metrics)))
        print(Path(options.out) / "report.html")
    return 0


def main(arguments_given: Sequence[str] | None = None) -> int:
    """Entry of `python -m model.evaluate`."""
    return run_program("model.evaluate", "Measure and show what a run has learned.", arguments, arguments_given)


if __name__ == "__main__":
    sys.exit(main())
