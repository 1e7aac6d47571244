"""What a run leaves for people to look at in Prefect's UI: a table, a summary, and a contact sheet of frames.

Plain functions from reports and lakes to rows, Markdown and PNG; flows publish them. The contact sheet travels inside
its artifact as a data address, so the UI shows it without any file or network.
"""

from __future__ import annotations

import base64
import html
import io
import json
import os
import re
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.gates import BELOW_GATE
from pipeline.ingest.report import IngestReport
from pipeline.recipes import DataRecipe
from storage.address import is_bucket, last_name
from storage.fingerprint import fingerprint
from storage.layout import Lake
from storage.version import Version, read_manifest

LISTED = 50  # failures named in the summary; the failures table of the run has them all
THUMBNAIL = 72  # pixels, height of a frame on the contact sheet


def accounts_table(report: IngestReport) -> list[dict[str, Any]]:
    """What became of the films and clips: a row for each status and reason (of, status, reason, number)."""
    rows: list[dict[str, Any]] = []
    for account in (report.films, report.clips):
        numbers: list[tuple[str, str, int]] = [("discovered", "", account.discovered)]
        numbers += [("done", "", account.done), ("unchanged", "", account.unchanged)]
        for status, reasons in (("filtered", account.filtered), ("failed", account.failed)):
            numbers += [(status, reason, number) for reason, number in sorted(reasons.items())] or [(status, "", 0)]
        rows += [
            {"of": account.what, "status": status, "reason": reason, "number": number}
            for status, reason, number in numbers
        ]
    return rows


def artifact_key(flow: str, place: str, what: str) -> str:
    """A key as Prefect takes it (lower case, digits, dashes) for one lake or run: two of one name have two keys."""
    name = re.sub(r"[^a-z0-9]+", "-", last_name(place).lower()).strip("-")
    where = place if is_bucket(place) else os.path.abspath(place)
    return f"{flow}-{name or 'lake'}-{fingerprint(where)[:6]}-{what}"


def summary(report: IngestReport, recipe: DataRecipe, sources: str) -> str:
    """The run in Markdown, what a person wants first: what is new, what failed, the certificate; the recipe last."""
    if report.published:
        outcome = f"**Version {report.version}** was published ({report.bytes / 1e6:.1f} MB of shards)."
    elif report.version is not None and report.clips.unchanged:
        outcome = f"Nothing new: version {report.version} is up to date."
    else:
        outcome = "**Nothing was published**: no film gave a clip."
    if report.exit_status == 3:
        outcome += f" More films failed than the recipe tolerates ({report.tolerate:.0%})."
    new = (
        f"**{report.clips.done} new clips** of {report.films.done} films; {report.clips.unchanged} were there already."
    )
    if report.superseded:
        new += f" {report.superseded} clips of films that changed or are gone left."
    parts = [f"# Ingest of {sources} into {report.lake}", outcome, new]
    if report.failures:
        parts += [
            "## What could not be used",
            markdown_table(
                [failure.to_row() for failure in report.failures[:LISTED]],
                ("film", "stage", "status", "reason", "detail"),
            ),
            f"All {len(report.failures)} are in `{report.lake}/failures/{report.run_id}.parquet`.",
        ]
    quality = [
        {"measure": name, **{kind: f"{value:.4g}" for kind, value in spread.items()}}
        for name, spread in report.certificate.items()
    ]
    if quality:
        parts += [
            "## Certificate of the clips",
            markdown_table(quality, ("measure", "clips", "worst", "median", "best")),
            "What each measure says is in `docs/ingest.md`.",
        ]
    recipe_rows = [{"field": name, "value": json.dumps(value)} for name, value in recipe.to_json().items()]
    seconds = [{"stage": stage, "seconds": f"{value:.1f}"} for stage, value in report.seconds.items()]
    parts += [
        "## Accounts",
        f"- {report.films.line()}\n- {report.clips.line()}",
        "## Seconds by stage, summed over the workers",
        markdown_table(seconds, ("stage", "seconds")),
        f"## Recipe {recipe.name}",
        markdown_table(recipe_rows, ("field", "value")),
    ]
    return "\n\n".join(parts) + "\n"


def contact_sheet(lake: Lake, version: Version, clips: int = 12, frames: int = 8) -> bytes | None:
    """A PNG with `frames` frames of up to `clips` clips, spread over the films, captions above; None without previews.

    Raises what storage raises for a damaged shard.
    """
    from storage.shards import ShardReader

    rows = [row for row in read_manifest(lake, version, "clips").to_pylist() if row["preview"]]
    if not rows:
        return None
    rows = _spread(rows, clips)
    strips = []
    for row in rows:
        reader = ShardReader(lake, row["shard"])
        shown = np.asarray(reader.read(row["shard_row"], ["preview.npy"])["preview.npy"])
        strip = shown[np.linspace(0, len(shown) - 1, min(frames, len(shown))).round().astype(int)]
        strips.append((f"{row['film']} at {row['clip_start']:g} s: {row['caption'] or 'no caption'}", strip))
    return _sheet(strips, frames)


def lost_sheet(report: IngestReport, recipe: DataRecipe, clips: int = 12, frames: int = 8) -> bytes | None:
    """A PNG with frames of up to `clips` clips that were filtered or failed, of every reason first, and why.

    The frames are decoded from the films again; clips whose film cannot be read are left out. None without any.
    """
    from pipeline.media.decode import decode, probe, window_of
    from pipeline.media.faults import DecodeError

    turn: Counter[str] = Counter()
    ranked = []
    for failure in report.failures:
        if failure.clip_id and failure.path and failure.clip_start == failure.clip_start:
            why = failure.detail.partition(" ")[0] if failure.reason == BELOW_GATE else failure.reason
            ranked.append((turn[why], failure.film, failure.clip_start, failure))
            turn[why] += 1
    height, width = THUMBNAIL, max(1, round(recipe.size[1] * THUMBNAIL / recipe.size[0]))
    strips: list[tuple[str, np.ndarray]] = []
    for _, film, start, failure in sorted(ranked, key=lambda item: item[:3]):
        if len(strips) == clips:
            break
        path = Path(failure.path)
        try:
            found = probe(path, recipe.limits)
            inside = np.flatnonzero((found.times >= start - 1e-6) & (found.times < start + recipe.longest))
            kept = inside[np.linspace(0, len(inside) - 1, min(frames, len(inside))).round().astype(int)]
            strip = next(decode(path, [window_of(found, np.unique(kept))], (height, width), recipe.limits))
        except (DecodeError, OSError, IndexError):
            continue
        strips.append((f"{film} at {start:g} s: {failure.reason}: {failure.detail}", strip))
    return _sheet(strips, frames) if strips else None


def page(report: IngestReport, lines: Sequence[str], pictures: Mapping[str, bytes | None]) -> str:
    """The report as one HTML file that opens from disk: its lines, and pictures by their titles."""
    shown = "".join(
        f'<h2>{html.escape(title)}</h2><p><img src="{data_address(picture)}" alt="{html.escape(title)}"></p>'
        for title, picture in pictures.items()
        if picture is not None
    )
    rows = "".join(
        f"<tr><td>{html.escape(str(row['of']))}</td><td>{row['status']}</td><td>{html.escape(str(row['reason']))}</td>"
        f"<td>{row['number']}</td></tr>"
        for row in accounts_table(report)
    )
    gates = "".join(f"<tr><td>{name}</td><td>{count}</td></tr>" for name, count in report.rejected.items())
    kept_out = f"<h2>Clips outside a gate, by figure</h2><table>{gates}</table>" if gates else ""
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Ingest {html.escape(report.run_id)}</title>'
        "<style>body{font:15px sans-serif;margin:2em;max-width:70em}td{padding:0 1em 0 0}img{max-width:100%}</style>"
        f"<h1>Ingest {html.escape(report.run_id)}</h1><pre>{html.escape(chr(10).join(lines))}</pre>"
        f"<h2>Accounts</h2><table>{rows}</table>{kept_out}{shown}</html>\n"
    )


def _sheet(strips: Sequence[tuple[str, np.ndarray]], frames: int) -> bytes:
    """A PNG with a line of text above each strip of frames, (N, H, W, 3) uint8."""
    from PIL import Image, ImageDraw, ImageFont

    height, width = strips[0][1].shape[1:3]
    shape = (max(1, round(width * THUMBNAIL / height)), THUMBNAIL)
    label, gap = 16, 2
    sheet = Image.new("RGB", (frames * (shape[0] + gap) + gap, len(strips) * (shape[1] + label + gap) + gap), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for number, (text, strip) in enumerate(strips):
        top = gap + number * (shape[1] + label + gap)
        draw.text((gap, top), textwrap.shorten(text, sheet.width // 6, placeholder=" ..."), "black", font)
        for place, frame in enumerate(strip):
            picture = Image.fromarray(frame).resize(shape, Image.Resampling.BICUBIC)
            sheet.paste(picture, (gap + place * (shape[0] + gap), top + label))
    buffer = io.BytesIO()
    sheet.quantize(256).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _spread(rows: Sequence[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """Up to `count` rows, every film once before any film twice, in order of film and start."""
    turn: dict[str, int] = {}
    ranked = []
    for row in sorted(rows, key=lambda row: (row["film"], row["clip_start"])):
        turn[row["film"]] = turn.get(row["film"], -1) + 1
        ranked.append((turn[row["film"]], row["film"], row["clip_start"], row))
    first = sorted(ranked, key=lambda item: item[:3])
    if len(turn) > count:
        places = np.linspace(0, len(turn) - 1, count).round().astype(int)
        first = [first[place] for place in places]
    return [item[3] for item in sorted(first[:count], key=lambda item: item[1:3])]


def data_address(picture: bytes) -> str:
    """A PNG as an address that holds it."""
    return "data:image/png;base64," + base64.b64encode(picture).decode()


def markdown_table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """Rows as a Markdown table; text that would break it is escaped."""
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    for row in rows:
        cells = [str(row[column]).replace("|", "\\|").replace("\n", " ").replace("<", "&lt;") for column in columns]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
