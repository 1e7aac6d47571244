"""The columns of the Parquet tables, their meaning, and the number of their format."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pyarrow as pa

FORMAT = 1
"""Number of the tables' format. A reader refuses a higher one; columns are only ever added."""

FILM_STATUSES = ("done", "unchanged", "filtered", "failed")
FAILURE_STATUSES = ("failed", "filtered")
SPLITS = ("train", "validation")


def _schema(table: str, fields: Sequence[tuple[str, pa.DataType, str]]) -> pa.Schema:
    return pa.schema(
        [pa.field(name, kind, nullable=False, metadata={"doc": doc}) for name, kind, doc in fields],
        metadata={"vlfm.table": table, "vlfm.format": str(FORMAT)},
    )


FILM_SCHEMA = _schema(
    "films",
    [
        ("film", pa.string(), "path relative to its source, the name people see"),
        ("film_id", pa.string(), "first 16 digits of the content's sha256, empty where it was not read"),
        ("caption", pa.string(), "as given, empty where there is none"),
        ("bytes", pa.int64(), "size of the file"),
        ("modified_ns", pa.int64(), "time of the file's last change, nanoseconds since 1970"),
        ("sha256", pa.string(), "of the file's content, empty where it was not read"),
        ("status", pa.string(), "done, unchanged, filtered or failed"),
        ("reason", pa.string(), "a fixed word for filtered and failed, else empty"),
        ("detail", pa.string(), "one line for people, says the mend"),
        ("clips", pa.int32(), "clips made from this film"),
        ("seconds", pa.float64(), "length of its video, NaN where unknown"),
        ("codec", pa.string(), "of its video, empty where unknown"),
        ("width", pa.int32(), "pixels, 0 where unknown"),
        ("height", pa.int32(), "pixels, 0 where unknown"),
        ("frame_rate", pa.float64(), "frames per second, NaN where unknown"),
    ],
)

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
        ("psnr_codec", pa.float64(), "decode(encode) against the frames, dB"),
        ("psnr_projection", pa.float64(), "decoded readout at observed times against the frames, dB"),
        ("projection_error", pa.float64(), "relative rms in latents at observed times"),
        ("heldout_error", pa.float64(), "the same at unobserved kept frames, NaN where there are none"),
        ("smoothness", pa.float64(), "sum |u_{k+1} - u_k|^2 / sum |u_k|^2"),
        ("end_ratio", pa.float64(), "rms m'(0) * mean gap / rms frame difference"),
        ("preview", pa.bool_(), "its frames are stored"),
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
        ("detail", pa.string(), "one clear line, says the mend"),
    ],
)


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
