"""What all flows share: a step as one Prefect task, and known failures as one line instead of a traceback."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.states import Failed

from storage.errors import VlfmError, is_expected

Result = TypeVar("Result")


class StepFailed(Exception):
    """A step could not do its work, for a known reason; the message is one line that says the remedy."""


def step(title: str, name: str, work: Callable[[], Result]) -> Result:
    """Does `work` as one Prefect task called `title`. A known failure fails the task in one line: StepFailed."""

    def run() -> Any:
        try:
            with known_failures():
                return work()
        except StepFailed as error:
            return Failed(message=str(error), data=error)

    # Nothing is passed in or persisted: plans are large, and a run that is started again takes up staged blocks anyway.
    made = task(name=name, task_run_name=lambda: title, cache_policy=NO_CACHE, persist_result=False)(run)
    state: State[Any] = made(return_state=True)
    result = state.result(raise_on_failure=False)
    if isinstance(result, BaseException):
        raise result
    return cast(Result, result)


@contextmanager
def known_failures() -> Iterator[None]:
    """Turns what can go wrong without any fault of the program into StepFailed."""
    try:
        yield
    except (VlfmError, OSError, ValueError, FloatingPointError) as error:
        if not is_expected(error):
            raise
        raise StepFailed(" ".join(str(error).split())) from error


def without_traces() -> None:
    """Takes the empty trace off the lines that Prefect logs for tasks that return Failed."""
    logging.getLogger("prefect.task_runs").addFilter(_without_trace)


def _without_trace(record: logging.LogRecord) -> bool:
    if record.exc_info and record.exc_info[1] is None:
        record.exc_info = None
    return True
