"""Given frames of sequences in training: the tasks, as boolean masks, and how the network is told of them.

A given frame stands among the others as a clean one, and once more in the context channels; it is no part of the
velocity loss. From the channels, not from the sequence, it is dropped now and then: guidance asks the network without.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from model import tasks
from model.methods.base import Batch
from model.methods.draws import Draws
from model.methods.sequences import SequenceOptions
from model.settings import SHARE, check_settings

CONTEXTS = ("first", "start", "ends", "any")
"""Tasks: the first frame is given; the first few; the first, the last and up to BETWEEN between them; any."""
BETWEEN = 2


@dataclass(frozen=True)
class ContextOptions(SequenceOptions):
    """What a training recipe chooses of methods that can be given any frames."""

    context_first: float = 0.1
    """Share of the clips whose first frame is given (image to video)."""
    context_start: float = 0.1
    """Share of the clips of which the first few frames are given, up to half (continuation)."""
    context_ends: float = 0.1
    """Share of the clips whose first and last frames are given, and up to two between them (interpolation)."""
    context_any: float = 0.05
    """Share of the clips of which any frames are given."""
    context_noise: float = 0.1
    """Share of noise in a first frame that is given alone, (1 - share) x + share epsilon: a picture is never exact."""
    context_dropout: float = 0.1
    """Rate at which all given frames of a clip are hidden from the context channels: each of K of them at the rate's
    K-th root."""

    def __post_init__(self) -> None:
        """Raises ValueError for a field that cannot be, with its name, its value and what it must be."""
        super().__post_init__()
        check_settings(self, dict.fromkeys([f"context_{name}" for name in (*CONTEXTS, "noise", "dropout")], SHARE))
        if (given := sum(self.shares)) > 1 + 1e-9:
            raise ValueError(f"context_first, _start, _ends and _any add up to {given:g}; they must to at most 1")

    @property
    def shares(self) -> list[float]:
        """Shares of CONTEXTS."""
        return [getattr(self, f"context_{name}") for name in CONTEXTS]


@dataclass(frozen=True)
class Context:
    """Given frames of a batch; every tensor has (B, N) in front."""

    given: Tensor
    """(B, N) bool: which frames are given."""
    told: Tensor
    """(B, N) bool: which of them the context channels have."""
    frames: Tensor
    """(B, N, C, h, w): the frames as given; arbitrary where none are."""


def draw_context(options: ContextOptions, batch: Batch, frames: Tensor, valid: Tensor, draws: Draws) -> Context:
    """Given frames as the batch says, or else of a task drawn for each clip; of no clip all frames.

    frames: (B, N, C, h, w). valid: (B, N) bool, which of them are no padding.
    """
    kind, amount, score = draws.rand(), draws.rand(), draws.rand(valid.shape[1])
    count = valid.sum(1)
    alone = torch.zeros_like(valid)
    if batch.given is not None:
        given = batch.given & valid
    else:
        place = torch.arange(valid.shape[1], device=valid.device)
        ends = (place == 0) | (place >= count[:, None] - 1)
        rank = score.masked_fill(ends, 2.0).argsort(1).argsort(1)
        between = rank < torch.minimum((amount * (BETWEEN + 1)).floor(), count - 3)[:, None]
        masks = {
            "first": tasks.image_to_video(valid),
            "start": valid & (place < 1 + (amount * count / 2).floor()[:, None]),
            "ends": tasks.interpolation(valid, between),
            "any": valid & (score < amount[:, None]),
        }
        given, least = torch.zeros_like(valid), 0.0
        for name, rate in zip(CONTEXTS, options.shares, strict=True):
            chosen = (kind >= least) & (kind < least + rate)
            given, least = torch.where(chosen[:, None], masks[name], given), least + rate
        given = given & (given.sum(1) < count)[:, None]
        alone = given & (kind < options.context_first)[:, None]
    share = (options.context_noise * alone).to(frames.dtype)[..., None, None, None]
    noisy = (1 - share) * frames + share * draws.randn_frames(*frames.shape[1:])
    hidden = options.context_dropout ** (1 / given.sum(1).clamp(min=1))
    return Context(given, given & (draws.rand(valid.shape[1]) >= hidden[:, None]), noisy)
