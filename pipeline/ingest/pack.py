"""From staged blocks to a version: shards, arrays, manifest, version file, in the order storage.version describes.

What is published never changes. Clips that left the dataset (their film's content or caption changed) leave it with
their shard: the rest of that shard is written again under a new name, and older versions keep the old one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.gates import flags
from pipeline.ingest.block import Block
from pipeline.ingest.state import IngestPlan
from pipeline.items import BlockResult, MadeClip, Row
from pipeline.rows import caption_id
from pipeline.stages.embed import Texts
from storage.arrays import NEXT_ARRAYS
from storage.errors import Kind, VlfmError
from storage.fingerprint import fingerprint, short_id
from storage.layout import LakeError
from storage.shards import ShardInfo, ShardReader, ShardTaken, write_shard
from storage.staging import DamagedBlock, read_block, remove_block, staged_blocks
from storage.version import Version, publish, shards_root, write_empty_text, write_manifest


class PackError(VlfmError, RuntimeError):
    """The version cannot be published; the message is one line that says the remedy."""

    kind = Kind.CONFLICT


@dataclass(frozen=True)
class Packed:
    """A dataset's clips in their shards."""

    rows: Sequence[Row]
    """Rows of CLIP_SCHEMA."""
    shards: Sequence[ShardInfo]
    snapshot: str
    codec: Row
    """As a version says it."""
    text: Row
    """As a version says it."""
    latent_shape: Sequence[int]


def pack(
    plan: IngestPlan,
    texts: Texts | None,
    blocks: Sequence[Block],
    leaving: set[str],
    rejected: set[str] | frozenset[str] = frozenset(),
    duplicates: Mapping[str, float] | None = None,
) -> Packed:
    """Writes the shards and arrays of the next version (steps 2 and 3 of storage.version).

    Args:
        plan: the plan.
        texts: embeddings of all captions of `blocks`; None where there are no blocks.
        blocks: those that have at least one finished clip, all staged.
        leaving: ids of the base's clips that leave.
        rejected: ids of clips of `blocks`, and of those restored, that the recipe's gates keep out.
        duplicates: of new clips by id, for the table: how many clips came before with the same frames.

    Raises:
        PackError: the codec or the text encoder is not the one that made the base's clips, or a staged block is
            damaged; such a block is removed, so that the next run makes it again.
        DiskFull, LakeError: as storage says.
    """
    from storage.arrays import CLIPS_PER_SHARD, text_rows

    rows, shards = _carried(plan, leaving, rejected)
    base = plan.base
    codec: Row = base.codec if base else {}
    text: Row = base.text if base else {}
    shape: Sequence[int] = base.clip["latent_shape"] if base else []
    newest = plan.parent
    snapshot = newest.snapshot if newest else None
    # An append of about a Zarr shard at a time: fewer commits, and shards are written once.
    waiting: list[tuple[list[Row], Mapping[str, np.ndarray]]] = []
    for block in blocks:
        assert texts is not None
        staged, arrays = _staged(plan, block)
        assert staged.codec is not None
        shape = list(staged.codec.latent_shape)
        codec = _same("codec", codec, staged.codec.to_version())
        clips, arrays = _inside(staged.made, arrays, rejected)
        shard = f"{block.block_id}.tar"
        try:
            info = write_shard(plan.lake, shard, _samples(clips, arrays, texts, plan.recipe.store_latents))
        except ShardTaken:
            # An older version has these clips in a shard that is damaged, and another machine made them: by rounding
            # they differ.
            shard = f"{block.block_id}-{short_id(fingerprint({'run': plan.run_id}))}.tar"
            info = write_shard(plan.lake, shard, _samples(clips, arrays, texts, plan.recipe.store_latents))
        shards.append(info)
        known = duplicates or {}
        placed = [
            {**clip.to_row(), "duplicates": known.get(clip.clip_id, math.nan), "shard": shard, "shard_row": row}
            for row, clip in enumerate(clips)
        ]
        waiting.append((list(placed), arrays))
        if sum(len(part) for part, _ in waiting) >= CLIPS_PER_SHARD or block is blocks[-1]:
            new, together = _joined(waiting)
            snapshot, first = _append(plan, new, together, texts, snapshot)
            rows += [{**row, "array_row": first + number} for number, row in enumerate(new)]
            waiting = []
    if texts is not None:
        facts = {"id": texts.id, "dim": texts.dim, "length": texts.length, "spec": texts.spec}
        empty = write_empty_text(plan.lake, texts.id, texts.empty)
        text = _same("text encoder", text, {**facts, "empty": empty})
    assert snapshot is not None  # no blocks only where there is a version to revive clips from
    texts_at = text_rows(plan.lake, snapshot, short_id(plan.recipe_fingerprint))
    rows = [
        {
            **row,
            "text_row": texts_at[row["caption_id"]],
            "flags": " ".join(flags(row, plan.recipe.gates)),
        }
        for row in rows
    ]
    return Packed(rows, shards, snapshot, codec, text, shape)


def publish_version(
    plan: IngestPlan,
    packed: Packed,
    films: Sequence[Row],
    counts: Row,
    rejected: Sequence[Row] = (),
    measured: Row | None = None,
) -> Version:
    """Writes the tables and the version file (steps 4 to 6), and forgets the staged blocks.

    measured: what the run took, for later plans (pipeline.ingest.cost).

    Raises:
        LakeError: somebody else published meanwhile.
        DiskFull: no room; run again, staged blocks are kept.
    """
    recipe, shots = plan.recipe, plan.recipe.whole_shots
    number = plan.parent.number + 1 if plan.parent else 1
    version = Version(
        number=number,
        created=plan.created,
        recipe=recipe.to_json(),
        recipe_fingerprint=plan.recipe_fingerprint,
        codec=dict(packed.codec),
        text=dict(packed.text),
        clip={
            "duration": recipe.longest,
            "rate": recipe.rate,
            "frames_max": recipe.frames_max,
            "frames_observed_max": recipe.observed_max,
            "order": recipe.coefficients,
            "method": recipe.method,
            "latent_shape": list(packed.latent_shape),
            "frame_shape": [*recipe.size, 3],
            **({} if shots is None else {"variable": True, "min_frames": shots.min_frames}),
            **({"next_frame": True} if recipe.uses_next_frame else {}),
        },
        snapshot=packed.snapshot,
        group=short_id(plan.recipe_fingerprint),
        shards=tuple(packed.shards),
        manifest=write_manifest(plan.lake, number, packed.rows, films, rejected),
        merkle_root=shards_root(plan.lake, packed.shards),
        counts=dict(counts),
        parent=plan.parent.number if plan.parent else None,
        extra={"measured": dict(measured)} if measured else {},
    )
    if not publish(plan.lake, version):
        raise LakeError(f"version {number} was published by another run meanwhile; run the command again")
    for block in plan.blocks:
        for staged in staged_blocks(plan.lake, block.block_id):
            remove_block(plan.lake, staged)
    return version


def _same(what: str, before: Row, now: Row) -> Row:
    if before and before["id"] != now["id"]:
        raise PackError(
            f"the {what} is {now['id']} now, the lake's clips were made with {before['id']}; "
            "use that one, or ingest into a new lake"
        )
    return before or now


def _staged(plan: IngestPlan, block: Block) -> tuple[BlockResult, Mapping[str, np.ndarray]]:
    """A staged block, every byte checked."""
    try:
        arrays, meta = read_block(plan.lake, block.block_id)
    except DamagedBlock as error:
        remove_block(plan.lake, block.block_id)
        told = f"{error.__cause__ or error}".strip()
        raise PackError(
            f"staged block {block.block_id} is damaged ({told}) and was removed",
            "run the same command again, it makes this block anew and keeps the others",
            Kind.DAMAGE,
        ) from error
    return BlockResult.from_json(block.block_id, meta), arrays


def _inside(
    clips: Sequence[MadeClip], arrays: Mapping[str, np.ndarray], rejected: set[str] | frozenset[str]
) -> tuple[list[MadeClip], Mapping[str, np.ndarray]]:
    """A staged block's clips and arrays without the rejected ones."""
    keep = np.array([clip.clip_id not in rejected for clip in clips])
    shown = keep[np.array([clip.preview for clip in clips])]
    kept = {name: array[shown if name == "preview" else keep] for name, array in arrays.items()}
    return [clip for clip, good in zip(clips, keep, strict=True) if good], kept


def _carried(
    plan: IngestPlan, leaving: set[str], rejected: set[str] | frozenset[str]
) -> tuple[list[Row], list[ShardInfo]]:
    """Rows and shards that go on: whole shards as they are, others without the clips that left, restored clips anew."""
    rows: list[Row] = []
    shards: list[ShardInfo] = []
    by_shard: dict[str, list[Row]] = {}
    for row in sorted(plan.base_clips, key=lambda row: row["shard_row"]):
        by_shard.setdefault(row["shard"], []).append(row)
    for info in plan.base.shards if plan.base else ():
        kept = [row for row in by_shard.get(info.name, []) if row["clip_id"] not in leaving]
        if len(kept) == info.clips:
            rows, shards = rows + kept, [*shards, info]
        elif kept:
            copied, copy = _copied(plan, kept)
            rows, shards = rows + copied, [*shards, copy]
    restored = [row for row in plan.restored if row["clip_id"] not in rejected]
    if restored:
        copied, copy = _copied(plan, sorted(restored, key=lambda row: row["clip_id"]))
        rows, shards = rows + copied, [*shards, copy]
    return rows, shards


def _copied(plan: IngestPlan, rows: Sequence[Row]) -> tuple[list[Row], ShardInfo]:
    """Samples of older shards in a shard of their own; their bytes are the same."""
    name = f"{short_id(fingerprint({'copied': [row['clip_id'] for row in rows]}))}.tar"

    def samples() -> Iterator[Row]:
        for row in rows:
            yield ShardReader(plan.lake, row["shard"])[row["shard_row"]]

    info = write_shard(plan.lake, name, samples())
    return [{**row, "shard": name, "shard_row": number} for number, row in enumerate(rows)], info


def _samples(clips: Sequence[MadeClip], arrays: Mapping[str, np.ndarray], texts: Texts, latents: bool) -> Iterator[Row]:
    shown = 0
    for index, clip in enumerate(clips):
        frames = clip.frames
        sample = {
            "__key__": clip.clip_id,
            "clip.json": clip.to_row(),
            "coefficients.npy": arrays["coefficients"][index],
            "text.npy": texts.by_caption[clip.caption],
            "frame_time.npy": arrays["frame_time"][index, :frames],
            "observed.npy": arrays["observed"][index, :frames],
        }
        if latents:
            sample["latents.npy"] = arrays["latents"][index, :frames]
            if "next_time" in arrays:
                after = int(np.isfinite(arrays["next_time"][index]).sum())
                sample |= {f"{name}.npy": arrays[name][index, :after] for name in NEXT_ARRAYS}
        if clip.preview:
            sample["preview.npy"] = arrays["preview"][shown, :frames]
            shown += 1
        yield sample


def _joined(
    parts: Sequence[tuple[list[Row], Mapping[str, np.ndarray]]],
) -> tuple[list[Row], dict[str, np.ndarray]]:
    """Rows and arrays of several blocks as of one."""
    names = sorted({name for _, arrays in parts for name in arrays})
    joined = {name: np.concatenate([arrays[name] for _, arrays in parts if name in arrays]) for name in names}
    return [row for rows, _ in parts for row in rows], joined


def _append(
    plan: IngestPlan,
    rows: Sequence[Row],
    arrays: Mapping[str, np.ndarray],
    texts: Texts,
    snapshot: str | None,
) -> tuple[str, int]:
    """Clips and their captions into the arrays: (snapshot, first row)."""
    from storage.arrays import Texts as StoredTexts
    from storage.arrays import append_clips

    captions = ["", *sorted({row["caption"] for row in rows} - {""})]
    padded = np.zeros((len(captions), texts.length, texts.dim), dtype=np.float16)
    for index, caption in enumerate(captions):
        padded[index, : len(texts.by_caption[caption])] = texts.by_caption[caption]
    lengths = np.array([len(texts.by_caption[caption]) for caption in captions], dtype=np.int32)
    clips: dict[str, Any] = {
        "clip_id": [row["clip_id"] for row in rows],
        "caption_id": [row["caption_id"] for row in rows],
        **{name: arrays[name] for name in ("coefficients", "latents", "frame_time", "observed")},
        **{name: arrays[name] for name in NEXT_ARRAYS if name in arrays},
        "clip_start": np.array([row["clip_start"] for row in rows], dtype=np.float64),
        "duration": np.array([row["duration"] for row in rows], dtype=np.float64),
        "order_used": np.array([row["order_used"] for row in rows], dtype=np.int32),
    }
    keeps = np.array([bool(row["preview"]) for row in rows])
    if keeps.any():
        clips["preview"] = arrays["preview"]
        clips["preview_row"] = np.where(keeps, np.cumsum(keeps) - 1, -1).astype(np.int32)
    stored = StoredTexts([caption_id(caption) for caption in captions], padded, lengths)
    group = short_id(plan.recipe_fingerprint)
    return append_clips(plan.lake, group, clips, stored, f"run {plan.run_id}", snapshot, made_again=True)
