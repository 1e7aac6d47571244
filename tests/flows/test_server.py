"""Processes that libraries start for us end when we do, are given time, and never write to our standard output."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from model.ffmpeg import find_ffmpeg

ROOT = Path(__file__).parents[2]
SERVER = """
import time
from flows.server import start_server
from prefect.server.api.server import SubprocessASGIServer
start_server()
server = SubprocessASGIServer()
server.start()
print("up", server.server_process.pid, flush=True)
time.sleep(600)
"""
RAY = """
import time
from pipeline.runner import Runner
with Runner() as runner:
    runner.start()
    print("up", flush=True)
    time.sleep(600)
"""
DYING = """
import json, os, signal, subprocess, sys
import ray
from flows.progress import stdout_kept_clean
from pipeline.runner import Runner
from pipeline.items import Resources

class Dying:
    resources = Resources()
    def setup(self): print("a worker prints")
    def process(self, task_id, items): os.kill(os.getpid(), signal.SIGKILL)
    def teardown(self): pass

lost = []
with stdout_kept_clean():
    print("a library prints")
    os.write(1, b"C code prints\\n")
    subprocess.run(["echo", "a program prints"])
    with Runner(attempts=1) as runner:
        runner.run(Dying(), [("a", [1])], str, lambda task, result: None, lambda task, *why: lost.append(why[0]))
print(json.dumps(lost))
"""


def environment(home: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "RAY_"))}
    return {**kept, "PYTHONPATH": str(ROOT), "PREFECT_HOME": str(home), "PREFECT_SERVER_ANALYTICS_ENABLED": "false"}


def family(root: int) -> set[int]:
    """The processes that this one and its children started."""
    listed = subprocess.run(["ps", "axo", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    parents = {int(pid): int(parent) for pid, parent in (line.split() for line in listed.splitlines())}
    found = {root}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {root}


def runs(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize("program", [SERVER, RAY], ids=["prefect", "ray"])
def test_nothing_stays_after_kill_9(program: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, env=environment(tmp_path), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("up")
        # Ray's two agents wait a minute for the dead session before they end too.
        children = {pid for pid in family(process.pid) if b"Agent" not in Path(f"/proc/{pid}/cmdline").read_bytes()}
        assert children
        process.send_signal(signal.SIGKILL)
    until = time.monotonic() + 60
    while any(map(runs, children)) and time.monotonic() < until:
        time.sleep(0.2)
    left = {pid for pid in children if runs(pid)}
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left


def test_a_server_that_is_not_up_in_time_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "films").mkdir()
    (tmp_path / "films" / "a.mp4").write_text("no film")
    (tmp_path / "films" / "a.txt").write_text("a caption")
    program = "import sys; from flows.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", program, "ingest", "films", "--lake", "lake", "--json"]
    variables = {**environment(tmp_path), "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "1"}
    run = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=150)
    assert run.returncode == 1
    line = (
        "Prefect's temporary server was not up within 1 s; run the command again when the machine is less busy, set "
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS to more, or PREFECT_API_URL to a server that runs"
    )
    assert run.stderr == f"error: {line}\n"
    assert json.loads(run.stdout)["error"] == line


def test_nothing_but_the_result_is_on_standard_output(tmp_path: Path) -> None:
    command = [sys.executable, "-c", DYING]
    run = subprocess.run(command, env=environment(tmp_path), capture_output=True, text=True, timeout=150)
    assert run.stdout == '["worker_died"]\n', run.stderr
    for words in ("a library prints", "C code prints", "a program prints"):
        assert words in run.stderr


def test_sigterm_ends_an_ingest_in_one_line(tmp_path: Path) -> None:
    """Ray answers it by aborting the process, and hides what a handler raises while it waits."""
    films = tmp_path / "films"
    films.mkdir()
    source = ["-f", "lavfi", "-i", "testsrc=size=64x64:rate=8:duration=120", "-c:v", "mpeg4"]
    subprocess.run([find_ffmpeg().path, *source, str(films / "a.mp4")], check=True, capture_output=True)
    (films / "a.txt").write_text("a clock")
    program = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\nfrom flows.cli import main\n"
    )
    command = [sys.executable, "-c", f"{program}sys.exit(main())", "ingest", "films", "--lake", "lake"]
    command += ["--recipe", "linear"]
    with subprocess.Popen(command, cwd=tmp_path, env=environment(tmp_path), stderr=subprocess.PIPE, text=True) as run:
        assert run.stderr is not None
        lines, shown = iter(run.stderr.readline, ""), []
        for line in lines:
            shown.append(line)
            if "clips" in line:
                break
        run.send_signal(signal.SIGTERM)
        shown += list(lines)
    assert run.returncode == 143, shown
    assert "interrupted; everything finished is kept" in shown[-1]
    assert not any("Traceback" in line or "***" in line for line in shown)
