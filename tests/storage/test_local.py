"""The local store: the contract of every store, and what is its own: temporary files, modes, locks, a full disk."""

from __future__ import annotations

import errno
import os
import pickle
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from storage.local import TEMPORARY_SUFFIX, LocalStore, atomic_file, naming_full_disk, write_atomic
from storage.store import DiskFull, LakeError, Store
from tests.storage.store_contract import StoreContract


class TestLocalStore(StoreContract):
    @pytest.fixture
    def store(self, tmp_path: Path) -> Store:
        (tmp_path / "store").mkdir()
        return LocalStore(tmp_path / "store")

    @pytest.fixture
    def full_store(self, small_disk: Path) -> Store:
        return LocalStore(small_disk)

    def raw_read(self, store: LocalStore, key: str) -> bytes | None:
        path = store.root / key
        return path.read_bytes() if path.exists() else None

    def raw_write(self, store: LocalStore, key: str, data: bytes) -> None:
        path = store.root / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    def raw_everything(self, store: LocalStore) -> set[str]:
        paths = [path for path in store.root.rglob("*") if path.is_file() and path.suffix != ".lock"]
        return {path.relative_to(store.root).as_posix() for path in paths}


def test_files_have_the_modes_that_others_expect(tmp_path: Path) -> None:
    """A temporary file of the standard library's would be for its owner alone; trainers run as other users."""
    store = LocalStore(tmp_path)
    before = os.umask(0o027)
    try:
        store.write("a/b", b"")
        store.create_exclusive("a/c", b"")
    finally:
        os.umask(before)
    assert [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("a/b", "a/c", "a")] == [0o640, 0o640, 0o750]


def test_a_relative_folder_is_the_same_one_in_another_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker on another machine, or of a cluster started elsewhere, has another working folder."""
    monkeypatch.chdir(tmp_path)
    store = LocalStore(Path("store"))
    assert store.address("a") == "store/a", "as it was given, in messages"
    assert pickle.loads(pickle.dumps(store)) == LocalStore(tmp_path / "store")  # noqa: S301


def test_every_change_is_brought_to_the_disk_before_it_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def noted(name: str, place: Callable[..., str]) -> None:
        true = getattr(os, name)

        def note(*given: Any) -> Any:
            calls.append(f"{name} {place(*given)}")
            return true(*given)

        monkeypatch.setattr(os, name, note)

    def opened(handle: int) -> str:
        name = os.path.relpath(os.readlink(f"/proc/self/fd/{handle}"), tmp_path)
        return "temporary" if name.endswith(TEMPORARY_SUFFIX) else name

    if not Path("/proc/self/fd").exists():
        pytest.skip("this system does not say which file a handle is of")
    noted("fsync", opened)
    noted("replace", lambda old, new: os.path.relpath(new, tmp_path))
    noted("link", lambda old, new: os.path.relpath(new, tmp_path))
    store = LocalStore(tmp_path)
    store.write("a/b/c", b"x")
    assert calls == ["fsync a", "fsync .", "fsync temporary", "replace a/b/c", "fsync a/b"]
    calls.clear()
    store.create_exclusive("a/d", b"x")
    assert calls == ["fsync temporary", "link a/d", "fsync a"]


def test_a_store_whose_folder_is_gone_is_not_made_again(tmp_path: Path) -> None:
    """Or a lake on a disk that is not mounted would be filled on another one."""
    store = LocalStore(tmp_path / "gone")
    with pytest.raises(FileNotFoundError) as caught:
        store.write("versions/1.json", b"x")
    assert caught.value.filename == str(tmp_path / "gone")
    assert os.listdir(tmp_path) == []


def test_a_file_system_without_hard_links_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(LakeError, match="is on a file system without hard links; use another disk"):
        LocalStore(tmp_path).create_exclusive("a", b"x")
    assert os.listdir(tmp_path) == []


def test_a_folder_that_cannot_be_read_is_not_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError, match="versions"):
        LocalStore(tmp_path).list_keys("versions/")


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


def test_a_disk_that_is_full_when_a_turn_is_drawn_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found by `tests.bench.chaos --matrix`: it was told as a bare error of the system's."""

    def none_left(root: Path, name: str) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(root))

    monkeypatch.setattr("storage.local.turn", none_left)
    with pytest.raises(DiskFull, match="arrays"), LocalStore(tmp_path).lease("arrays", wait=True):
        pass


def test_a_full_disk_leaves_no_half_file_and_no_temporary(small_disk: Path) -> None:
    write_atomic(small_disk / "a", b"old")
    with pytest.raises(DiskFull) as caught:
        write_atomic(small_disk / "a", bytes(4 << 20))
    assert caught.value.filename == str(small_disk / "a")
    assert f"{caught.value.free} bytes free" in str(caught.value)
    assert (small_disk / "a").read_bytes() == b"old"
    assert os.listdir(small_disk) == ["a"]


def test_a_full_disk_is_told_across_processes() -> None:
    error = DiskFull("/a/b", 5)
    copy = pickle.loads(pickle.dumps(error))  # noqa: S301
    assert (type(copy), copy.filename, copy.free, str(copy)) == (DiskFull, "/a/b", 5, str(error))


def test_other_errors_keep_their_name(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_atomic(tmp_path / "no" / "a", b"")
