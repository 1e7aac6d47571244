"""Rows of the arrays that no version has are made blank, in one commit that every version can read.

Rows are only ever appended, so the newest version's snapshot holds the rows of all versions, each at its place. A blank
row keeps the others' places: its values are the arrays' fill value, its id is 16 zero bytes, and of an array with a
chunk per clip it takes no room. With all versions on this one snapshot, the history before it can go
(storage.repository.expire_history): it is what many small refreshes leave behind, parts of shards written again.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from storage.arrays import TEXT_ARRAYS, Array
from storage.layout import Lake, LakeError
from storage.repository import committing, fsync_changed, open_repository, storage_errors, writable_from
from storage.version import Version, read_manifest


@dataclass
class Used:
    """Rows of a group that versions have."""

    clips: dict[int, str] = field(default_factory=dict)
    """Row to clip id."""
    texts: set[int] = field(default_factory=lambda: {0})
    """Rows of captions; the empty one's always."""


def used_rows(lake: Lake, versions: Iterable[Version], without: frozenset[str] = frozenset()) -> dict[str, Used]:
    """The rows that these versions have, by group, without those of the clips `without`.

    Raises:
        LakeError: a version's table is damaged, or two versions say different things of a row.
    """
    used: dict[str, Used] = {}
    for version in versions:
        own = used.setdefault(version.group, Used())
        table = read_manifest(lake, version, "clips", ["clip_id", "array_row", "text_row"])
        for clip, row, text in zip(*(table.column(name).to_pylist() for name in table.column_names), strict=True):
            if clip in without:
                continue
            if own.clips.setdefault(row, clip) != clip:
                raise LakeError(f"version {version.number}: row {row} of the arrays is another version's {clip}")
            own.texts.add(text)
    return used


def blank_rows(lake: Lake, snapshot: str, used: Mapping[str, Used], message: str) -> tuple[str, int]:
    """A snapshot after `snapshot` without groups and rows that are not `used`, and how many rows have become blank.

    Where there is nothing to do it is `snapshot` itself.

    Raises:
        LakeError: no such snapshot, a damaged array, or a row holds another clip than `used` says.
        DiskFull: no room; the lake is as before.
    """
    import zarr

    started = time.time()
    with committing(lake), storage_errors(lake):
        repository = open_repository(lake)
        session = writable_from(lake, repository, snapshot)
        root = zarr.open_group(session.store, mode="a")
        blanked = 0
        for name in sorted(root.group_keys()):
            if name not in used:
                del root[name]
                continue
            group: Any = root[name]
            blanked += _blank_clips(lake, name, group, used[name].clips)
            _blank_texts(group, used[name].texts)
        if not session.has_uncommitted_changes:
            return snapshot, 0
        made = session.commit(message)
        fsync_changed(lake, started)
    return made, blanked


def unused_rows(lake: Lake, snapshot: str, used: Mapping[str, Used]) -> int:
    """How many rows of clips `blank_rows` would make blank. Raises as it does."""
    import zarr

    from storage.repository import at_snapshot

    with storage_errors(lake):
        root = zarr.open_group(at_snapshot(lake, snapshot).store, mode="r")
        total = 0
        for name in root.group_keys():
            group: Any = root[name]
            kept = used[name].clips if name in used else {}
            total += len(_dead(np.asarray(group["clip_id"][:]), kept))
        return total


def _blank_clips(lake: Lake, name: str, group: Any, kept: Mapping[int, str]) -> int:
    ids = np.asarray(group["clip_id"][:])
    for row, clip in kept.items():
        if row >= len(ids) or ids[row].tobytes() != clip.encode("ascii"):
            raise LakeError(
                f"{lake.store.address('arrays')} ({name}): row {row} is not clip {clip}; "
                f"`vlfm repair --lake {lake.store.address()}` puts it right"
            )
    dead = _dead(ids, kept)
    if not len(dead):
        return 0
    shown = np.asarray(group["preview_row"][:])[dead]
    for array in group.array_keys():
        if array in (*TEXT_ARRAYS, "preview"):
            continue
        _fill(group[array], dead, -1 if array == "preview_row" else 0)
    if (shown >= 0).any():
        _fill(group["preview"], np.unique(shown[shown >= 0]), 0)
    return len(dead)


def _blank_texts(group: Any, kept: set[int]) -> None:
    identities = np.asarray(group["caption_id"][:])
    dead = np.array([row for row in range(len(identities)) if row not in kept and identities[row].any()], np.int64)
    if len(dead):
        _fill(group["texts"], dead, 0)
        _fill(group["text_length"], dead, 1)
        _fill(group["caption_id"], dead, 0)


def _dead(ids: Array, kept: Mapping[int, str]) -> Array:
    return np.array([row for row in range(len(ids)) if row not in kept and ids[row].any()], np.int64)


def _fill(array: Any, rows: Sequence[int] | Array, value: int) -> None:
    """Set rows to a value, a run of neighbours at a time."""
    wanted = np.asarray(rows)
    for run in np.split(wanted, np.flatnonzero(np.diff(wanted) > 1) + 1):
        array[int(run[0]) : int(run[-1]) + 1] = value
