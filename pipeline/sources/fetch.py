"""Films as files of this machine's disk, wherever they are: in a folder, in a bucket, or inside a tar of either.

What is not a file already is fetched into a folder of bounded size (VLFM_CACHE and VLFM_CACHE_SIZE), under a name made
of its address and of its ETag or time, so that what has not changed is fetched once. Several processes share the
folder. A film in use is never taken away; those that were used longest ago go first.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO

from pipeline.sources.tables import SourceError
from storage.address import is_bucket
from storage.cache import ByteCache
from storage.errors import Kind, VlfmError
from storage.local import naming_full_disk
from storage.s3 import S3Store

INSIDE = "!/"
"""Between the address of a tar and the name of a member."""
_PIECE = 1 << 20


class FilmChanged(VlfmError):
    """A film is not the one any more that was found; the next run takes the new one."""

    kind = Kind.CONFLICT


def is_file(address: str) -> bool:
    """Whether a film's address is the path of a file of its own."""
    return not is_bucket(address) and INSIDE not in address


@contextlib.contextmanager
def as_file(address: str, size: int, stamp: int) -> Iterator[Path]:
    """The film as a file, while the block lasts.

    Args:
        address: FilmEntry's `path`.
        size: its bytes.
        stamp: FilmEntry's `modified_ns`.

    Raises:
        FilmChanged: what is there now is another film, or none.
        BucketError: the bucket cannot be used.
        DiskFull: no room for it.
    """
    if is_file(address):
        yield Path(address)
        return
    container, inside, member = address.partition(INSIDE)

    def fetch(file: IO[bytes]) -> None:
        if inside:
            with _tar(container, stamp) as tar:
                _copy_member(tar, container, member, size, file)
        else:
            _download(address, stamp, file)

    with _Films.of_environment().held(address, size, stamp, fetch) as path:
        yield path


def forget(address: str, size: int, stamp: int) -> bool:
    """Take a film that was fetched off this machine's disk, though it may be in use; whether it was there.

    Args as for `as_file`. A film that is a file of its own stays.
    """
    if is_file(address):
        return False
    try:
        _Films.of_environment().path(address, size, stamp).unlink()
    except OSError:
        return False
    return True


def bucket_and_key(address: str) -> tuple[S3Store, str]:
    """The bucket of an `s3://` address, and the key in it, whatever that is named."""
    bucket, _, key = address.removeprefix("s3://").partition("/")
    return S3Store.at(f"s3://{bucket}"), key


def stamp_of(etag: str) -> int:
    """A number for an ETag, in the place of a file's time of change."""
    return int.from_bytes(hashlib.sha256(etag.encode()).digest()[:7], "big")


@contextlib.contextmanager
def _tar(container: str, stamp: int) -> Iterator[Path]:
    if not is_bucket(container):
        path = Path(container)
        if not path.is_file() or path.stat().st_mtime_ns != stamp:
            raise FilmChanged(f"{container} changed during the run; run the command again")
        yield path
        return
    store, key = bucket_and_key(container)
    found = store.objects(key).get(key)
    with as_file(container, int(found["Size"]) if found else 0, stamp) as path:
        yield path


def _copy_member(tar: Path, container: str, member: str, size: int, file: IO[bytes]) -> None:
    stat = tar.stat()
    offset, length = tar_members(str(tar), stat.st_size, stat.st_mtime_ns).get(member, (0, -1))
    if length != size:
        raise FilmChanged(f"{container} has no {member} of {size} bytes any more; run the command again")
    with tar.open("rb") as source:
        source.seek(offset)
        left = size
        while left and (piece := source.read(min(left, _PIECE))):
            file.write(piece)
            left -= len(piece)


@lru_cache(maxsize=64)
def tar_members(path: str, size: int, modified_ns: int) -> dict[str, tuple[int, int]]:
    """Where the files of a tar are: name to offset and bytes. It is read by its headers, up to the first bad one.

    Raises:
        SourceError: it is no plain tar.
    """
    found: dict[str, tuple[int, int]] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            try:
                while (member := tar.next()) is not None:
                    tar.members = []  # type: ignore[attr-defined]  # a tar of a million films would be kept in memory
                    if member.isreg() and member.offset_data + member.size <= size:
                        found[member.name] = (member.offset_data, member.size)
            except tarfile.TarError:
                pass  # what lies behind is not to be had; the films before it are
    except (tarfile.TarError, OSError) as error:
        raise SourceError(f"{path} is no plain tar ({error}); unpack it, or write it again") from None
    return found


def _download(address: str, stamp: int, file: IO[bytes]) -> None:
    store, key = bucket_and_key(address)
    found = store.objects(key).get(key)
    if found is None or stamp_of(found["ETag"]) != stamp:
        raise FilmChanged(f"{address} changed during the run; run the command again")
    try:
        store.download(key, file, found["ETag"])
    except FileNotFoundError:
        raise FilmChanged(f"{address} went away during the run; run the command again") from None


@dataclass(frozen=True)
class _Films:
    """Films in the folder `folder`, of at most `limit` bytes together, those in use besides."""

    folder: Path
    limit: int

    @staticmethod
    def of_environment() -> _Films:
        cache = ByteCache.of_environment()
        return _Films(cache.folder.parent / "films", cache.limit)

    def path(self, address: str, size: int, stamp: int) -> Path:
        """Where a film is, or would be."""
        digest = hashlib.sha256(f"{address}\0{size}\0{stamp}".encode("utf-8", "surrogateescape")).hexdigest()[:24]
        name = re.sub(r"[^A-Za-z0-9._-]+", "_", address.rpartition("/")[2])[-60:]
        return self.folder / f"{digest}-{name}"

    @contextlib.contextmanager
    def held(self, address: str, size: int, stamp: int, fetch: Callable[[IO[bytes]], None]) -> Iterator[Path]:
        path = self.path(address, size, stamp)
        with naming_full_disk(self.folder):
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            while True:
                try:
                    handle = path.open("rb")
                except FileNotFoundError:
                    self._bring(path, size, fetch)
                    continue
                fcntl.flock(handle, fcntl.LOCK_SH)
                if os.fstat(handle.fileno()).st_nlink:
                    break
                handle.close()  # it was taken away before it was held
        with handle:
            os.utime(path)
            yield path

    def _bring(self, path: Path, size: int, fetch: Callable[[IO[bytes]], None]) -> None:
        part = path.with_name(f".{path.name}")
        with part.open("a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # another process may be fetching the same film
            if path.exists() or not os.fstat(file.fileno()).st_nlink:
                return
            file.truncate(0)
            self._make_room(size)
            try:
                fetch(file)
                file.flush()
                if os.fstat(file.fileno()).st_size != size:
                    raise FilmChanged(f"{path.name} has not the {size} bytes that it had; run the command again")
                os.replace(part, path)
            except BaseException:
                part.unlink(missing_ok=True)
                raise

    def _make_room(self, size: int) -> None:
        """Take away films that nobody uses until `size` more bytes are within the limit, or none is left."""
        with (self.folder / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            found = []
            for entry in os.scandir(self.folder):
                with contextlib.suppress(FileNotFoundError):
                    told = entry.stat()
                    found.append((told.st_mtime, told.st_size, entry.path))
            used = sum(size for _, size, _ in found)
            for _, bytes_, path in sorted(found):
                if used + size <= self.limit:
                    break
                with contextlib.suppress(OSError), open(path, "rb") as file:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    os.unlink(path)
                    used -= bytes_
