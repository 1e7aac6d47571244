"""Autoregressive flow matching, the peer of Flowception: one frame after the other, from noise, given those before.

The backbone is block-causal: a frame sees itself and those before it, so clean frames' keys and values never change and
are computed once (exactly; docs/method.md). The clip's length is given.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from model.backbones.attention import FrameCache
from model.backbones.conditioning import Conditioning
from model.flow.times import time_at
from model.methods.base import Batch, Request
from model.methods.draws import Draws
from model.methods.insertion import shifted
from model.methods.sequences import (
    Chance,
    FrameSequences,
    SequenceMethod,
    SequenceOptions,
    SequenceSampling,
    needs_empty_caption,
    reduced,
    sampling_of,
    without_context,
)


@dataclass(frozen=True)
class AutoregressiveOptions(SequenceOptions):
    """What a training recipe chooses of autoregressive flow matching."""

    time_law: str = "logit_normal"
    """Law of the time of the frame that is denoised: `uniform`, `logit_normal` or `beta`."""


@dataclass(frozen=True)
class AutoregressiveSampling(SequenceSampling):
    """How to sample frame by frame; `steps` are those of each frame."""

    cache: bool = True
    """Whether keys and values of clean frames are kept; without it each step computes all frames again, to the same."""


@dataclass(frozen=True)
class Autoregressive(SequenceMethod):
    """Loss and sampler of autoregressive flow matching on one dataset."""

    name: ClassVar[str] = "autoregressive"
    Options: ClassVar[type[AutoregressiveOptions]] = AutoregressiveOptions
    Sampling: ClassVar[type[AutoregressiveSampling]] = AutoregressiveSampling

    options: AutoregressiveOptions

    def loss(self, backbone: nn.Module, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        """The mean squared error of the velocity of one frame of each clip, given the clean ones before it.

        Their number is uniform over the clip, from none to all but one.
        """
        frames, valid = self.frames(batch)
        count = valid.sum(1)
        context = torch.minimum((draws.rand() * count).floor().long(), count - 1)
        share = time_at(self.options.time_law, draws.even(1)[:, 0])
        noise = draws.randn_frames(*frames.shape[1:])
        place = torch.arange(valid.shape[1], device=valid.device)
        target = place == context[:, None]
        time = torch.where(target, shifted(share, self.options.snr_shift)[:, None], 1).to(frames.dtype)
        wide = time[..., None, None, None]
        latents = (1 - wide) * noise + wide * frames
        nothing = torch.zeros_like(valid)
        told = self.conditioning(batch, latents, nothing, draws)
        seen = place <= context[:, None]
        velocity = self.answers(backbone, latents, time, told, seen, causal=True)["velocity"]
        errors = (velocity - (frames - noise)).square().mean(dim=(2, 3, 4))
        loss = reduced(errors, target, "batch", draws)
        return {
            "loss": loss,
            "velocity": loss.detach(),
            "errors": errors.detach(),
            "place": torch.where(target, time - 1, torch.nan),
        }

    @torch.no_grad()
    def sample(self, backbone: nn.Module, request: Request) -> FrameSequences:
        """Clips of `length` frames, the given ones first and unchanged.

        Raises:
            ValueError: more frames are given than `length`, a last frame is (it cannot be looked ahead to), or guidance
                without the empty caption.
        """
        settings = sampling_of(self.Sampling, request)
        needs_empty_caption(request, settings.guidance)
        length = settings.length or self.longest
        known, there = self.given_frames(request)
        self.check_length(length, int(there.sum(1).max()) if there.numel() else 0)
        count = len(request.seeds)
        if there.numel() and int(there.sum(1).max()) > 1 and not settings.open_end:
            raise ValueError(
                "the autoregressive method goes on from the first frames and cannot look ahead to a last one; "
                "give --open-end, and none but the first frames"
            )
        noise = Chance(request).frames([length] * count).unflatten(0, (count, length))
        numbers = there.sum(1)
        sides = [_Side(self, backbone, without_context(request.conditioning, noise[:, :1]), settings.cache, length)]
        if settings.guidance != 1.0:
            assert request.unconditional is not None
            sides.append(
                _Side(self, backbone, without_context(request.unconditional, noise[:, :1]), settings.cache, length)
            )
        grid = shifted(torch.linspace(0, 1, settings.steps + 1, dtype=torch.float64), self.options.snr_shift)
        for number in range(length):
            frame = noise[:, number]
            if not bool((numbers > number).all()):
                for now, step in zip(grid[:-1].tolist(), grid.diff().tolist(), strict=True):
                    found = [side.velocity(frame, now) for side in sides]
                    velocity = found[0] if len(found) == 1 else found[1] + settings.guidance * (found[0] - found[1])
                    frame = frame + step * velocity
            if number < known.shape[1]:
                frame = torch.where((numbers > number)[:, None, None, None], known[:, number].to(frame.dtype), frame)
            for side in sides:
                side.keep(frame, last=number == length - 1)
        at = torch.arange(length, device=noise.device)
        given = at < numbers[:, None]
        inserted = torch.where(given, torch.nan, (at - numbers[:, None]).float())
        clips = self.unscaled(request, list(torch.stack(sides[0].frames, 1)), list(given))
        return FrameSequences(clips, list(inserted), [False] * count, sum(side.calls for side in sides))


class _Side:
    """The frames so far as the backbone is asked about the next one, with one caption for each clip."""

    def __init__(
        self, method: Autoregressive, backbone: nn.Module, told: Conditioning, cache: bool, length: int
    ) -> None:
        self.method, self.backbone, self.told = method, backbone, told
        self.cache = FrameCache(length) if cache else None
        self.frames: list[Tensor] = []
        self.calls = 0

    def velocity(self, frame: Tensor, time: float, keep: bool = False) -> Tensor:
        """(B, C, h, w): of the next frame in this state at this time; `keep`s its keys and values."""
        self.calls += 1
        number, count = len(self.frames), len(frame)
        if self.cache is None:
            latents = torch.stack([*self.frames, frame], 1)
            times = torch.ones(latents.shape[:2], device=frame.device)
            times[:, -1] = time
            nothing = without_context(self.told, latents)
            return self.method.answers(self.backbone, latents, times, nothing, None, causal=True)["velocity"][:, -1]
        place = torch.full((count, 1), number, device=frame.device)
        kept = torch.full((count, 1), keep, device=frame.device)
        found = self.method.answers(
            self.backbone, frame[:, None], torch.full((count, 1), time, device=frame.device), self.told, None, place,
            causal=True, cache=self.cache, keep=kept,
        )  # fmt: skip
        return found["velocity"][:, 0]

    def keep(self, frame: Tensor, last: bool) -> None:
        """Go on behind this clean frame; the last one need not be seen."""
        if self.cache is not None and not last:
            self.velocity(frame, 1.0, keep=True)
        self.frames.append(frame)
