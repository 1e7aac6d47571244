"""The layers of the backbone: its blocks, and the head that predicts a rate of insertions for each frame."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from model.backbones.attention import Attention

QK_NORMS: Mapping[str, type[nn.RMSNorm | nn.LayerNorm] | None] = {
    "none": None,
    "rms": nn.RMSNorm,
    "layer": nn.LayerNorm,
}
"""Norms of each head's queries and keys."""
LOG_RATE_LEAST, LOG_RATE_MOST = -16.0, 8.0
"""Bounds of a logarithm of a rate. exp(8) is some 3000 frames in one gap. exp(-16) is none; exp(-8) in each of 145 gaps
would still insert a frame in every fifth sample."""


class Block(nn.Module):
    """Self-attention over all tokens of all frames, cross-attention to the caption, and a feed-forward layer."""

    def __init__(self, width: int, heads: int, qk_norm: str, norm_epsilon: float) -> None:
        super().__init__()
        self.heads = heads
        self.modulation = nn.Linear(width, 6 * width)
        self.norm = nn.LayerNorm(width, eps=norm_epsilon, elementwise_affine=False)
        self.qkv = nn.Linear(width, 3 * width)
        self.norm_q, self.norm_k = HeadNorm(width // heads, qk_norm), HeadNorm(width // heads, qk_norm)
        self.attention_out = nn.Linear(width, width)
        self.cross = CrossAttention(width, heads, qk_norm)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(
        self, tokens: Tensor, condition: Tensor, text: Tensor, words: Tensor | None, attention: Attention, layer: int
    ) -> Tensor:
        """Tokens (B, L, n, W), condition (B, L, W), text (B, M, W) and words (B, M) to tokens of the same shape.

        words: true for rows of the text that are seen; None where all are.  layer: the block's number, by which a cache
        knows it.
        """
        batch, frames, count, width = tokens.shape
        parts = self.modulation(condition)[:, :, None].chunk(6, dim=-1)  # six of (B, L, 1, W)
        shift, scale, gate, shift_up, scale_up, gate_up = parts

        inner = self.norm(tokens) * (1 + scale) + shift  # (B, L, n, W)
        qkv = self.qkv(inner).view(batch, frames * count, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, L*n, W/heads)
        q, k = self.norm_q(q), self.norm_k(k)
        mixed = attention.mix(q, k, v, layer)  # (B, heads, L*n, W/heads)
        mixed = mixed.transpose(1, 2).reshape(batch, frames, count, width)  # (B, L, n, W)
        tokens = tokens + gate * self.attention_out(mixed)

        tokens = tokens + self.cross(self.norm(tokens), text, words)

        inner = self.norm(tokens) * (1 + scale_up) + shift_up  # (B, L, n, W)
        return tokens + gate_up * self.down(functional.gelu(self.up(inner), approximate="tanh"))


class CrossAttention(nn.Module):
    """Tokens read the caption."""

    def __init__(self, width: int, heads: int, qk_norm: str) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.norm_q, self.norm_k = HeadNorm(width // heads, qk_norm), HeadNorm(width // heads, qk_norm)
        self.out = nn.Linear(width, width)

    def forward(self, tokens: Tensor, text: Tensor, words: Tensor | None) -> Tensor:
        """Tokens (B, L, n, W), text (B/K, M, W), words (B/K, M), true for rows that are seen, to (B, L, n, W)."""
        batch, frames, count, width = tokens.shape
        size, texts = width // self.heads, text.shape[0]
        # K states' tokens in one row: (B/K, heads, K*L*n, W/heads)
        q = self.query(tokens).view(texts, -1, self.heads, size).transpose(1, 2)
        k, v = (
            self.key_value(text).view(texts, -1, 2, self.heads, size).permute(2, 0, 3, 1, 4)
        )  # (B/K, heads, M, W/heads)
        q, k = self.norm_q(q), self.norm_k(k)
        # Any mask, even one that hides nothing, rules out a GPU's flash kernels.
        mask = None if words is None else words[:, None, None]
        mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(mixed.transpose(1, 2).reshape(batch, frames, count, width))


class HeadNorm(nn.Module):
    """The norm of queries or keys (..., W/heads), one for all heads of a layer, in the weight's precision."""

    def __init__(self, size: int, qk_norm: str) -> None:
        super().__init__()
        kind = QK_NORMS[qk_norm]
        self.norm = None if kind is None else kind(size, eps=1e-6)

    def forward(self, value: Tensor) -> Tensor:
        """(..., W/heads) to the same shape and type."""
        if self.norm is None:
            return value
        normed: Tensor = self.norm(value.to(self.norm.weight.dtype))
        return normed.to(value.dtype)


class RateHead(nn.Module):
    """A frame's rate token to the logarithm of how many frames its gap still lacks."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Linear(width, width)
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.last = nn.Linear(width, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        """(..., W) to (...), at least float32, in [LOG_RATE_LEAST, LOG_RATE_MOST]; what is no number stays so."""
        inner = self.first(tokens)
        normed = self.norm(inner.to(self.norm.weight.dtype)).to(inner.dtype)
        rate = self.last(functional.silu(normed))[..., 0]
        return rate.to(torch.promote_types(rate.dtype, torch.float32)).clamp(LOG_RATE_LEAST, LOG_RATE_MOST)
