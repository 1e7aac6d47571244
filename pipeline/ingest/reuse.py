"""What stored clips save a run: each stage is made again only where something that it depends on has changed.

    latents         film, window and its frames, size, codec; the caption too where the codec inverts with it
    coefficients    latents, those of the frame after the window too, which frames are observed, order, method
    text            caption, text encoder (pipeline.stages.embed)

A new projection takes stored latents, a new caption all but the text. What is stored is used bit for bit, as everything
that a version holds.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from model.codecs.text import inverts_with_text
from pipeline.ingest.block import Block, stage_block, staged_arrays
from pipeline.items import BlockResult, Certificate, ClipPlan, ClipWork, CodecFacts, MadeClip, Row, StoredClip
from pipeline.recipes import DataRecipe
from storage.arrays import NEXT_ARRAYS, read_clips
from storage.layout import Lake, LakeError
from storage.version import Version, read_manifest, readable_versions

_OF_LATENTS = ("size", "codec")
_OF_COEFFICIENTS = ("order", "method", "duration", "next_frame")


def with_stored(lake: Lake, recipe: DataRecipe, clips: Sequence[ClipPlan]) -> list[ClipPlan]:
    """The clips, each with the stored one that saves the most of it: of the newest version of any recipe with one."""
    if not clips:
        return []
    wanted = {clip.film_id for clip in clips}
    own = recipe.data_fields()
    by_caption = inverts_with_text(recipe.codec)
    found: dict[tuple[Any, ...], list[tuple[Version, Row, bool]]] = {}
    for version in _newest_of_each_recipe(lake):
        fields = {**version.recipe, "codec": _without_compiled(version.recipe["codec"])}
        if any(fields.get(name) != own.get(name) for name in _OF_LATENTS):
            continue
        whole = all(fields.get(name) == own.get(name) for name in _OF_COEFFICIENTS)
        try:
            rows = read_manifest(lake, version, "clips").to_pylist()
        except LakeError:
            continue  # an older version's damage stops nothing
        for row in rows:
            if row["film_id"] in wanted:
                found.setdefault(_key(row, by_caption), []).append((version, row, whole))
    if not found:
        return list(clips)
    return [_with_best(lake, clip, found.get(_key_of(clip, by_caption), [])) for clip in clips]


def copy_block(lake: Lake, recipe: DataRecipe, recipe_fingerprint: str, block: Block) -> BlockResult:
    """Stages a block whose clips are stored whole, under other captions: nothing is decoded, encoded or projected."""
    begin = time.perf_counter()
    works = []
    for clip in block.clips:
        stored = clip.stored
        assert stored is not None
        names = ["latents", "coefficients", *(("preview", "preview_row") if clip.preview else ())]
        names += NEXT_ARRAYS if recipe.uses_next_frame else ()
        arrays = read_clips(lake, stored.snapshot, stored.group, [stored.row], names)
        frames = len(clip.window.ticks)
        works.append(
            ClipWork(
                clip,
                frames=arrays["preview"][0, :frames] if clip.preview else None,
                latents=arrays["latents"][0, :frames],
                next_latents=arrays["next_latents"][0] if clip.window.next_time else None,
                coefficients=arrays["coefficients"][0],
                certificate=stored.certificate,
                frames_id=stored.frames_id,
            )
        )
    made = tuple(MadeClip.of(work) for work in works)
    assert block.clips[0].stored is not None
    result = BlockResult(block.block_id, made, (), {"copy": time.perf_counter() - begin}, block.clips[0].stored.codec)
    staged = staged_arrays(works, recipe.frames_max, recipe.uses_next_frame)
    stage_block(lake, result, staged, recipe_fingerprint, block.clips)
    return result


def _newest_of_each_recipe(lake: Lake) -> Iterator[Version]:
    seen = set()
    for version in readable_versions(lake)[0]:
        if version.recipe_fingerprint not in seen:
            seen.add(version.recipe_fingerprint)
            yield version


def _without_compiled(spec: Row) -> dict[str, Any]:
    return {key: value for key, value in spec.items() if key != "compiled"}


def _key(row: Row, by_caption: bool) -> tuple[Any, ...]:
    return row["film_id"], row["clip_start"], row["caption"] if by_caption else ""


def _key_of(clip: ClipPlan, by_caption: bool) -> tuple[Any, ...]:
    return clip.film_id, clip.window.start, clip.caption if by_caption else ""


def _with_best(lake: Lake, clip: ClipPlan, found: Iterable[tuple[Version, Row, bool]]) -> ClipPlan:
    best = clip
    for version, row, whole in found:
        if row["frames"] != len(clip.window.ticks):
            continue
        next_frame = bool(version.clip.get("next_frame"))
        names = ["clip_id", "frame_time", "observed", *(("next_time",) if next_frame else ())]
        try:
            arrays = read_clips(lake, version.snapshot, version.group, [row["array_row"]], names)
        except (LakeError, IndexError):
            continue
        frames = len(clip.window.ticks)
        same_frames = np.array_equal(arrays["frame_time"][0, :frames], np.asarray(clip.window.frame_time))
        if arrays["clip_id"][0] != row["clip_id"] or not same_frames:
            continue
        whole = whole and np.array_equal(arrays["observed"][0, :frames], np.asarray(clip.observed))
        if next_frame:  # a cut may keep it out, or a fault of the film: then it is looked at again
            stored_time = arrays["next_time"][0]
            whole = whole and tuple(stored_time[np.isfinite(stored_time)]) == clip.window.next_time
        if whole and not _has_latents(lake, version, row):
            continue
        facts = {**version.codec, "latent_shape": version.clip["latent_shape"]}
        stored = StoredClip(
            snapshot=version.snapshot,
            group=version.group,
            row=row["array_row"],
            whole=whole,
            preview=row["preview"],
            certificate=Certificate.from_row(row),
            codec=CodecFacts.from_json(facts),
            frames_id=row["frames_id"],
            next_frame=next_frame,
        )
        if stored.whole:
            return replace(clip, stored=stored)
        best = best if best.stored is not None else replace(clip, stored=stored)
    return best


def _has_latents(lake: Lake, version: Version, row: Row) -> bool:
    """Whether a clip can be copied: a repair leaves NaN where no shard held latents. (A worker looks for itself.)"""
    try:
        stored = read_clips(lake, version.snapshot, version.group, [row["array_row"]], ["latents"])["latents"]
    except LakeError:
        return False
    return bool(np.isfinite(stored).all())
