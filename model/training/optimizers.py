"""The optimisers of a training run, and the learning rate over its steps.

Each takes a step that must not be made from the attribute `found_inf`, a tensor on the device, as torch's fused
optimisers do (`leave_out`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from model.backbones.dit import Backbone
from model.recipes import TrainRecipe
from model.training.grams import Grams
from model.training.muon import Muon


def make_optimizers(backbone: Backbone, recipe: TrainRecipe) -> list[Optimizer]:
    """The recipe's optimiser, and Muon for the matrices inside the blocks when the recipe gives it a learning rate."""
    inner = [p for p in backbone.blocks.parameters() if p.ndim == 2]
    use_muon = recipe.matrix_learning_rate > 0
    held = {id(p) for p in inner} if use_muon else set()
    rest = [p for p in backbone.parameters() if id(p) not in held]
    # Where nothing decays the groups are those of older checkpoints, which know parameters by their places in them.
    spared = [backbone.position] if recipe.weight_decay > 0 else []
    groups = decay_groups(rest, recipe.weight_decay, spared)
    rate, betas = recipe.learning_rate, (0.9, 0.95)
    fused = AdamW(groups, lr=rate, betas=betas, fused=True) if recipe.optimizer == "adamw" else None
    optimizers: list[Optimizer] = [fused or Grams(groups, lr=rate, betas=betas)]
    if use_muon:
        optimizers.append(Muon(inner, lr=recipe.matrix_learning_rate, weight_decay=recipe.weight_decay))
    for optimizer in optimizers:
        _remember_peak(optimizer)
    return optimizers


def adamw(parameters: Iterable[nn.Parameter], learning_rate: float, weight_decay: float, second_beta: float) -> AdamW:
    """AdamW whose weight decay leaves out vectors (biases, norms); `set_learning_rate` knows its peak."""
    optimizer = AdamW(decay_groups(parameters, weight_decay), lr=learning_rate, betas=(0.9, second_beta), fused=True)
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
    """Share of the peak learning rate at a step: a linear rise, a plateau and a fall to 0, linear or as a cosine."""
    rise = min(1.0, step / max(recipe.learning_rate_warmup, 1))
    falling = max(recipe.learning_rate_decay * recipe.steps, 1.0)
    left = min(1.0, (recipe.steps + 1 - step) / falling)
    return rise * (left if recipe.learning_rate_fall == "linear" else (1 - math.cos(math.pi * left)) / 2)


def cosine(share: float) -> float:
    """Share of the peak learning rate at a share of the run, in [0, 1]: from 1 down to 0.01."""
    return 0.01 + 0.99 * (1 + math.cos(math.pi * share)) / 2


def set_learning_rate(optimizer: Optimizer, factor: float) -> None:
    """Set every group to its peak times `factor`."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor


def leave_out(optimizer: Optimizer, skip: Tensor) -> None:
    """Have the next step change nothing where `skip` (a scalar, 0 or 1) is 1; the host does not look at it."""
    optimizer.found_inf = skip  # type: ignore[attr-defined]
