"""The basis of HiPPO-LegS on a window, its derivative and its integral, in numpy and in torch.

`g_n(t) = sqrt(2n+1) P_n(2t/T - 1)`, n = 0 .. order-1, is orthonormal under the uniform density on [0, T]
(HiPPO, arXiv 2008.07669, with indices from 0; the basis printed in arXiv 2502.00500 is off by sqrt 2 and its interval).
Everything here takes r = t/T in [0, 1], so that no result can depend on the unit of time.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Float64 = NDArray[np.float64]


def legendre_basis(r: Float64, order: int) -> Float64:
    """g_0 .. g_{order-1} at r (...) in [0, 1], float64 (..., order); the recurrence is stable for any order."""
    x = 2 * r - 1
    values = np.empty((order, *x.shape))
    values[0] = 1
    if order > 1:
        values[1] = x
    for n in range(1, order - 1):
        values[n + 1] = ((2 * n + 1) * x * values[n] - n * values[n - 1]) / (n + 1)
    return np.moveaxis(values, 0, -1) * scales(order)


def legendre_slope(r: Float64, order: int) -> Float64:
    """Derivatives of the basis per unit of r, float64 (..., order): P'_{n+1} = P'_{n-1} + (2n+1) P_n."""
    values = legendre_basis(r, order) / scales(order)
    slopes = np.zeros_like(values)
    for n in range(order - 1):
        slopes[..., n + 1] = (2 * n + 1) * values[..., n]
        if n > 0:
            slopes[..., n + 1] += slopes[..., n - 1]
    return 2 * slopes * scales(order)


def legendre_integral(r: Float64, order: int) -> Float64:
    """Integrals of the basis from 0 to r, float64 (..., order): (P_{n+1} - P_{n-1}) / (2n+1) is the one of P_n."""
    values = legendre_basis(r, order + 1) / scales(order + 1)
    integrals = np.empty((*r.shape, order))
    integrals[..., 0] = r
    n = np.arange(1, order)
    integrals[..., 1:] = (values[..., 2:] - values[..., :-2]) / (2 * (2 * n + 1)) * scales(order)[1:]
    return integrals


def scales(order: int) -> Float64:
    """sqrt(2n+1) for n = 0 .. order-1."""
    return np.sqrt(2.0 * np.arange(order) + 1)


@lru_cache(maxsize=32)
def gauss_legendre(count: int) -> tuple[Float64, Float64]:
    """Nodes and weights on [0, 1], exact for polynomials of degree 2*count - 1."""
    nodes, weights = np.polynomial.legendre.leggauss(count)
    return (nodes + 1) / 2, weights / 2


def basis_torch(r: Tensor, order: int) -> Tensor:
    """The basis at r (...) in [0, 1] as a tensor (..., order) of r's dtype and device, for training.

    With 2r - 1 = cos(phi), `P_n = sum_k a_k a_{n-k} cos((n - 2k) phi)`, a_k = (2k-1)!!/(2k)!!: the weights are positive
    and sum to 1, so one product with a constant matrix is exact to rounding and there is no loop over the order.
    Computed in float64 whatever r's dtype; no gradient flows to r; r outside [0, 1] gives NaN.
    """
    with torch.autocast(r.device.type, enabled=False):
        return (_cosines(r, order) @ _on_device(order, False, r.device)).to(r.dtype)


def derivative_torch(r: Tensor, order: int) -> Tensor:
    """Derivatives of the basis per unit of r at r (...) in [0, 1], (..., order), as `basis_torch`.

    `g'_n = 2 sum over m < n, n-m odd, of sqrt((2n+1)(2m+1)) g_m`, so it is the same product with another matrix.
    """
    with torch.autocast(r.device.type, enabled=False):
        return (_cosines(r, order) @ _on_device(order, True, r.device)).to(r.dtype)


def _cosines(r: Tensor, order: int) -> Tensor:
    at = r.detach().double()
    # A float32 time may lie a rounding outside; further out polynomials explode, so NaN says it loudly.
    at = torch.where((at - 0.5).abs() <= 0.5 + 1e-6, at.clamp(0, 1), torch.nan)
    angle = torch.pi - 2 * torch.asin(at.sqrt())
    return torch.cos(angle.unsqueeze(-1) * torch.arange(order, dtype=torch.float64, device=r.device))


@lru_cache(maxsize=32)
def _on_device(order: int, slope: bool, device: torch.device) -> Tensor:
    matrix = cosine_matrix(order)
    if slope:
        matrix = matrix @ slope_matrix(order).T
    # A cached tensor made inside inference_mode could never take part in training.
    with torch.inference_mode(False):
        return torch.tensor(matrix, dtype=torch.float64, device=device)


def cosine_matrix(order: int) -> Float64:
    """(order, order) float64: row k holds the weight of cos(k phi) in g_n at cos(phi) = 2r - 1."""
    ratio = np.ones(order)
    for k in range(1, order):
        ratio[k] = ratio[k - 1] * (2 * k - 1) / (2 * k)
    matrix = np.zeros((order, order))
    for n in range(order):
        multiples = np.abs(n - 2 * np.arange(n + 1))
        np.add.at(matrix[:, n], multiples, ratio[: n + 1] * ratio[n::-1])
    return matrix * scales(order)


def slope_matrix(order: int) -> Float64:
    """(order, order) float64: g' = slope_matrix @ g, per unit of r."""
    n, m = np.indices((order, order))
    return np.where((n > m) & ((n - m) % 2 == 1), 2 * np.outer(scales(order), scales(order)), 0.0)
