"""Tasks as boolean masks: which frames of a clip are given, in a batch (`Batch.given`) or a request (`Request.given`).

Every mask is (B, N) for clips of up to N frames whose `valid` frames come first; what is padding is never given.
"""

from __future__ import annotations

import torch
from torch import Tensor


def image_to_video(valid: Tensor) -> Tensor:
    """The first frame is given; `valid` is (B, N) bool, as in `Batch.valid`."""
    return continuation(valid, 1)


def continuation(valid: Tensor, frames: int) -> Tensor:
    """The first `frames` frames are given, and the clip goes on from them.

    Raises:
        ValueError: fewer than one frame.
    """
    if frames < 1:
        raise ValueError(f"frames is {frames}; a continuation needs at least 1 given frame")
    return valid & (torch.arange(valid.shape[1], device=valid.device) < frames)


def interpolation(valid: Tensor, given: Tensor | None = None) -> Tensor:
    """The first and the last frame are given, and of those between them the ones that `given` (B, N) or (N,) names."""
    place = torch.arange(valid.shape[1], device=valid.device)
    ends = (place == 0) | (place == valid.sum(1, keepdim=True) - 1)
    return valid & (ends if given is None else ends | given)
