"""Shards: plain tar files in WebDataset's layout, with an index beside them that makes every sample one seek away.

A sample is a few members `<clip_id>.<name>`: arrays as `.npy`, one `clip.json`. The same samples give the same bytes.
The index says where each member's bytes are, so that a reader reads those it is asked for. WebDataset itself reads the
same tar; its own decoder runs code it finds in a tar and is never used here: `.npy` without pickle and JSON only.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import os
import re
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO, TypeAlias

import numpy as np

from storage.errors import Kind, VlfmError
from storage.fingerprint import canonical_json, finite_json, stream_digest
from storage.layout import Lake, LakeError, version_naming

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]
Sample: TypeAlias = Mapping[str, Any]
"""`__key__`: the clip's id; `<name>.npy`: an array; `<name>.json`: a JSON mapping."""
INDEX_FORMAT = 1
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*\.tar")
_REMEDY = "restore it from a copy, try `vlfm repair`, or ingest the films into a new lake"


class DamagedShard(VlfmError):
    """A shard or its index is missing, torn or altered. The message names the file and says the remedy."""

    kind = Kind.DAMAGE


class ShardTaken(LakeError):
    """A version names the shard, with other bytes."""

    kind = Kind.CONFLICT


@dataclass(frozen=True)
class ShardInfo:
    """What a version says of a shard."""

    name: str
    """File name within shards/, `<block_id>.tar`."""
    bytes: int
    """Size of the tar."""
    sha256: str
    """Of the tar's bytes."""
    clips: int
    """Number of samples."""

    def __post_init__(self) -> None:
        shard_key(self.name)


def shard_key(name: str) -> str:
    """The key of the shard `name`. Raises ValueError where no shard can have this name."""
    if not _NAME.fullmatch(name):
        raise ValueError(f"shard name {name!r}: use letters, digits, '-' and '_', and end it with .tar")
    return f"shards/{name}"


def index_key(name: str) -> str:
    """The key of its index, `<block_id>.index.json` beside `<block_id>.tar`. Raises ValueError as `shard_key` does."""
    return shard_key(name).removesuffix(".tar") + ".index.json"


def write_shard(lake: Lake, name: str, samples: Iterable[Sample], expected: ShardInfo | None = None) -> ShardInfo:
    """Write a shard and its index, each whole or not at all, the index last.

    The bytes depend on the samples and their order only. A sample's NaN and infinity become None in its JSON.

    Args:
        lake: where.
        name: `<block_id>.tar`. A shard that a version names is never altered: writing the same bytes again is fine
            (and heals one that was damaged), other bytes are refused.
        samples: read once, one at a time.
        expected: what the bytes have to be.

    Raises:
        ValueError: no shard's name, no samples, a key twice or with a dot or slash, a member that is neither `.npy`
            nor `.json`, an array of Python objects.
        ShardTaken: a version names the shard, and its bytes are different.
        LakeError: the bytes are not `expected`.
        DiskFull: no room; nothing stays behind.
    """
    place = shard_key(name)
    entries: list[dict[str, Any]] = []
    keys: set[str] = set()
    with lake.store.open_write(place) as file, _tar(file) as (writer, counter):
        for sample in samples:
            key = str(sample.get("__key__", ""))
            if not re.fullmatch(r"[A-Za-z0-9_-]+", key):
                raise ValueError(f"{name}: sample key {key!r}: use letters, digits, '-' and '_' only")
            if key in keys:
                raise ValueError(f"{name}: two samples have the key {key!r}")
            members = {part: encode(key, part, value) for part, value in sample.items() if part != "__key__"}
            if not members:
                raise ValueError(f"{name}: sample {key!r} has no members")
            keys.add(key)
            places = {}
            for part in sorted(members):
                # One member at a time: the tar's position after it tells where its bytes are, however long its head.
                writer.write({"__key__": key, part: members[part]})
                size = len(members[part])
                places[part] = [writer.tarstream.offset - -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE, size]
            sums = {part: _member_digest(data) for part, data in members.items()}
            entries.append({"key": key, "members": places, "sha256": sample_digest(members), "checksums": sums})
        if not entries:
            raise ValueError(f"{name}: a shard needs at least one sample")
        writer.close()
        info = ShardInfo(name, counter.bytes, counter.digest.hexdigest(), len(entries))
        if expected is not None and info != expected:
            raise LakeError(f"{name}: these samples do not give the bytes that were published")
        changed = lake.store.size(place) is not None and shard_digest(lake, name) != info.sha256
        number = version_naming(lake, place) if changed else None
        named = "" if number is None else lake.store.read(f"versions/{number}.json").decode("utf-8", "replace")
        if number is not None and info.sha256 not in named:
            where = lake.store.address(place)
            raise ShardTaken(f"{where} belongs to version {number} and never changes; give the new block another id")
    lake.store.write(index_key(name), _index_bytes(info, entries))
    return info


def rebuild_index(lake: Lake, name: str) -> ShardInfo:
    """Write the index of a whole shard anew, from the tar alone. The remedy where only the index is lost.

    Raises:
        DamagedShard: the tar itself is torn or holds what we do not write.
    """
    path = lake.store.address(shard_key(name))
    try:
        with lake.store.open_read(shard_key(name)) as file:
            entries = _scan(file, path)
    except FileNotFoundError:
        raise DamagedShard(f"{path} is missing; {_REMEDY}") from None
    info = ShardInfo(name, lake.store.size(shard_key(name)) or 0, shard_digest(lake, name), len(entries))
    lake.store.write(index_key(name), _index_bytes(info, entries))
    return info


class ShardReader:
    """Random access to the samples of one shard.

    `reader[i]` is a dictionary of members: arrays are read-only, JSON members are dictionaries. A member's checksum is
    compared when it is first read; where an older index has none, the sample's is, for which all of it is read. Nothing
    is mapped: a mapped file that shrinks ends the process (SIGBUS).

    From a store that is far away a sample comes whole, in one request, and is kept in the store's cache under its own
    checksum.
    """

    def __init__(self, lake: Lake, name: str) -> None:
        """Open the shard `name`, `<block_id>.tar`, and its index.

        Raises:
            DamagedShard: the tar or the index is missing, is of another size or cannot be read.
        """
        self.lake, self.name = lake, name
        self.path = lake.store.address(shard_key(name))
        self._cache = lake.store.cache()
        index = read_index(lake, name)
        size = lake.store.size(shard_key(name))
        if size != index["bytes"]:
            what = "missing" if size is None else "truncated" if size < index["bytes"] else "longer than written"
            told = "" if size is None else f" ({size} of {index['bytes']} bytes)"
            raise DamagedShard(f"{self.path} is {what}{told}; {_REMEDY}")
        self._compared: set[str] = set()
        self._entries: list[dict[str, Any]] = index["samples"]
        self._headers: dict[bytes, _Header] = {}
        self.info = ShardInfo(name, index["bytes"], index["sha256"], len(self._entries))

    @property
    def keys(self) -> list[str]:
        """The samples' keys (clip ids), in the shard's order."""
        return [entry["key"] for entry in self._entries]

    @property
    def digests(self) -> list[str]:
        """The samples' sha256 as the index has them, in the shard's order."""
        return [entry["sha256"] for entry in self._entries]

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return self.read(row)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self.read(row) for row in range(len(self)))

    def read(self, row: int, names: Iterable[str] | None = None) -> dict[str, Any]:
        """The members of sample `row` called `names` (all of them by default), and `__key__`.

        Raises:
            IndexError: no such row.
            KeyError: no such member; the message lists those there are.
            DamagedShard: the sample is not what was written, by its checksum, or a member's bytes are no array without
                pickle, or no JSON; the message names the shard and the clip.
        """
        entry = self._entries[row]
        key, members = entry["key"], entry["members"]
        wanted = list(members if names is None else names)
        if unknown := [name for name in wanted if name not in members]:
            raise KeyError(f"{self.name}, clip {key}: no member {unknown[0]!r}, there are {sorted(members)}")
        if (sums := entry.get("checksums")) is not None:
            found = self._bytes(entry, wanted)
            for name in sums.keys() & wanted:
                if _member_digest(found[name]) != sums[name]:
                    raise self.damaged(key, f"{name}: wrong checksum")
                del sums[name]  # those that are left were not compared yet
        else:  # an index of before has checksums of whole samples alone
            compared = key in self._compared
            found = self._bytes(entry, wanted) if compared else self._compare(entry, self._bytes(entry, members))
            self._compared.add(key)
        sample: dict[str, Any] = {"__key__": key}
        for name in wanted:
            try:
                sample[name] = self._decode(name, found[name])
            except (ValueError, TypeError, EOFError) as error:
                raise self.damaged(key, f"{name}: {error}") from error
        return sample

    def damaged(self, key: str, what: str) -> DamagedShard:
        """The error of a clip of this shard."""
        verify = f"`vlfm verify --lake {self.lake.store.address()}` lists all damage"
        return DamagedShard(f"{self.path}, clip {key}, {what}; {verify}; {_REMEDY}")

    def verify(self) -> list[str]:
        """Compare every byte with the index, and the index with the tar: the problems found, each naming the file.

        The store itself is read, never its cache.
        """
        problems, damaged, wrong = [], [], False
        entries = read_index(self.lake, self.name)["samples"]  # ours lack the checksums that were compared already
        try:
            opened = self.lake.store.open_read(shard_key(self.name))
        except LakeError as error:
            return [str(error)]
        with opened as file:
            for entry in entries:
                try:
                    members = self._compare(entry, self._members(entry, entry["members"], file))
                    wrong |= any(
                        name not in members or _member_digest(members[name]) != s
                        for name, s in entry.get("checksums", {}).items()
                    )
                except DamagedShard:
                    damaged.append(entry["key"])
            file.seek(0)
            digest = stream_digest(file)
            file.seek(0)
            try:
                found = [(entry["key"], entry["members"]) for entry in _scan(file, self.path)]
            except DamagedShard as error:
                found, torn = [], [str(error)]
            else:
                torn = []
        if damaged:
            problems.append(f"{self.path}: clips {', '.join(damaged)} are damaged (wrong checksum); {_REMEDY}")
        if digest != self.info.sha256:
            problems.append(f"{self.path}: wrong checksum; {_REMEDY}")
        if torn:
            return [*problems, *torn]
        if wrong or found != [(entry["key"], entry["members"]) for entry in entries]:
            index = self.lake.store.address(index_key(self.name))
            problems.append(f"{index} does not match the tar; {_rebuild(self.lake, self.name)}")
        return problems

    def _compare(self, entry: Mapping[str, Any], found: dict[str, bytes]) -> dict[str, bytes]:
        if sample_digest(found) != entry["sha256"]:
            raise self.damaged(entry["key"], "wrong checksum")
        return found

    def _bytes(self, entry: Mapping[str, Any], names: Iterable[str]) -> dict[str, bytes]:
        if self._cache is None:
            with self.lake.store.open_read(shard_key(self.name)) as file:
                return self._members(entry, names, file)
        places = entry["members"].values()
        start, stop = min(offset for offset, _ in places), max(offset + size for offset, size in places)
        if stop > self.info.bytes:
            raise self._truncated(entry, "a member")

        def fetch() -> bytes:
            data = self.lake.store.read(shard_key(self.name), start, stop)
            # What is wrong in the store is not kept, or it would stay wrong once the store is put right.
            self._compare(entry, _cut(data, entry["members"], start))
            return data

        whole = self._cache.get(entry["sha256"], fetch)
        return _cut(whole, {name: entry["members"][name] for name in names}, start)

    def _members(self, entry: Mapping[str, Any], names: Iterable[str], file: BinaryIO) -> dict[str, bytes]:
        found = {}
        for name in names:
            offset, size = entry["members"][name]
            data = b""
            if offset + size <= self.info.bytes:
                file.seek(offset)
                data = file.read(size)
            if len(data) != size:
                raise self._truncated(entry, name)
            found[name] = data
        return found

    def _truncated(self, entry: Mapping[str, Any], name: str) -> DamagedShard:
        return self.damaged(entry["key"], f"{name} lies beyond the shard's end, it was truncated")

    def _decode(self, name: str, data: bytes) -> Any:
        if name.endswith(".json"):
            return json.loads(data)
        # Samples of a shard are alike: their headers are parsed once (numpy reads a header as a Python literal).
        length = 10 + int.from_bytes(data[8:10], "little")
        raw = data[:length]
        header = self._headers.get(raw) or self._headers.setdefault(raw, _header(raw))
        if len(data) != length + header.bytes:
            raise ValueError(f"the array has {len(data) - length} bytes of data, its header says {header.bytes}")
        if header.bytes == 0:
            return np.zeros(header.shape, header.dtype)
        flat: Array = np.frombuffer(data, header.dtype, header.bytes // header.dtype.itemsize, length)
        return flat.reshape(header.shape, order="F" if header.fortran else "C")


@dataclass(frozen=True)
class _Header:
    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype[Any]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize  # of Python's own integers: numpy takes 16 us


class _Counter:
    """What a tar is written to: counts and digests the bytes on their way into the file."""

    def __init__(self, file: BinaryIO) -> None:
        self.file: BinaryIO | None = file
        self.bytes = 0
        self.digest = hashlib.sha256()

    def write(self, data: bytes) -> int:
        # After an error tarfile still writes its end when it is collected; that must go nowhere.
        if self.file is not None:
            self.file.write(data)
            self.digest.update(data)
            self.bytes += len(data)
        return len(data)


@contextlib.contextmanager
def _tar(file: BinaryIO) -> Iterator[tuple[Any, _Counter]]:
    # WebDataset reads this when it is imported: without it a tar's members and URLs can run code.
    os.environ["WDS_SECURE"] = "1"
    from webdataset.writer import TarWriter

    counter = _Counter(file)
    writer = TarWriter(counter, user="vlfm", group="vlfm", mode=0o444, mtime=0, encoder=False)
    try:
        yield writer, counter
    finally:
        counter.file = None
        writer.close()


def encode(key: str, name: str, value: Any) -> bytes:
    """A member's bytes. Raises ValueError for what is not stored."""
    if not re.fullmatch(r"[a-z][a-z0-9_]*\.(npy|json)", name):
        raise ValueError(
            f"clip {key}: member {name!r} is neither <name>.npy nor <name>.json, and only those are stored"
        )
    if name.endswith(".json"):
        return canonical_json(finite_json(value)).encode("ascii")
    # One order in memory, or equal arrays could give different bytes.
    array = np.asarray(value, order="C")
    if array.dtype.hasobject:
        raise ValueError(f"clip {key}: {name} holds Python objects, which only pickle can store; give numbers")
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, version=(1, 0), allow_pickle=False)
    return buffer.getvalue()


def _header(raw: bytes) -> _Header:
    stream = io.BytesIO(raw)
    if np.lib.format.read_magic(stream) != (1, 0):
        raise ValueError("an .npy file of a version that we do not write")
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
    if dtype.hasobject:
        raise ValueError("an array of Python objects needs pickle, which can run any code: refused")
    return _Header(shape, fortran, dtype)


def _cut(data: bytes, places: Mapping[str, tuple[int, int]], start: int) -> dict[str, bytes]:
    """The members at `places` of a sample whose bytes begin at `start` of the shard."""
    return {name: data[offset - start : offset - start + size] for name, (offset, size) in places.items()}


def sample_digest(members: Mapping[str, bytes | memoryview]) -> str:
    """A sample's digest: over its members' names, sizes and bytes, whatever tar they are in."""
    digest = hashlib.sha256()
    for name in sorted(members):
        digest.update(f"{name}\0{len(members[name])}\0".encode("ascii"))
        digest.update(members[name])
    return digest.hexdigest()


def _member_digest(data: bytes | memoryview) -> str:
    """A member's digest, as the index has it: enough to see damage, short because there are many."""
    return hashlib.sha256(data).hexdigest()[:16]


def _index_bytes(info: ShardInfo, entries: list[dict[str, Any]]) -> bytes:
    head = {"format": INDEX_FORMAT, "shard": info.name, "bytes": info.bytes, "sha256": info.sha256}
    return canonical_json({**head, "samples": entries}).encode("ascii")


def shard_digest(lake: Lake, name: str) -> str:
    """The sha256 of a shard's tar. Raises FileNotFoundError where there is none."""
    with lake.store.open_read(shard_key(name)) as file:
        return stream_digest(file)


def read_index(lake: Lake, name: str) -> dict[str, Any]:
    """A shard's index as JSON; whether it is that of the tar is not asked. Raises DamagedShard."""
    path, place = lake.store.address(shard_key(name)), lake.store.address(index_key(name))
    try:
        index = json.loads(lake.store.read(index_key(name)))
        number = index["format"]
        good = index["shard"] == name and all(
            isinstance(entry["key"], str) and isinstance(entry["sha256"], str) and isinstance(entry["members"], dict)
            for entry in index["samples"]
        )
        good = good and isinstance(index["bytes"], int) and isinstance(index["sha256"], str)
    except FileNotFoundError:
        if lake.store.size(shard_key(name)) is None:
            raise DamagedShard(f"{path} is missing, and its index too; {_REMEDY}") from None
        raise DamagedShard(f"{place} is missing; {_rebuild(lake, name)}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedShard(f"{place} is no index ({type(error).__name__}: {error}); {_rebuild(lake, name)}") from error
    if number > INDEX_FORMAT:
        raise DamagedShard(f"{place} has format {number}, this program reads {INDEX_FORMAT}; install a newer vlfm")
    if not good:
        raise DamagedShard(f"{place} is not the index of {name}; {_rebuild(lake, name)}")
    return dict(index)


def _rebuild(lake: Lake, name: str) -> str:
    return f"make it anew: vlfm repair --lake {lake.store.address()}"


def _scan(opened: BinaryIO, path: str) -> list[dict[str, Any]]:
    """The entries of an index, from the tar's own headers and bytes; `path` is where it is, for messages."""
    entries: list[dict[str, Any]] = []
    digests: dict[str, bytes | memoryview] = {}
    try:
        with tarfile.open(fileobj=opened, mode="r:") as tar:
            for member in tar:
                key, _, part = member.name.partition(".")
                if not member.isreg() or not part.endswith((".npy", ".json")):
                    raise DamagedShard(f"{path} holds {member.name!r}, which we do not write; {_REMEDY}")
                if not entries or entries[-1]["key"] != key:
                    entries.append({"key": key, "members": {}, "sha256": "", "checksums": {}})
                    digests = {}
                file = tar.extractfile(member)
                digests[part] = file.read() if file is not None else b""
                entries[-1]["members"][part] = [member.offset_data, member.size]
                entries[-1]["checksums"][part] = _member_digest(digests[part])
                entries[-1]["sha256"] = sample_digest(digests)
    except (tarfile.TarError, EOFError) as error:
        raise DamagedShard(f"{path} is no whole tar ({error}); {_REMEDY}") from error
    return entries
