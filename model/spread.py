"""Some members of a sequence, evenly spread."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

Member = TypeVar("Member")


def spread_evenly(members: Sequence[Member], most: int) -> list[Member]:
    """At most `most` of the members, in their order, the first and the last among them where two or more are asked for.

    Of arrays, and of what is slow to read, it is asked for places: `spread_evenly(range(len(clips)), most)`.
    """
    places = np.linspace(0, len(members) - 1, min(most, len(members))).astype(int)
    return [members[place] for place in np.unique(places).tolist()]


def spread_in_runs(members: Sequence[Member], most: int, run: int) -> list[Member]:
    """At most `most` of the members, in their order, in runs of `run` neighbours that are evenly spread."""
    if len(members) <= most:
        return list(members)
    firsts = spread_evenly(range(len(members) - run + 1), most // run)
    return [members[place] for place in sorted({first + step for first in firsts for step in range(run)})]
