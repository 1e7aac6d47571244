"""Signal-to-noise ratios against values known from arithmetic."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from model.metrics.base import Metric
from model.metrics.pictures import decibels, psnr, psnr_paper, ssim


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


def slow_ssim(picture: np.ndarray, reference: np.ndarray, peak: float) -> float:
    """Wang et al. 2004, equations 13 to 16, window by window in float64; (3, H, W)."""
    luma = np.array([0.299, 0.587, 0.114])
    x, y = np.tensordot(luma, picture, 1), np.tensordot(luma, reference, 1)
    offset = np.arange(11) - 5.0
    weight = np.exp(-(offset[:, None] ** 2 + offset[None] ** 2) / (2 * 1.5**2))
    weight /= weight.sum()
    c1, c2 = (0.01 * peak) ** 2, (0.03 * peak) ** 2
    values = []
    for i in range(x.shape[0] - 10):
        for j in range(x.shape[1] - 10):
            a, b = x[i : i + 11, j : j + 11], y[i : i + 11, j : j + 11]
            mean_a, mean_b = (weight * a).sum(), (weight * b).sum()
            var_a, var_b = (weight * (a - mean_a) ** 2).sum(), (weight * (b - mean_b) ** 2).sum()
            cov = (weight * (a - mean_a) * (b - mean_b)).sum()
            top = (2 * mean_a * mean_b + c1) * (2 * cov + c2)
            values.append(top / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2)))
    return float(np.mean(values))


@pytest.mark.parametrize(("low", "peak"), [(-1.0, 2.0), (0.0, 1.0)])
def test_structural_similarity_is_the_published_one(low: float, peak: float) -> None:
    random = np.random.default_rng(0)
    reference = low + peak * random.random((3, 3, 17, 14))
    reference[1] = low + peak * np.linspace(0, 1, 14)  # smooth, where variances are small
    pictures = (reference + peak * 0.1 * random.standard_normal(reference.shape)).clip(low, low + peak)
    pictures[2] = low + peak - (reference[2] - low)  # the negative
    found = ssim(torch.from_numpy(pictures).float(), torch.from_numpy(reference).float(), peak)
    expected = [slow_ssim(a, b, peak) for a, b in zip(pictures, reference, strict=True)]
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)
    assert 0 < expected[1] < 1


def test_structural_similarity_of_equal_and_of_small_pictures() -> None:
    random = torch.Generator().manual_seed(0)
    pictures = torch.rand(2, 3, 11, 20, generator=random) * 2 - 1
    torch.testing.assert_close(ssim(pictures, pictures), torch.ones(2))
    assert ssim(pictures[..., :10], pictures[..., :10]).isnan().all(), "narrower than the window"
    with pytest.raises(ValueError, match=r"they must be equal and \(N, 3, H, W\)"):
        ssim(pictures[:, :1], pictures[:, :1])


def test_the_papers_peak_is_the_pictures_side() -> None:
    mse = 0.01
    standard = 10 * math.log10(4 / mse)
    assert psnr_paper(standard, 256) == pytest.approx(10 * math.log10(256**2 / mse))


def test_figures_as_text() -> None:
    assert decibels(24.04) == "24.0"
    assert decibels(24.04, 2) == "24.04"
    assert decibels(None) == decibels(math.nan) == decibels(math.inf) == "–"


def test_psnr_of_bytes_and_of_all_pictures_together() -> None:
    random = np.random.default_rng(0)
    frames = random.integers(0, 256, (3, 3, 8, 8), dtype=np.uint8)
    other = frames.copy()
    other[1] = 255 - other[1]
    error = np.square(frames.astype(float) - other)
    assert psnr(frames, other, peak=255).isinf().tolist() == [True, False, True]
    assert psnr(frames, other, peak=255)[1].item() == pytest.approx(10 * math.log10(255**2 / error[1].mean()))
    together = psnr(frames, other, peak=255, together=True)
    assert together.item() == pytest.approx(10 * math.log10(255**2 / error.mean()))
    assert psnr(frames, frames, together=True, floor=4e-10).item() == pytest.approx(100)


def test_a_metric_knows_which_way_is_better() -> None:
    up, down = Metric("gain", " dB", True, "x"), Metric("end_ratio", "", False, "x", "end")
    assert (up.worst([3.0, math.nan, 1.0]), down.worst([3.0, math.nan, 1.0])) == (1.0, 3.0)
    assert math.isnan(up.worst([math.nan]))
    assert (up.meets(1.0, 1.0), up.meets(0.9, 1.0), down.meets(1.0, 1.0), down.meets(1.1, 1.0)) == (1, 0, 1, 0)
    assert up.meets(math.nan, 1.0)
    assert (up.title, down.title, Metric("a_b", "", True, "x").title) == ("gain", "end", "a b")
