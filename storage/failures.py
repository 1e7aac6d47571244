"""What a run could not do: one small table per run, so that a failure is a row and not a lost log line."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Mapping
from typing import Any

from storage.layout import Lake
from storage.schema import FAILURE_SCHEMA, FAILURE_STATUSES, check_format, table_of


def write_failures(lake: Lake, run_id: str, rows: Iterable[Mapping[str, Any]]) -> str:
    """Write the run's table (columns of FAILURE_SCHEMA), replacing an earlier one: its key, failures/<run_id>.parquet.

    No rows make an empty table: the run has looked and nothing failed.

    Raises:
        ValueError: a row does not fit the schema, its status is unknown, or its reason is no snake_case word.
        DiskFull: no room.
    """
    import pyarrow.parquet as pq

    rows = list(rows)
    key = failures_key(run_id)
    table = table_of(rows, FAILURE_SCHEMA)
    for row in rows:
        if row["status"] not in FAILURE_STATUSES:
            raise ValueError(f"failure of {row['film']}: status {row['status']!r} is none of {FAILURE_STATUSES}")
        if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", row["reason"]):
            raise ValueError(f"failure of {row['film']}: reason {row['reason']!r} is no snake_case word")
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    lake.store.write(key, buffer.getvalue())
    return key


def read_failures(lake: Lake, run_id: str) -> list[dict[str, Any]]:
    """The rows of a run's table, in the order they were written.

    Raises:
        FileNotFoundError: the run left none; the message lists the runs there are.
        ValueError: the file is not such a table.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    key = failures_key(run_id)
    path = lake.store.address(key)
    try:
        table = pq.ParquetFile(pa.BufferReader(lake.store.read(key))).read(use_threads=False)
    except FileNotFoundError:
        keys = [key for key in lake.store.list_keys("failures/") if key.endswith(".parquet")]
        known = ", ".join(key.removeprefix("failures/").removesuffix(".parquet") for key in keys) or "none"
        folder = lake.store.address("failures")
        raise FileNotFoundError(
            f"no failures table of run {run_id!r} in {folder}; the runs with one: {known}"
        ) from None
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path} is no Parquet file ({error}); delete it, the next run writes its own") from error
    check_format(table.schema, "failures", path)
    return list(table.to_pylist())


def failures_key(run_id: str) -> str:
    """The key of a run's table.

    Raises:
        ValueError: the id could not be a file's name.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", run_id):
        raise ValueError(f"run id {run_id!r}: use letters, digits, '-', '_' and '.' only")
    return f"failures/{run_id}.parquet"
