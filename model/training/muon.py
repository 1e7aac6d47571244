"""Muon for the matrices inside the blocks (Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural nets").

torch has one too, but it can leave out no step on the device, keeps no sharded matrices, and iterates in bfloat16 on
processors that have no fast one. The state and the settings have torch's names, so its checkpoints are read.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from model.training.sharding import part, sharded_like, whole

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the odd quintic polynomial that takes singular values in (0, 1] to about 1: steep at 0, not quite still at 1."""
ITERATIONS = 5
"""How often it is applied."""
EPSILON = 1e-7
"""Smallest norm that a gradient is divided by."""


class Muon(Optimizer):
    """Momentum B = b B + (1 - b) g, with Nesterov's look-ahead; the step is the nearest orthogonal matrix to it.

    w = (1 - lr decay) w - 0.2 sqrt(max(rows, columns)) lr O: the factor gives a step the size of AdamW's (arXiv
    2502.16982, equation 4). A sharded matrix is gathered for its iteration, which every process does for itself.
    """

    found_inf: Tensor | None = None
    """1 where the next step must change nothing; None for 0."""

    def __init__(
        self, params: Iterable[Tensor], lr: float = 1e-3, weight_decay: float = 0.1, momentum: float = 0.95
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Apply the gradients."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state, momentum = self.state[parameter], group["momentum"]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        buffer = torch.lerp(state["momentum_buffer"], gradient, 1 - momentum)
        direction = orthogonal(whole(torch.lerp(gradient, buffer, momentum)))
        size = 0.2 * math.sqrt(max(direction.shape)) * group["lr"]
        local = part(parameter)
        moved = local * (1 - group["lr"] * group["weight_decay"])
        moved.add_(part(sharded_like(direction, parameter)), alpha=-size)
        replace(local, moved, self.found_inf)
        replace(part(state["momentum_buffer"]), part(buffer), self.found_inf)


def replace(held: Tensor, by: Tensor, skip: Tensor | None) -> None:
    """Write a tensor over another, except where `skip` (a scalar) is 1; the host does not look at it."""
    held.copy_(by if skip is None else torch.where(skip > 0, held, by))


def orthogonal(matrix: Tensor) -> Tensor:
    """About the nearest (semi-)orthogonal matrix, by Newton-Schulz iterations: singular values of 0.5 to 1.5.

    In bfloat16 on a GPU, in the matrix's own type elsewhere; the result has the matrix's type.
    """
    a, b, c = COEFFICIENTS
    turned = matrix.shape[0] > matrix.shape[1]
    x = (matrix.T if turned else matrix).to(torch.bfloat16 if matrix.is_cuda else matrix.dtype)
    x = x / x.norm().clamp(min=EPSILON)
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.T if turned else x).to(matrix.dtype)
