"""Codecs: frames to latents and back. Nobody else assumes a number of channels, a factor or a scale.

Two codecs: `LinearCodec` (fixed block transform, needs no weights) and `DiffusersCodec` (any folder in Stable Diffusion
format). Each gives a JSON spec from which `codec_from_spec` rebuilds it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from model.codecs.diffusers import DiffusersCodec
from model.codecs.linear import LinearCodec, Text
from model.weights import CodecUnavailable

__all__ = ["Codec", "CodecUnavailable", "DiffusersCodec", "LinearCodec", "Text", "codec_from_spec"]


class Codec(Protocol):
    """What the pipeline, the trainer and the sampler know of a codec."""

    id: str
    """Names weights and settings; no machine path. Latents of two codecs with one id may be mixed."""
    channels: int
    """C, channels of a latent."""
    factor: int
    """Pixels a side for one latent position."""
    scale: float
    """Latents are this many times the codec's own coefficients; chosen for about unit variance."""

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, h, w) for frames of height x width pixels. Raises ValueError for sizes the codec cannot take."""
        ...

    def encode(self, frames: Tensor, text: Text | None = None) -> Tensor:
        """Frames (N, 3, H, W) in [-1, 1] to float32 latents (N, C, h, w). Raises ValueError for unfit frames."""
        ...

    def decode(self, latents: Tensor, text: Text | None = None) -> Tensor:
        """Latents (N, C, h, w) to float32 frames (N, 3, H, W), clamped to [-1, 1]."""
        ...

    def spec(self) -> dict[str, object]:
        """JSON able to rebuild the codec."""
        ...


def codec_from_spec(spec: Mapping[str, object], device: str = "cpu") -> Codec:
    """The codec a spec describes: `{"kind": "linear", ...}` or `{"kind": "diffusers", "source": FOLDER_OR_ID, ...}`.

    Settings left out take their defaults. device: where a network codec computes (the linear one follows its input).
    Raises ValueError for a spec that names no codec or other weights than are found, CodecUnavailable where weights are
    missing.
    """
    kind = spec.get("kind")
    if kind == "linear":
        return LinearCodec.from_spec(spec)
    if kind == "diffusers":
        return DiffusersCodec.from_spec(spec, device=device)
    raise ValueError(f"codec spec has kind {kind!r}: use 'linear' or 'diffusers'")
