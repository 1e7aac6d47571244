"""The contract between a method and the programs that run it: the trainer, the sampler and the evaluation.

A method is one class: what it needs of a dataset, its options, a loss and a sampler. The programs never ask which one
they run. Tasks are boolean masks: which frames of a clip are given, in training (`Batch.given`) and in sampling
(`Request.given`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from model.backbones.conditioning import Conditioning
from model.flow.solver import METHODS as SOLVERS
from model.methods.draws import Draws


@dataclass(frozen=True)
class Batch:
    """Clips as a method trains on them; every tensor has the batch first, N is the most frames of a clip.

    From the loader captions, coefficients and latents are float16, as in the shards; a method gets what `to` makes.
    """

    clip_ids: tuple[str, ...]
    """Names of the clips."""
    text: Tensor
    """(B, M, D): embedded captions, zero past their lengths."""
    text_length: Tensor
    """(B,): valid rows of `text`."""
    empty_text: Tensor
    """(E, D): the empty caption."""
    clip_start: Tensor
    """(B,): seconds from the film's start."""
    duration: Tensor
    """(B,): seconds."""
    coefficients: Tensor | None = None
    """(B, order, C, h, w): HiPPO-LegS coefficients of the latents' path, where the method reads `coefficients`."""
    latents: Tensor | None = None
    """(B, N, C, h, w): latents of the kept frames, zero for padding, where the method reads `latents`."""
    frame_time: Tensor | None = None
    """(B, N): seconds in the clip, zero for padding, where the method reads `frame_time`."""
    valid: Tensor | None = None
    """(B, N) bool: which frames are no padding."""
    observed: Tensor | None = None
    """(B, N) bool: which frames entered the coefficients."""
    given: Tensor | None = None
    """(B, N) bool: which frames the task gives; None leaves the draw to the method."""

    def to(self, device: torch.device | str, dtype: torch.dtype = torch.float32) -> Batch:
        """The same clips on `device`, with floating-point numbers as `dtype`.

        They travel in the type that they have, such as the shards' float16, which both others hold exactly; from pinned
        memory the host does not wait for the copy.
        """
        here = self._each(lambda value: value.to(device, non_blocking=value.is_pinned()))
        return here._each(lambda value: value.to(dtype) if value.is_floating_point() else value)

    def pin_memory(self) -> Batch:
        """The same clips in pinned memory, as a DataLoader asks for it."""
        return self._each(lambda value: value.pin_memory())

    def every(self, count: int, first: int = 0) -> Batch:
        """Every `count`-th of the clips, from the one at the position `first` on."""
        chosen = self._each(lambda value: value[first::count])
        return dataclasses.replace(chosen, clip_ids=self.clip_ids[first::count], empty_text=self.empty_text)

    def _each(self, do: Callable[[Tensor], Tensor]) -> Batch:
        changed: dict[str, Any] = {k: do(v) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return dataclasses.replace(self, **changed)

    def part(self, name: str) -> Tensor:
        """A tensor that the method reads from the shards. Raises ValueError where the batch lacks it."""
        value = getattr(self, name)
        if not isinstance(value, Tensor):
            raise ValueError(f"the batch has no {name}; the method must list it among its members")
        return value


@dataclass(frozen=True)
class SampleSettings:
    """How to integrate; a method ignores what it has no use for."""

    steps: int = 16
    """Solver steps on a window of the clip; the frame rate does not change it. `default_sampling` takes more where a
    clip's coefficients saw more frames."""
    warmup_steps: int = 16
    """Solver steps from noise to the first frame."""
    solver: str = "ddim"
    """A method of model/flow/solver.py."""
    guidance: float = 1.0
    """Classifier-free guidance; 1 is none."""
    seed: int = 0
    """Seed of the noise."""
    reanchor: bool = True
    """Whether the state is set back on the predicted mean, `x = mean + sigma z`, at every solver step of the clip: its
    drift is then cut, not summed (docs/experiments.md)."""

    def __post_init__(self) -> None:
        for name, value in {"steps": self.steps, "warmup_steps": self.warmup_steps}.items():
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        if self.solver not in SOLVERS:
            raise ValueError(f"solver is {self.solver!r}; it must be one of {', '.join(SOLVERS)}")
        if not math.isfinite(self.guidance):
            raise ValueError(f"guidance is {self.guidance}; it must be a number, 1 for none")
        if not 0 <= self.seed < 2**62:
            raise ValueError(f"seed is {self.seed}; it must lie between 0 and 2^62")


@dataclass(frozen=True)
class Request:
    """Clips to sample: what they are told, what is given of them, and how to integrate."""

    conditioning: Conditioning
    """Captions and clips (B); a method adds given frames itself."""
    seeds: tuple[int, ...]
    """The seed of each clip's noise (B)."""
    shape: tuple[int, int, int]
    """(C, h, w) of a frame's latents."""
    settings: Any = dataclasses.field(default_factory=SampleSettings)
    """How to sample: of the method's `Sampling`."""
    unconditional: Conditioning | None = None
    """The empty caption's, for guidance."""
    frames: Tensor | None = None
    """(B, G, C, h, w): latents of frames that are given; None where none are."""
    frame_time: Tensor | None = None
    """(G,) seconds in the clip of the given frames."""
    given: Tensor | None = None
    """(B, G) bool: which of them are given for which clip."""

    def noise(self) -> Tensor:
        """(B, C, h, w) standard normal latents, each a function of its own seed, on the conditioning's device."""
        return self.noises(1)[:, 0]

    def noises(self, frames: int) -> Tensor:
        """(B, frames, C, h, w), the first of them as `noise`."""
        drawn = []
        for seed in self.seeds:
            generator = torch.Generator().manual_seed(seed)
            drawn.append(torch.stack([torch.randn(self.shape, generator=generator) for _ in range(frames)]))
        return torch.stack(drawn).to(self.conditioning.text.device)

    def first_frame(self) -> Tensor | None:
        """(B, C, h, w): the first frame of the image-to-video task; None where no frame is given.

        Raises:
            ValueError: other frames are given, or only some clips have one; the message says what is possible.
        """
        if self.frames is None:
            return None
        assert self.frame_time is not None
        assert self.given is not None
        if self.frame_time.tolist() != [0.0] or not bool(self.given.all()):
            raise ValueError(
                f"frames at {self.frame_time.tolist()} s are given; this method takes the first frame (0 s) of every "
                "clip, or none"
            )
        return self.frames[:, 0]


class Sample(Protocol):
    """Sampled clips, readable at any time."""

    @property
    def network_calls(self) -> int:
        """Calls of the backbone so far."""
        ...

    def read(self, times: Sequence[float] | Tensor) -> Tensor:
        """Latents (L, B, C, h, w) at times (L,) in [0, 1], in units of the clip's duration."""
        ...


class Clip(Protocol):
    """What a method may look at before training."""

    @property
    def members(self) -> Mapping[str, Any]:
        """Arrays by name."""
        ...


class Method(Protocol):
    """A way to learn videos. Implementations are frozen dataclasses made by `build`."""

    name: ClassVar[str]
    """What `--set method=...` calls it."""
    members: ClassVar[tuple[str, ...]]
    """Arrays of a shard's sample that its batches need, beside the caption: of `coefficients, latents, frame_time,
    observed`."""
    heads: ClassVar[tuple[str, ...]]
    """Heads of the backbone that it trains."""
    takes_first_frame: ClassVar[bool]
    """Whether a first frame can be given: windows of a long video then go on from each other, else they stand alone."""
    rates: ClassVar[bool]
    """Whether its backbone predicts a rate of insertions for each frame (`BackboneConfig.rates`)."""
    sequences: ClassVar[bool]
    """Whether a sample is some number of frames in order (`FrameSequences`), whose seconds nobody knows, instead of a
    curve that is read at any time (`Sample`)."""
    Sampling: ClassVar[type[Any]]
    """A frozen dataclass with a default for every field: what can be chosen when it samples. `vlfm sample` has an
    option for each field; one that a method lacks is refused."""
    Options: ClassVar[type[Any]]
    """A frozen dataclass with a default for every field: what a training recipe chooses. Where a field came later than
    its first runs, the class variable BEFORE has its value of then."""

    @property
    def states_per_clip(self) -> int:
        """States of a clip in one step, for the throughput in the log."""
        ...

    @property
    def temporal(self) -> bool:
        """Whether its backbone sees sequences of frames with their times."""
        ...

    @property
    def frame_count(self) -> bool:
        """Whether its backbone is told how many frames it sees of a clip (`BackboneConfig.frame_count`)."""
        ...

    @property
    def clip_start_dropout(self) -> float:
        """Rate at which a clip's start in its film was hidden in training: 0, it must be given; 1, it is unknown."""
        ...

    @classmethod
    def prepare(cls, clips: Sequence[Clip], clip_format: Mapping[str, Any]) -> dict[str, float]:
        """Figures of the training clips that the method needs; measured once and kept in the run's record."""
        ...

    @classmethod
    def build(cls, options: Any, figures: Mapping[str, float], clip_format: Mapping[str, Any]) -> Method:
        """The method with these options on a version's clips. Raises ValueError for options that cannot be."""
        ...

    def loss(self, backbone: nn.Module, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        """Named scalars; `loss`, the first, is minimised, the second is shown beside it. Two may be no scalars:

        - `errors` (states of the batch, in any shape): the loss of each state before any weights.
        - `place`, of the same shape: where the state is on its flow, from pure noise (-1) to the clip's first frame (0)
          and along the clip to its end (1). Validation tells the errors by it, and leaves out states where it is NaN.

        `batch` is this process's share of the step's, and each scalar the mean over its clips. What chance decides is
        from `draws`, what normalises over a batch from `draws.mean`: the losses and gradients of the processes then
        average to those of one process that has the whole batch.
        """
        ...

    def sample(self, backbone: nn.Module, request: Request) -> Sample:
        """Samples the requested clips. Raises ValueError for a task it cannot do."""
        ...


class SampledSequences(Sample, Protocol):
    """What a method samples whose `sequences` is true: frames in order, as many as a clip has."""

    @property
    def clips(self) -> list[Tensor]:
        """Latents (N_i, C, h, w) of each clip."""
        ...

    @property
    def inserted(self) -> list[Tensor]:
        """(N_i,) of each clip: the clock when a frame was inserted, 0 for those that it began with, NaN for given
        ones."""
        ...

    @property
    def full(self) -> list[bool]:
        """Whether a clip would have grown further, but for the most frames that were allowed."""
        ...


def default_sampling(method: Method, clip_format: Mapping[str, Any], **given: Any) -> Any:
    """The method's `Sampling` with what is `given`, and its defaults on clips of a format (`Version.clip`).

    A sample that is a curve is read off cubics between the solver's points. With fewer of them than the coefficients
    saw frames, the true curve itself is read wrong: of a real clip of 32 frames, 16 steps lose 5 % of the energy in the
    mean and nearly all of it at the worst frame. So by default there are as many steps as such frames, at least 16.

    Raises:
        ValueError: a value that cannot be.
    """
    fields = {field.name for field in dataclasses.fields(method.Sampling)}
    if not method.sequences and "steps" in fields - given.keys():
        given["steps"] = max(SampleSettings.steps, clip_format.get("frames_observed_max", 0))
    return method.Sampling(**given)


def is_guided(settings: Any) -> bool:
    """Whether settings of a method's `Sampling` ask for guidance: a field `guidance` or `*_guidance` that is not 1."""
    return any(value != 1 for name, value in vars(settings).items() if name.endswith("guidance"))


def drop_captions(batch: Batch, dropped: Tensor) -> tuple[Tensor, Tensor]:
    """Text (B, M, D) and lengths (B,) with the empty caption where `dropped` (B,) is true."""
    length = batch.empty_text.shape[0]
    rows = max(length, batch.text.shape[1])
    text = torch.nn.functional.pad(batch.text, (0, 0, 0, rows - batch.text.shape[1]))
    empty = torch.nn.functional.pad(batch.empty_text, (0, 0, 0, rows - length))
    chosen = torch.where(dropped[:, None, None], empty, text)
    return chosen, torch.where(dropped, length, batch.text_length)
