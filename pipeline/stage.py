"""The contract of a stage, and how clips flow through stages, failures and all.

A stage states what it needs, sets up once, and turns a stream of clips into a stream of clips. It keeps nothing between
clips that changes a result, so a block can be run again at any time. A clip that fails flows on with its failure; the
later stages pass it by.
"""

from __future__ import annotations

import dataclasses
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

from pipeline.items import ClipPlan, ClipWork, Failure, Resources

Item = TypeVar("Item")


class Stage(Protocol):
    """A step of the pipeline."""

    name: str
    """The word in failure tables and progress lines."""
    resources: Resources

    def setup(self) -> None:
        """Loads what it needs; called once in the process that runs it."""

    def process(self, works: Iterable[ClipWork]) -> Iterator[ClipWork]:
        """Each clip once, in order, with this stage's part filled in or its failure; a clip raises nothing."""

    def teardown(self) -> None:
        """Frees what setup took."""


def fail(work: ClipWork, stage: str, reason: str, detail: str) -> ClipWork:
    """`work` with its failure and without its arrays."""
    plan = work.plan
    failure = Failure(plan.film, stage, reason, detail, clip_id=plan.clip_id, clip_start=plan.window.start)
    arrays: dict[str, Any] = dict.fromkeys(("frames", "latents", "next_frames", "next_latents", "coefficients"))
    return dataclasses.replace(work, failure=failure, **arrays)


def isolated(
    works: Iterable[ClipWork], do: Callable[[ClipWork], ClipWork], stage: str, reason: str
) -> Iterator[ClipWork]:
    """`do` to every clip that has not failed; what it raises fails that clip for `reason`, its block goes on."""
    for work in works:
        if work.failure is None:
            try:
                work = do(work)
            except Exception as error:
                work = fail(work, stage, reason, one_line(error))
        yield work


def one_line(error: BaseException) -> str:
    """An unexpected error in words for a table."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def run_stages(
    stages: Sequence[Stage], clips: Sequence[ClipPlan], ahead: int = 2
) -> tuple[list[ClipWork], dict[str, float]]:
    """All clips through all stages: (works, seconds by stage).

    The first stage runs in its own thread and makes at most `ahead` clips that nobody has asked for yet; 0 runs it in
    the caller's thread, with the same results. Frames of clips that keep no preview are dropped when the last stage is
    done with them. So the memory taken is that of the results, and of the frames of `ahead` clips and those in hand.
    """
    clock: dict[str, float] = {}
    stream: Iterable[ClipWork] = (ClipWork(plan) for plan in clips)
    for index, stage in enumerate(stages):
        received = _Timed(stream)
        stream = _charged(stage, received, clock)
        if index == 0 and ahead:
            stream = prefetched(stream, ahead)
    works = []
    for work in stream:
        frames = work.frames if work.plan.preview else None
        works.append(dataclasses.replace(work, frames=frames, next_frames=None))
    return works, clock


class _Timed(Iterator[Item]):
    """An iterator that knows how long it was waited for, in seconds."""

    def __init__(self, source: Iterable[Item]) -> None:
        self._source = iter(source)
        self.seconds = 0.0

    def __next__(self) -> Item:
        begin = time.perf_counter()
        try:
            return next(self._source)
        finally:
            self.seconds += time.perf_counter() - begin


def _charged(stage: Stage, received: _Timed[ClipWork], clock: dict[str, float]) -> Iterator[ClipWork]:
    """The stage's output; the time it took, less the time it waited for its input, goes to the clock."""
    given = _Timed(stage.process(received))
    yield from given
    clock[stage.name] = clock.get(stage.name, 0.0) + given.seconds - received.seconds


def prefetched(source: Iterable[Item], most: int) -> Iterator[Item]:
    """The same items, made in a thread, at most `most` before they are asked for; errors are raised here, in turn."""
    made: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
    room = threading.Semaphore(most)
    closed = threading.Event()

    def work() -> None:
        try:
            items = iter(source)
            while room.acquire() and not closed.is_set():
                made.put(("item", next(items)))
        except StopIteration:
            made.put(("end", None))
        except BaseException as error:
            made.put(("error", error))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while True:
            kind, value = made.get()
            if kind == "end":
                return
            if kind == "error":
                raise value
            room.release()
            yield value
    finally:
        closed.set()
        room.release()
        thread.join(timeout=10)
