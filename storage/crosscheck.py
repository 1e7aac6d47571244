"""One dataset in two stores: whether the Zarr arrays and the shards say the same of every clip."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from storage.arrays import Array, count_rows, read_clips, read_texts
from storage.layout import Lake, LakeError
from storage.repository import MEND
from storage.shards import DamagedShard, ShardReader

_BATCH = 16  # clips read together; previews are large
_MEMBERS = ("coefficients", "latents", "frame_time", "observed")


def compare_with_shards(
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
                where = f"{lake.arrays} ({group}), row {row['array_row']}"
                clip_id, text_row = stored["clip_id"][number], stored["text_row"][number]
                if clip_id != row["clip_id"]:
                    problems.append(f"{where} is clip {clip_id}, the manifest says {row['clip_id']}; {MEND}")
                elif text_row != row["text_row"] or not 0 <= text_row < len(texts.lengths):
                    problems.append(f"{where} has text {text_row}, the manifest says {row['text_row']}; {MEND}")
                else:
                    expected = {name: stored[name][number] for name in _MEMBERS if name in stored}
                    expected["text"] = texts.embeddings[text_row, : texts.lengths[text_row]]
                    if stored["preview_row"][number] >= 0:
                        expected["preview"] = stored["preview"][stored["preview_row"][number]]
                    problems += _compare_sample(readers, row, expected, where)
        problems += [
            f"{lake.arrays} ({group}) has {total} rows, not row {row['array_row']} of clip {row['clip_id']}; {MEND}"
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
        f"{where}: {name} of clip {row['clip_id']} differ from those in {row['shard']}; {MEND}"
        for name, array in expected.items()
        # A sample holds the frames there are, a row of the arrays is padded.
        if (found := sample.get(f"{name}.npy")) is not None
        and not (len(found) <= len(array) and np.array_equal(found, array[: len(found)]))
    ] + [
        f"{row['shard']}: clip {row['clip_id']} lacks {name}; {MEND}"
        for name in ("coefficients.npy", "text.npy")
        if name not in sample
    ]
