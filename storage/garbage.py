"""Garbage: what a lake holds and no version needs, and versions that are to go. Nothing is removed without being asked.

expired     versions before the newest N, where `keep` says so
orphans     shards, indexes, tables and texts that no version names; temporary files
staged      blocks that a version has already, parts of blocks, damaged ones
failures    tables of runs that began before the oldest version that stays, and empty ones; the newest stays
arrays      rows that no version has, and the history of the arrays: old parts of shards that were written again
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from storage.blanking import blank_rows, unused_rows, used_rows
from storage.change import Change, finish, orphans, rewritten, write_change
from storage.failures import failures_key
from storage.layout import Lake, LakeError
from storage.repository import history
from storage.staging import DamagedBlock, block_key, read_block_meta, staged_blocks
from storage.version import Version, list_versions, load, named_files, read_manifest


@dataclass(frozen=True)
class Garbage:
    """What there is to collect."""

    kept: tuple[int, ...]
    """Versions that stay."""
    expired: tuple[int, ...]
    """Versions that go."""
    orphans: tuple[str, ...]
    """Keys that no version which stays names, and addresses of temporary files."""
    blocks: tuple[str, ...]
    """Staged blocks."""
    runs: tuple[str, ...]
    """Runs whose failure tables go."""
    rows: int
    """Rows of the arrays that no version which stays has."""
    snapshots: int
    """Snapshots of the arrays that go."""
    bytes: int
    """Of all this but the arrays."""
    array_bytes: int
    """Of the arrays, as they are."""

    @property
    def empty(self) -> bool:
        """Whether there is nothing to do."""
        return not (self.expired or self.orphans or self.blocks or self.runs or self.rows or self.snapshots)

    def lines(self) -> list[str]:
        """What there is, for people."""
        counted = [
            (len(self.expired), f"expired versions: {_numbers(self.expired)}"),
            (len(self.orphans), "files that no version needs"),
            (len(self.blocks), "staged blocks that nothing will use"),
            (len(self.runs), "failure tables of old runs"),
            (self.rows, "rows of the arrays that no version has"),
            (self.snapshots, f"old snapshots of the arrays, which take {self.array_bytes / 1e6:.1f} MB in all"),
        ]
        lines = [f"{count} {what}" for count, what in counted if count]
        return [*lines, f"{self.bytes / 1e6:.1f} MB beside the arrays"] if lines else ["no garbage"]

    def to_json(self) -> dict[str, Any]:
        """As JSON."""
        return dataclasses.asdict(self)


def find_garbage(lake: Lake, keep: int | None = None, staged: bool = False) -> Garbage:
    """What `collect` would remove. Call it inside `lake.writing()`.

    Args:
        lake: where.
        keep: how many of the newest versions stay; None keeps all.
        staged: count every staged block, those of an interrupted run too, which the next run would have taken.

    Raises:
        LakeError: `keep` is below 1, or a version or the arrays are damaged.
    """
    if keep is not None and keep < 1:
        raise LakeError(f"--keep is {keep}; the newest version always stays, keep at least 1")
    numbers = list_versions(lake)
    kept = numbers if keep is None else numbers[-keep:]
    versions = {number: load(lake, number) for number in kept}
    gone = {number: load(lake, number) for number in numbers if number not in versions}
    remaining = {key for version in versions.values() for key in named_files(version)}
    leaving = {key for version in gone.values() for key in named_files(version)} - remaining
    leaving |= {key.removesuffix(".tar") + ".index.json" for key in leaving if key.endswith(".tar")}
    loose = sorted({*orphans(lake), *leaving})
    blocks = tuple(_stale_blocks(lake, versions.values(), staged))
    runs = tuple(_old_runs(lake, versions))
    sized = [*loose, *(block_key(block) for block in blocks), *(failures_key(run) for run in runs)]
    rows = snapshots = arrays = 0
    if versions:
        newest = versions[kept[-1]]
        rows = unused_rows(lake, newest.snapshot, used_rows(lake, versions.values()))
        # One snapshot is the repository's empty beginning.
        snapshots = max(0, len(history(lake)) - 2)
        arrays = sum(lake.store.sizes("arrays/").values())
    return Garbage(
        kept=tuple(kept),
        expired=tuple(gone),
        orphans=(*loose, *lake.store.clean(delete=False)),
        blocks=blocks,
        runs=runs,
        rows=rows,
        snapshots=snapshots,
        bytes=sum(lake.store.size(key) or 0 for key in sized),
        array_bytes=arrays,
    )


def collect(lake: Lake, keep: int | None = None, staged: bool = False) -> tuple[Garbage, int]:
    """Remove the garbage: what there was, and the bytes freed. Call it inside `lake.writing()`.

    What stays keeps its numbers, its Merkle roots and every byte of its shards and tables; version files name the one
    snapshot of the arrays that is left. Killed at any point, the next command that writes goes on with it.

    Raises as `find_garbage`, and DiskFull.
    """
    finish(lake)
    found = find_garbage(lake, keep, staged)
    if found.empty:
        return found, 0
    before = lake_bytes(lake)
    versions = {number: load(lake, number) for number in found.kept}
    changed: Mapping[str, str] = {}
    if versions:
        newest = versions[found.kept[-1]].snapshot
        used = used_rows(lake, versions.values())
        snapshot, _ = blank_rows(lake, newest, used, f"gc {time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())}")
        moved = [dataclasses.replace(it, snapshot=snapshot) for it in versions.values() if it.snapshot != snapshot]
        changed = dict(rewritten(version) for version in moved)
    write_change(lake, Change("gc", changed, found.expired, found.runs, found.blocks))
    finish(lake)
    return found, before - lake_bytes(lake)


def lake_bytes(lake: Lake) -> int:
    """Bytes of all files of the lake."""
    return sum(lake.store.sizes().values())


def _stale_blocks(lake: Lake, versions: Iterable[Version], every: bool) -> list[str]:
    blocks = staged_blocks(lake)
    if every or not blocks:
        return blocks
    known: set[str] = set()
    for version in versions:
        for table in ("clips", "rejected"):
            known.update(read_manifest(lake, version, table, ["clip_id"]).column("clip_id").to_pylist())
    stale = []
    for block in blocks:
        try:
            clips = read_block_meta(lake, block).get("block", [])
        except (DamagedBlock, FileNotFoundError):
            clips = []
        if "-" in block or set(clips) <= known:
            stale.append(block)
    return stale


def _old_runs(lake: Lake, versions: Mapping[int, Version]) -> list[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    keys = [key for key in lake.store.list_keys("failures/") if key.endswith(".parquet")]
    oldest = min((version.created for version in versions.values()), default="")
    since = "".join(sign for sign in oldest if sign not in "-:")  # as the names of runs begin
    old = []
    for key in keys[:-1]:
        run = key.removeprefix("failures/").removesuffix(".parquet")
        try:
            rows = pq.ParquetFile(pa.BufferReader(lake.store.read(key))).metadata.num_rows
        except pa.ArrowInvalid:
            rows = 0
        if not rows or run.partition("-")[0] < since:
            old.append(run)
    return old


def _numbers(numbers: tuple[int, ...]) -> str:
    return f"{numbers[0]} to {numbers[-1]}" if len(numbers) > 2 else " and ".join(map(str, numbers))
