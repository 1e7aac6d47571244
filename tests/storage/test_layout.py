from __future__ import annotations

import errno
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from storage.layout import (
    DiskFull,
    Lake,
    LakeBusy,
    LakeError,
    atomic_file,
    create_exclusive,
    naming_full_disk,
    version_naming,
    write_atomic,
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


def test_write_atomic_replaces_and_leaves_nothing_else(tmp_path: Path) -> None:
    write_atomic(tmp_path / "a", b"one")
    write_atomic(tmp_path / "a", b"two")
    assert (tmp_path / "a").read_bytes() == b"two"
    assert os.listdir(tmp_path) == ["a"]


def test_an_error_while_writing_leaves_the_old_file(tmp_path: Path) -> None:
    write_atomic(tmp_path / "a", b"old")

    def fail() -> None:
        with atomic_file(tmp_path / "a") as file:
            file.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert (tmp_path / "a").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]


def test_create_exclusive_never_replaces(tmp_path: Path) -> None:
    assert create_exclusive(tmp_path / "1.json", b"first")
    assert not create_exclusive(tmp_path / "1.json", b"second")
    assert (tmp_path / "1.json").read_bytes() == b"first"
    assert os.listdir(tmp_path) == ["1.json"]


def test_of_many_writers_one_wins_and_it_is_whole(tmp_path: Path) -> None:
    won: list[int] = []

    def race(number: int) -> None:
        if create_exclusive(tmp_path / "1.json", str(number).encode() * 1000):
            won.append(number)

    threads = [threading.Thread(target=race, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert (tmp_path / "1.json").read_bytes() == str(won[0]).encode() * 1000


def test_a_full_device_is_named() -> None:
    def fill() -> None:
        with naming_full_disk("/dev/full"), open("/dev/full", "wb", buffering=0) as file:
            file.write(b"x")

    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    with pytest.raises(DiskFull, match=r"bytes free.*make room and run the same command again") as caught:
        fill()
    assert caught.value.filename == "/dev/full"
    assert caught.value.errno == errno.ENOSPC


def test_a_full_disk_leaves_no_half_file_and_no_temporary(small_disk: Path) -> None:
    write_atomic(small_disk / "a", b"old")
    with pytest.raises(DiskFull) as caught:
        write_atomic(small_disk / "a", bytes(4 << 20))
    assert caught.value.filename == str(small_disk / "a")
    assert f"{caught.value.free} bytes free" in str(caught.value)
    with pytest.raises(DiskFull):
        create_exclusive(small_disk / "b", bytes(4 << 20))
    assert (small_disk / "a").read_bytes() == b"old"
    assert os.listdir(small_disk) == ["a"]


def test_a_full_disk_is_told_across_processes() -> None:
    error = DiskFull("/a/b", 5)
    copy = pickle.loads(pickle.dumps(error))  # noqa: S301
    assert (type(copy), copy.filename, copy.free, str(copy)) == (DiskFull, "/a/b", 5, str(error))


def test_other_errors_keep_their_name(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_atomic(tmp_path / "no" / "a", b"")


def test_one_run_writes_at_a_time(lake: Lake) -> None:
    def again() -> None:
        with lake.writing():
            pass

    with lake.writing(), pytest.raises(LakeBusy, match=f"in use by process {os.getpid()}; wait until"):
        again()
    again()


def test_the_lock_goes_with_a_killed_process(lake: Lake) -> None:
    program = (
        "import os, sys; from storage.layout import Lake\n"
        "with Lake.open(sys.argv[1]).writing(): os.kill(os.getpid(), 9)"
    )
    root = Path(__file__).resolve().parents[2]
    ended = subprocess.run([sys.executable, "-c", program, str(lake.root)], cwd=root, check=False)
    assert ended.returncode == -9
    with lake.writing():
        pass


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
    assert version_naming(shard) == 1
    assert version_naming(shard.with_name(shard.name[1:])) is None
