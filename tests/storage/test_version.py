from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pyarrow.parquet as pq
import pytest

from storage.change import orphans
from storage.fingerprint import bytes_digest, canonical_json, fingerprint
from storage.layout import DiskFull, Lake, LakeError
from storage.shards import ShardReader
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


@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in /proc")
def test_reading_tables_starts_no_threads(published: Lake) -> None:
    """Of a process that ends as soon as it has read them: a pool of threads that just begins then aborts it."""
    program = """
import os, sys
import pyarrow.parquet
from storage.layout import Lake
from storage.version import load, read_manifest
lake = Lake.open(sys.argv[1])
before = len(os.listdir("/proc/self/task"))
assert len(read_manifest(lake, load(lake))) == 6
print(len(os.listdir("/proc/self/task")) - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(published.root)],
        cwd=Path(__file__).resolve().parents[2], capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == "0\n"


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
    assert (list_versions(lake), orphans(lake), lake.store.clean(delete=False)) == ([1], [], [])
    filler.unlink()
    assert publish(lake, made)
