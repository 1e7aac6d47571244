"""Where a film is cut: the frames that begin a shot, found while the film streams by.

A cut changes the colours of the whole picture at once; motion, however fast, mostly moves them about. So frames are
compared by their colour histograms, and a cut is a change far above those around it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

BINS = 32
"""Bins of a colour's histogram."""
AROUND = 4
"""How many changes before and after one it is compared with; of two cuts closer than this neither is seen."""
SUDDEN = 2.5
"""How many times the largest change around it a cut is; fast motion and flashes reach 2.1 on seven real films."""
LEAST = 0.1
"""Least change of a cut: the share of the pixels' colours that fall into another bin."""
PIXELS = 2**14
"""About how many pixels of a frame are looked at."""


def shot_starts(frames: Iterable[np.ndarray]) -> Iterator[tuple[np.ndarray, bool]]:
    """Each frame, uint8 (H, W, 3), and whether it begins a shot, as the first one does. Holds five frames at most."""
    changes: list[float] = []
    waiting: deque[np.ndarray] = deque()
    before: np.ndarray | None = None
    for frame in frames:
        colours = _histogram(frame)
        changes.append(1.0 if before is None else float(np.abs(colours - before).sum()) / 2)
        before = colours
        waiting.append(frame)
        if len(waiting) > AROUND:
            yield waiting.popleft(), _is_start(changes, len(changes) - 1 - AROUND)
    for index in range(len(changes) - len(waiting), len(changes)):
        yield waiting.popleft(), _is_start(changes, index)


def follows_a_cut(before: Sequence[np.ndarray], frame: np.ndarray) -> bool:
    """Whether `frame` begins a shot, by the frames just `before` it alone."""
    return list(shot_starts([*before[-AROUND - 1 :], frame]))[-1][1]


def _is_start(changes: Sequence[float], index: int) -> bool:
    """changes[k] is how much frame k differs from the one before it."""
    if index == 0:
        return True
    around = [*changes[max(1, index - AROUND) : index], *changes[index + 1 : index + 1 + AROUND]]
    return bool(around) and changes[index] > max(LEAST, SUDDEN * max(around))


def _histogram(frame: np.ndarray) -> np.ndarray:
    """(3, BINS): the shares of the pixels in each bin, a third for each colour."""
    step = max(1, int((frame.shape[0] * frame.shape[1] / PIXELS) ** 0.5))
    levels = frame[::step, ::step].reshape(-1, 3) // (256 // BINS)
    return np.stack([np.bincount(levels[:, colour], minlength=BINS) for colour in range(3)]) / levels.size
