"""The sampler of Flowception: frames are denoised while others are inserted (arXiv 2512.11438, Algorithm 1).

The clock tau_g is the sampler's own: step k of N per unit of time is at k / N, for all clips alike. (The printed
`t_g = max(t)` is 1 at once where a frame is given.) A frame's age is counted in steps since its insertion, and its
local time is a fixed function of its age. Frames are inserted for N steps, the last one included, and the youngest is
clean N steps later.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from model.backbones.attention import FrameCache
from model.backbones.blocks import LOG_RATE_LEAST, LOG_RATE_MOST
from model.methods.base import Request
from model.methods.chunks import Chunks, blended, owned
from model.methods.insertion import Alignment, Scheduler, places_after, shifted, step_probability, strip
from model.methods.sequences import FINITE, Chance, FrameSequences, Guided, SequenceMethod, sampling_of
from model.settings import ABOVE_0, AT_LEAST_0, AT_LEAST_1, SEED, check_settings, one_of

INSERTIONS = ("bernoulli", "poisson")
ORDERS = ("learned", "random", "hierarchical", "left_to_right")
LOCAL_SCHEDULES = ("power", "linear_quadratic")
LONG = ("none", "blocks", "chunks")
FINISHED = ("attend", "keys", "cached")
CLEAN = 2**62
"""Age of given frames in steps: clean, however many steps there are."""
LINEAR_UNTIL = 0.025
"""Local time that the linear half of the linear-quadratic schedule reaches: steps of 1/1000 where there are 50 (Polyak
et al. 2024, arXiv 2410.13720)."""


@dataclass(frozen=True)
class GrowthSampling:
    """How to sample by insertion; `steps` are those of a unit of time, and a clip takes up to twice as many."""

    steps: int = 50
    """Steps N of a frame from noise to clean, and of the clock while frames are inserted; h = 1 / N."""
    guidance: float = 1.0
    """Classifier-free guidance of the velocity; 1 is none."""
    rate_guidance: float = 1.0
    """The same of the logarithm of the insertion rate (equation 36); 1 is none and costs nothing."""
    seed: int = 0
    """Seed of noise and insertions."""
    max_frames: int = 0
    """Most frames of a clip, given ones included; 0 is twice the longest training clip's. Long videos need it."""
    insertion: str = "bernoulli"
    """How many frames a slot gets in a step of probability p: `bernoulli`, one with probability min(1, p rate);
    `poisson`, a Poisson number of mean p rate, which exceeds what is missing now and then."""
    order: str = "learned"
    """Where frames are inserted: as the network says (`learned`), or of a given length `random`ly, each gap's middle
    first (`hierarchical`) or `left_to_right`."""
    length: int = 0
    """Frames of a clip where the order is given; 0 is the longest training clip's. The learned order chooses itself."""
    local: str = "power"
    """How a frame's local time grows with its age u in [0, 1]: `power`, u^local_power, or `linear_quadratic`."""
    local_power: float = 1.0
    """Exponent of the power schedule; above 1 a frame's first steps are the smaller ones. Training knows 1 alone: with
    another one the frames' times have another law than in training."""
    long: str = "none"
    """Videos beyond the trained length: `blocks`, one after the other, each given the last `overlap` frames before it;
    `chunks`, all at once in windows of up to `chunk` frames that share `overlap` (Algorithm 3)."""
    chunk: int = 0
    """Most frames that the network sees at once in a long video; 0 is the longest training clip's."""
    overlap: int = 4
    """Frames that neighbouring blocks or chunks share."""
    open_end: bool = False
    """Whether frames may follow the last of several given ones; else it is the video's last frame."""
    finished: str = ""
    """What clean frames still do in the network: `attend` as all others; `keys`, only be seen; `cached`, be seen as
    they were when they became clean, which only approximates; empty for what the run was trained with."""

    def __post_init__(self) -> None:
        """Raises ValueError for a field that cannot be, with its name, its value and what it must be."""
        rules = dict.fromkeys(("max_frames", "length", "chunk", "overlap"), AT_LEAST_0)
        words = {"insertion": INSERTIONS, "order": ORDERS, "local": LOCAL_SCHEDULES, "long": LONG}
        rules |= {name: one_of(*values) for name, values in words.items()}
        rules |= {
            "steps": AT_LEAST_1,
            "guidance": FINITE,
            "rate_guidance": FINITE,
            "seed": SEED,
            "local_power": ABOVE_0,
        }
        check_settings(self, rules)
        if self.finished and self.finished not in FINISHED:
            raise ValueError(f"finished is {self.finished!r}; it must be {', '.join(FINISHED)}, or empty")
        if self.long != "none" and self.max_frames == 0:
            raise ValueError(f"long={self.long} needs to know how long: give --max-frames")
        if self.long != "none" and self.order != "learned":
            raise ValueError(f"long={self.long} inserts as the network says; leave out --order {self.order}")
        if self.long == "none" and self.chunk:
            raise ValueError(f"chunk is {self.chunk}, but long is none; give --long blocks or --long chunks")


def local_time(settings: GrowthSampling, age: Tensor, shift: float) -> Tensor:
    """Local times of frames whose ages, in steps, are `age`: exactly 1 from N steps on."""
    share = (age.double() / settings.steps).clamp(max=1)
    if settings.local == "power":
        time = share**settings.local_power
    else:
        late = (share - 0.5).clamp(min=0)
        time = 2 * LINEAR_UNTIL * share + 4 * (1 - 2 * LINEAR_UNTIL) * late.square()
    return shifted(time, shift)


@dataclass(frozen=True)
class Canvas:
    """Clips as they grow, frames first and padding behind; every tensor has (B, L) in front."""

    latents: Tensor
    """(B, L, C, h, w), scaled."""
    age: Tensor
    """(B, L) long: steps since the insertion; given frames are as old as clean ones."""
    valid: Tensor
    """(B, L) bool: which frames are no padding."""
    given: Tensor
    """(B, L) bool: frames that are given and stay as they are."""
    closed: Tensor
    """(B, L) bool: frames to whose right nothing is inserted."""
    inserted: Tensor
    """(B, L): the clock at the insertion, NaN for given frames."""
    target: Tensor
    """(B, L) long: where the frame stands in the finished clip, if its order is given."""

    @property
    def counts(self) -> list[int]:
        """Frames of each clip."""
        found: list[int] = self.valid.sum(1).tolist()
        return found

    @classmethod
    def started(cls, frames: Tensor, given: Tensor, chance: Chance, begins: int, open_end: bool) -> Canvas:
        """Given frames (B, G, C, h, w), and behind them, where fewer than two are given, noise up to `begins` frames.

        given: (B, G) bool, which of them each clip has, first ones first. Behind the last of several nothing is
        inserted, unless `open_end`.
        """
        device, known = given.device, given.sum(1)
        new = torch.where(known < 2, (begins - known).clamp(min=0), 0)
        length = int((known + new).max())
        at = torch.arange(length, device=device)
        there, valid = at < known[:, None], at < (known + new)[:, None]
        latents = frames.new_zeros((len(given), length, *frames.shape[2:]))
        latents[there] = frames[given]
        latents[valid & ~there] = chance.frames(new.tolist()).to(latents.dtype)
        last = there & (at == known[:, None] - 1) & (known[:, None] > 1) & (not open_end)
        zero = torch.zeros((), device=device)
        inserted = torch.where(there, torch.nan, zero)
        return cls(latents, torch.where(there, CLEAN, 0), valid, there, last, inserted, torch.zeros_like(there).long())

    def at_places(self, places: Sequence[Sequence[int]]) -> Canvas:
        """With the frames of each clip at these places of the finished one."""
        rows = [torch.tensor(each, device=self.target.device) for each in places]
        return dataclasses.replace(self, target=torch.nn.utils.rnn.pad_sequence(rows, batch_first=True))

    def with_new(self, counts: Tensor, noise: Tensor, clock: float, target: Tensor | None = None) -> Canvas:
        """With `counts` (B, L) frames of `noise`, clip by clip from left to right, to the right of each frame."""
        counts = counts.masked_fill(~self.valid, 0)
        length = int((self.valid.sum(1) + counts.sum(1)).max())
        # Padding may have a place beyond the new length; it is dropped.
        places = places_after(counts, self.valid).masked_fill(~self.valid, length)
        taken = torch.zeros((len(counts), length + 1), dtype=torch.bool, device=counts.device)
        taken.scatter_(1, places, self.valid)
        total = self.valid.sum(1) + counts.sum(1)
        valid = torch.arange(length, device=counts.device) < total[:, None]
        new = valid & ~taken[:, :length]

        def moved(values: Tensor, fill: float | bool | Tensor) -> Tensor:
            wide = values.new_zeros((len(values), length + 1, *values.shape[2:]))
            where = places.view(*places.shape, *[1] * (values.ndim - 2)).expand_as(values)
            wide = wide.scatter(1, where, values)[:, :length]
            wide[new] = fill if isinstance(fill, Tensor) else values.new_tensor(fill)
            return wide

        return Canvas(
            moved(self.latents, noise.to(self.latents.dtype)), moved(self.age, 0), valid, moved(self.given, False),
            moved(self.closed, False), moved(self.inserted, clock), moved(self.target, 0 if target is None else target),
        )  # fmt: skip


class Inserter(Protocol):
    """Decides how many frames each slot gets in a step."""

    def counts(self, canvas: Canvas, log_rate: Tensor | None, step: int) -> tuple[Tensor, Tensor | None]:
        """(B, L) long on the canvas's device, and the new frames' targets, clip by clip, if they have any."""
        ...


class Learned:
    """Insertion at the network's rates: a slot whose rate is lambda gets p lambda frames in the mean.

    lambda is the number of frames still to come there, p the probability that one of them comes in this step; the last
    step's is 1, so that none of them is left out.
    """

    def __init__(self, settings: GrowthSampling, scheduler: Scheduler, chance: Chance, last_step: bool = True) -> None:
        self.settings, self.scheduler, self.chance, self.last_step = settings, scheduler, chance, last_step

    def counts(self, canvas: Canvas, log_rate: Tensor | None, step: int) -> tuple[Tensor, Tensor | None]:
        """As `Inserter.counts`. Raises ValueError for rates that are not finite."""
        if log_rate is None:
            raise ValueError("the backbone has no insertion rates; sample a run of method=flowception")
        steps = self.settings.steps
        if not bool(torch.isfinite(log_rate[canvas.valid]).all()):
            raise ValueError(
                f"the network's insertion rates are not finite at step {step} of {2 * steps}; "
                "sample an earlier checkpoint (--step N), or train again with a lower learning rate"
            )
        chance = step_probability(self.scheduler, step / steps, 1 / steps)
        if step == steps - 1 and not self.last_step:
            chance = 0.0
        means = chance * log_rate.clamp(LOG_RATE_LEAST, LOG_RATE_MOST).exp().cpu()
        rows = [row[:n] for row, n in zip(means, canvas.counts, strict=True)]
        if self.settings.insertion == "poisson":
            drawn = self.chance.poisson(rows)
        else:
            shares = self.chance.uniform(canvas.counts)
            drawn = [(share < mean).long() for share, mean in zip(shares, rows, strict=True)]
        counts = torch.nn.utils.rnn.pad_sequence(drawn, batch_first=True)
        counts = torch.nn.functional.pad(counts, (0, canvas.valid.shape[1] - counts.shape[1]))
        return counts.to(canvas.valid.device).masked_fill(canvas.closed | ~canvas.valid, 0), None


class Sampler:
    """Grows a request's clips with one method and backbone.

    Args:
        chunks: cuts long clips into windows; None where the network sees whole clips.
        finished: what clean frames do, of FINISHED.
    """

    def __init__(
        self,
        method: SequenceMethod,
        backbone: nn.Module,
        request: Request,
        chance: Chance,
        chunks: Chunks | None = None,
        finished: str = "attend",
    ) -> None:
        self.method, self.backbone, self.chance = method, backbone, chance
        self.chunks, self.finished = chunks, finished
        self.settings = sampling_of(GrowthSampling, request)
        self.guided = Guided.of(request, self.settings.guidance, self.settings.rate_guidance)
        self.calls = 0

    def grow(self, canvas: Canvas, inserter: Inserter, most: Sequence[int]) -> tuple[Canvas, list[bool]]:
        """The clips of `canvas` when all their frames are clean, none of more than `most` frames, and which of them
        would have grown further."""
        steps, full = self.settings.steps, [False] * len(most)
        cached: _CachedFrames | None = None
        for step in range(2 * steps):
            if step >= steps and not bool((canvas.valid & (canvas.age < steps)).any()):
                break
            if self.finished == "cached" and step >= steps:  # nothing moves any more: frames keep their places
                cached = cached or _CachedFrames(self.guided, canvas)
                velocity, log_rate = self.ask_uncached(canvas, cached), None
            else:
                velocity, log_rate = self.ask(canvas)
            canvas = self.denoised(canvas, velocity)
            if step < steps:
                counts, target = inserter.counts(canvas, log_rate, step)
                counts, over = self.bounded(canvas, counts, most)
                full = [before or now for before, now in zip(full, over, strict=True)]
                if bool(counts.any()):
                    noise = self.chance.frames(counts.sum(1).tolist())
                    canvas = canvas.with_new(counts, noise, (step + 1) / steps, target)
        return canvas, full

    def denoised(self, canvas: Canvas, velocity: Tensor) -> Canvas:
        """One step of every frame that is not clean: by f(u_i + h) - f(u_i), which ends at local time 1 exactly."""
        shift, steps = self.method.options.snr_shift, self.settings.steps
        moves = canvas.valid & ~canvas.given & (canvas.age < steps)
        age = torch.where(moves, canvas.age + 1, canvas.age)
        step = local_time(self.settings, age, shift) - local_time(self.settings, canvas.age, shift)
        wide = step.to(canvas.latents.dtype)[..., None, None, None]
        latents = torch.where(moves[..., None, None, None], canvas.latents + wide * velocity, canvas.latents)
        return dataclasses.replace(canvas, latents=latents, age=age)

    def bounded(self, canvas: Canvas, counts: Tensor, most: Sequence[int]) -> tuple[Tensor, list[bool]]:
        """Insertions with those left out, at random, that would make a clip longer than `most`; and where any were."""
        total = (canvas.valid.sum(1) + counts.sum(1)).tolist()
        over = [count > limit for count, limit in zip(total, most, strict=True)]
        if not any(over):
            return counts, over
        counts = counts.clone()
        wanted = [int(n) if too_many else 0 for n, too_many in zip(counts.sum(1).tolist(), over, strict=True)]
        for clip, shares in enumerate(self.chance.uniform(wanted)):
            if over[clip]:
                slots = counts[clip].nonzero().flatten().repeat_interleave(counts[clip][counts[clip] > 0])
                room = max(most[clip] - canvas.counts[clip], 0)
                kept = slots[shares.argsort()[:room].to(slots.device)]
                counts[clip] = torch.bincount(kept, minlength=counts.shape[1])
        return counts, over

    def ask(self, canvas: Canvas) -> tuple[Tensor, Tensor | None]:
        """Velocity (B, L, C, h, w) and log rates (B, L) of the clips' frames, seen whole or in windows."""
        time = self.time(canvas)
        if self.chunks is None:
            return self.network(canvas.latents, time, canvas.given, canvas.valid)
        windows = self.chunks.windows(canvas.counts)
        width = max(window.end - window.start for window in windows)
        device, shape = canvas.valid.device, canvas.valid.shape
        clips, starts, ends = torch.tensor([(w.clip, w.start, w.end) for w in windows], device=device).T
        at = starts[:, None] + torch.arange(width, device=device)
        seen = Alignment(at.clamp(max=shape[1] - 1), at < ends[:, None])
        latents, time, given = (seen.of(values[clips]) for values in (canvas.latents, time, canvas.given))
        velocity, log_rate = self.network(latents, time, given, seen.valid, clips)
        return blended(windows, velocity, shape), None if log_rate is None else owned(windows, log_rate, shape)

    def network(
        self, latents: Tensor, time: Tensor, given: Tensor, valid: Tensor, clips: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The network's answers for sequences of frames, `Guided.ask`."""
        more: dict[str, Any] = {"finished": valid & (time >= 1)} if self.finished == "keys" else {}
        velocity, log_rate, calls = self.guided.ask(
            self.method, self.backbone, latents, time, given, valid, clips, **more
        )
        self.calls += calls
        return velocity, log_rate

    def ask_uncached(self, canvas: Canvas, cached: _CachedFrames) -> Tensor:
        """Velocity (B, L, C, h, w), where frames whose keys and values are cached are not computed again."""
        chosen = strip(canvas.valid & ~cached.held)
        done = canvas.valid & (canvas.age >= self.settings.steps)
        latents, time, given = (chosen.of(values) for values in (canvas.latents, self.time(canvas), canvas.given))
        velocity, _, calls = self.guided.ask(
            self.method, self.backbone, latents, time, given, chosen.valid,
            caches=cached.caches, place=chosen.source, keep=chosen.of(done),
        )  # fmt: skip
        self.calls += calls
        cached.held = done
        found = torch.zeros_like(canvas.latents)
        found[chosen.valid.nonzero()[:, 0], chosen.source[chosen.valid]] = velocity[chosen.valid].to(found.dtype)
        return found

    def time(self, canvas: Canvas) -> Tensor:
        """(B, L): local times of the clips' frames."""
        return local_time(self.settings, canvas.age, self.method.options.snr_shift).to(canvas.latents.dtype)


class _CachedFrames:
    """Keys and values of clean frames, for each caption that the network is asked with."""

    def __init__(self, guided: Guided, canvas: Canvas) -> None:
        self.caches = [FrameCache(canvas.valid.shape[1]) for _ in range(guided.questions)]
        self.held = torch.zeros_like(canvas.valid)


def finished_clips(
    method: SequenceMethod, request: Request, canvas: Canvas, full: list[bool], calls: int, chunks: Chunks | None
) -> FrameSequences:
    """The clips in the units of the data, with the windows over them, if any."""
    counts = canvas.counts
    starts = [[start for start, _ in chunks.cut(n)[1:]] for n in counts] if chunks is not None else []
    return FrameSequences(
        method.unscaled(request, [canvas.latents[k, :n] for k, n in enumerate(counts)], list(canvas.given)),
        [canvas.inserted[k, :n] for k, n in enumerate(counts)],
        full,
        calls,
        starts,
    )
