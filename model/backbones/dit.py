"""The backbone: a diffusion transformer that sees noisy latents, flow time, a caption and a first frame.

It predicts what a flow path needs to assemble its velocity: the clip's mean latents and their derivative in flow time.
Time has the shape (B, L), one value for each frame of a sequence; the VLFM method uses L = 1, methods that give every
frame its own time use more. Every block modulates its tokens by adaLN-Zero (Peebles and Xie 2023, arXiv 2212.09748,
section 3.2) and reads the caption by cross-attention; the two output heads start at zero.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class BackboneConfig:
    """Shape of a backbone: what the dataset's version fixes, and what the training recipe chooses."""

    channels: int
    """Channels C of the latents."""
    height: int
    """Height h of the latents."""
    width_latent: int
    """Width w of the latents."""
    text_dim: int
    """Width D of the caption's embedding."""
    width: int
    """Width of the tokens."""
    depth: int
    """Number of blocks."""
    heads: int
    """Attention heads."""
    patch: int
    """Side of the square of latents that makes one token."""

    def __post_init__(self) -> None:
        for name, value in self.to_json().items():
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        if self.height % self.patch or self.width_latent % self.patch:
            raise ValueError(
                f"patch {self.patch} does not divide the latents {self.height}x{self.width_latent}; "
                "choose another with --set patch=..."
            )
        if self.width % (4 * self.heads):
            raise ValueError(
                f"width {self.width} is no multiple of 4 x heads ({self.heads}); choose others with --set width=..."
            )

    @property
    def tokens(self) -> int:
        """Tokens of one frame."""
        return (self.height // self.patch) * (self.width_latent // self.patch)

    def to_json(self) -> dict[str, int]:
        """Plain values, enough to build the backbone again."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Conditioning:
    """What a backbone is told beside latents and flow time; every tensor has the batch first.

    Where K states in a row share a caption, `text` and `text_length` may have it once: B/K rows.
    """

    text: Tensor
    """(B or B/K, M, D): embedded caption, rows past its length arbitrary."""
    text_length: Tensor
    """(B or B/K,): valid rows of `text`, at least 1; the last valid row is the pooled embedding."""
    clip_start: Tensor
    """(B,): seconds from the film's start to the clip's; ignored where `named` is 0."""
    named: Tensor
    """(B,): 1 where caption and clip_start are given, 0 where they are dropped (the text is then the empty one)."""
    log_duration: Tensor
    """(B,): logarithm of the clip's duration in seconds."""
    context: Tensor
    """(B, C, h, w): latents of the clip's first frame; zero where it is not given."""
    context_given: Tensor
    """(B,): 1 where `context` is given, else 0."""


class Backbone(nn.Module):
    """Noisy latents (B, L, C, h, w) at flow times (B, L) to (mean, derivative), each (B, L, C, h, w)."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.config = config
        width, pixels = config.width, config.channels * config.patch**2
        self.embed_latents = nn.Linear(pixels, width)
        self.embed_context = nn.Linear(pixels, width)
        self.position = nn.Parameter(torch.empty(config.tokens, width))
        self.time = WaveEmbedding(width, longest=4.0, shortest=1 / 32)
        self.duration = WaveEmbedding(width, longest=16.0, shortest=0.5)
        self.clip_start = WaveEmbedding(width, longest=4096.0, shortest=0.5)
        self.pooled_text = nn.Sequential(nn.LayerNorm(config.text_dim), nn.Linear(config.text_dim, width))
        self.context_flag = nn.Parameter(torch.empty(width))
        self.text = nn.Sequential(nn.LayerNorm(config.text_dim), nn.Linear(config.text_dim, width))
        self.blocks = nn.ModuleList(Block(width, config.heads) for _ in range(config.depth))
        self.modulation = nn.Linear(width, 2 * width)
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.mean_head = nn.Linear(width, pixels)
        self.derivative_head = nn.Linear(width, pixels)
        self.initialise()

    def initialise(self) -> None:
        """All initialisation in one place: Xavier matrices, zero gates and heads, zero context input."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        # Waves of unit size, not small noise: tokens that start out alike take hundreds of steps to tell apart.
        with torch.no_grad():
            self.position.copy_(waves_of_places(self.config))
        nn.init.zeros_(self.context_flag)
        for layer in (self.embed_context, self.modulation, self.mean_head, self.derivative_head):
            nn.init.zeros_(layer.weight)
        for block in self.blocks:
            assert isinstance(block, Block)
            nn.init.zeros_(block.modulation.weight)
            nn.init.zeros_(block.cross.out.weight)

    def forward(self, latents: Tensor, flow_time: Tensor, given: Conditioning) -> tuple[Tensor, Tensor]:
        """Predicted m(max(r, 0)) and m'(max(r, 0)) at the flow times r of `latents`."""
        batch, frames = flow_time.shape
        tokens = self.embed_latents(self.patches(latents))  # (B, L, n, W)
        context = self.embed_context(self.patches(given.context[:, None]))  # (B, 1, n, W)
        tokens = tokens + self.position + context * given.context_given[:, None, None, None]

        pooled = self.pooled_text(last_rows(given.text, given.text_length))
        clip = self.duration(given.log_duration) + pooled.repeat_interleave(batch // len(pooled), 0)
        clip = clip + self.clip_start(given.clip_start) * given.named[:, None]
        clip = clip + self.context_flag * given.context_given[:, None]  # (B, W)
        condition = functional.silu(self.time(flow_time) + clip[:, None])  # (B, L, W)

        text = self.text(given.text)  # (B, M, W)
        valid = torch.arange(text.shape[1], device=text.device) < given.text_length[:, None]  # (B, M)
        for block in self.blocks:
            tokens = block(tokens, condition, text, valid)

        shift, scale = self.modulation(condition)[:, :, None].chunk(2, dim=-1)  # (B, L, 1, W) each
        tokens = self.norm(tokens) * (1 + scale) + shift
        mean = self.pictures(self.mean_head(tokens).view(batch, frames, self.config.tokens, -1))
        derivative = self.pictures(self.derivative_head(tokens).view(batch, frames, self.config.tokens, -1))
        return mean, derivative

    def patches(self, latents: Tensor) -> Tensor:
        """(B, L, C, h, w) to (B, L, n, C*p*p)."""
        batch, frames, channels, height, width = latents.shape
        p = self.config.patch
        cut = latents.reshape(batch, frames, channels, height // p, p, width // p, p)
        return cut.permute(0, 1, 3, 5, 2, 4, 6).reshape(batch, frames, self.config.tokens, channels * p * p)

    def pictures(self, patches: Tensor) -> Tensor:
        """(B, L, n, C*p*p) to (B, L, C, h, w)."""
        c, p = self.config, self.config.patch
        batch, frames = patches.shape[:2]
        cut = patches.reshape(batch, frames, c.height // p, c.width_latent // p, c.channels, p, p)
        return cut.permute(0, 1, 4, 2, 5, 3, 6).reshape(batch, frames, c.channels, c.height, c.width_latent)


class Block(nn.Module):
    """Self-attention over all tokens of all frames, cross-attention to the caption, and a feed-forward layer."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.modulation = nn.Linear(width, 6 * width)
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.qkv = nn.Linear(width, 3 * width)
        self.attention_out = nn.Linear(width, width)
        self.cross = CrossAttention(width, heads)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, tokens: Tensor, condition: Tensor, text: Tensor, valid: Tensor) -> Tensor:
        """Tokens (B, L, n, W), condition (B, L, W), text (B, M, W), valid (B, M) to tokens of the same shape."""
        batch, frames, count, width = tokens.shape
        parts = self.modulation(condition)[:, :, None].chunk(6, dim=-1)  # six of (B, L, 1, W)
        shift, scale, gate, shift_up, scale_up, gate_up = parts

        inner = self.norm(tokens) * (1 + scale) + shift
        qkv = self.qkv(inner).view(batch, frames * count, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, L*n, W/heads)
        mixed = functional.scaled_dot_product_attention(q, k, v)
        mixed = mixed.transpose(1, 2).reshape(batch, frames, count, width)
        tokens = tokens + gate * self.attention_out(mixed)

        tokens = tokens + self.cross(self.norm(tokens), text, valid)

        inner = self.norm(tokens) * (1 + scale_up) + shift_up
        return tokens + gate_up * self.down(functional.gelu(self.up(inner), approximate="tanh"))


class CrossAttention(nn.Module):
    """Tokens read the caption."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)

    def forward(self, tokens: Tensor, text: Tensor, valid: Tensor) -> Tensor:
        """Tokens (B, L, n, W), text (B/K, M, W), valid (B/K, M) to (B, L, n, W)."""
        batch, frames, count, width = tokens.shape
        size, texts = width // self.heads, text.shape[0]
        q = self.query(tokens).view(texts, -1, self.heads, size).transpose(1, 2)  # K states' tokens in one row
        k, v = self.key_value(text).view(texts, -1, 2, self.heads, size).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=valid[:, None, None])
        return self.out(mixed.transpose(1, 2).reshape(batch, frames, count, width))


class WaveEmbedding(nn.Module):
    """A scalar as sines and cosines of wavelengths from `shortest` to `longest`, then two layers."""

    wavelengths: Tensor

    def __init__(self, width: int, longest: float, shortest: float) -> None:
        super().__init__()
        count = width // 4
        steps = torch.arange(count, dtype=torch.float64) / max(count - 1, 1)
        waves = torch.exp(math.log(longest) + steps * (math.log(shortest) - math.log(longest)))
        self.register_buffer("wavelengths", waves.float(), persistent=False)
        self.first = nn.Linear(2 * count, width)
        self.second = nn.Linear(width, width)

    def forward(self, value: Tensor) -> Tensor:
        """(...) to (..., width)."""
        angle = 2 * math.pi * value.float()[..., None] / self.wavelengths
        waves = torch.cat([angle.sin(), angle.cos()], dim=-1).to(self.first.weight.dtype)
        return self.second(functional.silu(self.first(waves)))


def waves_of_places(config: BackboneConfig) -> Tensor:
    """(tokens, width): sines and cosines of each token's row and column, from the widest wave to the finest."""
    rows, columns = config.height // config.patch, config.width_latent // config.patch
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    finest, widest = math.pi, math.pi / (2 * max(rows, columns))
    rates = torch.exp(torch.linspace(math.log(widest), math.log(finest), config.width // 4))
    angles = [place.reshape(-1, 1) * rates for place in (y, x)]
    return torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], dim=1)


def last_rows(text: Tensor, length: Tensor) -> Tensor:
    """The pooled embedding (B, D): the last valid row of each caption (B, M, D)."""
    return text[torch.arange(text.shape[0], device=text.device), length - 1]
