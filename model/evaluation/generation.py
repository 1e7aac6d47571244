"""What a model makes that no clip tells it: seeds of one caption, another film's picture, a long video, new captions.

Samples are told a caption and no `clip_start`. Distances of latents are those of model/metrics/paths.py, in units of
`Catalogue.spread`: 1 is as far as two training clips drawn at random.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations, pairwise

import numpy as np
import torch
from torch import Tensor

from model import legs
from model.evaluation.catalogue import Catalogue
from model.evaluation.figures import decoded
from model.methods.base import Sample, SampleSettings
from model.metrics.base import Metric
from model.metrics.paths import mean_pairwise, path_rows, quadrature
from model.metrics.pictures import pooled_psnr, psnr
from model.sample import Sampler
from model.spread import spread_evenly
from model.training.data import Clip
from model.video import Frames, from_frames, to_frames

CAPTIONS, SEEDS = 8, 4
"""Captions of a split, and samples of each."""
LONG, WINDOWS = 2, 3
"""Long videos of a split, and windows of each."""
LATER = 0.5
"""Flow time from which a sample is compared when it was given its first frame."""
COPY = 0.5
"""A sample is a copy where it is nearer to a training clip than this share of true clips' median distance."""
PICTURE_TIMES = (0.0, 0.5, 1.0)
"""Flow times at which seeds are compared as pictures."""
SHOWN_RATE = 8.0
"""Frames per second of the report's pictures."""

GENERATION_METRICS = tuple(
    Metric(name, unit, better, doc, label, per_set=True)
    for name, unit, better, doc, label in (
        (
            "seed_psnr", " dB", False, "PSNR of a caption's samples of two seeds to each other, over all pictures "
            "together; 100 is the most and says that the seed changes nothing", "between seeds",
        ),
        ("data_psnr", " dB", False, "the same of two clips that share a caption, decoded", "between a caption's clips"),
        (
            "seed_distance", "", True, "mean latent distance of a caption's samples of two seeds; 1 is as far as two "
            "training clips drawn at random", "distance of seeds",
        ),
        (
            "seed_diversity", "", True, "mean latent distance of a caption's samples over the same of the clips that "
            "share the caption; 0: the seed changes nothing, 1: as wide as the data", "diversity / the data's",
        ),
        (
            "image_first_frame", " dB", True, "another clip's picture given with a caption: the sample's first frame "
            "against the picture", "first frame against the picture",
        ),
        ("image_ceiling", " dB", True, "the picture through the codec against itself", "the same, codec (ceiling)"),
        (
            "image_over_caption", "", True, "share of these samples whose second half is nearer to the picture's clip "
            "than to the caption's", "picture rather than caption, rate",
        ),
        (
            "image_alone", "", True, "picture given with the empty caption: share of samples whose second half has a "
            "clip of the picture's film as the nearest of all clips", "picture's film nearest, no caption, rate",
        ),
        (
            "seam", "", False, f"long video of {WINDOWS} windows: rms difference of the frames across a seam over the "
            "video's median difference of neighbours", "difference at a seam / at its neighbours",
        ),
        ("third_window", " dB", True, "its third window against the film", "third window against the film"),
        ("third_hold", " dB", True, "the second clip's last frame, held, against it", "second window's end, held"),
        (
            "third_velocity", " dB", True, "the second clip's last two latents, extrapolated, against it",
            "second window's end, constant velocity",
        ),
        (
            "nearest_sample", "", True, "median over captions and seeds of a sample's latent distance to the nearest "
            "training clip; a copy is near 0, a new film about as far as true clips are",
            "sample to the nearest training clip",
        ),
        (
            "nearest_true", "", True, "the same of the true clips of these captions, clips of the same film left out",
            "true clip to the nearest training clip",
        ),
        (
            "copies", "", False, f"share of the samples that are nearer to a training clip than {COPY:g} times that",
            "copies, rate",
        ),
    )
)  # fmt: skip
"""Figures of a split's captions."""


@dataclass(frozen=True)
class View:
    """A caption's pictures for the report, (frames, H, W, 3) each, by what they show."""

    caption: str
    pictures: Mapping[str, Frames]


@dataclass(frozen=True)
class Made:
    """Figures by the names of GENERATION_METRICS, those that there are, and pictures."""

    figures: Mapping[str, float] = field(default_factory=dict)
    seeds: Sequence[View] = ()
    images: Sequence[View] = ()


def generate(
    sampler: Sampler, catalogue: Catalogue, clips: Sequence[Clip], settings: SampleSettings, shown: int = 1
) -> Made:
    """The figures of a split, from some of its clips that kept their frames; `shown` views of each kind."""
    chosen = one_of_each_caption(clips, catalogue)
    if not chosen:
        return Made()
    seeds = seed_figures(sampler, catalogue, chosen, settings, shown)
    images = image_figures(sampler, catalogue, chosen, settings, shown)
    figures = {**seeds.figures, **images.figures, **long_figures(sampler, catalogue, chosen, settings)}
    return Made(figures, seeds.seeds, images.images)


def one_of_each_caption(clips: Sequence[Clip], catalogue: Catalogue) -> list[Clip]:
    """At most CAPTIONS clips of different captions, evenly spread; captions that several clips share come first."""
    firsts = list({clip.about["caption"]: clip for clip in reversed(clips)}.values())[::-1]
    shared = [clip for clip in firsts if catalogue.all_with("caption", clip.about["caption"]).sum() > 1]
    alone = [clip for clip in firsts if clip not in shared]
    chosen = spread_evenly(shared, CAPTIONS)
    return chosen + spread_evenly(alone, CAPTIONS - len(chosen))


def seed_figures(
    sampler: Sampler, catalogue: Catalogue, clips: Sequence[Clip], settings: SampleSettings, shown: int = 0
) -> Made:
    """Diversity over seeds and distance to the training clips, of SEEDS samples of each clip's caption."""
    captions = [clip.about["caption"] for clip in clips]
    prompts = [caption for caption in captions for _ in range(SEEDS)]
    seeds = [settings.seed + seed for _ in captions for seed in range(SEEDS)]
    sample = sampler.sample(prompts, None, seeds, settings)
    rows = sample_rows(sample, catalogue.order)
    pictures = [decoded(sampler, sample.read(PICTURE_TIMES)[:, k], prompts[k]) for k in range(len(prompts))]

    apart, apart_shared, apart_data = [], [], []
    pairs: list[tuple[Tensor, Tensor]] = []
    data_pairs: list[tuple[Tensor, Tensor]] = []
    for number, caption in enumerate(captions):
        own = slice(number * SEEDS, (number + 1) * SEEDS)
        apart.append(mean_pairwise(rows[own]))
        pairs += combinations(pictures[own], 2)
        same = np.flatnonzero(catalogue.all_with("caption", caption))
        if len(same) > 1:
            apart_shared.append(apart[-1])
            apart_data.append(mean_pairwise(catalogue.curves(same)))
            curves = torch.from_numpy(catalogue.coefficients[same[:SEEDS]].astype(np.float32))
            some = [decoded(sampler, legs.evaluate(curve, PICTURE_TIMES, 1.0), caption) for curve in curves]
            data_pairs += combinations(some, 2)

    near = catalogue.distances(rows)[:, catalogue.training].min(axis=1)
    true = [distance for clip in clips if math.isfinite(distance := _nearest_true(catalogue, clip))]
    median = statistics.median(true) if true else math.nan
    figures = {
        "seed_psnr": _together(pairs),
        "data_psnr": _together(data_pairs),
        "seed_distance": statistics.fmean(apart) / catalogue.spread,
        "seed_diversity": sum(apart_shared) / total if (total := sum(apart_data)) > 0 else math.nan,
        "nearest_sample": float(np.median(near)) / catalogue.spread,
        "nearest_true": median / catalogue.spread,
        "copies": float((near < COPY * median).mean()) if true else math.nan,
    }
    times = _shown_times(sampler)
    views = []
    for clip in clips[:shown]:
        first = captions.index(clip.about["caption"]) * SEEDS
        made = {
            f"seed {seeds[k]}": to_frames(decoded(sampler, sample.read(times)[:, k], prompts[k]))
            for k in range(first, first + SEEDS)
        }
        views.append(View(clip.about["caption"], {"film": _film(clip, times * sampler.window), **made}))
    return Made(figures, seeds=views)


def image_figures(
    sampler: Sampler, catalogue: Catalogue, clips: Sequence[Clip], settings: SampleSettings, shown: int = 0
) -> Made:
    """Whether a first frame is followed: each clip's with the next clip's caption, and with the empty one."""
    if len(clips) < 2 or not sampler.method.takes_first_frame:
        return Made()
    count = len(clips)
    others = [*clips[1:], clips[0]]
    prompts = [clip.about["caption"] for clip in others] + [""] * count
    images = [from_frames(clip.members["preview"][:1]) for clip in clips] * 2
    # A codec that inverts does so with the caption it will decode with.
    given = [sampler.codec.encode(i.to(sampler.device), text=p).latents for i, p in zip(images, prompts, strict=True)]
    seeds = [settings.seed] * len(prompts)
    sample = sampler.sample(prompts, None, seeds, settings, torch.cat(given))
    starts = sample.read([0.0])[0]
    first, ceiling = [], []
    for k in range(count):
        first.append(float(psnr(decoded(sampler, starts[k : k + 1], prompts[k]), images[k])))
        ceiling.append(float(psnr(decoded(sampler, given[k], prompts[k]), images[k])))

    far = catalogue.distances(sample_rows(sample, catalogue.order, LATER), LATER)
    own = [_number(catalogue, clip) for clip in clips]
    told = [_number(catalogue, clip) for clip in others]
    nearest_film = [catalogue.about[int(k)]["film"] for k in far[count:].argmin(axis=1)]
    figures = {
        "image_first_frame": statistics.fmean(first),
        "image_ceiling": statistics.fmean(ceiling),
        "image_over_caption": statistics.fmean(float(far[k, own[k]] < far[k, told[k]]) for k in range(count)),
        "image_alone": statistics.fmean(
            float(film == clip.about["film"]) for film, clip in zip(nearest_film, clips, strict=True)
        ),
    }
    times = _shown_times(sampler)
    views = []
    for k, clip in enumerate(clips[:shown]):
        made = {
            name: to_frames(decoded(sampler, sample.read(times)[:, place], prompts[place]))
            for name, place in (("with the caption", k), ("with no caption", count + k))
        }
        views.append(View(prompts[k], {"the picture's film": _film(clip, times * sampler.window), **made}))
    return Made(figures, images=views)


def long_figures(
    sampler: Sampler, catalogue: Catalogue, clips: Sequence[Clip], settings: SampleSettings
) -> dict[str, float]:
    """Videos of WINDOWS windows from a clip's caption and first frame: their seams, and their last window against the
    film where the film's clips reach so far.

    Films that reach so far are taken first. The baselines know the film up to the end of the second window.
    """
    rate, window = float(sampler.clip["rate"]), sampler.window
    followed = {clip.clip_id: _following(catalogue, clip, window) for clip in clips}
    chosen = sorted(clips, key=lambda clip: followed[clip.clip_id] is None)[:LONG]
    seams: list[float] = []
    against: dict[str, list[float]] = {"third_window": [], "third_hold": [], "third_velocity": []}
    for clip in chosen:
        caption = clip.about["caption"]
        image = from_frames(clip.members["preview"][:1])[0] if sampler.method.takes_first_frame else None
        video = sampler.videos([caption], rate, WINDOWS * window, settings, image=image)[0]
        seams += seam_ratios(video, rate, window)
        following = followed[clip.clip_id]
        if following is None:
            continue
        second, third = following
        times = third.members["frame_time"]
        places = np.round((times + (WINDOWS - 1) * window) * rate).astype(int)
        # Frames of the film that lie between the video's are left out.
        fits = (places < len(video)) & (np.abs(places / rate - times - (WINDOWS - 1) * window) < 0.25 / rate)
        if not fits.any():
            continue
        film, at = from_frames(third.members["preview"][fits]), times[fits]
        latents = torch.from_numpy(second.members["latents"].astype(np.float32))
        known = second.members["frame_time"]
        held = latents[-1:].expand(len(at), *latents.shape[1:])
        slope = (latents[-1] - latents[-2]) / (known[-1] - known[-2]) if len(known) > 1 else torch.zeros_like(held[0])
        since = torch.from_numpy(at + window - known[-1]).float().view(-1, 1, 1, 1)
        made = {
            "third_window": from_frames(video[places[fits]]),
            "third_hold": decoded(sampler, held, caption),
            "third_velocity": decoded(sampler, latents[-1:] + since * slope, caption),
        }
        for name, pictures in made.items():
            against[name].append(float(psnr(pictures, film).mean()))
    figures = {"seam": seams, **against}
    return {name: statistics.fmean(values) if values else math.nan for name, values in figures.items()}


def seam_ratios(video: Frames, rate: float, window: float) -> list[float]:
    """RMS difference of the frames across each seam over the median of that of the other neighbours.

    video: (frames, H, W, 3) at `rate` frames per second, of windows of `window` seconds. Empty where nothing moves
    between the seams, or where there is no seam.
    """
    steps = [math.sqrt(float(np.square(after.astype(np.float64) - before).mean())) for before, after in pairwise(video)]
    number = np.floor(np.arange(len(video)) / rate / window + 1e-9)
    at_seam = np.diff(number) > 0
    inside = [step for step, seam in zip(steps, at_seam, strict=True) if not seam]
    median = statistics.median(inside) if inside else 0.0
    return [step / median for step, seam in zip(steps, at_seam, strict=True) if seam] if median > 0 else []


def sample_rows(sample: Sample, order: int, start: float = 0.0) -> Tensor:
    """Rows (B, D) of sampled clips over [start, 1], to compare with `Catalogue.curves`."""
    times, weights = quadrature(order, start)
    return path_rows(sample.read(torch.from_numpy(times)).float().cpu(), weights)


def _nearest_true(catalogue: Catalogue, clip: Clip) -> float:
    """A true clip's distance to the nearest training clip of another film; NaN where there is none."""
    others = catalogue.training & ~catalogue.all_with("film", clip.about["film"])
    far = catalogue.distances(catalogue.curves([_number(catalogue, clip)]))[0, others]
    return float(far.min()) if len(far) else math.nan


def _number(catalogue: Catalogue, clip: Clip) -> int:
    return int(np.flatnonzero(catalogue.all_with("clip_id", clip.clip_id))[0])


def _following(catalogue: Catalogue, clip: Clip, window: float) -> tuple[Clip, Clip] | None:
    """The film's clips of the second and the third window from this one, where both kept their frames."""
    start = clip.about["clip_start"]
    numbers = [catalogue.where(clip.about["film"], start + k * window) for k in range(1, WINDOWS)]
    second, third = numbers
    if second is None or third is None or not catalogue.complete[[second, third]].all():
        return None
    return catalogue.read(second), catalogue.read(third)


def _together(pairs: Sequence[tuple[Tensor, Tensor]]) -> float:
    if not pairs:
        return math.nan
    return pooled_psnr(torch.stack([a for a, _ in pairs]), torch.stack([b for _, b in pairs]))


def _shown_times(sampler: Sampler) -> Tensor:
    count = max(1, math.floor(sampler.window * SHOWN_RATE + 1e-6))
    return torch.arange(count, dtype=torch.float64) / SHOWN_RATE / sampler.window


def _film(clip: Clip, seconds: Tensor) -> Frames:
    nearest = np.abs(clip.members["frame_time"][None] - seconds.numpy()[:, None]).argmin(axis=1)
    frames: Frames = clip.members["preview"][nearest]
    return frames
