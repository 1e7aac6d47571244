"""Frame insertion the slow and plain way, in float64 and loops, from the formulas of arXiv 2512.11438."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def pending(visible: Sequence[bool], deleted: Sequence[bool]) -> list[int]:
    """Of each visible frame the deleted ones between it and the next visible one."""
    counts = [0] * len(visible)
    for i, seen in enumerate(visible):
        if not seen:
            continue
        for j in range(i + 1, len(visible)):
            if visible[j]:
                break
            counts[i] += deleted[j]
    return counts


def stripped(values: Sequence[float], kept: Sequence[bool]) -> list[float]:
    """The kept ones, in order."""
    return [value for value, keep in zip(values, kept, strict=True) if keep]


def probability(kappa: float, later: float) -> float:
    """Equation 28: of a frame that is to come at the share kappa that it has come at the share `later`."""
    return (later - kappa) / (1 - kappa)


def losses(
    clean: Array,
    noise: Array,
    tau: Array,
    given: NDArray[np.bool_],
    velocity: Sequence[Array],
    log_rate: Sequence[Array],
    by_clip: bool = False,
    weights: Sequence[float] | None = None,
) -> tuple[float, float]:
    """The velocity loss (equation 23) and the insertion loss (equation 19) of a batch.

    clean, noise: (B, N, V) frames; tau: (B, N) extended times, NaN for padding; velocity, log_rate: of each clip's
    visible frames, (L_b, V) and (L_b,). Means over the batch's frames, or first over each clip's.
    """
    errors: list[list[float]] = []
    rates: list[list[float]] = []
    for b in range(len(clean)):
        there = [not math.isnan(t) for t in tau[b]]
        visible = [here and t >= 0 for here, t in zip(there, tau[b], strict=True)]
        deleted = [here and t < 0 for here, t in zip(there, tau[b], strict=True)]
        counts = pending(visible, deleted)
        of_clip, of_slots, row = [], [], 0
        for i, seen in enumerate(visible):
            if not seen:
                continue
            active = tau[b, i] < 1
            if active and not given[b, i]:
                target = clean[b, i] - noise[b, i]
                of_clip.append(float(np.mean((velocity[b][row] - target) ** 2)))
            if active or given[b, i]:
                rate = float(log_rate[b][row])
                weight = 1.0 if weights is None else weights[b]
                of_slots.append(weight * (math.exp(rate) - counts[i] * rate))
            row += 1
        errors.append(of_clip)
        rates.append(of_slots)
    if by_clip:
        return mean([mean(each) for each in errors if each]), mean([mean(each) for each in rates if each])
    return mean([e for each in errors for e in each]), mean([e for each in rates for e in each])


def mean(values: Sequence[float]) -> float:
    """Of some numbers."""
    return math.fsum(values) / len(values)
