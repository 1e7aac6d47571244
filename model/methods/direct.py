"""Direct prediction, the baseline of Table 1 (arXiv 2502.00500): the network makes each frame without a flow."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from model.backbones.conditioning import Conditioning
from model.methods.base import Batch, Request
from model.methods.curves import curve
from model.methods.draws import Draws
from model.methods.single_frames import FRAMES_AT_ONCE, SingleFrames
from model.methods.vlfm import VLFM, VLFMOptions
from model.settings import AT_LEAST_1, SHARE, check_settings


@dataclass(frozen=True)
class DirectOptions:
    """What a training recipe chooses of direct prediction; as the fields of VLFMOptions."""

    times_per_clip: int = 4
    """Frames drawn of each clip of a step."""
    caption_dropout: float = 0.1
    """Rate of the empty caption."""
    clip_start_dropout: float = 0.9
    """Rate at which clip_start alone is dropped."""

    def __post_init__(self) -> None:
        """Raises ValueError for a field that cannot be, with its name, its value and what it must be."""
        check_settings(self, {"times_per_clip": AT_LEAST_1, "caption_dropout": SHARE, "clip_start_dropout": SHARE})


@dataclass(frozen=True)
class Direct(SingleFrames):
    """The backbone as a function of noise, caption and place r that returns the frame m(r), in one call.

    It minimises the squared error to m(r) in units of the data's mean square. The noise tells nothing of the clip, so
    what is learned is the mean of all clips of a caption; it stands in for what a flow would refine. The network, what
    it is told and the target are VLFM's, and so is the read-out at any time: what differs is that there is no flow.
    """

    name: ClassVar[str] = "direct"
    heads: ClassVar[tuple[str, ...]] = ("mean",)
    Options: ClassVar[type[DirectOptions]] = DirectOptions

    options: DirectOptions
    mean_scale: float
    """Root mean square of m over the data and over r in [0, 1]."""
    conditioned: VLFM
    """What tells the network of caption and clip: VLFM without an anchor."""

    @classmethod
    def build(cls, options: DirectOptions, figures: Mapping[str, float], clip_format: Mapping[str, Any]) -> Direct:
        """The method on a version's clips."""
        told = VLFMOptions(**dataclasses.asdict(options), context_dropout=1.0, anchor="none")
        return cls(options, figures["mean_scale"], VLFM.build(told, figures, clip_format))

    def loss(self, backbone: nn.Module, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        """The relative squared error of frames at times spread evenly over the clips; `mean` is the same figure."""
        coefficients, times = batch.part("coefficients"), self.options.times_per_clip
        at = draws.even(times)  # (B, K)
        frames, _ = curve(coefficients, at)  # (B, K, C, h, w)
        noise = draws.randn(*frames.shape[2:])[:, None].expand_as(frames)  # one for all frames, as in sampling
        given = self.conditioned.conditioning(batch, at, draws)
        found = self.ask(backbone, noise.flatten(0, 1), at.flatten(), given).unflatten(0, at.shape)
        errors = (found - frames).square().mean(dim=(2, 3, 4)) / self.mean_scale**2  # (B, K)
        return {"loss": errors.mean(), "mean": errors.detach().mean(), "errors": errors.detach(), "place": at}

    def sample(self, backbone: nn.Module, request: Request) -> DirectSample:
        """Clips whose frames are made when they are read. Raises ValueError where a frame is given, or with guidance
        but without the empty caption."""
        self.check(request)
        return DirectSample(self, backbone, request)

    def ask(self, backbone: nn.Module, noise: Tensor, place: Tensor, given: Conditioning) -> Tensor:
        """Frames (N, C, h, w), at least float32, from noise of that shape at places (N,) in [0, 1]."""
        mean: Tensor = backbone(noise[:, None], place[:, None], given)["mean"][:, 0]
        return mean.to(torch.promote_types(mean.dtype, torch.float32)) * self.mean_scale


class DirectSample:
    """Clips whose frames are predicted from the clip's one noise when they are read."""

    def __init__(self, method: Direct, backbone: nn.Module, request: Request) -> None:
        self.method, self.backbone, self.request = method, backbone, request
        self.noise = request.noise()
        self.network_calls = 0

    @torch.no_grad()
    def read(self, times: Sequence[float] | Tensor) -> Tensor:
        """Latents (L, B, C, h, w) at times (L,) in [0, 1]."""
        at = torch.as_tensor(times, dtype=self.noise.dtype).reshape(-1).to(self.noise.device)
        size = max(1, FRAMES_AT_ONCE // len(self.noise))
        return torch.cat([self._frames(part) for part in at.split(size)])

    def _frames(self, times: Tensor) -> Tensor:
        count, guidance = len(times), self.request.settings.guidance
        noise = torch.cat([self.noise] * count)
        place = times.repeat_interleave(len(self.noise))

        def frames(given: Conditioning) -> Tensor:
            self.network_calls += 1
            every = {name: torch.cat([value] * count) for name, value in vars(given).items()}
            return self.method.ask(self.backbone, noise, place, Conditioning(**every))

        found = frames(self.request.conditioning)
        if guidance != 1.0:
            assert self.request.unconditional is not None
            free = frames(self.request.unconditional)
            found = free + guidance * (found - free)
        return found.unflatten(0, (count, len(self.noise)))
