"""Signal-to-noise ratios against values known from arithmetic."""

from __future__ import annotations

import math

import pytest
import torch

from model.metrics import decibels, psnr, psnr_paper


def test_known_errors() -> None:
    reference = torch.zeros(2, 3, 4, 5)
    pictures = torch.stack([torch.full((3, 4, 5), 0.2), torch.full((3, 4, 5), 2.0)])
    # 10 log10(4 / 0.04) = 20 dB; an error as large as the peak is 0 dB.
    torch.testing.assert_close(psnr(pictures, reference), torch.tensor([20.0, 0.0], dtype=torch.float64))
    assert psnr(pictures[:1], reference[:1], peak=0.2).item() == pytest.approx(0.0, abs=1e-5)
    one = torch.zeros(3, 4, 5)
    one[0, 0, 0] = 2.0
    assert psnr(one, reference[0]).item() == pytest.approx(10 * math.log10(60))


def test_equal_pictures_are_infinitely_good() -> None:
    assert psnr(torch.ones(1, 3, 2, 2), torch.ones(1, 3, 2, 2)).item() == math.inf


def test_small_errors_are_told_apart() -> None:
    """In float32 the squares of such errors are still exact enough: the mean is taken in float64."""
    reference = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    worse = psnr(reference + 2e-6, reference)
    assert (psnr(reference + 1e-6, reference) - worse).item() == pytest.approx(20 * math.log10(2), abs=1e-6)


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match=r"pictures have the shape \(3, 2, 2\), the reference \(3, 2, 3\)"):
        psnr(torch.zeros(3, 2, 2), torch.zeros(3, 2, 3))


def test_the_papers_peak_is_the_pictures_side() -> None:
    mse = 0.01
    standard = 10 * math.log10(4 / mse)
    assert psnr_paper(standard, 256) == pytest.approx(10 * math.log10(256**2 / mse))


def test_figures_as_text() -> None:
    assert decibels(24.04) == "24.0"
    assert decibels(24.04, 2) == "24.04"
    assert decibels(None) == decibels(math.nan) == decibels(math.inf) == "–"
