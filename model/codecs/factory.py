"""Which codec a spec describes."""

from __future__ import annotations

from collections.abc import Mapping

from model.codecs.base import Codec
from model.codecs.diffusers import DiffusersCodec
from model.codecs.linear import LinearCodec

KINDS: dict[str, type[LinearCodec] | type[DiffusersCodec]] = {"linear": LinearCodec, "diffusers": DiffusersCodec}
"""The codecs, by the `kind` of their specs. A new one is a file in this package and an entry here."""


def codec_class(spec: Mapping[str, object]) -> type[LinearCodec] | type[DiffusersCodec]:
    """The class of the codec that a spec describes; loads nothing. Raises ValueError for a spec that names none."""
    kind = spec.get("kind")
    if kind not in KINDS:
        raise ValueError(f"codec spec has kind {kind!r}: use {' or '.join(map(repr, KINDS))}")
    return KINDS[str(kind)]


def codec_from_spec(spec: Mapping[str, object], device: str = "cpu") -> Codec:
    """The codec a spec describes: `{"kind": "linear", ...}` or `{"kind": "diffusers", "source": FOLDER_OR_ID, ...}`.

    Settings left out take their defaults. device: where a network codec computes (the linear one follows its input).
    Raises ValueError for a spec that names no codec or other weights than are found, CodecUnavailable where weights are
    missing.
    """
    return codec_class(spec).from_spec(spec, device=device)
