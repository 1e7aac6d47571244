"""The product behind projection and readout: a small matrix times frames, at full speed and full precision."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.legs.basis import Float64

Values = TypeVar("Values", NDArray[np.generic], Tensor)


def product(matrix: Float64 | Tensor, values: Values) -> Values:
    """matrix (..., s, N) @ values (..., N, d), float64 for float64 values, else float32, whatever autocast says."""
    if not isinstance(values, Tensor):
        kind = np.float64 if values.dtype == np.float64 else np.float32
        left_array = matrix.detach().cpu().numpy() if isinstance(matrix, Tensor) else matrix
        return _on_the_cpu(left_array, _tensor(values, kind))
    dtype = torch.float64 if values.dtype == torch.float64 else torch.float32
    needs_gradient = torch.is_grad_enabled() and values.requires_grad
    if values.device.type == "cpu" and isinstance(matrix, np.ndarray) and not needs_gradient:
        return torch.from_numpy(_on_the_cpu(matrix, values.detach().to(dtype)))
    left = matrix if isinstance(matrix, Tensor) else torch.tensor(matrix)
    with torch.autocast(values.device.type, enabled=False):
        return left.to(values.device, dtype) @ values.to(dtype)


def _on_the_cpu(matrix: NDArray[np.generic], values: Tensor) -> NDArray[np.generic]:
    """The product by torch's library into numpy's memory, the faster of either (docs/benchmarks.md, G1).

    OpenBLAS packs `values` badly where its rows lie a power of two apart, as those of latents do, and numpy asks for
    huge pages. An `out` is not subject to autocast.
    """
    kind = np.float64 if values.dtype == torch.float64 else np.float32
    left = _tensor(matrix, kind)
    batch = np.broadcast_shapes(left.shape[:-2], values.shape[:-2])
    result = np.empty((*batch, left.shape[-2], values.shape[-1]), kind)
    torch.matmul(left, values, out=torch.from_numpy(result))
    return result


def _tensor(array: NDArray[np.generic], kind: type) -> Tensor:
    # torch wants memory that it may write and no negative strides, which an axis of one may have; most are not copied.
    ready = np.require(array, kind, ["C", "W"])
    return torch.from_numpy(ready if min(ready.strides, default=0) >= 0 else ready.copy())
