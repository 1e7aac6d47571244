"""The headline of an evaluation: one table of training and validation clips, and its ranges over several runs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from model.evaluation.figures import CLIP_METRICS, RECALL_METRICS
from model.evaluation.generation import GENERATION_METRICS
from model.evaluation.sequences import SEQUENCE_GROUPS, SEQUENCE_METRICS
from model.metrics.base import Metric

LOSS_METRICS = (
    Metric("loss_first", "", False, "the log's first loss on this split", "first", per_set=True),
    Metric(
        "loss_last", "", False, "its last: lower than the first, or the run learned nothing of it", "last", per_set=True
    ),
)
OF_CURVES = {metric.name: metric for metric in (*CLIP_METRICS, *RECALL_METRICS, *GENERATION_METRICS, *LOSS_METRICS)}
"""Every figure of metrics.json of a method whose clips are read at any time."""
OF_SEQUENCES = {metric.name: metric for metric in (*SEQUENCE_METRICS, *LOSS_METRICS)}
"""Every figure of metrics.json of a method that samples frames in order."""
METRICS = {**OF_CURVES, **OF_SEQUENCES}
"""All of them."""
SEQUENCES = "sequences"
"""`kind` in the metrics.json of a method that samples frames in order."""
SPLITS = {"train": "training", "validation": "validation"}
"""The splits, as metrics.json and as the tables call them."""
GROUPS = {
    "against the film, PSNR": (
        "film_sample", "film_ceiling", "film_lookup", "film_mean_frame", "film_first_frame",
    ),
    "against the film, SSIM and held-out frames": (
        "film_sample_ssim", "film_ceiling_ssim", "film_sample_held_out", "film_ceiling_held_out",
    ),
    "against the codec's reconstruction (of training clips: recall)": (
        "recall", "recall_lookup", "recall_mean_frame", "recall_first_frame", "between_grid",
    ),
    "seeds of one caption": ("seed_psnr", "data_psnr", "seed_distance", "seed_diversity"),
    "another clip's picture": ("image_first_frame", "image_ceiling", "image_over_caption", "image_alone"),
    "long video": ("seam", "third_window", "third_hold", "third_velocity"),
    "copies of training clips": ("nearest_sample", "nearest_true", "copies"),
    "loss": ("loss_first", "loss_last"),
}  # fmt: skip
"""The headline: what its figures are about, and their names."""


def groups_of(metrics: Mapping[str, Any]) -> Mapping[str, Sequence[str]]:
    """The headline's groups of an evaluation, of metrics.json or ranges.json."""
    return SEQUENCE_GROUPS if metrics.get("kind") == SEQUENCES else GROUPS


def losses(log: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """First and last loss of each split in a run's log, by the names of LOSS_METRICS."""
    found = {}
    for split, name in (("train", "loss"), ("validation", "validation_loss")):
        values = [line[name] for line in log if name in line]
        found[split] = {"loss_first": values[0], "loss_last": values[-1]} if values else {}
    return found


def figure(metrics: Mapping[str, Any], split: str, name: str) -> float:
    """A figure of a split in metrics.json, of its clips' mean or of the set; NaN where there is none."""
    summary = metrics[split]
    value = summary.get("mean", {}).get(name) if not METRICS[name].per_set else summary.get(name)
    return math.nan if value is None else float(value)


def figure_text(name: str, value: float) -> str:
    """A figure as the tables show it; a dash where there is none."""
    metric = METRICS[name]
    return f"{value:.{1 if metric.unit else 2}f}{metric.unit}" if math.isfinite(value) else "–"


def headline(metrics: Mapping[str, Any]) -> list[str]:
    """The table as lines of text."""
    groups = groups_of(metrics)
    told = {name: [figure_text(name, figure(metrics, split, name)) for split in SPLITS] for name in _names(groups)}
    counts = [f"{metrics[split]['clips']} clips" for split in SPLITS]
    return _lines(groups, told, counts)


def ranges(runs: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, list[float]]]:
    """Mean, least and most of each headline figure over runs, by split and name; runs that lack it are left out."""
    found: dict[str, dict[str, list[float]]] = {split: {} for split in SPLITS}
    for split in SPLITS:
        for name in _names(groups_of(runs[0])):
            values = [value for metrics in runs if math.isfinite(value := figure(metrics, split, name))]
            if values:
                found[split][name] = [statistics.fmean(values), min(values), max(values)]
    return found


def headline_of_runs(found: Mapping[str, Mapping[str, Sequence[float]]], runs: int) -> list[str]:
    """The table of `ranges`, with the least and the most in brackets."""

    def cell(split: str, name: str) -> str:
        if name not in found[split]:
            return "–"
        mean, least, most = (figure_text(name, value).removesuffix(METRICS[name].unit) for value in found[split][name])
        return f"{mean}{METRICS[name].unit} [{least}, {most}]"

    groups = groups_of(found)
    told = {name: [cell(split, name) for split in SPLITS] for name in _names(groups)}
    return _lines(groups, told, [f"{runs} runs"] * 2)


def _names(groups: Mapping[str, Sequence[str]]) -> list[str]:
    return [name for names in groups.values() for name in names]


def _lines(groups: Mapping[str, Sequence[str]], told: Mapping[str, Sequence[str]], counts: Sequence[str]) -> list[str]:
    heads = [f"{title}, {count}" for title, count in zip(SPLITS.values(), counts, strict=True)]
    wide = 2 + max(len(METRICS[name].title) for name in told)
    width = 2 + max(len(text) for texts in [heads, *told.values()] for text in texts)

    def line(title: str, texts: Sequence[str]) -> str:
        return f"{title:<{wide}}" + "".join(f"{text:>{width}}" for text in texts)

    lines = [line("", heads)]
    for title, names in groups.items():
        lines += [title, *(line(f"  {METRICS[name].title}", told[name]) for name in names)]
    return lines
