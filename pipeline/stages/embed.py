"""Captions to embeddings: each caption once, and the empty one always."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.rows import caption_id
from storage.layout import Lake
from storage.rounding import check_rounding
from storage.version import Version, kept_empty_text

if TYPE_CHECKING:
    from model.text.encoder import TextEncoder


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
    """JSON from which model.text.encoder.text_encoder_from_spec rebuilds the encoder."""
    by_caption: Mapping[str, np.ndarray]
    """Caption to float16 (text_length, D), cut at its length; the empty caption is there."""

    @property
    def empty(self) -> np.ndarray:
        """The empty caption's embedding, (text_length, D) float16."""
        return self.by_caption[""]


def embed(
    captions: Iterable[str], spec: Mapping[str, Any], lake: Lake | None = None, base: Version | None = None
) -> Texts:
    """Every distinct caption through the encoder that `spec` names, unless a version stores its embedding already.

    Another processor or library rounds otherwise, so what is stored is used as it is. The empty caption alone is always
    computed, which shows whether this is still the encoder that made the lake.

    Args:
        captions: any number, in any order.
        spec: of the encoder.
        lake: where stored embeddings are looked for; None for nowhere.
        base: the version of this recipe that the clips will join, whose captions are not encoded again.

    Raises:
        ValueError: an embedding is not finite, or the encoder is unknown or not to be had (its own message).
        LakeError: the empty caption's embedding differs from the stored one by more than rounding.
    """
    from model.text.encoder import text_encoder_from_spec

    encoder = text_encoder_from_spec(spec)
    wanted = ["", *sorted(set(captions) - {""})]
    stored = _stored(lake, base, encoder.id, wanted) if lake is not None else {}
    computed = _computed(encoder, [caption for caption in wanted if caption == "" or caption not in stored])
    if "" in stored:
        check_rounding(f"the empty caption's embedding by {encoder.id}", stored[""], computed[""])
    return Texts(encoder.id, encoder.dim, encoder.length, dict(encoder.spec()), {**computed, **stored})


def _stored(lake: Lake, base: Version | None, text_id: str, captions: Iterable[str]) -> dict[str, np.ndarray]:
    """Embeddings of those of `captions` that versions store, by this encoder."""
    found: dict[str, np.ndarray] = {}
    if base is not None and base.text["id"] == text_id:
        from storage.arrays import read_texts, text_rows

        places = text_rows(lake, base.snapshot, base.group)
        rows = {caption: places[caption_id(caption)] for caption in captions if caption_id(caption) in places}
        texts = read_texts(lake, base.snapshot, base.group, list(rows.values()))
        found = {
            caption: embedding[:length]
            for caption, embedding, length in zip(rows, texts.embeddings, texts.lengths, strict=True)
        }
    # Versions of all recipes share one file per encoder.
    empty = kept_empty_text(lake, text_id)
    return found if empty is None else {**found, "": empty}


def _computed(encoder: TextEncoder, captions: Sequence[str]) -> dict[str, np.ndarray]:
    embeddings, lengths = encoder.encode(captions)
    rows = embeddings.float().cpu().numpy().astype(np.float16)
    for caption, row in zip(captions, rows, strict=True):
        if not np.isfinite(row).all():
            raise ValueError(f"the embedding of caption {caption!r} is not finite; change the caption or the encoder")
    return {
        caption: np.ascontiguousarray(row[: int(count)])
        for caption, row, count in zip(captions, rows, lengths.tolist(), strict=True)
    }
