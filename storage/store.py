"""The store protocol: the few operations that a lake needs of what holds it, a folder or a bucket.

A store maps keys to bytes. A key is a relative path of plain names, such as `versions/1.json`; what is stored under one
appears whole or not at all, and is replaced whole. A lake builds on three promises: `create_exclusive` has one winner
(the commit point), `write` and `open_write` are never seen half done, and one process at a time holds a lease. Every
implementation passes tests/storage/store_contract.py.
"""

from __future__ import annotations

import errno
import functools
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import BinaryIO, Protocol

from storage.cache import ByteCache
from storage.errors import Kind, VlfmError


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


class Store(Protocol):
    """Bytes by key. A store can be pickled and means the same place in another process.

    Every method with a key raises ValueError where `check_key` does. No key is another one's folder: where `a/b` is
    stored, `a` is not.
    """

    def __hash__(self) -> int:
        """Stores of the same place are equal."""
        ...

    def address(self, key: str = "") -> str:
        """Where people and other programs find a key (or the whole store): a path, or a URL."""
        ...

    def create(self, folders: Sequence[str]) -> None:
        """Make the place ready for keys below `folders`; nothing happens where it is. A bucket itself has to be there.

        Raises:
            LakeError: the place cannot be used, or holds other things.
            DiskFull: no room.
        """
        ...

    def check(self, folders: Sequence[str]) -> None:
        """Raises LakeError where the place is not there, or was never made ready by `create(folders)`."""
        ...

    def size(self, key: str) -> int | None:
        """Bytes stored under a key, None where nothing is."""
        ...

    def read(self, key: str, start: int = 0, stop: int | None = None) -> bytes:
        """The bytes from `start` up to and without `stop`, by default all.

        Raises:
            FileNotFoundError: nothing is stored under the key; `filename` is its address.
            ValueError: not 0 <= start <= stop <= size.
        """
        ...

    def open_read(self, key: str) -> BinaryIO:
        """A file to read and seek in, whose bytes stay as they were when the key is replaced meanwhile; close it.

        Raises:
            FileNotFoundError: nothing is stored under the key; `filename` is its address.
        """
        ...

    def write(self, key: str, data: bytes) -> None:
        """Store `data`, replacing what is there.

        Raises:
            DiskFull: no room; nothing stays behind, and what was there is there still.
        """
        ...

    def open_write(self, key: str) -> AbstractContextManager[BinaryIO]:
        """A file to write into, which is stored when the block ends well; on any error nothing has changed.

        Raises:
            DiskFull: as `write`.
        """
        ...

    def create_exclusive(self, key: str, data: bytes) -> bool:
        """Store `data` where nothing is: False, and nothing changed, where something is. Of many writers one wins.

        Raises:
            DiskFull: no room; nothing stays behind.
            LakeError: the store cannot promise it.
        """
        ...

    def list_keys(self, prefix: str = "") -> list[str]:
        """The keys that start with `prefix` (any start of a key), ordered by their code points.

        What an unfinished write left behind is no key. A key that was stored before the call is in the list.
        """
        ...

    def sizes(self, prefix: str = "") -> dict[str, int]:
        """The bytes stored under each key of `list_keys(prefix)`, in its order."""
        ...

    def tags(self, prefix: str = "") -> dict[str, str]:
        """A tag for each key of `list_keys(prefix)`, in its order: another one after another content was stored.

        Empty where reading a key costs no more than asking for its tag; `read_tagged` uses them.
        """
        ...

    def delete(self, key: str) -> None:
        """Remove a key. Nothing happens where nothing is stored under it."""
        ...

    def clean(self, delete: bool) -> list[str]:
        """Addresses of what unfinished writes of dead processes left behind; it is removed where `delete`.

        Call it only while nothing else writes.
        """
        ...

    def lease(self, name: str, wait: bool = False) -> AbstractContextManager[None]:
        """Hold the lease `name` (letters, digits, '-' and '_') within the block; only one process can.

        It ends with the block. When its process dies, it ends by itself: at once in a folder, after a time in a bucket.
        Within the block the other methods may raise LakeBusy too: where the process was silent for so long that
        another one holds the lease by now, it can publish nothing more.

        Raises:
            LakeBusy: another process holds it, and `wait` is False. With `wait`, it is waited for.
        """
        ...

    def local_path(self, key: str = "") -> Path:
        """Where the key is (or will be) on a local disk: the only way around the protocol.

        It is for what needs a file of its own, such as Icechunk, which keeps its own repository.

        Raises:
            LakeError: the store is on no local disk.
        """
        ...

    def cache(self) -> ByteCache | None:
        """Where what was read is kept on a local disk; None where the store is on one itself."""
        ...


def read_tagged(store: Store, key: str, tag: str) -> bytes:
    """What `read` gives, from this process' memory where it was read under the same tag before.

    For small files that are read again and again: what a store far away has to be asked for costs a request each time.
    """
    return _remembered(store, key, tag) if tag else store.read(key)


@functools.lru_cache(maxsize=1024)
def _remembered(store: Store, key: str, tag: str) -> bytes:
    return store.read(key)


def check_key(key: str) -> str:
    """`key`, once it is sure to stay inside its store.

    Raises:
        ValueError: a key is one or more names joined by '/', none of which is empty, starts with a dot (these are the
            store's own), or holds a backslash or a control character.
    """
    if not key or not all(_is_name(name) for name in key.split("/")):
        raise ValueError(f"key {key!r}: use names joined by '/', without leading dots, backslashes or empty names")
    return key


def check_prefix(prefix: str) -> str:
    """`prefix`, once it is sure to be the start of a key, or empty. Raises ValueError as `check_key` does."""
    if prefix:
        check_key(prefix + "x" if prefix.endswith("/") else prefix)
    return prefix


def check_lease(name: str) -> str:
    """`name`, once it can be a lease's. Raises ValueError otherwise."""
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise ValueError(f"lease {name!r}: use letters, digits, '-' and '_' only")
    return name


def _is_name(name: str) -> bool:
    return bool(name) and not name.startswith(".") and "\\" not in name and name.isprintable()
