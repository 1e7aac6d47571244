"""The other end of `pipeline.runner`: a worker in a Ray process of its own, and what it sends back."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from pipeline.items import Resources
from pipeline.stage import one_line
from storage.layout import DiskFull

WARNINGS = 100  # most lines that a worker keeps until its next answer


class Worker(Protocol):
    """What runs in an actor."""

    @property
    def resources(self) -> Resources:
        """What it occupies."""
        ...

    def setup(self) -> None:
        """Called once in the actor's process."""

    def process(self, task_id: str, items: Sequence[Any]) -> Any:
        """Does a task; may be called again for the same one."""

    def teardown(self) -> None:
        """Called once in the actor's process when there is no more work; not where the process was lost."""


@dataclass(frozen=True)
class Answer:
    """What an actor sends back. Errors are values: exceptions do not always survive the journey."""

    warnings: tuple[str, ...]
    """Lines that were warned of or logged as warnings since the last answer."""
    result: Any = None
    problem: str = ""
    """What went wrong, in a line."""
    full: tuple[str, int] | None = None
    """The file that the disk has no room for, and the bytes left."""
    node: str = ""
    """The id of the node it runs on; in the first answer only."""


class Heard(logging.Handler):
    """Keeps the different lines that are logged as warnings or worse, and Python's warnings."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: dict[str, None] = {}

    def emit(self, record: logging.LogRecord) -> None:
        if not record.name.startswith("ray"):  # Ray tells the driver itself
            self.add(record.getMessage())

    def showwarning(self, message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
        """Takes the place of warnings.showwarning."""
        self.add(f"{category.__name__}: {message}")

    def add(self, text: str) -> None:
        """Keeps a text as one line."""
        if len(self.lines) < WARNINGS:
            self.lines[" ".join(text.split())] = None

    def take(self) -> tuple[str, ...]:
        """The lines so far, which are forgotten."""
        lines, self.lines = tuple(self.lines), {}
        return lines


class Actor:
    """A worker in its own process."""

    def __init__(self, worker: Worker, cpus: float) -> None:
        self.worker = worker
        # Read when torch is imported, which is later: more threads than promised cores slow all workers down.
        for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
            os.environ[variable] = str(max(1, int(cpus)))
        self.problem: str | None = None
        # The output of a worker goes to files of Ray's that nobody reads.
        self.heard = Heard()
        logging.getLogger().addHandler(self.heard)
        warnings.showwarning = self.heard.showwarning

    def ready(self) -> Answer:
        """Sets the worker up, once."""
        if self.problem is None:
            try:
                self.worker.setup()
                self.problem = ""
            except Exception as error:
                self.problem = " ".join(str(error).split()) or type(error).__name__
        import ray

        return Answer(self.heard.take(), problem=self.problem, node=ray.get_runtime_context().get_node_id())

    def process(self, task_id: str, items: Sequence[Any]) -> Answer:
        """Does a task."""
        try:
            result = self.worker.process(task_id, items)
        except DiskFull as error:
            return Answer(self.heard.take(), full=(str(error.filename), error.free))
        except Exception as error:
            return Answer(self.heard.take(), problem=one_line(error))
        return Answer(self.heard.take(), result)

    def teardown(self) -> Answer:
        """Frees what the worker holds."""
        try:
            self.worker.teardown()
        except Exception as error:
            return Answer(self.heard.take(), problem=one_line(error))
        return Answer(self.heard.take())
