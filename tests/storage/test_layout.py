from __future__ import annotations

import os
from pathlib import Path

import pytest

from storage.layout import Lake, LakeBusy, LakeError, version_naming


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
    assert published.garbage() == []
    new = [published.shards / "dead.tar", published.shards / "dead.index.json", published.manifests / "7-clips.parquet"]
    new += [published.versions / ".2.json.abc.tmp", published.staging / ".x.npz.abc.tmp"]
    for path in new:
        path.write_bytes(b"")
    (published.staging / "kept.npz").write_bytes(b"")
    assert sorted(published.garbage()) == sorted(new)


def test_version_naming_wants_the_whole_name(published: Lake) -> None:
    shard = next(published.shards.glob("*.tar"))
    assert version_naming(published, f"shards/{shard.name}") == 1
    assert version_naming(published, f"shards/{shard.name[1:]}") is None
