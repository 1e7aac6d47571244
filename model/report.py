"""The report: one HTML file that opens from disk, with every picture inside it."""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from model.video import Frames, picture_bytes
from storage.layout import write_atomic

if TYPE_CHECKING:
    from model.evaluate import ClipResult, Shown

STYLE = """
:root { color-scheme: light dark; --line: #8884; --good: #1a7f37; --bad: #b35900; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: .2rem } h2 { font-size: 1.2rem; margin-top: 2.4rem }
h3 { font-size: 1rem; margin: 1.6rem 0 .3rem }
p.note { color: #777; font-size: .9rem; margin: .3rem 0 }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums }
th, td { padding: .25rem .6rem; border-bottom: 1px solid var(--line); text-align: right }
th:first-child, td:first-child, .left { text-align: left }
.films td, .films th { text-align: center; border: 0; padding: .25rem }
.films img { width: 160px; height: auto; border-radius: 4px; display: block }
.strip { display: grid; grid-template-columns: 7rem 1fr; gap: .3rem .6rem; align-items: center; font-size: .85rem }
.strip img { width: 100%; height: auto; display: block }
.good { color: var(--good) } .bad { color: var(--bad) }
.scroll { overflow-x: auto } svg { max-width: 100%; height: auto }
"""


def write_report(
    path: Path,
    metrics: Mapping[str, Any],
    results: Sequence[ClipResult],
    views: Sequence[Shown],
    log: Sequence[Mapping[str, Any]],
) -> None:
    """Write the report of an evaluation: figures, pictures, loss curve, and every clip's row."""
    about, seed = metrics["run"], metrics["settings"]["seed"]
    body = [
        "<h1>What the model has learned</h1>",
        f"<p class=note>Run at step {metrics['step']}, dataset version {about['version']['number']}, codec "
        f"{_text(about['codec']['id'])}, seed {seed}, {metrics['network_calls_per_window']} network calls a window of "
        f"{about['clip']['duration']:g} s whatever the frame rate. Every sample starts from noise, a caption and the "
        "clip's start in its film; nothing of the film is given.</p>",
        _goals(metrics),
        "<h2>Films, projections and samples</h2>",
        "<p class=note>At each rate: the film's own frames (the nearest that were kept), the projection of the clip's "
        "latents decoded at that rate (no network), and the model's sample.</p>",
        *[_films(view) for view in views],
        "<h2>PSNR beside what could be had without a model</h2>",
        _against_film(metrics),
        "<h2>Training</h2>",
        _loss_curve(log),
        "<h2>Every clip</h2>",
        _clips(results),
        _unseen(metrics),
        _counts(metrics),
    ]
    document = (
        "<!doctype html><html lang=en><meta charset=utf-8><title>VLFM report</title>"
        f"<meta name=viewport content='width=device-width'><style>{STYLE}</style><body>{''.join(body)}</body></html>"
    )
    write_atomic(path, document.encode())


def _goals(metrics: Mapping[str, Any]) -> str:
    summary, goals, mean = metrics["summary"], metrics["goals"], metrics["summary"]["mean"]
    count, meeting = summary["clips"], summary["clips_meeting"]
    rows = [
        (
            f"every observed frame at {goals['observed_worst_frame']:.0f} dB or more",
            f"mean {mean['sample_observed']:.2f}, worst frame {summary['worst_observed_frame']:.2f}",
            meeting["observed_worst_frame"],
        ),
        (
            f"at least {goals['above_mean_frame']:.0f} dB over the clip's own mean frame",
            f"least {summary['least_above_mean_frame']:.2f}",
            meeting["above_mean_frame"],
        ),
        (
            f"no frame more than {goals['below_median']:.0f} dB below the clip's median",
            f"most {summary['most_below_median']:.2f}",
            meeting["below_median"],
        ),
        (
            f"held-out times within {goals['held_out_gap']:.0f} dB of the observed ones",
            f"mean {mean['sample_held_out']:.2f}, largest gap {summary['most_held_out_gap']:.2f}",
            meeting["held_out_gap"],
        ),
    ]
    lines = [
        [name, value, f"<span class={'good' if met == count else 'bad'}>{met} of {count}</span>"]
        for name, value, met in rows
    ]
    return (
        "<h2>Samples of training pairs against the codec's reconstruction</h2>"
        f"<p class=note>{count} pairs (caption, clip_start), dB of standard PSNR. The formula printed in arXiv "
        f"2502.00500, whose peak is the picture's side, would call the mean {summary['psnr_paper']:.1f}.</p>"
        + _table(["", "dB", "clips that do"], lines)
    )


def _against_film(metrics: Mapping[str, Any]) -> str:
    mean = metrics["summary"]["mean"]
    rows: list[list[str | float]] = [
        ["the codec alone (the ceiling)", mean["real_ceiling_observed"], mean["real_ceiling_held_out"]],
        ["projection, no network", mean["real_projection_observed"], mean["real_projection_held_out"]],
        ["linear interpolation of observed latents", mean["real_ceiling_observed"], mean["real_linear_held_out"]],
        ["<b>sample of the model</b>", mean["real_sample_observed"], mean["real_sample_held_out"]],
    ]
    note = "<p class=note>Mean over training clips, against the film's own frames, dB.</p>"
    return note + _table(["", "observed times", "held-out times"], rows)


def _clips(results: Sequence[ClipResult]) -> str:
    head = [
        "film",
        "from",
        "observed",
        "worst",
        "held out",
        "over mean frame",
        "first frame held",
        "ceiling",
        "caption",
    ]
    rows: list[list[str | float]] = [
        [
            _text(r.film) + ("" if r.split == "train" else " (unseen)"),
            f"{r.clip_start:g} s",
            r.sample_observed,
            r.sample_observed_worst,
            r.sample_held_out,
            r.sample_all - r.mean_frame,
            r.first_frame,
            r.real_ceiling_observed,
            f"<span class=left>{_text(r.caption)}</span>",
        ]
        for r in results
    ]
    return f"<div class=scroll>{_table(head, rows)}</div>"


def _unseen(metrics: Mapping[str, Any]) -> str:
    unseen = metrics["unseen"]
    if not unseen["clips"]:
        return "<p class=note>No film fell into the validation split.</p>"
    mean = unseen["mean"]
    return (
        f"<p class=note>{unseen['clips']} clips of films the model never saw are sampled from their captions too: "
        f"{mean['sample_observed']:.1f} dB, where the clip's own mean frame has {mean['mean_frame']:.1f} dB. "
        "A caption does not tell a film's pixels, so nothing better is to be expected there.</p>"
    )


def _counts(metrics: Mapping[str, Any]) -> str:
    parts = []
    for kind, counts in metrics["counts"].items():
        if isinstance(counts, Mapping):
            told = ", ".join(f"{_text(str(name))} {_text(str(value))}" for name, value in counts.items())
            parts.append(f"{_text(kind)}: {told}")
    return f"<p class=note>Dataset: {'; '.join(parts)}.</p>"


def _films(view: Shown) -> str:
    result = view.result
    rows = []
    for rate in view.real:
        cells = [_animation(frames[rate], rate) for frames in (view.real, view.projected, view.sampled)]
        rows.append(f"<tr><th>{rate:g} fps</th>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    densest = max(view.real)
    strips = [
        f"<span>{name}</span>{_strip(frames[densest])}"
        for name, frames in (("film", view.real), ("projection", view.projected), ("sample", view.sampled))
    ]
    return (
        f"<h3>{_text(result.caption)}</h3><p class=note>{_text(result.film)} from {result.clip_start:g} s, "
        f"{_text(result.split)} split: {result.sample_observed:.1f} dB at observed times, {result.sample_held_out:.1f} "
        f"at held-out ones, worst frame {result.sample_worst:.1f}; mean frame {result.mean_frame:.1f} dB.</p>"
        "<table class=films><tr><th></th><th>film</th><th>projection</th><th>sample</th></tr>"
        f"{''.join(rows)}</table><div class=strip>{''.join(strips)}</div>"
    )


def _animation(frames: Frames, rate: float) -> str:
    data = base64.b64encode(picture_bytes(frames, rate, "webp")).decode()
    return f"<img alt='{len(frames)} frames' src='data:image/webp;base64,{data}'>"


def _strip(frames: Frames, count: int = 10) -> str:
    chosen = frames[np.linspace(0, len(frames) - 1, min(count, len(frames))).round().astype(int)]
    data = base64.b64encode(picture_bytes(chosen, 1.0, "png")).decode()
    return f"<img alt='{len(chosen)} frames in a row' src='data:image/png;base64,{data}'>"


def _loss_curve(log: Sequence[Mapping[str, Any]], width: int = 900, height: int = 260) -> str:
    """The loss and its parts over the steps, as an SVG with a logarithmic axis."""
    lines = {
        name: [(line["step"], line[name]) for line in log if line.get(name, 0) > 0]
        for name in ("loss", "mean", "derivative", "validation_loss")
    }
    lines = {name: points for name, points in lines.items() if points}
    if not lines:
        return "<p class=note>The run has no log.</p>"
    last = max(step for points in lines.values() for step, _ in points)
    values = [value for points in lines.values() for _, value in points]
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    high = max(high, low + 1)

    def at(step: float, value: float) -> str:
        x = 60 + (width - 190) * step / max(last, 1)
        y = 10 + (height - 40) * (high - math.log10(value)) / (high - low)
        return f"{x:.1f},{y:.1f}"

    parts = []
    for power in range(low, high + 1):
        x, y = at(0, 10.0**power).split(",")
        parts.append(f"<line x1={x} x2={width - 130} y1={y} y2={y} stroke=#8883 />")
        parts.append(f"<text x=52 y={float(y) + 4} text-anchor=end>{10.0**power:g}</text>")
    colours = ("#0969da", "#1a7f37", "#bf5b00", "#8250df")
    for index, (name, points) in enumerate(lines.items()):
        colour = colours[index]
        path = " ".join(at(step, value) for step, value in points)
        parts.append(f"<polyline points='{path}' fill=none stroke={colour} stroke-width=1.6 />")
        parts.append(f"<text x={width - 120} y={24 + 20 * index} fill={colour}>{name.replace('_', ' ')}</text>")
    parts.append(f"<text x={width - 130} y={height - 8} text-anchor=end>step {last}</text>")
    speeds = [line["samples_per_second"] for line in log if "samples_per_second" in line]
    waits = [line["data_wait"] for line in log if "data_wait" in line]
    told = ""
    if speeds:
        told = (
            f"<p class=note>{float(np.median(speeds)):.0f} flow times a second (median); "
            f"{100 * float(np.median(waits)):.1f} % of the time spent waiting for data.</p>"
        )
    return (
        f"<svg viewBox='0 0 {width} {height}' width={width} font-size=12 fill=currentColor role=img "
        f"aria-label='loss over steps'>{''.join(parts)}</svg>{told}"
    )


def _table(head: Sequence[str], rows: Iterable[Sequence[str | float]]) -> str:
    cells = "".join(f"<th>{name}</th>" for name in head)
    lines = "".join("<tr>" + "".join(f"<td>{_cell(value)}</td>" for value in row) + "</tr>" for row in rows)
    return f"<table><tr>{cells}</tr>{lines}</table>"


def _cell(value: str | float) -> str:
    if isinstance(value, str):
        return value
    return f"{value:.2f}" if math.isfinite(value) else "–"


def _text(value: str) -> str:
    return html.escape(value)
