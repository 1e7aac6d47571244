"""Where a clip comes from, and whether a recipe would make it again now, and why."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.gates import flags
from pipeline.items import Row
from pipeline.recipes import AS_BEFORE, NO, DataRecipe
from storage.fingerprint import canonical_json, file_digest, fingerprint
from storage.layout import Lake, LakeError
from storage.shards import DamagedShard, ShardReader
from storage.version import Version, list_versions, load, read_manifest

_STAGES = {
    "size": "decode", "rate": "decode", "duration": "decode", "shots": "decode", "codec": "invert",
    "next_frame": "invert", "observe": "project", "order": "project", "method": "project", "text": "embed",
}  # fmt: skip
"""The first stage whose result depends on a field of the recipe; what comes before it is taken as stored."""


@dataclass(frozen=True)
class Provenance:
    """A clip's origin and its standing."""

    film: str
    path: str
    start: float
    end: float
    """Seconds of the film."""
    content: str
    """sha256 of the film."""
    recipe: str
    recipe_fingerprint: str
    codec: str
    text: str
    block: str
    shard: str
    shard_row: int
    group: str
    array_row: int
    snapshot: str
    versions: tuple[int, ...]
    """Versions that have it."""
    damage: str
    """What is wrong with its sample; empty where its checksum is right."""
    again: bool
    """Whether the recipe that was asked for would make it, or a part of it, again."""
    reasons: tuple[str, ...]
    """Why, or why not, a line each."""

    def lines(self) -> list[str]:
        """For people."""
        origin = f"{self.path or self.film}, {self.start:g} to {self.end:g} s, sha256 {self.content[:16]}"
        stored = f"row {self.shard_row} of {self.shard}, row {self.array_row} of the arrays {self.group}"
        made = f"recipe {self.recipe} ({self.recipe_fingerprint[:16]}), codec {self.codec}, text {self.text}"
        verdict = "would be made again" if self.again else "would not be made again"
        return [
            f"from               {origin}",
            f"made by            {made}",
            f"stored in          {stored}, block {self.block}, snapshot {self.snapshot}",
            f"its sample         {self.damage or 'is whole, by its checksum'}",
            f"in versions        {', '.join(map(str, self.versions))}",
            f"an ingest now      {verdict}: {'; '.join(self.reasons)}",
        ]

    def to_json(self) -> dict[str, Any]:
        """As JSON."""
        return dataclasses.asdict(self)


def provenance(lake: Lake, version: Version, clip: Row, recipe: DataRecipe | None = None) -> Provenance:
    """Where a clip of a version comes from, and what an ingest by `recipe` (None: the version's own) would do with it.

    Its sample is read, and its checksum compared. The film is looked at: its size and time of change, and where these
    differ its content.

    Raises:
        LakeError: the version's table of films is damaged.
    """
    films = {row["film"]: row for row in read_manifest(lake, version, "films").to_pylist()}
    film = films.get(clip["film"], {"path": "", "sha256": "", "bytes": 0, "modified_ns": 0, "caption": clip["caption"]})
    again, reasons = _standing(version, clip, film, recipe)
    return Provenance(
        film=clip["film"],
        path=film["path"],
        start=clip["clip_start"],
        end=clip["clip_start"] + clip["duration"],
        content=film["sha256"],
        recipe=version.recipe.get("name", ""),
        recipe_fingerprint=version.recipe_fingerprint,
        codec=version.codec["id"],
        text=version.text["id"],
        block=clip["shard"].removesuffix(".tar"),
        shard=clip["shard"],
        shard_row=clip["shard_row"],
        group=version.group,
        array_row=clip["array_row"],
        snapshot=version.snapshot,
        versions=tuple(_versions_with(lake, clip["clip_id"])),
        damage=_damage(lake, clip),
        again=again,
        reasons=tuple(reasons),
    )


def _standing(version: Version, clip: Row, film: Row, recipe: DataRecipe | None) -> tuple[bool, list[str]]:
    again, reasons = False, []
    if recipe is not None:
        if recipe.next_frame == AS_BEFORE:
            recipe = dataclasses.replace(recipe, next_frame=version.recipe.get("next_frame", NO))
        own = json.loads(canonical_json(recipe.data_fields()))
        if fingerprint(own) != version.recipe_fingerprint:
            again = True
            before, now = ({"next_frame": NO, **fields} for fields in (version.recipe, own))
            differs = [name for name in sorted(now) if name in before and before[name] != now[name]]
            reasons += [f"{name} is {now[name]!r} now, it was {before[name]!r}" for name in differs]
            stages = [
                stage for stage in ("decode", "invert", "project", "embed") for n in differs if _STAGES.get(n) == stage
            ]
            if stages:
                reasons.append(f"from its stage {stages[0]} on")
        elif outside := flags(clip, recipe.gates):
            reasons.append(f"the recipe's gates keep it out or flag it: {', '.join(outside)}")
    path = Path(film["path"])
    if not film["path"] or "://" in film["path"]:
        reasons.append("its film is not on a local disk and was not looked at")
    elif not path.is_file():
        reasons.append("its film is not there; the clip stays until --prune, and could not be made again")
        again = False
    elif (path.stat().st_size, path.stat().st_mtime_ns) == (film["bytes"], film["modified_ns"]):
        reasons.append("its film is as it was ingested")
    elif file_digest(path) == film["sha256"]:
        reasons.append("its film was touched and has the same content")
    else:
        again = True
        reasons.append("its film has another content, whose clips take its place")
    if clip["caption"] != film["caption"]:
        again = True
        reasons.append("its film has another caption: the text is made again")
    return again, reasons


def _damage(lake: Lake, clip: Row) -> str:
    try:
        ShardReader(lake, clip["shard"]).read(clip["shard_row"])
    except DamagedShard as error:
        return str(error)
    return ""


def _versions_with(lake: Lake, clip: str) -> list[int]:
    found = []
    for number in list_versions(lake):
        try:
            table = read_manifest(lake, load(lake, number), "clips", ["clip_id"])
        except LakeError:
            continue  # damage is verify's to tell
        if clip in table.column("clip_id").to_pylist():
            found.append(number)
    return found
