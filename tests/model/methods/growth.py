"""What tests of growing videos share: requests, batches, small backbones, and a network that knows what is to come."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from model.backbones.conditioning import Conditioning
from model.backbones.dit import Backbone, BackboneConfig
from model.methods.base import Batch, Request
from model.methods.flowception import Flowception, FlowceptionOptions

SHAPE = (2, 2, 2)
WORDS = 8
NO_CONTEXT = {"context_first": 0.0, "context_start": 0.0, "context_ends": 0.0, "context_any": 0.0}


def flowception(longest: int, scale: float = 1.0, **options: Any) -> Flowception:
    """The method where the longest training clip has `longest` frames; no given frames unless options say so."""
    figures = {"latent_scale": scale, "shortest": float(longest), "longest": float(longest)}
    return Flowception.build(FlowceptionOptions(**{**NO_CONTEXT, **options}), figures, {})


def conditioning(clips: int, seed: int = 0) -> Conditioning:
    """Random captions."""
    generator = torch.Generator().manual_seed(seed)
    nothing = torch.zeros(clips)
    return Conditioning(
        torch.randn(clips, 4, WORDS, generator=generator), torch.full((clips,), 3), nothing, nothing, nothing,
        torch.zeros(clips, 1, *SHAPE), torch.zeros(clips, 1, dtype=torch.bool),
    )  # fmt: skip


def request(settings: Any, clips: int = 3, first_seed: int = 0, shape: Sequence[int] = SHAPE, **more: Any) -> Request:
    """A request of clips with seeds in a row."""
    seeds = tuple(range(first_seed, first_seed + clips))
    c, h, w = shape
    return Request(conditioning(clips), seeds, (c, h, w), settings, unconditional=conditioning(clips, 9), **more)


def batch(lengths: Sequence[int], shape: Sequence[int] = SHAPE, seed: int = 0) -> Batch:
    """Random clips of these lengths."""
    generator = torch.Generator().manual_seed(seed)
    count, most = len(lengths), max(lengths)
    valid = torch.arange(most) < torch.tensor(lengths)[:, None]
    latents = torch.randn(count, most, *shape, generator=generator)
    return Batch(
        clip_ids=tuple(map(str, range(count))), text=torch.randn(count, 4, WORDS, generator=generator),
        text_length=torch.full((count,), 3), empty_text=torch.randn(2, WORDS, generator=generator),
        clip_start=torch.zeros(count), duration=torch.ones(count),
        latents=latents * valid[..., None, None, None], valid=valid,
    )  # fmt: skip


def backbone(rates: bool = True, seed: int = 0, size: float = 0.2, **config: Any) -> Backbone:
    """A small backbone whose weights are random, none of them zero."""
    values: dict[str, Any] = {
        "channels": SHAPE[0], "height": SHAPE[1], "width_latent": SHAPE[2], "text_dim": WORDS, "width": 16, "depth": 2,
        "heads": 2, "patch": 1, "outputs": ("velocity",), "temporal": True, "rates": rates,
    }  # fmt: skip
    made = Backbone(BackboneConfig(**{**values, **config}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in made.parameters():
            value.copy_(size * torch.randn(value.shape, generator=generator))
    return made.eval()


class Oracle(torch.nn.Module):
    """Knows of each clip how many frames are still to come in each slot, and says exactly that; frames stay noise.

    Which of a slot's frames a new one is, chance decides. It reads the insertions off the flow times: a new frame's is
    that of noise. Where more come than there are, none is left. It may be wrong by a `factor` of the time of the clip's
    first frame, and asks an `inner` backbone too, where that shall count what it costs.
    """

    def __init__(self, length: int, begins: int, factor: Any = None, inner: Backbone | None = None) -> None:
        super().__init__()
        self.length, self.begins, self.factor, self.inner = length, begins, factor, inner
        self.generator = torch.Generator().manual_seed(5)
        self.pending: Tensor | None = None
        self.before = torch.zeros(0, dtype=torch.bool)
        self.ages: list[tuple[Tensor, Tensor]] = []
        """Of every call the flow times and which frames are no padding."""

    def forward(self, latents: Tensor, flow_time: Tensor, given: Any, **more: Any) -> dict[str, Tensor]:
        valid = more.get("valid")
        valid = torch.ones(flow_time.shape, dtype=torch.bool) if valid is None else valid
        self.ages.append((flow_time.clone(), valid.clone()))
        if "cache" in more:  # nothing is inserted any more, and clean frames are left out
            self.pending = torch.zeros(valid.shape)
        elif self.pending is None:
            self.pending = self.first(len(flow_time))
        else:
            self.pending = self.after(valid, valid & (flow_time <= -0.25 + 1e-6))
        self.before = valid.clone()
        found = {"velocity": torch.zeros_like(latents)}
        if self.inner is not None:
            found |= self.inner(latents, flow_time, given, **more)
        rate = self.pending.double()
        if self.factor is not None:
            rate = rate * self.factor(1 + 4 * flow_time[:, :1].double())
        return found | {"log_rate": rate.log().clamp(min=-30)}

    def first(self, clips: int) -> Tensor:
        """Of the frames that the clips begin with, the first and others at random."""
        others = torch.rand(clips, self.length - 1, generator=self.generator).argsort(1)[:, : self.begins - 1]
        ends = torch.full((clips, 1), self.length)
        places = torch.cat([torch.zeros(clips, 1, dtype=torch.long), others.sort(1).values + 1, ends], 1)
        return places.diff(dim=1) - 1

    def after(self, valid: Tensor, new: Tensor) -> Tensor:
        """Once `new` frames (B, L) have come."""
        assert self.pending is not None
        found, old = torch.zeros(valid.shape, dtype=torch.long), valid & ~new
        found[old] = self.pending[self.before]
        clip, place = new.nonzero().T
        for b, row in zip(clip.tolist(), place.tolist(), strict=True):  # from left to right
            more = 0  # new ones in the same slot on the right of this one
            while row + 1 + more < valid.shape[1] and new[b, row + 1 + more]:
                more += 1
            total = int(found[b, row - 1])
            # The leftmost of more + 1 frames chosen from those of the slot.
            chosen = torch.randperm(total, generator=self.generator)[: more + 1]
            left = int(chosen.min()) if len(chosen) else 0
            found[b, row - 1], found[b, row] = left, max(total - left - 1, 0)
        return found
