"""How a step's gradients are applied: on the device, which decides by itself; the host hears of it later."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from model.training.optimizers import leave_out
from model.training.processes import Processes
from model.training.sharding import whole
from model.training.state import TrainingState

SPIKE = "the gradient's norm is more than {:g} times its running mean"
"""Why a step is skipped."""


class Update(NamedTuple):
    """What a step does, while the device may still be at it."""

    skipped: Tensor
    """Whether weights, average and optimisers stay as they were; a scalar bool on the device, the same in all
    processes."""
    gradient_norm: Tensor
    """Norm of all gradients before they were clipped, a scalar."""


class Outcome(NamedTuple):
    """What became of a step."""

    step: int
    """Its number."""
    reason: str
    """Why it was skipped; empty where it was applied."""
    stop: bool
    """Whether any process was asked to stop by then."""


class _OnItsWay:
    """Some numbers of the device that travel to the host, which can go on."""

    def __init__(self, step: int, values: Tensor) -> None:
        self.step = step
        self._values = values.to("cpu", non_blocking=True)
        self._there = torch.cuda.Event() if values.is_cuda else None
        if self._there is not None:
            self._there.record()

    def read(self) -> list[float]:
        if self._there is not None:
            self._there.synchronize()
        found: list[float] = self._values.tolist()
        return found


def late(device: torch.device) -> int:
    """Steps that the host may be ahead of its device: on a GPU enough that it always has one to do."""
    return 2 if device.type == "cuda" else 0


@dataclass
class Updates:
    """Applies gradients to the state of a training; a step that is not finite, or a spike, changes nothing of it.

    A spike is a gradient norm above `spike_factor` times its running mean (`GradientNorms`). All processes decide
    alike, on their devices; the host reads what they decided `late` steps afterwards, or when it wants to know.

    Raises ValueError where `allowed` is negative.
    """

    state: TrainingState
    clip: float
    """Largest global gradient norm."""
    allowed: int
    """Steps in a row that may be skipped; one more raises."""
    root: Path
    """The run's folder, for the message."""
    processes: Processes
    """Those that must agree on every step."""
    spike_factor: float = 0.0
    """How many times its running mean a gradient norm may be; 0 allows any."""
    late: int = 0
    """Steps whose outcome `outcomes` may leave for later; the same in all processes, which must stop together."""
    in_a_row: int = 0
    """Steps skipped since the last one that was applied."""
    skipped: int = 0
    """Steps skipped altogether."""
    _open: deque[_OnItsWay] = field(default_factory=deque)

    def __post_init__(self) -> None:
        if self.allowed < 0:
            raise ValueError(f"bad_steps_allowed is {self.allowed}; it must be 0 or more")

    def apply(self, step: int, loss: Tensor, stop: bool = False) -> Update:
        """Clip the gradients that the loss (a scalar) left, and apply them where both are finite in every process.

        stop: whether this process was asked to stop; it travels along. On a GPU the host does not wait.
        """
        state = self.state
        parameters = [p for p in state.network.parameters() if p.grad is not None]
        norm = whole(nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])).detach()
        nn.utils.clip_grads_with_norm_(parameters, self.clip, norm)
        loss = loss.detach()
        bad = ~(torch.isfinite(loss) & torch.isfinite(norm))
        spike = state.norms.spikes(norm, self.spike_factor)
        # Gradients are averages over the processes and their norm the same in all, but the loss is not.
        flags = self.processes.highest(bad, spike, stop)
        skip = flags[:2].amax()
        for optimizer in state.optimizers:
            leave_out(optimizer, skip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        skipped = skip > 0
        state.average.update(state.network, skipped)
        state.norms.add(norm, skipped)
        self._open.append(_OnItsWay(step, torch.cat([flags, torch.stack([loss.float(), norm.float()])])))
        return Update(skipped, norm)

    def outcomes(self, late: int | None = None) -> Iterator[Outcome]:
        """What became of the steps so far, but for the last `late`, of each step once.

        Raises:
            FloatingPointError: more than `allowed` steps in a row were skipped; raised in all processes alike.
        """
        while len(self._open) > (self.late if late is None else late):
            entry = self._open.popleft()
            bad, spiked, stop, loss, norm = entry.read()
            reason = (
                "the loss or its gradient is not finite" if bad else SPIKE.format(self.spike_factor) if spiked else ""
            )
            self.in_a_row = self.in_a_row + 1 if reason else 0
            self.skipped += bool(reason)
            if self.in_a_row > self.allowed:
                raise FloatingPointError(
                    f"{reason} at step {entry.step} (here {loss:.3g} and a norm of {norm:.3g}), {self.in_a_row} steps "
                    f"in a row where {self.allowed} are allowed; the last good checkpoint stays in {self.root}: start "
                    "another run with a lower learning rate"
                )
            yield Outcome(entry.step, reason, stop > 0)
