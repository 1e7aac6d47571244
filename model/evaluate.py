"""Evaluation: what a run makes of clips it learned and of others, measured and shown. Needs the shards, no film."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from model.evaluation.catalogue import Catalogue
from model.evaluation.figures import GOALS, ClipResult, Shown, measure, show, summarise
from model.evaluation.generation import generate
from model.evaluation.headline import METRICS, SPLITS, headline, headline_of_runs, losses, ranges
from model.evaluation.report import certificates, write_report
from model.methods.base import SampleSettings
from model.program import run_program
from model.progress import Progress
from model.sample import Sampler
from model.spread import spread_evenly
from model.training.checkpoint import Run
from model.training.data import Clip, Clips, lake_and_version
from model.training.log import read_log
from model.training.record import RunRecord
from storage.fingerprint import fingerprint, finite_json
from storage.layout import write_atomic
from storage.version import read_manifest

FORMAT = 5
"""Raise when figures or page change, so that reports of an older program are made anew."""


def evaluate(
    run: str | Path,
    lake: str | Path,
    out: str | Path,
    settings: SampleSettings | None = None,
    most: int = 16,
    shown: int = 6,
    step: int | None = None,
) -> dict[str, Any]:
    """Sample at most `most` clips of each split, and captions alone, and write report.html and metrics.json.

    An evaluation that has been made of this checkpoint with these settings is not made again.

    Args:
        run: folder of a training run.
        lake: the lake it trained on; the version is the run's own.
        out: folder of the report.
        settings: how to integrate.
        most: clips of each split to sample, spread evenly over those that kept their frames.
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
    clips = Clips(opened, version)
    catalogue = Catalogue.of(clips)
    train = np.flatnonzero(catalogue.complete & catalogue.training).tolist()
    unseen = np.flatnonzero(catalogue.complete & ~catalogue.training).tolist()
    if not train:
        raise ValueError(
            f"no training clip of version {version.number} kept its frames and latents; "
            "ingest with --set store_latents=true --set preview_clips=64"
        )
    chosen = [catalogue.read(number) for number in spread_evenly(train, most) + spread_evenly(unseen, most)]
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
            result = measure(clip, sample, index, sampler, settings.steps)
            results.append(result)
            if clip.clip_id in pictures:
                views.append(show(clip, sample, index, sampler, result))
            progress.advance(note=f"{result.figures['film_sample']:.1f} dB")
        calls = sample.network_calls
    log = read_log(sampler.run.log)
    loss, made = losses(log), {}
    progress = Progress("generate", len(SPLITS), "splits")
    for split in SPLITS:
        made[split] = generate(sampler, catalogue, [c for c in chosen if c.about["split"] == split], settings)
        progress.advance()
    side = sampler.clip["frame_shape"][0]
    measured = {
        "made_of": made_of,
        "step": sampler.step,
        "settings": asdict(settings),
        "network_calls_per_window": calls,
        "run": about,
        "counts": version.counts,
        "certificates": certificates(read_manifest(opened, version).to_pylist()),
        **{
            split: {**summarise([r for r in results if r.split == split], side), **made[split].figures, **loss[split]}
            for split in SPLITS
        },
        "goals": GOALS,
        "metrics": {name: asdict(metric) for name, metric in METRICS.items()},
        "clips": [result.to_json() for result in results],
    }
    metrics: dict[str, Any] = finite_json(measured)
    out.mkdir(parents=True, exist_ok=True)
    write_report(out / "report.html", metrics, results, views, made, log)
    # Written last: its presence says that the report is whole.
    write_atomic(out / "metrics.json", json.dumps(metrics, indent=1).encode())
    return metrics


def evaluate_runs(
    runs: Sequence[str | Path],
    lake: str | Path,
    out: str | Path,
    settings: SampleSettings | None = None,
    most: int = 16,
    shown: int = 6,
) -> dict[str, Any]:
    """Evaluate runs of one recipe that differ in their training seeds alone: each in `out`/seed-N, and the range of
    each headline figure in `out`/ranges.json.

    Arguments as for `evaluate`.

    Returns:
        What ranges.json holds: `seeds`, and by split and figure `[mean, least, most]`.

    Raises:
        ValueError: the runs differ in more than their seeds, or two have the same; and as `evaluate`.
    """
    records = [RunRecord.read(Run(Path(run))) for run in runs]
    seeds = [record.recipe.seed for record in records]
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"the runs have the seeds {seeds}; train each with another: --set seed=N")
    for run, record in zip(runs[1:], records[1:], strict=True):
        for name, first, here in records[0].differences(record.recipe):
            if name != "seed":
                raise ValueError(
                    f"{run} has {name}={here!r}, {runs[0]} {first!r}; give runs that differ in the seed alone"
                )
    steps = [Run(Path(run)).steps()[-1:] for run in runs]
    if any(step != steps[0] for step in steps):
        raise ValueError(f"the runs' newest checkpoints are of the steps {steps}; train them equally long")
    out = Path(out)
    made = [
        evaluate(run, lake, out / f"seed-{seed}", settings, most, shown) for run, seed in zip(runs, seeds, strict=True)
    ]
    found = {"format": FORMAT, "seeds": seeds, **ranges(made)}
    write_atomic(out / "ranges.json", json.dumps(found, indent=1).encode())
    return found


def _spread(clips: Sequence[Clip], count: int) -> list[Clip]:
    """Clips from different films as far as there are any."""
    films: dict[str, list[Clip]] = {}
    for clip in clips:
        films.setdefault(clip.about["film"], []).append(clip)
    firsts = [group[len(group) // 2] for group in films.values()]
    if len(firsts) < count:
        taken = {clip.clip_id for clip in firsts}
        firsts += [clip for clip in clips if clip.clip_id not in taken][: count - len(firsts)]
    return spread_evenly(firsts, count)


def _made_before(out: Path, made_of: str) -> dict[str, Any] | None:
    try:
        metrics: dict[str, Any] = json.loads((out / "metrics.json").read_text())
    except (OSError, json.JSONDecodeError):
        return None
    return metrics if metrics.get("made_of") == made_of and (out / "report.html").is_file() else None


def arguments(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], int]:
    """Add the evaluation's options to a parser; returns what runs them."""
    parser.add_argument(
        "--run",
        required=True,
        action="append",
        metavar="DIR",
        help="folder of a training run; given several times, for runs of other seeds: prints means and ranges",
    )
    parser.add_argument(
        "--lake", required=True, metavar="DIR", help="the lake it was trained on: a folder, or s3://BUCKET/PREFIX"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for report.html and metrics.json")
    parser.add_argument("--clips", type=int, default=16, metavar="N", help="clips of each split to sample (default 16)")
    parser.add_argument("--shown", type=int, default=6, metavar="N", help="clips with pictures (default 6)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise (default 0)")
    parser.add_argument("--step", type=int, metavar="N", help="checkpoint to use (default: the newest)")
    parser.add_argument("--json", action="store_true", help="print the metrics as JSON instead of a table")
    return run_arguments


def run_arguments(options: argparse.Namespace) -> int:
    """Evaluate as the options say."""
    settings = SampleSettings(seed=options.seed)
    given = (options.lake, options.out, settings, options.clips, options.shown)
    if len(options.run) == 1:
        found = evaluate(options.run[0], *given, options.step)
        lines = [*headline(found), str(Path(options.out) / "report.html")]
    else:
        if options.step is not None:
            raise ValueError(f"--step {options.step} is of one run; give one --run, or leave it out")
        found = evaluate_runs(options.run, *given)
        lines = headline_of_runs(found, len(options.run))
        lines += [str(Path(options.out) / f"seed-{seed}" / "report.html") for seed in found["seeds"]]
    print(json.dumps(found) if options.json else "\n".join(lines))
    return 0


def main(arguments_given: Sequence[str] | None = None) -> int:
    """Entry of `python -m model.evaluate`."""
    return run_program("model.evaluate", "Measure and show what a run has learned.", arguments, arguments_given)


if __name__ == "__main__":
    sys.exit(main())
