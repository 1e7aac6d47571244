"""The report: one HTML file that opens from disk, with every picture inside it."""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from model.evaluation.figures import ClipResult, Shown
from model.evaluation.generation import CAPTIONS, SEEDS, SHOWN_RATE, Made, View
from model.evaluation.headline import METRICS, SPLITS, figure, figure_text, groups_of
from model.metrics.pictures import decibels
from model.video import Frames, picture_bytes
from storage.layout import write_atomic
from storage.schema import CERTIFICATE, certificate_spread

OF_EACH_CLIP = (
    "film_sample",
    "film_ceiling",
    "recall",
    "recall_observed_worst",
    "recall_held_out",
    "above_mean_frame",
    "recall_first_frame",
)
"""The metrics in the table of every clip."""
STYLE = """
:root { color-scheme: light dark; --line: #8884; --muted: #59636e; --good: #1a7f37; --bad: #b35900; }
svg { --a: #0969da; --b: #1a7f37; --c: #bf5b00; --d: #8250df; }
@media (prefers-color-scheme: dark) {
  :root { --muted: #9ba5b0; --good: #4ac26b; --bad: #e39349; }
  svg { --a: #58a6ff; --b: #4ac26b; --c: #e39349; --d: #bc8cff; }
}
body { font: 16px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: .2rem } h2 { font-size: 1.2rem; margin-top: 2.4rem }
h3 { font-size: 1rem; margin: 1.8rem 0 0 }
p.note { color: var(--muted); font-size: .9rem; margin: .2rem 0 .5rem }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums }
th, td { padding: .25rem .6rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top }
th { vertical-align: bottom } th:first-child, td:first-child, .words :last-child { text-align: left }
.words { font-size: .85rem } .words td:first-child { white-space: nowrap } .words td:last-child { min-width: 14rem }
.head td:nth-child(2), .head td:nth-child(3) { white-space: nowrap }
.head th[colspan] { padding-top: .9rem }
.films td, .films th { border: 0; padding: 1px 2px; font-size: .85rem; text-align: center; vertical-align: middle }
.films td:first-child { padding-right: .6rem; text-align: left } .films .gap { padding-left: 1rem }
.films img { width: auto; height: 6.2rem; border-radius: 3px; display: block }
.good { color: var(--good) } .bad { color: var(--bad) }
.scroll { overflow-x: auto } summary { cursor: pointer } svg { max-width: 100%; height: auto }
"""


def write_report(
    path: Path,
    metrics: Mapping[str, Any],
    results: Sequence[ClipResult],
    views: Sequence[Shown],
    made: Mapping[str, Made],
    log: Sequence[Mapping[str, Any]],
) -> None:
    """Write the report of an evaluation: figures, pictures, loss curve, and every clip's row."""
    about, seed = metrics["run"], metrics["settings"]["seed"]
    body = [
        "<h1>What the model makes</h1>",
        f"<p class=note>Run at step {metrics['step']}, dataset version {about['version']['number']}, codec "
        f"{_text(about['codec']['id'])}, seed {seed}, {metrics['network_calls_per_window']} network calls a window of "
        f"{about['clip']['duration']:g} s whatever the frame rate.</p>",
        _headline(metrics),
        _views("Seeds of one caption", "Told the caption alone; the film beside them has it too.", made, "seeds"),
        _views(
            "Another clip's picture",
            "Given the film's first frame: with the caption of another clip, above, and with the empty caption.",
            made,
            "images",
        ),
        "<h2>Films, look-ups and samples</h2>",
        "<p class=note>The film's own frames (at each rate the nearest that were kept), its look-up (the clip's stored "
        "coefficients read at that rate and decoded, no network), and the model's sample from noise, the caption and "
        "the clip's start in its film: moving at each rate, then still, from the clip's first frame to its last.</p>",
        *[_films(view) for view in views],
        _goals(metrics),
        "<h2>Training</h2>",
        loss_curve(log),
        "<h2>Every clip</h2>",
        _clips(results),
        "<h2>Certificates of the dataset</h2>",
        _certificates(metrics),
        _counts(metrics),
    ]
    write_page(path, body)


def write_page(path: Path, body: Iterable[str]) -> None:
    """Write parts of a body as a whole page."""
    document = (
        "<!doctype html><html lang=en><meta charset=utf-8><title>VLFM report</title>"
        f"<meta name=viewport content='width=device-width'><style>{STYLE}</style><body>{''.join(body)}</body></html>"
    )
    write_atomic(path, document.encode())


def certificates(rows: Sequence[Mapping[str, Any]], bins: int = 20) -> dict[str, Any]:
    """How the certificates of a version's clips are spread: `figures` by name, each with clips, worst, median, best and
    a histogram (counts of `bins` equal steps from low to high), and `flagged`, the number of clips outside a gate.

    rows: of storage.schema.CLIP_SCHEMA.
    """
    figures: dict[str, Any] = {}
    for name, spread in certificate_spread(rows).items():
        values = np.array([row[name] for row in rows], dtype=np.float64)
        counts, edges = np.histogram(values[np.isfinite(values)], bins)
        figures[name] = {**spread, "low": float(edges[0]), "high": float(edges[-1]), "counts": counts.tolist()}
    return {"figures": figures, "flagged": sum(bool(row["flags"]) for row in rows)}


def _certificates(metrics: Mapping[str, Any]) -> str:
    found = metrics["certificates"]
    rows = []
    for measure in CERTIFICATE:
        if measure.name in found["figures"]:
            figure = found["figures"][measure.name]
            told = [f"{figure[kind]:.4g}{measure.unit}" for kind in ("worst", "median", "best")]
            rows.append([measure.name, str(figure["clips"]), *told, _histogram(figure), _text(measure.doc)])
    if not rows:
        return "<p class=note>No figure was measured.</p>"
    flagged = f" {found['flagged']} clips are outside the recipe's gates." if found["flagged"] else ""
    note = (
        "<p class=note>How well each clip of this version went through codec and projection, before any training; "
        f"the last but one column counts clips from the lowest figure to the highest.{flagged}</p>"
    )
    head = ["figure", "clips", "worst", "median", "best", "low to high", "what"]
    return f"{note}<div class=scroll>{_table(head, rows, 'words')}</div>"


def _histogram(figure: Mapping[str, Any], width: int = 120, height: int = 24) -> str:
    """Counts as bars; the corners of the picture are the lowest and the highest value."""
    counts = figure["counts"]
    step, most = width / len(counts), max(counts)
    bars = []
    for k, count in enumerate(counts):
        tall = height * count / most
        bars.append(f"<rect x={k * step:.1f} y={height - tall:.1f} width={step - 1:.1f} height={tall:.1f} />")
    label = f"{figure['clips']:g} clips from {figure['low']:.4g} to {figure['high']:.4g}"
    return (
        f"<svg viewBox='0 0 {width} {height}' width={width} height={height} style='fill: var(--a)' role=img "
        f"aria-label='{label}'><title>{label}</title>{''.join(bars)}</svg>"
    )


def _headline(metrics: Mapping[str, Any]) -> str:
    """The headline's table, with what each figure is."""
    absent = "" if metrics["validation"]["clips"] else " No film fell into the validation split."
    return (
        "<p class=note>dB is PSNR. The first three groups are means over clips, the next four of at most "
        f"{CAPTIONS} captions of each split, {SEEDS} seeds each, told no place in a film. Where no two clips share a "
        f"caption there is no data spread to compare with.{absent}</p>{headline_table(metrics)}"
    )


def headline_table(metrics: Mapping[str, Any]) -> str:
    """The headline's figures of both splits, with what each is."""
    heads = [f"{title},<br>{metrics[split]['clips']} clips" for split, title in SPLITS.items()]
    rows = []
    for title, names in groups_of(metrics).items():
        rows.append(f"<tr><th colspan=4>{_text(title)}</th></tr>")
        for name in names:
            metric = METRICS[name]
            told = [figure_text(name, figure(metrics, split, name)) for split in SPLITS]
            cells = [_text(metric.title), *told, _text(metric.doc)]
            rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    return (
        f"<div class=scroll><table class='words head'><tr><th></th>{''.join(f'<th>{head}</th>' for head in heads)}"
        f"<th>what</th></tr>{''.join(rows)}</table></div>"
    )


def _views(title: str, note: str, made: Mapping[str, Made], kind: str) -> str:
    """Captions with their pictures side by side, of each split."""
    tables = []
    for split, name in SPLITS.items():
        views: Sequence[View] = getattr(made[split], kind)
        for view in views:
            heads = "".join(f"<th>{_text(what)}</th>" for what in view.pictures)
            cells = "".join(f"<td>{_animation(frames, SHOWN_RATE)}</td>" for frames in view.pictures.values())
            tables.append(
                f"<h3>{_text(view.caption)}</h3><p class=note>{name} split</p><div class=scroll>"
                f"<table class=films><tr>{heads}</tr><tr>{cells}</tr></table></div>"
            )
    return f"<h2>{title}</h2><p class=note>{note}</p>{''.join(tables)}" if tables else ""


def _goals(metrics: Mapping[str, Any]) -> str:
    summary, goals, mean = metrics["train"], metrics["goals"], metrics["train"]["mean"]
    count, meeting = summary["clips"], summary["clips_meeting"]
    rows = [
        (
            f"every observed frame at {goals['observed_worst_frame']:.0f} dB or more",
            f"mean {decibels(mean['recall_observed'], 2)}, worst frame {decibels(summary['worst_observed_frame'], 2)}",
            meeting["observed_worst_frame"],
        ),
        (
            f"at least {goals['above_mean_frame']:.0f} dB over the clip's own mean frame",
            f"mean {decibels(mean['above_mean_frame'], 2)}, least {decibels(summary['least_above_mean_frame'], 2)}",
            meeting["above_mean_frame"],
        ),
        (
            f"no frame more than {goals['below_median']:.0f} dB below the clip's median",
            f"most {decibels(summary['most_below_median'], 2)}",
            meeting["below_median"],
        ),
        (
            f"held-out times within {goals['held_out_gap']:.0f} dB of the observed ones",
            f"mean {decibels(mean['recall_held_out'], 2)}, largest gap {decibels(summary['most_held_out_gap'], 2)}",
            meeting["held_out_gap"],
        ),
    ]
    lines = [
        [name, value, f"<span class={'good' if met == count else 'bad'}>{met} of {count}</span>"]
        for name, value, met in rows
    ]
    return (
        "<h2>Recall of training pairs, against the codec's reconstruction</h2>"
        f"<p class=note>{count} pairs (caption, clip_start), dB of standard PSNR. The formula printed in arXiv "
        f"2502.00500, whose peak is the picture's side, would call the mean {decibels(summary['psnr_paper'])}.</p>"
        + _table(["", "dB", "clips that do"], lines)
    )


def _clips(results: Sequence[ClipResult]) -> str:
    shown = [METRICS[name] for name in OF_EACH_CLIP]
    head = ["film", "from", *(f"<span title='{_text(metric.doc)}'>{metric.title}</span>" for metric in shown)]
    rows: list[list[str | float | None]] = [
        [
            _text(r.film) + ("" if r.split == "train" else " (validation)"),
            f"{r.clip_start:g} s",
            *(r.figures[metric.name] for metric in shown),
            _text(r.caption),
        ]
        for r in results
    ]
    note = (
        f"<p class=note>All in{shown[0].unit}. "
        + "; ".join(f"{metric.title}: {_text(metric.doc)}" for metric in shown)
        + ".</p>"
    )
    table = _table([*head, "caption"], rows, "words")
    return f"<details open><summary>{len(rows)} clips</summary>{note}<div class=scroll>{table}</div></details>"


def _counts(metrics: Mapping[str, Any]) -> str:
    parts = []
    for kind, counts in metrics["counts"].items():
        if isinstance(counts, Mapping):
            told = []
            for name, value in counts.items():
                reasons = value if isinstance(value, Mapping) else {}
                number = sum(reasons.values()) if isinstance(value, Mapping) else value
                why = ", ".join(f"{reason} {count}" for reason, count in reasons.items())
                told.append(_text(f"{name} {number}" + (f" ({why})" if why else "")))
            parts.append(f"{_text(kind)}: {', '.join(told)}")
    return f"<p class=note>Dataset: {'; '.join(parts)}.</p>"


def _films(view: Shown, stills: int = 6) -> str:
    result, figures = view.result, view.result.figures
    rates = sorted(view.real)
    rows = []
    for name, frames in (("film", view.real), ("look-up", view.projected), ("sample", view.sampled)):
        densest = frames[rates[-1]]
        chosen = densest[np.linspace(0, len(densest) - 1, min(stills, len(densest))).round().astype(int)]
        moving = "".join(f"<td>{_animation(frames[rate], rate)}</td>" for rate in rates)
        still = "".join(f"<td{'' if k else ' class=gap'}>{_still(frame)}</td>" for k, frame in enumerate(chosen))
        rows.append(f"<tr><td>{name}</td>{moving}{still}</tr>")
    heads = "".join(f"<th>{rate:g} fps</th>" for rate in rates)
    return (
        f"<h3>{_text(result.caption)}</h3><p class=note>{_text(result.film)} from {result.clip_start:g} s, "
        f"{_text(result.split)} split: {decibels(figures['film_sample'])} dB against the film, "
        f"the codec {decibels(figures['film_ceiling'])}; recall {decibels(figures['recall_observed'])} at observed "
        f"times, {decibels(figures['recall_held_out'])} at held-out ones, worst frame "
        f"{decibels(figures['recall_worst'])}; mean frame {decibels(figures['recall_mean_frame'])} dB.</p>"
        "<div class=scroll><table class=films>"
        f"<tr><th></th>{heads}<th class=gap colspan={stills}>first frame to last</th></tr>{''.join(rows)}</table></div>"
    )


def _animation(frames: Frames, rate: float) -> str:
    data = base64.b64encode(picture_bytes(frames, rate, "webp")).decode()
    return f"<img alt='{len(frames)} frames' src='data:image/webp;base64,{data}'>"


def _still(frame: Frames) -> str:
    data = base64.b64encode(picture_bytes(frame[None], 1.0, "png")).decode()
    return f"<img alt='a frame' src='data:image/png;base64,{data}'>"


def loss_curve(
    log: Sequence[Mapping[str, Any]],
    parts_of_it: Sequence[str] = ("mean", "derivative"),
    width: int = 900,
    height: int = 260,
) -> str:
    """The loss and its parts over the steps, as an SVG with a logarithmic axis. At most two parts."""
    lines = {
        name: [(line["step"], line[name]) for line in log if line.get(name, 0) > 0]
        for name in ("loss", *parts_of_it, "validation_loss")
    }
    lines = {name: points for name, points in lines.items() if points}
    if not lines:
        return "<p class=note>The run has no log.</p>"
    last = max(step for points in lines.values() for step, _ in points)
    values = [value for points in lines.values() for _, value in points]
    marks = [digit * 10.0**power for power in range(-9, 10) for digit in (1, 2, 5)]
    below = max((k for k, mark in enumerate(marks) if mark <= min(values)), default=0)
    above = min((k for k, mark in enumerate(marks) if mark > max(values)), default=len(marks) - 1)
    marks = marks[below : above + 1]
    low, high = math.log10(marks[0]), math.log10(marks[-1])

    def at(step: float, value: float) -> str:
        x = 60 + (width - 190) * step / max(last, 1)
        y = 10 + (height - 40) * (high - math.log10(value)) / (high - low)
        return f"{x:.1f},{y:.1f}"

    parts = []
    for mark in marks:
        x, y = at(0, mark).split(",")
        parts.append(f"<line x1={x} x2={width - 130} y1={y} y2={y} stroke=#8883 />")
        if f"{mark:e}"[0] == "1" or len(marks) < 8:
            parts.append(f"<text x=52 y={float(y) + 4} text-anchor=end>{mark:g}</text>")
    for index, (name, points) in enumerate(lines.items()):
        colour = f"var(--{'abcd'[index]})"
        places = [at(step, value) for step, value in points]
        parts.append(f"<polyline points='{' '.join(places)}' style='stroke: {colour}' fill=none stroke-width=1.6 />")
        for x, y in [place.split(",") for place in places if len(places) < 20]:  # one value alone makes no line
            parts.append(f"<circle cx={x} cy={y} r=2.5 style='fill: {colour}' stroke=none />")
        label = name.replace("_", " ")
        parts.append(f"<text x={width - 120} y={24 + 20 * index} style='fill: {colour}'>{label}</text>")
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


def _table(head: Sequence[str], rows: Iterable[Sequence[str | float | None]], kind: str = "") -> str:
    cells = "".join(f"<th>{name}</th>" for name in head)
    lines = "".join("<tr>" + "".join(f"<td>{_cell(value)}</td>" for value in row) + "</tr>" for row in rows)
    return f"<table{' class=' + kind if kind else ''}><tr>{cells}</tr>{lines}</table>"


def _cell(value: str | float | None) -> str:
    return value if isinstance(value, str) else decibels(value, 2)


def _text(value: str) -> str:
    return html.escape(value)
