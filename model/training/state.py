"""The state of a training: all that a step changes, as one object that a checkpoint writes and reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer

from model.training.ema import MovingAverage


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

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values, not copied."""
        return {
            "network": self.network.state_dict(),
            "average": self.average.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
        }

    def load_state_dict(self, values: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave.

        Raises:
            KeyError, RuntimeError, ValueError: it is of another network or of other optimisers.
        """
        self.network.load_state_dict(values["network"])
        self.average.load_state_dict(values["average"])
        for optimizer, of_one in zip(self.optimizers, values["optimizers"], strict=True):
            optimizer.load_state_dict(of_one)
        self.step = int(values["step"])
