"""What earlier versions hold that an ingest can carry on: the films of the dataset, and clips of the same recipe.

The film table of the newest version is the list of the dataset's films, whatever the recipe: a film that was taken out
under one recipe does not come back with another one's clips.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace

from pipeline.ingest.environment import LASTING, RECIPE_BOUND
from pipeline.ingest.identity import content, covers
from pipeline.items import Row
from pipeline.recipes import AS_BEFORE, NO, YES, DataRecipe
from storage.fingerprint import fingerprint
from storage.layout import Lake, LakeError
from storage.shards import DamagedShard, ShardReader
from storage.version import Version, read_manifest, readable_versions

OTHER_RECIPE = "other_recipe"
"""Reason of films that have no clips by this recipe yet, because its runs did not include their source."""


def as_in_lake(lake: Lake, recipe: DataRecipe) -> DataRecipe:
    """The recipe with `next_frame` decided: with `auto`, a lake of clips without next frames stays one without.

    Else all of its clips would be made again for a setting that nobody asked for.
    """
    if recipe.next_frame != AS_BEFORE:
        return recipe
    choices = {fingerprint((made := replace(recipe, next_frame=word)).data_fields()): made for word in (NO, YES)}
    found = [version.recipe_fingerprint for version in readable_versions(lake)[0]]
    return next((choices[name] for name in found if name in choices), replace(recipe, next_frame=YES))


def newest_of_recipe(lake: Lake, parent: Version | None, recipe_fingerprint: str) -> tuple[Version | None, list[str]]:
    """The newest version of this recipe, None where there is none; and what is wrong with older ones, a line each.

    parent: the newest version, which has to be whole. An older one that is damaged stops nothing.
    """
    versions, problems = readable_versions(lake)
    for version in versions:
        if version.recipe_fingerprint == recipe_fingerprint:
            if parent is not None and version.number == parent.number:
                return version, problems
            try:
                for table in ("clips", "films", "rejected"):
                    read_manifest(lake, version, table, [])
            except LakeError as error:
                problems.append(str(error))
            else:
                return version, problems
    return None, problems


def older_rows(lake: Lake, base: Version | None, wanted: set[str]) -> dict[str, Row]:
    """Rows of wanted clips, by id, in versions up to `base` of its recipe: a film that is back is not made again."""
    rows: dict[str, Row] = {}
    if base is None or not wanted:
        return rows
    versions, _ = readable_versions(lake)
    for version in reversed(versions):
        if version.number <= base.number and version.recipe_fingerprint == base.recipe_fingerprint:
            with contextlib.suppress(LakeError):  # a damaged old table: those clips are made again
                table = read_manifest(lake, version, "clips")
                if wanted.intersection(table.column("clip_id").to_pylist()):
                    rows |= {row["clip_id"]: row for row in table.to_pylist() if row["clip_id"] in wanted}
    return {clip: row for clip, row in rows.items() if _is_whole(lake, row)}


def _is_whole(lake: Lake, row: Row) -> bool:
    """Whether a clip's sample in an older shard can be copied; all its checksums are compared."""
    try:
        ShardReader(lake, row["shard"]).read(row["shard_row"])
    except DamagedShard:
        return False
    return True


def dataset_films(lake: Lake, parent: Version | None, base: Version | None) -> list[Row]:
    """The films of the dataset, with what this recipe (that of `base`) made of them.

    Args:
        lake: where.
        parent: the newest version.
        base: the newest one of this recipe.
    """
    newest = read_manifest(lake, parent, "films").to_pylist() if parent else []
    if base is None or parent is None or base.number == parent.number:
        return newest if base is not None else [_without_clips(row) for row in newest]
    before = read_manifest(lake, base, "films").to_pylist()
    if not _is_list_of_films(newest):
        return list(before)
    by_name = {row["film"]: row for row in before}
    by_content = {(*content(row), row["film"].rpartition("#")[2]): row for row in before if row["film_id"]}
    rows = []
    for row in newest:
        own = by_name.get(row["film"])
        if own is None or content(own) != content(row):
            own = by_content.get((*content(row), row["film"].rpartition("#")[2]))
        where = {name: row[name] for name in ("film", "bytes", "modified_ns", "sha256", "path", "source")}
        rows.append({**own, **where} if own is not None else _without_clips(row))
    return rows


def dataset_clips(
    lake: Lake, parent: Version | None, base: Version | None, films: Sequence[Row], windows: bool = True
) -> list[Row]:
    """The clips of `base` whose films (`films`, see `dataset_films`) are in the dataset still, under their names.

    windows: as Identities'.
    """
    if base is None or parent is None:
        return []
    clips: list[Row] = read_manifest(lake, base, "clips").to_pylist()
    if base.number == parent.number or not _is_list_of_films(read_manifest(lake, parent, "films").to_pylist()):
        return clips
    by_content: dict[tuple[str, str], list[str]] = {}
    for row in films:
        by_content.setdefault(content(row), []).append(row["film"])
    # A film that cannot be read any more keeps what it gave.
    lost = {row["film"] for row in films if not row["film_id"]}
    kept = []
    for clip in clips:
        names = [name for name in by_content.get(content(clip), []) if covers(name, clip, windows)]
        if clip["film"] in names or (not names and clip["film"] in lost):
            kept.append(clip)
        elif names:
            kept.append({**clip, "film": names[0]})
    return kept


def _is_list_of_films(rows: Sequence[Row]) -> bool:
    """Whether the program that wrote them knew sources; older ones forgot films when the recipe changed."""
    return any(row["source"] for row in rows)


def _without_clips(row: Row) -> Row:
    """A film that has given nothing by this recipe yet."""
    if row["status"] == "failed" and row["reason"] in LASTING - RECIPE_BOUND:
        return {**row, "clips": 0}
    detail = "its clips are of another recipe; ingest its source with this one"
    return {**row, "clips": 0, "status": "filtered", "reason": OTHER_RECIPE, "detail": detail}
