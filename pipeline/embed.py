"""Captions to embeddings: each caption once, and the empty one always."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Texts:
    """Embeddings of captions by one text encoder."""

    id: str
    """Names the encoder's weights; no machine path."""
    dim: int
    """D."""
    length: int
    """L, most tokens of a caption."""
    spec: dict[str, Any]
    """JSON from which model.prompts.text_encoder_from_spec rebuilds the encoder."""
    by_caption: Mapping[str, np.ndarray]
    """Caption to float16 (text_length, D), cut at its length; the empty caption is there."""

    @property
    def empty(self) -> np.ndarray:
        """The empty caption's embedding, (text_length, D) float16."""
        return self.by_caption[""]


def embed(captions: Iterable[str], spec: Mapping[str, Any]) -> Texts:
    """Every distinct caption through the encoder that `spec` names.

    Raises:
        ValueError: an embedding is not finite, or the encoder is unknown or not to be had (its own message).
    """
    from model.prompts import text_encoder_from_spec

    encoder = text_encoder_from_spec(spec)
    wanted = ["", *sorted(set(captions) - {""})]
    embeddings, lengths = encoder.encode(wanted)
    stored = embeddings.float().cpu().numpy().astype(np.float16)
    for caption, row in zip(wanted, stored, strict=True):
        if not np.isfinite(row).all():
            raise ValueError(f"the embedding of caption {caption!r} is not finite; change the caption or the encoder")
    by_caption = {
        caption: np.ascontiguousarray(row[: int(count)])
        for caption, row, count in zip(wanted, stored, lengths.tolist(), strict=True)
    }
    return Texts(encoder.id, encoder.dim, encoder.length, dict(encoder.spec()), by_caption)
