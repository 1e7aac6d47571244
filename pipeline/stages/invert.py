"""Frames to latents: codec and, where the codec has one, DDIM inversion with the clip's caption; how well that went.

Clips go through the codec in groups, because short clips alone leave a GPU idle. A clip's latents depend on its own
frames and caption only, and a fault costs one clip: a group that raises is taken apart and each clip is tried alone.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.items import ClipWork, Resources
from pipeline.stage import fail, one_line

if TYPE_CHECKING:
    import torch

    from model.codecs.base import Codec, Encoded

log = logging.getLogger(__name__)

GROUP_FRAMES = 64
"""Most frames of several clips that go through the codec together; a longer clip goes alone."""
GROUP_PIXELS = 512 * 512
"""Pixels of a frame up to which it counts as one; a larger one counts as so many, so that memory stays bounded."""


class SharedCodec:
    """One codec for all stages of a worker, loaded on first use."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self.spec = spec
        self._codec: Codec | None = None

    @property
    def on_gpu(self) -> bool:
        """Whether it has a network, which a GPU makes faster."""
        from model.codecs.factory import codec_class

        return codec_class(self.spec).wants_gpu

    @property
    def device(self) -> str:
        """Where it computes: `cuda` or `cpu`."""
        import torch

        return "cuda" if self.on_gpu and torch.cuda.is_available() else "cpu"

    def load(self) -> Codec:
        """The codec. Raises model.weights.CodecUnavailable or ValueError as codec_from_spec does."""
        if self._codec is None:
            from model.codecs.factory import codec_from_spec

            self._codec = codec_from_spec(self.spec, device=self.device)
        return self._codec

    def encode(self, frames: torch.Tensor, captions: Sequence[str]) -> Encoded:
        """Frames (N, 3, H, W) in [-1, 1] with a caption each: latents, and how well their inversion went."""
        import torch

        with torch.no_grad():
            return self.load().encode(frames, captions)

    def decode(self, latents: np.ndarray, captions: str | Sequence[str]) -> torch.Tensor:
        """Stored latents (N, C, h, w) to frames (N, 3, H, W) in [-1, 1], on the codec's device."""
        import torch

        with torch.no_grad():
            return self.load().decode(torch.from_numpy(latents.astype(np.float32)).to(self.device), captions)

    def free(self) -> None:
        """Forgets the codec."""
        self._codec = None


class InvertStage:
    """Latents of all kept frames, as they will be stored, and the codec's part of the certificate.

    certify_frames: how many of a clip's frames are decoded again for PSNR and SSIM, spread evenly; 0 for all of them.
    """

    name = "invert"

    def __init__(self, codec: SharedCodec, certify_frames: int = 0) -> None:
        self.codec, self.certify_frames = codec, certify_frames
        self.resources = Resources(cpus=1.0, gpus=1.0 if codec.on_gpu else 0.0)

    def setup(self) -> None:
        """Loads the codec."""
        self.codec.load()

    def process(self, works: Iterable[ClipWork]) -> Iterator[ClipWork]:
        """Fills in the latents that are not there yet, and the certificate; reasons: not_finite, invert_failed."""
        for group in groups(works):
            good = [work for work in group if work.failure is None and (work.latents is None or len(_next(work)))]
            new = {id(work) for work in good}
            done = iter(self._isolated(good) if good else [])
            for work in group:
                yield next(done) if id(work) in new else work

    def teardown(self) -> None:
        """Frees the codec."""
        self.codec.free()

    def _isolated(self, group: list[ClipWork]) -> list[ClipWork]:
        """The clips done together or, where that raises, one by one; a clip that raises alone has failed."""
        try:
            return self._invert(group)
        except Exception as error:
            if len(group) == 1:
                return [fail(group[0], self.name, "invert_failed", one_line(error))]
            log.warning("%d clips are encoded one by one, together they gave %s", len(group), one_line(error))
            return [work for clip in group for work in self._isolated([clip])]

    def _invert(self, group: list[ClipWork]) -> list[ClipWork]:
        import torch

        pixels = [_unencoded(work) for work in group]
        captions = [work.plan.caption for work, shown in zip(group, pixels, strict=True) for _ in shown]
        frames = [to_signed(shown, self.codec.device) for shown in pixels]
        found = self.codec.encode(torch.cat(frames), captions)
        counts = [len(shown) for shown in frames]
        latents = [part.numpy() for part in split(found.latents.float().cpu(), counts)]
        unknown = found.latents.new_full((sum(counts),), math.nan)
        measured = [unknown if figure is None else figure for figure in (found.residual, found.round_trip)]
        facts = split(torch.stack(measured, dim=1).cpu(), counts)
        kept = [count - len(_next(work)) for work, count in zip(group, counts, strict=True)]  # 0 where they are stored
        for work, own, count in zip(group, latents, kept, strict=True):
            if len(own) > count:
                work.next_latents = next_in_16_bits(own[count:])
        works = [
            self._stored(work, own[:count]) if count else work
            for work, own, count in zip(group, latents, kept, strict=True)
        ]
        encoded = [(work, shown[:count]) for work, shown, count in zip(works, frames, kept, strict=True) if count]
        self._certify([work for work, _ in encoded], [shown for _, shown in encoded])
        for place, (work, fact, count) in enumerate(zip(works, facts, kept, strict=True)):
            if work.failure is not None or not count:
                continue
            residual, round_trip = fact[:count].unbind(dim=1)
            work.certify(residual=float(residual.max()), latent_round_trip=float(round_trip.min()))
            if math.isnan(work.certificate.psnr_codec):
                detail = "its latents decode to frames that are not finite; run the VAE in float32 or use another one"
                works[place] = fail(work, self.name, "not_finite", detail)
        return works

    def _stored(self, work: ClipWork, latents: np.ndarray) -> ClipWork:
        """The clip with its latents in 16 bits, or its failure where they are not finite."""
        return in_16_bits(work, latents, self.name, "use fewer inversion steps or another codec scale")

    def _certify(self, works: Sequence[ClipWork], frames: Sequence[torch.Tensor]) -> None:
        """PSNR and SSIM of the round trip, as stored and without inversion, of all clips together."""
        import torch

        good = [(work, shown) for work, shown in zip(works, frames, strict=True) if work.latents is not None]
        if not good:
            return
        chosen = [evenly(len(shown), self.certify_frames) for _, shown in good]
        counts = [len(places) for places in chosen]
        true = torch.cat([shown[torch.from_numpy(places)] for (_, shown), places in zip(good, chosen, strict=True)])
        stored = [
            work.latents[places] for (work, _), places in zip(good, chosen, strict=True) if work.latents is not None
        ]
        captions = [work.plan.caption for (work, _), count in zip(good, counts, strict=True) for _ in range(count)]
        made = self.codec.decode(np.concatenate(stored), captions)
        plain = self.codec.load().without_inversion(true)
        for row, (work, _) in enumerate(good):
            own = split(true, counts)[row]
            full = quality(split(made, counts)[row], own)
            alone = full if plain is None else quality(split(plain, counts)[row], own)
            work.certify(psnr_codec=full[0], ssim_codec=full[1], frames_certified=len(own))
            work.certify(psnr_vae=alone[0], ssim_vae=alone[1])


def _next(work: ClipWork) -> np.ndarray:
    """The frame after a clip's window, (0 or 1, H, W, 3), where it is to be encoded."""
    assert work.frames is not None
    none = work.next_frames is None or work.next_latents is not None
    return work.frames[:0] if none else np.asarray(work.next_frames)


def _unencoded(work: ClipWork) -> np.ndarray:
    """A clip's own frames where they have no latents, then the one after its window."""
    assert work.frames is not None
    return np.concatenate([work.frames if work.latents is None else work.frames[:0], _next(work)])


def next_in_16_bits(latents: np.ndarray) -> np.ndarray:
    """Latents (0 or 1, C, h, w) of the frame after a window in float16; none where they are not finite there."""
    with np.errstate(over="ignore"):
        stored: np.ndarray = latents.astype(np.float16)
    return stored if np.isfinite(stored).all() else stored[:0]


def in_16_bits(work: ClipWork, latents: np.ndarray, stage: str, remedy: str) -> ClipWork:
    """The clip with its latents in float16, as they are stored; or its failure, where they are not finite there."""
    with np.errstate(over="ignore"):
        stored = latents.astype(np.float16)
    if not np.isfinite(stored).all():
        where = int(np.flatnonzero(~np.isfinite(stored).reshape(len(stored), -1).all(axis=1))[0])
        what = "are not finite" if not np.isfinite(latents[where]).all() else "do not fit 16 bits"
        return fail(work, stage, "not_finite", f"latents of frame {where} {what}; {remedy}")
    work.latents = stored
    return work


def groups(works: Iterable[ClipWork], most: int = GROUP_FRAMES) -> Iterator[list[ClipWork]]:
    """Clips in their order, in groups of at most `most` frames or of one clip. By the clips alone: never by time."""
    group: list[ClipWork] = []
    held = 0.0
    for work in works:
        count = 0.0
        if work.frames is not None:
            frames, height, width = work.frames.shape[:3]
            count = frames * max(1.0, height * width / GROUP_PIXELS)
        if group and held + count > most:
            yield group
            group, held = [], 0.0
        group.append(work)
        held += count
        if count and held + count > most:  # another clip like this one would not fit: it is not waited for
            yield group
            group, held = [], 0.0
    if group:
        yield group


def split(rows: torch.Tensor, counts: Sequence[int]) -> Sequence[torch.Tensor]:
    """Consecutive parts of `counts` rows."""
    parts: Sequence[torch.Tensor] = rows.split(list(counts))  # type: ignore[no-untyped-call]
    return parts


def evenly(count: int, most: int) -> np.ndarray:
    """Places of at most `most` of `count` items, both ends among them; 0 means all of them."""
    if most == 0 or most >= count:
        return np.arange(count)
    return np.linspace(0, count - 1, most).round().astype(np.int64)


def to_signed(frames: np.ndarray | None, device: str = "cpu") -> torch.Tensor:
    """uint8 (N, H, W, 3) to float32 (N, 3, H, W) in [-1, 1] on `device`, where they travel as bytes.

    Raises TypeError for other types, whose range would be guesswork.
    """
    import torch

    if frames is None or frames.dtype != np.uint8:
        found = "missing" if frames is None else f"of type {frames.dtype}"
        raise TypeError(f"frames are {found}, the codec's stage takes uint8 from 0 to 255: correct what decoded them")
    pixels = torch.from_numpy(np.ascontiguousarray(frames))
    if device == "cuda":
        pixels = pixels.pin_memory().to(device, non_blocking=True)
    return pixels.permute(0, 3, 1, 2).float().div(127.5).sub(1)


def quality(made: torch.Tensor, true: torch.Tensor) -> tuple[float, float]:
    """PSNR (dB) and mean SSIM of pictures in [-1, 1]; the SSIM is NaN where they are smaller than its window."""
    from model.metrics.pictures import pooled_psnr, ssim

    return pooled_psnr(made, true), float(ssim(made, true).mean())
