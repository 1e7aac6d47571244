"""The commands that look after a lake: gc, erase, repair. Each takes the lake for itself while it works."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable

from storage.layout import Lake

Run = Callable[[argparse.Namespace], int]


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
    print(json.dumps(done.to_json()) if options.json else "\n".join(done.lines()))
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
