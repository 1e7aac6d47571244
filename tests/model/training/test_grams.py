"""Grams by hand, and as a recipe's optimiser."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from model.backbones.dit import Backbone, BackboneConfig
from model.recipes import train_recipe
from model.settings import override
from model.training.grams import Grams
from model.training.optimizers import make_optimizers

CONFIG = BackboneConfig(channels=3, height=4, width_latent=4, text_dim=10, width=32, depth=1, heads=2, patch=2)


def test_grams_by_hand() -> None:
    """Two steps of two values, one of whose gradients turns round and then is zero (arXiv 2412.17107)."""
    weight = nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
    optimizer = Grams([weight], lr=0.1, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.5)
    expected, mean, square = [1.0, -2.0], [0.0, 0.0], [0.0, 0.0]
    for step, gradient in enumerate([(3.0, -1.0), (-0.5, 0.0)], 1):
        weight.grad = torch.tensor(gradient, dtype=torch.float64)
        optimizer.step()
        for i, g in enumerate(gradient):
            mean[i] = 0.9 * mean[i] + 0.1 * g
            square[i] = 0.99 * square[i] + 0.01 * g * g
            size = abs(mean[i] / (1 - 0.9**step)) / (math.sqrt(square[i] / (1 - 0.99**step)) + 1e-8)
            expected[i] = (1 - 0.1 * 0.5) * expected[i] - 0.1 * size * ((g > 0) - (g < 0))
        assert weight.tolist() == pytest.approx(expected, rel=1e-12)
        assert weight.grad.tolist() == list(gradient)
    assert mean[0] > 0 > -0.5, "Adam would still have gone against the second gradient"


def test_the_recipe_chooses_grams_and_it_comes_back() -> None:
    backbone = Backbone(CONFIG)
    (optimizer,) = make_optimizers(backbone, override(train_recipe("demo"), {"optimizer": "grams"}))
    assert isinstance(optimizer, Grams)
    for parameter in backbone.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    (again,) = make_optimizers(backbone, override(train_recipe("demo"), {"optimizer": "grams"}))
    again.load_state_dict(optimizer.state_dict())
    first = backbone.position
    assert torch.equal(again.state[first]["exp_avg"], optimizer.state[first]["exp_avg"])
    assert int(again.state[first]["step"]) == 1
