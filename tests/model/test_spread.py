"""Members of a sequence, evenly spread."""

from __future__ import annotations

import pytest

from model.spread import spread_evenly


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
