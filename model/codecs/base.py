"""The contract of a codec: frames to latents and back, and the checks that all codecs share.

Nobody else assumes a number of channels, a factor or a scale. Two codecs: `LinearCodec` (fixed block transform, needs
no weights) and `DiffusersCodec` (any folder in Stable Diffusion format). Each gives a JSON spec from which
`model.codecs.factory.codec_from_spec` rebuilds it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

Text = Tensor | str | Sequence[str]
"""What a codec may be told about the frames: one embedding (L, D), one a frame (N, L, D), a caption, or N captions."""


@dataclass(frozen=True)
class Encoded:
    """What became of frames, and how well an inversion went."""

    latents: Tensor
    """(N, C, h, w) float32."""
    residual: Tensor | None = None
    """(N,) rms of the inversion's last fixed-point residual at its worst step, NaN without refinements; None where the
    codec does not invert."""
    round_trip: Tensor | None = None
    """(N,) dB, clean latents over what regeneration misses of them, NaN where it was not checked; None where the codec
    does not invert."""


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
    wants_gpu: ClassVar[bool]
    """Whether it has a network, which a GPU makes faster; known of the class, before weights are loaded."""

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, h, w) for frames of height x width pixels. Raises ValueError for sizes the codec cannot take."""
        ...

    def encode(self, frames: Tensor, text: Text | None = None) -> Encoded:
        """Frames (N, 3, H, W) in [-1, 1] to latents, on the frames' device. Raises ValueError for unfit frames."""
        ...

    def decode(self, latents: Tensor, text: Text | None = None) -> Tensor:
        """Latents (N, C, h, w) to float32 frames (N, 3, H, W), clamped to [-1, 1]."""
        ...

    def without_inversion(self, frames: Tensor) -> Tensor | None:
        """Frames (N, 3, H, W) there and back without the inversion, the best that `decode` can reach; None where the
        codec does not invert, and its round trip is that already."""
        ...

    def spec(self) -> dict[str, object]:
        """JSON able to rebuild the codec."""
        ...


RANGE_TOLERANCE = 1e-3
"""How far a pixel may lie outside [-1, 1] before the frames are refused: rounding in a resize, no more."""


def check_frames(frames: Tensor, factor: int) -> None:
    """Refuses whatever would end as poisoned latents.

    frames: float (N, 3, H, W), finite, in [-1, 1], H and W multiples of `factor`.
    Raises TypeError for another element type and ValueError for the rest; each message names the remedy.
    """
    if not frames.is_floating_point():
        raise TypeError(f"frames have type {frames.dtype}, a codec takes floats in [-1, 1]: pass frames / 127.5 - 1")
    if frames.ndim != 4 or frames.shape[1] != 3:
        raise ValueError(f"frames have shape {tuple(frames.shape)}, a codec takes (N, 3, H, W): permute RGB to axis 1")
    check_size(frames.shape[2], frames.shape[3], factor)
    if frames.numel() == 0:
        return
    # One transfer for both ends of the range; NaN and infinity survive amin and amax.
    low, high = torch.stack((frames.amin(), frames.amax())).tolist()
    if not (math.isfinite(low) and math.isfinite(high)):
        bad = (~torch.isfinite(frames)).flatten(1).any(1).nonzero().flatten().tolist()
        raise ValueError(f"frames {bad[:8]} hold NaN or infinity: drop these frames or repair what decoded them")
    if low < -1 - RANGE_TOLERANCE or high > 1 + RANGE_TOLERANCE:
        raise ValueError(f"frames lie in [{low:.4g}, {high:.4g}], a codec takes [-1, 1]: pass frames / 127.5 - 1")


def check_size(height: int, width: int, factor: int) -> None:
    """Raises ValueError unless both sides are positive multiples of `factor` (pixels)."""
    if height < 1 or width < 1 or height % factor or width % factor:
        remedy = f"{max(factor, height // factor * factor)} x {max(factor, width // factor * factor)}"
        raise ValueError(
            f"frames of {height} x {width} pixels (height x width) do not divide into blocks of {factor}: "
            f"scale or crop them to {remedy} (the recipe's `size`)"
        )


def check_latents(latents: Tensor, channels: int) -> None:
    """latents: float (N, channels, h, w), finite. Raises ValueError otherwise, naming the remedy."""
    if latents.ndim != 4 or latents.shape[1] != channels:
        raise ValueError(f"latents have shape {tuple(latents.shape)}, this codec decodes (N, {channels}, h, w)")
    finite = torch.isfinite(latents).flatten(1).all(1)
    if not bool(finite.all()):
        bad = (~finite).nonzero().flatten().tolist()
        raise ValueError(
            f"latents {bad[:8]} hold NaN or infinity: whatever made them diverged, decode the others alone"
        )


def check_spec_keys(spec: Mapping[str, object], allowed: Sequence[str]) -> None:
    """Raises ValueError for a key that nothing reads, naming the ones that are read."""
    unknown = sorted(set(spec) - set(allowed))
    if unknown:
        raise ValueError(
            f"unknown codec setting {', '.join(unknown)}: the {spec.get('kind')} codec reads {', '.join(allowed)}"
        )
