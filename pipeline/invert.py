"""Frames to latents: codec and, where the codec has one, DDIM inversion with the clip's caption."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.stage import ClipWork, Resources, fail, shielded

if TYPE_CHECKING:
    import torch

    from model.codec import Codec


class SharedCodec:
    """One codec for all stages of a worker, loaded on first use."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self.spec = spec
        self._codec: Codec | None = None

    @property
    def on_gpu(self) -> bool:
        """Whether it has a network, which a GPU makes faster."""
        return self.spec.get("kind") != "linear"

    def load(self) -> Codec:
        """The codec. Raises model.codec.CodecUnavailable or ValueError as codec_from_spec does."""
        if self._codec is None:
            import torch

            from model.codec import codec_from_spec

            device = "cuda" if self.on_gpu and torch.cuda.is_available() else "cpu"
            self._codec = codec_from_spec(self.spec, device=device)
        return self._codec

    def decode(self, latents: np.ndarray, caption: str) -> torch.Tensor:
        """Stored latents (N, C, h, w) to frames (N, 3, H, W) in [-1, 1] on the CPU."""
        import torch

        with torch.no_grad():
            return self.load().decode(torch.from_numpy(latents.astype(np.float32)), caption).cpu()

    def free(self) -> None:
        """Forgets the codec."""
        self._codec = None


class InvertStage:
    """Latents of all kept frames, as they will be stored, and the codec's round-trip PSNR."""

    name = "invert"

    def __init__(self, codec: SharedCodec) -> None:
        self.codec = codec
        self.resources = Resources(cpus=1.0, gpus=1.0 if codec.on_gpu else 0.0)

    def setup(self) -> None:
        """Loads the codec."""
        self.codec.load()

    def process(self, works: Iterable[ClipWork]) -> Iterator[ClipWork]:
        """Fills in `latents` and `psnr_codec`; reasons: not_finite, invert_failed."""
        return shielded(works, self._invert, self.name, "invert_failed")

    def teardown(self) -> None:
        """Frees the codec."""
        self.codec.free()

    def _invert(self, work: ClipWork) -> ClipWork:
        import torch

        assert work.frames is not None
        frames = to_signed(work.frames)
        with torch.no_grad():
            latents = self.codec.load().encode(frames, work.plan.caption).float().cpu().numpy()
        with np.errstate(over="ignore"):
            stored = latents.astype(np.float16)
        if not np.isfinite(stored).all():
            where = int(np.flatnonzero(~np.isfinite(stored).reshape(len(stored), -1).all(axis=1))[0])
            what = "are not finite" if not np.isfinite(latents[where]).all() else "do not fit 16 bits"
            detail = f"latents of frame {where} {what}; use fewer inversion steps or another codec scale"
            return fail(work, self.name, "not_finite", detail)
        work.latents = stored
        work.certificate["psnr_codec"] = psnr(self.codec.decode(stored, work.plan.caption), frames)
        return work


def to_signed(frames: np.ndarray) -> torch.Tensor:
    """uint8 (N, H, W, 3) to float32 (N, 3, H, W) in [-1, 1]."""
    import torch

    return torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2).float().div(127.5).sub(1)


def psnr(made: torch.Tensor, true: torch.Tensor) -> float:
    """Standard PSNR in dB of pictures in [-1, 1] (peak to peak 2), over all of them together; at most 100."""
    error = float((made - true).double().square().mean())
    return min(100.0, 10 * math.log10(4 / error)) if error > 0 else 100.0
