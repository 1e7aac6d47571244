"""The difference of two versions of a lake: films, clips, recipe, and what the files have in common."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from storage.layout import Lake, LakeError
from storage.version import Version, list_versions, load, read_manifest


@dataclass(frozen=True)
class Difference:
    """What version `after` has otherwise than version `before`."""

    before: int
    after: int
    films_added: tuple[str, ...]
    films_removed: tuple[str, ...]
    films_renamed: tuple[tuple[str, str], ...]
    """Names before and after of one content that has another name."""
    contents_changed: tuple[str, ...]
    """Films of one name with another content."""
    captions_changed: tuple[str, ...]
    """Films of one name and content with another caption."""
    clips_added: int
    clips_removed: int
    clips_kept: int
    settings: tuple[tuple[str, Any, Any], ...]
    """Fields of the recipe, the codec's and the text encoder's id that differ: name, before, after."""
    shards_added: int
    shards_removed: int
    bytes_added: int
    """Of the shards that only `after` has."""
    same_content: bool
    """Whether the Merkle roots are one: the same clips with the same bytes."""

    def lines(self) -> list[str]:
        """For people."""
        lines = [f"{name}: {before!r}, then {after!r}" for name, before, after in self.settings]
        for names, what in (
            (self.films_added, "added"),
            (self.films_removed, "removed"),
            (self.contents_changed, "has another content"),
            (self.captions_changed, "has another caption"),
        ):
            lines += [f"film {what}: {name}" for name in names]
        lines += [f"film renamed: {before}, then {after}" for before, after in self.films_renamed]
        clips = f"clips: {self.clips_kept} kept, {self.clips_added} added, {self.clips_removed} removed"
        shards = f"shards: {self.shards_added} added ({self.bytes_added / 1e6:.1f} MB), {self.shards_removed} removed"
        same = "the same Merkle root" if self.same_content else "another Merkle root"
        return [*lines, clips, f"{shards}; {same}"]

    def to_json(self) -> dict[str, Any]:
        """As JSON."""
        return dataclasses.asdict(self)


def difference(lake: Lake, before: int, after: int) -> Difference:
    """Compare two versions by their tables. Raises LakeError where one is not there or damaged."""
    old, new = load(lake, before), load(lake, after)
    old_films, new_films = _films(lake, old), _films(lake, new)
    old_clips, new_clips = _clips(lake, old), _clips(lake, new)
    gone, come = old_films.keys() - new_films.keys(), new_films.keys() - old_films.keys()
    by_content = {old_films[name]["sha256"]: name for name in sorted(gone) if old_films[name]["sha256"]}
    renamed = {
        by_content[new_films[name]["sha256"]]: name for name in sorted(come) if new_films[name]["sha256"] in by_content
    }
    both = sorted(old_films.keys() & new_films.keys())
    changed = [name for name in both if old_films[name]["sha256"] != new_films[name]["sha256"]]
    spoken = [name for name in both if old_films[name]["caption"] != new_films[name]["caption"] and name not in changed]
    old_shards, new_shards = ({info.name: info.bytes for info in it.shards} for it in (old, new))
    added = new_shards.keys() - old_shards.keys()
    return Difference(
        before=before,
        after=after,
        films_added=tuple(sorted(come - set(renamed.values()))),
        films_removed=tuple(sorted(gone - renamed.keys())),
        films_renamed=tuple(sorted(renamed.items())),
        contents_changed=tuple(changed),
        captions_changed=tuple(spoken),
        clips_added=len(new_clips - old_clips),
        clips_removed=len(old_clips - new_clips),
        clips_kept=len(old_clips & new_clips),
        settings=tuple(_settings(old, new)),
        shards_added=len(added),
        shards_removed=len(old_shards.keys() - new_shards.keys()),
        bytes_added=sum(new_shards[name] for name in added),
        same_content=old.merkle_root == new.merkle_root,
    )


def describe_versions(lake: Lake) -> list[dict[str, Any]]:
    """All versions, the oldest first: number, created, parent, recipe, films, clips, shards, bytes, new bytes, root.

    A damaged one has its number and `error`.
    """
    described: list[dict[str, Any]] = []
    known: set[str] = set()
    for number in list_versions(lake):
        try:
            version = load(lake, number)
        except LakeError as error:
            described.append({"version": number, "error": str(error)})
            continue
        described.append(
            {
                "version": number,
                "created": version.created,
                "parent": version.parent,
                "recipe": version.recipe.get("name", ""),
                "recipe_fingerprint": version.recipe_fingerprint,
                "films": version.manifest["films"]["rows"],
                "clips": version.manifest["clips"]["rows"],
                "shards": len(version.shards),
                "bytes": sum(info.bytes for info in version.shards),
                "new_bytes": sum(info.bytes for info in version.shards if info.name not in known),
                "merkle_root": version.merkle_root,
                "erasures": len(version.extra.get("erasures", [])),
            }
        )
        known |= {info.name for info in version.shards}
    return described


def _films(lake: Lake, version: Version) -> dict[str, Mapping[str, Any]]:
    return {row["film"]: row for row in read_manifest(lake, version, "films").to_pylist()}


def _clips(lake: Lake, version: Version) -> set[str]:
    return set(read_manifest(lake, version, "clips", ["clip_id"]).column("clip_id").to_pylist())


def _settings(old: Version, new: Version) -> list[tuple[str, Any, Any]]:
    pairs = [(name, old.recipe.get(name), new.recipe.get(name)) for name in sorted({*old.recipe, *new.recipe})]
    pairs += [
        ("codec.id", old.codec.get("id"), new.codec.get("id")),
        ("text.id", old.text.get("id"), new.text.get("id")),
    ]
    return [pair for pair in pairs if pair[1] != pair[2]]
