"""What a backbone is told beside latents and flow time."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Conditioning:
    """Caption, clip and given frames; every tensor has the batch first.

    Where K states in a row share a caption, `text` and `text_length` may have it once: B/K rows.
    """

    text: Tensor
    """(B or B/K, M, D): embedded caption, rows past its length arbitrary."""
    text_length: Tensor
    """(B or B/K,): valid rows of `text`, at least 1; the last valid row is the pooled embedding."""
    clip_start: Tensor
    """(B,): seconds from the film's start to the clip's; ignored where `start_given` is 0."""
    start_given: Tensor
    """(B,): 1 where clip_start is given, 0 where it is not."""
    log_duration: Tensor
    """(B,): logarithm of the clip's duration in seconds."""
    context: Tensor
    """(B, L, C, h, w), or L = 1 for all frames: latents that are given; zero where none are."""
    context_given: Tensor
    """(B, L), or L = 1, bool: where `context` is given. For VLFM it is the clip's first frame."""
