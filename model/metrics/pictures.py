"""Measures of pictures."""

from __future__ import annotations

import math
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

SSIM_WINDOW, SSIM_SIGMA = 11, 1.5
"""Side and standard deviation of SSIM's Gaussian window, pixels."""


Pictures = Tensor | NDArray[Any]


def psnr(
    pictures: Pictures, reference: Pictures, peak: float = 2.0, together: bool = False, floor: float = 0.0
) -> Tensor:
    """Peak signal-to-noise ratio in dB of each picture: 10 log10(peak^2 / mean squared error), in float64.

    Args:
        pictures: (..., C, H, W) tensor or numpy array of any type.
        reference: the same shape.
        peak: largest difference of two values; 2 for pictures in [-1, 1], 255 for bytes.
        together: one figure from the mean squared error of all pictures, instead of one of each.
        floor: the mean squared error that counts for all below it; 0 gives infinity where the two are equal.

    Returns:
        (...), or a scalar where they are taken together: dB.
    """
    pictures, reference = torch.as_tensor(pictures), torch.as_tensor(reference)
    if pictures.shape != reference.shape:
        raise ValueError(
            f"pictures have the shape {tuple(pictures.shape)}, the reference {tuple(reference.shape)}; "
            "they must be equal"
        )
    error = (pictures.double() - reference.double()).square()
    error = error.mean() if together else error.mean(dim=(-3, -2, -1))
    return 10 * torch.log10(peak**2 / error.clamp_min(floor))


def pooled_psnr(pictures: Tensor, reference: Tensor, peak: float = 2.0) -> float:
    """PSNR in dB over all pictures together, at most 100; NaN where one of them is not finite.

    Args:
        pictures: any shape.
        reference: the same shape.
        peak: largest difference of two values; 2 for pictures in [-1, 1].
    """
    error = float((pictures - reference).double().square().mean())
    return 100.0 if error < 1e-10 * peak**2 else 10 * math.log10(peak**2 / error)


def ssim(pictures: Tensor, reference: Tensor, peak: float = 2.0) -> Tensor:
    """Structural similarity of the pictures' luma, the mean of its map (Wang, Bovik, Sheikh, Simoncelli 2004).

    As published: a Gaussian window of 11 pixels and standard deviation 1.5, K1 = 0.01, K2 = 0.03, and only places where
    the whole window lies inside the picture. Luma is 0.299 R + 0.587 G + 0.114 B (BT.601).

    Args:
        pictures: (N, 3, H, W).
        reference: the same shape.
        peak: largest difference of two values; 2 for pictures in [-1, 1].

    Returns:
        (N,): at most 1; NaN where a side is shorter than the window.
    """
    if pictures.shape != reference.shape or pictures.ndim != 4 or pictures.shape[1] != 3:
        raise ValueError(
            f"pictures have the shape {tuple(pictures.shape)}, the reference {tuple(reference.shape)}; "
            "they must be equal and (N, 3, H, W)"
        )
    count, _, height, width = pictures.shape
    if min(height, width) < SSIM_WINDOW:
        return pictures.new_full((count,), math.nan)
    luma = pictures.new_tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
    x, y = (pictures * luma).sum(dim=1), (reference * luma).sum(dim=1)  # (N, H, W)
    maps = torch.stack((x, y, x * x, y * y, x * y))
    maps = _window_means(height, maps) @ maps @ _window_means(width, maps).T
    mean_x, mean_y, xx, yy, xy = maps.flatten(2)  # (N, places)
    c1, c2 = (0.01 * peak) ** 2, (0.03 * peak) ** 2
    product, squares = mean_x * mean_y, mean_x.square() + mean_y.square()
    closeness = (2 * product + c1) / (squares + c1)
    structure = (2 * (xy - product) + c2) / (xx + yy - squares + c2)
    return (closeness * structure).mean(dim=1)


def _window_means(length: int, like: Tensor) -> Tensor:
    """(length - 10, length): row k weighs the samples k to k + 10. As a matrix product it is faster than a convolution
    of one channel, also at 512 pixels."""
    place = torch.arange(length, device=like.device, dtype=like.dtype)
    centre = place[: length - SSIM_WINDOW + 1, None] + SSIM_WINDOW // 2
    weights = torch.exp(-(place - centre).square() / (2 * SSIM_SIGMA**2))
    weights = weights.where((place - centre).abs() <= SSIM_WINDOW // 2, 0)
    return weights / weights.sum(dim=1, keepdim=True)


def decibels(value: float | None, digits: int = 1) -> str:
    """A figure as text; a dash where there is none."""
    return f"{value:.{digits}f}" if value is not None and math.isfinite(value) else "–"


def psnr_paper(decibel: float, side: int, peak: float = 2.0) -> float:
    """The figure that arXiv 2502.00500 prints for a standard PSNR: its peak is the picture's side, in pixels."""
    return decibel + 20 * math.log10(side / peak)
