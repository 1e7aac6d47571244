"""Stable Diffusion v1.5's architecture with random weights, its work in FLOP, and the peaks of the machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from model.codecs.batches import Networks

UNET: dict[str, Any] = {
    "sample_size": 64,
    "layers_per_block": 2,
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
VAE: dict[str, Any] = {
    "sample_size": 512,
    "layers_per_block": 2,
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "latent_channels": 4,
}
SMALL_UNET = UNET | {
    "sample_size": 16,
    "layers_per_block": 1,
    "block_out_channels": (64, 128, 160),
    "down_block_types": ("CrossAttnDownBlock2D",) * 2 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 2,
    "cross_attention_dim": 128,
}
"""About the size of a codec that is trained on a CPU."""
TINY_UNET = UNET | {
    "sample_size": 8,
    "layers_per_block": 1,
    "block_out_channels": (8, 16),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 16,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
}
TINY_VAE = VAE | {
    "sample_size": 16,
    "layers_per_block": 1,
    "block_out_channels": (4, 8),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 4,
}


@dataclass(frozen=True)
class Plan:
    """What is measured."""

    unet: dict[str, Any] = field(default_factory=lambda: UNET)
    vae: dict[str, Any] = field(default_factory=lambda: VAE)
    pixels: int = 512
    levels: tuple[int, int] = (50, 10)
    """Levels of the two grids of H6; H1 takes the first."""
    batches: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    video: int = 32
    text: tuple[int, int] = (77, 768)
    peak_side: int = 8192
    copy_bytes: int = 2**32
    goals: bool = True
    """Whether the goals mean anything for these networks."""

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of a frame's latents."""
        side = self.pixels // 2 ** (len(self.vae["block_out_channels"]) - 1)
        return int(self.vae["latent_channels"]), side, side

    def goal(self, value: float) -> float | None:
        """A goal of performance.md, where it applies."""
        return value if self.goals else None


TINY = Plan(
    TINY_UNET, TINY_VAE, pixels=16, levels=(4, 2), batches=(1, 2), video=2, text=(5, 16), peak_side=128,
    copy_bytes=2**16, goals=False,
)  # fmt: skip


def build(plan: Plan, device: torch.device | str) -> tuple[nn.Module, nn.Module]:
    """VAE and UNet with random weights, made on the device itself."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    with torch.device(device):
        return AutoencoderKL(**plan.vae), UNet2DConditionModel(in_channels=4, out_channels=4, **plan.unet)


def count_tflop(plan: Plan) -> dict[str, float]:
    """TFLOP of one frame through each network, counted on the meta device (1 multiplication and addition = 2 FLOP)."""
    from torch.utils.flop_counter import FlopCounterMode

    vae, unet = build(plan, "meta")
    networks = Networks(vae, unet, "meta")
    latents, frames = torch.zeros(1, *plan.latent_shape, device="meta"), torch.zeros(1, 3, plan.pixels, plan.pixels)
    noise = networks.noise(torch.zeros(1, *plan.text))
    calls: dict[str, Callable[[], object]] = {
        "unet": lambda: noise(latents, torch.tensor(1, device="meta")),
        "encode": lambda: networks.encode(frames),
        "decode": lambda: networks.decode(latents),
    }
    counts = {}
    for name, call in calls.items():
        with FlopCounterMode(display=False) as counter:
            call()
        counts[name] = counter.get_total_flops() / 1e12
    return counts


def matrix_peak(side: int, device: torch.device, kind: torch.dtype) -> float:
    """TFLOP/s of a product of two square matrices of random numbers."""
    left, right = (torch.randn(side, side, device=device, dtype=kind) for _ in range(2))
    return 2 * side**3 / 1e12 / _best_seconds(lambda: left @ right, device)


def copy_bandwidth(count: int, device: torch.device) -> float:
    """GB/s of a copy inside the device's memory, bytes read and written."""
    source = torch.zeros(count, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * count / 1e9 / _best_seconds(lambda: target.copy_(source), device)


def _best_seconds(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of a call, ten in a row, median of five."""
    wait = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
    samples = []
    for _ in range(6):
        wait()
        start = time.perf_counter()
        for _ in range(10):
            call()
        wait()
        samples.append((time.perf_counter() - start) / 10)
    return statistics.median(samples[1:])
