"""The codec over any folder in Stable Diffusion format: AutoencoderKL, then DDIM inversion through its UNet."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from model.codec_linear import Text, check_frames, check_latents, check_size, check_spec_keys
from model.ddim import DDIMSchedule, Inversion, PredictNoise, disagreements, guided, invert, invert_checked, regenerate
from model.prompts import TextEncoder, pretrained_text_encoder
from model.weights import CodecUnavailable, Weights, digest_tensors, find_weights, load_part

log = logging.getLogger(__name__)

SETTINGS = ("ddim_steps", "inversion_depth", "refinements", "guidance", "check_round_trip")
SPEC_KEYS = ("kind", "source", "revision", "vae", "vae_revision", *SETTINGS, "digest")
Result = TypeVar("Result")
CPU_BYTES = 2**30
"""Memory for the frames of one batch on the CPU."""
LARGE = 1024
"""Frames with a longer side than this (pixels) go through the VAE in overlapping tiles."""


class DiffusersCodec:
    """Frames to the latents of an AutoencoderKL, and on to DDIM's noise; see `from_pretrained`.

    `scale` is the VAE's `scaling_factor`, `channels` and `factor` come from its config.
    """

    def __init__(
        self,
        vae: nn.Module,
        unet: nn.Module | None,
        weights: Weights,
        vae_weights: Weights | None = None,
        *,
        ddim_steps: int = 50,
        inversion_depth: int = 50,
        refinements: int = 3,
        guidance: float = 1.0,
        check_round_trip: bool = True,
        batch: int | None = None,
        device: str = "cpu",
        unet_type: torch.dtype = torch.float32,
    ) -> None:
        config: Any = vae.config
        self.channels = int(config.latent_channels)
        self.factor = 2 ** (len(config.block_out_channels) - 1)
        self.scale = float(config.scaling_factor)
        self.schedule = DDIMSchedule(ddim_steps)
        self.inversion_depth = self.schedule.depth(inversion_depth)
        if refinements < 0:
            raise ValueError(f"refinements is {refinements}: take 0 (plain inversion) or more, 3 is the default")
        self.refinements = refinements
        self.guidance = float(guidance)
        self.check_round_trip = check_round_trip
        self._batch = batch
        self._device = torch.device(device)
        self._weights, self._vae_weights = weights, vae_weights
        if self.inversion_depth and unet is None:
            raise ValueError(f"inversion_depth is {inversion_depth} and there is no UNet: set inversion_depth to 0")
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
        self._vae: Any = _moved(vae, self._device, torch.float32)
        self._unet: Any = None if unet is None else _moved(unet, self._device, unet_type)
        self._unet_type = unet_type

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        revision: str | None = None,
        vae: str | Path | None = None,
        vae_revision: str | None = None,
        *,
        ddim_steps: int = 50,
        inversion_depth: int = 50,
        refinements: int = 3,
        guidance: float = 1.0,
        check_round_trip: bool = True,
        batch: int | None = None,
        device: str = "cpu",
        unet_type: torch.dtype = torch.float32,
        digest: str | None = None,
    ) -> DiffusersCodec:
        """The codec of a folder, or of a hub id in the local cache; safetensors only, and the network is not asked.

        source: a Stable Diffusion folder (`vae/`, `unet/`, `text_encoder/`, `tokenizer/`, `scheduler/`), or an
            AutoencoderKL folder alone, with inversion_depth 0. Or a hub id of either.
        revision, vae_revision: branch, tag or commit of a hub id; the commit is recorded.
        vae: another VAE for the same latents (`stabilityai/sd-vae-ft-mse`).
        ddim_steps: levels of the grid; divides 1000.  inversion_depth: levels climbed, 0 to ddim_steps; 0 gives the
            VAE's latents, needs no UNet and is far cheaper.  refinements: fixed-point iterations a level.
        guidance: classifier-free guidance on both ways; 1 is the caption alone, and what inverts best.
        check_round_trip: look at each frame's way back and redo bad ones (`ddim.invert_checked`).
        batch: frames at once; None chooses by the free memory. Halved when memory runs out.
        device: where the networks compute.  unet_type: the UNet's float type; DDIM's own arithmetic is float32.
        digest: sha256 (hex) the weights must have.
        Raises CodecUnavailable where weights are missing, ValueError for unfit settings or other weights. Warns where
        the folder's scheduler disagrees with the values that are used (`ddim.SCHEDULER_VALUES`).
        """
        from diffusers import AutoencoderKL, UNet2DConditionModel

        weights = find_weights(source, revision)
        vae_weights = None if vae is None else find_weights(vae, vae_revision)
        # Without this option diffusers advises to install accelerate, which it does not need here.
        plain = {"low_cpu_mem_usage": False}
        autoencoder = load_part(AutoencoderKL.from_pretrained, *_vae_place(vae_weights or weights), options=plain)
        unet = None
        if inversion_depth:
            _compare_scheduler(weights)
            unet = load_part(UNet2DConditionModel.from_pretrained, weights, "unet", options=plain)
        codec = cls(
            autoencoder, unet, weights, vae_weights, ddim_steps=ddim_steps, inversion_depth=inversion_depth,
            refinements=refinements, guidance=guidance, check_round_trip=check_round_trip, batch=batch, device=device,
            unet_type=unet_type,
        )  # fmt: skip
        if digest is not None and digest != codec.digest:
            raise ValueError(
                f"codec {codec.id} has weights {codec.digest[:16]}, the latents were made with {digest[:16]}: "
                "use the weights they were made with, or ingest again"
            )
        return codec

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, h, w) for frames of height x width pixels. Raises ValueError for sizes that do not divide by `factor`,
        or, with inversion, whose latents do not divide by the UNet's own reduction."""
        check_size(height, width, self.factor * self._unet_factor)
        return self.channels, height // self.factor, width // self.factor

    def encode(self, frames: Tensor, text: Text | None = None) -> Tensor:
        """Frames (N, 3, H, W) in [-1, 1] to float32 latents (N, C, h, w) on the frames' device.

        text: what `inversion_depth > 0` inverts with: one embedding (L, D) or one a frame (N, L, D), or the caption or
            N captions, which the folder's own text encoder embeds (with its padding, as the UNet was trained). Rows of
            an embedding that are zero are padding and are filled with its last valid row. None is the empty caption.
            Decode with the same text.
        Raises TypeError or ValueError for unfit frames (NaN, range, size) or text, and for a UNet that diverges.
        """
        return self.encode_with_certificate(frames, text).latents

    def encode_with_certificate(self, frames: Tensor, text: Text | None = None) -> Inversion:
        """`encode`, with each frame's fixed-point residual and latent round trip (dB), NaN where not measured."""
        check_frames(frames, self.factor * self._unet_factor)
        rows = self._text_rows(text, len(frames))

        def one(batch: Tensor, embedding: Tensor | None) -> Inversion:
            clean = self._vae_encode(batch.to(self._device, torch.float32))
            if not self.inversion_depth:
                unknown = clean.new_full((len(clean),), torch.nan)
                return Inversion(clean, unknown, unknown)
            noise = self._predict_noise(embedding)
            if not self.check_round_trip:
                return invert(clean, noise, self.schedule, self.inversion_depth, self.refinements)

            def for_samples(chosen: Tensor) -> PredictNoise:
                return self._predict_noise(None if embedding is None else embedding[chosen])

            return invert_checked(
                clean, noise, self.schedule, self.inversion_depth, self.refinements, for_samples=for_samples
            )

        height, width = frames.shape[2:]
        none = frames.new_zeros(0, dtype=torch.float32)
        parts = in_batches(one, frames, rows, self._frames_at_once(height, width))
        parts = parts or [Inversion(none.view(0, *self.latent_shape(height, width)), none, none)]
        return Inversion(
            torch.cat([part.latents for part in parts]).to(frames.device),
            torch.cat([part.residual for part in parts]).to(frames.device),
            torch.cat([part.round_trip for part in parts]).to(frames.device),
        )

    def decode(self, latents: Tensor, text: Text | None = None) -> Tensor:
        """Latents (N, C, h, w) to float32 frames (N, 3, H, W) clamped to [-1, 1], on the latents' device.

        Regenerates as many levels as were inverted, then decodes. text: as in `encode`, and the same.
        Raises ValueError for another shape, for latents that are not finite, and for unfit text.
        """
        check_latents(latents, self.channels)
        rows = self._text_rows(text, len(latents))

        def one(batch: Tensor, embedding: Tensor | None) -> Tensor:
            clean = batch.to(self._device, torch.float32)
            if self.inversion_depth:
                clean = regenerate(clean, self._predict_noise(embedding), self.schedule, self.inversion_depth)
            return self._vae_decode(clean)

        height, width = latents.shape[2] * self.factor, latents.shape[3] * self.factor
        parts = in_batches(one, latents, rows, self._frames_at_once(height, width))
        return torch.cat(parts or [torch.zeros(0, 3, height, width)]).to(latents.device)

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
            "refinements": self.refinements,
            "guidance": self.guidance,
            "check_round_trip": self.check_round_trip,
            "digest": self.digest,
        }

    @classmethod
    def from_spec(cls, spec: Mapping[str, object], device: str = "cpu") -> DiffusersCodec:
        """Rebuilds a codec; all keys but `source` are optional. Errors as `from_pretrained`."""
        check_spec_keys(spec, SPEC_KEYS)
        if not spec.get("source"):
            raise ValueError("codec spec of kind 'diffusers' names no source: give it a folder or a hub id")
        # JSON's types are checked by use: DDIMSchedule and find_weights refuse what they cannot read.
        given = {key: value for key, value in spec.items() if key not in ("kind", "source") and value is not None}
        return cls.from_pretrained(str(spec["source"]), device=device, **given)  # type: ignore[arg-type]

    @cached_property
    def text_encoder(self) -> TextEncoder:
        """The folder's own text encoder, loaded when first used. Raises CodecUnavailable where it has none."""
        return pretrained_text_encoder(self._weights.folder, device=str(self._device))

    @property
    def _unet_factor(self) -> int:
        return 1 if self._unet is None else 2 ** (len(self._unet.config.block_out_channels) - 1)

    def _name(self) -> str:
        # A commit names weights as well as their digest does, and a person can look it up.
        commit = self._weights.revision
        vae = self._vae_weights
        name = f"{self._weights.name}@{commit[:12] if commit and vae is None else self.digest[:16]}"
        if vae is not None:
            name += f"+{vae.name}"
        if not self.inversion_depth:
            return f"{name}-vae"
        check = "" if self.check_round_trip else "-unchecked"
        guidance = "" if self.guidance == 1 else f"-g{self.guidance:g}"
        return f"{name}-ddim{self.inversion_depth}of{self.schedule.ddim_steps}-r{self.refinements}{check}{guidance}"

    @torch.no_grad()
    def _vae_encode(self, frames: Tensor) -> Tensor:
        self._vae.use_tiling = max(frames.shape[2:]) > LARGE
        # mode, not a sample: the same frame always has the same latents.
        mode = self._vae.encode(frames).latent_dist.mode()
        shift, gain = self._normalisation
        return (mode - shift) * gain

    @torch.no_grad()
    def _vae_decode(self, latents: Tensor) -> Tensor:
        self._vae.use_tiling = max(latents.shape[2:]) * self.factor > LARGE
        shift, gain = self._normalisation
        frames: Tensor = self._vae.decode(latents / gain + shift).sample
        return frames.clamp(-1, 1)

    @cached_property
    def _normalisation(self) -> tuple[Tensor, Tensor]:
        """Shift and gain (1, C or 1, 1, 1): SD's scaling factor, SD 3's shift, SDXL variants' mean and deviation."""
        config = self._vae.config
        shift = config.latents_mean or config.shift_factor or 0.0
        spread = config.latents_std or 1.0
        shifts, spreads = (torch.tensor(value, device=self._device).view(1, -1, 1, 1) for value in (shift, spread))
        return shifts, self.scale / spreads

    def _predict_noise(self, text: Tensor | None) -> PredictNoise:
        unet = self._unet
        assert unet is not None
        assert text is not None  # `_text_rows` sees to it

        def with_text(embedding: Tensor) -> PredictNoise:
            states = embedding.to(self._device, self._unet_type)

            def predict_noise(latents: Tensor, ddim_step: Tensor) -> Tensor:
                noise: Tensor = unet(latents.to(self._unet_type), ddim_step, states).sample
                return noise

            return predict_noise

        if self.guidance == 1:
            return with_text(text)
        return guided(with_text(text), with_text(self._empty.expand(len(text), -1, -1)), self.guidance)

    @cached_property
    def _empty(self) -> Tensor:
        return self.text_encoder.encode([""], padded=True)[0]

    def _text_rows(self, text: Text | None, count: int) -> Tensor | None:
        """(count, L, D) embeddings without zero rows; None where no UNet asks for them."""
        if self._unet is None:
            return None
        width = int(self._unet.config.cross_attention_dim)
        if isinstance(text, Tensor):
            rows = text if text.ndim == 3 else text.unsqueeze(0)
            rows = filled(rows.float())
        elif text is None:
            rows = self._empty
        else:
            rows = self.text_encoder.encode([text] if isinstance(text, str) else list(text), padded=True)[0]
        if rows.ndim != 3 or len(rows) not in (1, count) or rows.shape[2] != width:
            raise ValueError(
                f"text has shape {tuple(rows.shape)} for {count} frames, the UNet takes (L, {width}) or "
                f"({count}, L, {width}): pass the caption itself, or embeddings of the codec's own text encoder"
            )
        return rows.expand(count, -1, -1)

    def _frames_at_once(self, height: int, width: int) -> int:
        if self._batch is not None:
            return self._batch
        # An estimate: so many float32 maps of the VAE's first width live at once at full resolution (its decoder).
        bytes_a_frame = 12 * 4 * int(self._vae.config.block_out_channels[0]) * height * width
        free = torch.cuda.mem_get_info(self._device)[0] // 2 if self._device.type == "cuda" else CPU_BYTES
        return max(1, min(64, free // bytes_a_frame))


def in_batches(
    compute: Callable[[Tensor, Tensor | None], Result], items: Tensor, text: Tensor | None, batch: int
) -> list[Result]:
    """`compute(items[i:j], text[i:j])` over all items, `batch` at once; where memory runs out the batch is halved.

    Raises RuntimeError with the mend where one item alone is too much; other errors pass.
    """
    results, first = [], 0
    while first < len(items):
        part = slice(first, first + batch)
        try:
            results.append(compute(items[part], None if text is None else text[part]))
        except torch.OutOfMemoryError as error:
            if batch == 1:
                size = " x ".join(str(side) for side in items.shape[1:])
                raise RuntimeError(
                    f"one item of {size} does not fit into the device's memory: use smaller frames (the recipe's "
                    "`size`), a device with more memory, or close what else runs there"
                ) from error
            batch //= 2
            log.warning("out of memory: the batch is halved to %d and done again", batch)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        else:
            first += batch
    return results


def filled(text: Tensor) -> Tensor:
    """Embeddings (N, L, D) whose zero rows at the end, padding, are replaced by their last valid row, the end mark.

    CLIP pads with that same mark, so this is close to what the UNet saw in training, and a caption stored at its own
    length gives the same latents as one stored padded. No host synchronisation.
    """
    place = torch.arange(text.shape[1], device=text.device)
    last = (text.ne(0).any(2) * place).amax(1)
    index = torch.minimum(place.expand(len(text), -1), last.unsqueeze(1))
    return text.gather(1, index.unsqueeze(2).expand_as(text))


def _moved(network: nn.Module, device: torch.device, kind: torch.dtype) -> nn.Module:
    # nn.Module's own `to`: diffusers' warns of layers to keep in float32 even where the model names none.
    return nn.Module.to(network, device, kind).eval().requires_grad_(False)


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
