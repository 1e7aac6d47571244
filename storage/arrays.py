"""The arrays of all clips: Zarr in an Icechunk repository, whose snapshots are the versions' pasts.

    <group>/            one per data recipe: the first 16 digits of its fingerprint
        clip_id         (clips, 16) uint8           the id's ASCII digits
        latents         (clips, N_max, C, h, w) float16     where the recipe keeps them
        coefficients    (clips, order, C, h, w) float16
        frame_time      (clips, N_max) float64      seconds in the window, NaN beyond the last frame
        observed        (clips, N_max) bool
        next_latents    (clips, 1, C, h, w) float16;  next_time (clips, 1) float64      the film's next frame after the
                        window, seconds from its start, NaN where there is none; only by recipes with `next_frame`
        clip_start, duration (clips) float64;  text_row, order_used, preview_row (clips) int32
        preview         (previews, N_max, H, W, 3) uint8    preview_row says whose, -1: none
        texts           (captions, L, D) float16;  text_length (captions) int32;  caption_id (captions, 16) uint8

Not compressed (it gains 8 % and halves the speed); every chunk carries a checksum that is compared when it is read.
Rows are only ever appended. One committer at a time (a lock sees to it): concurrent ones lose commits on a local disk.
What a dead run appended is no version's, and the next append starts from the newest version's snapshot again.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from storage.fingerprint import ID_LENGTH
from storage.layout import Lake, LakeError
from storage.repository import (
    at_snapshot,
    committing,
    drop_unreachable,
    fsync_changed,
    is_disk_full,
    open_repository,
    storage_errors,
    writable_from,
)

if TYPE_CHECKING:
    import icechunk
    import zarr

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

CLIPS_PER_SHARD = 100
SHARD_BYTES = 128 << 20
"""A Zarr shard holds about 100 clips, fewer where they are so big that it would pass this size."""

_SMALL_ROW = 4096  # bytes; smaller rows share a chunk
_DTYPES = {
    "latents": np.float16,
    "coefficients": np.float16,
    "frame_time": np.float64,
    "next_latents": np.float16,
    "next_time": np.float64,
    "observed": np.bool_,
    "clip_start": np.float64,
    "duration": np.float64,
    "order_used": np.int32,
    "preview": np.uint8,
    "preview_row": np.int32,
}
_REQUIRED = ("clip_id", "caption_id", "coefficients", "frame_time", "observed", "clip_start", "duration", "order_used")
NEXT_ARRAYS = ("next_latents", "next_time")
"""Of the film's next frame after a window; in groups of recipes that use it."""
TEXT_ARRAYS = ("texts", "text_length", "caption_id")


@dataclass(frozen=True)
class Texts:
    """Embedded captions, one row each."""

    caption_ids: Sequence[str]
    """16 digits each. The first one of a new group is the empty caption's: row 0."""
    embeddings: Array
    """(captions, L, D) float16; rows beyond a caption's length are padding."""
    lengths: Array
    """(captions,) integers, 1 to L: valid rows."""


def append_clips(
    lake: Lake,
    group: str,
    clips: Mapping[str, Array | Sequence[str]],
    texts: Texts | None = None,
    message: str = "append clips",
    parent: str | None = None,
    made_again: bool = False,
) -> tuple[str, int]:
    """Append clips to a group in one commit: (the new snapshot's id, the first new row).

    Args:
        lake: where.
        group: first 16 digits of the data recipe's fingerprint; made at its first append, with the sizes it has there.
        clips: `clip_id` and `caption_id`: one text each per clip; every other entry an array whose first axis is the
            clips', of the types at the top. `latents` and `preview` may be absent. `preview` has one row per clip
            that has one, and then `preview_row` says for each clip which row of it, or -1. `text_row` is found here.
            Further numeric arrays are kept too.
        texts: captions; those that the group has already are left out. A new group's first is the empty caption.
        message: for Icechunk's history.
        parent: snapshot to continue, by default that of the newest version (or nothing, before the first). A run that
            appends several times hands on each snapshot; anything else behind `parent` is dropped.
        made_again: whether clips may be in the group already, of versions that are damaged or gone; they get new rows.

    Raises:
        ValueError: entries missing, of other types, sizes or names than the group's; a clip that is there already; a
            caption without text; NaN or infinity in coefficients or latents.
        LakeError: `parent` is not in the repository.
        DiskFull: no room; what was written is collected, and the lake is as before.
    """
    clips = {name: value if isinstance(value, np.ndarray) else list(value) for name, value in clips.items()}
    _check_clips(clips)
    started = time.time()
    with committing(lake), storage_errors(lake):
        repository = open_repository(lake, create=True)
        session = writable_from(lake, repository, parent)
        try:
            first = append_rows(open_group(session, group, create=True), dict(clips), texts, made_again)
            snapshot = session.commit(message)
        except Exception as error:
            if is_disk_full(error):
                with contextlib.suppress(Exception):  # whatever goes wrong here, the full disk is what people must read
                    drop_unreachable(lake, repository)
            raise
        fsync_changed(lake, started)
    return snapshot, first


def read_clips(
    lake: Lake,
    snapshot: str,
    group: str,
    rows: slice | Sequence[int] | Array | None = None,
    names: Sequence[str] | None = None,
) -> dict[str, Array]:
    """Arrays of the clips `rows` (all of them by default) as of `snapshot`, by name.

    `clip_id` comes as text. `preview` comes with one row per clip among `rows` that has one, and `preview_row` then
    points into it. `names` defaults to everything but `preview`; texts are read by `read_texts`.

    Raises:
        LakeError: no such snapshot, group or array; the message says what there is.
        IndexError: a row beyond the snapshot's.
    """
    with storage_errors(lake):
        opened = open_group(at_snapshot(lake, snapshot), group)
        stored = [name for name in opened.array_keys() if name not in TEXT_ARRAYS]
        names = [name for name in stored if name != "preview"] if names is None else names
        for name in names:
            if name not in stored:
                raise LakeError(f"group {group} has no array {name!r}; there are: {', '.join(sorted(stored))}")
        found = {name: _read(opened[name], rows) for name in names if name != "preview"}
        if "preview" in names:
            places = _read(opened["preview_row"], rows)
            shown = places[places >= 0]
            found["preview"] = _read(opened["preview"], shown)
            found["preview_row"] = np.where(places >= 0, np.cumsum(places >= 0) - 1, -1).astype(np.int32)
        if "clip_id" in found:
            found["clip_id"] = np.array(_to_ids(found["clip_id"]), dtype=f"U{ID_LENGTH}")
        return found


def read_texts(lake: Lake, snapshot: str, group: str, rows: slice | Sequence[int] | Array | None = None) -> Texts:
    """The captions `rows` (all by default) as of `snapshot`. Raises as `read_clips` does."""
    with storage_errors(lake):
        opened = open_group(at_snapshot(lake, snapshot), group)
        return Texts(
            _to_ids(_read(opened["caption_id"], rows)),
            _read(opened["texts"], rows),
            _read(opened["text_length"], rows),
        )


def text_rows(lake: Lake, snapshot: str, group: str) -> dict[str, int]:
    """Where each caption's text is as of `snapshot`: caption_id -> row. Raises as `read_clips` does."""
    with storage_errors(lake):
        identities = _to_ids(_read(open_group(at_snapshot(lake, snapshot), group)["caption_id"], None))
    return {identity: row for row, identity in enumerate(identities)}


def count_rows(lake: Lake, snapshot: str, group: str) -> int:
    """Clips in the group as of `snapshot`. Raises as `read_clips` does."""
    with storage_errors(lake):
        return _length(open_group(at_snapshot(lake, snapshot), group), "clip_id")


def _check_clips(clips: Mapping[str, Any]) -> None:
    missing = [name for name in _REQUIRED if name not in clips]
    if missing:
        raise ValueError(f"clips to append lack {', '.join(missing)}")
    count = len(clips["clip_id"])
    if count == 0:
        raise ValueError("no clips to append; publish a version without an append")
    if ("preview" in clips) != ("preview_row" in clips):
        raise ValueError("preview and preview_row go together: give both or neither")
    for name, value in clips.items():
        if name != "preview" and len(value) != count:
            raise ValueError(f"{name} has {len(value)} rows, there are {count} clip ids")
        if name in ("clip_id", "caption_id"):
            bad = next((i for i in value if not isinstance(i, str) or len(i) != ID_LENGTH or not i.isascii()), None)
            if bad is not None:
                raise ValueError(f"{name} {bad!r} is not a text of {ID_LENGTH} digits; see fingerprint.short_id")
            continue
        array = np.asarray(value)
        kind = _DTYPES.get(name, array.dtype)
        if array.dtype != kind or array.dtype.hasobject:
            raise ValueError(f"{name} has type {array.dtype}, it is stored as {np.dtype(kind)}; convert it (and check)")
        if name in ("coefficients", "latents", "next_latents"):
            finite = np.isfinite(array.reshape(count, -1)).all(axis=1)
            if not finite.all():
                clip = clips["clip_id"][int(np.argmin(finite))]
                raise ValueError(f"clip {clip}: {name} hold NaN or infinity (float16 ends at 65504)")
    if len(set(clips["clip_id"])) != count:
        raise ValueError("a clip id occurs twice among the clips to append")


def append_rows(group: zarr.Group, clips: dict[str, Any], texts: Texts | None, made_again: bool = False) -> int:
    """Add the rows to every array of the group: the first new row."""
    known = _append_texts(group, texts)
    captions = clips.pop("caption_id")
    unknown = next((identity for identity in captions if identity not in known), None)
    if unknown is not None:
        raise ValueError(f"caption {unknown} has no text in the group and none was given; add it to texts")
    first = _length(group, "clip_id") if "clip_id" in group else 0
    if first and not made_again:
        there = set(_to_ids(_read(group["clip_id"], None)))
        again = next((identity for identity in clips["clip_id"] if identity in there), None)
        if again is not None:
            raise ValueError(f"clip {again} is in the group already, and what is stored never changes; leave it out")
    clips["text_row"] = np.array([known[identity] for identity in captions], np.int32)
    clips["clip_id"] = _from_ids(clips["clip_id"])
    preview = clips.pop("preview", None)
    places = np.asarray(clips.pop("preview_row", np.full(len(captions), -1)), np.int32)
    if preview is not None and sorted(places[places >= 0]) != list(range(len(preview))):
        raise ValueError(f"preview_row must name each of the {len(preview)} previews once, and -1 elsewhere")
    shown = _length(group, "preview") if "preview" in group else 0
    clips["preview_row"] = np.where(places >= 0, places + shown, -1).astype(np.int32)
    stored = {name for name in group.array_keys() if name not in (*TEXT_ARRAYS, "preview")}
    if stored and stored != set(clips):
        raise ValueError(f"the group has arrays {sorted(stored)}, the clips to append have {sorted(clips)}")
    for name in sorted(clips):
        _extend(group, name, clips[name])
    if preview is not None and len(preview):
        _extend(group, "preview", preview)
    return first


def _append_texts(group: zarr.Group, texts: Texts | None) -> dict[str, int]:
    """Add the captions that are new: caption_id -> row for all of the group."""
    present = _to_ids(_read(group["caption_id"], None)) if "caption_id" in group else []
    known = {identity: row for row, identity in enumerate(present)}
    if texts is None:
        return known
    embeddings, lengths = np.asarray(texts.embeddings), np.asarray(texts.lengths)
    if embeddings.ndim != 3 or embeddings.dtype != np.float16 or len(embeddings) != len(texts.caption_ids):
        raise ValueError(f"texts: {embeddings.dtype} {embeddings.shape}, not float16 (captions, L, D) like caption_ids")
    if lengths.shape != (len(embeddings),) or ((lengths < 1) | (lengths > embeddings.shape[1])).any():
        raise ValueError(f"texts: lengths must be one per caption, 1 to {embeddings.shape[1]}")
    new = [row for row, identity in enumerate(texts.caption_ids) if identity not in known]
    for place, row in enumerate(new, start=len(present)):
        known[texts.caption_ids[row]] = place
    if len({texts.caption_ids[row] for row in new}) != len(new):
        raise ValueError("a caption id occurs twice among the texts")
    if new:
        _extend(group, "caption_id", _from_ids([texts.caption_ids[row] for row in new]))
        _extend(group, "text_length", lengths[new].astype(np.int32))
        _extend(group, "texts", embeddings[new])
    return known


def _extend(group: zarr.Group, name: str, rows: Array) -> None:
    """Append `rows` to the array `name`, made on first use, one Zarr shard after the other."""
    from zarr.codecs import Crc32cCodec

    rows = np.ascontiguousarray(rows)
    shape = rows.shape[1:]
    size = max(1, int(np.prod(shape)) * rows.dtype.itemsize)
    if name not in group:
        small = size < _SMALL_ROW
        step = max(CLIPS_PER_SHARD, (64 << 10) // size) if small else max(1, min(CLIPS_PER_SHARD, SHARD_BYTES // size))
        group.create_array(
            name,
            shape=(0, *shape),
            dtype=rows.dtype,
            chunks=(step if small else 1, *shape),
            shards=None if small else (step, *shape),
            compressors=Crc32cCodec(),
            filters=None,
            fill_value=0,
        )
    array: Any = group[name]
    if array.shape[1:] != shape or array.dtype != rows.dtype:
        raise ValueError(
            f"{name} is {array.dtype} {array.shape[1:]} in the group, the new rows are {rows.dtype} {shape}"
        )
    step = (array.shards or array.chunks)[0]
    start = array.shape[0]
    array.resize((start + len(rows), *shape))
    done = 0
    # One shard at a time: each is written once, and an error leaves no other write under way.
    while done < len(rows):
        count = min(step - (start + done) % step, len(rows) - done)
        array[start + done : start + done + count] = rows[done : done + count]
        done += count


def _length(group: zarr.Group, name: str) -> int:
    array: Any = group[name]
    return int(array.shape[0])


def _read(array: Any, rows: slice | Sequence[int] | Array | None) -> Array:
    if rows is None:
        return np.asarray(array[:])
    if isinstance(rows, slice):
        return np.asarray(array[rows])
    places = np.asarray(rows, dtype=np.int64)
    total = array.shape[0]
    if len(places) == 0:
        return np.empty((0, *array.shape[1:]), array.dtype)
    if places.min() < 0 or places.max() >= total:
        raise IndexError(f"{array.path}: rows {places.min()} to {places.max()} asked for, there are {total}")
    # Runs of neighbours, each in one read: Zarr's own fancy indexing is some 40 times slower on packed rows.
    wanted, back = np.unique(places, return_inverse=True)
    runs = np.split(wanted, np.flatnonzero(np.diff(wanted) > 1) + 1)
    found = np.concatenate([np.asarray(array[int(run[0]) : int(run[-1]) + 1]) for run in runs])
    return found if np.array_equal(places, wanted) else found[back]


def _from_ids(identities: Sequence[str]) -> Array:
    return np.frombuffer("".join(identities).encode("ascii"), np.uint8).reshape(-1, ID_LENGTH)


def _to_ids(rows: Array) -> list[str]:
    text = np.ascontiguousarray(rows).tobytes().decode("ascii")
    return [text[start : start + ID_LENGTH] for start in range(0, len(text), ID_LENGTH)]


def open_group(session: icechunk.Session, group: str, create: bool = False) -> zarr.Group:
    """A group of a session, made where `create` says so and it is not there. Raises LakeError where there is none."""
    import zarr

    root = zarr.open_group(session.store, mode="a" if create else "r")
    if group not in root:
        if create:
            return root.create_group(group, attributes={"vlfm.format": 1})
        raise LakeError(f"the arrays have no group {group}; there are: {', '.join(root.group_keys()) or 'none'}")
    found = root[group]
    assert isinstance(found, zarr.Group)
    return found
