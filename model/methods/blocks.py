"""Videos that are longer than what the network learned, block by block: each is given the last frames before it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch.nn.utils.rnn import pad_sequence

from model.methods.base import Request
from model.methods.growing import Canvas, Learned, Sampler
from model.methods.sequences import FrameSequences


@dataclass(frozen=True)
class Blocks:
    """Blocks of up to `chunk` frames, up to `most` frames in all.

    Of the frames that a block is given only the last one may get new ones on its right: passive context takes no
    insertion. A clip ends early where a block adds nothing to it. `most` is the length that was asked for, not a bound
    that a clip is said to have met.
    """

    sampler: Sampler
    learned: Learned
    begins: int
    """Frames that the first block begins with."""
    most: int
    chunk: int

    def sample(self, request: Request) -> FrameSequences:
        """The requested clips."""
        sampler, settings, method = self.sampler, self.sampler.settings, self.sampler.method
        frames, given = method.given_frames(request)
        canvas = Canvas.started(frames, given, sampler.chance, self.begins, open_end=True)
        limits = [max(min(self.chunk, self.most), count) for count in given.sum(1).tolist()]
        canvas, _ = sampler.grow(canvas, self.learned, limits)
        made = [canvas.latents[k, :n] for k, n in enumerate(canvas.counts)]
        times = [canvas.inserted[k, :n] for k, n in enumerate(canvas.counts)]
        growing = [len(each) < self.most for each in made]
        seams: list[list[int]] = [[] for _ in made]
        while any(growing):
            known = [each[-settings.overlap :] for each in made]
            numbers = torch.tensor([len(each) for each in known], device=given.device)
            context = pad_sequence(known, batch_first=True)
            at = torch.arange(context.shape[1], device=given.device)
            canvas = Canvas.started(context, at < numbers[:, None], sampler.chance, self.begins, open_end=True)
            passive = canvas.given & (torch.arange(canvas.given.shape[1], device=given.device) < numbers[:, None] - 1)
            canvas = dataclasses.replace(canvas, closed=passive)
            rooms = [self.most - len(each) if more else 0 for each, more in zip(made, growing, strict=True)]
            limits = [min(self.chunk, len(old) + room) for old, room in zip(known, rooms, strict=True)]
            canvas, _ = sampler.grow(canvas, self.learned, limits)
            for k, n in enumerate(canvas.counts):
                new = slice(len(known[k]), min(n, len(known[k]) + rooms[k]))
                if new.stop > new.start:
                    seams[k].append(len(made[k]))
                made[k] = torch.cat([made[k], canvas.latents[k, new]])
                times[k] = torch.cat([times[k], canvas.inserted[k, new]])
                growing[k] = new.stop > new.start and len(made[k]) < self.most
        masks = [each.isnan() for each in times]
        clips = method.unscaled(request, made, masks)
        return FrameSequences(clips, times, [False] * len(clips), sampler.calls, seams)
