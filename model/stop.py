"""A request to stop: SIGTERM and Ctrl-C are remembered until a step is whole, and the exit status says "resume me"."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator
from multiprocessing import resource_tracker
from types import FrameType
from typing import Any

STOPPED = 75
"""Exit status of a run that was asked to stop and left a checkpoint (EX_TEMPFAIL): the same command goes on."""
SIGNALS = (signal.SIGTERM, signal.SIGINT)
"""What asks a run to stop."""
REPEATS_WITHIN = 3.0
"""Seconds after the first signal within which Ctrl-C is the same request, delivered again."""


class Stopped(Exception):
    """A run was asked to stop before its last step, and did, with a checkpoint; the same call goes on from there."""

    def __init__(self, step: int, what: str = "") -> None:
        """step: the last step that was done, 0 before the first; what: the part of the run, if it has several."""
        where = f"at step {step}{what} with a checkpoint" if step else f"before the first step{what}"
        super().__init__(f"stopped {where}; the same command goes on")


class StopSignal:
    """Remembers SIGTERM and Ctrl-C within the block, so that a step in flight ends whole.

    A signal is often delivered more than once: to the process and to its group, by a launcher, by a pod that shuts
    down. So SIGTERM counts once, and so does Ctrl-C; only a Ctrl-C more than REPEATS_WITHIN seconds later, which is an
    impatient person, raises KeyboardInterrupt at once. After a signal this stays so beyond the block, because the
    process is on its way out. Outside the main thread nothing is remembered.
    """

    def __init__(self) -> None:
        self.seen = False
        """Whether a signal came."""
        self._first = 0.0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignal:
        try:
            self._before = {each: signal.signal(each, self._note) for each in SIGNALS}
        except ValueError:  # not in the main thread, as inside a Prefect task
            return self
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        return self

    def __exit__(self, *exception: object) -> None:
        if not self.seen:
            self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.seen:
            self.seen, self._first = True, now
        elif number == signal.SIGINT and now - self._first > REPEATS_WITHIN:
            self._restore()
            raise KeyboardInterrupt

    def _restore(self) -> None:
        for each, handler in self._before.items():
            signal.signal(each, handler)
        self._before = {}


def hold_signals() -> None:
    """Keep SIGTERM and Ctrl-C waiting until a StopSignal takes them, as while a program still imports its libraries."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


@contextlib.contextmanager
def signals_held() -> Iterator[None]:
    """Processes that are started within the block begin with SIGTERM and Ctrl-C held; here they come afterwards."""
    resource_tracker.ensure_running()  # its own start, within multiprocessing's first spawn, would let go of them
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_with_parent(parent: int | None = None) -> None:
    """Have the kernel kill this process when its parent ends, however it does; on Linux only.

    parent: the parent's process id, to notice one that has ended already.
    """
    if sys.platform != "linux":
        return
    set_parent_death_signal = 1  # PR_SET_PDEATHSIG of <sys/prctl.h>
    ctypes.CDLL(None).prctl(set_parent_death_signal, int(signal.SIGKILL))
    if parent is not None and os.getppid() != parent:
        os._exit(1)


def end_with_trainer(worker: int = 0) -> None:
    """`end_with_parent` for a worker of a DataLoader, which takes the worker's number."""
    parent = multiprocessing.parent_process()
    end_with_parent(None if parent is None else parent.pid)
