"""The store in a folder of a local disk, and the only two ways a file gets into it.

A file is written under a temporary name, brought to the disk (fsync) and renamed (`atomic_file`), or linked
where nothing may be there before (`create_exclusive`); then its folder is fsynced too. A crash may leave temporary
files; their names start with a dot, and they are never read or listed. A lease is a lock on `.<name>.lock`.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from storage.store import DiskFull, LakeBusy, LakeError, check_key, check_lease, check_prefix
from storage.turns import turn

TEMPORARY_SUFFIX = ".tmp"
_ICECHUNK = re.compile(r"#[0-9]+$")
"""How Icechunk's own store ends the name of a file that it is still writing."""


@dataclass(frozen=True)
class LocalStore:
    """A `Store` in the folder `root`. Folders below it are made as keys need them; `root` itself has to be there."""

    root: Path

    def __reduce__(self) -> tuple[type[LocalStore], tuple[Path]]:
        # A worker on another machine, or of a cluster started elsewhere, has another working folder.
        return LocalStore, (self.root.absolute(),)

    def address(self, key: str = "") -> str:
        return str(self.local_path(key))

    def create(self, folders: Sequence[str]) -> None:
        root, first = self.root, self.root / folders[0]
        if root.exists() and not first.is_dir():
            if not root.is_dir():
                raise LakeError(f"{root} is a file, not a folder; name a new folder for the lake")
            if any(not entry.name.startswith(".") for entry in root.iterdir()):
                raise LakeError(f"{root} holds other files and is no lake; name a new or an empty folder")
        with naming_full_disk(root):
            # The first one comes first: it is what makes a folder a lake.
            for folder in folders:
                (root / folder).mkdir(parents=True, exist_ok=True)

    def check(self, folders: Sequence[str]) -> None:
        if not (self.root / folders[0]).is_dir():
            what = f"is no lake (it has no {folders[0]}/ folder)" if self.root.exists() else "does not exist"
            raise LakeError(f"{self.root} {what}; make a lake with: vlfm ingest SOURCE --lake {self.root}")

    def size(self, key: str) -> int | None:
        path = self.local_path(check_key(key))
        return path.stat().st_size if path.is_file() else None

    def read(self, key: str, start: int = 0, stop: int | None = None) -> bytes:
        with self.open_read(key) as file:
            size = os.fstat(file.fileno()).st_size
            end = size if stop is None else stop
            if not 0 <= start <= end <= size:
                raise ValueError(f"{self.address(key)} has {size} bytes; {start} to {end} is no range of them")
            file.seek(start)
            return file.read(end - start)

    def open_read(self, key: str) -> BinaryIO:
        path = self.local_path(check_key(key))
        try:
            return open(path, "rb")
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path)) from None

    def write(self, key: str, data: bytes) -> None:
        with self.open_write(key) as file:
            file.write(data)

    @contextlib.contextmanager
    def open_write(self, key: str) -> Iterator[BinaryIO]:
        with atomic_file(self._place(key)) as file:
            yield file

    def create_exclusive(self, key: str, data: bytes) -> bool:
        """As the protocol has it: `link()` fails where the name exists, so exactly one writer wins."""
        path = self._place(key)
        temporary = _temporary(path)
        try:
            with naming_full_disk(path):
                with open(temporary, "xb") as file:
                    file.write(data)
                    _fsync(file)
                try:
                    os.link(temporary, path)
                except FileExistsError:
                    return False
                except OSError as error:
                    if error.errno in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
                        raise LakeError(
                            f"{path.parent} is on a file system without hard links; use another disk"
                        ) from error
                    raise
                fsync_path(path.parent)
                return True
        finally:
            temporary.unlink(missing_ok=True)

    def list_keys(self, prefix: str = "") -> list[str]:
        folder = check_prefix(prefix).rpartition("/")[0]
        found = []
        for where, folders, files in os.walk(self.root / folder, onerror=_raise_unless_missing):
            folders[:] = [name for name in folders if not name.startswith(".")]
            inside = Path(where).relative_to(self.root)
            found += [(inside / name).as_posix() for name in files if not name.startswith(".")]
        return sorted(key for key in found if key.startswith(prefix))

    def sizes(self, prefix: str = "") -> dict[str, int]:
        sizes = {}
        for key in self.list_keys(prefix):
            with contextlib.suppress(FileNotFoundError):  # deleted since
                sizes[key] = (self.root / key).stat().st_size
        return sizes

    def tags(self, prefix: str = "") -> dict[str, str]:
        return dict.fromkeys(self.list_keys(prefix), "")

    def delete(self, key: str) -> None:
        path = self.local_path(check_key(key))
        if not path.is_dir():
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                path.unlink()

    def clean(self, delete: bool) -> list[str]:
        found = [
            Path(where, name)
            for where, _, files in os.walk(self.root)
            for name in files
            if (name.startswith(".") and name.endswith(TEMPORARY_SUFFIX)) or _ICECHUNK.search(name)
        ]
        for path in found if delete else ():
            path.unlink(missing_ok=True)
        return sorted(str(path) for path in found)

    @contextlib.contextmanager
    def lease(self, name: str, wait: bool = False) -> Iterator[None]:
        """As the protocol has it. The system releases the lock with the process that holds it, whatever ends it.

        Those that wait have their turns in order of arrival.
        """
        path = self.root / f".{check_lease(name)}.lock"
        with naming_full_disk(path):
            file = open(path, "a+", encoding="ascii")  # noqa: SIM115 (closed below; a full disk is named for it only)
        with file:
            try:
                with naming_full_disk(path), turn(self.root, name) if wait else contextlib.nullcontext():
                    fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError as error:
                file.seek(0)
                holder = _holder(file.read())
                raise LakeBusy(f"{self.root} is in use{holder}; wait until that run ends, or stop it") from error
            file.truncate(0)
            file.write(json.dumps({"process": os.getpid()}))
            file.flush()
            yield

    def local_path(self, key: str = "") -> Path:
        return self.root / check_key(key) if key else self.root

    def cache(self) -> None:
        return None

    def _place(self, key: str) -> Path:
        """The path of a key that is about to be written, its folder made."""
        path = self.local_path(check_key(key))
        folder = path.parent
        if not folder.is_dir():
            if not self.root.is_dir():
                # Never made here: where a disk is not mounted, its folder would be filled on another one.
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self.root))
            with naming_full_disk(folder):
                folder.mkdir(parents=True, exist_ok=True)
            while folder != self.root:
                folder = folder.parent
                fsync_path(folder)
        return path


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write into that appears under `path` when the block ends well, whole and on disk, or not at all.

    Raises:
        DiskFull: no room; nothing stays behind.
        FileNotFoundError: the folder is missing.
    """
    temporary = _temporary(path)
    try:
        with naming_full_disk(path):
            with open(temporary, "xb") as file:
                yield file
                _fsync(file)
            os.replace(temporary, path)
            fsync_path(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_atomic(path: Path, data: bytes) -> None:
    """Write `data` to `path`, replacing what is there, whole or not at all. Raises as `atomic_file` does."""
    with atomic_file(path) as file:
        file.write(data)


def fsync_path(path: Path) -> None:
    """Bring a file, or a folder's entries, to the disk: a rename or a link is safe there only when its folder is."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def naming_full_disk(path: str | Path) -> Iterator[None]:
    """Turn "no space left" and "quota exceeded" within the block into `DiskFull` with the file's name."""
    try:
        yield
    except DiskFull:
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull(path, free_bytes(path)) from error
        raise


def free_bytes(path: str | Path) -> int:
    """Bytes free on the disk that holds `path` (or would hold it)."""
    folder = Path(path).absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _holder(text: str) -> str:
    try:
        return f" by process {int(json.loads(text)['process'])}"
    except (ValueError, KeyError, TypeError):
        return ""


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(6)}{TEMPORARY_SUFFIX}")


def _fsync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _raise_unless_missing(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise error
