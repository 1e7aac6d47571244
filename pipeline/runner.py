"""Work on Ray: plain actors and a bounded wait, so that one bad item costs itself and nothing else.

A task is a group of items. When its worker dies or raises, a group is taken apart and each item is tried alone; an item
that fails alone as often as allowed is given up and named. So innocent items always finish (Ray Data loses a block, or
stalls for ever; stack.md).
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol

from pipeline.cluster import RaySession
from pipeline.cluster import RunnerError as RunnerError
from pipeline.stage import Resources, one_line
from storage.layout import DiskFull

START_SECONDS = 600.0  # longest time for a worker to start and to load its codec


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
        """Called when there is no more work."""


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

        def hire() -> None:
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
                hire()
            deaths_unanswered = 0
            while waiting or any(task is not None for _, task, _ in running.values()):
                try:
                    ready, _ = ray.wait(list(running), num_returns=1, timeout=1.0)
                except SystemError as error:  # so Ray tells what a signal's handler raised while it waited
                    raise error.__cause__ or error from None
                for reference in ready:
                    actor, task, _ = running.pop(reference)
                    try:
                        result = ray.get(reference)
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
                        hire()
                        continue
                    except ray.exceptions.RayTaskError as error:
                        assert task is not None
                        failed(task, "worker_failed", one_line(error.cause or error))
                    else:
                        if task is None:
                            deaths_unanswered = 0
                            if result:
                                raise RunnerError(result)
                        elif isinstance(result, _NoRoom):
                            raise DiskFull(result.path, result.free)
                        else:
                            done(task, result)
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
        finally:
            for actor in actors:
                ray.kill(actor)


@dataclass(frozen=True)
class _NoRoom:
    path: str
    free: int


class _Actor:
    """A worker in its own process. Known errors come back as values: exceptions do not always survive the journey."""

    def __init__(self, worker: Worker, cpus: float) -> None:
        self.worker = worker
        # Read when torch is imported, which is later: more threads than promised cores slow all workers down.
        for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
            os.environ[variable] = str(max(1, int(cpus)))
        self.problem: str | None = None

    def ready(self) -> str:
        """Sets the worker up; what is wrong in words, or nothing."""
        if self.problem is None:
            try:
                self.worker.setup()
                self.problem = ""
            except Exception as error:
                self.problem = " ".join(str(error).split()) or type(error).__name__
        return self.problem

    def process(self, task_id: str, items: Sequence[Any]) -> Any:
        """The worker's result, or what the disk lacks."""
        try:
            return self.worker.process(task_id, items)
        except DiskFull as error:
            return _NoRoom(str(error.filename), error.free)
