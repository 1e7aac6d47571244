"""The optimisers of a training run, and the learning rate over its steps."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from torch.optim import AdamW, Muon, Optimizer

from model.dit import Backbone
from model.recipes import TrainRecipe


def make_optimizers(backbone: Backbone, recipe: TrainRecipe) -> list[Optimizer]:
    """AdamW, and Muon for the matrices inside the blocks when the recipe gives it a learning rate."""
    inner = [p for p in backbone.blocks.parameters() if p.ndim == 2]
    use_muon = recipe.matrix_learning_rate > 0
    held = {id(p) for p in inner} if use_muon else set()
    rest = [p for p in backbone.parameters() if id(p) not in held]
    optimizers: list[Optimizer] = [adamw(rest, recipe.learning_rate, recipe.weight_decay, 0.95)]
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
    held = list(parameters)
    groups = [
        {"params": [p for p in held if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in held if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = AdamW(groups, lr=learning_rate, betas=(0.9, second_beta))
    _remember_peak(optimizer)
    return optimizer


def _remember_peak(optimizer: Optimizer) -> None:
    for group in optimizer.param_groups:
        group["peak"] = group["lr"]


def learning_rate_factor(step: int, recipe: TrainRecipe) -> float:
    """Share of the peak learning rate at a step: a linear rise, a plateau and a linear fall to 0."""
    rise = min(1.0, step / max(recipe.learning_rate_warmup, 1))
    falling = max(recipe.learning_rate_decay * recipe.steps, 1.0)
    return rise * min(1.0, (recipe.steps + 1 - step) / falling)


def set_learning_rate(optimizer: Optimizer, factor: float) -> None:
    """Set every group to its peak times `factor`."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor
