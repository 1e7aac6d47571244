"""A clip as the curve m(r) of its HiPPO-LegS coefficients, r in [0, 1], and what a method measures of all clips."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from model.legs import basis_torch, derivative_torch
from model.methods.base import Clip
from model.spread import spread_in_runs


def curve(coefficients: Tensor, flow_time: Tensor) -> tuple[Tensor, Tensor]:
    """m(r) and m'(r), per unit of r, of clips (B, order, C, h, w) at (B, K) times in [0, 1]: each (B, K, C, h, w)."""
    order = coefficients.shape[1]
    flat = coefficients.flatten(2)
    shape = (*flow_time.shape, *coefficients.shape[2:])
    with torch.autocast(flat.device.type, enabled=False):  # high orders cancel; 8 bits do not carry them
        return (
            torch.bmm(basis_torch(flow_time, order).to(flat.dtype), flat).view(shape),
            torch.bmm(derivative_torch(flow_time, order).to(flat.dtype), flat).view(shape),
        )


RUN = 16
"""Clips in a row that are measured: neighbours are in one shard, and of a large dataset few shards are then opened."""


def curve_scales(clips: Sequence[Clip], order: int, most: int = 1024) -> tuple[float, float]:
    """Root mean squares of m(r) and m'(r) over r in [0, 1] and over clips (`most` in evenly spread runs).

    Exact for each clip: the basis is orthonormal, so the mean square of a curve is the sum of its squared coefficients,
    and Gauss-Legendre quadrature of the derivative is exact for polynomials.
    """
    chosen = spread_in_runs(range(len(clips)), most, RUN)
    nodes, weights = np.polynomial.legendre.leggauss(order + 1)
    at = torch.from_numpy((nodes + 1) / 2)
    gram = torch.from_numpy(weights / 2)
    slopes = derivative_torch(at, order)  # (nodes, order)
    gram_matrix = (slopes.T * gram) @ slopes  # (order, order): integral of g'_n g'_m
    values = torch.zeros(2, dtype=torch.float64)
    for index in chosen:
        flat = torch.from_numpy(clips[index].members["coefficients"].astype(np.float64)).flatten(1)
        energy = flat @ flat.T / flat.shape[1]
        values += torch.stack([energy.trace(), (gram_matrix * energy).sum()])
    mean, derivative = (values / len(chosen)).sqrt().tolist()
    return max(mean, 1e-6), max(derivative, 1e-6)
