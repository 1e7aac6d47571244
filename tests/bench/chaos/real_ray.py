"""Kills of real ingests: films of ffmpeg, blocks made by Ray's actors; then the same ingest once more.

    driver    SIGKILL before a change of the lake; Ray's processes lose their driver
    group     the same for the driver's process group
    worker    SIGKILL of an actor that makes blocks; the run goes on

After the second run the lake is as that of a run that nothing stopped, and no staged block, temporary file, process or
folder of Ray is left of the first.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from storage.layout import Lake
from storage.staging import staged_blocks
from tests.bench.chaos.folder import Folder
from tests.bench.chaos.operations import settled
from tests.bench.chaos.trials import in_child
from tests.pipeline.conftest import make_scene

FAULTS = ("driver", "worker", "group", "driver")
NONE = "none"


def ray_trials(folder: Path, count: int, seed: int) -> list[dict[str, Any]]:
    """`count` kills, their steps spread over the run."""
    chance = random.Random(seed)
    films = folder / "films"
    for number, seconds in enumerate((3, 2, 4)):
        make_scene(films / f"{number}.mp4", rate="10", seconds=seconds)
        (films / f"{number}.txt").write_text(f"picture {number}")
    # Short, for Ray's sockets, and of our own: other runs on this machine must not clean up for the second one.
    with tempfile.TemporaryDirectory(prefix="v", dir=Path(os.sep, "tmp")) as short:
        environment = {**os.environ, "TMPDIR": short}
        straight = folder / "straight"
        steps = json.loads(_ingest(films, straight, NONE, 0, environment)[1])
        expected, rows = _state(straight), []
        for number in range(count):
            fault = FAULTS[number % len(FAULTS)]
            # A block and its worker first, then the commit: its steps are most of them.
            step = chance.randrange(len(steps) * number // count, len(steps) * (number + 1) // count)
            lake = folder / f"lake-{number}"
            status, said = _ingest(films, lake, fault, step, environment)
            again, _ = _ingest(films, lake, NONE, 0, environment)
            left = _left(lake, Path(short))
            # A run goes on when a worker dies.
            survived = fault != "worker" or status == 0
            equal = survived and again == 0 and not left and _state(lake) == expected
            row = {
                "place": "ray", "operation": "ingest", "fault": fault, "number": step, "step": said, "newest": 1,
                "status": status, "equal": equal, "left": left,
            }  # fmt: skip
            print(row, file=sys.stderr, flush=True)
            rows.append(row)
            shutil.rmtree(lake)
    return rows


def _ingest(films: Path, lake: Path, fault: str, step: int, environment: dict[str, str]) -> tuple[int, str]:
    """Exit status and what was said of one ingest in a process of its own."""
    command = [sys.executable, "-m", "tests.bench.chaos.real_ray", str(films), str(lake), fault, str(step)]
    with subprocess.Popen(
        command, env=environment, text=True, stdout=subprocess.PIPE, start_new_session=True
    ) as process:
        try:
            output = process.communicate(timeout=1200)[0]
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output = f"did not end in 20 minutes {process.communicate()[0]}"
    note = lake.parent / "note"
    said = note.read_text() if note.exists() else output.strip()
    note.unlink(missing_ok=True)
    return process.returncode, said


def _state(lake: Path) -> dict[str, Any]:
    told = lake.parent / "told"
    in_child(lambda: told.write_text(json.dumps(settled(Lake.open(lake)))), must=True)
    found: dict[str, Any] = json.loads(told.read_text())
    return found


def _left(lake: Path, short: Path) -> list[str]:
    """What the killed run left beyond the second one."""
    opened = Lake.open(lake)
    deadline = time.monotonic() + 15
    while (alive := list(_processes(str(short)))) and time.monotonic() < deadline:
        time.sleep(0.2)
    sessions = [str(path) for path in short.glob("vlfm-ray-*/*")]
    return [*staged_blocks(opened), *opened.store.clean(delete=False), *sessions, *map(str, alive)]


def _processes(text: str) -> Iterator[int]:
    """Processes whose command line has a text."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and entry.name != str(os.getpid()) and text in _command_line(entry.name):
            yield int(entry.name)


def _command_line(process: str) -> str:
    with contextlib.suppress(OSError):
        return Path("/proc", process, "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return ""


def _actors(session: str) -> list[int]:
    """Ray's actors whose parent, the raylet, has this text on its command line.

    Its agents are called `ray::DashboardAgent` and the like; without them the node ends.
    """
    found = []
    for process in _processes("ray::Actor"):
        with contextlib.suppress(OSError):
            parent = Path("/proc", str(process), "stat").read_text().rpartition(")")[2].split()[1]
            if session in _command_line(parent):
                found.append(process)
    return found


def _kill_a_worker(lake: Path, note: Path, step: int) -> None:
    """End an actor while it makes blocks: soon after it has been started, the later the larger `step`."""
    while not (found := _actors(os.environ["TMPDIR"])):
        time.sleep(0.02)
    time.sleep(0.05 * step)
    with contextlib.suppress(ProcessLookupError):
        os.kill(found[0], signal.SIGKILL)
        note.write_text(f"worker with {len(staged_blocks(Lake.open(lake)))} blocks staged")


def main(films: str, lake: str, fault: str, step: str) -> None:
    """One ingest, stopped by a fault; without one it says what it changed."""
    from pipeline.ingest import ingest
    from tests.pipeline.ingest.in_process import RECIPE

    place = Folder(Path(lake).parent)
    changes: list[str] = []
    if fault == NONE:
        place.watch(lake, changes)
    elif fault == "worker":
        threading.Thread(
            target=_kill_a_worker, args=(Path(lake), place.folder / "note", int(step)), daemon=True
        ).start()
    else:
        place.arm(lake, fault, int(step))
    report = ingest(films, lake, recipe=dataclasses.replace(RECIPE, block_clips=2))
    assert report.exit_status == 0, report.lines()
    print(json.dumps(changes) if fault == NONE else "")


if __name__ == "__main__":
    main(*sys.argv[1:])
