"""Members of a sequence, evenly spread."""

from __future__ import annotations

import pytest

from model.spread import spread_evenly, spread_in_runs


@pytest.mark.parametrize(
    ("count", "most", "chosen"),
    [
        (9, 3, [0, 4, 8]),
        (10, 4, [0, 3, 6, 9]),
        (3, 5, [0, 1, 2]),
        (5, 1, [0]),
        (5, 0, []),
        (0, 4, []),
    ],
)
def test_the_ends_are_among_them_and_none_twice(count: int, most: int, chosen: list[int]) -> None:
    assert spread_evenly(range(count), most) == chosen
    assert spread_evenly([str(number) for number in range(count)], most) == [str(number) for number in chosen]


def test_runs_of_neighbours_are_evenly_spread() -> None:
    assert spread_in_runs(range(10), 10, 4) == list(range(10))
    assert spread_in_runs(range(100), 8, 4) == [0, 1, 2, 3, 96, 97, 98, 99]
    assert spread_in_runs(range(9), 8, 4) == [0, 1, 2, 3, 5, 6, 7, 8]
    chosen = spread_in_runs(range(100_000), 1024, 16)
    assert len(chosen) == 1024
    assert len({place // 100 for place in chosen}) <= 128, "shards of 100 clips that are opened"
