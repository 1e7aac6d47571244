"""Versions: one immutable file each, which names everything that belongs to the dataset at that point.

The order of a publication, each step safe to repeat:

    1. staging/<block_id>.npz          staging.write_block         while the run goes on
    2. shards/<block_id>.tar + index   shards.write_shard
    3. arrays/ (one Icechunk commit)   arrays.append_clips         builds on the newest version's snapshot
    4. manifests/<n>-*.parquet         version.write_manifest      the full tables, not a difference
    5. versions/<n>.json               version.publish             exclusive creation: the only commit point
    6. staging files removed           staging.remove_block

Before step 5 nothing of it exists for a reader; what a dead run left behind is overwritten or ignored by the next.
"""

from __future__ import annotations

import dataclasses
import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from storage.fingerprint import bytes_digest, canonical_json, fingerprint, merkle_root, short_id, stream_digest
from storage.layout import Lake, LakeError, version_naming
from storage.rounding import check_rounding
from storage.schema import CLIP_SCHEMA, FILM_SCHEMA, REJECTED_SCHEMA, check_format, completed, table_of
from storage.shards import ShardInfo, ShardReader
from storage.store import read_tagged

FORMAT = 1
"""Number of the version file's format. A reader refuses a higher one; fields are only ever added."""

TABLES = {"clips": CLIP_SCHEMA, "films": FILM_SCHEMA, "rejected": REJECTED_SCHEMA}
REMEDY = "restore it from a copy, or ingest the films into a new lake"


@dataclass(frozen=True)
class Version:
    """One version of a dataset: all that a trainer needs to know, and where the rest is."""

    number: int
    """From 1, without gaps."""
    created: str
    """UTC, ISO 8601."""
    recipe: dict[str, Any]
    """The data recipe, whole."""
    recipe_fingerprint: str
    """sha256 of the recipe's canonical JSON."""
    codec: dict[str, Any]
    """id, channels, factor, scale, spec (enough to build the codec again)."""
    text: dict[str, Any]
    """id, dim, length (most tokens), spec, empty (the empty caption's embedding, as write_empty_text returns it)."""
    clip: dict[str, Any]
    """duration (s), rate (frames/s), frames_max, frames_observed_max, order, method, latent_shape, frame_shape."""
    snapshot: str
    """Icechunk's id of the snapshot with exactly this version's rows."""
    group: str
    """Group of the arrays: the first 16 digits of the recipe's fingerprint."""
    shards: tuple[ShardInfo, ...]
    """All shards of the dataset, in order."""
    manifest: dict[str, Any]
    """clips, films and rejected, each {path, sha256, rows}, as write_manifest returns them."""
    merkle_root: str
    """Over clip ids and samples' digests, see samples_root."""
    counts: dict[str, Any]
    """Films and clips by status and by reason."""
    parent: int | None = None
    """Number of the version this one continues."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Fields that a newer program wrote and this one does not know."""


def publish(lake: Lake, version: Version) -> bool:
    """Create versions/<number>.json: True, or False where that number is taken (nothing is changed then).

    Raises:
        LakeError: the number leaves a gap, or a file that the version names is not there as it says.
        DiskFull: no room; nothing stays behind.
    """
    key = version_key(version.number)
    if lake.store.size(key) is not None:
        return False
    newest = max(list_versions(lake), default=0)
    if version.number != newest + 1:
        raise LakeError(f"version {version.number} cannot follow version {newest}; publish {newest + 1} next")
    for what, expected in named_files(version).items():
        size = lake.store.size(what)
        if size is None:
            raise LakeError(f"version {version.number} names {what}, which is not there; write it before publishing")
        if isinstance(expected, int):
            good = size == expected
        else:
            with lake.store.open_read(what) as file:
                good = stream_digest(file) == expected
        if not good:
            raise LakeError(f"version {version.number} names {what}, which is not as it says; write it again")
    return lake.store.create_exclusive(key, version_bytes(version))


def version_bytes(version: Version) -> bytes:
    """The content of the version's file."""
    body = dataclasses.asdict(version)
    body = {**body.pop("extra"), **body, "format": FORMAT}
    return canonical_json({**body, "checksum": fingerprint(body)}).encode("ascii")


def list_versions(lake: Lake) -> list[int]:
    """Numbers of the published versions, ascending."""
    return list(_tags(lake))


def latest(lake: Lake) -> Version | None:
    """The newest version, or None where nothing is published yet. Raises as `load` does."""
    return load(lake) if list_versions(lake) else None


def load(lake: Lake, number: int | None = None) -> Version:
    """Version `number`, the newest by default, its checksum compared.

    Raises:
        LakeError: there is no such version, its file is damaged, or of a newer format. The message says the remedy.
    """
    tags = _tags(lake)
    where = lake.store.address()
    if not tags:
        raise LakeError(f"{where} has no version yet; make one with: vlfm ingest SOURCE --lake {where}")
    number = max(tags) if number is None else number
    if number not in tags:
        raise LakeError(f"{where} has no version {number}; there are: {', '.join(map(str, tags))}")
    return _loaded(lake, number, tags[number])


def _tags(lake: Lake) -> dict[int, str]:
    """Numbers of the published versions, ascending, each with its file's tag (see storage.store.Store.tags)."""
    stems = {key.removeprefix("versions/"): tag for key, tag in lake.store.tags("versions/").items()}
    numbered = {name.removesuffix(".json"): tag for name, tag in stems.items() if name.endswith(".json")}
    return dict(sorted((int(stem), tag) for stem, tag in numbered.items() if stem.isdigit()))


def _loaded(lake: Lake, number: int, tag: str) -> Version:
    where = lake.store.address()
    path = lake.store.address(version_key(number))
    try:
        body = json.loads(read_tagged(lake.store, version_key(number), tag))
        checksum = body.pop("checksum")
        if fingerprint(body) != checksum:
            raise ValueError("wrong checksum")
        if body.pop("format") > FORMAT:
            raise LakeError(f"{path} has a newer format than this program reads ({FORMAT}); install a newer vlfm")
        known = {item.name for item in dataclasses.fields(Version)} - {"extra"}
        extra = {key: value for key, value in body.items() if key not in known}
        named = {key: value for key, value in body.items() if key in known}
        named["shards"] = tuple(ShardInfo(**item) for item in named["shards"])
        return Version(**named, extra=extra)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        go = f"vlfm repair --lake {where} --give-up {number}"
        raise LakeError(
            f"{path} is damaged ({error}); restore it from a copy, or let version {number} go: {go}"
        ) from error


def readable_versions(lake: Lake) -> tuple[list[Version], list[str]]:
    """All versions whose files are whole, the newest first, and what is wrong with the others, a line each."""
    found, problems = [], []
    for number, tag in reversed(_tags(lake).items()):
        try:
            found.append(_loaded(lake, number, tag))
        except LakeError as error:
            problems.append(str(error))
    return found, problems


def write_manifest(
    lake: Lake,
    number: int,
    clips: Iterable[Mapping[str, Any]] | Any,
    films: Iterable[Mapping[str, Any]] | Any,
    rejected: Iterable[Mapping[str, Any]] | Any = (),
) -> dict[str, Any]:
    """Write the full tables of version `number`: what `Version.manifest` holds.

    Args:
        lake: where.
        number: the version that will name them.
        clips: rows or a pyarrow table, columns of CLIP_SCHEMA.
        films: rows or a pyarrow table, columns of FILM_SCHEMA.
        rejected: clips that the recipe's gates keep out, columns of REJECTED_SCHEMA.

    Raises:
        ValueError: a row does not fit its schema.
        LakeError: the version is published already.
        DiskFull: no room.
    """
    manifest = {}
    for name, rows in (("clips", clips), ("films", films), ("rejected", rejected)):
        key = f"manifests/{number}-{name}.parquet"
        if (published := version_naming(lake, key)) is not None:
            raise LakeError(
                f"{lake.store.address(key)} belongs to version {published} and never changes; take the next number"
            )
        data, count = _table_bytes(rows, name)
        lake.store.write(key, data)
        manifest[name] = {"path": key, "sha256": bytes_digest(data), "rows": count}
    return manifest


def write_table_again(
    lake: Lake, number: int, table: str, rows: Iterable[Mapping[str, Any]] | Any, entry: Mapping[str, Any]
) -> dict[str, Any]:
    """Write one table of version `number` with other rows: its entry of `Version.manifest`.

    It stands beside the one of `entry`, under a name with its checksum, until the version's file names it
    (storage.change). The same rows leave `entry` as it is. Raises as `write_manifest`.
    """
    data, count = _table_bytes(rows, table)
    digest = bytes_digest(data)
    if digest == entry["sha256"]:
        return dict(entry)
    key = f"manifests/{number}-{table}-{short_id(digest)}.parquet"
    lake.store.write(key, data)
    return {"path": key, "sha256": digest, "rows": count}


def _table_bytes(rows: Iterable[Mapping[str, Any]] | Any, name: str) -> tuple[bytes, int]:
    import pyarrow.parquet as pq

    table = table_of(rows, TABLES[name])
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue(), table.num_rows


def read_manifest(lake: Lake, version: Version, table: str = "clips", columns: Sequence[str] | None = None) -> Any:
    """The version's table of `clips`, `films` or `rejected` (a pyarrow.Table), its checksum compared.

    columns: those that are wanted, all by default: a table of many clips is large.

    A table or a column that the version's program did not know is empty or unknown, see storage.schema.completed.

    Raises:
        LakeError: the file is missing or altered; the message says the remedy.
        ValueError: no such table, or a newer format.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if table not in TABLES:
        raise ValueError(f"no table {table!r}; there are: {', '.join(TABLES)}")
    if table not in version.manifest and table not in ("clips", "films"):
        return TABLES[table].empty_table().select(columns or TABLES[table].names)
    entry = version.manifest[table]
    data = checked_bytes(lake, entry)
    file = pq.ParquetFile(pa.BufferReader(data))
    check_format(file.schema_arrow, table, lake.store.address(entry["path"]))
    stored = None if columns is None else [name for name in columns if name in file.schema_arrow.names]
    # Threads that have just begun can abort a process that ends ("terminate called without an active exception").
    found = completed(file.read(stored, use_threads=False), TABLES[table])
    return found if columns is None else found.select(columns)


def write_empty_text(lake: Lake, text_id: str, embedding: np.ndarray[Any, Any]) -> dict[str, str]:
    """Keep the empty caption's embedding, (length, D) float16, for trainers: the `empty` entry of `Version.text`.

    What a version keeps for this encoder already stays as it is, and `embedding` may differ from it by rounding.

    Raises:
        ValueError: not two axes of float16.
        LakeError: a version keeps one that differs by more than rounding.
        DiskFull: no room.
    """
    if embedding.ndim != 2 or embedding.dtype != np.float16:
        raise ValueError(f"the empty caption's embedding: {embedding.dtype} {embedding.shape}, not float16 (length, D)")
    key = _empty_text_key(text_id)
    if (kept := _keeping(lake, key)) is not None:
        check_rounding(f"the empty caption's embedding by {text_id}", read_empty_text(lake, kept), embedding)
        return dict(kept.text["empty"])
    data = npy_bytes(embedding)
    lake.store.write(key, data)
    return {"path": key, "sha256": bytes_digest(data)}


def npy_bytes(array: np.ndarray[Any, Any]) -> bytes:
    """An array as an .npy file, without pickle."""
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
    return buffer.getvalue()


def kept_empty_text(lake: Lake, text_id: str) -> np.ndarray[Any, Any] | None:
    """The empty caption's embedding by this encoder, (length, D) float16, that a version keeps; None where none does.

    Raises:
        LakeError: the file is missing or altered.
    """
    kept = _keeping(lake, _empty_text_key(text_id))
    return None if kept is None else read_empty_text(lake, kept)


def _keeping(lake: Lake, key: str) -> Version | None:
    """The newest version that can be read and keeps the empty caption's embedding under this key."""
    versions, _ = readable_versions(lake)
    return next((version for version in versions if version.text.get("empty", {}).get("path") == key), None)


def read_empty_text(lake: Lake, version: Version) -> np.ndarray[Any, Any]:
    """The empty caption's embedding, (length, D) float16. Raises LakeError where the file is missing or altered."""
    data = checked_bytes(lake, version.text["empty"])
    embedding: np.ndarray[Any, Any] = np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
    return embedding


def samples_root(samples: Iterable[tuple[str, str]]) -> str:
    """The Merkle root over (clip_id, sample's sha256) pairs, in the order of the clip ids.

    It depends on the clips and their contents only, not on how they are packed into shards.
    """
    return merkle_root([f"{clip_id}:{digest}" for clip_id, digest in sorted(samples)])


def shards_root(lake: Lake, shards: Iterable[ShardInfo]) -> str:
    """`samples_root` over all samples of `shards`, from their indexes: what `Version.merkle_root` holds.

    Raises:
        DamagedShard: a shard or an index is missing or torn.
    """
    samples: list[tuple[str, str]] = []
    for info in shards:
        reader = ShardReader(lake, info.name)
        samples += zip(reader.keys, reader.digests, strict=True)
    return samples_root(samples)


def checked_bytes(lake: Lake, entry: Mapping[str, Any]) -> bytes:
    """The bytes of a file that a version names, `entry` its path and sha256, the checksum compared.

    Raises:
        LakeError: the file is missing or altered.
    """
    path = lake.store.address(entry["path"])
    try:
        data = lake.store.read(entry["path"])
    except FileNotFoundError:
        raise LakeError(f"{path} is missing; {REMEDY}") from None
    if bytes_digest(data) != entry["sha256"]:
        raise LakeError(f"{path}: wrong checksum; {REMEDY}")
    return data


def named_files(version: Version) -> dict[str, str | int]:
    """Every file the version names, with its sha256, or its size where hashing would read gigabytes."""
    files: dict[str, str | int] = {f"shards/{info.name}": info.bytes for info in version.shards}
    files |= {entry["path"]: entry["sha256"] for entry in version.manifest.values()}
    if "empty" in version.text:
        files[version.text["empty"]["path"]] = version.text["empty"]["sha256"]
    return files


def _empty_text_key(text_id: str) -> str:
    return f"texts/{re.sub(r'[^A-Za-z0-9_.-]+', '-', text_id).strip('.-')}-empty.npy"


def version_key(number: int) -> str:
    """The key of a version's file."""
    return f"versions/{number}.json"
