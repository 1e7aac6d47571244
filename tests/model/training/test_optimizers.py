"""The learning rate over the steps of a training."""

from __future__ import annotations

import pytest

from model.training.optimizers import cosine


def test_the_cosine_falls_to_a_hundredth() -> None:
    assert cosine(0) == 1
    assert cosine(1) == pytest.approx(0.01)
    assert all(cosine(k / 10) > cosine((k + 1) / 10) for k in range(10))
