"""Crashes at every step of what changes a lake, and a second run after each: it must end as if nothing had happened.

    python -m tests.bench.chaos [--trials N] [--seed S] [--matrix] [--json]

A trial is a forked process that publishes a version, collects garbage, erases a film or repairs, and is stopped by a
fault at its k-th change of the file system; then another process does the same again. What the lake holds is compared
with that of a run that nothing stopped. `--matrix` takes every step of a publication and a fixed choice of the others;
without it, faults and steps are drawn. The faults:

    driver, worker, group   SIGKILL of the process that publishes, of the one that stages a block, of both
    tear                    the file that is renamed is cut in half, as if it had not been fsynced, then SIGKILL
    unsynced                SIGKILL before the commit point, and every file that no version names is cut in half
    disk                    from here on the disk is full
    clock                   SIGKILL while Icechunk commits, out of Python's sight
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import functools
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Imported before the forks, so that a trial costs what it does and no import.
import icechunk
import webdataset.writer  # noqa: F401
import zarr  # noqa: F401

from storage import staging, version
from storage.change import orphans
from storage.erase import NoSuchFilm, erase
from storage.garbage import collect
from storage.layout import Lake
from storage.repair import repair
from storage.verify import verify
from tests.storage.film_lake import Film, publish

BASE = [Film("a.mp4", "first film", "the first of all"), Film("b.mp4", "second film", "another film", 1)]
NEXT = [BASE[0], Film("c.mp4", "third film", "a film that is new", 3)]
FAULTS = ("driver", "worker", "group", "tear", "unsynced", "disk", "clock")
Operation = Callable[[Lake], Any]


@dataclass(frozen=True)
class Trial:
    """A fault at a step of an operation."""

    operation: str
    fault: str
    step: int
    """Which change of the file system, from 0; for `clock` a 16th of the commit's time."""


# --- what is done ---


def publish_next(lake: Lake, stage: Callable[..., Any] = staging.write_block) -> None:
    """The next version, unless it is there."""
    if version.latest(lake).number == 2:  # type: ignore[union-attr]
        publish(lake, NEXT, stage=stage)


def collect_all(lake: Lake) -> None:
    """Garbage, with all versions but the newest."""
    with lake.writing():
        collect(lake, keep=1)


def erase_first(lake: Lake) -> None:
    """A film, which may be erased already."""
    with lake.writing(), contextlib.suppress(NoSuchFilm):
        assert erase(lake, "a.mp4").complete


def repair_all(lake: Lake) -> None:
    """What `damaged` does."""
    with lake.writing():
        assert repair(lake).problems == []


OPERATIONS: dict[str, Operation] = {
    "publish": publish_next, "gc": collect_all, "erase": erase_first, "repair": repair_all,
}  # fmt: skip


def make_base(root: Path, operation: str) -> None:
    """A lake of two versions, before the operation."""
    lake = Lake.create(root)
    publish(lake, BASE[:1])
    publish(lake, BASE)
    if operation == "repair":
        tar = sorted((root / "shards").glob("*.tar"))[0]
        os.truncate(tar, 1000)
        (root / "arrays" / "snapshots" / version.load(lake).snapshot).unlink()


def state(lake: Lake) -> dict[str, Any]:
    """All that a lake says: versions without the name of their snapshot, tables, shards, what is staged, and whether
    the arrays hold the same (`verify`)."""
    found: dict[str, Any] = {"keys": [key for key in lake.store.list_keys() if not key.startswith("arrays/")]}
    found["staged"] = staging.staged_blocks(lake)
    for number in version.list_versions(lake):
        it = version.load(lake, number)
        rows = version.read_manifest(lake, it).to_pylist()
        facts = [[row["clip_id"], row["film"], row["caption"], row["shard"], row["shard_row"]] for row in rows]
        films = version.read_manifest(lake, it, "films").column("film").to_pylist()
        shards = [[info.name, hashlib.sha256(lake.store.read(f"shards/{info.name}")).hexdigest()] for info in it.shards]
        found[f"version {number}"] = [it.merkle_root, facts, films, shards, it.counts, verify(lake, it)]
    return found


# --- faults ---


def arm(root: Path, fault: str, step: int, note: Path) -> None:
    """Let the fault happen at this process' `step`-th change below `root`."""
    seen, torn = 0, False

    def watch(event: str, details: tuple[Any, ...]) -> None:
        nonlocal seen, torn
        paths = _changed(event, details, root)
        if not paths:
            return
        seen += 1
        if seen <= step or (fault == "disk" and event not in ("open", "os.mkdir")):
            return
        if fault == "tear" and not torn:
            if event in ("os.rename", "os.link") and "/arrays" not in str(paths[0]):
                torn = True
                os.truncate(paths[0], os.path.getsize(paths[0]) // 2)
                _note(note, event, str(paths[-1]), root)
            return
        if not (fault == "tear" and torn):
            _note(note, event, str(paths[-1]), root)
        if fault == "disk":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(paths[-1]))
        os.killpg(0, signal.SIGKILL) if fault == "group" else os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def _changed(event: str, details: tuple[Any, ...], root: Path) -> list[str]:
    """The paths that an audited event changes, if one of them is below `root`; else none."""
    if event == "open":
        changes = isinstance(details[2], int) and bool(details[2] & (os.O_WRONLY | os.O_RDWR))
    else:
        changes = event in ("os.rename", "os.link", "os.remove", "os.mkdir", "os.truncate")
    ends = details[:1] if event == "open" else details[:2]
    paths = [str(os.fspath(item)) for item in ends if isinstance(item, (str, os.PathLike))]
    return paths if changes and any(path.startswith(str(root)) for path in paths) else []


def _note(note: Path, event: str, path: str, root: Path) -> None:
    with contextlib.suppress(FileExistsError):
        handle = os.open(note, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        os.write(handle, f"{event} {os.path.relpath(path, root)}".encode())
        os.close(handle)


def in_child(work: Callable[[], Any], group: bool = False) -> int:
    """Run `work` in a forked process: its exit status, negative for the signal that ended it, 1 for an error."""
    process = os.fork()
    if process:
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    try:
        if group:
            os.setsid()
        work()
        sys.stdout.flush()
        os._exit(0)
    except OSError as error:
        # A full disk is an error that people are told in a line.
        os._exit(3 if error.errno == errno.ENOSPC else _told())
    except BaseException:
        os._exit(_told())


def _told() -> int:
    traceback.print_exc()
    return 1


def staged_by_worker(first: Callable[[], None]) -> Callable[..., None]:
    """Blocks are staged by a process of their own, which `first` may end; one that dies is replaced, once."""

    def stage(*given: Any) -> None:
        for before in (first, lambda: None):

            def work(before: Callable[[], None] = before) -> None:
                before()
                staging.write_block(*given)

            if in_child(work) == 0:
                return
        raise AssertionError("two workers died")

    return stage


def suffer(root: Path, trial: Trial, note: Path, seconds: float) -> None:
    """Do the operation until the fault."""
    lake, operation = Lake.open(root), OPERATIONS[trial.operation]
    if trial.fault == "worker":
        publish_next(lake, staged_by_worker(functools.partial(arm, root, "driver", trial.step, note)))
        return
    if trial.fault == "clock":
        commit = icechunk.Session.commit

        def hurried(*given: Any, **named: Any) -> Any:
            threading.Timer(seconds * trial.step / 16, os.kill, (os.getpid(), signal.SIGKILL)).start()
            made = commit(*given, **named)
            time.sleep(seconds)
            return made

        icechunk.Session.commit = hurried  # type: ignore[method-assign,assignment]
        operation(lake)
        return
    fault = "driver" if trial.fault == "unsynced" else trial.fault
    arm(root, fault, trial.step, note)
    if trial.operation == "publish" and trial.fault == "group":
        publish_next(lake, staged_by_worker(lambda: None))
        return
    operation(lake)


def lose_unsynced(root: Path, before: set[str]) -> None:
    """Cut every file in half that is new and that no version names: what a power cut may leave of a dead run."""
    lake = Lake.open(root)
    named = "".join(path.read_text() for path in sorted((root / "versions").glob("*.json")))
    for key in lake.store.list_keys():
        name = key.rpartition("/")[2].replace(".index.json", ".tar")
        if key not in before and name not in named and not key.startswith(("versions/", "arrays/refs", "maintenance")):
            os.truncate(root / key, (root / key).stat().st_size // 2)


# --- trials ---


@dataclass
class Bases:
    """For each operation a lake before it, and what it is to be after it."""

    folder: Path

    def __post_init__(self) -> None:
        self.expected: dict[str, dict[str, Any]] = {}
        self.changes: dict[str, int] = {}
        self.seconds = 0.1

    def of(self, operation: str) -> Path:
        """The lake before the operation; the first call makes it, and measures a run that nothing stops."""
        base = self.folder / f"base-{operation}"
        if operation not in self.expected:
            whole, told = self.folder / f"whole-{operation}", self.folder / "told"
            assert in_child(lambda: make_base(base, operation)) == 0
            shutil.copytree(base, whole)
            assert in_child(lambda: told.write_text(str(_counted(whole, operation)))) == 0
            self.changes[operation] = int(told.read_text())
            assert in_child(lambda: told.write_text(json.dumps(_settled(whole)))) == 0
            self.expected[operation] = json.loads(told.read_text())
            shutil.rmtree(whole)
        return base

    def run(self, trial: Trial) -> dict[str, Any]:
        """One trial: what was killed where, and whether the second run ended as one that nothing stopped."""
        base, root, note = self.of(trial.operation), self.folder / "trial", self.folder / "note"
        shutil.copytree(base, root)
        note.unlink(missing_ok=True)
        before = set(Lake.open(root).store.list_keys())
        status = in_child(lambda: suffer(root, trial, note, self.seconds), group=True)
        newest = max(version.list_versions(Lake.open(root)))
        if trial.fault == "unsynced" and status:
            lose_unsynced(root, before)
        told = self.folder / "told"

        def again() -> None:
            OPERATIONS[trial.operation](Lake.open(root))
            told.write_text(json.dumps(_settled(root)))

        done = in_child(again) == 0
        equal = done and json.loads(told.read_text()) == self.expected[trial.operation]
        if done and not equal and os.environ.get("CHAOS_SHOW"):
            print(json.dumps({"found": json.loads(told.read_text()), "expected": self.expected[trial.operation]}))
        shutil.rmtree(root)
        step = note.read_text() if note.exists() else ""
        row = {"operation": trial.operation, "fault": trial.fault, "number": trial.step, "step": step, "newest": newest}
        return {**row, "status": status, "equal": equal}


def _counted(root: Path, operation: str) -> int:
    """Do the operation and count its changes."""
    count = 0

    def watch(event: str, details: tuple[Any, ...]) -> None:
        nonlocal count
        count += bool(_changed(event, details, root))

    sys.addaudithook(watch)
    OPERATIONS[operation](Lake.open(root))
    return count


def _settled(root: Path) -> dict[str, Any]:
    """What the lake says once garbage that no version names is collected."""
    lake = Lake.open(root)
    with lake.writing():
        collect(lake)
    assert orphans(lake) == []
    return json.loads(json.dumps(state(lake)))  # type: ignore[no-any-return]


def matrix(bases: Bases) -> list[Trial]:
    """Every step of a publication, and of the others a choice."""
    for operation in OPERATIONS:
        bases.of(operation)
    steps = bases.changes
    trials = [Trial("publish", "driver", step) for step in range(steps["publish"])]
    spread = lambda operation, count: [steps[operation] * k // count for k in range(count)]  # noqa: E731
    trials += [
        Trial("publish", fault, step) for fault in ("group", "disk", "unsynced") for step in spread("publish", 4)
    ]
    trials += [Trial("publish", "worker", step) for step in (0, 1)]
    trials += [Trial("publish", "tear", step) for step in spread("publish", 4)]
    trials += [Trial("publish", "clock", step) for step in (2, 8, 14)]
    trials += [Trial("erase", "driver", step) for step in spread("erase", 8)]
    trials += [Trial("gc", "driver", step) for step in spread("gc", 4)]
    trials += [Trial("repair", "driver", step) for step in spread("repair", 4)]
    return trials + [Trial(operation, "disk", steps[operation] // 2) for operation in ("gc", "erase", "repair")]


def drawn(bases: Bases, count: int, seed: int) -> list[Trial]:
    """Trials by chance."""
    chance = random.Random(seed)
    trials = []
    for _ in range(count):
        operation = chance.choice(["publish", "publish", *OPERATIONS])
        bases.of(operation)
        faults = FAULTS if operation == "publish" else ("driver", "disk", "clock", "unsynced")
        fault = chance.choice(faults)
        top = {"clock": 16, "worker": 3}.get(fault, bases.changes[operation])
        trials.append(Trial(operation, fault, chance.randrange(top)))
    return trials


def main(arguments: list[str] | None = None) -> int:
    """Run the trials and print the tally; status 1 where a second run did not end as one that nothing stopped."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.chaos", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--trials", type=int, default=200, help="random trials (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--matrix", action="store_true", help="the fixed choice, and every step of a publication")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        bases = Bases(Path(folder))
        trials = matrix(bases) if options.matrix else drawn(bases, options.trials, options.seed)
        rows = [bases.run(trial) for trial in trials]
    if options.json:
        print(json.dumps(rows))
    else:
        tally = Counter((row["operation"], row["fault"]) for row in rows)
        for (operation, fault), count in sorted(tally.items()):
            own = [row for row in rows if (row["operation"], row["fault"]) == (operation, fault)]
            stopped, good = sum(row["status"] != 0 for row in own), sum(row["equal"] for row in own)
            print(f"{operation:8} {fault:9} {count:4} trials, {stopped:4} stopped, {good:4} ended as uninterrupted")
        for row in rows:
            if not row["equal"]:
                print(f"DIFFERENT: {row}")
        print(
            f"{len(rows)} trials, {sum(row['status'] != 0 for row in rows)} stopped, "
            f"{sum(not row['equal'] for row in rows)} different"
        )
    return int(not all(row["equal"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
