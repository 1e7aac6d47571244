"""Kill a publication at every step of its protocol, then recover. Run by test_crash.py as a program of its own.

usage: crash_driver.py FOLDER

Each trial is a forked process that publishes the second version of a lake and is killed (SIGKILL) just before its
k-th change of the file system, for k = 0, 1, ... until it comes to its end; further trials are killed by the clock
while Icechunk writes, which happens out of Python's sight. Then another process looks at what is left and publishes
again. The last line printed is a JSON report.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Imported before the forks, so that a trial costs what it does and no import.
import icechunk  # noqa: F401
import pyarrow.parquet  # noqa: F401
import sample_lake
import webdataset.writer  # noqa: F401
import zarr  # noqa: F401

from storage import arrays, version
from storage import verify as verification
from storage.change import orphans
from storage.layout import Lake

FIRST, SECOND = range(3), range(3, 6)
CLOCK_TRIALS = 3


def in_child(work: Callable[[], Any]) -> int:
    """Run `work` in a forked process: its exit status, negative for the signal that ended it."""
    process = os.fork()
    if process:
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    try:
        work()
        sys.stdout.flush()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def die_before_change(number: int, root: str, log: Path) -> None:
    """Kill this process just before its `number`-th change below `root`."""
    seen = 0

    def watch(event: str, details: tuple[Any, ...]) -> None:
        nonlocal seen
        if event == "open":
            changes = isinstance(details[2], int) and bool(details[2] & (os.O_WRONLY | os.O_RDWR))
        else:
            changes = event in ("os.rename", "os.link", "os.remove", "os.mkdir", "os.truncate")
        ends = details[:1] if event == "open" else details[:2]
        paths = [os.fspath(item) for item in ends if isinstance(item, (str, os.PathLike))]
        if not changes or not any(path.startswith(root) for path in paths):
            return
        if seen == number:
            handle = os.open(os.fspath(log), os.O_WRONLY | os.O_CREAT)
            os.write(handle, f"{event} {os.path.relpath(paths[-1], root)}".encode())
            os.kill(os.getpid(), signal.SIGKILL)
        seen += 1

    sys.addaudithook(watch)


def digests(lake: Lake) -> dict[str, str]:
    """Digest of every file that the first version names, and of its own."""
    first = version.load(lake, 1)
    names = [f"shards/{info.name}" for info in first.shards]
    names += [f"shards/{info.name.removesuffix('.tar')}.index.json" for info in first.shards]
    names += [entry["path"] for entry in first.manifest.values()] + [first.text["empty"]["path"], "versions/1.json"]
    return {name: hashlib.sha256((lake.root / name).read_bytes()).hexdigest() for name in names}


def recover(root: Path, before: dict[str, str], expected: list[str], report: Path) -> None:
    """What must hold after any crash: the first version is untouched, and the second can be published."""
    lake = Lake.open(root)
    assert digests(lake) == before
    first = version.load(lake, 1)
    assert arrays.count_rows(lake, first.snapshot, first.group) == len(FIRST)
    newest = version.latest(lake)
    assert newest is not None
    report.write_text(str(newest.number))
    if newest.number == 1:
        assert verification.verify(lake, first) == []
        newest = sample_lake.publish_clips(lake, SECOND)
    assert newest.number == 2
    assert [info.sha256 for info in newest.shards] == expected
    assert verification.verify(lake, newest) == []
    assert arrays.count_rows(lake, newest.snapshot, newest.group) == len(FIRST) + len(SECOND)
    assert digests(lake) == before
    assert orphans(lake) == []


def main(folder: Path) -> None:
    base, reference = folder / "base", folder / "reference"
    note, found, clock = folder / "note", folder / "found", folder / "clock"
    assert in_child(lambda: sample_lake.publish_clips(Lake.create(base), FIRST)) == 0
    shutil.copytree(base, reference)

    def publish_reference() -> None:
        append = arrays.append_clips

        def timed(*given: Any, **named: Any) -> Any:
            start = time.perf_counter()
            try:
                return append(*given, **named)
            finally:
                clock.write_text(str(time.perf_counter() - start))

        arrays.append_clips = timed
        made = sample_lake.publish_clips(Lake.open(reference), SECOND)
        found.write_text(json.dumps([info.sha256 for info in made.shards]))

    assert in_child(publish_reference) == 0
    expected, seconds = json.loads(found.read_text()), float(clock.read_text())
    before = digests(Lake.open(base))
    report = []

    def trial(name: str, work: Callable[[Path], Any]) -> bool:
        root = folder / name
        shutil.copytree(base, root)
        note.unlink(missing_ok=True)
        status = in_child(lambda: work(root))
        killed = status == -signal.SIGKILL
        assert killed or status == 0, f"trial {name} failed by itself"
        assert in_child(lambda: recover(root, before, expected, found)) == 0, f"no recovery from {note.read_text()}"
        step = note.read_text() if note.exists() else ("by the clock" if killed else "")
        report.append({"trial": name, "killed": killed, "step": step, "newest": int(found.read_text())})
        shutil.rmtree(root)
        return killed

    def killed_at(number: int) -> Callable[[Path], Any]:
        def work(root: Path) -> None:
            die_before_change(number, str(root), note)
            sample_lake.publish_clips(Lake.open(root), SECOND)

        return work

    def killed_after(delay: float) -> Callable[[Path], Any]:
        def work(root: Path) -> None:
            append = arrays.append_clips

            def hurried(*given: Any, **named: Any) -> Any:
                threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL)).start()
                result = append(*given, **named)
                time.sleep(delay)
                return result

            arrays.append_clips = hurried
            sample_lake.publish_clips(Lake.open(root), SECOND)

        return work

    number = 0
    while trial(f"change-{number}", killed_at(number)):
        number += 1
    for i in range(CLOCK_TRIALS):
        trial(f"clock-{i}", killed_after(seconds * (i + 1) / (CLOCK_TRIALS + 1)))
    print(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
