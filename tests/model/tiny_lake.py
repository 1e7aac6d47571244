"""A small lake with one version, made with the real stores and no Ray: bright squares that slide over 16x16 frames."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from model import legs
from model.codecs.linear import LinearCodec, LinearSettings
from model.text.encoder import builtin_text_encoder
from model.video import from_frames
from storage import version
from storage.fingerprint import fingerprint, short_id
from storage.layout import Lake
from storage.schema import CLIP_SCHEMA, completed
from storage.shards import ShardInfo, write_shard

DURATION, KEPT, ORDER, SIDE = 2.0, 8, 6, 16
RECIPE = {"name": "tiny", "duration": DURATION}


def frames(number: int) -> np.ndarray:
    """(KEPT, SIDE, SIDE, 3): a square of its own colour, row and speed on grey."""
    pictures = np.full((KEPT, SIDE, SIDE, 3), 90, np.uint8)
    for k in range(KEPT):
        left = round(k * (SIDE - 6) / (KEPT - 1)) if number % 2 else 4
        top = (2 * number) % (SIDE - 6)
        pictures[k, top : top + 6, left : left + 6] = [
            (60 * number) % 256,
            (220 - 20 * number) % 256,
            40 + 30 * number % 200,
        ]
    return pictures


@functools.cache
def computed(number: int, caption: str, every: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Text, latents and coefficients of square `number`, float16; computed once, so that two samples are equal."""
    codec, encoder = LinearCodec(LinearSettings(4, 12, 1.0)), builtin_text_encoder()
    text, length = encoder.encode([caption])
    frame_time = np.arange(KEPT) * DURATION / KEPT
    observed = np.arange(KEPT) % every == 0
    latents = codec.encode(from_frames(frames(number))).latents
    matrix = legs.projection_matrix(frame_time[observed], DURATION, ORDER)
    coefficients = legs.project(latents[torch.from_numpy(observed)], matrix)
    found = (text[0, : int(length[0])], latents, coefficients)
    return tuple(values.numpy().astype(np.float16) for values in found)  # type: ignore[return-value]


def sample(
    number: int,
    split: str,
    caption: str = "square {number} slides over grey",
    every: int = 2,
    kept: tuple[int, ...] = (KEPT,),
) -> dict[str, Any]:
    """Square `number` as a shard keeps it; every second frame is observed, or every `every`-th.

    kept: numbers of frames, in turn, that clips keep of the KEPT ones; coefficients stay those of all.
    """
    caption = caption.format(number=number)
    frame_time = np.arange(KEPT) * DURATION / KEPT
    observed = np.arange(KEPT) % every == 0
    text, latents, coefficients = computed(number, caption, every)
    clip_id = short_id(fingerprint({"number": number}))
    length = kept[number % len(kept)]
    return {
        "__key__": clip_id,
        "coefficients.npy": coefficients,
        "text.npy": text,
        "latents.npy": latents[:length],
        "frame_time.npy": frame_time[:length],
        "observed.npy": observed[:length],
        "preview.npy": frames(number)[:length],
        "clip.json": {
            "clip_id": clip_id,
            "film": f"film-{number}.mp4",
            "caption": caption,
            "clip_start": 2.0 * (number % 3),
            "duration": DURATION * length / KEPT,
            "split": split,
            "frames": length,
        },
    }


def manifest_rows(parts: list[list[dict[str, Any]]], infos: list[ShardInfo]) -> list[dict[str, Any]]:
    """The manifest's table of clips; what a trainer has no use for is as unknown."""
    rows = [
        {**part[row]["clip.json"], "shard": info.name, "shard_row": row}
        for part, info in zip(parts, infos, strict=True)
        for row in range(len(part))
    ]
    known = pa.Table.from_pylist(
        [{name: row[name] for name in CLIP_SCHEMA.names if name in row} for row in rows],
        schema=pa.schema([field for field in CLIP_SCHEMA if field.name in rows[0]]),
    )
    table: list[dict[str, Any]] = completed(known, CLIP_SCHEMA).to_pylist()
    return table


def make_lake(folder: Path, clips: int = 6, validation: int = 1, **looks: Any) -> Lake:
    """A lake of `clips` training clips and some for validation, in two shards; `looks` as for `sample`."""
    lake = Lake.create(folder)
    samples = [sample(n, "train" if n < clips else "validation", **looks) for n in range(clips + validation)]
    half = len(samples) // 2
    parts = [samples[:half], samples[half:]]
    infos = [write_shard(lake, f"block{i}.tar", part) for i, part in enumerate(parts)]
    encoder, codec = builtin_text_encoder(), LinearCodec(LinearSettings(4, 12, 1.0))
    empty, length = encoder.encode([""])
    kept = version.write_empty_text(lake, encoder.id, empty[0, : int(length[0])].numpy().astype(np.float16))
    made = version.Version(
        number=1,
        created="2026-01-01T00:00:00+00:00",
        recipe=RECIPE,
        recipe_fingerprint=fingerprint(RECIPE),
        codec={"id": codec.id, "channels": 12, "factor": 4, "scale": 1.0, "spec": codec.spec()},
        text={"id": encoder.id, "dim": encoder.dim, "length": encoder.length, "spec": encoder.spec(), "empty": kept},
        clip={
            "duration": DURATION,
            "rate": KEPT / DURATION,
            "frames_max": KEPT,
            "frames_observed_max": KEPT // 2,
            "order": ORDER,
            "method": "cubic",
            "latent_shape": [12, SIDE // 4, SIDE // 4],
            "frame_shape": [SIDE, SIDE, 3],
        },
        snapshot="none",
        group="none",
        shards=tuple(infos),
        manifest=version.write_manifest(lake, 1, manifest_rows(parts, infos), []),
        merkle_root=version.shards_root(lake, infos),
        counts={"films": {"discovered": clips + validation}, "clips": {"discovered": clips + validation}},
    )
    assert version.publish(lake, made)
    return lake
