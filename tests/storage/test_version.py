from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pyarrow.parquet as pq
import pytest

from storage.fingerprint import bytes_digest, canonical_json, fingerprint
from storage.layout import DiskFull, Lake, LakeError
from storage.shards import ShardReader, rebuild_index, write_shard
from storage.verify import verify
from storage.version import (
    Version,
    latest,
    list_versions,
    load,
    publish,
    read_empty_text,
    read_manifest,
    samples_root,
    shards_root,
    write_empty_text,
    write_manifest,
)


def test_a_version_comes_back_as_it_was_published(lake: Lake, sample_lake: ModuleType) -> None:
    assert latest(lake) is None
    with pytest.raises(LakeError, match="has no version yet; make one with: vlfm ingest"):
        load(lake)
    first = sample_lake.publish_clips(lake, range(3))
    second = sample_lake.publish_clips(lake, range(3, 5))
    assert list_versions(lake) == [1, 2]
    assert (load(lake, 1), load(lake), latest(lake)) == (first, second, second)
    assert second.parent == 1
    with pytest.raises(LakeError, match="has no version 3; there are: 1, 2"):
        load(lake, 3)


def test_every_field_is_kept(published: Lake) -> None:
    version = load(published)
    body = json.loads((published.versions / "1.json").read_text())
    assert body.keys() == {item.name for item in dataclasses.fields(Version)} - {"extra"} | {"format", "checksum"}
    assert body["shards"] == [dataclasses.asdict(info) for info in version.shards]


def test_versions_are_time_travel(published: Lake, sample_lake: ModuleType) -> None:
    first = load(published, 1)
    second = sample_lake.publish_clips(published, range(6, 9))
    assert read_manifest(published, first).num_rows == 6
    assert read_manifest(published, second).num_rows == 9
    assert second.shards[: len(first.shards)] == first.shards
    assert verify(published, first) == verify(published, second) == []


def test_a_taken_number_changes_nothing(published: Lake) -> None:
    version = load(published)
    before = (published.versions / "1.json").read_bytes()
    assert not publish(published, dataclasses.replace(version, created="later"))
    assert (published.versions / "1.json").read_bytes() == before


def test_a_gap_is_refused(published: Lake) -> None:
    with pytest.raises(LakeError, match="version 3 cannot follow version 1; publish 2 next"):
        publish(published, dataclasses.replace(load(published), number=3))


def test_nothing_is_published_that_is_not_there(published: Lake) -> None:
    version = dataclasses.replace(load(published), number=2)
    shard = published.shards / version.shards[0].name
    os.truncate(shard, 512)
    with pytest.raises(LakeError, match=rf"names shards/{shard.name}, which is not as it says"):
        publish(published, version)
    shard.unlink()
    with pytest.raises(LakeError, match=rf"names shards/{shard.name}, which is not there"):
        publish(published, version)
    assert list_versions(published) == [1]


def test_a_damaged_version_file_is_named(published: Lake) -> None:
    path = published.versions / "1.json"
    whole = path.read_text()
    for damaged in (whole[:100], whole.replace('"linear"', '"linera"'), "[]", "{}", ""):
        path.write_text(damaged)
        with pytest.raises(LakeError, match=r"1\.json is damaged .*; restore it from a copy"):
            load(published)


def rewritten(path: Path, **changes: object) -> None:
    body = json.loads(path.read_text())
    body.pop("checksum")
    body |= changes
    path.write_text(canonical_json({**body, "checksum": fingerprint(body)}))


def test_fields_of_later_programs_are_kept_and_newer_formats_refused(published: Lake) -> None:
    rewritten(published.versions / "1.json", novelty=[1])
    assert load(published).extra == {"novelty": [1]}
    rewritten(published.versions / "1.json", format=99)
    with pytest.raises(LakeError, match="newer format than this program reads"):
        load(published)


def test_manifests_carry_schema_and_checksum(published: Lake, sample_lake: ModuleType) -> None:
    version = load(published)
    for name in ("clips", "films"):
        path = published.root / version.manifest[name]["path"]
        assert version.manifest[name]["sha256"] == bytes_digest(path.read_bytes())
        assert pq.read_schema(path).metadata[b"vlfm.format"] == b"1"
        assert read_manifest(published, version, name).num_rows == version.manifest[name]["rows"]
    with pytest.raises(ValueError, match="no table 'cilps'"):
        read_manifest(published, version, "cilps")
    with pytest.raises(LakeError, match=r"1-clips\.parquet belongs to version 1 and never changes"):
        write_manifest(published, 1, [], [])


def test_the_same_rows_give_the_same_manifest(lake: Lake, sample_lake: ModuleType) -> None:
    films = [sample_lake.film_row(3)]
    assert write_manifest(lake, 1, [], films) == write_manifest(lake, 1, [], films)


def test_the_empty_captions_embedding(published: Lake) -> None:
    version = load(published)
    embedding = read_empty_text(published, version)
    assert write_empty_text(published, "builtin/clip", embedding) == version.text["empty"]
    moved = np.nextafter(embedding, np.float16(np.inf))
    assert write_empty_text(published, "builtin/clip", moved) == version.text["empty"], "rounding is no other embedding"
    np.testing.assert_array_equal(read_empty_text(published, version), embedding)
    with pytest.raises(LakeError, match=r"by builtin/clip differs .* more than rounding \([0-9.]+ of its norm"):
        write_empty_text(published, "builtin/clip", embedding + np.float16(1))
    with pytest.raises(LakeError, match=r"more than rounding \(\(2, 8\) finite values now"):
        write_empty_text(published, "builtin/clip", np.full((2, 8), np.nan, np.float16))
    with pytest.raises(ValueError, match="not float16"):
        write_empty_text(published, "other", embedding.astype(np.float32))


def test_the_root_depends_on_samples_not_on_packing(published: Lake) -> None:
    version = load(published)
    pairs = [
        pair
        for info in version.shards
        for reader in [ShardReader(published, info.name)]
        for pair in zip(reader.keys, reader.digests, strict=True)
    ]
    assert samples_root(pairs) == samples_root(reversed(pairs)) == version.merkle_root
    assert shards_root(published, reversed(version.shards)) == version.merkle_root
    assert samples_root(pairs[1:]) != version.merkle_root


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
def test_verify_names_the_damaged_file_and_the_mend(published: Lake, kind: str) -> None:
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


def test_the_trainers_image_needs_neither_zarr_nor_icechunk(published: Lake) -> None:
    program = """
import sys
for name in ("zarr", "icechunk", "ray", "prefect", "webdataset", "torch"):
    sys.modules[name] = None
import storage.failures, storage.staging
from storage.layout import Lake
from storage.shards import ShardReader
from storage.verify import verify
from storage.version import load, read_empty_text, read_manifest
lake = Lake.open(sys.argv[1])
version = load(lake)
assert verify(lake, version, arrays=False) == []
assert ShardReader(lake, version.shards[0].name)[0]["coefficients.npy"].shape == (8, 3, 4, 4)
"""
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program, str(published.root)],
        cwd=root, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_a_full_disk(small_disk: Path, sample_lake: ModuleType) -> None:
    lake = Lake.create(small_disk / "lake")
    version = sample_lake.publish_clips(lake, range(3))
    rows = read_manifest(lake, version).to_pylist()
    filler = small_disk / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass
    with pytest.raises(DiskFull, match="bytes free") as caught:
        write_manifest(lake, 2, rows, [sample_lake.film_row(3)])
    assert caught.value.filename == str(lake.manifests / "2-clips.parquet")
    made = dataclasses.replace(version, number=2)
    with pytest.raises(DiskFull) as caught:
        publish(lake, made)
    assert caught.value.filename == str(lake.versions / "2.json")
    assert (list_versions(lake), lake.garbage()) == ([1], [])
    filler.unlink()
    assert publish(lake, made)
