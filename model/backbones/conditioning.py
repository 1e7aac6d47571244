"""What a backbone is told beside latents and flow time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


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

    def captions(self, rows: int) -> tuple[Tensor, Tensor | None]:
        """What cross-attention reads: text (B or B/K, M, D), and which rows it sees, (B or B/K, M) bool.

        rows: what every caption is filled up to with zeros, all of them seen: the second is then None, and no caption
        depends on how long the others of its batch are. With 0 a caption has its own rows, and M is the longest one's.

        Raises:
            ValueError: the text has more rows than that.
        """
        valid = torch.arange(self.text.shape[1], device=self.text.device) < self.text_length[:, None]
        if rows == 0:
            return self.text, valid
        if self.text.shape[1] > rows:
            found = self.text.shape[1]
            raise ValueError(f"captions have {found} rows; the backbone takes at most {rows} (caption_rows)")
        text = self.text.masked_fill(~valid[:, :, None], 0)  # rows past a length are arbitrary
        return functional.pad(text, (0, 0, 0, rows - text.shape[1])), None
