"""The optimisers of a training run, the learning rate over its steps, and how a step's gradients are applied."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer

from model.backbones.dit import Backbone
from model.recipes import TrainRecipe
from model.training.grams import Grams
from model.training.processes import Processes
from model.training.sharding import whole
from model.training.state import TrainingState

SPIKE = "the gradient's norm is more than {:g} times its running mean"
"""Why a step is skipped."""


def make_optimizers(backbone: Backbone, recipe: TrainRecipe) -> list[Optimizer]:
    """The recipe's optimiser, and Muon for the matrices inside the blocks when the recipe gives it a learning rate."""
    inner = [p for p in backbone.blocks.parameters() if p.ndim == 2]
    use_muon = recipe.matrix_learning_rate > 0
    held = {id(p) for p in inner} if use_muon else set()
    rest = [p for p in backbone.parameters() if id(p) not in held]
    # Where nothing decays the groups are those of older checkpoints, which know parameters by their places in them.
    spared = [backbone.position] if recipe.weight_decay > 0 else []
    groups = decay_groups(rest, recipe.weight_decay, spared)
    kind = Grams if recipe.optimizer == "grams" else AdamW
    optimizers: list[Optimizer] = [kind(groups, lr=recipe.learning_rate, betas=(0.9, 0.95))]
    if use_muon:
        optimizers.append(
            Muon(
                inner,
                lr=recipe.matrix_learning_rate,
                weight_decay=recipe.weight_decay,
                adjust_lr_fn="match_rms_adamw",
            )
        )
    for optimizer in optimizers:
        _remember_peak(optimizer)
    return optimizers


def adamw(parameters: Iterable[nn.Parameter], learning_rate: float, weight_decay: float, second_beta: float) -> AdamW:
    """AdamW whose weight decay leaves out vectors (biases, norms); `set_learning_rate` knows its peak."""
    optimizer = AdamW(decay_groups(parameters, weight_decay), lr=learning_rate, betas=(0.9, second_beta))
    _remember_peak(optimizer)
    return optimizer


def decay_groups(
    parameters: Iterable[nn.Parameter], weight_decay: float, spared: Iterable[nn.Parameter] = ()
) -> list[dict[str, Any]]:
    """Two groups of an optimiser: matrices, which decay, and vectors (biases, norms) and the `spared`, which do not."""
    free = {id(p) for p in spared}
    held = [(p, p.ndim > 1 and id(p) not in free) for p in parameters]
    return [
        {"params": [p for p, decays in held if decays], "weight_decay": weight_decay},
        {"params": [p for p, decays in held if not decays], "weight_decay": 0.0},
    ]


def _remember_peak(optimizer: Optimizer) -> None:
    for group in optimizer.param_groups:
        group["peak"] = group["lr"]


def learning_rate_factor(step: int, recipe: TrainRecipe) -> float:
    """Share of the peak learning rate at a step: a linear rise, a plateau and a linear fall to 0."""
    rise = min(1.0, step / max(recipe.learning_rate_warmup, 1))
    falling = max(recipe.learning_rate_decay * recipe.steps, 1.0)
    return rise * min(1.0, (recipe.steps + 1 - step) / falling)


def cosine(share: float) -> float:
    """Share of the peak learning rate at a share of the run, in [0, 1]: from 1 down to 0.01."""
    return 0.01 + 0.99 * (1 + math.cos(math.pi * share)) / 2


def set_learning_rate(optimizer: Optimizer, factor: float) -> None:
    """Set every group to its peak times `factor`."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor


class Update(NamedTuple):
    """What became of a step."""

    applied: bool
    """Whether weights, average and optimisers moved; the same in all processes."""
    reason: str
    """Why they did not; empty where they did."""
    stop: bool
    """Whether any process was asked to stop."""
    gradient_norm: Tensor
    """Norm of all gradients before they were clipped, a scalar."""


@dataclass
class Updates:
    """Applies gradients to the state of a training; a step that is not finite, or a spike, changes nothing of it.

    A spike is a gradient norm above `spike_factor` times its running mean (`GradientNorms`).

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
    in_a_row: int = 0
    """Steps skipped since the last one that was applied."""
    skipped: int = 0
    """Steps skipped altogether."""

    def __post_init__(self) -> None:
        if self.allowed < 0:
            raise ValueError(f"bad_steps_allowed is {self.allowed}; it must be 0 or more")

    def apply(self, step: int, loss: Tensor, stop: bool = False) -> Update:
        """Clip the gradients that the loss (a scalar) left, and apply them where both are finite in every process.

        stop: whether this process was asked to stop; it travels along.

        On a GPU the host waits here once a step, until the gradients are there: the optimisers decide on the host
        whether they step (their counts of steps are no tensors, and Muon has no `found_inf`). What that costs is the
        launch of the optimisers' first kernels; forward and backward are not held up.

        Raises:
            FloatingPointError: more than `allowed` steps in a row were skipped; raised in all processes alike.
        """
        parameters = [p for p in self.state.network.parameters() if p.grad is not None]
        norm = whole(nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])).detach()
        nn.utils.clip_grads_with_norm_(parameters, self.clip, norm)
        loss = loss.detach()
        finite = torch.isfinite(loss) & torch.isfinite(norm)
        spike = self.state.norms.spikes(norm, self.spike_factor)
        # Gradients are averages over the processes and their norm the same in all, but the loss is not.
        bad, spiked, stop = self.processes.any(~finite, spike, stop)
        reason = "the loss or its gradient is not finite" if bad else SPIKE.format(self.spike_factor) if spiked else ""
        for optimizer in self.state.optimizers:
            if not reason:
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if not reason:
            self.in_a_row = 0
            self.state.average.update(self.state.network)
            self.state.norms.add(norm)
            return Update(True, "", stop, norm)
        self.in_a_row += 1
        self.skipped += 1
        if self.in_a_row > self.allowed:
            raise FloatingPointError(
                f"{reason} at step {step} (here {float(loss):.3g} and a norm of "
                f"{float(norm):.3g}), {self.in_a_row} steps in a row where {self.allowed} are allowed; the last good "
                f"checkpoint stays in {self.root}: start another run with a lower learning rate"
            )
        return Update(False, reason, stop, norm)
