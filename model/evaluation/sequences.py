"""What a method makes that samples frames in order: how long its videos are, how far from the data, how they move.

No sample is held against its clip, frame by frame: the caption tells too little of it. What is compared is a set of
samples, one for the caption of each of some clips, with the true clips of the split; beside each figure stands the same
of as many true clips, held against the others.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.metrics.base import Metric
from model.metrics.sequences import (
    FvdNetwork,
    frame_features,
    frechet,
    roughness,
    spread_places,
    step_size,
    total_variation,
    video_features,
)
from model.sample import LoadedSampler
from model.spread import spread_evenly
from model.training.data import Clip, Clips
from model.video import Frames

TRUE = 256
"""Most true clips of a split that samples are compared with."""
PLACES = 8
"""Places of a clip, evenly from its first frame to its last, at which drift is measured."""
MOVING = 0.5
"""A sample moves where its frames differ by more than this share of the true clips' median."""

SEQUENCE_METRICS = tuple(
    Metric(name, unit, better, doc, label, per_set=True)
    for name, unit, better, doc, label in (
        ("length_mean", " frames", True, "mean number of frames of the samples", "mean length, samples"),
        ("length_true_mean", " frames", True, "the same of all clips of the split", "mean length, clips"),
        (
            "length_variation", "", False, "total variation distance between the lengths of the samples and of the "
            "split's clips: 0, the same histogram, to 1, none in common", "lengths, total variation",
        ),
        ("length_variation_floor", "", False, "the same of as many true clips", "as many true clips"),
        (
            "length_within_one", "", True, "share of the samples that are at most one frame longer or shorter than the "
            "clip whose caption they were told", "within one frame of the caption's clip, rate",
        ),
        ("full", "", False, "share of the samples that max_frames kept from growing", "stopped by max_frames, rate"),
        (
            "frechet", "", False, "Frechet distance of Gaussians fitted to codec features of samples and of true clips "
            "(8 frames of each, latents averaged to 4x4)", "codec features, Frechet distance",
        ),
        ("frechet_floor", "", False, "the same of as many true clips against the others", "as many true clips"),
        ("fvd", "", False, "the same of the features of the network given with --fvd", "FVD"),
        ("fvd_floor", "", False, "the same of as many true clips", "as many true clips"),
        (
            "drift_first", "", False, "Frechet distance of single frames of samples and of true clips, in the first "
            "quarter", "frames' distance, first quarter",
        ),
        ("drift_last", "", False, "the same in the last quarter", "last quarter"),
        ("drift_last_floor", "", False, "the same of as many true clips", "last quarter, as many true clips"),
        (
            "roughness", "", False, "second differences of a video's latents over its first differences: 0 is even "
            "motion, 1.7 noise; mean over the samples", "roughness of motion, samples",
        ),
        ("roughness_true", "", False, "the same of true clips", "clips"),
        (
            "step", "", True, "rms difference of neighbouring frames' latents, samples over true clips (medians)",
            "motion, samples over clips",
        ),
        (
            "dynamic", "", True, f"dynamic degree: share of the samples whose step is above {MOVING:g} times the true "
            "clips' median", "moving, rate",
        ),
    )
)  # fmt: skip
"""Figures of a split."""
SEQUENCE_GROUPS = {
    "length": (
        "length_mean", "length_true_mean", "length_variation", "length_variation_floor", "length_within_one", "full",
    ),
    "distance from the data": ("frechet", "frechet_floor", "fvd", "fvd_floor"),
    "drift along a video": ("drift_first", "drift_last", "drift_last_floor"),
    "motion": ("roughness", "roughness_true", "step", "dynamic"),
    "loss": ("loss_first", "loss_last"),
}  # fmt: skip
"""The headline: what its figures are about, and their names."""


@dataclass(frozen=True)
class Grown:
    """A sample beside the clip whose caption it was told."""

    clip: Clip
    latents: Tensor
    """(N, C, h, w)."""
    inserted: NDArray[np.float64]
    """(N,) the clock when each frame was inserted; NaN for given ones."""
    full: bool

    def to_json(self) -> dict[str, Any]:
        """As in metrics.json."""
        about = self.clip.about
        known = {name: about[name] for name in ("clip_id", "film", "caption", "clip_start", "split")}
        return {**known, "frames": len(self.latents), "true_frames": about["frames"], "full": self.full}


@dataclass(frozen=True)
class SplitFigures:
    """What is measured of a split."""

    figures: Mapping[str, float]
    """By the names of SEQUENCE_METRICS, those that there are."""
    lengths: tuple[int, ...]
    """Of the samples."""
    true_lengths: tuple[int, ...]
    """Of all clips of the split."""
    drift: tuple[float, ...]
    """Frechet distance of single frames at PLACES places, samples against true clips."""
    drift_floor: tuple[float, ...]
    """The same of as many true clips."""
    samples: tuple[Grown, ...]

    def to_json(self) -> dict[str, Any]:
        """As in metrics.json."""
        lists = {name: list(getattr(self, name)) for name in ("lengths", "drift", "drift_floor")}
        return {"clips": len(self.samples), **self.figures, **lists, "true_lengths": _counted(self.true_lengths)}


def measure_split(
    sampler: LoadedSampler,
    clips: Clips,
    true_lengths: Sequence[int],
    settings: Any,
    most: int,
    fvd: FvdNetwork | None = None,
) -> tuple[SplitFigures, int]:
    """The figures of a split (`Clips` of it) from `most` samples at most, and how often the network was called.

    true_lengths: frames of every clip of the split.
    """
    chosen = spread_evenly(range(len(clips)), most)
    others = [number for number in spread_evenly(range(len(clips)), TRUE + most) if number not in set(chosen)][:TRUE]
    told, calls = [clips[number] for number in chosen], 0
    samples: list[Grown] = []
    for first in range(0, len(told), 16):
        part = told[first : first + 16]
        captions = [clip.about["caption"] for clip in part]
        seeds = [settings.seed + first + k for k in range(len(part))]
        made: Any = sampler.sample(captions, None, seeds, settings)
        calls += made.network_calls
        samples += [
            Grown(clip, latents.float().cpu(), inserted.double().cpu().numpy(), full)
            for clip, latents, inserted, full in zip(part, made.clips, made.inserted, made.full, strict=True)
        ]
    own, rest = [_latents(clip) for clip in told], [_latents(clips[number]) for number in others]
    figures = _figures([grown.latents for grown in samples], own, rest)
    lengths = [len(grown.latents) for grown in samples]
    figures |= {
        "length_mean": statistics.fmean(lengths) if lengths else float("nan"),
        "length_true_mean": statistics.fmean(true_lengths) if true_lengths else float("nan"),
        "length_variation": total_variation(lengths, list(true_lengths)),
        "length_variation_floor": total_variation([len(latents) for latents in own], list(true_lengths)),
        "length_within_one": _share(abs(len(g.latents) - g.clip.about["frames"]) <= 1 for g in samples),
        "full": _share(grown.full for grown in samples),
    }
    if fvd is not None:
        figures |= _fvd(sampler, samples, told, [clips[number] for number in others], fvd)
    drift, floor = (_drift(some, rest) for some in ([grown.latents for grown in samples], own))
    for name, values in {"drift": drift, "drift_floor": floor}.items():
        ends = {"first": values[: PLACES // 4], "last": values[-PLACES // 4 :]}
        figures |= {name.replace("drift", f"drift_{end}", 1): statistics.fmean(part) for end, part in ends.items()}
    known = {metric.name for metric in SEQUENCE_METRICS}
    return (
        SplitFigures(
            {name: value for name, value in figures.items() if name in known},
            tuple(lengths),
            tuple(true_lengths),
            tuple(drift),
            tuple(floor),
            tuple(samples),
        ),
        calls,
    )


def _latents(clip: Clip) -> Tensor:
    return torch.from_numpy(clip.members["latents"].astype(np.float32))


def _figures(made: Sequence[Tensor], own: Sequence[Tensor], rest: Sequence[Tensor]) -> dict[str, float]:
    """Figures of latents alone: samples, true clips of their captions, and other true clips."""
    rows = {name: _rows(some) for name, some in (("made", made), ("own", own), ("rest", rest))}
    true = [*own, *rest]
    steps, true_steps = [step_size(each) for each in made], [step_size(each) for each in true]
    usual = _median(true_steps)
    return {
        "frechet": frechet(rows["made"], rows["rest"]),
        "frechet_floor": frechet(rows["own"], rows["rest"]),
        "roughness": _mean([roughness(each) for each in made]),
        "roughness_true": _mean([roughness(each) for each in true]),
        "step": _median(steps) / usual if usual else float("nan"),
        "dynamic": _share(step > MOVING * usual for step in steps),
    }


def _rows(videos: Sequence[Tensor]) -> Tensor:
    return torch.stack([video_features(each) for each in videos]) if videos else torch.empty(0, 0)


def _drift(videos: Sequence[Tensor], true: Sequence[Tensor]) -> list[float]:
    """Frechet distance of the frames at each of PLACES places of videos and of true ones."""
    if not videos or not true:
        return [float("nan")] * PLACES
    one, two = (
        torch.stack([frame_features(each[torch.from_numpy(spread_places(len(each), PLACES))]) for each in some])
        for some in (videos, true)
    )  # (videos, PLACES, D) each
    return [frechet(one[:, place], two[:, place]) for place in range(PLACES)]


def _fvd(
    sampler: LoadedSampler, samples: Sequence[Grown], told: Sequence[Clip], others: Sequence[Clip], fvd: FvdNetwork
) -> dict[str, float]:
    """FVD of decoded samples, and of the clips of their captions, against other true clips, decoded too."""

    def rows(parts: Sequence[tuple[Tensor, str]]) -> Tensor:
        return fvd.features([decoded_video(sampler, latents, caption) for latents, caption in parts])

    true = rows([(_latents(clip), clip.about["caption"]) for clip in others])
    return {
        "fvd": frechet(rows([(grown.latents, grown.clip.about["caption"]) for grown in samples]), true),
        "fvd_floor": frechet(rows([(_latents(clip), clip.about["caption"]) for clip in told]), true),
    }


def decoded_video(sampler: LoadedSampler, latents: Tensor, caption: str) -> Frames:
    """Latents (N, C, h, w) as frames."""
    return sampler.decoded(latents.to(sampler.device), caption)


def _counted(lengths: Sequence[int]) -> dict[str, int]:
    """How many clips have each length."""
    values, counts = np.unique(np.array(lengths, dtype=np.int64), return_counts=True)
    return {str(value): int(count) for value, count in zip(values, counts, strict=True)}


def _share(which: Any) -> float:
    values = list(which)
    return sum(map(bool, values)) / len(values) if values else float("nan")


def _mean(values: Sequence[float]) -> float:
    finite = [value for value in values if np.isfinite(value)]
    return statistics.fmean(finite) if finite else float("nan")


def _median(values: Sequence[float]) -> float:
    finite = [value for value in values if np.isfinite(value)]
    return statistics.median(finite) if finite else float("nan")
