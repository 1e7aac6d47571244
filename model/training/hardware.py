"""What a training asks of the machine: memory, and the share of the device's peak that its arithmetic reaches."""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from model.backbones.conditioning import Conditioning
from model.backbones.dit import Backbone, BackboneConfig
from model.methods.base import Batch
from model.methods.draws import Draws
from model.training.record import RunRecord

PEAKS = {
    "B200": {"bfloat16": 2250e12, "float32": 75e12},
    "H200": {"bfloat16": 989e12, "float32": 67e12},
    "H100 PCIe": {"bfloat16": 756e12, "float32": 51e12},
    "H100 NVL": {"bfloat16": 835e12, "float32": 60e12},
    "H100": {"bfloat16": 989e12, "float32": 67e12},
    "A100": {"bfloat16": 312e12, "float32": 19.5e12},
    "L40S": {"bfloat16": 362e12, "float32": 91.6e12},
    "L4": {"bfloat16": 121e12, "float32": 30.3e12},
    "A10G": {"bfloat16": 70e12, "float32": 35e12},
    "RTX 4090": {"bfloat16": 165e12, "float32": 82.6e12},
}
"""Peak floating-point operations per second by a part of the device's name and by precision, as NVIDIA's data sheets
print them: dense, with float32 accumulation, and float32 without TF32, which training does not use."""


def memory_bytes(device: torch.device) -> int:
    """Most memory that tensors had on a GPU; on the CPU the process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # where there is no /proc
    return most if sys.platform == "darwin" else most * 1024


def peak(device_name: str, precision: str) -> float | None:
    """Peak operations per second of a device by its name; None for one that is not in PEAKS: no guess."""
    words = device_name.split()
    for name, by_precision in PEAKS.items():
        # Whole words, but for the socket: NVIDIA L4 is no L40S, NVIDIA A100-SXM4-80GB is an A100.
        if all(any(word == part or word.startswith(f"{part}-") for word in words) for part in name.split()):
            return by_precision.get(precision)
    return None


def peak_of(device: torch.device, precision: str) -> float | None:
    """`peak` of a device; None on the CPU."""
    return peak(torch.cuda.get_device_name(device), precision) if device.type == "cuda" else None


class _Counted(nn.Module):
    """Stands for a backbone: computes on the meta device, forward and backward, and answers with zeros."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            self.backbone = Backbone(config)
        self.counter = FlopCounterMode(display=False)
        self.operations = 0

    def forward(self, latents: Tensor, flow_time: Tensor, given: Conditioning, **more: Any) -> dict[str, Tensor]:
        told = Conditioning(**{name: value.to("meta") for name, value in vars(given).items()})
        with self.counter:
            named = {name: value.to("meta") if isinstance(value, Tensor) else value for name, value in more.items()}
            found = self.backbone(latents.to("meta"), flow_time.to("meta"), told, **named)
            torch.autograd.backward(sum(value.sum() for value in found.values()))
        self.operations += self.counter.get_total_flops()
        return {name: torch.zeros(value.shape, requires_grad=True) for name, value in found.items()}


def flops_per_clip(record: RunRecord) -> int:
    """Floating-point operations of the backbone in a training step on one clip, forward and backward.

    What activation checkpointing computes twice counts once: this is the model's work, not the machine's.
    """
    clip, text = record.clip, record.text
    order, shape, frames = clip["order"], tuple(clip["latent_shape"]), clip["frames_max"]
    batch = Batch(
        clip_ids=("",),
        text=torch.zeros(1, text["length"], text["dim"]),
        text_length=torch.ones(1, dtype=torch.int64),
        empty_text=torch.zeros(1, text["dim"]),
        clip_start=torch.zeros(1),
        duration=torch.ones(1),
        coefficients=torch.zeros(1, order, *shape),
        latents=torch.zeros(1, frames, *shape),
        frame_time=torch.linspace(0, 1, frames)[None],
        valid=torch.ones(1, frames, dtype=torch.bool),
        observed=torch.ones(1, frames, dtype=torch.bool),
    )
    counted = _Counted(record.backbone)
    record.method().loss(counted, batch, Draws(0, 1))
    return counted.operations


def seconds_at_peak(record: RunRecord, device: torch.device, world: int) -> float | None:
    """Seconds that one clip takes where all `world` devices are at their peak; None where that is not known.

    Times clips per second it is the MFU (model FLOPs utilisation).
    """
    highest = peak_of(device, record.recipe.precision)
    return None if highest is None else flops_per_clip(record) / (highest * world)
