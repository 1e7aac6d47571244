"""Flow matching of single frames, the other way to make a clip: every frame on its own, all from the same noise."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from model.flow.path import WarmupPath
from model.flow.solver import solve
from model.flow.times import TIME_LAWS
from model.methods.base import Batch, Request
from model.methods.curves import curve
from model.methods.draws import Draws
from model.methods.single_frames import FRAMES_AT_ONCE, SingleFrames
from model.methods.vlfm import VLFM, VLFMOptions
from model.settings import AT_LEAST_0, AT_LEAST_1, SHARE, check_settings, one_of

PLACE_WAVES = 8.0
"""What a frame's place r in its clip is multiplied with on its way into the embedding of the duration (PerFrame): its
wavelengths, from 16 to 0.5, are then 2 to 1/16 clips, as fine as those that tell VLFM its flow time."""


@dataclass(frozen=True)
class PerFrameOptions:
    """What a training recipe chooses of the per-frame method; as the fields of VLFMOptions."""

    warmup: float = 0.25
    """Length of the path from noise to a frame, in flow time."""
    sigma_end: float = 0.1
    """Standard deviation of the path at the frame."""
    times_per_clip: int = 4
    """Frames drawn of each clip of a step."""
    warmup_law: str = "signal"
    """How the flow times are drawn: `signal`, evenly over the logarithm of signal to noise, or a law of
    model/flow/times.py."""
    warmup_focus: float = 0.0
    """Above 0 the power that draws even flow times towards the noise instead."""
    error_focus: float = 0.0
    """Exponent that weighs a state by its error relative to the others'; 0 weighs all alike."""
    signal_weight: float = 0.0
    """How much more a state may count for its ratio of signal to noise; 0 counts all alike."""
    caption_dropout: float = 0.1
    """Rate of the empty caption."""
    clip_start_dropout: float = 0.9
    """Rate at which clip_start alone is dropped."""

    BEFORE: ClassVar[Mapping[str, Any]] = {"clip_start_dropout": 0.0}
    """Fields that older runs lack, as they were then."""

    def __post_init__(self) -> None:
        """Raises ValueError for a field that cannot be, with its name, its value and what it must be."""
        rules = dict.fromkeys(("warmup_focus", "error_focus", "signal_weight"), AT_LEAST_0)
        rules |= {"times_per_clip": AT_LEAST_1, "warmup_law": one_of("signal", *TIME_LAWS)}
        check_settings(self, {**rules, "caption_dropout": SHARE, "clip_start_dropout": SHARE})


@dataclass(frozen=True)
class PerFrame(SingleFrames):
    """Flow matching of single frames: noise to the frame at a time that the network is told, by VLFM's warm-up alone.

    A frame is a clip that stands still. The network, the caption, the clip's start and the target m(r) are VLFM's; r
    goes in by way of the duration, which is the same for all clips (PLACE_WAVES).
    """

    name: ClassVar[str] = "per_frame"
    heads: ClassVar[tuple[str, ...]] = VLFM.heads
    Options: ClassVar[type[PerFrameOptions]] = PerFrameOptions

    options: PerFrameOptions
    stills: VLFM
    """The loss of clips that stand still."""

    @classmethod
    def build(cls, options: PerFrameOptions, figures: Mapping[str, float], clip_format: Mapping[str, Any]) -> PerFrame:
        """The method on a version's clips. Raises ValueError for values a path cannot have."""
        # All times fall on the warm-up (a share of 1 would divide by zero), and the first frame is never given away.
        chosen = {**dataclasses.asdict(options), "times_per_clip": 1}
        still = VLFMOptions(**chosen, warmup_share=1 - 1e-6, context_dropout=1.0, anchor="none", state_jitter=0.0)
        return cls(options, VLFM.build(still, figures, clip_format))

    def loss(self, backbone: nn.Module, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        """As `VLFM.loss`, over frames of the clips drawn from the times that VLFM draws on a clip."""
        coefficients, repeats = batch.part("coefficients"), self.options.times_per_clip
        spread = dataclasses.replace(self.stills.options, warmup_share=0.0, times_per_clip=repeats)
        on_clip = dataclasses.replace(self.stills, options=spread)
        times = on_clip.draw_times(draws)  # (B, K)
        frames, _ = curve(coefficients, times)

        def repeated(values: Tensor) -> Tensor:
            return values.repeat_interleave(repeats, 0)

        stills = Batch(
            clip_ids=tuple(name for name in batch.clip_ids for _ in range(repeats)),
            coefficients=frames.flatten(0, 1)[:, None],
            text=repeated(batch.text),
            text_length=repeated(batch.text_length),
            empty_text=batch.empty_text,
            clip_start=repeated(batch.clip_start),
            duration=(PLACE_WAVES * times.flatten()).exp(),
        )
        return self.stills.loss(backbone, stills, draws.repeated(repeats))

    def sample(self, backbone: nn.Module, request: Request) -> FrameSample:
        """Clips whose frames are made when they are read. Raises ValueError where a frame is given, or with guidance
        but without the empty caption."""
        self.check(request)
        return FrameSample(self, backbone, request)


class FrameSample:
    """Clips of single frames, each integrated from the clip's one noise when it is read."""

    def __init__(self, method: PerFrame, backbone: nn.Module, request: Request) -> None:
        self.method, self.backbone, self.request = method, backbone, request
        self.noise = request.noise()
        self.network_calls = 0

    @torch.no_grad()
    def read(self, times: Sequence[float] | Tensor, source: str = "mean") -> Tensor:
        """Latents (L, B, C, h, w) at times (L,) in [0, 1]; `source` as in Trajectory.read."""
        at = torch.as_tensor(times, dtype=torch.float64).reshape(-1)
        size = max(1, FRAMES_AT_ONCE // len(self.noise))
        return torch.cat([self._frames(part, source) for part in at.split(size)])

    def _frames(self, times: Tensor, source: str) -> Tensor:
        count, clips = len(times), len(self.noise)
        settings, stills = self.request.settings, self.method.stills
        assert isinstance(stills.path, WarmupPath)
        grid = stills.warmup_grid(settings.warmup_steps)
        place = (PLACE_WAVES * times.float()).to(self.noise.device).repeat_interleave(clips)

        def at_place(name: str) -> Any:
            given = getattr(self.request, name)
            if given is None:
                return None
            every = {key: torch.cat([value] * count) for key, value in vars(given).items()}
            return type(given)(**{**every, "log_duration": place})

        told, untold = at_place("conditioning"), at_place("unconditional")

        def predict(latents: Tensor, flow_time: float) -> tuple[Tensor, Tensor]:
            self.network_calls += 1
            return stills.predict(self.backbone, latents, flow_time, told, untold, settings.guidance)

        noise = torch.cat([self.noise] * count)
        read: Tensor = solve(stills.path, predict, noise, grid, method=settings.solver).read([0.0], source)[0]
        return read.unflatten(0, (count, clips))
