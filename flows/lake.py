"""The commands that look into a lake and after it: inspect, gc, erase, repair. What changes it holds it meanwhile."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from model.program import add_settings_option, parse_settings
from model.settings import override
from storage.layout import Lake

if TYPE_CHECKING:
    from storage.version import Version

Run = Callable[[argparse.Namespace], int]


def inspect(sub: argparse.ArgumentParser) -> Run:
    """Options of `vlfm inspect`."""
    sub.add_argument("clip", nargs="?", metavar="CLIP", help="a clip's id, or its first digits, to show all of it")
    _lake_options(sub)
    sub.add_argument("--version", type=int, metavar="N", help="version (default: the newest)")
    sub.add_argument("--versions", action="store_true", help="list the versions")
    sub.add_argument(
        "--diff", type=int, nargs=2, metavar=("A", "B"), help="what version B has otherwise than version A"
    )
    sub.add_argument(
        "--recipe", metavar="NAME", help="with CLIP: would this data recipe make it again? (default: its own)"
    )
    add_settings_option(sub, "rate=8")
    return run_inspect


def run_inspect(options: argparse.Namespace) -> int:
    """Show a version's films, one clip with its origin and certificate, the versions, or the difference of two."""
    from storage import version as versions
    from storage.difference import describe_versions, difference
    from storage.fingerprint import finite_json

    lake = Lake.open(options.lake)
    if options.versions:
        described = describe_versions(lake)
        print(json.dumps(described) if options.json else "\n".join(map(_version_line, described)))
        return 0
    if options.diff:
        found = difference(lake, *options.diff)
        print(json.dumps(finite_json(found.to_json())) if options.json else "\n".join(found.lines()))
        return 0
    version = versions.load(lake, options.version)
    clips = versions.read_manifest(lake, version, "clips").to_pylist()
    if options.clip:
        return _inspect_clip(options, lake, version, clips)
    rows = versions.read_manifest(lake, version, "films").to_pylist()
    if options.json:
        print(json.dumps(finite_json(rows)))
        return 0
    clip = version.clip
    print(
        f"version {version.number} of {lake.address}, {version.created}: {len(clips)} clips of {clip['duration']:g} s, "
        f"order {clip['order']}, codec {version.codec['id']}, {len(version.shards)} shards"
    )
    for row in rows:
        what = (
            f"{row['clips']} clips" if row["status"] in ("done", "unchanged") else f"{row['status']}: {row['reason']}"
        )
        print(f"  {row['film']:<32} {what:<28} {row['caption'] or ''}")
    for row in clips[:3]:
        print(f"  clip {row['clip_id']}  {row['film']} from {row['clip_start']:g} s")
    print(f"`vlfm inspect CLIP --lake {options.lake}` shows one of the {len(clips)} clips with its certificate")
    return 0


def _inspect_clip(options: argparse.Namespace, lake: Lake, version: Version, clips: list[dict[str, Any]]) -> int:
    from pipeline.ingest.provenance import provenance
    from pipeline.recipes import recipe_named
    from storage.fingerprint import finite_json
    from storage.version import read_manifest

    recipe = None
    if options.recipe or options.settings:
        settings = dict(parse_settings(options.settings))
        recipe = override(recipe_named(options.recipe or version.recipe["name"]), settings)
    outside = read_manifest(lake, version, "rejected").to_pylist()
    rows = [row for row in clips if row["clip_id"].startswith(options.clip)]
    origins = [provenance(lake, version, row, recipe) for row in rows]
    kept_out = [row for row in outside if row["clip_id"].startswith(options.clip)]
    if not rows and not kept_out:
        raise ValueError(f"version {version.number} has no clip {options.clip}; `vlfm inspect` lists its films")
    told = [{**row, "provenance": it.to_json()} for row, it in zip(rows, origins, strict=True)]
    told += [{**row, "status": "kept out by the recipe's gates"} for row in kept_out]
    status = int(any(it.damage for it in origins))
    if options.json:
        print(json.dumps(finite_json(told)))
        return status
    for number, row in enumerate(told):
        print("\n".join(f"{name:<18} {value}" for name, value in row.items() if name != "provenance"))
        if number < len(origins):
            print("\n".join(origins[number].lines()))
    return status


def _version_line(described: dict[str, Any]) -> str:
    if "error" in described:
        return f"version {described['version']}: {described['error']}"
    size = f"{described['bytes'] / 1e6:.1f} MB, {described['new_bytes'] / 1e6:.1f} MB of them new"
    erased = f", {described['erasures']} erasures" if described["erasures"] else ""
    return (
        f"version {described['version']}  {described['created']}  recipe {described['recipe']} "
        f"({described['recipe_fingerprint'][:8]}): {described['films']} films, {described['clips']} clips, "
        f"{described['shards']} shards ({size}){erased}; Merkle root {described['merkle_root'][:16]}"
    )


def gc(sub: argparse.ArgumentParser) -> Run:
    """Options of `vlfm gc`."""
    _lake_options(sub)
    sub.add_argument("--yes", "--delete", action="store_true", help="remove it; without, only say what would go")
    sub.add_argument("--keep", type=int, metavar="N", help="keep the newest N versions (default: all)")
    sub.add_argument(
        "--staged", action="store_true", help="also the blocks of an interrupted run, which the next run would take"
    )
    return run_gc


def run_gc(options: argparse.Namespace) -> int:
    """Say what no version needs, or remove it."""
    from storage.garbage import collect, find_garbage

    lake = Lake.open(options.lake)
    with lake.writing():
        freed = 0
        if options.yes:
            found, freed = collect(lake, options.keep, options.staged)
        else:
            found = find_garbage(lake, options.keep, options.staged)
    if options.json:
        print(json.dumps({**found.to_json(), "removed": options.yes, "freed": freed}))
        return 0
    print("\n".join(found.lines()))
    if options.yes:
        print(f"removed; {freed / 1e6:.1f} MB are free")
    elif not found.empty:
        print("nothing was removed; --yes removes it")
    return 0


def erase(sub: argparse.ArgumentParser) -> Run:
    """Options of `vlfm erase`."""
    sub.add_argument(
        "film", metavar="FILM", help="its name as `vlfm inspect` shows it, its path, or its content's id or sha256"
    )
    _lake_options(sub)
    sub.add_argument("--plan", action="store_true", help="say what would be erased, and do nothing")
    return run_erase


def run_erase(options: argparse.Namespace) -> int:
    """Erase a film from every version, and print the proof; exit status 1 where something of it was found."""
    from pipeline.sources.fetch import forget
    from storage.erase import erase as erase_film
    from storage.erase import plan_erasure

    lake = Lake.open(options.lake)
    with lake.writing():
        if options.plan:
            report = plan_erasure(lake, options.film, dry_run=True).erased["report"]
            films, clips = report["films"], report["clips"]
            told = f"{', '.join(films)}: {len(clips)} clips in {len(report['versions'])} versions would be erased"
            print(json.dumps(report) if options.json else told)
            return 0
        done = erase_film(lake, options.film)
    fetched = sum(forget(*file) for file in done.files)
    lines = done.lines() + ([f"{fetched} fetched films were taken out of this machine's cache"] if fetched else [])
    print(json.dumps({**done.to_json(), "fetched_forgotten": fetched}) if options.json else "\n".join(lines))
    return 0 if done.complete else 1


def repair(sub: argparse.ArgumentParser) -> Run:
    """Options of `vlfm repair`."""
    _lake_options(sub)
    sub.add_argument(
        "--give-up",
        type=int,
        action="append",
        default=[],
        metavar="N",
        help="let version N go, whose file is damaged and has no copy; several times",
    )
    return run_repair


def run_repair(options: argparse.Namespace) -> int:
    """Make again what is damaged; exit status 1 where something still is."""
    from storage.repair import repair as repair_lake

    lake = Lake.open(options.lake)
    with lake.writing():
        done = repair_lake(lake, options.give_up)
    if options.json:
        print(json.dumps({"repaired": done.repaired, "problems": done.problems}))
    else:
        print("\n".join(done.lines()))
    return 1 if done.problems else 0


def _lake_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--lake", required=True, metavar="DIR", help="the lake")
    sub.add_argument("--json", action="store_true", help="print as JSON")
