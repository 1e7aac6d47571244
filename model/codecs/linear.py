"""The linear codec: a fixed orthonormal block transform whose error is known exactly.

A block of `factor x factor` pixels is rotated in colour (grey first), transformed by the two-dimensional DCT, and the
`channels` basis vectors of highest expected energy are kept. Nothing is trained, so pictures can be looked at before
there are any weights, and what is lost is known beforehand (Parseval).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from model.codecs.base import Encoded, Text, check_frames, check_latents, check_size, check_spec_keys


@dataclass(frozen=True)
class LinearSettings:
    """What makes a linear codec. Raises ValueError for values out of range."""

    factor: int = 4
    """Side of a block in pixels, at least 1."""
    channels: int = 12
    """Kept coefficients, 1 to `3 * factor**2`."""
    scale: float | None = None
    """Latents are scale * coefficients. None means `natural_scale`."""
    grey: float = 0.0
    """The pixel value, -1 to 1, whose flat frame has latents of zero. A flow from noise carries what all frames share
    too: dark films are learned sooner from the mean of their own than from mid-grey."""

    def __post_init__(self) -> None:
        if self.factor < 1:
            raise ValueError(f"factor is {self.factor}, a block has at least 1 pixel a side: pass factor >= 1")
        offered = 3 * self.factor**2
        if not 1 <= self.channels <= offered:
            raise ValueError(f"channels is {self.channels}, factor {self.factor} offers 1 to {offered}")
        if self.scale is not None and not (math.isfinite(self.scale) and self.scale > 0):
            raise ValueError(
                f"scale is {self.scale}, it must be positive and finite; leave it out for {self.natural_scale:.6g}"
            )
        if not -1 <= self.grey <= 1:
            raise ValueError(f"grey is {self.grey}, a pixel lies in [-1, 1]; leave it out for 0")

    @property
    def natural_scale(self) -> float:
        """`sqrt(channels / (3 * factor**2))`: gives the latents the mean square of the pixels when all the energy is
        kept."""
        return math.sqrt(self.channels / (3 * self.factor**2))


class LinearCodec:
    """Orthonormal block transform, `channels` of its `3 * factor**2` coefficients kept.

    The colours are grey `(1,1,1)/sqrt 3`, red-blue `(1,0,-1)/sqrt 2`, green-magenta `(1,-2,1)/sqrt 6` (the rotation of
    Ohta, Kanade and Sakai 1980, close to the principal axes of natural images). See `basis_order` for which vectors are
    kept. `factor=1, channels=3` is the identity: latents are the RGB frames, less `grey`, times `scale`.
    """

    wants_gpu: ClassVar[bool] = False

    def __init__(self, settings: LinearSettings | None = None) -> None:
        settings = settings or LinearSettings()
        factor, channels, natural = settings.factor, settings.channels, settings.natural_scale
        self.factor = factor
        self.channels = channels
        self.scale = natural if settings.scale is None else float(settings.scale)
        self.grey = float(settings.grey)
        self.id = f"linear-f{factor}-c{channels}" + ("" if self.scale == natural else f"-scale{self.scale:.9g}")
        self.id += f"-grey{self.grey:.9g}" if self.grey else ""
        self._identity = factor == 1 and channels == 3
        basis = np.eye(3) if self._identity else block_basis(factor)
        self._kept = torch.from_numpy(basis[:channels]).float()

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, h, w) of a frame of height x width pixels. Raises ValueError for sizes that do not divide."""
        check_size(height, width, self.factor)
        return self.channels, height // self.factor, width // self.factor

    def encode(self, frames: Tensor, text: Text | None = None) -> Encoded:
        """Frames (N, 3, H, W) in [-1, 1] to latents (N, C, h, w), float32; `text` is not used, nothing is inverted.

        Raises TypeError or ValueError as `check_frames` does.
        """
        check_frames(frames, self.factor)
        frames = frames.float() - self.grey if self.grey else frames.float()
        if self._identity:
            return Encoded(frames * self.scale)
        if len(frames) == 0:  # pixel_unshuffle refuses no frames
            return Encoded(frames.new_zeros((0, *self.latent_shape(frames.shape[2], frames.shape[3]))))
        kept = self._kept.to(frames.device)
        blocks = functional.pixel_unshuffle(frames, self.factor)
        return Encoded(torch.einsum("kc,nchw->nkhw", kept, blocks) * self.scale)

    def decode(self, latents: Tensor, text: Text | None = None, clamp: bool = True) -> Tensor:
        """Latents (N, C, h, w) to frames (N, 3, H, W), float32, clamped to [-1, 1] unless `clamp` is False.

        Raises ValueError for another shape and for latents that are not finite. `text` is not used.
        """
        check_latents(latents, self.channels)
        coefficients = latents.float() / self.scale
        if self._identity or len(latents) == 0:
            side = self.factor
            frames = coefficients.reshape(-1, 3, latents.shape[2] * side, latents.shape[3] * side)
        else:
            kept = self._kept.to(latents.device)
            frames = functional.pixel_shuffle(torch.einsum("kc,nkhw->nchw", kept, coefficients), self.factor)
        frames = frames + self.grey if self.grey else frames
        return frames.clamp(-1, 1) if clamp else frames

    def without_inversion(self, frames: Tensor) -> None:
        """None: this codec does not invert."""

    def spec(self) -> dict[str, object]:
        """JSON from which `codec_from_spec` rebuilds this codec; as older versions wrote it where `grey` is 0."""
        return {
            "kind": "linear",
            "factor": self.factor,
            "channels": self.channels,
            "scale": self.scale,
            "basis": self._basis_digest(),
            **({"grey": self.grey} if self.grey else {}),
        }

    @classmethod
    def from_spec(cls, spec: Mapping[str, object], device: str = "cpu") -> LinearCodec:
        """Rebuilds a codec; it computes where its input is, whatever `device` says.

        Raises ValueError where the spec was written by another basis order, or is no such spec.
        """
        check_spec_keys(spec, ("kind", "factor", "channels", "scale", "grey", "basis"))
        factor, channels, scale = spec.get("factor", 4), spec.get("channels", 12), spec.get("scale")
        grey = spec.get("grey", 0.0)
        if not (
            isinstance(factor, int)
            and isinstance(channels, int)
            and isinstance(scale, int | float | None)
            and isinstance(grey, int | float)
        ):
            raise ValueError(
                f"codec spec {dict(spec)}: factor and channels are integers, scale a number or absent, grey a number"
            )
        codec = cls(LinearSettings(factor, channels, scale, grey))
        if spec.get("basis", codec._basis_digest()) != codec._basis_digest():
            raise ValueError(
                f"the latents were made with basis {spec['basis']}, here {codec.id} has {codec._basis_digest()}: read "
                "them with the version of vlfm that wrote them, or ingest again"
            )
        return codec

    def _basis_digest(self) -> str:
        kept = ["rgb"] if self._identity else [list(vector) for vector in basis_order(self.factor)[: self.channels]]
        return hashlib.sha256(json.dumps(kept).encode()).hexdigest()[:16]


COLOUR_ENERGY = (1.0, 0.1, 0.03)
"""Expected energy of the three colour axes relative to grey (measured on seven real films: 1, 0.095, 0.023)."""


def basis_order(factor: int) -> list[tuple[int, int, int]]:
    """The `3 * factor**2` basis vectors as (colour, vertical frequency, horizontal frequency), first kept first.

    They are sorted by the energy a natural image is expected to have there: power spectra fall isotropically, and a
    DCT coefficient of frequency f (in half cycles a block) is given `COLOUR_ENERGY / (1/4 + |f|**2)**1.5`. On real
    films this order is within 0.75 dB of the best fixed one at factor 4 (and equal to it at 8 and at 16 channels).
    """

    def rank(vector: tuple[int, int, int]) -> tuple[float, int, int, int]:
        colour, vertical, horizontal = vector
        energy = COLOUR_ENERGY[colour] / (0.25 + vertical**2 + horizontal**2) ** 1.5
        return -round(energy, 9), colour, vertical, horizontal

    return sorted(
        ((colour, y, x) for colour in range(3) for y in range(factor) for x in range(factor)),
        key=rank,
    )


def block_basis(factor: int) -> NDArray[np.float64]:
    """The orthonormal basis, float64, square: rows as `basis_order`, columns as `pixel_unshuffle`."""
    colours = np.array([[1, 1, 1], [1, 0, -1], [1, -2, 1]], dtype=np.float64)
    colours /= np.linalg.norm(colours, axis=1, keepdims=True)
    position = np.arange(factor) + 0.5
    waves = np.cos(np.pi * np.outer(np.arange(factor), position) / factor) * math.sqrt(2 / factor)
    waves[0] = math.sqrt(1 / factor)
    rows = [np.einsum("c,y,x->cyx", colours[c], waves[y], waves[x]).ravel() for c, y, x in basis_order(factor)]
    return np.stack(rows)
