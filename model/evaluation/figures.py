"""What a sample of a clip is measured by: figures against the codec, the film and what needs no model."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model import legs
from model.methods.base import Sample
from model.metrics.pictures import decibels, psnr, psnr_paper
from model.sample import Sampler
from model.training.data import Clip
from model.video import Frames, from_frames, to_frames

RATES = (8.0, 12.0, 16.0)
"""Frame rates that the report shows side by side."""
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
    mean_frame = psnr(held, reconstruction)
    still = 10 * math.log10(4 / max((reconstruction - reconstruction[:1]).square().mean().item(), 1e-12))

    def parts(pictures: Tensor) -> tuple[float, float]:
        value = psnr(pictures, real)
        return _mean(value[seen]), _mean(value[~seen])

    ceiling, projected, sampled = parts(reconstruction), parts(projection), parts(made)
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
