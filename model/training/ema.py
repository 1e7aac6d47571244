"""Exponential moving average of a module's parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from model.training.sharding import part, sharded_like


class MovingAverage:
    """Average of the parameters of `module`, updated after each step; sharded where they are.

    The decay rises with the number of updates n as (1 + n) / (10 + n) until it reaches `decay`, so that the first,
    random weights are forgotten at once.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"ema_decay is {decay}; it must be in [0, 1)")
        self.decay, self.updates = decay, 0
        self.tensors: dict[str, Tensor] = {
            name: value.detach().clone() for name, value in module.named_parameters() if value.requires_grad
        }

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Move the average towards the parameters of `module`."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        values = dict(module.named_parameters())
        ours = [part(tensor) for tensor in self.tensors.values()]
        theirs = [part(values[name].detach()) for name in self.tensors]
        torch._foreach_lerp_(ours, theirs, 1 - decay)

    def state_dict(self) -> dict[str, Any]:
        """`tensors` by name, not copied, and the number of `updates`."""
        return {"tensors": dict(self.tensors), "updates": self.updates}

    @torch.no_grad()
    def load_state_dict(self, values: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave, or its whole tensors.

        Raises KeyError for a tensor that this module does not have.
        """
        for name, value in values["tensors"].items():
            self.tensors[name].copy_(sharded_like(value, self.tensors[name]))
        self.updates = int(values["updates"])

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        """Write the average into the parameters of `module`."""
        for name, value in module.named_parameters():
            if name in self.tensors:
                value.copy_(self.tensors[name])
