"""A codec's VAE and UNet at work: float types, memory layout, eager or compiled, frames in equal batches."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cached_property, partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from model.codecs.ddim import PredictNoise

log = logging.getLogger(__name__)

Result = TypeVar("Result")
Computation = Callable[..., Tensor]
Compiler = Callable[[Computation], Computation]
"""What makes a computation on tensors of one shape faster: `torch.compile` with its settings."""

CPU_BYTES = 2**30
"""Memory for the frames of one batch on the CPU."""
LARGE = 1024
"""Frames with a longer side than this (pixels) go through the VAE in overlapping tiles."""
MOST_ROWS = 64
"""Frames at once, however much memory there is; the networks gain nothing from more."""


def gpu_compiler(mode: str = "reduce-overhead") -> Compiler:
    """`torch.compile` for one shape, without breaks; this mode replays the kernels as a CUDA graph."""
    return partial(torch.compile, fullgraph=True, dynamic=False, mode=mode)


def levels(vae: nn.Module) -> tuple[int, ...]:
    """Channels of the levels of an AutoencoderKL, or of an AutoencoderDC's decoder, from fine to coarse."""
    config: Any = vae.config
    return tuple(config.get("block_out_channels") or config["decoder_block_out_channels"])


class Networks:
    """VAE and UNet of a codec on one device; float32 goes in and comes out.

    Args:
        vae: an AutoencoderKL.
        unet: a UNet2DConditionModel for its latents, or None.
        device: where they compute.
        vae_type, unet_type: float types of the networks; None is bfloat16 on a GPU and float32 elsewhere. bfloat16 and
            not float16, in which large activations of some VAEs overflow; its rounding is far below a VAE's own error
            (docs/benchmarks.md), and the DDIM steps around the UNet stay in float32.
        compiler: what compiles the networks, for full batches; None leaves them eager. Where it fails, one warning is
            logged and they go on eager.
    """

    def __init__(
        self,
        vae: nn.Module,
        unet: nn.Module | None,
        device: str | torch.device = "cpu",
        vae_type: torch.dtype | None = None,
        unet_type: torch.dtype | None = None,
        compiler: Compiler | None = None,
    ) -> None:
        self.device = torch.device(device)
        on_gpu = self.device.type == "cuda"
        usual = torch.bfloat16 if on_gpu else torch.float32
        self.vae_type, self.unet_type = vae_type or usual, unet_type or usual
        # Tensor cores read the channels of a pixel together; without this cuDNN transposes around every convolution.
        self._layout = torch.channels_last if on_gpu else torch.preserve_format
        self.vae: Any = self._moved(vae, self.vae_type)
        self.unet: Any = None if unet is None else self._moved(unet, self.unet_type)
        plain: tuple[Computation, ...] = (self._encode, self._decode, self._noise)
        self._compiled = {} if compiler is None else {computation: compiler(computation) for computation in plain}

    @property
    def compiled(self) -> bool:
        """Whether full batches go through compiled networks."""
        return bool(self._compiled)

    @property
    def unet_factor(self) -> int:
        """What the sides of a latent must divide by; 1 without a UNet."""
        return 1 if self.unet is None else 2 ** (len(self.unet.config.block_out_channels) - 1)

    def rows(self, height: int, width: int) -> int:
        """How many frames of height x width pixels go through the networks at once: a power of two, by free memory."""
        # An estimate: so many maps of the VAE's first width live at once at full resolution (its decoder).
        item = torch.finfo(self.vae_type).bits // 8
        bytes_a_frame = 12 * item * levels(self.vae)[0] * height * width
        free = torch.cuda.mem_get_info(self.device)[0] // 2 if self.device.type == "cuda" else CPU_BYTES
        return min(MOST_ROWS, 1 << max(0, (free // bytes_a_frame).bit_length() - 1))

    @torch.no_grad()
    def encode(self, frames: Tensor, rows: int = 0) -> Tensor:
        """Frames (N, 3, H, W) in [-1, 1] to scaled latents (N, C, h, w) on the device.

        rows: the size of a full batch, which compiled networks need: N is at most that. 0 computes as it comes.
        """
        self.vae.use_tiling = max(frames.shape[2:]) > LARGE
        shift, gain = self._normalisation
        mode = self._run(self._encode, 0 if self.vae.use_tiling else rows, frames.to(self.device, torch.float32))
        return (mode - shift) * gain

    @torch.no_grad()
    def decode(self, latents: Tensor, rows: int = 0) -> Tensor:
        """Scaled latents (N, C, h, w) to frames (N, 3, H, W) in [-1, 1] on the device. rows: as in `encode`."""
        factor = 2 ** (len(levels(self.vae)) - 1)
        self.vae.use_tiling = max(latents.shape[2:]) * factor > LARGE
        shift, gain = self._normalisation
        raw = latents.to(self.device, torch.float32) / gain + shift
        return self._run(self._decode, 0 if self.vae.use_tiling else rows, raw).clamp(-1, 1)

    def noise(self, text: Tensor, rows: int = 0) -> PredictNoise:
        """The UNet as eps of latents (N, C, h, w) on the device, given N embeddings (N, L, D). rows: as in `encode`."""
        states = text.to(self.device, self.unet_type)

        @torch.no_grad()
        def predict_noise(latents: Tensor, ddim_step: Tensor) -> Tensor:
            return self._run(self._noise, rows, latents, ddim_step, states)

        return predict_noise

    def _encode(self, frames: Tensor) -> Tensor:
        # The mode, not a sample: the same frame always has the same latents.
        found = self.vae.encode(frames.to(self.vae_type, memory_format=self._layout))
        mode: Tensor = found.latent if hasattr(found, "latent") else found.latent_dist.mode()
        return mode.float()

    def _decode(self, latents: Tensor) -> Tensor:
        frames: Tensor = self.vae.decode(latents.to(self.vae_type, memory_format=self._layout)).sample
        return frames.float()

    def _noise(self, latents: Tensor, ddim_step: Tensor, states: Tensor) -> Tensor:
        noise: Tensor = self.unet(latents.to(self.unet_type, memory_format=self._layout), ddim_step, states).sample
        return noise.float()

    def _run(self, computation: Computation, rows: int, *inputs: Tensor) -> Tensor:
        """The computation, compiled for batches of `rows`: fuller than half they are padded, smaller ones go eager."""
        count = len(inputs[0])
        if computation not in self._compiled or not rows < 2 * count <= 2 * rows:
            return computation(*inputs)
        try:
            # Contiguous, since other strides are another shape to a compiler: minutes for a copy of no weight.
            result = self._compiled[computation](*(padded(each, rows).contiguous() for each in inputs))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            log.warning("torch.compile failed, the codec goes on without it: %s", reason)
            self._compiled = {}
            return computation(*inputs)
        return result[:count].clone()  # a CUDA graph writes its next result to the same place

    @cached_property
    def _normalisation(self) -> tuple[Tensor, Tensor]:
        """Shift and gain (1, C or 1, 1, 1): SD's scaling factor, SD 3's shift, SDXL variants' mean and deviation."""
        config = self.vae.config
        shift = config.get("latents_mean") or config.get("shift_factor") or 0.0
        spread = config.get("latents_std") or 1.0
        shifts, spreads = (torch.tensor(value, device=self.device).view(1, -1, 1, 1) for value in (shift, spread))
        return shifts, float(config.scaling_factor) / spreads

    def _moved(self, network: nn.Module, kind: torch.dtype) -> nn.Module:
        # nn.Module's own `to`: diffusers' warns of layers to keep in float32 even where the model names none.
        move: Any = nn.Module.to  # its stub knows no memory_format
        moved: nn.Module = move(network, self.device, kind, memory_format=self._layout)
        return moved.eval().requires_grad_(False)


def padded(batch: Tensor, rows: int) -> Tensor:
    """The batch (N, ...) with its last row repeated up to `rows`; scalars and full batches as they are."""
    if batch.ndim == 0 or len(batch) == rows:
        return batch
    return torch.cat([batch, batch[-1:].expand(rows - len(batch), *batch.shape[1:])])


def in_batches(
    compute: Callable[[Tensor, Tensor | None], Result],
    items: Tensor,
    text: Tensor | None,
    batch: int,
    halved: Callable[[int], None] | None = None,
) -> list[Result]:
    """`compute(items[i:j], text[i:j])` over all items, `batch` at once; where memory runs out the batch is halved.

    halved: told the new batch each time.
    Raises RuntimeError with the remedy where one item alone is too much; other errors pass.
    """
    results, first = [], 0
    while first < len(items):
        part = slice(first, first + batch)
        try:
            results.append(compute(items[part], None if text is None else text[part]))
            first += batch
            continue
        except torch.OutOfMemoryError as error:
            if batch == 1:
                size = " x ".join(str(side) for side in items.shape[1:])
                raise RuntimeError(
                    f"one item of {size} does not fit into the device's memory: use smaller frames (the recipe's "
                    "`size`), a device with more memory, or close what else runs there"
                ) from error
        # Only here: the error's traceback held on to the tensors of the failed batch.
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        batch //= 2
        log.warning("out of memory: the batch is halved to %d and done again", batch)
        if halved is not None:
            halved(batch)
    return results
