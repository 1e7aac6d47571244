"""The state of a training: all that a step changes, as one object that a checkpoint writes and reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from model.training.ema import MovingAverage
from model.training.sharding import is_sharded, sharded_like

WINDOW = 100
"""Steps over which the mean of the gradient norms runs; it says nothing before there were as many."""
IMPLEMENTATION = ("fused", "foreach", "capturable", "differentiable")
"""Settings of torch's optimisers that say how they compute: the program's, whatever a checkpoint was written by."""


@dataclass
class GradientNorms:
    """The running geometric mean of the gradient norms of the steps that were applied, kept on the device.

    Geometric, so that a spike among the first steps does not hide the later ones.
    """

    log_mean: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    """Logarithm of the mean over all steps up to WINDOW; from there on each step weighs 1 / WINDOW."""
    steps: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    """Steps that it has seen."""

    def add(self, norm: Tensor, skipped: Tensor | None = None) -> None:
        """Take in the norm (a scalar) of a step, unless it was `skipped` (a scalar bool); no host synchronisation."""
        steps, mean = self.steps.to(norm.device), self.log_mean.to(norm.device)
        weight = 1 / (steps + 1).clamp(max=WINDOW)
        found = torch.lerp(mean, norm.double().clamp(min=1e-30).log(), weight), steps + 1
        if skipped is not None:
            found = torch.where(skipped, mean, found[0]), torch.where(skipped, steps, found[1])
        self.log_mean, self.steps = found

    def spikes(self, norm: Tensor, factor: float) -> Tensor:
        """Whether a norm (a scalar) is above `factor` times the mean; never where that is 0 or too few were seen."""
        if factor == 0:
            return torch.zeros((), dtype=torch.bool, device=norm.device)
        high = norm.double() > factor * self.log_mean.to(norm.device).exp()
        return high & (self.steps.to(norm.device) >= WINDOW)


@dataclass
class TrainingState:
    """A network in training. Order, noise and times are functions of seed and step, so there is nothing random here."""

    network: nn.Module
    """What is trained: the backbone, or a part of a codec."""
    average: MovingAverage
    """Moving average of its weights."""
    optimizers: Sequence[Optimizer]
    """Each of its parameters belongs to one of them."""
    step: int = 0
    """Steps done."""
    norms: GradientNorms = field(default_factory=GradientNorms)
    """What gradients were like, by which a spike is known."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values, not copied."""
        return {
            "network": self.network.state_dict(),
            "average": self.average.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
            "norms": {"log_mean": float(self.norms.log_mean), "steps": int(self.norms.steps)},
        }

    def load_state_dict(self, values: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave, or its whole tensors: each process then takes its parts of them.

        Raises:
            KeyError, RuntimeError, ValueError: it is of another network or of other optimisers.
        """
        ours, theirs = self.network.state_dict(), values["network"]
        self.network.load_state_dict({name: sharded_like(theirs[name], ours.get(name)) for name in theirs})
        self.average.load_state_dict(values["average"])
        for optimizer, of_one in zip(self.optimizers, values["optimizers"], strict=True):
            held = dict(enumerate(p for group in optimizer.param_groups for p in group["params"]))
            slots = {
                index: {
                    name: _laid_out_like(sharded_like(value, held[index]), held[index]) for name, value in slot.items()
                }
                for index, slot in of_one["state"].items()
            }
            groups = [
                {**given, **{name: ours[name] for name in IMPLEMENTATION if name in ours}}
                for given, ours in zip(of_one["param_groups"], optimizer.param_groups, strict=True)
            ]
            optimizer.load_state_dict({**of_one, "state": slots, "param_groups": groups})
        self.step = int(values["step"])
        if norms := values.get("norms"):  # checkpoints of older programs have none
            kept = (torch.tensor(norms[name], dtype=torch.float64) for name in ("log_mean", "steps"))
            self.norms = GradientNorms(*kept)


def _laid_out_like(value: Tensor, parameter: Tensor) -> Tensor:
    """A slot of an optimiser with its numbers in memory as the parameter's are, such as channels last.

    Files hold tensors in rows. torch's fused AdamW on a CPU goes through the memory of parameter and slots alike, and
    computes nonsense where their layouts differ (torch 2.13).
    """
    if is_sharded(value) or value.shape != parameter.shape or value.stride() == parameter.stride():
        return value
    return torch.empty_like(parameter, dtype=value.dtype, device=value.device).copy_(value)
