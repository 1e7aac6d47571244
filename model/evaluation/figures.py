"""What a sample of a clip is measured by: figures against the film, the codec and what needs no model."""

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
from model.metrics.pictures import psnr, psnr_paper, ssim
from model.sample import Sampler
from model.training.data import Clip
from model.video import Frames, from_frames, to_frames

EXACT = 4e-10
"""Mean squared error that counts for all below it, 100 dB, where a clip may be met exactly."""
RATES = (8.0, 12.0, 16.0)
"""Frame rates that the report shows side by side."""
CLIP_METRICS = (
    Metric("film_sample", " dB", True, "sample against the film's own frames", "sample"),
    Metric("film_ceiling", " dB", True, "the codec alone, decode(encode(film)), against the film", "codec (ceiling)"),
    Metric(
        "film_lookup", " dB", True, "the clip's stored coefficients, decoded, against the film", "look-up, no network"
    ),
    Metric(
        "film_mean_frame",
        " dB",
        True,
        "the mean frame of the codec's reconstruction, held, against the film",
        "mean frame, held",
    ),
    Metric("film_first_frame", " dB", True, "its first frame, held, against the film", "first frame, held"),
    Metric("film_sample_ssim", "", True, "structural similarity of the sample to the film, 1 at most", "sample, SSIM"),
    Metric("film_ceiling_ssim", "", True, "the same of the codec alone", "codec (ceiling), SSIM"),
    Metric("film_sample_held_out", " dB", True, "sample, frames that the coefficients never saw", "sample, held-out"),
    Metric("film_ceiling_held_out", " dB", True, "codec, the same frames", "ceiling, held-out"),
    Metric("film_lookup_held_out", " dB", True, "look-up, the same frames", "look-up, held-out"),
    Metric("recall", " dB", True, "sample against the codec's reconstruction", "sample"),
    Metric("recall_lookup", " dB", True, "the stored coefficients, decoded, against it", "look-up, no network"),
    Metric(
        "recall_mean_frame", " dB", True, "the reconstruction's own mean frame, held, against it", "mean frame, held"
    ),
    Metric("recall_first_frame", " dB", True, "its first frame, held; over all frames together", "first frame, held"),
    Metric("recall_observed", " dB", True, "recall, mean of observed frames", "observed"),
    Metric("recall_observed_worst", " dB", True, "recall, worst observed frame", "worst"),
    Metric("recall_held_out", " dB", True, "recall, mean of held-out frames", "held out"),
    Metric("recall_median", " dB", True, "recall, median of all kept frames"),
    Metric("recall_worst", " dB", True, "recall, worst of all kept frames"),
    Metric("above_mean_frame", " dB", True, "recall less recall_mean_frame", "over mean frame"),
    Metric("below_median", " dB", False, "recall_median less recall_worst"),
    Metric("held_out_gap", " dB", False, "recall_observed less recall_held_out"),
    Metric(
        "between_grid",
        "",
        False,
        "rms latent error, against the stored coefficients' curve, half-way between the solver's grid points over that "
        "at them",
        "error between grid points / at them",
    ),
)
"""Figures of a clip; dB is PSNR, the mean over the kept frames where nothing else is said."""
RECALL_METRICS = (
    Metric("median_observed", " dB", True, "median over the clips of recall_observed", per_set=True),
    Metric("worst_observed_frame", " dB", True, "worst recall_observed_worst", per_set=True),
    Metric("least_above_mean_frame", " dB", True, "worst above_mean_frame", per_set=True),
    Metric("most_below_median", " dB", False, "worst below_median", per_set=True),
    Metric("most_held_out_gap", " dB", False, "worst held_out_gap", per_set=True),
    Metric("psnr_paper", " dB", True, "mean of recall_observed by the formula of arXiv 2502.00500", per_set=True),
)
"""Figures of a set of clips, beside the means of those of each."""
GOALS = {"observed_worst_frame": 24.0, "above_mean_frame": 3.0, "below_median": 3.0, "held_out_gap": 1.0}
"""What samples of training pairs are held to, in dB."""
GOAL_METRICS = {**{name: name for name in GOALS}, "observed_worst_frame": "recall_observed_worst"}
"""The clip's metric that a goal bounds."""
_BY_NAME = {metric.name: metric for metric in CLIP_METRICS}


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
        return {goal: _BY_NAME[name].meets(self.figures[name], GOALS[goal]) for goal, name in GOAL_METRICS.items()}

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


def measure(clip: Clip, sample: Sample, index: int, sampler: Sampler, steps: int) -> ClipResult:
    """A clip's figures from its place `index` in a sample that was integrated in `steps` steps on the clip."""
    about, caption = clip.about, clip.about["caption"]
    times: NDArray[np.float64] = clip.members["frame_time"] / sampler.window
    seen = torch.from_numpy(clip.members["observed"].copy())
    latents = torch.from_numpy(clip.members["latents"].astype(np.float32))
    coefficients = torch.from_numpy(clip.members["coefficients"].astype(np.float32))

    real = from_frames(clip.members["preview"])
    reconstruction = decoded(sampler, latents, caption)
    lookup = decoded(sampler, legs.evaluate(coefficients, times, 1.0), caption)
    made = decoded(sampler, sample.read(torch.from_numpy(times.clip(0, 1)))[:, index], caption)

    against_codec = psnr(made, reconstruction)
    held = reconstruction.mean(dim=0, keepdim=True).expand_as(reconstruction)
    first = reconstruction[:1].expand_as(reconstruction)
    pictures = {"sample": made, "ceiling": reconstruction, "lookup": lookup, "mean_frame": held, "first_frame": first}
    against_film = {name: psnr(shown, real) for name, shown in pictures.items()}
    figures = {
        **{f"film_{name}": _mean(values) for name, values in against_film.items()},
        **{f"film_{name}_ssim": _mean(ssim(pictures[name], real)) for name in ("sample", "ceiling")},
        **{f"film_{name}_held_out": _mean(against_film[name][~seen]) for name in ("sample", "ceiling", "lookup")},
        "recall": _mean(against_codec),
        "recall_lookup": _mean(psnr(lookup, reconstruction, floor=EXACT)),
        "recall_mean_frame": _mean(psnr(held, reconstruction, floor=EXACT)),
        "recall_first_frame": float(psnr(first, reconstruction, together=True, floor=1e-12)),
        "recall_observed": _mean(against_codec[seen]),
        "recall_observed_worst": float(against_codec[seen].min()),
        "recall_held_out": _mean(against_codec[~seen]),
        "recall_median": float(against_codec.median()),
        "recall_worst": float(against_codec.min()),
        "between_grid": between_grid(sample, index, coefficients, steps),
    }
    figures["above_mean_frame"] = figures["recall"] - figures["recall_mean_frame"]
    figures["below_median"] = figures["recall_median"] - figures["recall_worst"]
    figures["held_out_gap"] = figures["recall_observed"] - figures["recall_held_out"]
    return ClipResult(clip.clip_id, about["film"], caption, about["clip_start"], about["split"], figures)


def show(clip: Clip, sample: Sample, index: int, sampler: Sampler, result: ClipResult) -> Shown:
    """A clip's pictures at each of the report's frame rates; the film's own are the nearest frames that were kept."""
    caption = clip.about["caption"]
    kept: NDArray[np.float64] = clip.members["frame_time"]
    coefficients = torch.from_numpy(clip.members["coefficients"].astype(np.float32))
    # Rates share times: each is decoded once.
    of_rate = {rate: np.arange(math.floor(sampler.window * rate + 1e-6)) / rate for rate in RATES}
    times = np.unique(np.concatenate(list(of_rate.values())))
    flow_times = times / sampler.window
    lookup = to_frames(decoded(sampler, legs.evaluate(coefficients, flow_times, 1.0), caption))
    made = to_frames(decoded(sampler, sample.read(torch.from_numpy(flow_times))[:, index], caption))
    real, projected, sampled = {}, {}, {}
    for rate, seconds in of_rate.items():
        real[rate] = clip.members["preview"][np.abs(kept[None] - seconds[:, None]).argmin(axis=1)]
        places = np.searchsorted(times, seconds)
        projected[rate], sampled[rate] = lookup[places], made[places]
    return Shown(result, real, projected, sampled)


def summarise(results: Sequence[ClipResult], side: int) -> dict[str, Any]:
    """Figures over clips, whose frames are `side` pixels high: means, the worst, and how many clips meet each goal."""
    if not results:
        return {"clips": 0}
    values = {metric.name: [result.figures[metric.name] for result in results] for metric in CLIP_METRICS}
    means = {name: _fmean(of_clips) for name, of_clips in values.items()}
    worst = {name: _BY_NAME[name].worst(values[name]) for name in GOAL_METRICS.values()}
    return {
        "clips": len(results),
        "mean": means,
        "median_observed": statistics.median(values["recall_observed"]),
        "worst_observed_frame": worst["recall_observed_worst"],
        "least_above_mean_frame": worst["above_mean_frame"],
        "most_below_median": worst["below_median"],
        "most_held_out_gap": worst["held_out_gap"],
        "clips_meeting": {goal: sum(result.goals()[goal] for result in results) for goal in GOALS},
        "psnr_paper": psnr_paper(means["recall_observed"], side),
    }


def between_grid(sample: Sample, index: int, coefficients: Tensor, steps: int) -> float:
    """RMS latent error half-way between the solver's grid points k / steps, over the same at the grid points.

    The error is against the curve of `coefficients` (order, C, h, w), over all points and latents. About 1: frames
    may be read at any time. NaN where the sample is exact at the grid points.
    """
    grid = torch.linspace(0, 1, steps + 1, dtype=torch.float64)

    def error(times: Tensor) -> float:
        found = sample.read(times)[:, index].cpu()
        return float((found - legs.evaluate(coefficients, times.numpy(), 1.0)).square().mean().sqrt())

    on_grid = error(grid)
    return error((grid[:-1] + grid[1:]) / 2) / on_grid if on_grid > 0 else math.nan


def decoded(sampler: Sampler, latents: Tensor, caption: str) -> Tensor:
    """Pictures on the CPU, wherever the latents and the codec are."""
    return sampler.codec.decode(latents.to(sampler.device), text=caption).cpu()


def _mean(values: Tensor) -> float:
    return float(values.mean()) if values.numel() else math.nan


def _fmean(values: Sequence[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return statistics.fmean(finite) if finite else math.nan
