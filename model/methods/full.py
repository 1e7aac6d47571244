"""Full-sequence flow matching, the peer of Flowception: all frames of a clip are denoised together, at one time.

The clip's length is given: it is the number of noise frames. Clips of several lengths share a batch, padding masked out
of the attention and of the loss; where all have one length there is no mask.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from model.flow.times import time_at
from model.methods.base import Batch, Request
from model.methods.context import ContextOptions, draw_context
from model.methods.draws import Draws
from model.methods.insertion import shifted
from model.methods.sequences import (
    Chance,
    FrameSequences,
    Guided,
    SequenceMethod,
    SequenceSampling,
    reduced,
    sampling_of,
)


@dataclass(frozen=True)
class FullOptions(ContextOptions):
    """What a training recipe chooses of full-sequence flow matching."""

    time_law: str = "logit_normal"
    """Law of a clip's one time: `uniform`, `logit_normal` or `beta`."""


@dataclass(frozen=True)
class Full(SequenceMethod):
    """Loss and sampler of full-sequence flow matching on one dataset."""

    name: ClassVar[str] = "full"
    Options: ClassVar[type[FullOptions]] = FullOptions
    Sampling: ClassVar[type[SequenceSampling]] = SequenceSampling

    options: FullOptions

    def loss(self, backbone: nn.Module, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        """The mean squared error of the velocity X_1 - X_0 over all frames of the batch but given ones."""
        frames, valid = self.frames(batch)
        context = draw_context(self.options, batch, frames, valid, draws)
        share = time_at(self.options.time_law, draws.even(1))
        time = shifted(share, self.options.snr_shift).to(frames.dtype).expand(valid.shape)
        noise = draws.randn_frames(*frames.shape[1:])
        time = torch.where(context.given, 1, time)
        wide, given = time[..., None, None, None], context.given[..., None, None, None]
        latents = torch.where(given, context.frames, (1 - wide) * noise + wide * frames)
        told = self.conditioning(batch, context.frames, context.told, draws)
        velocity = self.answers(backbone, latents, time, told, valid)["velocity"]
        errors = (velocity - (frames - noise)).square().mean(dim=(2, 3, 4))
        counted = valid & ~context.given
        loss = reduced(errors, counted, "batch", draws)
        return {
            "loss": loss,
            "velocity": loss.detach(),
            "errors": errors.detach(),
            "place": torch.where(counted, time - 1, torch.nan),
        }

    @torch.no_grad()
    def sample(self, backbone: nn.Module, request: Request) -> FrameSequences:
        """Clips of `length` frames, the given ones first and unchanged; the last of several is the last frame.

        Raises:
            ValueError: more frames are given than `length`, or guidance without the empty caption.
        """
        settings = sampling_of(self.Sampling, request)
        length = settings.length or self.longest
        known, there = self.given_frames(request)
        self.check_length(length, int(there.sum(1).max()) if there.numel() else 0)
        chance, guided = Chance(request), Guided.of(request, settings.guidance)
        count = len(request.seeds)
        latents = chance.frames([length] * count).unflatten(0, (count, length))
        given = torch.zeros((count, length), dtype=torch.bool, device=latents.device)
        for clip, number in enumerate(there.sum(1).tolist()):
            places = self.places(number, length, settings.open_end)
            latents[clip, places], given[clip, places] = known[clip, :number].to(latents.dtype), True
        valid, calls = torch.ones_like(given), 0
        grid = shifted(torch.linspace(0, 1, settings.steps + 1, dtype=torch.float64), self.options.snr_shift)
        for now, step in zip(grid[:-1].tolist(), grid.diff().tolist(), strict=True):
            time = torch.where(given, 1.0, now).to(latents.dtype)
            velocity, _, asked = guided.ask(self, backbone, latents, time, given, valid)
            latents = torch.where(given[..., None, None, None], latents, latents + step * velocity)
            calls += asked
        inserted = torch.where(given, torch.nan, torch.zeros((), device=given.device))
        clips = self.unscaled(request, list(latents), list(given))
        return FrameSequences(clips, list(inserted), [False] * count, calls)
