"""What methods share that learn a video as frames in order: options, conditioning, questions to the backbone, samples.

The frames are latents of a shard, divided by their root mean square over the training clips. A frame's flow is the
straight line X_t = (1 - t) X_0 + t X_1 from noise to the clean frame (rectified flow), and the backbone predicts its
velocity X_1 - X_0. Nobody knows the seconds of a frame that was inserted, so places are counted and not timed, and what
would tell a clip's length (its duration) is kept from the network.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from model.backbones.attention import FrameCache
from model.backbones.conditioning import Conditioning
from model.backbones.dit import LOG_RATE
from model.flow.times import TIME_LAWS
from model.methods.base import Batch, Clip, Request, drop_captions
from model.methods.curves import RUN
from model.methods.draws import Draws
from model.settings import ABOVE_0, AT_LEAST_0, AT_LEAST_1, SEED, SHARE, Rule, check_settings, one_of
from model.spread import spread_in_runs

START = -0.25
"""Flow time of pure noise as the backbone is told it; a clean frame's is 0. So does VLFM's warm-up have it, and so its
weights, or a published DiT's, know the way from noise to a frame."""
PLACE = 1 / 32
"""Seconds from a frame to the next as the backbone is told them: the shortest wavelength that it knows, 1/16, is then
two frames."""
MEASURED = 1024
"""Clips that are read before training, at most."""
Sampling = TypeVar("Sampling")
FINITE = Rule(math.isfinite, "a number")


@dataclass(frozen=True)
class SequenceOptions:
    """What a training recipe chooses of every method of this kind."""

    time_law: str = "uniform"
    """How times are drawn, as shares of their range: a law of model/flow/times.py: `uniform`, `logit_normal`, `mode` or
    `beta`."""
    snr_shift: float = 1.0
    """Divides the signal-to-noise ratio at every local time, in training and sampling; 3 for latents of many values."""
    caption_dropout: float = 0.1
    """Rate of the empty caption, for guidance."""

    def __post_init__(self) -> None:
        """Raises ValueError for a field that cannot be, with its name, its value and what it must be."""
        check_settings(self, {"time_law": one_of(*TIME_LAWS), "snr_shift": ABOVE_0, "caption_dropout": SHARE})


@dataclass(frozen=True)
class SequenceSampling:
    """How to sample frames in order."""

    steps: int = 50
    """Steps from noise to a clean frame; the step is h = 1 / steps."""
    guidance: float = 1.0
    """Classifier-free guidance of the velocity; 1 is none."""
    seed: int = 0
    """Seed of the noise."""
    length: int = 0
    """Frames of a clip, given ones included; 0 is the longest training clip's."""
    open_end: bool = False
    """Whether frames may follow the last of several given ones; else it is the video's last frame."""

    def __post_init__(self) -> None:
        """Raises ValueError for a field that cannot be, with its name, its value and what it must be."""
        check_settings(self, {"steps": AT_LEAST_1, "guidance": FINITE, "seed": SEED, "length": AT_LEAST_0})


@dataclass(frozen=True)
class FrameSequences:
    """Sampled clips as frames in order; nobody knows their seconds."""

    clips: list[Tensor]
    """Latents (N_i, C, h, w) of each clip."""
    inserted: list[Tensor]
    """(N_i,) of each clip: the clock tau_g when a frame was inserted, 0 for those that the sampler began with, NaN for
    given ones."""
    full: list[bool]
    """Whether a clip would have grown further, but for `max_frames`."""
    network_calls: int
    """Calls of the backbone."""
    seams: list[list[int]] = dataclasses.field(default_factory=list)
    """Of each clip of a long video the frames where a block or window begins, but for the first; empty else."""

    def read(self, times: Sequence[float] | Tensor) -> Tensor:
        """Latents (L, B, C, h, w) at times (L,) in [0, 1], as `Sample.read`: frame floor(t N) of each clip's N."""
        at = torch.as_tensor(times, dtype=torch.float64, device="cpu").reshape(-1)
        read = []
        for frames in self.clips:
            places = (at * len(frames) + 1e-9).floor().long().clamp(0, len(frames) - 1)
            read.append(frames[places.to(frames.device)])
        return torch.stack(read, dim=1)


@dataclass(frozen=True)
class SequenceMethod:
    """Base of the methods that learn frames in order."""

    members: ClassVar[tuple[str, ...]] = ("latents",)
    heads: ClassVar[tuple[str, ...]] = ("velocity",)
    rates: ClassVar[bool] = False
    sequences: ClassVar[bool] = True
    takes_first_frame: ClassVar[bool] = True

    options: Any
    """What the recipe chose."""
    latent_scale: float
    """Root mean square of the latents over the training clips."""
    longest: int
    """Frames of the longest training clip that was measured."""

    @property
    def states_per_clip(self) -> int:
        """A clip is one state."""
        return 1

    @property
    def temporal(self) -> bool:
        """The backbone sees sequences of frames."""
        return True

    @property
    def frame_count(self) -> bool:
        """Nobody counts the frames."""
        return False

    @property
    def clip_start_dropout(self) -> float:
        """A clip's start in its film is never told."""
        return 1.0

    @classmethod
    def prepare(cls, clips: Sequence[Clip], clip_format: Mapping[str, Any]) -> dict[str, float]:
        """`latent_scale`, and `shortest` and `longest`: the fewest and most frames of a clip."""
        squares, values, counts = 0.0, 0, []
        for index in spread_in_runs(range(len(clips)), MEASURED, RUN):
            latents = clips[index].members["latents"].astype(np.float64)
            squares, values = squares + float(np.square(latents).sum()), values + latents.size
            counts.append(len(latents))
        scale = math.sqrt(squares / values) if values else 1.0
        return {"latent_scale": max(scale, 1e-6), "shortest": float(min(counts)), "longest": float(max(counts))}

    @classmethod
    def build(cls, options: Any, figures: Mapping[str, float], clip_format: Mapping[str, Any]) -> Self:
        """The method on a version's clips."""
        return cls(options, figures["latent_scale"], int(figures["longest"]))

    def frames(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Scaled latents (B, N, C, h, w) of a batch, and which frames are no padding (B, N)."""
        return batch.part("latents") / self.latent_scale, batch.part("valid")

    def conditioning(self, batch: Batch, context: Tensor, given: Tensor, draws: Draws) -> Conditioning:
        """What the network is told of a batch: captions, some of them dropped, and context (B, L, C, h, w) where it is
        `given` (B, L)."""
        text, length = drop_captions(batch, draws.rand() < self.options.caption_dropout)
        nothing = torch.zeros_like(batch.clip_start)
        return Conditioning(text, length, nothing, nothing, nothing, masked(context, given), given)

    def answers(
        self,
        backbone: nn.Module,
        latents: Tensor,
        time: Tensor,
        told: Conditioning,
        valid: Tensor | None,
        place: Tensor | None = None,
        **more: Any,
    ) -> dict[str, Tensor]:
        """What the backbone says, at least in float32: `velocity` (B, L, C, h, w), and `log_rate` (B, L) if it has it.

        latents, time: (B, L) frames and their local times in [0, 1]. place: (B, L) long, their places in the clip where
        these are not 0, 1, 2... More goes to the backbone as it is.
        """
        if place is None:
            place = torch.arange(time.shape[1], device=time.device).expand_as(time)
        elif "cache" in more:
            more["place"] = place
        found: dict[str, Tensor] = backbone(
            latents, START * (1 - time), told, frame_time=place.to(time.dtype) * PLACE, valid=valid, **more
        )
        return {name: value.to(torch.promote_types(value.dtype, torch.float32)) for name, value in found.items()}

    def given_frames(self, request: Request) -> tuple[Tensor, Tensor]:
        """Scaled given frames (B, G, C, h, w) of a request and which of them each clip has (B, G), first ones first."""
        if request.frames is None or request.given is None:
            empty = request.conditioning.text.new_zeros((len(request.seeds), 0, *request.shape))
            return empty, torch.zeros(empty.shape[:2], dtype=torch.bool, device=empty.device)
        device = request.conditioning.text.device
        return request.frames.to(device) / self.latent_scale, request.given.to(device)

    def unscaled(self, request: Request, clips: Sequence[Tensor], given: Sequence[Tensor]) -> list[Tensor]:
        """Scaled clips (N_i, C, h, w) in the units of the data; their `given` frames, (at least N_i,) bool, as they
        were given, to the bit."""
        found = []
        for number, (frames, mask) in enumerate(zip(clips, given, strict=True)):
            frames, places = frames * self.latent_scale, mask.nonzero().flatten()
            if len(places):
                assert request.frames is not None
                frames[places] = request.frames[number, : len(places)].to(frames)
            found.append(frames)
        return found

    def check_length(self, length: int, given: int) -> None:
        """Raises ValueError where more frames are `given` than a clip of `length` has."""
        if given > length:
            raise ValueError(
                f"{given} frames are given for a length of {length}; give fewer, or --length {given} or more"
            )

    @staticmethod
    def places(given: int, length: int, open_end: bool) -> list[int]:
        """Places of `given` frames in a clip: evenly from the first to the last frame, or its first ones."""
        last = given - 1 if open_end or given < 2 else length - 1
        return [round(k * last / max(given - 1, 1)) for k in range(given)]


def sampling_of(kind: type[Sampling], request: Request) -> Sampling:
    """A request's settings. Raises TypeError where they are another method's."""
    if not isinstance(request.settings, kind):
        raise TypeError(f"the settings are {type(request.settings).__name__}; the method takes {kind.__name__}")
    return request.settings


def needs_empty_caption(request: Request, *guidance: float) -> bool:
    """Whether there is guidance at all. Raises ValueError where there is, but not the empty caption's conditioning."""
    wanted = any(value != 1.0 for value in guidance)
    if wanted and request.unconditional is None:
        raise ValueError(f"guidance is {', '.join(map(str, guidance))}, so the empty caption must be given")
    return wanted


def masked(frames: Tensor, kept: Tensor) -> Tensor:
    """Frames (B, L, C, h, w), zero where they are not `kept` (B, L)."""
    return frames * kept.to(frames.dtype)[..., None, None, None]


def clip_wise(values: Tensor, counted: Tensor) -> Tensor:
    """(B,) means of values (B, N) over the `counted` frames (B, N) of each clip; 0 where there are none."""
    return (values * counted).sum(1) / counted.sum(1).clamp(min=1)


def reduced(values: Tensor, counted: Tensor, reduction: str, draws: Draws) -> Tensor:
    """The mean of values (B, N) over `counted` frames (B, N): of this process's share, as `Method.loss` wants it.

    reduction: `batch`, every frame of the whole batch weighs alike; `clip`, every clip that has any.
    """
    counted = counted.to(values.dtype)
    if reduction == "batch":
        return (values * counted).sum(1).mean() / draws.mean(counted.sum(1)).clamp(min=1e-12)
    some = (counted.sum(1) > 0).to(values.dtype)
    return clip_wise(values, counted).mean() / draws.mean(some).clamp(min=1e-12)


class Chance:
    """Random numbers of a request's clips, each clip's a function of its own seed alone, whatever else is sampled."""

    def __init__(self, request: Request) -> None:
        self._generators = [torch.Generator().manual_seed(seed) for seed in request.seeds]
        self._shape, self._device = request.shape, request.conditioning.text.device

    def frames(self, counts: Sequence[int]) -> Tensor:
        """(sum of counts, C, h, w) standard normal: `counts` frames of each clip, one clip after the other."""
        drawn = [torch.randn((n, *self._shape), generator=g) for n, g in zip(counts, self._generators, strict=True)]
        return torch.cat(drawn).to(self._device)

    def uniform(self, counts: Sequence[int]) -> list[Tensor]:
        """For each clip `counts` numbers in [0, 1), on the CPU."""
        return [torch.rand(n, generator=g) for n, g in zip(counts, self._generators, strict=True)]

    def poisson(self, means: Sequence[Tensor]) -> list[Tensor]:
        """For each clip whole numbers with these means (n,), on the CPU."""
        return [torch.poisson(m, generator=g).long() for m, g in zip(means, self._generators, strict=True)]


@dataclass(frozen=True)
class Guided:
    """A request's captions as the network is asked with them: with guidance, the empty ones beside them.

    The clips of one question are `repeat`s of the request's in any sequence. Without guidance there is one question.
    """

    told: Conditioning
    untold: Conditioning | None
    guidance: float = 1.0
    rate_guidance: float = 1.0

    @classmethod
    def of(cls, request: Request, guidance: float, rate_guidance: float = 1.0) -> Guided:
        """Raises ValueError where guidance is asked for without the empty caption's conditioning."""
        wanted = needs_empty_caption(request, guidance, rate_guidance)
        return cls(request.conditioning, request.unconditional if wanted else None, guidance, rate_guidance)

    @property
    def questions(self) -> int:
        """Calls of the network in one question."""
        return 1 if self.untold is None else 2

    def ask(
        self,
        method: SequenceMethod,
        backbone: nn.Module,
        latents: Tensor,
        time: Tensor,
        given: Tensor,
        valid: Tensor,
        clips: Tensor | None = None,
        caches: Sequence[FrameCache] = (),
        **more: Any,
    ) -> tuple[Tensor, Tensor | None, int]:
        """Velocity (K, L, C, h, w), log rates (K, L) or None, and the number of calls.

        latents, time, given, valid: K sequences; frames that are `given` are told as context too, but not where the
        caption is hidden. clips: (K,) the request's clip of each; None where they are the same. caches: one for each of
        the `questions`, if any. More is as in `SequenceMethod.answers`.
        """
        shown = None if bool(valid.all()) else valid

        def answer(side: Conditioning, number: int, context: Tensor) -> dict[str, Tensor]:
            cache: dict[str, Any] = {"cache": caches[number]} if caches else {}
            return method.answers(backbone, latents, time, _at(side, clips, latents, context), shown, **cache, **more)

        told = answer(self.told, 0, given)
        velocity, rate = told["velocity"], told.get(LOG_RATE)
        if self.untold is None:
            return velocity, rate, 1
        free = answer(self.untold, 1, torch.zeros_like(given))
        velocity = free["velocity"] + self.guidance * (velocity - free["velocity"])
        if rate is not None:
            rate = free[LOG_RATE] + self.rate_guidance * (rate - free[LOG_RATE])
        return velocity, rate, 2


def _at(side: Conditioning, clips: Tensor | None, latents: Tensor, given: Tensor) -> Conditioning:
    if clips is not None:
        side = dataclasses.replace(side, text=side.text[clips], text_length=side.text_length[clips])
    return dataclasses.replace(without_context(side, latents), context=masked(latents, given), context_given=given)


def without_context(side: Conditioning, latents: Tensor) -> Conditioning:
    """The caption alone, for sequences of frames (B, L, C, h, w): no context, no start and no duration."""
    nothing = torch.zeros(len(latents), dtype=side.clip_start.dtype, device=latents.device)
    hidden = torch.zeros(latents.shape[:2], dtype=torch.bool, device=latents.device)
    return Conditioning(side.text, side.text_length, nothing, nothing, nothing, torch.zeros_like(latents), hidden)
