"""The codec over any folder in Stable Diffusion format: AutoencoderKL, then DDIM inversion through its UNet."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from model.codecs.base import Encoded, Text, check_frames, check_latents, check_size, check_spec_keys
from model.codecs.batches import Networks, Result, gpu_compiler, in_batches, levels
from model.codecs.ddim import (
    DDIMSchedule,
    Inversion,
    PredictNoise,
    disagreements,
    guided,
    invert,
    invert_checked,
    regenerate,
)
from model.codecs.networks import autoencoder_type
from model.text.encoder import TextEncoder, pretrained_text_encoder
from model.weights import CodecUnavailable, Weights, digest_tensors, find_weights, load_part

SETTINGS = ("ddim_steps", "inversion_depth", "refinements", "guidance", "check_round_trip")
"""Fields of DiffusersSettings that change latents, and so `id` and `spec`."""
SPEC_KEYS = ("kind", "source", "revision", "vae", "vae_revision", *SETTINGS, "compiled", "digest")


@dataclass(frozen=True)
class DiffusersSettings:
    """How a codec inverts, and how its networks compute. Raises ValueError for values that cannot be."""

    ddim_steps: int = 50
    """Levels of the grid; divides 1000."""
    inversion_depth: int = 50
    """Levels inverted, 0 to ddim_steps; 0 gives the VAE's latents, needs no UNet and is far cheaper."""
    refinements: int = 3
    """Fixed-point iterations a level."""
    guidance: float = 1.0
    """Classifier-free guidance on both ways; 1 is the caption alone, and what inverts best."""
    check_round_trip: bool = True
    """Whether each frame's way back is looked at and bad ones are redone (`ddim.invert_checked`)."""
    batch: int | None = None
    """Frames at once; None chooses by the free memory. Halved when memory runs out."""
    device: str = "cpu"
    """Where the networks compute."""
    unet_type: torch.dtype | None = None
    """The UNet's float type, None for bfloat16 on a GPU and float32 elsewhere; DDIM's own arithmetic is float32."""
    vae_type: torch.dtype | None = None
    """The VAE's, alike."""
    compiled: bool = False
    """Whether, on a GPU, full batches go through torch.compile and CUDA graphs. The first batch of each size of frames
    waits for it, a minute or two with Stable Diffusion; it pays from some thousand frames on. Changes neither `id` nor
    `spec`, and nothing on a CPU."""

    def __post_init__(self) -> None:
        DDIMSchedule(self.ddim_steps).depth(self.inversion_depth)
        if self.refinements < 0:
            raise ValueError(f"refinements is {self.refinements}: take 0 (plain inversion) or more, 3 is the default")


class DiffusersCodec:
    """Frames to the latents of an AutoencoderKL, and on to DDIM's noise; see `from_pretrained`.

    `scale` is the VAE's `scaling_factor`, `channels` and `factor` come from its config.
    """

    wants_gpu: ClassVar[bool] = True

    def __init__(
        self,
        vae: nn.Module,
        unet: nn.Module | None,
        weights: Weights,
        vae_weights: Weights | None = None,
        settings: DiffusersSettings | None = None,
    ) -> None:
        self.settings = settings = settings or DiffusersSettings()
        config: Any = vae.config
        self.channels = int(config.latent_channels)
        self.factor = 2 ** (len(levels(vae)) - 1)
        self.scale = float(config.scaling_factor)
        self.schedule = DDIMSchedule(settings.ddim_steps)
        self.inversion_depth = self.schedule.depth(settings.inversion_depth)
        self._batches: dict[tuple[int, int], int] = {}
        self._weights, self._vae_weights = weights, vae_weights
        if self.inversion_depth and unet is None:
            raise ValueError(
                f"inversion_depth is {self.inversion_depth} and there is no UNet: set inversion_depth to 0"
            )
        unet_config: Any = None if unet is None else unet.config
        if unet is not None and int(unet_config.in_channels) != self.channels:
            raise ValueError(
                f"the UNet takes {unet_config.in_channels} channels, the VAE makes {self.channels}: "
                "name another vae, or set inversion_depth to 0"
            )
        parts = dict(vae.named_parameters(prefix="vae"))
        if unet is not None:
            parts |= dict(unet.named_parameters(prefix="unet"))
        self.digest = digest_tensors(parts)
        self.id = self._name()
        # Compiling is for GPUs: a CPU gains little from it, and would need a C++ compiler.
        on_gpu = torch.device(settings.device).type == "cuda"
        compiler = gpu_compiler() if settings.compiled and on_gpu else None
        self._networks = Networks(vae, unet, settings.device, settings.vae_type, settings.unet_type, compiler)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        settings: DiffusersSettings | None = None,
        *,
        revision: str | None = None,
        vae: str | Path | None = None,
        vae_revision: str | None = None,
        digest: str | None = None,
    ) -> DiffusersCodec:
        """The codec of a folder, or of a hub id in the local cache; safetensors only, and the network is not asked.

        source: a Stable Diffusion folder (`vae/`, `unet/`, `text_encoder/`, `tokenizer/`, `scheduler/`), or an
            AutoencoderKL folder alone, with inversion_depth 0. Or a hub id of either.
        settings: how to invert and compute; the defaults where there are none.
        revision, vae_revision: branch, tag or commit of a hub id; the commit is recorded.
        vae: another VAE for the same latents (`stabilityai/sd-vae-ft-mse`).
        digest: sha256 (hex) the weights must have.
        Raises CodecUnavailable where weights are missing, ValueError for other weights. Warns where the folder's
        scheduler disagrees with the values that are used (`ddim.SCHEDULER_VALUES`).
        """
        from diffusers import UNet2DConditionModel

        settings = settings or DiffusersSettings()
        weights = find_weights(source, revision)
        vae_weights = None if vae is None else find_weights(vae, vae_revision)
        # Without this option diffusers advises to install accelerate, which it does not need here.
        plain = {"low_cpu_mem_usage": False}
        place, part = _vae_place(vae_weights or weights)
        autoencoder = load_part(autoencoder_type(place.folder / part).from_pretrained, place, part, options=plain)
        unet = None
        if settings.inversion_depth:
            _compare_scheduler(weights)
            unet = load_part(UNet2DConditionModel.from_pretrained, weights, "unet", options=plain)
        codec = cls(autoencoder, unet, weights, vae_weights, settings)
        if digest is not None and digest != codec.digest:
            raise ValueError(
                f"codec {codec.id} has weights {codec.digest[:16]}, the latents were made with {digest[:16]}: "
                "use the weights they were made with, or ingest again"
            )
        return codec

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, h, w) for frames of height x width pixels. Raises ValueError for sizes that do not divide by `factor`,
        or, with inversion, whose latents do not divide by the UNet's own reduction."""
        check_size(height, width, self.factor * self._networks.unet_factor)
        return self.channels, height // self.factor, width // self.factor

    def encode(self, frames: Tensor, text: Text | None = None) -> Encoded:
        """Frames (N, 3, H, W) in [-1, 1] to float32 latents (N, C, h, w), and how well their inversion went.

        All of it is on the frames' device.

        text: what `inversion_depth > 0` inverts with: one embedding (L, D) or one a frame (N, L, D), or the caption or
            N captions, which the folder's own text encoder embeds (with its padding, as the UNet was trained). Rows of
            an embedding that are zero are padding and are filled with its last valid row. None is the empty caption.
            Decode with the same text.
        Raises TypeError or ValueError for unfit frames (NaN, range, size) or text, and for a UNet that diverges.
        """
        check_frames(frames, self.factor * self._networks.unet_factor)
        rows = self._text_rows(text, len(frames))
        height, width = frames.shape[2:]
        none = frames.new_zeros(0, dtype=torch.float32)
        no_latents = none.view(0, *self.latent_shape(height, width))

        def clean(batch: Tensor, _: Tensor | None) -> Tensor:
            return self._networks.encode(batch, self._frames_at_once(height, width))

        if not self.inversion_depth:
            parts = self._in_batches(clean, frames, rows, height, width)
            return Encoded(torch.cat(parts or [no_latents]).to(frames.device))

        def inverted(batch: Tensor, embedding: Tensor | None) -> Inversion:
            return self._invert(clean(batch, None), embedding, height, width)

        found = self._in_batches(inverted, frames, rows, height, width) or [Inversion(no_latents, none, none)]
        return Encoded(
            torch.cat([part.latents for part in found]).to(frames.device),
            torch.cat([part.residual for part in found]).to(frames.device),
            torch.cat([part.round_trip for part in found]).to(frames.device),
        )

    def _invert(self, clean: Tensor, embedding: Tensor | None, height: int, width: int) -> Inversion:
        """Clean latents of frames of height x width pixels to noisy ones."""
        noise, refinements = self._predict_noise(embedding, height, width), self.settings.refinements
        if not self.settings.check_round_trip:
            return invert(clean, noise, self.schedule, self.inversion_depth, refinements)

        def for_samples(chosen: Tensor) -> PredictNoise:
            return self._predict_noise(None if embedding is None else embedding[chosen.cpu()], height, width)

        return invert_checked(clean, noise, self.schedule, self.inversion_depth, refinements, for_samples=for_samples)

    def decode(self, latents: Tensor, text: Text | None = None) -> Tensor:
        """Latents (N, C, h, w) to float32 frames (N, 3, H, W) clamped to [-1, 1], on the latents' device.

        Regenerates as many levels as were inverted, then decodes. text: as in `encode`, and the same.
        Raises ValueError for another shape, for latents that are not finite, and for unfit text.
        """
        check_latents(latents, self.channels)
        rows = self._text_rows(text, len(latents))
        height, width = latents.shape[2] * self.factor, latents.shape[3] * self.factor

        def one(batch: Tensor, embedding: Tensor | None) -> Tensor:
            clean = batch.to(self._networks.device, torch.float32)
            if self.inversion_depth:
                noise = self._predict_noise(embedding, height, width)
                clean = regenerate(clean, noise, self.schedule, self.inversion_depth)
            return self._networks.decode(clean, self._frames_at_once(height, width))

        parts = self._in_batches(one, latents, rows, height, width)
        return torch.cat(parts or [torch.zeros(0, 3, height, width)]).to(latents.device)

    def without_inversion(self, frames: Tensor) -> Tensor | None:
        """Frames (N, 3, H, W) in [-1, 1] through the VAE and back: what `decode` can reach at best.

        None where nothing is inverted. Raises TypeError or ValueError for unfit frames, as `encode` does.
        """
        if not self.inversion_depth:
            return None
        check_frames(frames, self.factor)
        height, width = frames.shape[2:]

        def one(batch: Tensor, _: Tensor | None) -> Tensor:
            rows = self._frames_at_once(height, width)
            return self._networks.decode(self._networks.encode(batch, rows), rows)

        parts = self._in_batches(one, frames, None, height, width)
        return torch.cat(parts or [frames.float()]).to(frames.device)

    def spec(self) -> dict[str, object]:
        """JSON from which `codec_from_spec` rebuilds this codec. `source` is what was asked for, a folder's path or a
        hub id; `id` and `digest` hold no path."""
        vae = self._vae_weights
        return {
            "kind": "diffusers",
            "source": self._weights.source,
            "revision": self._weights.revision,
            "vae": None if vae is None else vae.source,
            "vae_revision": None if vae is None else vae.revision,
            "ddim_steps": self.schedule.ddim_steps,
            "inversion_depth": self.inversion_depth,
            "refinements": self.settings.refinements,
            "guidance": float(self.settings.guidance),
            "check_round_trip": self.settings.check_round_trip,
            "digest": self.digest,
        }

    @classmethod
    def from_spec(cls, spec: Mapping[str, object], device: str = "cpu") -> DiffusersCodec:
        """Rebuilds a codec; all keys but `source` are optional. Errors as `from_pretrained`."""
        check_spec_keys(spec, SPEC_KEYS)
        if not spec.get("source"):
            raise ValueError("codec spec of kind 'diffusers' names no source: give it a folder or a hub id")
        # JSON's types are checked by use: DDIMSchedule and find_weights refuse what they cannot read.
        given: dict[str, Any] = {key: value for key, value in spec.items() if value is not None}
        settings = DiffusersSettings(
            **{key: given[key] for key in (*SETTINGS, "compiled") if key in given}, device=device
        )
        where = {key: given[key] for key in ("revision", "vae", "vae_revision", "digest") if key in given}
        return cls.from_pretrained(str(spec["source"]), settings, **where)

    @cached_property
    def text_encoder(self) -> TextEncoder:
        """The folder's own text encoder, loaded when first used. Raises CodecUnavailable where it has none."""
        return pretrained_text_encoder(self._weights.folder, device=str(self._networks.device))

    def _name(self) -> str:
        # A commit names weights as well as their digest does, and a person can look it up.
        commit = self._weights.revision
        vae = self._vae_weights
        name = f"{self._weights.name}@{commit[:12] if commit and vae is None else self.digest[:16]}"
        if vae is not None:
            name += f"+{vae.name}"
        if not self.inversion_depth:
            return f"{name}-vae"
        settings = self.settings
        check = "" if settings.check_round_trip else "-unchecked"
        guidance = "" if settings.guidance == 1 else f"-g{settings.guidance:g}"
        return f"{name}-ddim{self.inversion_depth}of{self.schedule.ddim_steps}-r{settings.refinements}{check}{guidance}"

    def _predict_noise(self, text: Tensor | None, height: int, width: int) -> PredictNoise:
        assert text is not None  # `_text_rows` sees to it
        rows = self._frames_at_once(height, width)
        conditional = self._networks.noise(text, rows)
        if self.settings.guidance == 1:
            return conditional
        unconditional = self._networks.noise(self._empty.expand(len(text), -1, -1), rows)
        return guided(conditional, unconditional, float(self.settings.guidance))

    @cached_property
    def _empty(self) -> Tensor:
        return self.text_encoder.encode([""], padded=True)[0]

    def _text_rows(self, text: Text | None, count: int) -> Tensor | None:
        """(count, L, D) embeddings without zero rows; None where no UNet asks for them."""
        if self._networks.unet is None:
            return None
        width = int(self._networks.unet.config.cross_attention_dim)
        if isinstance(text, Tensor):
            rows = text if text.ndim == 3 else text.unsqueeze(0)
            rows = filled(rows.float())
        elif text is None:
            rows = self._empty
        else:
            captions = [text] if isinstance(text, str) else list(text)
            distinct = list(dict.fromkeys(captions))  # all frames of a clip have one caption: it is embedded once
            rows = self.text_encoder.encode(distinct, padded=True)[0]
            if len(captions) > 1:
                rows = rows[[distinct.index(caption) for caption in captions]]
        if rows.ndim != 3 or len(rows) not in (1, count) or rows.shape[2] != width:
            raise ValueError(
                f"text has shape {tuple(rows.shape)} for {count} frames, the UNet takes (L, {width}) or "
                f"({count}, L, {width}): pass the caption itself, or embeddings of the codec's own text encoder"
            )
        return rows.expand(count, -1, -1)

    def _frames_at_once(self, height: int, width: int) -> int:
        """The size of a full batch; chosen once for a size of frames, since compiled networks need one shape."""
        if (height, width) not in self._batches:
            self._batches[height, width] = self.settings.batch or self._networks.rows(height, width)
        return self._batches[height, width]

    def _in_batches(
        self,
        compute: Callable[[Tensor, Tensor | None], Result],
        items: Tensor,
        text: Tensor | None,
        height: int,
        width: int,
    ) -> list[Result]:
        def halved(batch: int) -> None:
            self._batches[height, width] = batch

        return in_batches(compute, items, text, self._frames_at_once(height, width), halved)


def filled(text: Tensor) -> Tensor:
    """Embeddings (N, L, D) whose zero rows at the end, padding, are replaced by their last valid row, the end mark.

    CLIP pads with that same mark, so this is close to what the UNet saw in training, and a caption stored at its own
    length gives the same latents as one stored padded. No host synchronisation.
    """
    place = torch.arange(text.shape[1], device=text.device)
    last = (text.ne(0).any(2) * place).amax(1)
    index = torch.minimum(place.expand(len(text), -1), last.unsqueeze(1))
    return text.gather(1, index.unsqueeze(2).expand_as(text))


def _vae_place(weights: Weights) -> tuple[Weights, str]:
    part = "vae" if (weights.folder / "vae").is_dir() else ""
    if not part and (weights.folder / "model_index.json").is_file():
        raise CodecUnavailable(f"{weights.name} has no vae/ folder: fetch it whole, or name another vae")
    return weights, part


def _compare_scheduler(weights: Weights) -> None:
    """Warns of scheduler values that are not used; refuses networks that predict something else than eps."""
    file = weights.folder / "scheduler" / "scheduler_config.json"
    if not file.is_file():
        return
    config = json.loads(file.read_text())
    if config.get("prediction_type", "epsilon") != "epsilon":
        raise ValueError(
            f"the UNet of {weights.name} predicts {config['prediction_type']!r}, DDIM here needs 'epsilon': "
            "use a Stable Diffusion 1.x folder, or set inversion_depth to 0"
        )
    for line in disagreements(config):
        warnings.warn(f"{weights.name}/scheduler: {line}", UserWarning, stacklevel=3)
