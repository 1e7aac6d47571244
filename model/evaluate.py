"""Evaluation: what a run reproduces of the clips it learned, measured and shown. Needs the shards, no film."""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model import legs
from model.flow.solver import Trajectory
from model.metrics.pictures import decibels, psnr, psnr_paper
from model.program import run_program
from model.progress import Progress
from model.sample import Sampler, SampleSettings
from model.training.data import Clip, Clips, lake_and_version
from model.video import Frames, from_frames, to_frames
from storage.fingerprint import fingerprint, finite_json
from storage.layout import write_atomic
from storage.version import read_manifest

RATES = (8.0, 12.0, 16.0)
"""Frame rates that the report shows side by side."""
FORMAT = 3
"""Raise when figures or page change, so that reports of an older program are made anew."""
GOALS = {"observed_worst_frame": 24.0, "above_mean_frame": 3.0, "below_median": 3.0, "held_out_gap": 1.0}
"""What samples of training pairs are held to, in dB."""


@dataclass(frozen=True)
class ClipResult:
    """A clip's figures, all in dB. `sample_*` compare with the codec's reconstruction, `real_*` with the film."""

    clip_id: str
    film: str
    caption: str
    clip_start: float
    split: str
    sample_observed: float
    """Mean over the observed frames."""
    sample_observed_worst: float
    """The worst observed frame."""
    sample_held_out: float
    """Mean over the frames the coefficients never saw."""
    sample_all: float
    """Mean over all kept frames."""
    sample_median: float
    """Median over all kept frames."""
    sample_worst: float
    """The worst of all kept frames."""
    mean_frame: float
    """The clip's own mean frame, held: mean over all kept frames."""
    first_frame: float
    """The first frame, held: over all kept frames together."""
    real_ceiling_observed: float
    """The codec alone, observed frames."""
    real_ceiling_held_out: float
    real_projection_observed: float
    """The projection of the latents, decoded: model-free."""
    real_projection_held_out: float
    real_linear_held_out: float
    """Linear interpolation between the observed latents, decoded."""
    real_sample_observed: float
    real_sample_held_out: float

    def goals(self) -> dict[str, bool]:
        """Which of the goals this clip meets."""
        return {
            "observed_worst_frame": self.sample_observed_worst >= GOALS["observed_worst_frame"],
            "above_mean_frame": self.sample_all - self.mean_frame >= GOALS["above_mean_frame"],
            "below_median": self.sample_median - self.sample_worst <= GOALS["below_median"],
            "held_out_gap": not self.sample_observed - self.sample_held_out > GOALS["held_out_gap"],
        }


@dataclass(frozen=True)
class Shown:
    """A clip's pictures for the report, by frame rate: what the film shows, the projection, the sample."""

    result: ClipResult
    real: dict[float, Frames]
    projected: dict[float, Frames]
    sampled: dict[float, Frames]


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
            says the mend.
    """
    from model.evaluation.report import certificates, write_report

    if most < 1 or shown < 0:
        raise ValueError(f"{most} clips, {shown} of them shown, cannot be; --clips must be at least 1, --shown 0")
    settings = settings or SampleSettings()
    out = Path(out)
    sampler = Sampler(run, step)
    asked = {"step": sampler.step, "settings": asdict(settings), "most": most, "shown": shown}
    made_of = fingerprint({"format": FORMAT, "run": sampler.about, **asked})
    if (before := _made_before(out, made_of)) is not None:
        return before

    opened, version = lake_and_version(lake, sampler.about["version"]["number"])
    if version.merkle_root != sampler.about["version"]["merkle_root"]:
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
        trajectory = sampler.trajectory(
            [clip.about["caption"] for clip in part],
            [clip.about["clip_start"] for clip in part],
            [settings.seed + first + index for index in range(len(part))],
            settings,
        )
        for index, clip in enumerate(part):
            result = measure(clip, trajectory, index, sampler)
            results.append(result)
            if clip.clip_id in pictures:
                views.append(show(clip, trajectory, index, sampler, result))
            progress.advance(note=f"{result.sample_all:.1f} dB")
        calls = trajectory.network_calls
    side = sampler.clip["frame_shape"][0]
    measured = {
        "made_of": made_of,
        "step": sampler.step,
        "settings": asdict(settings),
        "network_calls_per_window": calls,
        "run": sampler.about,
        "counts": version.counts,
        "certificates": certificates(read_manifest(opened, version).to_pylist()),
        "summary": summarise([r for r in results if r.split == "train"], side),
        "unseen": summarise([r for r in results if r.split != "train"], side),
        "goals": GOALS,
        "clips": [asdict(result) for result in results],
    }
    metrics: dict[str, Any] = finite_json(measured)
    out.mkdir(parents=True, exist_ok=True)
    write_report(out / "report.html", metrics, results, views, read_log(sampler.run.log))
    # Written last: its presence says that the report is whole.
    write_atomic(out / "metrics.json", json.dumps(metrics, indent=1).encode())
    return metrics


def measure(clip: Clip, trajectory: Trajectory, index: int, sampler: Sampler) -> ClipResult:
    """A clip's figures from its place `index` in a trajectory."""
    about, caption = clip.about, clip.about["caption"]
    times: NDArray[np.float64] = clip.members["frame_time"] / sampler.window
    seen = torch.from_numpy(clip.members["observed"].copy())
    latents = torch.from_numpy(clip.members["latents"].astype(np.float32))
    coefficients = torch.from_numpy(clip.members["coefficients"].astype(np.float32))

    real = from_frames(clip.members["preview"])
    reconstruction = _decoded(sampler, latents, caption)
    projection = _decoded(sampler, legs.evaluate(coefficients, times, 1.0), caption)
    linear = _decoded(sampler, _linear(latents, times, seen), caption)
    read = trajectory.read(torch.from_numpy(times.clip(0, 1)), sampler.readout)[:, index]
    sample = _decoded(sampler, read, caption)

    against_codec = psnr(sample, reconstruction)
    held = reconstruction.mean(dim=0, keepdim=True).expand_as(reconstruction)
    mean_frame = psnr(held, reconstruction)
    still = 10 * math.log10(4 / max((reconstruction - reconstruction[:1]).square().mean().item(), 1e-12))

    def parts(pictures: Tensor) -> tuple[float, float]:
        value = psnr(pictures, real)
        return _mean(value[seen]), _mean(value[~seen])

    ceiling, projected, sampled = parts(reconstruction), parts(projection), parts(sample)
    return ClipResult(
        clip_id=clip.clip_id,
        film=about["film"],
        caption=caption,
        clip_start=about["clip_start"],
        split=about["split"],
        sample_observed=_mean(against_codec[seen]),
        sample_observed_worst=float(against_codec[seen].min()),
        sample_held_out=_mean(against_codec[~seen]),
        sample_all=_mean(against_codec),
        sample_median=float(against_codec.median()),
        sample_worst=float(against_codec.min()),
        mean_frame=_mean(mean_frame),
        first_frame=still,
        real_ceiling_observed=ceiling[0],
        real_ceiling_held_out=ceiling[1],
        real_projection_observed=projected[0],
        real_projection_held_out=projected[1],
        real_linear_held_out=parts(linear)[1],
        real_sample_observed=sampled[0],
        real_sample_held_out=sampled[1],
    )


def show(clip: Clip, trajectory: Trajectory, index: int, sampler: Sampler, result: ClipResult) -> Shown:
    """A clip's pictures at each of the report's frame rates; the film's own are the nearest frames that were kept."""
    caption = clip.about["caption"]
    kept: NDArray[np.float64] = clip.members["frame_time"]
    coefficients = torch.from_numpy(clip.members["coefficients"].astype(np.float32))
    real, projected, sampled = {}, {}, {}
    for rate in RATES:
        times = np.arange(math.floor(sampler.window * rate + 1e-6)) / rate
        nearest = np.abs(kept[None] - times[:, None]).argmin(axis=1)
        real[rate] = clip.members["preview"][nearest]
        flow_times = times / sampler.window
        projected[rate] = to_frames(_decoded(sampler, legs.evaluate(coefficients, flow_times, 1.0), caption))
        read = trajectory.read(torch.from_numpy(flow_times), sampler.readout)[:, index]
        sampled[rate] = to_frames(_decoded(sampler, read, caption))
    return Shown(result, real, projected, sampled)


def summarise(results: Sequence[ClipResult], side: int) -> dict[str, Any]:
    """Figures over clips, whose frames are `side` pixels high: means, the worst, and how many clips meet each goal."""
    if not results:
        return {"clips": 0}
    numbers = [key for key, value in asdict(results[0]).items() if isinstance(value, float) and key != "clip_start"]
    means = {key: _fmean([getattr(r, key) for r in results]) for key in numbers}
    return {
        "clips": len(results),
        "mean": means,
        "median_observed": statistics.median(r.sample_observed for r in results),
        "worst_observed_frame": min(r.sample_observed_worst for r in results),
        "mean_above_mean_frame": _fmean([r.sample_all - r.mean_frame for r in results]),
        "least_above_mean_frame": min(r.sample_all - r.mean_frame for r in results),
        "most_below_median": max(r.sample_median - r.sample_worst for r in results),
        "most_held_out_gap": max(
            (r.sample_observed - r.sample_held_out for r in results if math.isfinite(r.sample_held_out)), default=0.0
        ),
        "clips_meeting": {goal: sum(r.goals()[goal] for r in results) for goal in GOALS},
        "psnr_paper": psnr_paper(means["sample_observed"], side),
    }


def headline(metrics: dict[str, Any]) -> list[str]:
    """Five lines that say how a run did."""
    summary, goals, seed = metrics["summary"], metrics["goals"], metrics["settings"]["seed"]
    mean, count, meeting = summary["mean"], summary["clips"], summary["clips_meeting"]
    rows = {
        "clips sampled": f"{count} training pairs (caption, clip_start), seed {seed}",
        "observed times": f"{decibels(mean['sample_observed'])} dB mean, "
        f"worst frame {decibels(summary['worst_observed_frame'])} dB; "
        f"{meeting['observed_worst_frame']}/{count} clips at {goals['observed_worst_frame']:.0f} dB or more everywhere",
        "held-out times": f"{decibels(mean['sample_held_out'])} dB mean, at most "
        f"{decibels(summary['most_held_out_gap'], 2)} dB below the observed ones",
        "over the mean frame": f"{decibels(summary['mean_above_mean_frame'])} dB mean, "
        f"{decibels(summary['least_above_mean_frame'])} dB at the least",
        "against the film": f"{decibels(mean['real_sample_observed'])} dB; "
        f"the codec alone {decibels(mean['real_ceiling_observed'])} dB",
    }
    return [f"{name:<20} {text}" for name, text in rows.items()]


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a training log; a torn last line is left out."""
    lines = []
    for text in path.read_text().splitlines() if path.is_file() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return lines


def _decoded(sampler: Sampler, latents: Tensor, caption: str) -> Tensor:
    """Pictures on the CPU, wherever the latents and the codec are."""
    return sampler.codec.decode(latents.to(sampler.device), text=caption).cpu()


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


def _linear(latents: Tensor, times: NDArray[np.float64], seen: Tensor) -> Tensor:
    """The observed latents, linearly interpolated at all times; the ends hold."""
    known = np.flatnonzero(seen.numpy())
    place = np.interp(times, times[known], np.arange(len(known), dtype=float))
    before = np.floor(place).astype(int).clip(0, len(known) - 1)
    after = (before + 1).clip(max=len(known) - 1)
    share = torch.from_numpy(place - before).float().view(-1, 1, 1, 1)
    return latents[known[before]] * (1 - share) + latents[known[after]] * share


def _mean(values: Tensor) -> float:
    return float(values.mean()) if values.numel() else math.nan


def _fmean(values: Sequence[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return statistics.fmean(finite) if finite else math.nan


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
