"""A cache of bytes on a local disk, for what is read again and again from a store that is far away.

Entries are named by what they hold (a digest), so they are never stale, and lakes share them. Several processes use one
folder: an entry appears whole, by a rename, and its bytes are compared with their checksum whenever they are read. All
entries together stay within a limit, which is kept under a lock; those that were not read for longest go first. A cache
that cannot be written is one that keeps nothing: no run fails for it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import secrets
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from storage.errors import VlfmError

DEFAULT_LIMIT = 16 << 30
_UNITS = {
    "": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30, "ti": 1 << 40,
}  # fmt: skip
_CHECK = hashlib.sha256().digest_size
_KEPT = 0.9  # of the limit, after entries had to go: not every new one has to look for room


@dataclass(frozen=True)
class ByteCache:
    """Entries of at most `limit` bytes together in the folder `folder`."""

    folder: Path
    limit: int

    @staticmethod
    def of_environment() -> ByteCache:
        """The cache samples/ in VLFM_CACHE (by default vlfm/ in the user's cache folder), of VLFM_CACHE_SIZE (16GiB).

        Raises:
            VlfmError: VLFM_CACHE_SIZE is no size.
        """
        home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
        folder = os.environ.get("VLFM_CACHE") or os.path.join(home, "vlfm")
        text = os.environ.get("VLFM_CACHE_SIZE", "")
        return ByteCache(Path(folder) / "samples", parse_size(text, "VLFM_CACHE_SIZE") if text else DEFAULT_LIMIT)

    def get(self, name: str, fetch: Callable[[], bytes]) -> bytes:
        """The bytes named `name` (letters, digits and '-'), by `fetch` where they are not here.

        Raises what `fetch` raises.
        """
        path = self._path(name)
        try:
            kept = path.read_bytes()
            if hashlib.sha256(memoryview(kept)[_CHECK:]).digest() == kept[:_CHECK]:
                os.utime(path)
                return kept[_CHECK:]
            path.unlink()
        except OSError:
            pass
        data = fetch()
        try:
            self._keep(path, data)
        except OSError as error:
            warnings.warn(
                f"the cache {self.folder} cannot be written ({error.strerror}), so everything is read from the bucket "
                "each time; set VLFM_CACHE to a folder with room",
                stacklevel=2,
            )
        return data

    def forget(self, name: str) -> bool:
        """Remove an entry; whether it was there."""
        try:
            self._path(name).unlink()
        except OSError:
            return False
        return True

    def _path(self, name: str) -> Path:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9-]*", name):
            raise ValueError(f"entry {name!r}: use letters, digits and '-' only")
        return self.folder / name[:2] / name

    def _keep(self, path: Path, data: bytes) -> None:
        size = len(data) + _CHECK
        if size > self.limit:
            return
        self._make_room(size)
        path.parent.mkdir(exist_ok=True)
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        try:
            with open(temporary, "xb") as file:
                file.write(hashlib.sha256(data).digest())
                file.write(data)
            with contextlib.suppress(FileNotFoundError):  # it had to go already
                os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise

    def _make_room(self, size: int) -> None:
        """Count `size` more bytes. `.bytes` holds at least what is here; where that is too much, all is looked at."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with open(self.folder / ".bytes", "a+", encoding="ascii") as count:
            fcntl.flock(count, fcntl.LOCK_EX)
            count.seek(0)
            text = count.read()
            used = int(text) if text.isdigit() else self.limit
            if used + size > self.limit:
                used = self._evict(int(self.limit * _KEPT) - size)
            count.truncate(0)
            count.write(str(used + size))

    def _evict(self, target: int) -> int:
        """Remove the entries read longest ago, until the others are at most `target` bytes: their bytes."""
        found = []
        for folder in self.folder.iterdir():
            for entry in os.scandir(folder) if folder.is_dir() else ():
                with contextlib.suppress(FileNotFoundError):
                    told = entry.stat()
                    found.append((told.st_mtime, told.st_size, entry.path))
        used = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if used <= target:
                break
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            used -= size
        return used


def parse_size(text: str, name: str) -> int:
    """Bytes of a size such as `500MB`, `16GiB` or `1000000`; `name` is what it was given for.

    Raises:
        VlfmError: no size.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:([kmgt]i?)b?|b)?\s*", text.lower())
    if found is None:
        raise VlfmError(f"{name} {text!r} is no size; give one such as 500MB or 16GiB")
    return int(float(found[1]) * _UNITS[found[2] or ""])
