"""The Grams optimiser (arXiv 2412.17107), which arXiv 2502.00500 trains with."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from model.training.muon import replace
from model.training.sharding import part


class Grams(Optimizer):
    """The gradient decides the direction of every value's step, Adam its size; weight decay is decoupled, before it.

    m = b1 m + (1 - b1) g, v = b2 v + (1 - b2) g^2, both corrected for their start at zero; then
    w = (1 - lr decay) w - lr sign(g) |m / (sqrt(v) + epsilon)|. A value whose gradient is 0 only decays.
    """

    found_inf: Tensor | None = None
    """1 where the next step must change nothing; None for 0."""

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Apply the gradients. closure: computes the loss again, which is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)
        return loss

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state, (first, second), skip = self.state[parameter], group["betas"], self.found_inf
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        held, of_one = part(parameter), part(gradient)
        means, squares = part(state["exp_avg"]), part(state["exp_avg_sq"])
        steps = state["step"] + 1
        mean = torch.lerp(means, of_one, 1 - first)
        square = (squares * second).addcmul_(of_one, of_one, value=1 - second)
        size = mean / (1 - first ** steps.double())
        size.div_((square / (1 - second ** steps.double())).sqrt_().add_(group["eps"])).abs_()
        moved = held * (1 - group["lr"] * group["weight_decay"])
        moved.addcmul_(size, of_one.sign(), value=-group["lr"])
        for old, new in ((held, moved), (means, mean), (squares, square), (state["step"], steps)):
            replace(old, new, skip)
