"""The report of a method that samples frames in order: figures, lengths, drift, and strips of videos as they grew."""

from __future__ import annotations

import base64
import html
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model.evaluation.headline import SPLITS
from model.evaluation.report import headline_table, loss_curve, write_page
from model.evaluation.sequences import PLACES, SplitFigures
from model.video import Frames, picture_bytes

BORDER, HEIGHT = 6, 72
"""Width in pixels of a frame's border in a strip, and the least height of the frame that it is enlarged to."""
START, LATE, GIVEN = (31, 119, 180), (214, 69, 31), (140, 140, 140)
"""Colours of borders: of frames that the sampler began with, of those inserted last, and of given ones."""
WIDE = 640
"""Width of a bar chart."""


def write_sequence_report(
    path: Path,
    metrics: Mapping[str, Any],
    found: Mapping[str, SplitFigures],
    strips: Mapping[str, Sequence[tuple[str, Frames, Frames]]],
    log: Sequence[Mapping[str, Any]],
) -> None:
    """Write the report. strips: by split (caption, the clip's strip, the sample's)."""
    about, settings = metrics["run"], metrics["settings"]
    told = ", ".join(f"{name} {value}" for name, value in settings.items())
    body = [
        "<h1>What the model makes</h1>",
        f"<p class=note>Method {_text(about['recipe']['method'])} at step {metrics['step']}, dataset version "
        f"{about['version']['number']}, codec {_text(about['codec']['id'])}; {metrics['network_calls']} network calls "
        f"in all. Sampled with {_text(told)}.</p>",
        "<p class=note>One sample for the caption of each clip. Beside a figure stands the same of as many true clips: "
        "sets of few videos are never at distance 0.</p>",
        headline_table(metrics),
        "<h2>Lengths</h2>",
        *[_lengths(title, found[split]) for split, title in SPLITS.items() if found[split].lengths],
        "<h2>Drift along the video</h2>",
        *[_drift(title, found[split]) for split, title in SPLITS.items() if found[split].lengths],
        "<h2>Clips and samples</h2>",
        "<p class=note>All frames in order: above the clip, below the sample of its caption. A border says when a "
        f"frame was inserted: {_colour(START, 'at the start')}, later ones towards {_colour(LATE, 'the end')}, "
        f"{_colour(GIVEN, 'given')}.</p>",
        *[_strip(title, *strip) for split, title in SPLITS.items() for strip in strips[split]],
        "<h2>Training</h2>",
        loss_curve(log, ("velocity",)),
    ]
    write_page(path, body)


def bordered(frames: Frames, inserted: NDArray[np.float64]) -> Frames:
    """Frames (N, H, W, 3), enlarged by whole pixels to at least HEIGHT, with borders that say when each was `inserted`
    (N,): the clock, 0 at the start; NaN, given."""
    scale = max(1, math.ceil(HEIGHT / frames.shape[1]))
    large = frames.repeat(scale, 1).repeat(scale, 2)
    late = np.nanmax(inserted) if np.isfinite(inserted).any() else 0.0
    share = np.nan_to_num(inserted / late if late > 0 else inserted * 0)[:, None]
    colours = np.rint((1 - share) * np.array(START) + share * np.array(LATE)).astype(np.uint8)
    colours[np.isnan(inserted)] = GIVEN
    count, height, width = large.shape[:3]
    shown = np.empty((count, height + 2 * BORDER, width + 2 * BORDER, 3), dtype=np.uint8)
    shown[:] = colours[:, None, None]
    shown[:, BORDER:-BORDER, BORDER:-BORDER] = large
    return shown


def _strip(split: str, caption: str, true: Frames, made: Frames) -> str:
    rows = "".join(
        f"<tr><td>{name} ({len(frames)})</td><td>{_picture(frames)}</td></tr>"
        for name, frames in (("clip", true), ("sample", made))
    )
    return (
        f"<h3>{_text(caption)}</h3><p class=note>{_text(split)} split</p>"
        f"<div class=scroll><table class=films>{rows}</table></div>"
    )


def _picture(frames: Frames) -> str:
    data = base64.b64encode(picture_bytes(frames, 1.0, "png")).decode()
    return f"<img alt='{len(frames)} frames' src='data:image/png;base64,{data}'>"


def _lengths(title: str, split: SplitFigures) -> str:
    """Bars of the relative frequencies of lengths, samples beside clips."""
    made, true = Counter(split.lengths), Counter(split.true_lengths)
    low, high = min([*made, *true]), max([*made, *true])
    bins = min(high - low + 1, 40)
    edges = np.linspace(low, high + 1, bins + 1)
    shares = [np.histogram(np.array(some), edges)[0] / len(some) for some in (split.lengths, split.true_lengths)]
    return _bars(
        f"{title}: frames of {len(split.lengths)} samples and of {len(split.true_lengths)} clips",
        shares, f"{low}", f"{high}", ("samples", "clips"),
    )  # fmt: skip


def _drift(title: str, split: SplitFigures) -> str:
    """Bars of the distance of single frames at places of a video, samples beside true clips."""
    values = [np.nan_to_num(np.array(some)) for some in (split.drift, split.drift_floor)]
    what = f"{title}: distance of the frames at {PLACES} places from true ones"
    return _bars(what, values, "first frame", "last", ("samples", "as many true clips"))


def _bars(
    title: str, values: Sequence[NDArray[np.float64]], first: str, last: str, names: tuple[str, str], height: int = 120
) -> str:
    top = max(float(some.max()) for some in values) or 1.0
    step = WIDE / len(values[0])
    parts = []
    for which, some in enumerate(values):
        for place, value in enumerate(some):
            tall = height * float(value) / top
            x = step * place + step * (0.1 + 0.4 * which)
            parts.append(
                f"<rect x={x:.1f} y={20 + height - tall:.1f} width={0.4 * step:.1f} height={tall:.1f} "
                f"style='fill: var(--{'ac'[which]})' />"
            )
    for which, name in enumerate(names):
        parts.append(f"<text x={WIDE - 150} y={12 + 14 * which} style='fill: var(--{'ac'[which]})'>{name}</text>")
    parts.append(f"<text x=0 y=12>{top:.3g}</text><text x=0 y={height + 36}>{_text(first)}</text>")
    parts.append(f"<text x={WIDE} y={height + 36} text-anchor=end>{_text(last)}</text>")
    return (
        f"<p class=note>{_text(title)}</p><svg viewBox='0 0 {WIDE} {height + 40}' width={WIDE} font-size=12 "
        f"fill=currentColor role=img aria-label='{_text(title)}'>{''.join(parts)}</svg>"
    )


def _colour(colour: tuple[int, int, int], words: str) -> str:
    return f"<b style='color: rgb{colour}'>{words}</b>"


def _text(value: str) -> str:
    return html.escape(value)
