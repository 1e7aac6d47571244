"""What versions before the newest hold that an ingest can carry on: clips of the same recipe are never made twice."""

from __future__ import annotations

from pipeline.items import Row
from storage.layout import Lake
from storage.version import Version, list_versions, load, read_manifest


def newest_of_recipe(lake: Lake, recipe_fingerprint: str) -> Version | None:
    """The newest version of this recipe; None where there is none."""
    versions = (load(lake, number) for number in reversed(list_versions(lake)))
    return next((version for version in versions if version.recipe_fingerprint == recipe_fingerprint), None)


def older_rows(lake: Lake, base: Version | None, wanted: set[str]) -> dict[str, Row]:
    """Rows of wanted clips, by id, in versions before `base` of its recipe: a film that is back is not made again."""
    rows: dict[str, Row] = {}
    if base is None or not wanted:
        return rows
    for number in list_versions(lake):
        version = load(lake, number)
        if number < base.number and version.recipe_fingerprint == base.recipe_fingerprint:
            table = read_manifest(lake, version, "clips")
            if wanted.intersection(table.column("clip_id").to_pylist()):
                rows |= {row["clip_id"]: row for row in table.to_pylist() if row["clip_id"] in wanted}
    return rows
