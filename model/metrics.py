"""Measures of pictures and of paths."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def psnr(pictures: Tensor, reference: Tensor, peak: float = 2.0) -> Tensor:
    """Peak signal-to-noise ratio in dB of each picture: 10 log10(peak^2 / mean squared error).

    Args:
        pictures: (..., C, H, W).
        reference: the same shape.
        peak: largest difference of two values; 2 for pictures in [-1, 1].

    Returns:
        (...): dB; infinite where the two are equal.
    """
    if pictures.shape != reference.shape:
        raise ValueError(
            f"pictures have the shape {tuple(pictures.shape)}, the reference {tuple(reference.shape)}; "
            "they must be equal"
        )
    error = (pictures.double() - reference.double()).square().mean(dim=(-3, -2, -1))
    return 10 * torch.log10(peak**2 / error)


def decibels(value: float | None, digits: int = 1) -> str:
    """A figure as text; a dash where there is none."""
    return f"{value:.{digits}f}" if value is not None and math.isfinite(value) else "–"


def psnr_paper(decibel: float, side: int, peak: float = 2.0) -> float:
    """The figure that arXiv 2502.00500 prints for a standard PSNR: its peak is the picture's side, in pixels."""
    return decibel + 20 * math.log10(side / peak)
