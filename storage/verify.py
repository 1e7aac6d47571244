"""Verification: everything that a version names is read and compared, each file with its checksum and both stores.

Copies of one thing are compared bit for bit here: shards, their indexes, tables and arrays all hold the same clips.
What two computations of one thing may differ by is `storage.rounding`'s.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from storage.arrays import NEXT_ARRAYS, Array, count_rows, read_clips, read_texts
from storage.layout import Lake, LakeError
from storage.repository import REMEDY as RESTORE
from storage.repository import address
from storage.shards import DamagedShard, ShardReader
from storage.version import REMEDY, Version, checked_bytes, list_versions, load, read_manifest, samples_root

_BATCH = 16  # clips read together; previews are large
_MEMBERS = ("coefficients", "latents", "frame_time", "observed", *NEXT_ARRAYS)


def verify(lake: Lake, version: Version, arrays: bool = True) -> list[str]:
    """Read everything the version names and compare it: the problems found, each naming the file and the remedy.

    Checksums of tables, shards and samples; each index against its tar; the Merkle root; the table of clips against
    the shards, row by row; and with `arrays`, the shards against the Zarr arrays (clip ids, coefficients, texts).

    Args:
        lake: where.
        version: which.
        arrays: False leaves out the arrays, where zarr and icechunk are not installed (the trainer's image).
    """
    problems: list[str] = []
    for entry in (*version.manifest.values(), *([version.text["empty"]] if "empty" in version.text else [])):
        try:
            checked_bytes(lake, entry)
        except LakeError as error:
            problems.append(str(error))
    return problems + _compare_stores(lake, version, arrays)


def verify_all(lake: Lake, arrays: bool = True) -> dict[int, list[str]]:
    """`verify` of every version, also of those whose files cannot be read: problems by number.

    Raises:
        LakeError: there is no version at all.
    """
    found: dict[int, list[str]] = {}
    for number in list_versions(lake):
        try:
            found[number] = verify(lake, load(lake, number), arrays)
        except LakeError as error:
            found[number] = [str(error)]
    if not found:
        load(lake)
    return found


def _compare_stores(lake: Lake, version: Version, arrays: bool) -> list[str]:
    problems: list[str] = []
    readers: dict[str, ShardReader] = {}
    for info in version.shards:
        try:
            reader = ShardReader(lake, info.name)
        except DamagedShard as error:
            problems.append(str(error))
            continue
        readers[info.name] = reader
        problems += reader.verify()
        if reader.info != info:
            problems.append(f"{reader.path} is not the shard that version {version.number} names; {REMEDY}")
    if len(readers) == len(version.shards):
        root = samples_root(pair for r in readers.values() for pair in zip(r.keys, r.digests, strict=True))
        if root != version.merkle_root:
            problems.append(f"version {version.number}: the shards' samples do not give its Merkle root; {REMEDY}")
    try:
        rows = read_manifest(lake, version, "clips").to_pylist()
    except (LakeError, ValueError):
        return problems  # reported above
    problems += _compare_table(version, rows, readers)
    if arrays:
        problems += compare_arrays(lake, version.snapshot, version.group, rows, readers)
    return problems


def _compare_table(version: Version, rows: list[dict[str, Any]], readers: Mapping[str, ShardReader]) -> list[str]:
    problems = []
    path = version.manifest["clips"]["path"]
    keys = {name: reader.keys for name, reader in readers.items()}
    names = {info.name for info in version.shards}
    for row in rows:
        clip, shard, place = row["clip_id"], row["shard"], row["shard_row"]
        if shard not in names:
            problems.append(
                f"{path}: clip {clip} is in {shard}, which version {version.number} does not name; {REMEDY}"
            )
        elif shard in keys and not (0 <= place < len(keys[shard]) and keys[shard][place] == clip):
            problems.append(f"{path}: clip {clip} is not row {place} of {shard}; {REMEDY}")
    listed = {row["clip_id"] for row in rows}
    if len(listed) != len(rows):
        problems.append(f"{path}: a clip id occurs twice; {REMEDY}")
    for name in sorted(keys):
        problems += [f"{path} lacks clip {key} of {name}; {REMEDY}" for key in keys[name] if key not in listed]
    return problems


def compare_arrays(
    lake: Lake, snapshot: str, group: str, rows: Sequence[Mapping[str, Any]], readers: Mapping[str, ShardReader]
) -> list[str]:
    """Compare clip ids, texts and every array that both stores hold, clip by clip: the problems found.

    Args:
        lake: where.
        snapshot: the version's.
        group: the version's.
        rows: the clips' manifest, which says where each clip is in either store.
        readers: the shards that could be opened, by name; clips in others are left out (they are reported already).
    """
    problems: list[str] = []
    try:
        total = count_rows(lake, snapshot, group)
        texts = read_texts(lake, snapshot, group)
        for start in range(0, len(rows), _BATCH):
            part = [row for row in rows[start : start + _BATCH] if 0 <= row["array_row"] < total]
            stored = read_clips(lake, snapshot, group, [row["array_row"] for row in part])
            if (stored["preview_row"] >= 0).any():
                stored |= read_clips(lake, snapshot, group, [row["array_row"] for row in part], ["preview"])
            for number, row in enumerate(part):
                where = f"{address(lake)} ({group}), row {row['array_row']}"
                clip_id, text_row = stored["clip_id"][number], stored["text_row"][number]
                if clip_id != row["clip_id"]:
                    problems.append(f"{where} is clip {clip_id}, the manifest says {row['clip_id']}; {RESTORE}")
                elif text_row != row["text_row"] or not 0 <= text_row < len(texts.lengths):
                    problems.append(f"{where} has text {text_row}, the manifest says {row['text_row']}; {RESTORE}")
                else:
                    expected = {name: stored[name][number] for name in _MEMBERS if name in stored}
                    expected["text"] = texts.embeddings[text_row, : texts.lengths[text_row]]
                    if stored["preview_row"][number] >= 0:
                        expected["preview"] = stored["preview"][stored["preview_row"][number]]
                    problems += _compare_sample(readers, row, expected, where)
        problems += [
            f"{address(lake)} ({group}) has {total} rows, not row {row['array_row']} of clip {row['clip_id']}; "
            f"{RESTORE}"
            for row in rows
            if not 0 <= row["array_row"] < total
        ]
    except LakeError as error:
        problems.append(str(error))
    return problems


def _compare_sample(
    readers: Mapping[str, ShardReader], row: Mapping[str, Any], expected: Mapping[str, Array], where: str
) -> list[str]:
    reader = readers.get(row["shard"])
    if reader is None or not 0 <= row["shard_row"] < len(reader):
        return []
    try:
        sample = reader[row["shard_row"]]
    except DamagedShard as error:
        return [str(error)]
    return [
        f"{where}: {name} of clip {row['clip_id']} differ from those in {row['shard']}; {RESTORE}"
        for name, array in expected.items()
        # A sample holds the frames there are, a row of the arrays is padded.
        if (found := sample.get(f"{name}.npy")) is not None
        and not (len(found) <= len(array) and np.array_equal(found, array[: len(found)]))
    ] + [
        f"{row['shard']}: clip {row['clip_id']} lacks {name}; {RESTORE}"
        for name in ("coefficients.npy", "text.npy")
        if name not in sample
    ]
