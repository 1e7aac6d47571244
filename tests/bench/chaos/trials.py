"""Trials: an operation that a fault stops, the same once more in another process, and the comparison.

Each part is a forked process, so that a trial costs what it does and no import.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Imported before the forks.
import icechunk  # noqa: F401
import webdataset.writer  # noqa: F401
import zarr  # noqa: F401

from storage import version
from storage.errors import VlfmError
from storage.layout import Lake
from tests.bench.chaos.operations import OPERATIONS, make_base, settled

TOLD = 3
"""Exit status of a process that ended with an error in one line."""


@dataclass(frozen=True)
class Trial:
    """A fault at a step of an operation."""

    place: str
    """`folder` or `bucket`."""
    operation: str
    fault: str
    step: int
    """Which change, from 0; for `clock` a 16th of the commit's time."""


class Place(ABC):
    """Where trials are done: for each operation a lake before it, and what it is to be after it."""

    name = ""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.expected: dict[str, dict[str, Any]] = {}
        self.changes: dict[str, list[str]] = {}
        """The changes that each operation makes, as `faulted` says them."""
        self._count = 0

    @abstractmethod
    def address(self, name: str) -> str:
        """Where the lake of this name is."""

    @abstractmethod
    def copy(self, base: str, address: str) -> None:
        """A copy of a lake."""

    @abstractmethod
    def remove(self, address: str) -> None:
        """A lake that is not needed any more."""

    @abstractmethod
    def observed(self, address: str, operation: str) -> list[str]:
        """Do an operation: the changes that it makes."""

    @abstractmethod
    def suffer(self, address: str, trial: Trial) -> None:
        """Do an operation until the fault."""

    @abstractmethod
    def faulted(self) -> str:
        """The step at which the last trial's fault was; empty where it came to its end."""

    def cut_power(self, base: str, address: str, trial: Trial) -> None:  # noqa: B027
        """What the fault does to what a killed process left."""

    def again(self, address: str, trial: Trial) -> dict[str, Any]:
        """The operation once more, by a process that nothing stops: what the lake holds then."""
        OPERATIONS[trial.operation](Lake.open(address))
        return settled(Lake.open(address))

    def of(self, operation: str) -> str:
        """The lake before an operation; the first call makes it, and does the operation without a fault."""
        base = self.address(f"base-{operation}")
        if operation not in self.expected:
            whole = self.address(f"whole-{operation}")
            in_child(lambda: make_base(base, operation), must=True)

            def do() -> list[str]:
                self.copy(base, whole)
                return self.observed(whole, operation)

            self.changes[operation] = self._told(do)
            self.expected[operation] = self._told(lambda: settled(Lake.open(whole)))
            self.remove(whole)
        return base

    def run(self, trial: Trial) -> dict[str, Any]:
        """One trial: what was stopped where, and whether the second run ended as one that nothing stopped."""
        base = self.of(trial.operation)
        self._count += 1
        address = self.address(f"trial-{self._count}")

        def first() -> None:
            self.copy(base, address)
            self.suffer(address, trial)

        def second() -> dict[str, Any]:
            newest = max(version.list_versions(Lake.open(address)))
            if status == -signal.SIGKILL:
                self.cut_power(base, address, trial)
            return {"newest": newest, "state": self.again(address, trial)}

        status = in_child(first, group=True)
        step = self.faulted()
        try:
            found = self._told(second)
        except AssertionError as error:
            found = {"newest": 0, "state": str(error)}
        self.remove(address)
        expected = self.expected[trial.operation]
        row = {
            "place": trial.place, "operation": trial.operation, "fault": trial.fault, "number": trial.step,
            "step": step, "newest": found["newest"], "status": status,
            "equal": found["state"] == expected and status in (0, TOLD, -signal.SIGKILL),
        }  # fmt: skip
        if not row["equal"] and os.environ.get("CHAOS_SHOW"):
            print(json.dumps({**row, "found": found["state"], "expected": expected}), file=sys.stderr)
        return row

    def _told(self, work: Callable[[], Any]) -> Any:
        """The result of `work`, done in a forked process, by way of JSON."""
        told = self.folder / "told"
        in_child(lambda: told.write_text(json.dumps(work())), must=True)
        return json.loads(told.read_text())


def in_child(work: Callable[[], Any], group: bool = False, must: bool = False) -> int:
    """Do `work` in a forked process: its exit status, negative for the signal that ended it, 1 for an error.

    group: it gets a process group of its own. must: raises AssertionError where it does not end well.
    """
    sys.stdout.flush()
    process = os.fork()
    if process:
        status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        assert not must or status == 0, f"exit status {status}"
        return status
    try:
        if group:
            os.setsid()
        work()
        sys.stdout.flush()
        os._exit(0)
    except VlfmError as error:
        if must:
            print(error, file=sys.stderr, flush=True)
        os._exit(TOLD)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
