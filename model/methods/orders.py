"""Insertion in a given order, for comparison with the learned one: the clip's length is given then."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from model.methods.growing import Canvas
from model.methods.insertion import Scheduler
from model.methods.sequences import Chance


class Planned:
    """Insertion in a given order of clips of a given length, at insertion times of the scheduler's law.

    places: for each clip the places of its frames in the order of their insertion, after those that it begins with.
    """

    def __init__(self, steps: int, scheduler: Scheduler, chance: Chance, places: Sequence[Sequence[int]]) -> None:
        self.places = [list(each) for each in places]
        drawn = chance.uniform([len(each) for each in self.places])
        times = [scheduler.inverse(share.double().sort().values) for share in drawn]
        # A frame whose time lies in (k h, (k + 1) h] is there from step k + 1 on.
        self.steps = [((each * steps).ceil().long() - 1).clamp(0, steps - 1).tolist() for each in times]

    def counts(self, canvas: Canvas, log_rate: Tensor | None, step: int) -> tuple[Tensor, Tensor | None]:
        """As `Inserter.counts`."""
        counts, targets = torch.zeros(canvas.target.shape, dtype=torch.long), []
        for index, (places, steps) in enumerate(zip(self.places, self.steps, strict=True)):
            new = sorted(place for place, when in zip(places, steps, strict=True) if when == step)
            seen = canvas.target[index, : canvas.counts[index]].cpu()
            slots = torch.searchsorted(seen, torch.tensor(new, dtype=torch.long)) - 1
            counts[index].index_add_(0, slots, torch.ones_like(slots))
            targets += new
        device = canvas.target.device
        return counts.to(device), torch.tensor(targets, dtype=torch.long, device=device)


def planned_orders(
    order: str, length: int, begins: int, fixed: Sequence[Sequence[int]], chance: Chance
) -> list[tuple[list[int], list[int]]]:
    """`planned_order` of each clip, with given frames at the `fixed` places; of several it begins with them alone."""
    shares = chance.uniform([length] * len(fixed))
    return [
        planned_order(order, length, min(begins, length) if len(known) < 2 else len(known), known, share)
        for known, share in zip(fixed, shares, strict=True)
    ]


def planned_order(
    order: str, length: int, begins: int, fixed: Sequence[int], shares: Tensor
) -> tuple[list[int], list[int]]:
    """Places that a clip of `length` frames begins with, sorted, and the others in the order of their insertion.

    fixed: places of given frames, which it begins with; else it begins with the first `begins` of the order, the first
    frame always among them. shares: (length,) random numbers, for `random`.
    """
    if order == "left_to_right":
        ordered = list(range(length))
    elif order == "random":
        ordered = [0, *(k for k in shares.argsort().tolist() if k != 0)]
    else:
        ordered, gaps = [0, length - 1][:length], [(0, length - 1)]
        while gaps:
            gaps.sort(key=lambda gap: gap[0] - gap[1])  # the widest gap's middle is next
            left, right = gaps.pop(0)
            middle = (left + right) // 2
            if middle > left:
                ordered.append(middle)
                gaps += [(left, middle), (middle, right)]
    first = [*fixed, *(k for k in ordered if k not in fixed)][: max(begins, len(fixed))]
    return sorted(first), [k for k in ordered if k not in first]
