"""The columns of the Parquet tables, their meaning, and the number of their format."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

FORMAT = 1
"""Number of the tables' format. A reader refuses a higher one; columns are only ever added, and one that an older table
lacks is read as unknown (`completed`)."""

FAILURE_STATUSES = ("failed", "filtered")


def _schema(table: str, fields: Sequence[tuple[str, pa.DataType, str]]) -> pa.Schema:
    return pa.schema(
        [pa.field(name, kind, nullable=False, metadata={"doc": doc}) for name, kind, doc in fields],
        metadata={"vlfm.table": table, "vlfm.format": str(FORMAT)},
    )


FILM_SCHEMA = _schema(
    "films",
    [
        ("film", pa.string(), "the name people see: path relative to its source, or another where that one is taken"),
        ("film_id", pa.string(), "first 16 digits of the content's sha256, empty where it was not read"),
        ("caption", pa.string(), "as given, empty where there is none"),
        ("bytes", pa.int64(), "size of the file"),
        ("modified_ns", pa.int64(), "time of the file's last change, nanoseconds since 1970"),
        ("sha256", pa.string(), "of the file's content, empty where it was not read"),
        ("status", pa.string(), "done, unchanged, filtered or failed"),
        ("reason", pa.string(), "a fixed word for filtered and failed, else empty"),
        ("detail", pa.string(), "one line for people, says the remedy"),
        ("clips", pa.int32(), "clips made from this film"),
        ("seconds", pa.float64(), "length of its video, NaN where unknown"),
        ("codec", pa.string(), "of its video, `latents` of imported ones, empty where unknown"),
        ("width", pa.int32(), "pixels, 0 where unknown"),
        ("height", pa.int32(), "pixels, 0 where unknown"),
        ("frame_rate", pa.float64(), "frames per second, NaN where unknown"),
        ("decoder", pa.string(), "version of the ffmpeg that read it, empty where unknown"),
        ("path", pa.string(), "where the file was when it was ingested, absolute; empty where unknown"),
        ("source", pa.string(), "the folder or table that named it, absolute, or its address; empty where unknown"),
    ],
)


@dataclass(frozen=True)
class Measure:
    """A figure of a clip's certificate, float64, NaN where it was not measured."""

    name: str
    unit: str
    """As it stands behind a figure; empty for plain numbers."""
    higher_is_better: bool
    doc: str


CONTENT = (
    Measure("short_side", " px", True, "shorter side of the film's frames before they are scaled"),
    Measure("film_seconds", " s", True, "length of the film's video"),
    Measure("black_frames", "", False, "share of the kept frames that are black"),
    Measure("static_frames", "", False, "share of the steps between kept frames in which nothing moves"),
    Measure("motion", "", True, "mean change of luma between kept frames, in levels of 255"),
    Measure("cuts", "", False, "cuts between kept frames"),
    Measure("duplicates", "", False, "clips of the dataset that came before with exactly the same frames"),
)
"""What a clip shows."""

CERTIFICATE = (
    Measure("psnr_codec", " dB", True, "decode(encode) against the frames, as stored"),
    Measure("ssim_codec", "", True, "the same, mean structural similarity of the luma"),
    Measure("psnr_vae", " dB", True, "the codec without inversion against the frames"),
    Measure("ssim_vae", "", True, "the same, mean structural similarity of the luma"),
    Measure("residual", "", False, "rms of the inversion's last fixed-point residual, worst frame and level"),
    Measure("latent_round_trip", " dB", True, "clean latents over what regeneration misses of them, worst frame"),
    Measure("psnr_projection", " dB", True, "decoded readout at observed times against the frames"),
    Measure("projection_error", "", False, "relative rms in latents at observed times"),
    Measure("heldout_error", "", False, "the same at unobserved kept frames, NaN where there are none"),
    Measure("smoothness", "", False, "sum |u_{k+1} - u_k|^2 / sum |u_k|^2 of the latents"),
    Measure("end_ratio", "", False, "rms m'(0) * mean gap / rms frame difference"),
    *CONTENT,
)
"""How well a clip went through codec and projection, and what it shows. A recipe's gates are bounds on these."""

_CERTIFICATE = [
    (measure.name, pa.float64(), f"{measure.doc}{measure.unit and ','}{measure.unit}") for measure in CERTIFICATE
]

CLIP_SCHEMA = _schema(
    "clips",
    [
        ("clip_id", pa.string(), "16 digits: film content, window and data recipe"),
        ("film_id", pa.string(), "16 digits of the film's content"),
        ("film", pa.string(), "path relative to its source"),
        ("caption", pa.string(), "may be empty"),
        ("caption_id", pa.string(), "16 digits of the caption's text"),
        ("clip_start", pa.float64(), "seconds from the film's first frame"),
        ("duration", pa.float64(), "seconds of the window, T"),
        ("split", pa.string(), "train or validation, by hash of the film"),
        ("frames", pa.int32(), "frames kept"),
        ("frames_observed", pa.int32(), "frames the projection saw"),
        ("shard", pa.string(), "name of its shard, <block_id>.tar"),
        ("shard_row", pa.int32(), "its sample's number in the shard, from 0"),
        ("array_row", pa.int64(), "its row in the group's arrays"),
        ("text_row", pa.int32(), "its caption's row in the group's texts"),
        ("order_used", pa.int32(), "coefficients that are not padding"),
        ("method_used", pa.string(), "projection method"),
        ("preview", pa.bool_(), "its frames are stored"),
        *_CERTIFICATE,
        ("frames_certified", pa.int32(), "frames that the codec's PSNR and SSIM are means of, 0 where unknown"),
        ("flags", pa.string(), "figures outside the recipe's gates, separated by spaces; empty where there are none"),
        ("frames_id", pa.string(), "16 digits of the kept frames' pixels, empty where unknown"),
    ],
)

REJECTED_SCHEMA = _schema(
    "rejected",
    [
        ("clip_id", pa.string(), "16 digits, as the clip would have in the dataset"),
        ("film", pa.string(), "path relative to its source"),
        ("clip_start", pa.float64(), "seconds from the film's first frame"),
        *_CERTIFICATE,
        ("frames_id", pa.string(), "16 digits of the kept frames' pixels, empty where unknown"),
    ],
)

FAILURE_SCHEMA = _schema(
    "failures",
    [
        ("film", pa.string(), "path relative to its source"),
        ("clip_id", pa.string(), "empty where the whole film is meant"),
        ("clip_start", pa.float64(), "seconds, NaN where the whole film is meant"),
        ("stage", pa.string(), "where it happened"),
        ("status", pa.string(), "failed or filtered"),
        ("reason", pa.string(), "a fixed snake_case word"),
        ("detail", pa.string(), "one clear line, says the remedy"),
    ],
)


def certificate_spread(rows: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Of each figure that was measured for any clip, in CERTIFICATE's order: clips, worst, median and best."""
    rows = list(rows)
    spread: dict[str, dict[str, float]] = {}
    for measure in CERTIFICATE:
        found = [row.get(measure.name) for row in rows]
        values = sorted(float(value) for value in found if value is not None and math.isfinite(value))
        if values:
            ends = (values[0], values[-1]) if measure.higher_is_better else (values[-1], values[0])
            middle = statistics.median(values)
            spread[measure.name] = {"clips": len(values), "worst": ends[0], "median": middle, "best": ends[1]}
    return spread


def table_of(rows: Iterable[Mapping[str, Any]] | pa.Table, schema: pa.Schema) -> pa.Table:
    """`rows` as a table of exactly `schema`, columns in its order.

    Raises:
        ValueError: a column is missing, unknown, of another type, or holds a null; the message names it.
    """
    name = schema.metadata[b"vlfm.table"].decode()
    if isinstance(rows, pa.Table):
        _check_columns(name, rows.column_names, schema)
        table = rows.select(schema.names).cast(schema)
    else:
        rows = list(rows)
        for row in rows:
            _check_columns(name, list(row), schema)
        try:
            table = pa.Table.from_pylist(rows, schema=schema)
        except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError) as error:
            raise ValueError(f"table of {name}: {_culprit(rows, schema)}{error}") from error
    for column in schema.names:
        if table.column(column).null_count:
            raise ValueError(
                f"table of {name}: column {column!r} holds a null; give a value (NaN for an unknown number)"
            )
    return table


def completed(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """A table that was read, with the columns that its writer did not know yet: NaN, 0, False or empty text."""
    for field in schema:
        if field.name not in table.column_names:
            values = pa.array([_unknown(field.type)] * table.num_rows, type=field.type)
            table = table.append_column(field, values)
    return table


def _unknown(kind: pa.DataType) -> float | int | bool | str:
    if pa.types.is_floating(kind):
        return math.nan
    if pa.types.is_boolean(kind):
        return False
    return 0 if pa.types.is_integer(kind) else ""


def check_format(schema: pa.Schema, table: str, path: object) -> None:
    """Make sure that a table that was read is `table` in a format this program knows.

    Raises:
        ValueError: it is another table, or of a newer format.
    """
    metadata = schema.metadata or {}
    found = metadata.get(b"vlfm.table", b"nothing we wrote").decode()
    if found != table:
        raise ValueError(f"{path} holds {found}, not the table of {table}")
    number = int(metadata[b"vlfm.format"])
    if number > FORMAT:
        raise ValueError(f"{path} has format {number}, this program reads up to {FORMAT}; install a newer vlfm")


def _check_columns(table: str, found: Sequence[str], schema: pa.Schema) -> None:
    if set(found) == set(schema.names):
        return
    missing, unknown = sorted(set(schema.names) - set(found)), sorted(set(found) - set(schema.names))
    raise ValueError(f"table of {table}: missing columns {missing}, unknown columns {unknown}; see storage/schema.py")


def _culprit(rows: Sequence[Mapping[str, Any]], schema: pa.Schema) -> str:
    """The first value its column cannot hold, in words."""
    for field in schema:
        for row in rows:
            try:
                pa.array([row[field.name]], type=field.type)
            except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
                return f"column {field.name!r} takes {field.type}, it was given {row[field.name]!r}; "
    return ""
