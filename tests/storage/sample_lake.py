"""A small but whole publication with made-up numbers, for the tests and for the programs they kill."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pyarrow as pa

from storage import arrays, shards, staging, version
from storage.fingerprint import fingerprint, short_id
from storage.layout import Lake
from storage.schema import CLIP_SCHEMA, completed

RECIPE = {"name": "test", "duration": 2.0, "order": 8}
GROUP = short_id(fingerprint(RECIPE))
FRAMES, ORDER, LATENT, WIDTH, TOKENS = 6, 8, (3, 4, 4), 5, 7
BLOCK_CLIPS = 4


def identity(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def clip(number: int) -> dict[str, Any]:
    """Clip `number`, always the same."""
    random = np.random.default_rng(number)
    frames = 3 + number % 4
    frame_time = np.full(FRAMES, np.nan)
    frame_time[:frames] = np.sort(random.uniform(0, 2, frames))
    latents = np.zeros((FRAMES, *LATENT), np.float16)
    latents[:frames] = random.normal(size=(frames, *LATENT))
    caption = f"caption {number % 3}"
    return {
        "clip_id": identity(f"clip {number}"),
        "caption": caption,
        "caption_id": identity(caption),
        "frames": frames,
        "coefficients": random.normal(size=(ORDER, *LATENT)).astype(np.float16),
        "latents": latents,
        "frame_time": frame_time,
        "observed": np.arange(FRAMES) % 2 == 0,
        "preview": random.integers(0, 256, (FRAMES, 2, 2, 3), np.uint8) if number % 2 else None,
    }


def text(caption: str) -> tuple[np.ndarray, int]:
    random = np.random.default_rng(int(identity(caption), 16))
    length = 1 + len(caption) % TOKENS
    embedding = np.zeros((TOKENS, WIDTH), np.float16)
    embedding[:length] = random.normal(size=(length, WIDTH))
    return embedding, length


def sample(entry: dict[str, Any]) -> dict[str, Any]:
    embedding, length = text(entry["caption"])
    members = {
        "__key__": entry["clip_id"],
        "coefficients.npy": entry["coefficients"],
        "text.npy": embedding[:length],
        "latents.npy": entry["latents"][: entry["frames"]],
        "frame_time.npy": entry["frame_time"][: entry["frames"]],
        "observed.npy": entry["observed"][: entry["frames"]],
        "clip.json": {"clip_id": entry["clip_id"], "caption": entry["caption"], "heldout_error": float("nan")},
    }
    if entry["preview"] is not None:
        members["preview.npy"] = entry["preview"]
    return members


def columns(entries: list[dict[str, Any]]) -> dict[str, Any]:
    shown = [entry["preview"] is not None for entry in entries]
    return {
        "clip_id": [entry["clip_id"] for entry in entries],
        "caption_id": [entry["caption_id"] for entry in entries],
        **{
            name: np.stack([entry[name] for entry in entries])
            for name in ("coefficients", "latents", "frame_time", "observed")
        },
        "clip_start": np.arange(len(entries), dtype=np.float64),
        "duration": np.full(len(entries), 2.0),
        "order_used": np.full(len(entries), ORDER, np.int32),
        "preview": np.stack(
            [entry["preview"] for entry in entries if entry["preview"] is not None]
            or [np.zeros((FRAMES, 2, 2, 3), np.uint8)]
        )[: sum(shown)],
        "preview_row": np.where(shown, np.cumsum(shown) - 1, -1).astype(np.int32),
    }


def texts(captions: list[str]) -> arrays.Texts:
    found = [text(caption) for caption in captions]
    return arrays.Texts(
        [identity(caption) for caption in captions],
        np.stack([embedding for embedding, _ in found]),
        np.array([length for _, length in found], np.int32),
    )


def whole(row: dict[str, Any], schema: pa.Schema) -> dict[str, Any]:
    """A row with every column of a table; what it lacks is unknown, as of an older program."""
    # One row without a column to begin with, which `completed` fills in.
    blank = completed(pa.table({"row": [0]}), schema).to_pylist()[0]
    return {name: row.get(name, blank[name]) for name in schema.names}


def clip_row(entry: dict[str, Any], shard: str, shard_row: int, array_row: int, text_row: int) -> dict[str, Any]:
    row = {
        "clip_id": entry["clip_id"], "film_id": identity("film"), "film": "folder/film.mp4",
        "caption": entry["caption"], "caption_id": entry["caption_id"], "clip_start": 0.5, "duration": 2.0,
        "split": "train", "frames": entry["frames"], "frames_observed": 3, "shard": shard, "shard_row": shard_row,
        "array_row": array_row, "text_row": text_row, "order_used": ORDER, "method_used": "cubic", "psnr_codec": 40.0,
        "psnr_projection": 30.0, "projection_error": 0.1, "heldout_error": float("nan"), "smoothness": 0.2,
        "end_ratio": 1.0, "preview": entry["preview"] is not None, "ssim_codec": 0.9, "psnr_vae": 41.0,
        "ssim_vae": 0.95, "residual": 1e-4, "latent_round_trip": 60.0, "frames_certified": entry["frames"], "flags": "",
    }  # fmt: skip
    return whole(row, CLIP_SCHEMA)


def film_row(clips: int) -> dict[str, Any]:
    return {
        "film": "folder/film.mp4", "film_id": identity("film"), "caption": "a caption", "bytes": 10, "modified_ns": 1,
        "sha256": "0" * 64, "status": "done", "reason": "", "detail": "", "clips": clips, "seconds": 9.0,
        "codec": "h264", "width": 64, "height": 48, "frame_rate": 25.0,
        "decoder": "5.1", "path": "/films/folder/film.mp4", "source": "/films/folder",
    }  # fmt: skip


def publish_clips(lake: Lake, numbers: range) -> version.Version:
    """Add the clips `numbers` as the next version, by the protocol of storage/version.py; safe to run again."""
    with lake.writing():
        parent = version.latest(lake)
        number = parent.number + 1 if parent else 1
        infos = list(parent.shards) if parent else []
        rows = version.read_manifest(lake, parent).to_pylist() if parent else []
        block_ids = []
        places = {}
        for start in range(numbers.start, numbers.stop, BLOCK_CLIPS):
            block = [clip(i) for i in range(start, min(start + BLOCK_CLIPS, numbers.stop))]
            block_ids.append(identity("".join(entry["clip_id"] for entry in block)))
            if block_ids[-1] not in staging.staged_blocks(lake):
                kept = {"coefficients": np.stack([entry["coefficients"] for entry in block])}
                staging.write_block(lake, block_ids[-1], kept, {"clips": len(block)})
            info = shards.write_shard(lake, f"{block_ids[-1]}.tar", (sample(entry) for entry in block))
            infos.append(info)
            places |= {entry["clip_id"]: (info.name, row) for row, entry in enumerate(block)}
        entries = [clip(i) for i in numbers]
        captions = ["", *sorted({entry["caption"] for entry in entries})]
        empty = version.write_empty_text(lake, "builtin/clip", text("")[0][: text("")[1]])
        snapshot, first = arrays.append_clips(lake, GROUP, columns(entries), texts(captions), f"version {number}")
        text_row = arrays.text_rows(lake, snapshot, GROUP)
        rows += [
            clip_row(entry, *places[entry["clip_id"]], first + i, text_row[entry["caption_id"]])
            for i, entry in enumerate(entries)
        ]
        made = version.Version(
            number=number, created="2026-01-01T00:00:00+00:00", recipe=RECIPE, recipe_fingerprint=fingerprint(RECIPE),
            codec={"id": "linear"}, text={"id": "builtin/clip", "dim": WIDTH, "length": TOKENS, "empty": empty},
            clip={"duration": 2.0, "order": ORDER}, snapshot=snapshot, group=GROUP, shards=tuple(infos),
            manifest=version.write_manifest(lake, number, rows, [film_row(len(rows))]),
            merkle_root=version.shards_root(lake, infos), counts={"clips": {"done": len(rows)}},
            parent=parent.number if parent else None,
        )  # fmt: skip
        assert version.publish(lake, made)
        for block_id in block_ids:
            staging.remove_block(lake, block_id)
    return made
