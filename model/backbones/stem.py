"""Convolutions at the latents' own size, before and after the transformer's blocks: the outer part of a U.

A token of a few large patches has to draw an object anywhere in them; a convolution draws it alike at every place, and
what it needs to know of the rest of the picture comes from the transformer in the middle (Hoogeboom et al. 2023,
"Simple diffusion", arXiv 2301.11093, section 3.3). On small data this is learned several times sooner.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

GROUPS = 8
"""Groups of the convolutions' norms."""


class Stem(nn.Module):
    """The way in and the way out.

    channels: C of the latents. width: S, channels of the convolutions. depth: residual blocks of each way.
    condition: W, width of what modulates them.
    """

    def __init__(self, channels: int, width: int, depth: int, condition: int) -> None:
        super().__init__()
        self.latents = nn.Conv2d(channels, width, 3, padding=1)
        self.context = nn.Conv2d(channels, width, 3, padding=1)
        self.before = nn.ModuleList(ConvolutionBlock(width, condition) for _ in range(depth))
        self.after = nn.ModuleList(ConvolutionBlock(width, condition) for _ in range(depth))
        self.norm = nn.GroupNorm(GROUPS, width)

    def initialise(self) -> None:
        """Given frames count for nothing at first.

        Nothing else starts at zero: a slope is a product of what the caption says and what the picture shows, and
        where modulation, convolution and head are all zero, its gradient is too.
        """
        nn.init.zeros_(self.context.weight)

    def enter(self, latents: Tensor, context: Tensor, shown: Tensor, condition: Tensor) -> Tensor:
        """Features (B, L, S, h, w) of latents (B, L, C, h, w).

        context, shown: (B, L or 1, C, h, w) given frames and (B, L or 1) 1 where there is one, else 0.
        condition: (B, L, W).
        """
        batch, frames = latents.shape[:2]
        given = self.context(context.flatten(0, 1)).unflatten(0, context.shape[:2])  # (B, L or 1, S, h, w)
        features = self.latents(latents.flatten(0, 1)).unflatten(0, (batch, frames))
        features = (features + given * shown[:, :, None, None, None]).flatten(0, 1)  # (BL, S, h, w)
        for block in self.before:
            features = block(features, condition.flatten(0, 1))
        return features.unflatten(0, (batch, frames))

    def leave(self, features: Tensor, condition: Tensor) -> Tensor:
        """Features (B, L, S, h, w), from the way in and from the transformer, to those that the heads read."""
        shape = features.shape[:2]
        features = features.flatten(0, 1)
        for block in self.after:
            features = block(features, condition.flatten(0, 1))
        return functional.silu(self.norm(features)).unflatten(0, shape)


class ConvolutionBlock(nn.Module):
    """Two convolutions beside the identity; the condition scales and shifts what lies between them."""

    def __init__(self, width: int, condition: int) -> None:
        super().__init__()
        self.first_norm = nn.GroupNorm(GROUPS, width)
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.second_norm = nn.GroupNorm(GROUPS, width, affine=False)
        self.modulation = nn.Linear(condition, 2 * width)
        self.second = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, features: Tensor, condition: Tensor) -> Tensor:
        """Features (N, S, h, w) and condition (N, W) to features."""
        inner = self.first(functional.silu(self.first_norm(features)))
        shift, scale = self.modulation(condition)[:, :, None, None].chunk(2, dim=1)  # (N, S, 1, 1) each
        inner = self.second_norm(inner) * (1 + scale) + shift
        result: Tensor = features + self.second(functional.silu(inner))
        return result
