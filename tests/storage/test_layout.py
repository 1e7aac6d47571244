from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from storage.change import orphans
from storage.failures import read_failures, write_failures
from storage.layout import Lake, LakeBusy, LakeError, version_naming
from storage.repository import open_repository
from storage.shards import ShardReader, rebuild_index, write_shard
from storage.staging import read_block, remove_block, staged_blocks, write_block
from storage.store import Store
from storage.version import (
    list_versions,
    load,
    publish,
    read_empty_text,
    read_manifest,
    write_empty_text,
    write_manifest,
)


def test_create_then_open(tmp_path: Path) -> None:
    lake = Lake.create(tmp_path / "new" / "lake")
    assert Lake.open(lake.root) == lake == Lake.create(str(lake.root))
    assert {path.name for path in lake.root.iterdir()} == {
        "versions", "manifests", "shards", "texts", "staging", "failures"
    }  # fmt: skip


def test_open_says_how_a_lake_is_made(tmp_path: Path) -> None:
    with pytest.raises(LakeError, match="does not exist; make a lake with: vlfm ingest SOURCE --lake"):
        Lake.open(tmp_path / "none")
    with pytest.raises(LakeError, match=r"is no lake .* vlfm ingest"):
        Lake.open(tmp_path)


def test_create_leaves_other_peoples_folders_alone(tmp_path: Path) -> None:
    (tmp_path / "film.mp4").write_bytes(b"x")
    with pytest.raises(LakeError, match="holds other files and is no lake"):
        Lake.create(tmp_path)
    with pytest.raises(LakeError, match="is a file"):
        Lake.create(tmp_path / "film.mp4")
    assert [path.name for path in tmp_path.iterdir()] == ["film.mp4"]


def test_one_run_writes_at_a_time(lake: Lake) -> None:
    def again() -> None:
        with lake.writing():
            pass

    with lake.writing(), pytest.raises(LakeBusy, match=f"in use by process {os.getpid()}; wait until"):
        again()
    again()


def test_garbage_is_what_no_version_names(published: Lake) -> None:
    assert orphans(published) == []
    new = [published.shards / "dead.tar", published.shards / "dead.index.json", published.manifests / "7-clips.parquet"]
    unfinished = [published.staging / ".x.npz.abc.tmp", published.versions / ".2.json.abc.tmp"]
    for path in [*new, *unfinished]:
        path.write_bytes(b"")
    (published.staging / "kept.npz").write_bytes(b"")
    assert orphans(published) == sorted(path.relative_to(published.root).as_posix() for path in new)
    assert published.store.clean(delete=True) == [str(path) for path in unfinished]
    assert published.store.clean(delete=False) == []


def test_version_naming_wants_the_whole_name(published: Lake) -> None:
    shard = next(published.shards.glob("*.tar"))
    assert version_naming(published, f"shards/{shard.name}") == 1
    assert version_naming(published, f"shards/{shard.name[1:]}") is None


class Bucket:
    """A store on no local disk: everything the protocol has but a local path."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def __getattr__(self, name: str) -> Any:
        return getattr(self.store, name)

    def local_path(self, key: str = "") -> Path:
        raise LakeError(f"{self.store.address(key)} is on no local disk")


def test_a_lake_needs_a_local_disk_for_icechunk_only(published: Lake, sample_lake: ModuleType) -> None:
    first = load(published)
    rows, films = (read_manifest(published, first, name).to_pylist() for name in ("clips", "films"))
    lake = Lake(Bucket(published.store))
    with lake.writing():
        write_failures(lake, "run", [])
        write_block(lake, "block", {"x": np.zeros(3)}, {})
        assert read_block(lake, "block")[0]["x"].shape == (3,)
        assert staged_blocks(lake) == ["block"]
        remove_block(lake, "block")
        info = write_shard(lake, "new.tar", [sample_lake.sample(sample_lake.clip(9))])
        assert rebuild_index(lake, "new.tar") == info
        text = {**first.text, "empty": write_empty_text(lake, "other/clip", np.zeros((2, 3), np.float16))}
        manifest = write_manifest(lake, 2, rows, films)
        made = replace(first, number=2, parent=1, shards=(*first.shards, info), manifest=manifest, text=text)
        assert publish(lake, made)
    assert (load(lake), list_versions(lake)) == (made, [1, 2])
    assert read_manifest(lake, made).num_rows == 6
    assert read_empty_text(lake, made).shape == (2, 3)
    assert read_failures(lake, "run") == []
    assert len(ShardReader(lake, "new.tar")[0]) > 3
    for what in (lambda: lake.root, lambda: open_repository(lake)):
        with pytest.raises(LakeError, match="on no local disk"):
            what()
