"""Distances of paths of latents over the times of a clip.

The distance of two paths is the root mean square of their difference over time and over a frame's latents. Read at the
nodes of Gauss-Legendre quadrature and weighted, paths become rows whose Euclidean distance it is: exact for the curves
of HiPPO-LegS coefficients, where it equals the coefficients' own distance, since their basis is orthonormal.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.legs.basis import gauss_legendre


def quadrature(order: int, start: float = 0.0) -> tuple[NDArray[np.float64], Tensor]:
    """Times (order,) in [start, 1] and weights (order,) that sum to 1: exact means of products of two curves of this
    order. Start lies in [0, 1)."""
    nodes, weights = gauss_legendre(order)
    return start + (1 - start) * nodes, torch.from_numpy(weights).float()


def path_rows(values: Tensor, weights: Tensor) -> Tensor:
    """Paths (K, N, ...) at the quadrature's times as rows (N, D): the Euclidean distance of two is the paths'."""
    scale = (weights.to(values) / values[0, 0].numel()).sqrt()
    return (values.flatten(2) * scale[:, None, None]).transpose(0, 1).flatten(1)


def distances(first: Tensor, second: Tensor) -> Tensor:
    """(N, M) distances of rows (N, D) and (M, D), without the rounding of the product form near 0."""
    return torch.cdist(first, second, compute_mode="donot_use_mm_for_euclid_dist")


def mean_pairwise(rows: Tensor) -> float:
    """Mean distance over all pairs of rows (N, D), N >= 2; NaN for fewer."""
    return float(torch.pdist(rows).mean())
