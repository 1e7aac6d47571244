"""Garbage: a dry run changes nothing, what versions need stays bit for bit, and many small refreshes leave no trace."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from storage import staging
from storage.arrays import read_clips
from storage.garbage import collect, find_garbage, lake_bytes
from storage.layout import Lake, LakeError
from storage.verify import verify
from storage.version import list_versions, load, read_manifest
from tests.storage.film_lake import RECIPE, Film, publish

FILMS = [Film(f"film-{number}.mp4", f"content {number}", f"caption {number % 3}", 1) for number in range(8)]


def refreshed(folder: Path, counts: range) -> Lake:
    """A lake whose n-th version holds the first n films."""
    lake = Lake.create(folder)
    for count in counts:
        publish(lake, FILMS[:count])
    return lake


def files(lake: Lake) -> dict[str, bytes]:
    return {key: lake.store.read(key) for key in lake.store.list_keys()}


def sound(lake: Lake) -> None:
    for number in list_versions(lake):
        assert verify(lake, load(lake, number)) == []


def test_many_small_refreshes_end_at_the_size_of_a_fresh_lake(tmp_path: Path) -> None:
    lake = refreshed(tmp_path / "lake", range(1, 7))
    fresh = refreshed(tmp_path / "fresh", range(6, 7))
    before = files(lake)
    with lake.writing():
        found = find_garbage(lake, keep=1)
        assert files(lake) == before, "a dry run"
        assert (found.expired, found.snapshots, found.rows) == (tuple(range(1, 6)), 5, 0)
        assert lake_bytes(lake) > 2 * lake_bytes(fresh)
        _, freed = collect(lake, keep=1)
        assert find_garbage(lake, keep=1).empty
    assert freed == sum(map(len, before.values())) - lake_bytes(lake)
    assert lake_bytes(lake) <= 1.2 * lake_bytes(fresh)
    assert list_versions(lake) == [6]
    sound(lake)


def test_kept_versions_keep_every_byte(tmp_path: Path) -> None:
    lake = refreshed(tmp_path / "lake", range(1, 5))
    publish(lake, FILMS[4:6], {**RECIPE, "rate": 8})
    publish(lake, FILMS[2:4])
    before, versions = files(lake), [load(lake, number) for number in list_versions(lake)]
    with lake.writing():
        collect(lake, keep=3)
    sound(lake)
    assert list_versions(lake) == [4, 5, 6]
    for old, new in zip(versions[3:], [load(lake, n) for n in (4, 5, 6)], strict=True):
        assert (new.merkle_root, new.shards, new.manifest) == (old.merkle_root, old.shards, old.manifest)
        for shard in new.shards:
            assert lake.store.read(f"shards/{shard.name}") == before[f"shards/{shard.name}"]
    # What was expired is gone from the arrays too, and can be published again.
    with lake.writing():
        collect(lake, keep=1)
    newest = load(lake)
    assert (read_clips(lake, newest.snapshot, newest.group)["clip_id"] != "\0" * 16).sum() == len(
        read_manifest(lake, newest)
    )
    publish(lake, FILMS[:4])
    sound(lake)


def test_without_a_number_no_version_goes(tmp_path: Path) -> None:
    lake = refreshed(tmp_path / "lake", range(1, 4))
    known = {"block": [FILMS[0].clip_id(0, RECIPE)]}
    staging.write_block(lake, "done", {"latents": np.zeros(2)}, known)
    staging.write_block(lake, "wanted", {}, {"block": ["0" * 16]})
    staging.write_block(lake, "wanted-part", {}, {"block": ["0" * 16]})
    lake.store.write("staging/damaged.npz", b"no archive")
    lake.store.write("shards/dead.tar", b"dead")
    (lake.root / "manifests" / ".x.abc.tmp").write_bytes(b"half")
    with lake.writing():
        found = find_garbage(lake)
        assert found.expired == ()
        assert set(found.blocks) == {"done", "wanted-part", "damaged"}
        assert found.orphans == ("shards/dead.tar", str(lake.root / "manifests" / ".x.abc.tmp"))
        assert found.runs == ("20260101T000000Z-abcdef", "20260102T000000Z-abcdef"), "empty ones; the newest stays"
        collect(lake)
        assert lake.store.list_keys("staging/") == ["staging/wanted.npz"]
        assert set(find_garbage(lake, staged=True).blocks) == {"wanted"}
    assert list_versions(lake) == [1, 2, 3]
    assert not (lake.root / "manifests" / ".x.abc.tmp").exists()
    sound(lake)


def test_what_is_damaged_is_not_collected(tmp_path: Path) -> None:
    lake = refreshed(tmp_path / "lake", range(1, 3))
    (lake.versions / "1.json").write_text("{}")
    before = files(lake)
    with lake.writing():
        with pytest.raises(LakeError, match=r"1\.json is damaged"):
            collect(lake)
        with pytest.raises(LakeError, match="keep at least 1"):
            collect(lake, keep=0)
    assert files(lake) == before


def test_a_lake_without_versions(tmp_path: Path) -> None:
    lake = Lake.create(tmp_path / "lake")
    lake.store.write("shards/dead.tar", b"dead")
    with lake.writing():
        assert collect(lake)[1] == 4
        assert find_garbage(lake).empty
    shutil.rmtree(lake.root)
