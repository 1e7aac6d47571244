"""What a run leaves for people to look at in Prefect's UI: a table, a summary, and a contact sheet of frames.

Plain functions from reports and lakes to rows, Markdown and PNG; flows publish them. The contact sheet travels inside
its artifact as a data address, so the UI shows it without any file or network.
"""

from __future__ import annotations

import base64
import io
import json
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pipeline.ingest.report import IngestReport
from pipeline.recipes import DataRecipe
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


def summary(report: IngestReport, recipe: DataRecipe, sources: str) -> str:
    """The run in Markdown: outcome, the two accounts, recipe, quality, seconds by stage, and what failed."""
    if report.published:
        outcome = f"**Version {report.version}** was published ({report.bytes / 1e6:.1f} MB of shards)."
    elif report.version is not None and report.clips.unchanged:
        outcome = f"Nothing new: version {report.version} is up to date."
    else:
        outcome = "**Nothing was published**: no film gave a clip."
    if report.exit_status == 3:
        outcome += f" More films failed than the recipe tolerates ({report.tolerate:.0%})."
    recipe_rows = [{"field": name, "value": json.dumps(value)} for name, value in recipe.to_json().items()]
    quality = [
        {"measure": name, **{kind: f"{value:.4g}" for kind, value in spread.items()}}
        for name, spread in report.certificate.items()
    ]
    seconds = [{"stage": stage, "seconds": f"{value:.1f}"} for stage, value in report.seconds.items()]
    parts = [
        f"# Ingest of {sources} into {report.lake}",
        outcome,
        "## Accounts",
        f"- {report.films.line()}\n- {report.clips.line()}\n- clips that left with changed films: {report.superseded}",
        f"## Recipe {recipe.name}",
        markdown_table(recipe_rows, ("field", "value")),
    ]
    if quality:
        parts += [
            "## Certificate of the clips",
            markdown_table(quality, ("measure", "clips", "worst", "median", "best")),
        ]
    parts += ["## Seconds by stage, summed over the workers", markdown_table(seconds, ("stage", "seconds"))]
    if report.failures:
        parts += [
            "## What could not be used",
            markdown_table(
                [failure.to_row() for failure in report.failures[:LISTED]],
                ("film", "stage", "status", "reason", "detail"),
            ),
            f"All {len(report.failures)} are in `{report.lake}/failures/{report.run_id}.parquet`.",
        ]
    return "\n\n".join(parts) + "\n"


def contact_sheet(lake: Lake, version: Version, clips: int = 12, frames: int = 8) -> bytes | None:
    """A PNG with `frames` frames of up to `clips` clips, spread over the films, captions above; None without previews.

    Raises what storage raises for a damaged shard.
    """
    from PIL import Image, ImageDraw, ImageFont

    from storage.shards import ShardReader

    rows = [row for row in read_manifest(lake, version, "clips").to_pylist() if row["preview"]]
    if not rows:
        return None
    rows = _spread(rows, clips)
    strips = []
    for row in rows:
        reader = ShardReader(lake, row["shard"])
        shown = np.asarray(reader.read(row["shard_row"], ["preview.npy"])["preview.npy"])
        strips.append(shown[np.linspace(0, len(shown) - 1, min(frames, len(shown))).round().astype(int)])
    height, width = strips[0].shape[1:3]
    shape = (max(1, round(width * THUMBNAIL / height)), THUMBNAIL)
    label, gap = 16, 2
    sheet = Image.new("RGB", (frames * (shape[0] + gap) + gap, len(rows) * (shape[1] + label + gap) + gap), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for number, (row, strip) in enumerate(zip(rows, strips, strict=True)):
        top = gap + number * (shape[1] + label + gap)
        text = f"{row['film']} at {row['clip_start']:g} s: {row['caption'] or 'no caption'}"
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
