"""Flowception: videos that grow by inserting frames (arXiv 2512.11438), and so choose their own length.

A clip begins with a few frames of noise. While they are denoised the network says for each how many frames are still to
come on its right, and new ones, pure noise, are inserted there at that rate; each has its own local time. Training
draws such a state of a true clip directly: the clock tau_g, the frames' insertion times, the visible frames at their
local times (model/methods/insertion.py). model/methods/growing.py is the sampler.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from model.backbones.dit import LOG_RATE
from model.flow.times import time_at
from model.methods.base import Batch, Request
from model.methods.blocks import Blocks
from model.methods.chunks import Chunks
from model.methods.context import ContextOptions, draw_context
from model.methods.draws import Draws
from model.methods.growing import Canvas, GrowthSampling, Inserter, Learned, Sampler, finished_clips
from model.methods.insertion import (
    Alignment,
    Delayed,
    Growth,
    Linear,
    Power,
    Scheduler,
    clock_end,
    grown,
    hazard,
    shifted,
    strip,
)
from model.methods.orders import Planned, planned_orders
from model.methods.sequences import (
    Chance,
    FrameSequences,
    SequenceMethod,
    reduced,
    sampling_of,
)
from model.settings import ABOVE_0, AT_LEAST_0, AT_LEAST_1, SHARE_BELOW_1, check_settings, one_of

SCHEDULERS = ("linear", "power", "delayed")
NEVER, EARLY = 2.0, 1e-6
"""Extended time of given frames, clean at every clock; and the share of the clock's range that is left out at its end,
where all frames are clean."""
MOST_HAZARD = 100.0
"""Bound of the hazard as a weight (`weighting=elbo`), which has no bound itself as t_g comes to 1."""


@dataclass(frozen=True)
class FlowceptionOptions(ContextOptions):
    """What a training recipe chooses of Flowception; `time_law` is that of tau_g, as a share of tau_max."""

    scheduler: str = "linear"
    """Law kappa of the insertion times: `linear`; `power`, t^scheduler_power; `delayed`, none before
    `scheduler_delay`."""
    scheduler_power: float = 2.0
    """Exponent of `scheduler=power`."""
    scheduler_delay: float = 0.2
    """Time of the first insertions of `scheduler=delayed`."""
    start_frames: int = 3
    """Frames that a clip begins with, the first among them."""
    insertion_weight: float = 1.0
    """Weight of the insertion loss beside the velocity's."""
    weighting: str = "none"
    """Weight of a state's insertion loss: `none`, or `elbo`, the hazard at its clock, of which it is a bound."""
    reduction: str = "batch"
    """Mean of the losses: `batch`, over all active frames of the batch; `clip`, first over each clip's, which favours
    short ones and under-inserts."""
    finished: str = "attend"
    """What clean frames do in the network: `attend` as all others, or are `keys`, which others see."""
    frame_count: bool = True
    """Whether rate tokens are told how many frames are visible: what is still to come is the length less that."""
    BEFORE: ClassVar[Mapping[str, Any]] = {"frame_count": False}
    """Fields that older runs lack, as they were then."""

    def __post_init__(self) -> None:
        """Raises ValueError for a field that cannot be, with its name, its value and what it must be."""
        super().__post_init__()
        words = {"scheduler": SCHEDULERS, "weighting": ("none", "elbo"), "reduction": ("batch", "clip")}
        rules = {name: one_of(*values) for name, values in words.items()}
        rules |= {"finished": one_of("attend", "keys"), "scheduler_power": ABOVE_0, "scheduler_delay": SHARE_BELOW_1}
        check_settings(self, {**rules, "start_frames": AT_LEAST_1, "insertion_weight": AT_LEAST_0})


@dataclass(frozen=True)
class State:
    """A state of growth as drawn for training: the visible frames (B, L), aligned to the left."""

    alignment: Alignment
    """Which frames of the clips those are."""
    growth: Growth
    """All frames' extended times (B, N)."""
    clock: Tensor
    """(B,): tau_g."""


@dataclass(frozen=True)
class Flowception(SequenceMethod):
    """Loss and sampler of Flowception on one dataset."""

    name: ClassVar[str] = "flowception"
    rates: ClassVar[bool] = True
    Options: ClassVar[type[FlowceptionOptions]] = FlowceptionOptions
    Sampling: ClassVar[type[GrowthSampling]] = GrowthSampling

    options: FlowceptionOptions

    @property
    def frame_count(self) -> bool:
        """As the options say."""
        return self.options.frame_count

    @property
    def scheduler(self) -> Scheduler:
        """The law of the insertion times."""
        options = self.options
        if options.scheduler == "power":
            return Power(options.scheduler_power)
        return Delayed(options.scheduler_delay) if options.scheduler == "delayed" else Linear()

    @classmethod
    def build(
        cls, options: FlowceptionOptions, figures: Mapping[str, float], clip_format: Mapping[str, Any]
    ) -> Flowception:
        """The method on a version's clips. Raises ValueError where clips are shorter than the start set."""
        if (shortest := int(figures["shortest"])) < options.start_frames:
            raise ValueError(
                f"start_frames is {options.start_frames}, but a clip has {shortest} frames, fewer than a sample begins "
                f"with; choose --set start_frames={shortest}, or ingest with a larger --set shots.min_frames=..."
            )
        return super().build(options, figures, clip_format)

    def loss(self, backbone: nn.Module, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        """The velocity loss of the active frames plus `insertion_weight` times the insertion loss.

        `velocity` is the mean squared error of X_1 - X_0, `insertion` the mean of lambda - k log lambda with k frames
        still to come in a frame's slot, the loss whose minimiser is the mean of k (equation 19; equations 31 and 32
        print one whose minimiser is rho times that, which Algorithm 1 would multiply with rho once more).
        """
        options = self.options
        frames, valid = self.frames(batch)
        context = draw_context(options, batch, frames, valid, draws)
        state = self.draw_state(valid, context.given, draws)
        noise = draws.randn_frames(*frames.shape[1:])
        time = shifted(state.growth.time, options.snr_shift).to(frames.dtype)
        wide, given = time[..., None, None, None], context.given[..., None, None, None]
        latents = torch.where(given, context.frames, (1 - wide) * noise + wide * frames)

        of, seen = state.alignment.of, state.alignment.valid
        more = {"finished": of(state.growth.finished)} if options.finished == "keys" else {}
        told = self.conditioning(batch, of(context.frames), of(context.told), draws)
        answers = self.answers(backbone, of(latents), of(time), told, seen, **more)
        active, pending = of(state.growth.active), of(state.growth.pending)
        errors = (answers["velocity"] - of(frames - noise)).square().mean(dim=(2, 3, 4))
        log_rate = answers[LOG_RATE]
        insertion = log_rate.exp() - pending * log_rate
        if options.weighting == "elbo":
            weights = hazard(self.scheduler, state.clock.clamp(max=1)).clamp(max=MOST_HAZARD)
            insertion = insertion * weights[:, None]
        velocity_loss = reduced(errors, active, options.reduction, draws)
        insertion_loss = reduced(insertion, active | of(context.given), options.reduction, draws)
        return {
            "loss": velocity_loss + options.insertion_weight * insertion_loss,
            "velocity": velocity_loss.detach(),
            "insertion": insertion_loss.detach(),
            "errors": errors.detach(),
            "place": torch.where(active, of(time) - 1, torch.nan),
        }

    def draw_state(self, valid: Tensor, given: Tensor, draws: Draws) -> State:
        """A state of each clip's growth, under the law that the sampler visits.

        The clip begins with its first frame, its given ones and, where those are fewer than two, random ones up to
        `start_frames`. The clock lies in [0, tau_max), tau_max = 1 + the latest insertion time: in it there is always
        an active frame, or, with given frames alone, one that is still to come. (Where the authors' program has no
        active frame it draws again; the states of given frames alone, where a sampler with given frames begins, are
        then never seen.)
        """
        count = valid.shape[1]
        rank = draws.rand(count).masked_fill(given, -2.0)
        rank[:, 0] = -3.0
        rank = rank.masked_fill(~valid, 2.0).argsort(1).argsort(1)
        fixed = given.clone()
        fixed[:, 0] = True
        filled = (rank < self.options.start_frames) & (given.sum(1) < 2)[:, None]
        starts = valid & (fixed | filled)
        inserted = self.scheduler.inverse(draws.rand(count)).masked_fill(starts, 0.0)
        share = time_at(self.options.time_law, draws.even(1)[:, 0]).clamp(max=1 - EARLY)
        clock = share * clock_end(inserted, valid & ~given)
        growth = grown(inserted, clock, valid)
        growth = dataclasses.replace(growth, tau=growth.tau.masked_fill(given & valid, NEVER))
        return State(strip(growth.visible, count), growth, clock)

    @torch.no_grad()
    def sample(self, backbone: nn.Module, request: Request) -> FrameSequences:
        """Grow the requested clips.

        The given frames of a clip are its first ones in order; the last of several is its last frame, unless
        `open_end`.

        Raises:
            ValueError: settings that contradict each other or the given frames, guidance without the empty caption, or
                rates that are not finite; the message says the remedy.
        """
        settings = sampling_of(GrowthSampling, request)
        frames, given = self.given_frames(request)
        most, chunk = settings.max_frames or 2 * self.longest, settings.chunk or self.longest
        length = settings.length or self.longest
        self.check_limits(settings, int(given.sum(1).max()) if given.numel() else 0, most, chunk, length)
        chance, begins = Chance(request), self.options.start_frames
        chunks = Chunks.of(most, chunk, settings.overlap) if settings.long == "chunks" else None
        sampler = Sampler(self, backbone, request, chance, chunks, settings.finished or self.options.finished)
        learned = Learned(settings, self.scheduler, chance)
        if settings.long == "blocks":
            return Blocks(sampler, learned, begins, most, chunk).sample(request)
        inserter: Inserter = learned
        if settings.order != "learned":
            fixed = [self.places(count, length, settings.open_end) for count in given.sum(1).tolist()]
            orders = planned_orders(settings.order, length, begins, fixed, chance)
            inserter = Planned(settings.steps, self.scheduler, chance, [later for _, later in orders])
            begins = min(begins, length)
        elif chunks is not None:
            begins = chunks.together(begins)
        canvas = Canvas.started(frames, given, chance, begins, settings.open_end)
        if settings.order != "learned":
            canvas = canvas.at_places([first for first, _ in orders])
        canvas, full = sampler.grow(canvas, inserter, [most] * len(request.seeds))
        return finished_clips(self, request, canvas, full, sampler.calls, chunks)

    def check_limits(self, settings: GrowthSampling, given: int, most: int, chunk: int, length: int) -> None:
        """Raises ValueError where given frames, lengths or windows contradict each other."""
        if given > most:
            raise ValueError(
                f"{given} frames are given, but max_frames is {most}; give fewer, or --max-frames {given} or more"
            )
        if settings.order != "learned":
            self.check_length(length, given)
            if length > most:
                raise ValueError(f"length is {length}, but max_frames is {most}; give --max-frames {length} or more")
        if given < 2 and most < self.options.start_frames:
            raise ValueError(
                f"max_frames is {most}, but a clip of this run begins with {self.options.start_frames} frames; give "
                f"--max-frames {self.options.start_frames} or more"
            )
        if settings.long != "none" and settings.overlap >= chunk:
            raise ValueError(
                f"overlap is {settings.overlap}, but a chunk has {chunk} frames; give an --overlap below {chunk}, or a "
                "larger --chunk"
            )
        if settings.long == "blocks" and settings.overlap < 1:
            raise ValueError(
                "overlap is 0, but a block must know frames of the one before it; give --overlap 1 or more"
            )
        if settings.long == "blocks" and given > 1 and not settings.open_end:
            raise ValueError("blocks go on where the frames before them end; give --open-end, or --long chunks")
        if settings.long == "chunks" and settings.finished == "cached":
            raise ValueError("windows move over the frames, so nothing can be cached; leave out --finished cached")
