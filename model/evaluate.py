"""Evaluation: what a run makes of clips it learned and of others, measured and shown. Needs the shards, no film."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from model.evaluation.catalogue import Catalogue
from model.evaluation.figures import GOALS, ClipResult, Shown, measure, show, summarise
from model.evaluation.generation import generate
from model.evaluation.headline import (
    OF_CURVES,
    OF_SEQUENCES,
    SEQUENCES,
    SPLITS,
    headline,
    headline_of_runs,
    losses,
    ranges,
)
from model.evaluation.report import certificates, write_report
from model.evaluation.sequence_report import bordered, write_sequence_report
from model.evaluation.sequences import Grown, decoded_video, measure_split
from model.methods.base import default_sampling
from model.metrics.sequences import FvdNetwork
from model.program import run_program
from model.progress import Progress
from model.sample import Sampler
from model.spread import spread_evenly
from model.training.checkpoint import Run
from model.training.data import Clip, Clips, lake_and_version
from model.training.log import read_log
from model.training.record import RunRecord
from model.video import Frames
from storage.fingerprint import fingerprint, finite_json
from storage.layout import Lake, write_atomic
from storage.version import Version, read_manifest

FORMAT = 6
"""Raise when figures or page change, so that reports of an older program are made anew."""


def evaluate(
    run: str | Path,
    lake: str | Path,
    out: str | Path,
    settings: Any = None,
    most: int = 16,
    shown: int = 6,
    step: int | None = None,
    fvd: Path | None = None,
) -> dict[str, Any]:
    """Sample at most `most` clips of each split, and captions alone, and write report.html and metrics.json.

    An evaluation that has been made of this checkpoint with these settings is not made again.

    Args:
        run: folder of a training run.
        lake: the lake it trained on; the version is the run's own.
        out: folder of the report.
        settings: of the method's `Sampling`; None for its defaults.
        most: clips of each split to sample, spread evenly over those that kept their frames.
        shown: clips whose pictures are in the report.
        step: checkpoint, the newest by default.
        fvd: TorchScript file of the network for an FVD, of methods that sample frames in order.

    Returns:
        The metrics, as in metrics.json: None stands where there is no finite figure.

    Raises:
        ValueError: no clip is asked for, the lake is another one, or no clip kept its frames and latents; the message
            says the remedy.
    """
    if most < 1 or shown < 0:
        raise ValueError(f"{most} clips, {shown} of them shown, cannot be; --clips must be at least 1, --shown 0")
    out = Path(out)
    sampler = Sampler(run, step)
    settings = settings or default_sampling(sampler.method, sampler.clip)
    if fvd is not None and not sampler.method.sequences:
        raise ValueError(f"--fvd has no use for a run of the method {sampler.method.name}; leave it out")
    about = sampler.record.to_json()
    asked = {"step": sampler.step, "settings": asdict(settings), "most": most, "shown": shown}
    made_of = fingerprint({"format": FORMAT, "run": about, **asked, **({} if fvd is None else {"fvd": str(fvd)})})
    if (before := _made_before(out, made_of)) is not None:
        return before

    opened, version = lake_and_version(lake, sampler.record.version.number)
    if version.merkle_root != sampler.record.version.merkle_root:
        raise ValueError(
            f"version {version.number} of {lake} is not the one that {run} was trained on; give the right --lake"
        )
    given = {"made_of": made_of, "step": sampler.step, "settings": asdict(settings), "run": about}
    if sampler.method.sequences:
        metrics = _of_sequences(sampler, opened, version, given, settings, out, most, shown, fvd)
    else:
        metrics = _of_curves(sampler, opened, version, given, settings, out, most, shown)
    # Written last: its presence says that the report is whole.
    write_atomic(out / "metrics.json", json.dumps(metrics, indent=1).encode())
    return metrics


def _of_sequences(
    sampler: Sampler,
    lake: Lake,
    version: Version,
    given: Mapping[str, Any],
    settings: Any,
    out: Path,
    most: int,
    shown: int,
    fvd: Path | None,
) -> dict[str, Any]:
    """The metrics of a method that samples frames in order, and its report.html."""
    network = None if fvd is None else FvdNetwork(fvd)
    table = read_manifest(lake, version).to_pylist()
    found, strips, calls = {}, {}, 0
    progress = Progress("evaluate", len(SPLITS), "splits")
    for split in SPLITS:
        clips = Clips(lake, version, split, ("latents",))
        lengths = [row["frames"] for row in table if row["split"] == split]
        found[split], called = measure_split(sampler, clips, lengths, settings, most, network)
        calls += called
        strips[split] = [_strip(sampler, grown) for grown in spread_evenly(found[split].samples, shown)]
        progress.advance()
    log = read_log(sampler.run.log)
    loss = losses(log)
    measured = {
        **given,
        "kind": SEQUENCES,
        "network_calls": calls,
        "counts": version.counts,
        **{split: {**found[split].to_json(), **loss[split]} for split in SPLITS},
        "metrics": {name: asdict(metric) for name, metric in OF_SEQUENCES.items()},
        "clips": [grown.to_json() for split in SPLITS for grown in found[split].samples],
    }
    metrics: dict[str, Any] = finite_json(measured)
    out.mkdir(parents=True, exist_ok=True)
    write_sequence_report(out / "report.html", metrics, found, strips, log)
    return metrics


def _strip(sampler: Sampler, grown: Grown) -> tuple[str, Frames, Frames]:
    """Caption, and the frames of the clip and of the sample with borders."""
    caption, true = grown.clip.about["caption"], torch.from_numpy(grown.clip.members["latents"].astype(np.float32))
    nothing = np.full(len(true), np.nan)
    shown = ((true, nothing), (grown.latents, grown.inserted))
    clip, made = (bordered(decoded_video(sampler, latents, caption), inserted) for latents, inserted in shown)
    return caption, clip, made


def _of_curves(
    sampler: Sampler,
    lake: Lake,
    version: Version,
    given: Mapping[str, Any],
    settings: Any,
    out: Path,
    most: int,
    shown: int,
) -> dict[str, Any]:
    """The metrics of a method whose clips are read at any time, and its report.html."""
    clips = Clips(lake, version)
    catalogue = Catalogue.of(clips)
    train = np.flatnonzero(catalogue.complete & catalogue.training).tolist()
    unseen = np.flatnonzero(catalogue.complete & ~catalogue.training).tolist()
    if not train:
        raise ValueError(
            f"no training clip of version {version.number} kept its frames and latents; "
            "ingest films with --set store_latents=true --set preview_clips=64 (imported latents have no frames)"
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
        **given,
        "network_calls_per_window": calls,
        "counts": version.counts,
        "certificates": certificates(read_manifest(lake, version).to_pylist()),
        **{
            split: {**summarise([r for r in results if r.split == split], side), **made[split].figures, **loss[split]}
            for split in SPLITS
        },
        "goals": GOALS,
        "metrics": {name: asdict(metric) for name, metric in OF_CURVES.items()},
        "clips": [result.to_json() for result in results],
    }
    metrics: dict[str, Any] = finite_json(measured)
    out.mkdir(parents=True, exist_ok=True)
    write_report(out / "report.html", metrics, results, views, made, log)
    return metrics


def evaluate_runs(
    runs: Sequence[str | Path],
    lake: str | Path,
    out: str | Path,
    settings: Any = None,
    most: int = 16,
    shown: int = 6,
    fvd: Path | None = None,
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
        evaluate(run, lake, out / f"seed-{seed}", settings, most, shown, fvd=fvd)
        for run, seed in zip(runs, seeds, strict=True)
    ]
    kind = {"kind": made[0]["kind"]} if "kind" in made[0] else {}
    found = {"format": FORMAT, "seeds": seeds, **kind, **ranges(made)}
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
    parser.add_argument(
        "--fvd",
        metavar="FILE",
        help="i3d_torchscript.pt, or such a TorchScript network, for an FVD where a method makes frames in order",
    )
    parser.add_argument("--json", action="store_true", help="print the metrics as JSON instead of a table")
    return run_arguments


def run_arguments(options: argparse.Namespace) -> int:
    """Evaluate as the options say."""
    record = RunRecord.read(Run(Path(options.run[0])))
    settings = default_sampling(record.method(), record.clip, seed=options.seed)
    given = (options.lake, options.out, settings, options.clips, options.shown)
    fvd = None if options.fvd is None else Path(options.fvd)
    if len(options.run) == 1:
        found = evaluate(options.run[0], *given, options.step, fvd)
        lines = [*headline(found), str(Path(options.out) / "report.html")]
    else:
        if options.step is not None:
            raise ValueError(f"--step {options.step} is of one run; give one --run, or leave it out")
        found = evaluate_runs(options.run, *given, fvd)
        lines = headline_of_runs(found, len(options.run))
        lines += [str(Path(options.out) / f"seed-{seed}" / "report.html") for seed in found["seeds"]]
    print(json.dumps(found) if options.json else "\n".join(lines))
    return 0


def main(arguments_given: Sequence[str] | None = None) -> int:
    """Entry of `python -m model.evaluate`."""
    return run_program("model.evaluate", "Measure and show what a run has learned.", arguments, arguments_given)


if __name__ == "__main__":
    sys.exit(main())
