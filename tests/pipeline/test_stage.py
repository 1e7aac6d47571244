"""Working ahead: bounded, in order, with errors raised in turn, and without a thread left behind."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from pipeline.stage import prefetched


def numbers(count: int, made: list[int], fault: BaseException | None = None) -> Iterator[int]:
    for number in range(count):
        made.append(number)
        yield number
    if fault is not None:
        raise fault


@pytest.mark.parametrize("most", [1, 3])
def test_bounded_and_in_order(most: int) -> None:
    made: list[int] = []
    taken = []
    for number in prefetched(numbers(10, made), most):
        taken.append(number)
        deadline = time.monotonic() + 5
        while len(made) < min(10, len(taken) + most) and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.005)
        assert len(made) == min(10, len(taken) + most), "as far ahead as allowed, and no further"
    assert taken == list(range(10))


def test_an_error_is_raised_after_what_came_before_it() -> None:
    stream = prefetched(numbers(3, [], OSError("gone")), 2)
    assert [next(stream) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(OSError, match="gone"):
        next(stream)


def test_who_stops_early_stops_the_thread() -> None:
    before, made = threading.active_count(), list[int]()
    stream = prefetched(numbers(1000, made), 2)
    assert next(stream) == 0
    with pytest.raises(KeyboardInterrupt):
        stream.throw(KeyboardInterrupt())  # type: ignore[attr-defined]
    assert threading.active_count() == before
    assert len(made) <= 4
