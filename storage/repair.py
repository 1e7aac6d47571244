"""Repair: what is damaged is made again from what holds the same, bit for bit with the version's checksums.

    an index              from its tar
    a shard               from its own whole samples, from other shards with the same clips, and from the arrays
    the arrays            from what can still be read of them, and from the shards, row by row at the same places
    the empty caption     from the arrays

Nothing is put in place whose checksum is not the published one. What cannot be made again (a table, a version file) is
named with what can be done about it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from storage.arrays import CLIPS_PER_SHARD, NEXT_ARRAYS, Array, Texts, append_rows, open_group, read_clips, read_texts
from storage.change import Change, finish, rewritten, write_change
from storage.errors import VlfmError
from storage.fingerprint import bytes_digest, fingerprint, short_id
from storage.layout import Lake, LakeError
from storage.repository import committing, fresh_session, fsync_changed, history, storage_errors
from storage.schema import CLIP_SCHEMA
from storage.shards import (
    DamagedShard,
    ShardInfo,
    ShardReader,
    encode,
    index_key,
    read_index,
    rebuild_index,
    sample_digest,
    shard_digest,
    shard_key,
    write_shard,
)
from storage.verify import compare_arrays, verify
from storage.version import (
    Version,
    checked_bytes,
    list_versions,
    load,
    npy_bytes,
    read_empty_text,
    read_manifest,
    version_key,
    write_table_again,
)

Row = dict[str, Any]
_PLACEMENT = ("shard", "shard_row", "array_row", "text_row", "flags")
EMPTY_CAPTION = short_id(fingerprint({"caption": ""}))
"""The id of the empty caption, by the rule for every caption (pipeline.rows.caption_id)."""
_MEMBERS = ("coefficients", "latents", "frame_time", "observed")


@dataclass
class Repair:
    """The end of a repair."""

    repaired: list[str] = field(default_factory=list)
    """What was made again, a line each."""
    problems: list[str] = field(default_factory=list)
    """What is still wrong, a line each with the remedy."""

    def lines(self) -> list[str]:
        """For people."""
        lines = [f"repaired {line}" for line in self.repaired] + self.problems
        return lines or ["nothing is damaged"]


def repair(lake: Lake, give_up: Sequence[int] = ()) -> Repair:
    """Repair what can be. Call it inside `lake.writing()`; safe to repeat.

    Args:
        lake: where.
        give_up: versions whose files are damaged and that are to go.

    Raises:
        LakeError: a version to give up is not damaged, or the only one.
        DiskFull: no room; what is repaired stays repaired.
    """
    done = Repair()
    try:
        finish(lake)
    except LakeError as error:
        done.problems.append(str(error))  # it may want what is repaired below
    for number in give_up:
        _give_up(lake, number, done)
    versions: dict[int, Version] = {}
    for number in list_versions(lake):
        try:
            versions[number] = load(lake, number)
        except LakeError as error:
            done.problems.append(str(error))
    clips = _tables(lake, versions)
    _repair_shards(lake, versions, clips, done)
    _repair_arrays(lake, versions, clips, done)
    _repair_empty_texts(lake, versions, done)
    try:
        finish(lake)
        done.problems = [line for line in done.problems if "maintenance.json" not in line]
    except LakeError:
        pass  # told above
    for version in versions.values():
        done.problems += [line for line in verify(lake, load(lake, version.number)) if line not in done.problems]
    return done


def _give_up(lake: Lake, number: int, done: Repair) -> None:
    if number not in list_versions(lake):
        raise LakeError(f"{lake.store.address()} has no version {number} to give up")
    if len(list_versions(lake)) == 1:
        raise LakeError(f"version {number} is the only one; restore its file from a copy, or ingest into a new lake")
    try:
        load(lake, number)
    except LakeError:
        lake.store.delete(version_key(number))
        done.repaired.append(f"the list of versions: version {number}, whose file was damaged, is gone")
        return
    raise LakeError(f"version {number} is not damaged; old versions go with `vlfm gc --keep N`")


def _tables(lake: Lake, versions: Mapping[int, Version]) -> dict[int, list[Row]]:
    """The rows of clips of each version whose table can be read; damaged ones are told by `verify`."""
    tables = {}
    for number, version in versions.items():
        try:
            tables[number] = read_manifest(lake, version, "clips").to_pylist()
        except (LakeError, ValueError):
            continue
    return tables


# --- shards and their indexes ---


def _repair_shards(lake: Lake, versions: Mapping[int, Version], clips: Mapping[int, list[Row]], done: Repair) -> None:
    infos = {info.name: (info, number) for number, version in versions.items() for info in version.shards}
    for name, (info, number) in infos.items():
        if lake.store.size(shard_key(name)) != info.bytes or shard_digest(lake, name) != info.sha256:
            rows = sorted((row for row in clips.get(number, []) if row["shard"] == name), key=lambda r: r["shard_row"])
            try:
                sources = list(_rebuilt(lake, info, rows, versions, clips))
                write_shard(lake, name, sources, expected=info)
                done.repaired.append(f"{lake.store.address(shard_key(name))}: {info.clips} clips")
            except (VlfmError, ValueError, OSError) as error:
                told = " ".join(str(error).split())
                done.problems.append(f"{name} cannot be made again: {told}; restore it from a copy")
            continue
        try:
            reader = ShardReader(lake, name)
            good = reader.info == info and not reader.verify()
        except DamagedShard:
            good = False
        if not good:
            rebuild_index(lake, name)
            done.repaired.append(f"{lake.store.address(index_key(name))}, from its tar")


def _rebuilt(
    lake: Lake,
    info: ShardInfo,
    rows: Sequence[Row],
    versions: Mapping[int, Version],
    clips: Mapping[int, list[Row]],
) -> Iterator[Row]:
    """The samples of a damaged shard, each from the best copy there is."""
    if len(rows) != info.clips:
        raise LakeError("no table of clips says which clips it held")
    entries, own = _salvaged(lake, info.name)
    template = next(iter(own.values()), None)
    for row in rows:
        clip = row["clip_id"]
        if clip in own:
            yield own[clip]
            continue
        entry = entries.get(clip)
        copy = _copy_elsewhere(lake, info.name, clip, clips)
        template = template or copy or _any_sample(lake, info.name, versions)
        if copy is not None and (entry is None or _digest_of(copy) == entry["sha256"]):
            yield copy
            continue
        with_next = any(v.clip.get("next_frame") for v in versions.values() if info in v.shards)
        members = list(entry["members"]) if entry else _members_of(template, row, with_next)
        found = list(_from_arrays(lake, row, members, template, versions, clips))
        fitting = [sample for sample in found if entry is None or _digest_of(sample) == entry["sha256"]]
        if not fitting:
            raise LakeError(f"clip {clip} is in no other shard, and the arrays do not give it bit for bit")
        yield fitting[0]


def _salvaged(lake: Lake, name: str) -> tuple[dict[str, Any], dict[str, Row]]:
    """The entries of a damaged shard's index, and the samples that are whole by it; without an index, none."""
    try:
        index = read_index(lake, name)
    except DamagedShard:
        return {}, {}
    entries = {entry["key"]: entry for entry in index["samples"]}
    whole = {}
    if lake.store.size(shard_key(name)) is not None:
        with lake.store.open_read(shard_key(name)) as file:
            for key, entry in entries.items():
                data = {}
                for member, (offset, size) in entry["members"].items():
                    file.seek(offset)
                    data[member] = file.read(size)
                if sample_digest(data) == entry["sha256"]:
                    whole[key] = {"__key__": key, **{member: _decoded(member, raw) for member, raw in data.items()}}
    return entries, whole


def _copy_elsewhere(lake: Lake, name: str, clip: str, clips: Mapping[int, list[Row]]) -> Row | None:
    for rows in clips.values():
        for row in rows:
            if row["clip_id"] == clip and row["shard"] != name:
                try:
                    return ShardReader(lake, row["shard"])[row["shard_row"]]
                except (VlfmError, IndexError, OSError):
                    continue
    return None


def _any_sample(lake: Lake, name: str, versions: Mapping[int, Version]) -> Row | None:
    """A sample of another shard, which shows what a sample's JSON says."""
    for version in versions.values():
        for info in version.shards:
            if info.name != name:
                try:
                    return ShardReader(lake, info.name)[0]
                except (VlfmError, OSError):
                    continue
    return None


def _members_of(template: Row | None, row: Row, with_next: bool) -> list[str]:
    base = [name for name in template or () if name not in ("__key__", "preview.npy")]
    base = base or ["clip.json", *(f"{name}.npy" for name in (*_MEMBERS, *(NEXT_ARRAYS if with_next else ()), "text"))]
    return [*base, "preview.npy"] if row["preview"] else base


def _from_arrays(
    lake: Lake,
    row: Row,
    members: Sequence[str],
    template: Row | None,
    versions: Mapping[int, Version],
    clips: Mapping[int, list[Row]],
) -> Iterator[Row]:
    """Samples as the arrays have them; their JSON may be what any version says of the clip, the oldest first."""
    clip, told = row["clip_id"], []
    stored: dict[int, Row] = {}  # by row: a clip that was made again has several
    for number in sorted(clips):
        own = next((other for other in clips[number] if other["clip_id"] == clip), None)
        if own is None:
            continue
        told.append(own)
        if own["array_row"] not in stored:
            with contextlib.suppress(VlfmError, IndexError):
                stored[own["array_row"]] = _row_of(lake, versions[number], own, members)
    if not stored:
        return
    names = list(template["clip.json"]) if template and "clip.json" in template else None
    # Without a sample to show it: programs of before had no ids of pictures.
    names = names or [
        name for name in CLIP_SCHEMA.names if name not in _PLACEMENT and (name != "frames_id" or told[0].get(name))
    ]
    for arrays in stored.values():
        for own in told:
            facts = {name: own[name] for name in names if name in own}
            # A shard is written before the version knows which clips are like others.
            for known in (facts, {**facts, "duplicates": None} if "duplicates" in facts else facts):
                yield {"__key__": clip, **arrays, **({"clip.json": known} if "clip.json" in members else {})}


def _row_of(lake: Lake, version: Version, row: Row, members: Sequence[str]) -> Row:
    stored = read_clips(lake, version.snapshot, version.group, [row["array_row"]])
    if stored["clip_id"][0] != row["clip_id"]:
        raise LakeError(f"row {row['array_row']} of the arrays is clip {stored['clip_id'][0]}, not {row['clip_id']}")
    found: Row = {}
    for member in members:
        name, _, kind = member.partition(".")
        if kind != "npy":
            continue
        if name == "text":
            texts = read_texts(lake, version.snapshot, version.group, [row["text_row"]])
            found[member] = texts.embeddings[0, : texts.lengths[0]]
        elif name == "preview":
            shown = read_clips(lake, version.snapshot, version.group, [row["array_row"]], ["preview"])
            found[member] = shown["preview"][0, : row["frames"]]
        elif name == "coefficients":
            found[member] = stored[name][0]
        elif name in NEXT_ARRAYS:
            found[member] = stored[name][0, : int(np.isfinite(stored["next_time"][0]).sum())]
        else:
            found[member] = stored[name][0, : row["frames"]]
    return found


def _digest_of(sample: Row) -> str:
    clip = sample["__key__"]
    return sample_digest({name: encode(clip, name, value) for name, value in sample.items() if name != "__key__"})


def _decoded(name: str, data: bytes) -> Any:
    return (
        json.loads(data) if name.endswith(".json") else np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
    )


# --- the arrays ---


def _repair_arrays(lake: Lake, versions: Mapping[int, Version], clips: Mapping[int, list[Row]], done: Repair) -> None:
    """Write the arrays anew where anything of them is damaged; the tables say where their rows are now."""
    known = {number: version for number, version in versions.items() if number in clips}
    if not known or not _damaged(lake, known, clips):
        return
    # By row: where a clip was made again, an older version has other last bits of it in a row of its own.
    groups: dict[str, dict[int, tuple[Version, Row]]] = {}
    for number, version in known.items():
        groups.setdefault(version.group, {}).update({row["array_row"]: (version, row) for row in clips[number]})
    started, lost = time.time(), set[str]()
    places: dict[str, tuple[dict[int, int], dict[str, int]]] = {}
    try:
        with committing(lake), storage_errors(lake):
            aside, session = fresh_session(lake)
            for name, wanted in groups.items():
                group = open_group(session, name, create=True)
                places[name] = _rebuild_group(lake, group, wanted, lost)
            snapshot = session.commit("repair")
            fsync_changed(lake, started)
    except LakeError as error:
        done.problems.append(f"the arrays cannot be made again: {error}")
        return
    changed = []
    for number, version in known.items():
        at, text_at = places[version.group]
        rows = [
            {**row, "array_row": at[row["array_row"]], "text_row": text_at[row["caption_id"]]} for row in clips[number]
        ]
        entry = write_table_again(lake, number, "clips", rows, version.manifest["clips"])
        manifest = {**version.manifest, "clips": entry}
        changed.append(dataclasses.replace(version, snapshot=snapshot, manifest=manifest))
    write_change(lake, Change("repair", dict(rewritten(version) for version in changed)))
    finish(lake)
    total = sum(len(own) for own in groups.values())
    done.repaired.append(
        f"{lake.store.address('arrays')}: {total} rows" + (f"; what was there is in {aside}" if aside else "")
    )
    done.problems += [
        f"clip {clip}: its latents are lost (NaN in the arrays now), no shard holds them; training reads coefficients "
        "only, to have them again ingest its film into a new lake"
        for clip in sorted(lost)
    ]


def _damaged(lake: Lake, versions: Mapping[int, Version], clips: Mapping[int, list[Row]]) -> bool:
    try:
        history(lake)
    except LakeError:
        return True
    for number, version in versions.items():
        readers = {}
        for info in version.shards:
            try:
                readers[info.name] = ShardReader(lake, info.name)
            except DamagedShard:
                continue  # told by verify
        if compare_arrays(lake, version.snapshot, version.group, clips[number], readers):
            return True
    return False


def _rebuild_group(
    lake: Lake, group: Any, wanted: Mapping[int, tuple[Version, Row]], lost: set[str]
) -> tuple[dict[int, int], dict[str, int]]:
    """Write the clips of a group, a Zarr shard at a time: where each row is now, and where each caption is.

    Raises LakeError for a clip that neither a shard nor the arrays have.
    """
    at: dict[int, int] = {}
    captions: dict[str, Array] = {}
    ordered = [wanted[row] for row in sorted(wanted)]
    for first in range(0, len(ordered), CLIPS_PER_SHARD):
        part = ordered[first : first + CLIPS_PER_SHARD]
        found = [_best(lake, version, row) for version, row in part]
        lost |= {row["clip_id"] for (_, row), values in zip(part, found, strict=True) if "latents" not in values}
        clips, texts = _columns(lake, part, found, captions)
        start = append_rows(group, clips, texts, made_again=True)
        at |= {row["array_row"]: start + number for number, (_, row) in enumerate(part)}
    return at, {identity: row for row, identity in enumerate(captions)}


def _best(lake: Lake, version: Version, row: Row) -> Row:
    """A clip's arrays without padding: from its shard, and what that lacks from the arrays."""
    found: Row = {}
    with contextlib.suppress(VlfmError, IndexError, OSError):
        sample = ShardReader(lake, row["shard"])[row["shard_row"]]
        found = {name.removesuffix(".npy"): value for name, value in sample.items() if name.endswith(".npy")}
    names = ["coefficients", "text", "frame_time", "observed", "latents", *(["preview"] if row["preview"] else [])]
    for name in (*names, *(NEXT_ARRAYS if version.clip.get("next_frame") else ())):
        if name not in found:
            with contextlib.suppress(VlfmError, IndexError, OSError, ValueError):
                found |= {name: _row_of(lake, version, row, [f"{name}.npy"])[f"{name}.npy"]}
    if missing := [name for name in ("coefficients", "text", "frame_time", "observed") if name not in found]:
        raise LakeError(f"clip {row['clip_id']}: {', '.join(missing)} are in no shard and cannot be read")
    return found


def _columns(
    lake: Lake, part: Sequence[tuple[Version, Row]], found: Sequence[Row], captions: dict[str, Array]
) -> tuple[dict[str, Any], Texts]:
    """Clips as `append_rows` takes them, and the captions that are new; `captions` gets these too."""
    version = part[0][0]
    frames = version.clip["frames_max"]
    new: dict[str, Array] = {}
    if not captions:
        new[EMPTY_CAPTION] = read_empty_text(lake, version)
    for (_, row), values in zip(part, found, strict=True):
        if row["caption_id"] not in captions:
            new.setdefault(row["caption_id"], values["text"])
    captions |= new
    length, dim = version.text["length"], version.text["dim"]
    embeddings = np.stack([_padded(text, length, 0) for text in new.values()] or [np.zeros((0, length, dim))])
    shape = tuple(version.clip["latent_shape"])
    latents = [
        values.get("latents", np.full((row["frames"], *shape), np.nan))
        for (_, row), values in zip(part, found, strict=True)
    ]
    clips: dict[str, Any] = {
        "clip_id": [row["clip_id"] for _, row in part],
        "caption_id": [row["caption_id"] for _, row in part],
        "coefficients": np.stack([values["coefficients"] for values in found]),
        "latents": np.stack([_padded(values, frames, 0) for values in latents]).astype(np.float16),
        "frame_time": np.stack([_padded(values["frame_time"], frames, np.nan) for values in found]),
        "observed": np.stack([_padded(values["observed"], frames, False) for values in found]),
        "clip_start": np.array([row["clip_start"] for _, row in part], np.float64),
        "duration": np.array([row["duration"] for _, row in part], np.float64),
        "order_used": np.array([row["order_used"] for _, row in part], np.int32),
    }
    if version.clip.get("next_frame"):
        none = {"next_latents": np.zeros((0, *shape)), "next_time": np.zeros(0)}
        after = [{**none, **values} for values in found]
        clips["next_latents"] = np.stack([_padded(v["next_latents"], 1, 0) for v in after]).astype(np.float16)
        clips["next_time"] = np.stack([_padded(v["next_time"], 1, np.nan) for v in after])
    shown = np.array(["preview" in values for values in found])
    if shown.any():
        clips["preview"] = np.stack([_padded(v["preview"], frames, 0) for v in found if "preview" in v])
        clips["preview_row"] = np.where(shown, np.cumsum(shown) - 1, -1).astype(np.int32)
    lengths = np.array([len(text) for text in new.values()], np.int32)
    return clips, Texts(list(new), embeddings.astype(np.float16)[: len(new)], lengths)


def _padded(rows: Array, length: int, filling: Any) -> Array:
    padded = np.full((length, *rows.shape[1:]), filling, dtype=rows.dtype)
    padded[: len(rows)] = rows
    return padded


# --- the empty caption ---


def _repair_empty_texts(lake: Lake, versions: Mapping[int, Version], done: Repair) -> None:
    for version in versions.values():
        entry = version.text.get("empty")
        if entry is None:
            continue
        with contextlib.suppress(LakeError):
            checked_bytes(lake, entry)
            continue
        with contextlib.suppress(LakeError):
            texts = read_texts(lake, version.snapshot, version.group, [0])
            data = npy_bytes(texts.embeddings[0, : texts.lengths[0]])
            if bytes_digest(data) == entry["sha256"]:
                lake.store.write(entry["path"], data)
                done.repaired.append(f"{lake.store.address(entry['path'])}, from the arrays")
