"""What a sample of a clip is measured by: figures against the codec, the film and what needs no model."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model import legs
from model.methods.base import Sample
from model.metrics.base import Metric
from model.metrics.pictures import decibels, psnr, psnr_paper
from model.sample import Sampler
from model.training.data import Clip
from model.video import Frames, from_frames, to_frames

RATES = (8.0, 12.0, 16.0)
"""Frame rates that the report shows side by side."""
CLIP_METRICS = (
    Metric("sample_observed", " dB", True, "sample against reconstruction, mean of observed frames", "observed"),
    Metric("sample_observed_worst", " dB", True, "the same, worst observed frame", "worst"),
    Metric("sample_held_out", " dB", True, "the same, mean of the frames the coefficients never saw", "held out"),
    Metric("sample_all", " dB", True, "the same, mean of all kept frames"),
    Metric("sample_median", " dB", True, "the same, median of all kept frames"),
    Metric("sample_worst", " dB", True, "the same, worst of all kept frames"),
    Metric("mean_frame", " dB", True, "the clip's own mean frame, held, against the reconstruction"),
    Metric("first_frame", " dB", True, "the first frame, held, over all kept frames together", "first frame held"),
    Metric("real_ceiling_observed", " dB", True, "the codec alone against the film, observed frames", "ceiling"),
    Metric("real_ceiling_held_out", " dB", True, "the same, held-out frames"),
    Metric("real_projection_observed", " dB", True, "projected latents, decoded, against the film, observed frames"),
    Metric("real_projection_held_out", " dB", True, "the same, held-out frames"),
    Metric("real_linear_held_out", " dB", True, "observed latents, interpolated linearly, decoded, held-out frames"),
    Metric("real_sample_observed", " dB", True, "sample against the film, observed frames"),
    Metric("real_sample_held_out", " dB", True, "the same, held-out frames"),
    Metric("above_mean_frame", " dB", True, "sample_all less mean_frame", "over mean frame"),
    Metric("below_median", " dB", False, "sample_median less sample_worst"),
    Metric("held_out_gap", " dB", False, "sample_observed less sample_held_out"),
)
"""Figures of a clip."""
SET_METRICS = (
    Metric("median_observed", " dB", True, "median over the clips of sample_observed", per_set=True),
    Metric("worst_observed_frame", " dB", True, "worst sample_observed_worst", per_set=True),
    Metric("mean_above_mean_frame", " dB", True, "mean over the clips of above_mean_frame", per_set=True),
    Metric("least_above_mean_frame", " dB", True, "worst above_mean_frame", per_set=True),
    Metric("most_below_median", " dB", False, "worst below_median", per_set=True),
    Metric("most_held_out_gap", " dB", False, "worst held_out_gap", per_set=True),
    Metric("psnr_paper", " dB", True, "mean of sample_observed by the formula of arXiv 2502.00500", per_set=True),
)
"""Figures of a set of clips, beside the means of those of each."""
METRICS = {metric.name: metric for metric in (*CLIP_METRICS, *SET_METRICS)}
GOALS = {"observed_worst_frame": 24.0, "above_mean_frame": 3.0, "below_median": 3.0, "held_out_gap": 1.0}
"""What samples of training pairs are held to, in dB."""
GOAL_METRICS = {**{name: name for name in GOALS}, "observed_worst_frame": "sample_observed_worst"}
"""The clip's metric that a goal bounds."""


@dataclass(frozen=True)
class ClipResult:
    """A clip and its figures."""

    clip_id: str
    film: str
    caption: str
    clip_start: float
    split: str
    figures: Mapping[str, float]
    """By the names of CLIP_METRICS; NaN where there is none."""

    def goals(self) -> dict[str, bool]:
        """Which of the goals this clip meets."""
        return {goal: METRICS[name].meets(self.figures[name], GOALS[goal]) for goal, name in GOAL_METRICS.items()}

    def to_json(self) -> dict[str, Any]:
        """As in metrics.json: the figures beside the rest."""
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "figures"}
        return {**values, **self.figures}


@dataclass(frozen=True)
class Shown:
    """A clip's pictures for the report, by frame rate: what the film shows, the projection, the sample."""

    result: ClipResult
    real: dict[float, Frames]
    projected: dict[float, Frames]
    sampled: dict[float, Frames]


def measure(clip: Clip, sample: Sample, index: int, sampler: Sampler) -> ClipResult:
    """A clip's figures from its place `index` in a sample."""
    about, caption = clip.about, clip.about["caption"]
    times: NDArray[np.float64] = clip.members["frame_time"] / sampler.window
    seen = torch.from_numpy(clip.members["observed"].copy())
    latents = torch.from_numpy(clip.members["latents"].astype(np.float32))
    coefficients = torch.from_numpy(clip.members["coefficients"].astype(np.float32))

    real = from_frames(clip.members["preview"])
    reconstruction = _decoded(sampler, latents, caption)
    projection = _decoded(sampler, legs.evaluate(coefficients, times, 1.0), caption)
    linear = _decoded(sampler, _linear(latents, times, seen), caption)
    made = _decoded(sampler, sample.read(torch.from_numpy(times.clip(0, 1)))[:, index], caption)

    against_codec = psnr(made, reconstruction)
    held = reconstruction.mean(dim=0, keepdim=True).expand_as(reconstruction)
    first = reconstruction[:1].expand_as(reconstruction)

    def parts(name: str, pictures: Tensor) -> dict[str, float]:
        value = psnr(pictures, real)
        return {f"{name}_observed": _mean(value[seen]), f"{name}_held_out": _mean(value[~seen])}

    figures = {
        "sample_observed": _mean(against_codec[seen]),
        "sample_observed_worst": float(against_codec[seen].min()),
        "sample_held_out": _mean(against_codec[~seen]),
        "sample_all": _mean(against_codec),
        "sample_median": float(against_codec.median()),
        "sample_worst": float(against_codec.min()),
        "mean_frame": _mean(psnr(held, reconstruction)),
        "first_frame": float(psnr(first, reconstruction, together=True, floor=1e-12)),
        **parts("real_ceiling", reconstruction),
        **parts("real_projection", projection),
        "real_linear_held_out": parts("real_linear", linear)["real_linear_held_out"],
        **parts("real_sample", made),
    }
    figures["above_mean_frame"] = figures["sample_all"] - figures["mean_frame"]
    figures["below_median"] = figures["sample_median"] - figures["sample_worst"]
    figures["held_out_gap"] = figures["sample_observed"] - figures["sample_held_out"]
    return ClipResult(clip.clip_id, about["film"], caption, about["clip_start"], about["split"], figures)


def show(clip: Clip, sample: Sample, index: int, sampler: Sampler, result: ClipResult) -> Shown:
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
        read = sample.read(torch.from_numpy(flow_times))[:, index]
        sampled[rate] = to_frames(_decoded(sampler, read, caption))
    return Shown(result, real, projected, sampled)


def summarise(results: Sequence[ClipResult], side: int) -> dict[str, Any]:
    """Figures over clips, whose frames are `side` pixels high: means, the worst, and how many clips meet each goal."""
    if not results:
        return {"clips": 0}
    values = {metric.name: [result.figures[metric.name] for result in results] for metric in CLIP_METRICS}
    means = {name: _fmean(of_clips) for name, of_clips in values.items()}
    worst = {name: METRICS[name].worst(values[name]) for name in GOAL_METRICS.values()}
    return {
        "clips": len(results),
        "mean": means,
        "median_observed": statistics.median(values["sample_observed"]),
        "worst_observed_frame": worst["sample_observed_worst"],
        "mean_above_mean_frame": means["above_mean_frame"],
        "least_above_mean_frame": worst["above_mean_frame"],
        "most_below_median": worst["below_median"],
        "most_held_out_gap": worst["held_out_gap"],
        "clips_meeting": {goal: sum(result.goals()[goal] for result in results) for goal in GOALS},
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


def _decoded(sampler: Sampler, latents: Tensor, caption: str) -> Tensor:
    """Pictures on the CPU, wherever the latents and the codec are."""
    return sampler.codec.decode(latents.to(sampler.device), text=caption).cpu()


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
