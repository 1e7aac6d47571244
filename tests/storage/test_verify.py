"""Verification finds every damage, names the file and says the remedy."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from storage.layout import Lake
from storage.shards import ShardReader, rebuild_index, write_shard
from storage.verify import verify
from storage.version import Version, load, publish, read_manifest, write_manifest


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def shard_of(lake: Lake) -> Path:
    return lake.shards / load(lake).shards[0].name


def largest_chunk(lake: Lake) -> Path:
    return max((lake.arrays / "chunks").iterdir(), key=lambda path: path.stat().st_size)


DAMAGE: dict[str, tuple[Callable[[Lake], object], str]] = {
    "missing shard": (lambda lake: shard_of(lake).unlink(), "{shard} is missing; restore it"),
    "truncated shard": (lambda lake: os.truncate(shard_of(lake), 2048), "{shard} is truncated"),
    "flipped shard": (lambda lake: flip(shard_of(lake), 700), "{shard}: wrong checksum; restore it"),
    "missing index": (
        lambda lake: shard_of(lake).with_suffix(".index.json").unlink(),
        "{stem}.index.json is missing; make it anew",
    ),
    "missing clips": (lambda lake: (lake.manifests / "1-clips.parquet").unlink(), "1-clips.parquet is missing"),
    "flipped films": (lambda lake: flip(lake.manifests / "1-films.parquet", 60), "1-films.parquet: wrong checksum"),
    "flipped text": (lambda lake: flip(next(lake.texts.iterdir()), -1), "empty.npy: wrong checksum"),
    "missing arrays": (lambda lake: lake.arrays.rename(lake.root / "gone"), "arrays is missing; restore"),
    "flipped array": (lambda lake: flip(largest_chunk(lake), 20), "arrays: a chunk is damaged"),
    "missing chunk": (lambda lake: largest_chunk(lake).unlink(), "arrays"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_the_damaged_file_is_named_and_the_remedy(published: Lake, kind: str) -> None:
    version, shard = load(published), shard_of(published)
    assert verify(published, version) == []
    damage, message = DAMAGE[kind]
    damage(published)
    problems = verify(published, version)
    expected = message.format(shard=shard.name, stem=shard.stem)
    assert any(expected in problem for problem in problems), problems
    assert all(";" in problem for problem in problems), problems  # what is wrong; what to do


def test_another_shard_under_the_same_name_is_found(published: Lake, sample_lake: ModuleType) -> None:
    version, shard = load(published), shard_of(published)
    entries = [sample_lake.clip(number) for number in range(20, 24)]
    elsewhere = Lake.create(published.root / "elsewhere")
    other = write_shard(elsewhere, shard.name, (sample_lake.sample(entry) for entry in entries))
    (elsewhere.shards / shard.name).replace(shard)
    rebuild_index(published, shard.name)
    assert ShardReader(published, shard.name).info == other
    problems = verify(published, version, arrays=False)
    for expected in ("is not the shard that version 1 names", "Merkle root", "is not row 0 of", "lacks clip"):
        assert any(expected in problem for problem in problems), problems


def republished(lake: Lake, change: Callable[[list[dict[str, object]]], object]) -> Version:
    """Version 2: the table of clips changed, and everything else as in version 1."""
    version = load(lake)
    rows = read_manifest(lake, version).to_pylist()
    films = read_manifest(lake, version, "films")
    change(rows)
    made = dataclasses.replace(version, number=2, parent=1, manifest=write_manifest(lake, 2, rows, films))
    assert publish(lake, made)
    return made


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows[0].update(array_row=1), "row 1 is clip"),
        (lambda rows: rows[0].update(array_row=99), "has 6 rows, not row 99 of clip"),
        (lambda rows: rows[0].update(text_row=0), "has text 1, the manifest says 0"),
        (lambda rows: rows[0].update(shard_row=1), "is not row 1 of"),
        (lambda rows: rows[0].update(shard="other.tar"), "which version 2 does not name"),
        (lambda rows: rows.append(dict(rows[0])), "a clip id occurs twice"),
        (lambda rows: rows.pop(), "lacks clip"),
    ],
)
def test_the_stores_are_compared_row_by_row(
    published: Lake, change: Callable[[list[dict[str, object]]], object], message: str
) -> None:
    problems = verify(published, republished(published, change))
    assert any(message in problem for problem in problems), problems


def test_coefficients_that_differ_between_the_stores_are_found(lake: Lake, sample_lake: ModuleType) -> None:
    whole = sample_lake.columns

    def wrong(entries: list[dict[str, object]]) -> dict[str, object]:
        columns = whole(entries)
        columns["coefficients"][2, 0] += np.float16(0.5)
        return columns

    sample_lake.columns = wrong
    try:
        version = sample_lake.publish_clips(lake, range(4))
    finally:
        sample_lake.columns = whole
    clip = sample_lake.clip(2)["clip_id"]
    where = f"{lake.arrays} ({version.group}), row 2"
    assert [problem.split(";")[0] for problem in verify(lake, version)] == [
        f"{where}: coefficients of clip {clip} differ from those in {version.shards[0].name}"
    ]
