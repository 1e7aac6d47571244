"""Work on Ray: plain actors and a bounded wait, so that one bad item costs itself and nothing else.

A task is a group of items. When its worker dies or raises, a group is taken apart and each item is tried alone; an item
that fails alone as often as allowed is given up and named. So innocent items always finish (Ray Data loses a block, or
stalls for ever). A node that is lost costs the time of its tasks, and no attempt; one that comes is given work.
"""

from __future__ import annotations

import logging
import math
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from model.telemetry import metrics
from pipeline.actor import Actor, Answer, Worker
from pipeline.cluster import RaySession
from pipeline.cluster import RunnerError as RunnerError
from pipeline.placement import plan_workers, workers_that_fit, working_nodes
from pipeline.stage import one_line
from storage.layout import DiskFull

log = logging.getLogger(__name__)

START_SECONDS = 600.0  # longest time in which no worker at all starts
END_SECONDS = 30.0  # longest time for all workers together to free what they hold
LOOK_SECONDS = 5.0  # between two looks at which nodes there are
LOST_SECONDS = 90.0  # longest time until Ray has noticed that a process or a node is gone; about 20 s at its defaults


@dataclass(frozen=True)
class Task:
    """Items that are done in one call."""

    task_id: str
    items: tuple[Any, ...]
    parent: str
    """The task as it was given, where this one is a part of it."""


class Runner:
    """A Ray session that starts at the first task and ends with the `with` block, unless it was there before.

    Args:
        address: of a cluster; None starts one on this machine, or uses the one already started in this process.
        attempts: how often an item may be tried, its group's failures counted.
        task_seconds: longest time for one task; a worker that takes longer is killed, which counts as its death.
        workers: so many are asked for even where the cluster has no room for them yet; an autoscaler makes room.
        send_code: whether this project's code is sent to the cluster's nodes.
    """

    def __init__(
        self,
        address: str | None = None,
        attempts: int = 3,
        task_seconds: float = 3600.0,
        workers: int = 0,
        send_code: bool = False,
    ) -> None:
        self.attempts, self.task_seconds, self.workers = attempts, task_seconds, workers
        self._session = RaySession(address, send_code)
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

    @property
    def on_cluster(self) -> bool:
        """Whether its work is done, or is going to be, on a cluster: one with an address, or of several nodes."""
        if self._session.address is not None:
            return True
        ray = sys.modules.get("ray")  # not imported: no session
        return ray is not None and ray.is_initialized() and len(working_nodes(ray_report())) > 1

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
        work = _Work(self, worker, tasks, key, done, given_up)
        try:
            work.finish()
            self._end(work.idle())
        finally:
            work.kill()

    def _end(self, idle: Sequence[_Started]) -> None:
        """Lets idle actors free what they hold. What goes wrong then is a warning: the work is done."""
        import ray

        calls = [started.actor.teardown.remote() for started in idle]
        ready, late = ray.wait(calls, num_returns=len(calls), timeout=END_SECONDS) if calls else ([], [])
        for call in ready:
            try:
                answer: Answer = ray.get(call)
            except ray.exceptions.RayError as error:
                self.warn([f"a worker died while it ended: {one_line(error)}"])
            else:
                ended = f"a worker did not end cleanly: {answer.problem}"
                self.warn([*answer.warnings, *([ended] if answer.problem else [])])
        if late:
            self.warn([f"{len(late)} workers did not end within {END_SECONDS:g} s and were killed"])

    def warn(self, lines: Iterable[str]) -> None:
        """Logs each line once in the life of this runner, however many workers say it how often."""
        for line in lines:
            if line not in self._warned:
                self._warned.add(line)
                log.warning("%s", line)


def ray_report() -> list[dict[str, Any]]:
    """What Ray knows of the nodes of its cluster, living or gone."""
    import ray

    return list(ray.nodes())  # type: ignore[no-untyped-call]


@dataclass(eq=False)
class _Started:
    """An actor that was asked for; `node` is where it runs, as soon as it has answered."""

    actor: Any
    node: str = ""


@dataclass(frozen=True)
class _Call:
    """A call of an actor that is not answered yet."""

    started: _Started
    task: Task | None
    """None where it is only asked whether it is ready."""
    deadline: float
    """When its actor is killed (monotonic seconds)."""
    asked_again: bool = False
    """Whether the task's own call was cut off, and it is asked whether the actor still lives."""


class _Work:
    """One call of Runner.run: the tasks that wait, the actors, and the calls that are not answered."""

    def __init__(
        self,
        runner: Runner,
        worker: Worker,
        tasks: Sequence[tuple[str, Sequence[Any]]],
        key: Callable[[Any], str],
        done: Callable[[Task, Any], None],
        given_up: Callable[[Task, str, str], None],
    ) -> None:
        import ray

        self.ray, self.runner, self.worker = ray, runner, worker
        self.key, self.done, self.given_up = key, done, given_up
        self.waiting = deque(Task(task_id, tuple(items), task_id) for task_id, items in tasks)
        self.tried: dict[str, int] = {}
        self.started: list[_Started] = []
        self.calls: dict[Any, _Call] = {}
        self.names: dict[str, str] = {}
        self.home = ray.get_runtime_context().get_node_id()
        self.look()
        self.plan = plan_workers(self.nodes, worker.resources, len(tasks), runner.workers)
        options = {"num_cpus": self.plan.cpus, "num_gpus": self.plan.gpus, "scheduling_strategy": "SPREAD"}
        self.actor_class = ray.remote(Actor).options(**options, max_restarts=0, max_task_retries=0)
        self.deaths_unanswered = 0
        self.answered = time.monotonic()
        self.metrics = metrics()

    def finish(self) -> None:
        """Does all tasks, as Runner.run says."""
        for _ in range(self.plan.count):
            self.start()
        while self.waiting or any(call.task is not None for call in self.calls.values()):
            for reference in self.wait():
                self.take(reference)
            self.measure()
            now = time.monotonic()
            for call in list(self.calls.values()):
                if now > call.deadline:
                    self.ray.kill(call.started.actor)
            if self.waiting:
                self.give()
                if now - self.looked > LOOK_SECONDS:
                    self.fill()
                if not any(started.node for started in self.started) and now - self.answered > START_SECONDS:
                    wanted = f"{self.plan.cpus:g} CPUs and {self.plan.gpus:g} GPUs"
                    remedy = "see `ray status`; what is done is kept, run it again when there are nodes"
                    raise RunnerError(f"no worker with {wanted} started within {START_SECONDS:g} s; {remedy}")

    def wait(self) -> list[Any]:
        """The calls that are answered, after a second at the latest."""
        if not self.calls:
            time.sleep(1.0)
            return []
        try:
            ready, _ = self.ray.wait(list(self.calls), num_returns=1, timeout=1.0)
        except SystemError as error:  # so Ray tells what a signal's handler raised while it waited
            raise error.__cause__ or error from None
        return list(ready)

    def take(self, reference: Any) -> None:
        """Takes an answer, or notices that there will be none, and gives the actor something new to do."""
        call, errors = self.calls.pop(reference), self.ray.exceptions
        try:
            answer: Answer = self.ray.get(reference)
        except errors.ActorUnavailableError:
            # Its connection broke: the process or the whole node is gone, or it was the network. Ray knows soon.
            time.sleep(0.1)
            until = time.monotonic() + (LOST_SECONDS if call.task is not None else START_SECONDS)
            self.ask(call.started, call.task, min(until, call.deadline))
        except (errors.RayActorError, errors.ObjectLostError) as error:
            self.died(call, error)
        except errors.RayTaskError as error:  # the answer itself cannot travel
            self.answer(call, Answer((), problem=one_line(error.cause or error)))
        else:
            self.answer(call, answer)

    def answer(self, call: _Call, answer: Answer) -> None:
        """Keeps what an actor sent."""
        self.runner.warn(answer.warnings)
        self.answered = time.monotonic()
        call.started.node = answer.node or call.started.node
        if call.task is None or call.asked_again:
            self.deaths_unanswered = 0
            if answer.problem:
                raise RunnerError(answer.problem)
            if call.task is not None:  # the network was away for a while; the actor is well
                self.waiting.appendleft(call.task)
        elif answer.full is not None:
            raise DiskFull(*answer.full)
        elif answer.problem:
            self.failed(call.task, "worker_failed", answer.problem)
        else:
            self.done(call.task, answer.result)
        if self.waiting:
            # Only a worker that has answered gets a task, so a restart cannot cost an innocent item an attempt.
            task = self.waiting.popleft()
            reference = call.started.actor.process.remote(task.task_id, task.items)
            self.calls[reference] = _Call(call.started, task, time.monotonic() + self.runner.task_seconds)

    def died(self, call: _Call, error: Exception) -> None:
        """Another actor takes the place of one that is gone, where there is room for it.

        A task that went down with its whole node is done again as it is: it is no task's fault.
        """
        started = call.started
        if started in self.started:
            self.started.remove(started)
        self.ray.kill(started.actor)
        self.look()
        lost = started.node != "" and started.node not in {node.node_id for node in self.nodes}
        self.metrics.count("ingest_worker_deaths", cause="node" if lost else "process")
        if lost:
            self.runner.warn([f"node {self.names[started.node]} is gone; what it was making is made by others"])
        if call.task is None:
            self.deaths_unanswered += not lost
            if self.deaths_unanswered > 3 * self.plan.count:
                raise RunnerError(f"workers die before they start: {one_line(error)}") from error
        elif lost:
            self.waiting.appendleft(call.task)
        else:
            detail = "the worker process died on this clip each time; remove or re-encode its film"
            self.failed(call.task, "worker_died", detail)
        self.fill()

    def failed(self, task: Task, reason: str, detail: str) -> None:
        """A task failed: a group is taken apart, an item is tried again or given up."""
        for item in task.items:
            self.tried[self.key(item)] = self.tried.get(self.key(item), 0) + 1
        if len(task.items) > 1:
            self.waiting.extend(Task(f"{task.parent}-{self.key(item)}", (item,), task.parent) for item in task.items)
        elif self.tried[self.key(task.items[0])] < self.runner.attempts:
            self.waiting.append(task)
        else:
            self.given_up(task, reason, detail)

    def look(self) -> None:
        """Looks which nodes there are.

        Raises:
            RunnerError: the one that this process belongs to is gone; without it no work can be given to the others.
        """
        report = ray_report()
        for node in report:
            if node["NodeID"] == self.home and not node["Alive"]:
                told = " ".join(str(node.get("DeathReasonMessage") or "killed, or out of memory").split())
                remedy = "what is done is kept, run the same command again"
                raise RunnerError(f"Ray has ended on this machine ({told}); {remedy}")
        self.nodes, self.looked = working_nodes(report), time.monotonic()
        self.names |= {node.node_id: node.name for node in self.nodes}

    def fill(self) -> None:
        """As many actors as the nodes have room for now, and tasks to do: nodes come and go."""
        self.look()
        room = max(1, workers_that_fit(self.nodes, self.plan.cpus, self.plan.gpus), self.runner.workers)
        busy = sum(call.task is not None for call in self.calls.values())
        for _ in range(min(room, busy + len(self.waiting)) - len(self.started)):
            self.start()

    def start(self) -> None:
        """Asks for an actor; it is busy from when it has answered."""
        started = _Started(self.actor_class.remote(self.worker, self.plan.cpus))
        self.started.append(started)
        # A node may have to be added for it, or another one's end to be noticed.
        self.ask(started, None, math.inf)

    def ask(self, started: _Started, task: Task | None, deadline: float) -> None:
        """Asks an actor whether it is ready; `task` is the one whose call was cut off."""
        call = started.actor.ready.remote()
        self.calls[call] = _Call(started, task, deadline, asked_again=task is not None)

    def give(self) -> None:
        """Wakes actors that were idle when a task came back."""
        for started in self.idle():
            self.ask(started, None, math.inf)

    def idle(self) -> list[_Started]:
        """The actors that have answered and have nothing to do."""
        busy = {id(call.started) for call in self.calls.values()}
        return [started for started in self.started if id(started) not in busy]

    def measure(self) -> None:
        """Tells those who watch how much waits, and for whom."""
        ready = sum(bool(started.node) for started in self.started)
        self.metrics.set("ingest_tasks", len(self.waiting), state="waiting")
        self.metrics.set("ingest_tasks", sum(call.task is not None for call in self.calls.values()), state="running")
        self.metrics.set("ingest_workers", ready, state="ready")
        self.metrics.set("ingest_workers", len(self.started) - ready, state="starting")
        self.metrics.set("ingest_nodes", len(self.nodes))

    def kill(self) -> None:
        """Ends all actors."""
        for started in self.started:
            self.ray.kill(started.actor)
