"""Those that wait for a lease have their turns in order of arrival; real processes wait, and some are killed."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from storage.local import LocalStore

ROOT = Path(__file__).parents[2]
WAIT = """
import sys
from pathlib import Path
from storage.local import LocalStore
with LocalStore(Path(sys.argv[1])).lease("writing", wait=True):
    with open(Path(sys.argv[1]) / "order", "a") as file:
        file.write(sys.argv[2])
"""


def wait(folder: Path, name: str) -> subprocess.Popen[bytes]:
    """A process that waits for the lease and writes down its name; it is in line when this returns."""
    there = len(list(folder.glob(".writing.*.turn")))
    process = subprocess.Popen([sys.executable, "-c", WAIT, str(folder), name], cwd=ROOT)
    until = time.monotonic() + 60
    while len(list(folder.glob(".writing.*.turn"))) == there and time.monotonic() < until:
        time.sleep(0.01)
    return process


def test_who_came_first_goes_first_and_the_dead_hold_nobody_up(tmp_path: Path) -> None:
    with LocalStore(tmp_path).lease("writing"):
        waiting = [wait(tmp_path, name) for name in "abcde"]
        for process in (waiting[0], waiting[2]):
            process.kill()
            process.wait()
        time.sleep(0.2)
        assert not (tmp_path / "order").exists()
    assert [process.wait(timeout=60) for process in waiting] == [-9, 0, -9, 0, 0]
    assert (tmp_path / "order").read_text() == "bde"
    assert [path.name for path in tmp_path.iterdir() if path.suffix in (".turn", ".making")] == []
    assert LocalStore(tmp_path).list_keys() == ["order"], "tickets are no keys"
