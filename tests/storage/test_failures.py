from __future__ import annotations

import math

import pytest

from storage.failures import read_failures, write_failures
from storage.layout import Lake

ROW = {
    "film": "a/b.mp4", "clip_id": "", "clip_start": float("nan"), "stage": "decode", "status": "failed",
    "reason": "truncated_film", "detail": "ends after 3 frames; copy the film again",
}  # fmt: skip


def test_rows_come_back_in_order(lake: Lake) -> None:
    rows = [ROW, {**ROW, "clip_id": "0" * 16, "clip_start": 2.0, "status": "filtered", "reason": "still"}]
    path = write_failures(lake, "run-1", rows)
    assert path == "failures/run-1.parquet"
    found = read_failures(lake, "run-1")
    assert math.isnan(found[0].pop("clip_start"))
    assert found == [{key: value for key, value in ROW.items() if key != "clip_start"}, rows[1]]


def test_a_run_without_failures_leaves_an_empty_table(lake: Lake) -> None:
    write_failures(lake, "run-1", [])
    assert read_failures(lake, "run-1") == []
    with pytest.raises(FileNotFoundError, match=r"no failures table of run 'run-2'.* run-1"):
        read_failures(lake, "run-2")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"status": "lost"}, "status 'lost' is none of"),
        ({"reason": "Truncated film"}, "is no snake_case word"),
        ({"stage": None}, "column 'stage' holds a null"),
    ],
)
def test_rows_that_do_not_fit_are_refused(lake: Lake, change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write_failures(lake, "run-1", [{**ROW, **change}])
    assert not list(lake.failures.iterdir())


def test_a_damaged_table_is_named(lake: Lake) -> None:
    path = lake.root / write_failures(lake, "run-1", [ROW])
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ValueError, match=r"run-1\.parquet is no Parquet file"):
        read_failures(lake, "run-1")


def test_run_ids_stay_in_their_folder(lake: Lake) -> None:
    with pytest.raises(ValueError, match="run id"):
        write_failures(lake, "../versions/1", [])
