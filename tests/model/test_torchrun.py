"""torchrun's exit status: 75 is a stopped training, everything else a failure. Real torchruns of small programs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from model.torchrun import SHUTDOWN, main

ROOT = Path(__file__).parents[2]
# `$PPID` and not `$$`, of which torchrun makes `$`.
ENDS = {
    "finished": ("exit 0", 0),
    "stopped": ("exit 75", 75),
    "failed": ("exit 3", 3),
    "killed": ("sh -c 'kill -9 $PPID'; true", 137),
}


@pytest.mark.parametrize("end", ENDS)
def test_the_status_is_that_of_the_processes(end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", os.environ.copy())  # torchrun leaves some of its own
    program, status = ENDS[end]
    assert main(["--nproc-per-node=1", "--no-python", "sh", "-c", program]) == status


def test_a_training_has_its_time_to_stop(tmp_path: Path) -> None:
    """The child stops after two seconds; with torchrun's own time cut to one it is killed before."""
    stop = f"sleep 2; touch {tmp_path}/$NAME; exit 75"
    program = f'trap "{stop}" TERM; touch {tmp_path}/begun-$NAME; while true; do sleep 0.1; done'
    command = [sys.executable, "-m", "model.torchrun", "--nproc-per-node=1", "--no-python", "sh", "-c", program]
    begun = {}
    for name, seconds in {"whole": None, "cut": "1"}.items():
        own = {} if seconds is None else {SHUTDOWN: seconds}
        begun[name] = subprocess.Popen(
            command, cwd=ROOT, text=True, stderr=subprocess.PIPE, env={**os.environ, "NAME": name, **own}
        )
    for name, torchrun in begun.items():
        until = time.monotonic() + 120
        while not (tmp_path / f"begun-{name}").exists() and time.monotonic() < until:
            time.sleep(0.05)
        torchrun.send_signal(signal.SIGTERM)
    told = {name: torchrun.communicate(timeout=120)[1] for name, torchrun in begun.items()}
    assert begun["whole"].returncode == 75, told
    assert (tmp_path / "whole").exists()
    assert not (tmp_path / "cut").exists()
