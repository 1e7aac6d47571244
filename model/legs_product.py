"""The product behind projection and readout: a small matrix times frames, at full speed and full precision."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.legs_basis import Float64

Values = TypeVar("Values", NDArray[np.generic], Tensor)


def product(matrix: Float64 | Tensor, values: Values) -> Values:
    """matrix (..., s, N) @ values (..., N, d), float64 for float64 values, else float32, whatever autocast says."""
    if isinstance(values, Tensor):
        dtype = torch.float64 if values.dtype == torch.float64 else torch.float32
        if values.device.type == "cpu" and isinstance(matrix, np.ndarray) and not _needs_gradient(values):
            return torch.from_numpy(_narrow_product(matrix, values.detach().to(dtype).numpy()))
        left = matrix if isinstance(matrix, Tensor) else torch.tensor(matrix)
        with torch.autocast(values.device.type, enabled=False):
            return left.to(values.device, dtype) @ values.to(dtype)
    kind = np.float64 if values.dtype == np.float64 else np.float32
    left_array = matrix.cpu().numpy() if isinstance(matrix, Tensor) else matrix
    return _narrow_product(left_array, values.astype(kind, copy=False))


def _needs_gradient(values: Tensor) -> bool:
    return torch.is_grad_enabled() and values.requires_grad


def _narrow_product(matrix: NDArray[np.generic], values: NDArray[np.generic]) -> NDArray[np.generic]:
    """matrix (s, N) @ values (N, d) for small s and N and a long d, in blocks of d that stay in the cache.

    In one call OpenBLAS packs the whole of `values` and reaches half its peak, for rows that lie a power of two apart
    fall on the same cache lines; below 10^6 multiplications it takes its kernels for small matrices, which do not pack.
    """
    left = np.ascontiguousarray(matrix, dtype=values.dtype)
    block = next((size for size in (256, 128, 64) if left.size * size <= 10**6), 0)
    if left.ndim != 2 or block == 0 or values.shape[1] < block or not values.flags.c_contiguous:
        return left @ values
    (rows, frames), width = left.shape, values.shape[1]
    result = np.empty((rows, width), dtype=values.dtype)
    whole = width - width % block
    blocks = values[:, :whole].reshape((frames, -1, block), copy=False).swapaxes(0, 1)
    np.matmul(left, blocks, out=result[:, :whole].reshape((rows, -1, block), copy=False).swapaxes(0, 1))
    if whole < width:
        np.matmul(left, values[:, whole:], out=result[:, whole:])
    return result
