"""A program as several processes on this machine, as `vlfm train --processes N` starts them.

torchrun ends with status 1 when it is stopped, whatever its processes made of it; this launcher ends as they did.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

import torch
import torch.distributed as dist

from model.ffmpeg import killed_by
from model.stop import STOPPED, StopSignal, signals_held
from model.training.processes import LAUNCHER

GRACE = 5.0
"""Seconds that the others have to end by themselves when one process has failed."""


def launch(command: Sequence[str], count: int) -> int:
    """Run `command` as `count` processes that find each other in torch.distributed's environment variables.

    SIGTERM and Ctrl-C are passed on once, as SIGTERM; a later Ctrl-C kills the processes. None of them outlives this
    one.

    Returns:
        0 where all processes finished, STOPPED where they stopped when asked to, else the status of the first that
        failed (128 and the signal's number where a signal ended it).
    """
    with StopSignal() as stop:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
        threads = max(1, torch.get_num_threads() // count)
        shared = {
            "OMP_NUM_THREADS": str(threads),
            **os.environ,
            "WORLD_SIZE": str(count),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",  # the store is here, so that its port needs no guess
            LAUNCHER: str(os.getpid()),
        }
        ranks: list[subprocess.Popen[bytes]] = []
        try:
            with signals_held():
                for rank in range(count):
                    ranks.append(subprocess.Popen(command, env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}))
            status = _status(ranks, stop)
        finally:
            for process in ranks:
                process.kill()
                process.wait()
        if (name := killed_by(status)) is not None:  # last, below what the others say of a connection that broke
            reason = " (out of memory?)" if name == "SIGKILL" else ""
            last = "run it again: it goes on from its newest checkpoint"
            print(f"error: {name} ended one of the {count} processes{reason}; {last}", file=sys.stderr)
        return status


def _status(ranks: Sequence[subprocess.Popen[bytes]], stop: StopSignal) -> int:
    """Wait for the processes, and say how they ended."""
    told, failed, until = False, 0, float("inf")
    while time.monotonic() < until:
        if stop.seen and not told:
            told = True
            for process in ranks:
                process.terminate()
        found = [process.poll() for process in ranks]
        # One that SIGTERM ended had done its work: until then it remembers signals, and before that they wait.
        harmless = (None, 0, STOPPED, -signal.SIGTERM) if told else (None, 0, STOPPED)
        bad = [status for status in found if status not in harmless]
        if bad and not failed:
            failed, until = int(bad[0] or 1), time.monotonic() + GRACE
        if None not in found:
            break
        time.sleep(0.05)
    if failed:
        return failed if failed > 0 else 128 - failed
    return STOPPED if any(found) else 0
