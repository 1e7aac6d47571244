"""What methods share that make every frame of a clip on its own, at a place in the clip that the network is told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from model.methods.base import Clip, Request, SampleSettings
from model.methods.vlfm import VLFM

FRAMES_AT_ONCE = 256
"""Frames of all clips together that are made in one batch."""


@dataclass(frozen=True)
class SingleFrames:
    """Base of those methods: they learn VLFM's curves, from states that are single frames, and take none as given."""

    name: ClassVar[str]
    members: ClassVar[tuple[str, ...]] = VLFM.members
    temporal: ClassVar[bool] = False
    takes_first_frame: ClassVar[bool] = False
    rates: ClassVar[bool] = False
    frame_count: ClassVar[bool] = False
    sequences: ClassVar[bool] = False
    Sampling: ClassVar[type[SampleSettings]] = SampleSettings

    options: Any
    """What the recipe chose."""

    @property
    def states_per_clip(self) -> int:
        """Frames drawn of each clip."""
        return int(self.options.times_per_clip)

    @property
    def clip_start_dropout(self) -> float:
        """Rate at which clip_start was hidden in training."""
        return float(self.options.clip_start_dropout)

    @classmethod
    def prepare(cls, clips: Sequence[Clip], clip_format: Mapping[str, Any]) -> dict[str, float]:
        """As VLFM's."""
        return VLFM.prepare(clips, clip_format)

    def check(self, request: Request) -> None:
        """Raises ValueError where a frame is given, or with guidance but without the empty caption."""
        if request.frames is not None:
            raise ValueError(f"the {self.name} method makes every frame on its own and takes no given frame")
        if request.settings.guidance != 1.0 and request.unconditional is None:
            raise ValueError(f"guidance is {request.settings.guidance}, so the empty caption must be given")
