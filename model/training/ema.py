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
        self.decay = decay
        self.tensors: dict[str, Tensor] = {
            name: value.detach().clone() for name, value in module.named_parameters() if value.requires_grad
        }
        device = next(iter(self.tensors.values())).device if self.tensors else None
        self.updates = torch.zeros((), dtype=torch.float64, device=device)

    @torch.no_grad()
    def update(self, module: nn.Module, skipped: Tensor | None = None) -> None:
        """Move the average towards the parameters of `module`, unless the step was `skipped` (a scalar bool).

        The host waits for no device.
        """
        updates = self.updates + 1
        decay = ((1 + updates) / (10 + updates)).clamp(max=self.decay)
        weight = 1 - decay
        if skipped is not None:
            weight, updates = weight.masked_fill(skipped, 0), torch.where(skipped, self.updates, updates)
        self.updates = updates
        values = dict(module.named_parameters())
        for name, tensor in self.tensors.items():
            part(tensor).lerp_(part(values[name].detach()), weight.to(tensor.dtype))

    def state_dict(self) -> dict[str, Any]:
        """`tensors` by name, not copied, and the number of `updates`."""
        return {"tensors": dict(self.tensors), "updates": int(self.updates)}

    @torch.no_grad()
    def load_state_dict(self, values: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave, or its whole tensors.

        Raises KeyError for a tensor that this module does not have.
        """
        for name, value in values["tensors"].items():
            self.tensors[name].copy_(sharded_like(value, self.tensors[name]))
        self.updates.fill_(values["updates"])

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        """Write the average into the parameters of `module`."""
        for name, value in module.named_parameters():
            if name in self.tensors:
                value.copy_(self.tensors[name])
