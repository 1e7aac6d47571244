"""Where arXiv 2502.00500 cannot be followed to the letter: each printed formula failing, and ours holding.

One test a row of method.md, section 2.
"""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch

from model.flow.path import PaperPath, WarmupPath
from model.flow.solver import solve
from model.legs import basis, evaluate, project, projection_matrix, recurrence_matrices
from model.metrics.pictures import psnr, psnr_paper


def midpoints(count: int) -> np.ndarray:
    return (np.arange(count) + 0.5) / count


def paper_matrix(count: int, order: int) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return projection_matrix(midpoints(count), 1.0, order, "paper")


def test_indices_from_1_do_not_keep_a_constant() -> None:
    """Printed: A and B over i = 1 .. s. A still film must be the constant path, that is A e_0 = B."""

    def defect(first: int) -> float:
        i = np.arange(first, first + 8)
        roots = np.sqrt(2.0 * i + 1)
        transition = np.tril(np.outer(roots, roots), -1) + np.diag(i + 1.0)
        return float(np.abs(transition[:, 0] - roots).max())

    assert defect(1) > 0.2
    assert defect(0) < 1e-15
    transition, inlet = recurrence_matrices(8)
    np.testing.assert_allclose(transition[:, 0], inlet)


def test_the_printed_basis_is_not_orthonormal() -> None:
    """Printed: sqrt((2i+1)/2) P_i(t) at t in seconds, under the uniform density on the window."""
    nodes, weights = np.polynomial.legendre.leggauss(40)

    def gram(values: np.ndarray) -> np.ndarray:
        return (values.T * weights / 2) @ values

    def printed(t: np.ndarray) -> np.ndarray:
        return np.stack(
            [math.sqrt((2 * i + 1) / 2) * np.polynomial.legendre.Legendre.basis(i)(t) for i in range(6)], axis=-1
        )

    duration = 2.0
    np.testing.assert_allclose(gram(basis((nodes + 1) * duration / 2, duration, 6)), np.eye(6), atol=1e-13)
    np.testing.assert_allclose(gram(printed(nodes)), np.eye(6) / 2, atol=1e-13)  # on its own interval: sqrt 2 off
    assert np.abs(gram(printed((nodes + 1) * duration / 2)) - np.eye(6)).max() > 100  # on the clip's


@pytest.mark.parametrize(
    ("count", "order", "largest"), [(48, 16, 0.48), (48, 32, 3.1e3), (48, 64, 1.2e45), (16, 32, 5.9e19)]
)
def test_forward_euler_diverges(count: int, order: int, largest: float) -> None:
    """The largest weight on a frame; an exact projection's is bounded by its cell, 1/N times sqrt(2s-1)."""
    assert np.abs(paper_matrix(count, order)).max() == pytest.approx(largest, rel=0.05)
    for method in ("hold", "linear", "cubic"):
        exact = projection_matrix(midpoints(count), 1.0, order, method)
        assert np.abs(exact).max() < 1.5 / count * math.sqrt(2 * order)
    nearly_still = 1 + 0.01 * np.random.default_rng(0).standard_normal(count)
    read = evaluate(project(nearly_still, paper_matrix(count, order)), midpoints(count), 1.0)
    assert order == 16 or np.abs(read - 1).max() > 1, "the paper's recurrence keeps a still film with 1 % noise still"
    read = evaluate(project(nearly_still, projection_matrix(midpoints(count), 1.0, order)), midpoints(count), 1.0)
    assert np.abs(read - 1).max() < 0.05


def sigma(path: PaperPath | WarmupPath, r: torch.Tensor) -> torch.Tensor:
    return path.evaluate(r, torch.ones_like(r))[1]


def test_the_printed_sigma() -> None:
    """24 frames a second, 2 s: above 1, not decayed at the first frames, noise half-way between frames, stiff."""
    path = PaperPath(frames=48, duration=2.0)
    r = torch.linspace(0, 1, 48 * 400 + 1, dtype=torch.float64)
    assert float(sigma(path, r).max()) == pytest.approx(1.81, abs=0.01)  # "sigma <= 1"
    at_frames = sigma(path, torch.tensor([1, 2, 3, 6, 12], dtype=torch.float64) / 48)
    np.testing.assert_allclose(at_frames, [0.66, 0.44, 0.29, 0.09, 0.02], atol=0.006)  # each "sigma_min" = 0.01
    between = sigma(path, (torch.arange(24, 48, dtype=torch.float64) + 0.5) / 48)
    assert float((between - 1).abs().max()) < 0.01
    value, slope = sigma(path, r), path.derivative(r, r, r)[1] / path.duration  # per second
    stiffness = float((slope / value).abs().max())
    assert stiffness == pytest.approx(746, rel=0.01)
    assert stiffness > (1 - path.sigma_min) / path.sigma_min  # Lemma D.7 claims 99

    ours = WarmupPath()
    assert float(sigma(ours, torch.linspace(-0.25, 1, 5001, dtype=torch.float64)).max()) <= 1
    np.testing.assert_allclose(sigma(ours, r), 0.1, atol=1e-15)
    before = torch.linspace(-0.25, 0, 5001, dtype=torch.float64)
    assert float((ours.derivative(before, before, before)[1] / sigma(ours, before)).abs().max()) < 20


def test_rk4_with_200_steps_overflows_on_the_printed_path() -> None:
    noise = torch.randn(1, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def predict(x: torch.Tensor, r: float) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.ones_like(x), torch.zeros_like(x)

    grid = torch.linspace(0, 1, 201, dtype=torch.float64)
    printed = solve(PaperPath(frames=48, duration=2.0), predict, noise, grid, "rk4", reanchor=False)
    assert not printed.states[-1].abs().max() < 1e6
    ours = solve(WarmupPath(), predict, noise, torch.cat([torch.linspace(-0.25, 0, 9).double()[:-1], grid]), "rk4")
    assert (ours.states[-1] - 1 - 0.1 * noise).abs().max() < 1e-3


def test_the_printed_mean_does_not_start_at_0() -> None:
    """mu_0 = 0 is required, and mu_t = H g(t): at t = 0 that is the first frame."""
    frames = 1 + np.random.default_rng(0).standard_normal((12, 3)) * 0.1
    first = torch.from_numpy(evaluate(project(frames, projection_matrix(midpoints(12), 1.0, 24)), [0.0], 1.0))
    printed, _ = PaperPath(frames=12, duration=1.0).evaluate(0.0, first)
    assert printed.abs().min() > 0.5
    path = WarmupPath()
    assert path.evaluate(path.start, first)[0].abs().max() == 0


def test_the_printed_psnr_is_inflated() -> None:
    """r^2 / MSE with r the image's side: the 61.18 of Table 1 is 7.0 dB (r = 512, peak 1) or 25.1 dB (r = 64)."""
    assert psnr_paper(7.0, 512, peak=1.0) == pytest.approx(61.18, abs=0.03)
    assert psnr_paper(25.1, 64, peak=1.0) == pytest.approx(61.18, abs=0.06)
    pictures = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    standard = float(psnr(pictures, pictures + 0.1, peak=1.0))
    assert standard == pytest.approx(20, abs=1e-4)
    assert psnr_paper(standard, 64, peak=1.0) == pytest.approx(10 * math.log10(64**2 / 0.01), abs=1e-4)


def test_theorem_4_1_is_the_optimum_of_one_video_only() -> None:
    """Two videos: the minimiser is the mean of the two formulas, weighted by how likely each made x."""
    path, r = WarmupPath(), -0.1
    generator = torch.Generator().manual_seed(0)
    videos = torch.tensor([-1.0, 1.0], dtype=torch.float64)
    which = torch.randint(2, (200_000,), generator=generator)
    centre, sigma_here = path.evaluate(r, videos)
    noise = torch.randn(which.shape, generator=generator, dtype=torch.float64)
    x = centre[which] + sigma_here * noise
    formulas = torch.stack([path.velocity(x, r, video, torch.zeros((), dtype=torch.float64)) for video in videos])
    truth = formulas.gather(0, which[None])[0]
    likelihood = torch.softmax(-((x - centre[:, None]) ** 2) / (2 * sigma_here**2), dim=0)
    conditional = (likelihood * formulas).sum(dim=0)

    def loss(answer: torch.Tensor) -> float:
        return float((answer - truth).square().mean())

    assert loss(conditional) < 0.9 * min(loss(formulas[0]), loss(formulas[1]))
    # It is the regression of the truth on x: no smooth function of x correlates with what is left.
    for probe in (torch.ones_like(x), x, torch.tanh(3 * x), torch.cos(2 * x)):
        left = (truth - conditional) * probe
        assert abs(float(left.mean())) < 5 * float(left.std()) / math.sqrt(len(x))
    one = path.velocity(x, r, videos[1], torch.zeros((), dtype=torch.float64))[which == 1]
    np.testing.assert_allclose(one, truth[which == 1])  # and with one video it is the formula


def test_polynomial_extrapolation_explodes_and_is_refused() -> None:
    """Ten per cent beyond the window a polynomial of order 32 has left the picture by four orders of magnitude."""
    times = midpoints(16)
    path = project(np.sin(6 * times), projection_matrix(times, 1.0, 32))
    beyond = np.polynomial.legendre.legval(2 * 1.1 - 1, path * np.sqrt(2 * np.arange(32) + 1.0))
    assert abs(beyond) > 1e4
    with pytest.raises(ValueError, match=r"times\[0\] is 1.1 s, outside the window"):
        evaluate(path, [1.1], 1.0)
