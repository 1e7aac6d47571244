"""Embeddings of a number: sines and cosines of it at many rates, then two layers."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

STEPS_PER_FLOW_TIME = -4000.0
"""Of `architecture=dit`: its 1000 diffusion steps, noise last, are a warm-up of 1/4, noise first; the clip follows."""


class ScalarEmbedding(nn.Module):
    """A scalar as `2 * count` sinusoids, then two layers; which sinusoids is what the classes below differ in."""

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.first = nn.Linear(2 * count, width)
        self.second = nn.Linear(width, width)

    def sinusoids(self, value: Tensor) -> Tensor:
        """(...), at least float32, to (..., 2 * count)."""
        raise NotImplementedError

    def forward(self, value: Tensor) -> Tensor:
        """(...) to (..., width)."""
        exact = value.to(torch.promote_types(value.dtype, torch.float32))
        return self.second(functional.silu(self.first(self.sinusoids(exact).to(self.first.weight.dtype))))


class SinusoidalEmbedding(ScalarEmbedding):
    """Sines and cosines of wavelengths from `longest` to `shortest`."""

    wavelengths: Tensor

    def __init__(self, width: int, longest: float, shortest: float) -> None:
        count = width // 4
        super().__init__(width, count)
        steps = torch.arange(count, dtype=torch.float64) / max(count - 1, 1)
        wavelengths = torch.exp(math.log(longest) + steps * (math.log(shortest) - math.log(longest)))
        self.register_buffer("wavelengths", wavelengths.float(), persistent=False)

    def sinusoids(self, value: Tensor) -> Tensor:
        """(...) to (..., 2 * count)."""
        angle = 2 * math.pi * value[..., None] / self.wavelengths  # (..., count)
        return torch.cat([angle.sin(), angle.cos()], dim=-1)


class StepEmbedding(ScalarEmbedding):
    """Flow time as the published DiT embeds a diffusion step: 128 rates from 1 down to 1/10000, cosines first."""

    rates: Tensor

    def __init__(self, width: int, count: int = 128) -> None:
        super().__init__(width, count)
        rates = torch.exp(-math.log(10_000) * torch.arange(count, dtype=torch.float32) / count)
        self.register_buffer("rates", rates, persistent=False)

    def sinusoids(self, value: Tensor) -> Tensor:
        """(...) flow times to (..., 2 * count)."""
        angle = STEPS_PER_FLOW_TIME * value[..., None] * self.rates  # (..., count)
        return torch.cat([angle.cos(), angle.sin()], dim=-1)
