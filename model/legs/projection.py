"""HiPPO-LegS as one matrix: frames at real times in, coefficients of a polynomial path through the window out.

The coefficients H are linear in the frames, `H = W^T U`. W depends on the times, the window, the order and the method
alone; it is computed once per time grid in float64, and a clip's projection is one matrix product. Methods:

* `hold`: exact LegS of the piecewise-constant signal whose cells end midway between neighbouring times;
* `linear`, `cubic`: exact LegS of the piecewise-linear interpolant and of the natural cubic spline, with the end
  values held before the first time and after the last;
* `lstsq`: least squares on the times, `(M G)^+ (M u)` of arXiv 2502.00500, Lemma F.3; ill-conditioned at high order;
* `bilinear`, `paper`: the recurrences of the HiPPO code and of arXiv 2502.00500, for comparison, at uniform times.
"""

from __future__ import annotations

import math
import operator
import warnings
from functools import lru_cache
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from model.legs.basis import (
    Float64,
    gauss_legendre,
    legendre_basis,
    legendre_integral,
    legendre_slope,
    scales,
)
from model.legs.product import product

METHODS = ("hold", "linear", "cubic", "lstsq", "bilinear", "paper")
Values = TypeVar("Values", NDArray[np.generic], Tensor)


def projection_matrix(
    times: ArrayLike, duration: float, order: int, method: str = "cubic", *, ridge: float = 0.0, outside: bool = False
) -> Float64:
    """The matrix W (N, order), float64, read-only, with `H = W^T U`; cached per time grid.

    Args:
        times: (N,) seconds in the window, strictly increasing, any spacing, N >= 1.
        duration: length T of the window in seconds.
        order: number of coefficients, >= 1. Every method but `lstsq` is stable or, if `paper`, warns.
        method: one of METHODS. Where neighbouring gaps differ more than threefold, `cubic` amplifies noise 11 to 21
            times: use `linear` there.
        ridge: for `lstsq`, the penalty on the mean square of H beside the mean square error at the times; >= 0.
        outside: lets times lie outside [0, duration] for `hold`, `linear` and `cubic`: such frames enter the
            interpolant, which is then projected on the window alone. They tame the ends of the path.

    Raises:
        ValueError: bad times, duration, order, method or ridge; the message names the argument and its value.

    Warns:
        UserWarning: for `paper` always (it diverges), for `lstsq` without ridge beyond order 2 sqrt(N).
    """
    if method not in METHODS:
        raise ValueError(f"method is {method!r}; it must be one of {', '.join(METHODS)}")
    if not (math.isfinite(ridge) and ridge >= 0) or (ridge > 0 and method != "lstsq"):
        raise ValueError(
            f"ridge is {ridge} with method {method!r}; it is a finite number >= 0 and only lstsq takes one"
        )
    if outside and method not in ("hold", "linear", "cubic"):
        raise ValueError(f"outside is True with method {method!r}; only hold, linear and cubic take outside frames")
    seconds = checked_times("times", times, duration, outside=outside, increasing=True)
    count, order = len(seconds), _checked_order(order)
    if method == "paper":
        warnings.warn(
            "method 'paper' is for comparison: its forward-Euler recurrence diverges at order > 16", stacklevel=2
        )
    if method == "lstsq" and ridge == 0 and order > 2 * math.sqrt(count):
        warnings.warn(
            f"method 'lstsq' with order {order} and {count} frames is ill-conditioned: keep the order below "
            f"{2 * math.sqrt(count):.0f} (2 sqrt N), set ridge, or use 'cubic'",
            stacklevel=2,
        )
    return _cached_matrix((seconds / duration).tobytes(), order, method, float(ridge))


def project(latents: Values, matrix: Float64 | Tensor, *, check: bool = True) -> Values:
    """Coefficients of a clip or of a batch of clips: one matrix product.

    Args:
        latents: (N, ...) with a matrix (N, order), or (B, N, ...) with a matrix (B, N, order), where absent frames are
            finite (0). numpy or torch, any device. float64 is computed in float64, all else in float32.
        matrix: from `projection_matrix`, or a stack of those; a tensor on the latents' device saves the copy.
        check: refuse frames that are not finite. On a GPU this waits for the result, so hot loops may turn it off.

    Returns:
        (order, ...) or (B, order, ...), float64 for float64 latents and float32 for all others.

    Raises:
        ValueError: shapes that do not fit, or frames that are not finite.
    """
    frames: int = matrix.ndim - 1
    shape: tuple[int, ...] = tuple(latents.shape)
    if matrix.ndim not in (2, 3) or shape[:frames] != tuple(matrix.shape[:-1]):
        raise ValueError(
            f"latents of shape {shape} do not fit a matrix of shape {tuple(matrix.shape)}; "
            "it takes (N, ...) with (N, order), or (B, N, ...) with (B, N, order)"
        )
    flat = latents.reshape(*shape[:frames], math.prod(shape[frames:]))
    with np.errstate(invalid="ignore", over="ignore"):  # what is not finite is refused by name, below
        coefficients = product(matrix.swapaxes(-1, -2), flat)
        # A frame that is not finite spoils every order (0 times NaN is NaN), so the first order alone tells.
        if check and not _all_finite(coefficients[..., 0, :]):
            _refuse_frames(latents, frames)
    return coefficients.reshape(*shape[: frames - 1], int(matrix.shape[-1]), *shape[frames:])


def evaluate(coefficients: Values, times: ArrayLike, duration: float) -> Values:
    """The path at `times`: (order, ...) to (L, ...), at any times of the window, in any sequence.

    Args:
        coefficients: (order, ...), numpy or torch; float64 is computed in float64, all else in float32.
        times: (L,) seconds in [0, duration]; outside, polynomials explode, so it is refused.
        duration: length of the window in seconds.

    Raises:
        ValueError: times outside the window or not finite, or no coefficients.
    """
    return _read(coefficients, basis(times, duration, _order_of(coefficients)))


def derivative(coefficients: Values, times: ArrayLike, duration: float) -> Values:
    """The path's derivative per second at `times`, (L, ...); arguments and errors of `evaluate`."""
    return _read(coefficients, basis_derivative(times, duration, _order_of(coefficients)))


def basis(times: ArrayLike, duration: float, order: int) -> Float64:
    """g_0 .. g_{order-1} at `times`, float64 (L, order); times are seconds in [0, duration], in any sequence."""
    seconds = checked_times("times", times, duration)
    return legendre_basis(seconds / duration, _checked_order(order))


def basis_derivative(times: ArrayLike, duration: float, order: int) -> Float64:
    """Derivatives of the basis per second at `times`, float64 (L, order)."""
    seconds = checked_times("times", times, duration)
    return legendre_slope(seconds / duration, _checked_order(order)) / duration


def recurrence_matrices(order: int) -> tuple[Float64, Float64]:
    """A (order, order) and B (order,) of LegS with indices from 0: dH/dt = (-A H + B u) / t."""
    row, column = np.indices((order, order))
    roots = scales(order)
    return np.where(row > column, np.outer(roots, roots), 0.0) + np.diag(np.arange(order) + 1.0), roots


# -- the methods; r = t/T throughout -----------------------------------------------------------------------------------


@lru_cache(maxsize=256)
def _cached_matrix(grid: bytes, order: int, method: str, ridge: float) -> Float64:
    r = np.frombuffer(grid)
    match method:
        case "hold":
            matrix = _hold(r, order)
        case "linear":
            matrix = _interpolant(r, order, smooth=False)
        case "cubic":
            matrix = _interpolant(r, order, smooth=True)
        case "lstsq":
            matrix = _least_squares(r, order, ridge)
        case _:
            matrix = _recurrence(r, order, method)
    matrix.setflags(write=False)
    return matrix


def _hold(r: Float64, order: int) -> Float64:
    edges = np.concatenate([[0.0], np.clip((r[:-1] + r[1:]) / 2, 0, 1), [1.0]])
    return np.diff(legendre_integral(edges, order), axis=0)


def _interpolant(r: Float64, order: int, smooth: bool) -> Float64:
    """Integrals of g_n against the interpolant's cardinal functions, by Gauss-Legendre, exact on every piece."""
    matrix = np.zeros((len(r), order))
    curvature = np.zeros((len(r), order))  # the same for the second derivatives at the knots
    nodes, weights = gauss_legendre(order // 2 + 2)
    gaps, left, right = np.diff(r), np.clip(r[:-1], 0, 1), np.clip(r[1:], 0, 1)
    block = max(1, 2**20 // (len(nodes) * order))  # bounds the memory: 8 MiB of basis values at once
    for first in range(0, len(gaps), block):
        piece = slice(first, first + block)
        following = slice(first + 1, first + 1 + len(gaps[piece]))
        gap, width = gaps[piece, None], (right - left)[piece, None]
        at = left[piece, None] + width * nodes  # (pieces, nodes)
        after = (at - r[:-1][piece, None]) / gap
        before = 1 - after
        shapes = [before, after]
        if smooth:
            shapes += [gap**2 * (before**3 - before) / 6, gap**2 * (after**3 - after) / 6]
        integrals = (np.stack(shapes, axis=1) * (width * weights)[:, None]) @ legendre_basis(at, order)
        matrix[piece][: len(gap)] += integrals[:, 0]
        matrix[following] += integrals[:, 1]
        if smooth:
            curvature[piece][: len(gap)] += integrals[:, 2]
            curvature[following] += integrals[:, 3]
    if smooth:
        matrix += _natural_curvature(gaps).T @ curvature
    start, end = legendre_integral(np.clip(r[[0, -1]], 0, 1), order)
    matrix[0] += start
    matrix[-1] += legendre_integral(np.ones(1), order)[0] - end
    return matrix


def _natural_curvature(gaps: Float64) -> Float64:
    """(N, N): second derivatives of the natural cubic spline at its knots, from the values there."""
    count = len(gaps) + 1
    curvature = np.zeros((count, count))
    if count > 2:
        inner = np.arange(count - 2)
        system = np.diag(2 * (gaps[:-1] + gaps[1:])) + np.diag(gaps[1:-1], 1) + np.diag(gaps[1:-1], -1)
        kinks = np.zeros((count - 2, count))
        kinks[inner, inner] = 6 / gaps[:-1]
        kinks[inner, inner + 1] = -6 / gaps[:-1] - 6 / gaps[1:]
        kinks[inner, inner + 2] = 6 / gaps[1:]
        curvature[1:-1] = np.linalg.solve(system, kinks)
    return curvature


def _least_squares(r: Float64, order: int, ridge: float) -> Float64:
    design = legendre_basis(r, order)
    if ridge == 0:
        return np.ascontiguousarray(np.linalg.pinv(design).T)
    # A stacked system keeps the condition number that the normal equations would square.
    stacked = np.concatenate([design / math.sqrt(len(r)), math.sqrt(ridge) * np.eye(order)])
    inverse: Float64 = np.linalg.pinv(stacked)
    return np.ascontiguousarray(inverse[:, : len(r)].T) / math.sqrt(len(r))


def _recurrence(r: Float64, order: int, method: str) -> Float64:
    """The textbook recurrences, run on the unit signals; step k = 1 .. N divides by k."""
    gaps = np.diff(r)
    if len(gaps) and np.ptp(gaps) > 1e-6 * gaps.mean():
        raise ValueError(
            f"times have gaps from {gaps.min():.6g} to {gaps.max():.6g} of the window; method {method!r} takes uniform "
            "times only, use 'cubic' or 'linear'"
        )
    transition, inlet = recurrence_matrices(order)
    identity, count = np.eye(order), len(r)
    state: Float64 = np.zeros((order, count))
    for k in range(1, count + 1):
        implicit = 0.5 if method == "bilinear" else 0.0
        state = state - (1 - implicit) / k * (transition @ state)
        state[:, k - 1] += inlet / k
        if implicit:
            state = np.asarray(np.linalg.solve(identity + implicit / k * transition, state), dtype=np.float64)
    return np.ascontiguousarray(state.T)


# -- checks and products -----------------------------------------------------------------------------------------------


def checked_times(
    name: str, times: ArrayLike, duration: float, *, outside: bool = False, increasing: bool = False
) -> Float64:
    """`times` as float64 (N,), or a ValueError that names the argument and the first bad value.

    A time that misses the window by rounding (1e-9 of it) is moved to its end.
    """
    if not (isinstance(duration, (int, float, np.number)) and math.isfinite(duration) and duration > 0):
        raise ValueError(f"duration is {duration!r}; it must be a finite number of seconds above 0")
    seconds = np.atleast_1d(np.asarray(times.cpu() if isinstance(times, Tensor) else times, dtype=np.float64))
    if seconds.ndim != 1 or (increasing and len(seconds) == 0):
        raise ValueError(f"{name} has the shape {seconds.shape}; it must be a list of at least one time")
    if not np.isfinite(seconds).all():
        index = int(np.argmin(np.isfinite(seconds)))
        raise ValueError(f"{name}[{index}] is {seconds[index]}; every time must be finite")
    bad = (seconds < -1e-9 * duration) | (seconds > (1 + 1e-9) * duration)
    if bad.any() and not outside:
        index = int(np.argmax(bad))
        raise ValueError(f"{name}[{index}] is {seconds[index]} s, outside the window from 0 to {duration} s")
    if not outside:
        seconds = np.clip(seconds, 0, duration)
    if increasing and len(seconds) > 1 and np.diff(seconds).min() <= 0:
        index = int(np.argmax(np.diff(seconds) <= 0))
        raise ValueError(
            f"{name}[{index + 1}] is {seconds[index + 1]} s, not after {name}[{index}], {seconds[index]} s; "
            "times must strictly increase"
        )
    return seconds


def _checked_order(order: int) -> int:
    try:
        value = 0 if isinstance(order, bool) else operator.index(order)
    except TypeError:
        value = 0
    if value < 1:
        raise ValueError(f"order is {order!r}; it must be a whole number of at least 1")
    return value


def _order_of(coefficients: NDArray[np.generic] | Tensor) -> int:
    if coefficients.ndim < 1 or coefficients.shape[0] < 1:
        raise ValueError(
            f"coefficients have the shape {tuple(coefficients.shape)}; it must be (order, ...), order >= 1"
        )
    return int(coefficients.shape[0])


def _read(coefficients: Values, matrix: Float64) -> Values:
    shape: tuple[int, ...] = tuple(coefficients.shape)
    values = product(matrix, coefficients.reshape((shape[0], math.prod(shape[1:]))))
    return values.reshape((len(matrix), *shape[1:]))


def _all_finite(values: NDArray[np.generic] | Tensor) -> bool:
    if isinstance(values, Tensor) and values.device.type != "cpu":
        return bool(torch.isfinite(values).all())
    # numpy's is one pass, fifteen times faster than torch's on a CPU.
    return bool(np.isfinite(values.detach().numpy() if isinstance(values, Tensor) else values).all())


def _refuse_frames(latents: NDArray[np.generic] | Tensor, frames: int) -> None:
    flat = latents.float().cpu().numpy() if isinstance(latents, Tensor) else latents
    finite = np.isfinite(flat.reshape((*flat.shape[:frames], -1))).all(axis=-1)
    where = ", ".join(str(int(i)) for i in np.unravel_index(int(np.argmin(finite)), finite.shape))
    if finite.all():
        raise ValueError("latents are finite but their projection is not: they are too large for their dtype")
    raise ValueError(f"latents[{where}] holds values that are not finite ({int((~finite).sum())} such frames)")
