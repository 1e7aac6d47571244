"""DDIM the slow and plain way, in float64 NumPy from the papers' formulas, and a noise predictor known exactly."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]


def alphas_cumulative() -> Array:
    """Stable Diffusion v1.5's cumulative product, one step of the recursion at a time."""
    alphas, product = [], 1.0
    for index in range(1000):
        beta = (math.sqrt(0.00085) + index / 999 * (math.sqrt(0.012) - math.sqrt(0.00085))) ** 2
        product *= 1 - beta
        alphas.append(product)
    return np.array(alphas)


def sample(noisy: Array, predict_noise: Callable[[Array, int], Array], ddim_steps: int, depth: int) -> Array:
    """From `depth` levels up to clean, by way of the predicted clean sample (DDIM, equation 12, eta = 0)."""
    alphas, stride = alphas_cumulative(), 1000 // ddim_steps
    x = noisy
    for level in reversed(range(depth)):
        t = level * stride + 1
        below = alphas[t - stride] if t >= stride else alphas[0]
        eps = predict_noise(x, t)
        clean = (x - math.sqrt(1 - alphas[t]) * eps) / math.sqrt(alphas[t])
        x = math.sqrt(below) * clean + math.sqrt(1 - below) * eps
    return x


class GaussianMixture:
    """The exact eps of data drawn from a mixture of isotropic Gaussians: no network, no training, any float type.

    With `A` the cumulative product at a step, noisy data are a mixture of N(sqrt(A) mean, A spread^2 + 1 - A), and
    eps is `-sqrt(1 - A)` times the gradient of its log density.
    """

    def __init__(self, modes: int, seed: int, shape: tuple[int, int, int] = (4, 4, 4), spread: float = 0.3) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.means = torch.randn(modes, math.prod(shape), generator=generator, dtype=torch.float64)
        self.spread = spread
        self.shape = shape
        self.alphas = torch.from_numpy(alphas_cumulative())
        self.calls = 0

    def draw(self, count: int, seed: int) -> Tensor:
        """Clean samples (count, C, h, w), float64."""
        generator = torch.Generator().manual_seed(seed)
        mode = torch.randint(len(self.means), (count,), generator=generator)
        noise = torch.randn(count, self.means.shape[1], generator=generator, dtype=torch.float64)
        return (self.means[mode] + self.spread * noise).view(count, *self.shape)

    def __call__(self, latents: Tensor, ddim_step: Tensor | int) -> Tensor:
        self.calls += 1
        alpha: Any = self.alphas[ddim_step]
        x = latents.double().flatten(1)
        variance = alpha * self.spread**2 + 1 - alpha
        distance = (x.unsqueeze(1) - alpha.sqrt() * self.means).square().sum(2)
        weights = torch.softmax(-distance / (2 * variance), dim=1)
        eps = (1 - alpha).sqrt() * (x - alpha.sqrt() * weights @ self.means) / variance
        return eps.view_as(latents).to(latents.dtype)
