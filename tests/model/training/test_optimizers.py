"""The learning rate over the steps of a training."""

from __future__ import annotations

import pytest

from model.recipes import train_recipe
from model.settings import override
from model.training.optimizers import cosine, learning_rate_factor


def test_a_run_falls_linearly_or_as_a_cosine() -> None:
    recipe = override(train_recipe("demo"), {"steps": 100, "learning_rate_warmup": 10, "learning_rate_decay": 0.5})
    assert [learning_rate_factor(step, recipe) for step in (5, 10, 50, 76, 101)] == pytest.approx([0.5, 1, 1, 0.5, 0])
    fall = override(recipe, {"learning_rate_fall": "cosine"})
    assert [learning_rate_factor(step, fall) for step in (5, 50, 76, 101)] == pytest.approx([0.5, 1, 0.5, 0])
    assert learning_rate_factor(60, fall) > learning_rate_factor(60, recipe)
    assert learning_rate_factor(95, fall) < learning_rate_factor(95, recipe)


def test_the_cosine_falls_to_a_hundredth() -> None:
    assert cosine(0) == 1
    assert cosine(1) == pytest.approx(0.01)
    assert all(cosine(k / 10) > cosine((k + 1) / 10) for k in range(10))
