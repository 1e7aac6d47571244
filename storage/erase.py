"""Erasure: a film leaves every version, every cache and every report of a lake, and a search shows that it is gone.

What is erased is the content: of every film that has, or had, the given name, with its parts and with other films of
the same content. Versions keep their numbers and lose these clips; shards that held them are copied without them under
new names, and each version gets a new Merkle root. The crash rules are those of storage.change.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from storage.blanking import blank_rows, used_rows
from storage.change import Change, finish, rewritten, write_change
from storage.errors import Kind, VlfmError
from storage.failures import read_failures
from storage.fingerprint import fingerprint, short_id
from storage.layout import Lake
from storage.search import Needles, Search, search
from storage.shards import DamagedShard, ShardInfo, ShardReader, write_shard
from storage.version import Version, list_versions, load, read_manifest, shards_root, write_table_again

Row = dict[str, Any]
NOT_SEARCHED = (
    "the source, caches of other machines (VLFM_CACHE), runs trained on the film, evaluation reports, Prefect's "
    "database, logs, copies and backups"
)


class NoSuchFilm(VlfmError, ValueError):
    """No film of the lake has the name. The message says what was searched."""

    kind = Kind.INPUT


@dataclass(frozen=True)
class VersionErasure:
    """What an erasure did to a version."""

    number: int
    clips_before: int
    clips: int
    root_before: str
    root: str
    """Its Merkle root from now on."""


@dataclass(frozen=True)
class Erasure:
    """The end of an erasure."""

    films: tuple[str, ...]
    """Names of all films that were erased."""
    contents: tuple[str, ...]
    """sha256 of their contents."""
    clips: tuple[str, ...]
    captions: tuple[str, ...]
    """Their captions."""
    shared_captions: tuple[str, ...]
    """Those of them that other films have too; they stay with these."""
    shared_names: tuple[str, ...]
    """Names of theirs that other films have; they stay with these."""
    paths: tuple[str, ...]
    """Where the files were."""
    versions: tuple[VersionErasure, ...]
    searched: Search
    files: tuple[tuple[str, int, int], ...] = ()
    """Path, bytes and time of change of the films as versions knew them: what a cache of fetched films goes by."""
    forgotten: int = 0
    """Samples that were taken out of this machine's cache."""

    @property
    def complete(self) -> bool:
        """Whether the search found nothing."""
        return not self.searched.found

    def lines(self) -> list[str]:
        """The proof, for people."""
        total = f"{len(self.clips)} clips in {len(self.versions)} versions"
        lines = [f"erased {', '.join(self.films)}: {total}"]
        for it in self.versions:
            told = f"version {it.number}: {it.clips_before} clips, now {it.clips}"
            lines.append(f"{told}; Merkle root {it.root_before[:16]}, now {it.root[:16]}")
        what = f"{len(self.contents)} content hashes, {len(self.clips)} clip ids, {len(self.films)} names"
        what += f", {len(self.paths)} paths and {len(self.captions)} captions"
        read = f"{self.searched.files} files ({self.searched.bytes / 1e6:.1f} MB; tables and Icechunk's files decoded)"
        lines.append(f"searched {read} for {what}")
        lines += [f"FOUND in {key}" for key in self.searched.found]
        if self.complete:
            lines.append("nothing of the film is left in this lake")
        if self.forgotten:
            lines.append(f"{self.forgotten} samples were taken out of this machine's cache")
        lines += [f"caption kept, other films have it too: {caption}" for caption in self.shared_captions]
        lines += [f"name kept, another film has it in some version: {name}" for name in self.shared_names]
        lines.append(f"not searched: {NOT_SEARCHED}")
        return lines

    def to_json(self) -> dict[str, Any]:
        """As JSON."""
        found = dataclasses.asdict(self)
        return {**found, "complete": self.complete, "not_searched": NOT_SEARCHED}


def erase(lake: Lake, film: str) -> Erasure:
    """Erase a film. Call it inside `lake.writing()`. Killed at any point and called again, it ends in the same state.

    Args:
        lake: where.
        film: a film's name as `vlfm inspect` shows it, its path, or its content's id or sha256.

    Raises:
        NoSuchFilm: the lake has none.
        LakeError: a version or the arrays are damaged; nothing has changed.
        DiskFull: no room; nothing has changed.
    """
    before = finish(lake)
    if before is not None and before.erased and before.erased["asked"] == film:
        return _report(lake, before)  # of a run that was killed
    change = plan_erasure(lake, film)
    write_change(lake, change)
    finish(lake)
    return _report(lake, change)


def plan_erasure(lake: Lake, film: str, dry_run: bool = False) -> Change:
    """What an erasure is going to do; all that it needs is written beside what is there, unless `dry_run`.

    Raises as `erase`.
    """
    versions = {number: load(lake, number) for number in list_versions(lake)}
    films = {n: read_manifest(lake, version, "films").to_pylist() for n, version in versions.items()}
    clips = {n: read_manifest(lake, version, "clips").to_pylist() for n, version in versions.items()}
    rejected = {n: read_manifest(lake, version, "rejected").to_pylist() for n, version in versions.items()}
    failures = list(_failures(lake))
    named = [row for rows in films.values() for row in rows if _is(film, row)]
    failed = [row for row in failures if _is(film, row)]
    clipped = [row for rows in clips.values() for row in rows if _is(film, row)]
    if not named and not failed and not clipped:
        found = search(lake, Needles(frozenset(), frozenset({film})))
        told = f"{found.files} files were searched, " + (
            f"the name occurs in {', '.join(found.found)}" if found.found else "the name occurs in none"
        )
        raise NoSuchFilm(f"the lake {lake.store.address()} has no film {film!r} ({told}); `vlfm inspect` lists them")
    contents = {row["sha256"] for row in named if row["sha256"]}
    identities = {short_id(digest) for digest in contents} | {row["film_id"] for row in [*named, *clipped]} - {""}
    gone: dict[str, list[Row]] = {"films": [], "clips": [], "rejected": []}
    stay: dict[int, dict[str, list[Row]]] = {}
    for n in versions:
        names = {row["film"] for row in films[n] if _is(film, row) or row["film_id"] in identities}
        parts: dict[str, list[Row]] = {}
        for table, rows in (("films", films[n]), ("clips", clips[n]), ("rejected", rejected[n])):
            parts[table] = []
            for row in rows:
                leaves = row["film"] in names or row.get("film_id") in identities or _is(film, row)
                (gone[table] if leaves else parts[table]).append(row)
        stay[n] = parts
    names = {row["film"] for rows in gone.values() for row in rows} | {row["film"] for row in failed}
    # A film that failed in some run and was never published is in failure tables only.
    kept_rows = [row for parts in stay.values() for rows in parts.values() for row in rows]
    kept_texts = {row["film"] for row in kept_rows} | {row["caption"] for row in kept_rows if "caption" in row}
    kept_texts |= {row["path"] for row in kept_rows if row.get("path")}
    captions = {row["caption"] for row in [*gone["films"], *gone["clips"]] if row["caption"]}
    kept_captions = {row["caption"] for row in kept_rows if "caption" in row}
    paths = {row["path"] for row in gone["films"] if row["path"]}
    clip_ids = {row["clip_id"] for row in [*gone["clips"], *gone["rejected"]]}
    clip_ids |= {row["clip_id"] for row in failures if row["clip_id"] and row["film"] in names - kept_texts}
    contents |= {row["sha256"] for row in gone["films"] if row["sha256"] and row["film_id"] in identities}
    caption_ids = {row["caption_id"] for row in gone["clips"] if row["caption"] not in kept_captions} - {
        row["caption_id"] for row in kept_rows if "caption_id" in row
    }
    pictures = {row["frames_id"] for row in [*gone["clips"], *gone["rejected"]]} - {
        row.get("frames_id", "") for row in kept_rows
    }
    needles = Needles(
        frozenset((identities | clip_ids | caption_ids | pictures) - {""}),
        frozenset((names | captions | paths) - kept_texts - {""}),
        frozenset(kept_texts),
    )
    erased_clips = frozenset(row["clip_id"] for row in gone["clips"])
    samples = _digests(lake, {(row["shard"], row["clip_id"]) for row in gone["clips"]})
    moment = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    made: dict[str, Version] = {}
    if not dry_run and versions:
        made = _rewrite(lake, versions, stay, erased_clips, needles, moment)
    report = {
        "asked": film,
        "films": sorted(names),
        "contents": sorted(contents),
        "clips": sorted(clip_ids),
        "captions": sorted(captions),
        "shared_captions": sorted(captions & kept_captions),
        "shared_names": sorted(names & {row["film"] for row in kept_rows}),
        "paths": sorted(paths),
        "files": sorted({(row["path"], row["bytes"], row["modified_ns"]) for row in gone["films"] if row["path"]}),
        "versions": [
            [n, len(clips[n]), len(stay[n]["clips"]), versions[n].merkle_root, made[str(n)].merkle_root if made else ""]
            for n in versions
            if any(len(stay[n][table]) != len(rows) for table, rows in (("films", films[n]), ("clips", clips[n])))
        ],
    }
    changed = dict(rewritten(version) for version in made.values())
    about = {"needles": needles.to_json(), "report": report, "asked": film, "samples": sorted(samples)}
    return Change("erase", changed, erased=about)


def _report(lake: Lake, change: Change) -> Erasure:
    told = dict(change.erased["report"])
    del told["asked"]
    versions = tuple(VersionErasure(*row) for row in told.pop("versions"))
    files = tuple((str(path), int(size), int(moment)) for path, size, moment in told.pop("files", ()))
    lists = {name: tuple(values) for name, values in told.items()}
    cache = lake.store.cache()
    forgotten = sum(cache.forget(name) for name in change.erased.get("samples", ())) if cache is not None else 0
    searched = search(lake, Needles.from_json(change.erased["needles"]))
    return Erasure(**lists, versions=versions, searched=searched, files=files, forgotten=forgotten)


def _digests(lake: Lake, clips: set[tuple[str, str]]) -> set[str]:
    """Digests of samples, by which caches name them, as far as their shards can be read; `clips`: shard and clip id."""
    found: set[str] = set()
    for shard in {shard for shard, _ in clips} if lake.store.cache() is not None else ():
        with contextlib.suppress(DamagedShard):
            reader = ShardReader(lake, shard)
            own = zip(reader.keys, reader.digests, strict=True)
            found |= {digest for clip, digest in own if (shard, clip) in clips}
    return found


def _rewrite(
    lake: Lake,
    versions: dict[int, Version],
    stay: dict[int, dict[str, list[Row]]],
    erased: frozenset[str],
    needles: Needles,
    moment: str,
) -> dict[str, Version]:
    """Write shards, tables and a snapshot without the erased clips: all versions as they will be."""
    newest = versions[max(versions)]
    used = used_rows(lake, versions.values(), erased)
    snapshot, _ = blank_rows(lake, newest.snapshot, used, "erase")
    copies: dict[str, ShardInfo] = {}
    made = {}
    for number, version in versions.items():
        rows, shards = _without(lake, version, stay[number]["clips"], copies)
        films = [{name: needles.redacted(value) for name, value in row.items()} for row in stay[number]["films"]]
        tables = {"clips": rows, "films": films, "rejected": stay[number]["rejected"]}
        manifest = {
            table: write_table_again(lake, number, table, tables[table], entry)
            for table, entry in version.manifest.items()
        }
        changed = dataclasses.replace(version, snapshot=snapshot, shards=tuple(shards), manifest=manifest)
        if manifest != version.manifest or shards != list(version.shards):
            root = shards_root(lake, shards)
            log = [*version.extra.get("erasures", []), {"time": moment, "merkle_root": version.merkle_root}]
            changed = dataclasses.replace(changed, merkle_root=root, extra={**version.extra, "erasures": log})
        made[str(number)] = changed
    return made


def _without(
    lake: Lake, version: Version, rows: Sequence[Row], copies: dict[str, ShardInfo]
) -> tuple[list[Row], list[ShardInfo]]:
    """The rows of clips that stay with their places, and the shards that hold them and nothing else."""
    by_shard: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row["shard_row"]):
        by_shard.setdefault(row["shard"], []).append(row)
    places: dict[str, tuple[str, int]] = {}
    shards: list[ShardInfo] = []
    for info in version.shards:
        kept = by_shard.get(info.name, [])
        if len(kept) == info.clips:
            shards.append(info)
        elif kept:
            name = f"{short_id(fingerprint({'without erased': [info.name, [row['clip_id'] for row in kept]]}))}.tar"
            if name not in copies:
                copies[name] = write_shard(lake, name, _samples(lake, info.name, kept))
            shards.append(copies[name])
            places |= {row["clip_id"]: (name, number) for number, row in enumerate(kept)}
    moved = []
    for row in rows:
        shard, number = places.get(row["clip_id"], (row["shard"], row["shard_row"]))
        moved.append({**row, "shard": shard, "shard_row": number})
    return moved, shards


def _samples(lake: Lake, shard: str, rows: Sequence[Row]) -> Iterator[Row]:
    reader = ShardReader(lake, shard)
    for row in rows:
        yield reader[row["shard_row"]]


def _failures(lake: Lake) -> Iterator[Row]:
    for key in lake.store.list_keys("failures/"):
        if key.endswith(".parquet"):
            try:
                yield from read_failures(lake, key.removeprefix("failures/").removesuffix(".parquet"))
            except ValueError:
                continue  # no such table: the erasure looks at its bytes


def _is(film: str, row: Row) -> bool:
    """Whether a row is about the film of this name, path or content, or about a part of it."""
    whole = re.sub(r"#[0-9.e+-]+-[0-9.e+-]*$", "", row["film"])
    if film in (row["film"], whole) or (row.get("path") and film == row["path"]):
        return True
    digests = (row.get("film_id", ""), row.get("sha256", ""))
    return bool(re.fullmatch(r"[0-9a-f]{16}|[0-9a-f]{64}", film)) and film in digests
