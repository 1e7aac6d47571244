"""The lake's folders, and the only two ways a file gets into them.

    versions/<n>.json          one immutable file per version, written last: the only commit point
    manifests/                 <n>-clips.parquet, <n>-films.parquet, <n>-rejected.parquet
    shards/                    <block_id>.tar and <block_id>.index.json
    arrays/                    the Icechunk repository
    texts/                     <text_id>-empty.npy, the empty caption's embedding
    staging/<block_id>.npz     finished blocks that no version has yet
    failures/<run_id>.parquet  what each run could not do, and why

A file is written under a temporary name, forced to disk and renamed (`atomic_file`), or linked where nothing may be
there before (`create_exclusive`). After a crash there may be temporary files; they are garbage and never read.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from storage.errors import Kind, VlfmError

TEMPORARY_SUFFIX = ".tmp"


class LakeError(VlfmError):
    """A folder is no lake, or a lake cannot be used as asked. The message says the remedy."""


class LakeBusy(LakeError):
    """Another run is writing to the lake."""

    kind = Kind.CONFLICT


class DiskFull(VlfmError, OSError):
    """The disk (or the quota) was used up while a file was written. `filename` is the file, `free` the bytes left."""

    kind = Kind.ENVIRONMENT

    def __init__(self, path: str | Path, free: int) -> None:
        self.message = f"the disk is full ({free} bytes free)"
        self.remedy = "make room and run the same command again, what is done is kept"
        OSError.__init__(self, errno.ENOSPC, f"{self.message}; {self.remedy}", str(path))
        self.free = free

    def __reduce__(self) -> tuple[type[DiskFull], tuple[str, int]]:
        # Errors of workers travel between processes.
        return DiskFull, (self.filename, self.free)


@dataclass(frozen=True)
class Lake:
    """A lake at `root`: where everything is that the pipeline keeps."""

    root: Path

    @property
    def versions(self) -> Path:
        """Folder of the version files."""
        return self.root / "versions"

    @property
    def manifests(self) -> Path:
        """Folder of the Parquet tables of clips and films."""
        return self.root / "manifests"

    @property
    def shards(self) -> Path:
        """Folder of the WebDataset shards and their indexes."""
        return self.root / "shards"

    @property
    def arrays(self) -> Path:
        """Folder of the Icechunk repository with the Zarr arrays."""
        return self.root / "arrays"

    @property
    def texts(self) -> Path:
        """Folder of the empty caption's embeddings."""
        return self.root / "texts"

    @property
    def staging(self) -> Path:
        """Folder of finished blocks that are not published yet."""
        return self.root / "staging"

    @property
    def failures(self) -> Path:
        """Folder of the failure tables."""
        return self.root / "failures"

    @staticmethod
    def create(path: str | Path) -> Lake:
        """The lake at `path`, made if it is not there.

        Raises:
            LakeError: `path` is a file, or a folder that holds other things and is no lake.
            DiskFull: no room for the folders.
        """
        lake = Lake(Path(path))
        if lake.root.exists() and not lake.versions.is_dir():
            if not lake.root.is_dir():
                raise LakeError(f"{lake.root} is a file, not a folder; name a new folder for the lake")
            if any(not entry.name.startswith(".") for entry in lake.root.iterdir()):
                raise LakeError(f"{lake.root} holds other files and is no lake; name a new or an empty folder")
        with naming_full_disk(lake.root):
            # versions/ comes first: it is what makes a folder a lake.
            for folder in (lake.versions, lake.manifests, lake.shards, lake.texts, lake.staging, lake.failures):
                folder.mkdir(parents=True, exist_ok=True)
        return lake

    @staticmethod
    def open(path: str | Path) -> Lake:
        """The lake that is at `path`.

        Raises:
            LakeError: there is none; the message says how one is made.
        """
        lake = Lake(Path(path))
        if not lake.versions.is_dir():
            what = "is no lake (it has no versions/ folder)" if lake.root.exists() else "does not exist"
            raise LakeError(f"{lake.root} {what}; make a lake with: vlfm ingest SOURCE --lake {lake.root}")
        return lake

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Hold the lake for one run that writes: from its plan until its version is published.

        The lock goes with the process that holds it, whatever ends it.

        Raises:
            LakeBusy: another run holds it.
        """
        with locked(self.root / ".writing.lock", wait=False):
            yield

    def garbage(self) -> list[Path]:
        """Files that no version needs: temporary files of dead runs, and shards, indexes, tables and texts that no
        version names. Call it inside `writing()` only, or a run's fresh files look like garbage too.

        Blocks in staging/ and the Icechunk repository are not looked at.
        """
        texts = [file.read_text("utf-8", errors="replace") for file in self.versions.glob("*.json")]
        found = []
        for folder in (self.versions, self.manifests, self.shards, self.texts, self.staging, self.failures):
            for file in sorted(folder.iterdir()) if folder.is_dir() else []:
                owner = file.name.replace(".index.json", ".tar")
                named = folder in (self.versions, self.staging, self.failures) or any(owner in text for text in texts)
                if file.is_file() and (file.name.endswith(TEMPORARY_SUFFIX) or not named):
                    found.append(file)
        return found


def version_naming(path: Path) -> int | None:
    """The number of a version that names this file of a lake, or None: what a version names must never change."""
    for file in (path.parent.parent / "versions").glob("*.json"):
        text = file.read_text("utf-8", errors="replace")
        if file.stem.isdigit() and (f'"{path.name}"' in text or f'/{path.name}"' in text):
            return int(file.stem)
    return None


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
                _force(file)
            os.replace(temporary, path)
            _force_folder(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_atomic(path: Path, data: bytes) -> None:
    """Write `data` to `path`, replacing what is there, whole or not at all. Raises as `atomic_file` does."""
    with atomic_file(path) as file:
        file.write(data)


def create_exclusive(path: Path, data: bytes) -> bool:
    """Write `data` to `path` if nothing is there: False, and nothing changed, if something is.

    `link()` fails where the name exists, so of many writers exactly one wins and no reader ever sees half a file.

    Raises:
        DiskFull: no room; nothing stays behind.
        LakeError: the file system has no hard links.
    """
    temporary = _temporary(path)
    try:
        with naming_full_disk(path):
            with open(temporary, "xb") as file:
                file.write(data)
                _force(file)
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
            _force_folder(path.parent)
            return True
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(path: Path, wait: bool) -> Iterator[None]:
    """Hold an exclusive lock on the file `path` (made if needed), which the system releases when the process ends.

    Raises:
        LakeBusy: somebody holds it, and `wait` is False.
    """
    import fcntl

    with naming_full_disk(path):
        file = open(path, "a+", encoding="ascii")  # noqa: SIM115 (closed below; a full disk is named for this file only)
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            file.seek(0)
            holder = _holder(file.read())
            raise LakeBusy(f"{path.parent} is in use{holder}; wait until that run ends, or stop it") from error
        file.truncate(0)
        file.write(json.dumps({"process": os.getpid()}))
        file.flush()
        yield


def _holder(text: str) -> str:
    try:
        return f" by process {int(json.loads(text)['process'])}"
    except (ValueError, KeyError, TypeError):
        return ""


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(6)}{TEMPORARY_SUFFIX}")


def _force(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _force_folder(folder: Path) -> None:
    # A rename or a link is safe on disk only when its folder is.
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
