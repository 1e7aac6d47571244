"""Distances of paths against sums over a fine grid of times."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from model import legs
from model.metrics.paths import distances, mean_pairwise, path_rows, quadrature

ORDER = 5


def curves(start: float) -> tuple[np.ndarray, torch.Tensor]:
    """Coefficients (4, ORDER, 2, 3, 3) and the curves' rows over [start, 1]."""
    coefficients = np.random.default_rng(0).standard_normal((4, ORDER, 2, 3, 3))
    times, weights = quadrature(ORDER, start)
    values = np.stack([legs.evaluate(c, times, 1.0) for c in coefficients], axis=1)
    return coefficients, path_rows(torch.from_numpy(values), weights.double())


@pytest.mark.parametrize("start", [0.0, 0.5])
def test_the_distance_is_the_rms_over_time_and_latents(start: float) -> None:
    coefficients, rows = curves(start)
    assert rows.shape == (4, ORDER * 18)
    times = start + (1 - start) * (np.arange(20_000) + 0.5) / 20_000
    first, second = (legs.evaluate(coefficients[k], times, 1.0) for k in (0, 3))
    expected = math.sqrt(np.square(first - second).mean())
    assert float(distances(rows[:1], rows[3:])) == pytest.approx(expected, rel=1e-5)


def test_over_the_whole_clip_it_is_the_coefficients_own_distance() -> None:
    coefficients, rows = curves(0.0)
    expected = np.sqrt(np.square(coefficients[:, None] - coefficients[None]).sum(axis=2).mean(axis=(2, 3, 4)))
    np.testing.assert_allclose(distances(rows, rows).numpy(), expected, atol=1e-6)
    pairs = [expected[i, j] for i in range(4) for j in range(i)]
    assert mean_pairwise(rows) == pytest.approx(np.mean(pairs))
    assert math.isnan(mean_pairwise(rows[:1]))


def test_a_path_that_is_no_polynomial_is_compared_at_the_nodes() -> None:
    times, weights = quadrature(ORDER)
    values = torch.from_numpy(np.stack([np.sign(times - 0.5), np.zeros(ORDER)], axis=1)).reshape(ORDER, 2, 1, 1, 1)
    rows = path_rows(values, weights.double())
    middle = float(weights[times == 0.5].sum())  # sign(0) is 0
    assert mean_pairwise(rows) == pytest.approx(math.sqrt(1 - middle), rel=1e-6)
