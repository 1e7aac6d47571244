"""Slow, independent references for HiPPO-LegS: recurrences step by step and plain quadratures, in extended precision.

Nothing here imports the code under test. `longdouble` has 64 bits of mantissa on x86, enough to judge float64 to 1e-12.
"""

from __future__ import annotations

from functools import cache
from itertools import pairwise

import numpy as np
from scipy.linalg import solve_triangular

Extended = np.longdouble


def basis(r: np.ndarray, order: int) -> np.ndarray:
    """sqrt(2n+1) P_n(2r - 1), (..., order), by Bonnet's recurrence in extended precision."""
    x = 2 * np.asarray(r, dtype=Extended) - 1
    values = [np.ones_like(x), x]
    for n in range(1, order - 1):
        values.append(((2 * n + 1) * x * values[n] - n * values[n - 1]) / (n + 1))
    return np.stack([value * np.sqrt(Extended(2 * n + 1)) for n, value in enumerate(values[:order])], axis=-1)


@cache
def quadrature(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Gauss-Legendre nodes and weights on [0, 1]; numpy's, polished by Newton's method in extended precision."""
    x = np.polynomial.legendre.leggauss(count)[0].astype(Extended)
    for _ in range(3):
        before, value = np.ones_like(x), x.copy()
        for n in range(1, count):
            before, value = value, ((2 * n + 1) * x * value - n * before) / (n + 1)
        slope = count * (before - x * value) / (1 - x * x)
        x = x - value / slope
    return (x + 1) / 2, 1 / ((1 - x * x) * slope * slope)


def matrices(order: int) -> tuple[np.ndarray, np.ndarray]:
    """A and B of LegS, entry by entry, indices from 0 (HiPPO, arXiv 2008.07669, theorem 2)."""
    transition, inlet = np.zeros((order, order)), np.zeros(order)
    for n in range(order):
        inlet[n] = np.sqrt(2 * n + 1)
        for k in range(order):
            if n > k:
                transition[n, k] = np.sqrt((2 * n + 1) * (2 * k + 1))
            elif n == k:
                transition[n, k] = n + 1
    return transition, inlet


def zero_order_hold(count: int, order: int) -> np.ndarray:
    """W (count, order) of the exact zero-order-hold recurrence, frame k constant on ((k-1) T/N, k T/N].

    `c_k = E c_{k-1} + (1 - E) e_0 u_k` with `E = ((k-1)/k)^A`, because A e_0 = B.
    """
    state = np.zeros((order, count))
    for k in range(1, count + 1):
        power = dilation_power(Extended(k - 1) / k, order)
        state = power @ state
        state[:, k - 1] -= power[:, 0]
        state[0, k - 1] += 1
    return state.T


@cache
def dilation_power(ratio: float, order: int) -> np.ndarray:
    """ratio^A (order, order), as `ratio * integral of g_n(ratio y) g_m(y)`: it restricts a path to the shorter window.

    Summed in float64 from factors in extended precision; a test compares it with the matrix exponential.
    """
    nodes, weights = quadrature(order + 1)
    left = ratio * (basis(ratio * nodes, order).T * weights)
    return left.astype(np.float64) @ basis(nodes, order).astype(np.float64)


def bilinear_matrix(count: int, order: int) -> np.ndarray:
    """W (count, order): unit signals through `(1 + A/2k) c_k = (1 - A/2k) c_{k-1} + B u_k / k`."""
    transition, inlet = matrices(order)
    state = np.zeros((order, count))
    for k in range(1, count + 1):
        right = state - transition @ state / (2 * k)
        right[:, k - 1] += inlet / k
        state = solve_triangular(np.eye(order) + transition / (2 * k), right, lower=True)
    return state.T


def forward_euler(frames: np.ndarray, order: int) -> np.ndarray:
    """H (d, order) of arXiv 2502.00500, definition D.3: `H_t = H_{t-1} (I - A/t)^T + u_t B^T / t`; frames (N, d)."""
    transition, inlet = matrices(order)
    state = np.zeros((frames.shape[1], order))
    for t, frame in enumerate(frames, start=1):
        state = state @ (np.eye(order) - transition / t).T + np.outer(frame, inlet) / t
    return state


def projection(signal, edges: np.ndarray, order: int) -> np.ndarray:
    """Coefficients (order,) of a function of r that is a polynomial of degree < 20 on each piece between the edges."""
    nodes, weights = quadrature((order + 20) // 2 + 1)
    total = np.zeros(order, dtype=Extended)
    for left, right in pairwise(edges):
        at = left + (right - left) * nodes
        total += (right - left) * (weights * signal(at)) @ basis(at, order)
    return total
