"""What trains a text encoder: the contrast between captions and clips, and that its rows tell the words apart.

Captions and clips come to lie close together where they belong together and far apart where they do not (Radford et al.
2021, "Learning transferable visual models from natural language supervision"). A difference between two captions so
counts as far as it can be seen. Words that no clip shows, or too few, are held apart by a second loss: every row says
which words came until there.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from model.text.encoder import new_clip_text_model

LARGEST_SCALE = 100.0
"""Bound of the factor before the softmax, the temperature's inverse."""

WORD_SPREAD = 0.2
"""Standard deviation of untrained words, ten times CLIP's own: rows then stay as different as their words are, also
where no clip ever shows a difference."""


class ClipTower(nn.Module):
    """A clip's path of latents to one vector; small, and thrown away after the training.

    It sees all times at once, so motion is a difference between its input channels.

    times: T, points of the path.  channels: C of the latents.  grid: side of the latents, a multiple of 4.
    width: channels of the first convolution.  dim: D, width of the vector.
    """

    def __init__(self, times: int, channels: int, grid: int, width: int, dim: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(times * channels, width, 3, stride=2, padding=1),
            nn.GroupNorm(4, width),
            nn.SiLU(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
            nn.GroupNorm(4, 2 * width),
            nn.SiLU(),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1),
            nn.GroupNorm(4, 2 * width),
            nn.SiLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(8 * width, dim),
        )

    def forward(self, paths: Tensor) -> Tensor:
        """(B, T, C, g, g) standardised latents to (B, D)."""
        vectors: Tensor = self.layers(paths.flatten(1, 2))
        return vectors


class Contrast(nn.Module):
    """The two towers with the temperature, and the head that reads words from rows.

    text: a CLIPTextModel. Its pooled row is compared with the clips as it is, so the contrast shapes what the trainer
    of backbones is given and not a projection of it.
    tower: clips to vectors as wide as a row.
    """

    def __init__(self, text: nn.Module, tower: nn.Module) -> None:
        super().__init__()
        config: Any = text.config
        self.text, self.tower = text, tower
        self.log_scale = nn.Parameter(torch.tensor(math.log(10.0)))
        self.words = nn.Linear(config.hidden_size, config.vocab_size)

    def rows(self, tokens: Tensor) -> Tensor:
        """(B, L) tokens to (B, L, D)."""
        rows: Tensor = self.text(input_ids=tokens).last_hidden_state
        return rows

    def losses(self, paths: Tensor, tokens: Tensor, lengths: Tensor, which: Tensor) -> Tensor:
        """The contrast of B clips and their captions.

        paths: (B, T, C, g, g).  tokens, lengths: (M, L) and (M,) of the M different captions.
        which: (B,) the number of each clip's caption among them.
        """
        rows = self.rows(tokens)
        pooled = rows[torch.arange(len(rows)), lengths - 1]
        return contrast_loss(self.tower(paths), pooled[which], which, self.log_scale.exp().clamp_max(LARGEST_SCALE))

    def word_loss(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """How badly each row says which tokens came until there, itself included, for tokens (B, L), lengths (B,)."""
        found = functional.one_hot(tokens, self.words.out_features).float()
        valid = torch.arange(tokens.shape[1]) < lengths[:, None]
        # The start mark is in every row and says nothing.
        came = found[:, 1:].cumsum(1)
        shares = came / came.sum(-1, keepdim=True)
        logits = self.words(self.rows(tokens)[:, 1:])
        return functional.cross_entropy(logits[valid[:, 1:]], shares[valid[:, 1:]])


def contrast_loss(clips: Tensor, captions: Tensor, which: Tensor, scale: Tensor | float) -> Tensor:
    """Symmetric InfoNCE of B pairs, in which clips of one caption are no strangers to each other.

    clips, captions: (B, D), compared by cosine.  which: (B,) number of the caption; pairs of the same number all belong
    together and share the target evenly.  scale: the temperature's inverse.
    """
    logits = scale * functional.normalize(clips, dim=-1) @ functional.normalize(captions, dim=-1).T
    same = (which[:, None] == which[None, :]).to(logits.dtype)
    targets = same / same.sum(1, keepdim=True)
    return (functional.cross_entropy(logits, targets) + functional.cross_entropy(logits.T, targets)) / 2


def new_text_model(numbers: dict[str, int], width: int, layers: int, heads: int, length: int) -> nn.Module:
    """An untrained CLIPTextModel whose rows have unit variance: the last norm's gain and bias stay 1 and 0.

    numbers: the vocabulary.  length: most tokens of a caption.
    """
    model: Any = new_clip_text_model(numbers, width, layers, heads, length)
    nn.init.normal_(model.embeddings.token_embedding.weight, std=WORD_SPREAD)
    model.final_layer_norm.requires_grad_(False)
    network: nn.Module = model
    return network
