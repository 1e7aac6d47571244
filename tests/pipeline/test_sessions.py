"""After a kill nothing of a Ray session stays beyond the next run: no agent, no folder. One test has a real Ray."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from pipeline.sessions import SessionFolder, end_dead_sessions, sessions_folder

ROOT = Path(__file__).parents[2]
AGENT = "import sys, time; time.sleep(300)"


def agent(folder: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", AGENT, f"--session-dir={folder}/session_1"])


def test_what_a_dead_run_left_is_ended_and_removed(tmp_path: Path) -> None:
    alive = SessionFolder(tmp_path)
    dead = tmp_path / "dead"
    (dead / "session_1" / "logs").mkdir(parents=True)
    (dead / "lock").touch()
    unborn = tmp_path / "unborn"  # killed before it had its lock
    unborn.mkdir()
    theirs, ours = agent(dead), agent(alive.path)
    try:
        assert end_dead_sessions(tmp_path) == [dead, unborn]
        assert theirs.wait(10) == -signal.SIGKILL
        assert sorted(tmp_path.iterdir()) == [alive.path]
        assert ours.poll() is None
        alive.remove()
        assert ours.wait(10) == -signal.SIGKILL
        assert list(tmp_path.iterdir()) == []
        assert end_dead_sessions(tmp_path) == []
    finally:
        for process in (theirs, ours):
            process.kill()
            process.wait()


RUN = """
import sys, time
from pipeline.runner import Runner
with Runner() as runner:
    runner.start()
    print("up", flush=True)
    time.sleep(300) if sys.argv[1] == "wait" else None
"""


def named(folder: Path) -> list[str]:
    """Command lines of live processes that name the folder."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if f"{folder}/" in line and entry.name != str(os.getpid()):
            found.append(line)
    return found


def test_a_killed_driver_s_ray_is_gone_after_the_next_run(tmp_path: Path) -> None:
    def begin(how: str) -> subprocess.Popen[str]:
        # A folder of temporary files of its own: other runs on this machine must not do the work of the next one.
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(short)}
        return subprocess.Popen(
            [sys.executable, "-c", RUN, how], env=environment, text=True, stdout=subprocess.PIPE, start_new_session=True
        )

    short = Path(os.sep, "tmp", f"v{os.getpid()}")
    short.mkdir()
    folder = short / sessions_folder().name
    try:
        first = begin("wait")
        assert first.stdout is not None
        assert first.stdout.readline() == "up\n"
        session = next(folder.iterdir())
        assert named(session), "Ray's processes name their session's folder"
        first.kill()
        first.communicate()
        second = begin("end")
        assert second.communicate(timeout=120)[0] == "up\n"
        assert list(folder.iterdir()) == []
        deadline = time.monotonic() + 10
        while named(folder) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert named(folder) == []
    finally:
        subprocess.run(["rm", "-rf", str(short)], check=True)
