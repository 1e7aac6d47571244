"""Crashes at every step of what changes a lake, and a second run after each: it must end as if nothing had happened.

    python -m tests.bench.chaos [--trials N] [--seed S] [--spread | --matrix | --ray N] [--json]

A trial is a forked process that publishes a version, collects garbage, erases a film or repairs, and is stopped by a
fault at its k-th change of the file system or of the bucket; then another process does the same again. What the lake
holds is compared with that of a run that nothing stopped. `--matrix` takes every step of the write protocol,
`--spread` sixty trials (they are in the test suite), `--ray` kills real ingests with Ray; without these, operations,
faults and steps are drawn.
The faults:

    driver, worker, group   SIGKILL of the process that publishes, of the one that stages a block, of both
    tear                    the file that is renamed is cut in half, as if it had not been fsynced, then SIGKILL
    unsynced                SIGKILL, and every new file that no version names is cut in half: a power cut
    disk                    from here on the disk is full
    clock                   SIGKILL while Icechunk commits, out of Python's sight
    killed, refused, lost   in a bucket: SIGKILL within a request; from a request on the server refuses every change;
                            a request's answer is lost and the later ones are refused
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
import tempfile
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any

from tests.bench.chaos.bucket import Bucket
from tests.bench.chaos.folder import Folder
from tests.bench.chaos.operations import OPERATIONS
from tests.bench.chaos.real_ray import ray_trials
from tests.bench.chaos.trials import Place, Trial

IN_FOLDER = ("driver", "disk", "unsynced", "tear", "clock")
IN_BUCKET = ("killed", "refused", "lost")
BUCKET_OPERATIONS = ("publish", "gc", "erase")
WORKER_STEPS = 3
"""A worker that stages a block opens a file and renames it: the last one comes to its end."""


def faults_of(place: Place, operation: str) -> tuple[str, ...]:
    """The faults that there are for an operation."""
    if place.name == "bucket":
        return IN_BUCKET
    return (*IN_FOLDER, "group", "worker") if operation == "publish" else IN_FOLDER


def steps_of(place: Place, operation: str, fault: str) -> int:
    """How many steps a fault can be at."""
    place.of(operation)
    return {"worker": WORKER_STEPS, "clock": 16}.get(fault, len(place.changes[operation]))


def is_of_lock(change: str) -> bool:
    """Whether a change is of a lock, as `open .writing.lock`."""
    return change.split(" ", 1)[1].startswith(".")


def matrix(places: dict[str, Place]) -> list[Trial]:
    """Every fault at every step of a publication; of the others a kill at every step, and each other fault four times.

    A bucket's requests are many: each step has one of its faults in turn, in the other operations four steps each.
    """
    trials = []
    for place in places.values():
        for operation in OPERATIONS if place.name == "folder" else BUCKET_OPERATIONS:
            for number, fault in enumerate(faults_of(place, operation)):
                steps = list(range(steps_of(place, operation, fault)))
                if fault == "tear":
                    steps = [
                        step for step in steps if place.changes[operation][step].startswith(("os.rename", "os.link"))
                    ]
                if place.name == "bucket":
                    steps = steps[number :: len(IN_BUCKET)]
                if operation != "publish" and fault != "driver":
                    steps = steps[:: -(-len(steps) // 4)]
                trials += [Trial(place.name, operation, fault, step) for step in steps]
    return trials


def spread(places: dict[str, Place]) -> list[Trial]:
    """Sixty trials: a kill before each change of a publication, each kind of file torn once, and the rest spread."""
    folder = places["folder"]
    folder.of("publish")
    changes = folder.changes["publish"]
    trials = [Trial("folder", "publish", "driver", step) for step, it in enumerate(changes) if not is_of_lock(it)]
    for torn in (r"os.rename staging/", r"os.rename shards/.*\.tar", r"os.link versions/"):
        step = max(number for number, change in enumerate(changes) if re.match(torn, change))
        trials.append(Trial("folder", "publish", "tear", step))
    chosen = [
        ("folder", "publish", "group", 3), ("folder", "publish", "disk", 4), ("folder", "publish", "unsynced", 4),
        ("folder", "publish", "worker", 2), ("folder", "publish", "clock", 3),
        ("folder", "erase", "driver", 4), ("folder", "gc", "driver", 3), ("folder", "repair", "driver", 3),
        ("folder", "erase", "disk", 1), ("folder", "gc", "disk", 1), ("folder", "repair", "disk", 1),
        ("folder", "erase", "tear", 1), ("folder", "gc", "tear", 1),
        *(("bucket", "publish", fault, 1) for fault in IN_BUCKET),
    ]  # fmt: skip
    chosen.append(("folder", "erase", "unsynced", 60 - len(trials) - sum(count for _, _, _, count in chosen)))
    for name, operation, fault, count in chosen:
        # In the middle of equal parts of the way; those in a bucket one after the other.
        last = 2 if fault == "worker" else steps_of(places[name], operation, fault)
        first = 1 + 2 * IN_BUCKET.index(fault) / 3 - 2 / 3 if name == "bucket" else 1
        trials += [Trial(name, operation, fault, int(last * (2 * k + first) / (2 * count))) for k in range(count)]
    return trials


def drawn(places: dict[str, Place], count: int, seed: int) -> list[Trial]:
    """Trials by chance."""
    chance = random.Random(seed)
    trials = []
    for _ in range(count):
        place = places[chance.choice(["folder", "folder", "folder", "bucket"])]
        own = list(OPERATIONS) if place.name == "folder" else list(BUCKET_OPERATIONS)
        operation = chance.choice(["publish", "publish", *own])
        fault = chance.choice(faults_of(place, operation))
        trials.append(Trial(place.name, operation, fault, chance.randrange(steps_of(place, operation, fault))))
    return trials


def _say(row: dict[str, Any], number: int, total: int) -> None:
    ended = "as uninterrupted" if row["equal"] else "DIFFERENT"
    where = f"{row['place']} {row['operation']} {row['fault']} {row['number']}"
    print(f"{number}/{total} {where}: {row['step'] or 'not stopped'}, {ended}", file=sys.stderr, flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Run the trials and print the tally; status 1 where a second run did not end as one that nothing stopped."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.chaos", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--trials", type=int, default=200, help="random trials (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument("--matrix", action="store_true", help="every fault at every step")
    chosen.add_argument("--spread", action="store_true", help="the sixty of the test suite")
    chosen.add_argument("--ray", type=int, default=0, metavar="N", help="N kills of real ingests with Ray")
    parser.add_argument("--only", default="", help="those whose place, operation or fault is this")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    options = parser.parse_args(arguments)
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        if options.ray:
            rows = ray_trials(Path(folder), options.ray, options.seed)
        else:
            with closing(Bucket(Path(folder))) as bucket:
                places: dict[str, Place] = {"folder": Folder(Path(folder)), "bucket": bucket}
                choose = matrix if options.matrix else spread
                trials = (
                    choose(places) if options.matrix or options.spread else drawn(places, options.trials, options.seed)
                )
                wanted = [it for it in trials if options.only in ("", it.place, it.operation, it.fault)]
                rows = []
                for trial in wanted:
                    rows.append(places[trial.place].run(trial))
                    if not options.json:
                        _say(rows[-1], len(rows), len(wanted))
    if options.json:
        print(json.dumps(rows))
    else:
        tally = Counter((row["place"], row["operation"], row["fault"]) for row in rows)
        for kind, count in sorted(tally.items()):
            own = [row for row in rows if (row["place"], row["operation"], row["fault"]) == kind]
            stopped, good = sum(row["status"] != 0 for row in own), sum(row["equal"] for row in own)
            print(
                f"{kind[0]:7} {kind[1]:8} {kind[2]:9} {count:4} trials, {stopped:4} stopped, {good:4} as uninterrupted"
            )
        for row in rows:
            if not row["equal"]:
                print(f"DIFFERENT: {row}")
        stopped, different = sum(row["status"] != 0 for row in rows), sum(not row["equal"] for row in rows)
        print(f"{len(rows)} trials, {stopped} stopped, {different} different")
    return int(not all(row["equal"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
