"""Work on Ray: plain actors and a bounded wait, so that one bad item costs itself and nothing else.

A task is a group of items. When its worker dies or raises, a group is taken apart and each item is tried alone; an item
that fails alone as often as allowed is given up and named. So innocent items always finish (Ray Data loses a block, or
stalls for ever; stack.md).
"""

from __future__ import annotations

import logging
import os
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol

from pipeline.cluster import RaySession
from pipeline.cluster import RunnerError as RunnerError
from pipeline.items import Resources
from pipeline.stage import one_line
from storage.layout import DiskFull

log = logging.getLogger(__name__)

START_SECONDS = 600.0  # longest time for a worker to start and to load its codec
END_SECONDS = 30.0  # longest time for all workers together to free what they hold
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
class Task:
    """Items that are done in one call."""

    task_id: str
    items: tuple[Any, ...]
    parent: str
    """The task as it was given, where this one is a part of it."""


@dataclass(frozen=True)
class WorkerPlan:
    """How many actors, and what each is promised."""

    count: int
    cpus: float
    gpus: float


def plan_workers(cluster: Mapping[str, float], wanted: Resources, tasks: int) -> WorkerPlan:
    """Actors for `tasks` tasks from what the cluster has (Ray's names, `CPU` and `GPU`).

    A GPU is asked for only where there is one, so nothing ever waits for a GPU that will not come.

    >>> plan_workers({"CPU": 2.0}, Resources(cpus=1, gpus=1), tasks=10)
    WorkerPlan(count=2, cpus=1.0, gpus=0.0)
    """
    cpus, gpus = cluster.get("CPU", 0.0), cluster.get("GPU", 0.0)
    if wanted.gpus > 0 and gpus >= wanted.gpus:
        count = max(1, min(tasks, int(gpus // wanted.gpus)))
        return WorkerPlan(count, float(max(0, min(wanted.cpus, cpus // count))), float(wanted.gpus))
    count = max(1, min(tasks, int(cpus // wanted.cpus) if wanted.cpus else tasks))
    return WorkerPlan(count, float(min(wanted.cpus, cpus)), 0.0)


class Runner:
    """A Ray session that starts at the first task and ends with the `with` block, unless it was there before.

    Args:
        address: of a cluster; None starts one on this machine, or uses the one already started in this process.
        attempts: how often an item may be tried, its group's failures counted.
        task_seconds: longest time for one task; a worker that takes longer is killed, which counts as its death.
    """

    def __init__(self, address: str | None = None, attempts: int = 3, task_seconds: float = 3600.0) -> None:
        self.attempts, self.task_seconds = attempts, task_seconds
        self._session = RaySession(address)
        self._warned: set[str] = set()

    def __enter__(self) -> Runner:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._session.close()

    def start(self) -> None:
        """Starts or joins Ray, quietly. Raises RunnerError as RaySession.open does."""
        self._session.open()

    def run(
        self,
        worker: Worker,
        tasks: Sequence[tuple[str, Sequence[Any]]],
        key: Callable[[Any], str],
        done: Callable[[Task, Any], None],
        given_up: Callable[[Task, str, str], None],
    ) -> None:
        """Does all tasks; returns when each item was done or given up.

        Args:
            worker: copied into every actor.
            tasks: (task_id, items).
            key: an item's name; a part's id is its task's and this, joined by a dash.
            done: called with each finished task or part, and its result.
            given_up: called with a part of one item, a reason (worker_died, worker_failed) and a line.

        Raises:
            DiskFull: a worker could not write; tasks already done stay done.
            RunnerError: workers cannot be set up.
        """
        if not tasks:
            return
        self.start()
        import ray

        cluster: Mapping[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
        plan = plan_workers(cluster, worker.resources, len(tasks))
        actor_class = ray.remote(_Actor).options(
            num_cpus=plan.cpus, num_gpus=plan.gpus, max_restarts=0, max_task_retries=0
        )
        waiting = deque(Task(task_id, tuple(items), task_id) for task_id, items in tasks)
        tried: dict[str, int] = {}
        actors: list[Any] = []
        running: dict[Any, tuple[Any, Task | None, float]] = {}

        def greet(actor: Any) -> None:
            # Only a worker that has answered gets a task, so a restart cannot cost an innocent item an attempt.
            running[actor.ready.remote()] = (actor, None, time.monotonic() + START_SECONDS)

        def start_actor() -> None:
            actor = actor_class.remote(worker, plan.cpus)
            actors.append(actor)
            greet(actor)

        def failed(task: Task, reason: str, detail: str) -> None:
            for item in task.items:
                tried[key(item)] = tried.get(key(item), 0) + 1
            if len(task.items) > 1:
                parts = [Task(f"{task.parent}-{key(item)}", (item,), task.parent) for item in task.items]
                waiting.extend(parts)
            elif tried[key(task.items[0])] < self.attempts:
                waiting.append(task)
            else:
                given_up(task, reason, detail)

        try:
            for _ in range(plan.count):
                start_actor()
            deaths_unanswered = 0
            while waiting or any(task is not None for _, task, _ in running.values()):
                try:
                    ready, _ = ray.wait(list(running), num_returns=1, timeout=1.0)
                except SystemError as error:  # so Ray tells what a signal's handler raised while it waited
                    raise error.__cause__ or error from None
                for reference in ready:
                    actor, task, _ = running.pop(reference)
                    try:
                        answer: _Answer = ray.get(reference)
                    except ray.exceptions.RayActorError as error:
                        actors.remove(actor)
                        ray.kill(actor)
                        if task is None:
                            deaths_unanswered += 1
                            if deaths_unanswered > 3 * plan.count:
                                raise RunnerError(f"workers die before they start: {one_line(error)}") from error
                        else:
                            detail = "the worker process died on this clip each time; remove or re-encode its film"
                            failed(task, "worker_died", detail)
                        start_actor()
                        continue
                    except ray.exceptions.RayTaskError as error:  # the answer itself cannot travel
                        answer = _Answer((), problem=one_line(error.cause or error))
                    self._warn(answer.warnings)
                    if task is None:
                        deaths_unanswered = 0
                        if answer.problem:
                            raise RunnerError(answer.problem)
                    elif answer.full is not None:
                        raise DiskFull(*answer.full)
                    elif answer.problem:
                        failed(task, "worker_failed", answer.problem)
                    else:
                        done(task, answer.result)
                    if waiting:
                        following = waiting.popleft()
                        call = actor.process.remote(following.task_id, following.items)
                        running[call] = (actor, following, time.monotonic() + self.task_seconds)
                for actor, _, deadline in list(running.values()):
                    if time.monotonic() > deadline:
                        ray.kill(actor)
                if waiting:
                    busy = {id(actor) for actor, _, _ in running.values()}
                    for actor in actors:
                        if id(actor) not in busy:
                            greet(actor)
            starting = {id(actor) for actor, _, _ in running.values()}
            self._end([actor for actor in actors if id(actor) not in starting])
        finally:
            for actor in actors:
                ray.kill(actor)

    def _end(self, actors: Sequence[Any]) -> None:
        """Lets idle actors free what they hold. What goes wrong then is a warning: the work is done."""
        import ray

        calls = [actor.teardown.remote() for actor in actors]
        ready, late = ray.wait(calls, num_returns=len(calls), timeout=END_SECONDS) if calls else ([], [])
        for call in ready:
            try:
                answer: _Answer = ray.get(call)
            except ray.exceptions.RayError as error:
                self._warn([f"a worker died while it ended: {one_line(error)}"])
            else:
                ended = f"a worker did not end cleanly: {answer.problem}"
                self._warn([*answer.warnings, *([ended] if answer.problem else [])])
        if late:
            self._warn([f"{len(late)} workers did not end within {END_SECONDS:g} s and were killed"])

    def _warn(self, lines: Iterable[str]) -> None:
        """Logs each line once in the life of this runner, however many workers say it how often."""
        for line in lines:
            if line not in self._warned:
                self._warned.add(line)
                log.warning("%s", line)


@dataclass(frozen=True)
class _Answer:
    """What an actor sends back. Errors are values: exceptions do not always survive the journey."""

    warnings: tuple[str, ...]
    """Lines that were warned of or logged as warnings since the last answer."""
    result: Any = None
    problem: str = ""
    """What went wrong, in a line."""
    full: tuple[str, int] | None = None
    """The file that the disk has no room for, and the bytes left."""


class _Heard(logging.Handler):
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


class _Actor:
    """A worker in its own process."""

    def __init__(self, worker: Worker, cpus: float) -> None:
        self.worker = worker
        # Read when torch is imported, which is later: more threads than promised cores slow all workers down.
        for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
            os.environ[variable] = str(max(1, int(cpus)))
        self.problem: str | None = None
        # The output of a worker goes to files of Ray's that nobody reads.
        self.heard = _Heard()
        logging.getLogger().addHandler(self.heard)
        warnings.showwarning = self.heard.showwarning

    def ready(self) -> _Answer:
        """Sets the worker up, once."""
        if self.problem is None:
            try:
                self.worker.setup()
                self.problem = ""
            except Exception as error:
                self.problem = " ".join(str(error).split()) or type(error).__name__
        return _Answer(self.heard.take(), problem=self.problem)

    def process(self, task_id: str, items: Sequence[Any]) -> _Answer:
        """Does a task."""
        try:
            result = self.worker.process(task_id, items)
        except DiskFull as error:
            return _Answer(self.heard.take(), full=(str(error.filename), error.free))
        except Exception as error:
            return _Answer(self.heard.take(), problem=one_line(error))
        return _Answer(self.heard.take(), result)

    def teardown(self) -> _Answer:
        """Frees what the worker holds."""
        try:
            self.worker.teardown()
        except Exception as error:
            return _Answer(self.heard.take(), problem=one_line(error))
        return _Answer(self.heard.take())
