"""What the trainer and the samplers know of a method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class ClipBatch:
    """Clips as a method trains on them; every tensor has the batch first."""

    clip_ids: tuple[str, ...]
    """Names of the clips."""
    coefficients: Tensor
    """(B, order, C, h, w): HiPPO-LegS coefficients of the latents' path."""
    text: Tensor
    """(B, M, D): embedded captions, zero past their lengths."""
    text_length: Tensor
    """(B,): valid rows of `text`."""
    empty_text: Tensor
    """(E, D): the empty caption."""
    clip_start: Tensor
    """(B,): seconds from the film's start."""
    duration: Tensor
    """(B,): seconds."""

    def to(self, device: torch.device) -> ClipBatch:
        """The same clips on `device`."""
        moved = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return ClipBatch(clip_ids=self.clip_ids, **moved)


class Method(Protocol):
    """A way to learn videos: a loss for training. The trainer never asks which one it runs."""

    def loss(self, backbone: torch.nn.Module, batch: ClipBatch, generator: torch.Generator) -> dict[str, Tensor]:
        """Named scalars; `loss` is the one that is minimised."""
        ...


def drop_captions(batch: ClipBatch, dropped: Tensor) -> tuple[Tensor, Tensor]:
    """Text (B, M, D) and lengths (B,) with the empty caption where `dropped` (B,) is true."""
    length = batch.empty_text.shape[0]
    rows = max(length, batch.text.shape[1])
    text = torch.nn.functional.pad(batch.text, (0, 0, 0, rows - batch.text.shape[1]))
    empty = torch.nn.functional.pad(batch.empty_text, (0, 0, 0, rows - length))
    chosen = torch.where(dropped[:, None, None], empty, text)
    return chosen, torch.where(dropped, length, batch.text_length)
