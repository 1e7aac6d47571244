"""A lake of made-up films that come, change and go, published as an ingest does it; for what looks after lakes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from storage import arrays, failures, shards, staging, version
from storage.fingerprint import fingerprint, short_id
from storage.layout import Lake
from storage.schema import CERTIFICATE

FRAMES, ORDER, LATENT, WIDTH, TOKENS = 6, 8, (3, 4, 4), 5, 7
RECIPE = {"name": "test", "duration": 2.0, "order": ORDER, "store_latents": True}
NAN = float("nan")
EMPTY = short_id(fingerprint({"caption": ""}))


@dataclass(frozen=True)
class Film:
    """A film; `clips` of them are cut from it."""

    name: str
    content: str
    caption: str
    clips: int = 2

    @property
    def sha256(self) -> str:
        """Of its content."""
        return hashlib.sha256(self.content.encode()).hexdigest()

    def clip_id(self, number: int, recipe: dict[str, Any]) -> str:
        """The id of a clip."""
        return short_id(fingerprint([self.sha256, self.caption, number, recipe]))


def _clip(film: Film, number: int, recipe: dict[str, Any]) -> dict[str, Any]:
    clip_id = film.clip_id(number, recipe)
    random = np.random.default_rng(int(clip_id, 16))
    frames = 3 + number % 4
    facts = {
        "clip_id": clip_id, "film_id": film.sha256[:16], "film": film.name, "caption": film.caption,
        "caption_id": short_id(fingerprint({"caption": film.caption})), "clip_start": 2.0 * number, "duration": 2.0,
        "split": "train", "frames": frames, "frames_observed": 2, "preview": number % 2 == 0,
        **{measure.name: float(random.uniform()) for measure in CERTIFICATE}, "heldout_error": NAN,
        "frames_certified": frames, "order_used": ORDER, "method_used": "cubic",
    }  # fmt: skip
    times = np.full(FRAMES, np.nan)
    times[:frames] = np.sort(random.uniform(0, 2, frames))
    latents = np.zeros((FRAMES, *LATENT), np.float16)
    latents[:frames] = random.normal(size=(frames, *LATENT))
    observed = (np.arange(FRAMES) % 2 == 0) & (np.arange(FRAMES) < frames)
    picture = np.zeros((FRAMES, 2, 2, 3), np.uint8)
    picture[:frames] = random.integers(1, 256, (frames, 2, 2, 3))
    coefficients = random.normal(size=(ORDER, *LATENT)).astype(np.float16)
    return {
        "facts": facts, "coefficients": coefficients, "latents": latents, "frame_time": times, "observed": observed,
        "preview": picture,
    }  # fmt: skip


def _text(caption: str) -> np.ndarray:
    random = np.random.default_rng(int(fingerprint(caption)[:12], 16))
    return random.normal(size=(1 + len(caption) % TOKENS, WIDTH)).astype(np.float16)


def _sample(clip: dict[str, Any], latents: bool) -> dict[str, Any]:
    facts = clip["facts"]
    frames = facts["frames"]
    sample = {
        "__key__": facts["clip_id"], "clip.json": facts, "coefficients.npy": clip["coefficients"],
        "text.npy": _text(facts["caption"]), "frame_time.npy": clip["frame_time"][:frames],
        "observed.npy": clip["observed"][:frames],
    }  # fmt: skip
    if latents:
        sample["latents.npy"] = clip["latents"][:frames]
    if facts["preview"]:
        sample["preview.npy"] = clip["preview"][:frames]
    return sample


def _film_row(film: Film, status: str, clips: int) -> dict[str, Any]:
    return {
        "film": film.name, "film_id": film.sha256[:16], "caption": film.caption, "bytes": 10, "modified_ns": 1,
        "sha256": film.sha256, "status": status, "reason": "", "detail": "", "clips": clips, "seconds": 9.0,
        "codec": "h264", "width": 64, "height": 48, "frame_rate": 25.0, "decoder": "5.1",
        "path": f"/films/{film.name}", "source": "/films",
    }  # fmt: skip


def publish(
    lake: Lake,
    films: Sequence[Film],
    recipe: dict[str, Any] = RECIPE,
    rejected: Sequence[Film] = (),
    failed: Sequence[Film] = (),
    stage: Callable[..., Any] = staging.write_block,
) -> version.Version:
    """The next version holds exactly these films' clips; `stage` stages the block of new ones."""
    with lake.writing():
        parent = version.latest(lake)
        number = parent.number + 1 if parent else 1
        print_, group = fingerprint(recipe), short_id(fingerprint(recipe))
        earlier = [version.load(lake, n) for n in reversed(version.list_versions(lake))]
        base = next((it for it in earlier if it.recipe_fingerprint == print_), None)
        wanted = {film.clip_id(k, recipe): (film, k) for film in films for k in range(film.clips)}
        before = version.read_manifest(lake, base).to_pylist() if base else []
        rows: list[dict[str, Any]] = []
        infos = []
        for info in base.shards if base else ():
            own = sorted((row for row in before if row["shard"] == info.name), key=lambda row: row["shard_row"])
            kept = [{**row, "film": wanted[row["clip_id"]][0].name} for row in own if row["clip_id"] in wanted]
            if len(kept) == info.clips:
                infos.append(info)
                rows += kept
            elif kept:
                reader = shards.ShardReader(lake, info.name)
                name = f"{short_id(fingerprint([row['clip_id'] for row in kept]))}.tar"
                infos.append(shards.write_shard(lake, name, [reader[row["shard_row"]] for row in kept]))
                rows += [{**row, "shard": name, "shard_row": place} for place, row in enumerate(kept)]
        known = {row["clip_id"] for row in rows}
        new = [_clip(film, k, recipe) for clip_id, (film, k) in wanted.items() if clip_id not in known]
        empty = version.write_empty_text(lake, "builtin/clip", _text(""))
        snapshot = parent.snapshot if parent else None
        if new:
            block = short_id(fingerprint([clip["facts"]["clip_id"] for clip in new]))
            stage(lake, block, {}, {"block": [clip["facts"]["clip_id"] for clip in new]})
            info = shards.write_shard(lake, f"{block}.tar", [_sample(clip, recipe["store_latents"]) for clip in new])
            infos.append(info)
            snapshot, first = _append(lake, group, new, number, snapshot)
            rows += [
                {
                    **clip["facts"],
                    "shard": info.name,
                    "shard_row": k,
                    "array_row": first + k,
                    "text_row": 0,
                    "flags": "",
                }
                for k, clip in enumerate(new)
            ]
        assert snapshot is not None
        at = arrays.text_rows(lake, snapshot, group)
        rows = [{**row, "text_row": at[row["caption_id"]]} for row in rows]
        outside = [
            {
                "clip_id": film.clip_id(0, recipe), "film": film.name, "clip_start": 0.0,
                **{measure.name: 1.0 for measure in CERTIFICATE},
            }
            for film in rejected
        ]  # fmt: skip
        table = [_film_row(film, "done", film.clips) for film in films]
        table += [_film_row(film, "filtered", 0) for film in rejected] + [
            _film_row(film, "failed", 0) for film in failed
        ]
        made = version.Version(
            number=number, created=f"2026-01-{number:02}T00:00:00Z", recipe=recipe, recipe_fingerprint=print_,
            codec={"id": "linear"}, text={"id": "builtin/clip", "dim": WIDTH, "length": TOKENS, "empty": empty},
            clip={"duration": 2.0, "order": ORDER, "frames_max": FRAMES, "latent_shape": list(LATENT)},
            snapshot=snapshot, group=group, shards=tuple(infos),
            manifest=version.write_manifest(lake, number, rows, table, outside),
            merkle_root=version.shards_root(lake, infos), counts={"clips": {"done": len(rows)}},
            parent=parent.number if parent else None,
        )  # fmt: skip
        assert version.publish(lake, made)
        if new:
            staging.remove_block(lake, block)
        failures.write_failures(lake, f"202601{number:02}T000000Z-abcdef", [
            {"film": film.name, "clip_id": "", "clip_start": NAN, "stage": "source", "status": "failed",
             "reason": "corrupt", "detail": f"{film.name} cannot be decoded; re-encode it"}
            for film in failed
        ])  # fmt: skip
    return made


def _append(lake: Lake, group: str, clips: list[dict[str, Any]], number: int, snapshot: str | None) -> tuple[str, int]:
    facts = [clip["facts"] for clip in clips]
    captions = {
        short_id(fingerprint({"caption": text})): _text(text) for text in ["", *(it["caption"] for it in facts)]
    }
    padded = np.zeros((len(captions), TOKENS, WIDTH), np.float16)
    for row, text in enumerate(captions.values()):
        padded[row, : len(text)] = text
    lengths = np.array([len(text) for text in captions.values()], np.int32)
    shown = np.array([it["preview"] for it in facts])
    columns: dict[str, Any] = {
        **{name: [it[name] for it in facts] for name in ("clip_id", "caption_id")},
        **{
            name: np.stack([clip[name] for clip in clips])
            for name in ("coefficients", "latents", "frame_time", "observed")
        },
        "clip_start": np.array([it["clip_start"] for it in facts]),
        "duration": np.array([it["duration"] for it in facts]),
        "order_used": np.full(len(facts), ORDER, np.int32),
        "preview": np.stack([clip["preview"] for clip in clips])[shown],
        "preview_row": np.where(shown, np.cumsum(shown) - 1, -1).astype(np.int32),
    }
    return arrays.append_clips(
        lake, group, columns, arrays.Texts(list(captions), padded, lengths), f"version {number}", snapshot
    )
