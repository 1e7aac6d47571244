"""Flow matching of single frames, the other way to make a clip: every frame on its own, all from the same noise."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from model.backbones.dit import Conditioning
from model.flow.solver import solve
from model.methods.base import ClipBatch
from model.methods.vlfm import VLFM, curve, make_vlfm
from model.recipes import TrainRecipe
from model.sample import Sampler
from model.training.data import Clip

STILL_WAVES = 8.0
"""What a frame's place r in its clip is multiplied with on its way into the duration's embedding (PerFrame): its waves,
of lengths 16 to 0.5, are then 2 to 1/16 clips long, as fine as those that tell VLFM its flow time."""


@dataclass(frozen=True)
class PerFrame:
    """Flow matching of single frames: noise to the frame at a time that the network is told, by VLFM's warm-up alone.

    A frame is a clip that stands still. The network, the caption, the clip's start and the target m(r) are VLFM's; r
    goes in by way of the duration, which is the same for all clips (STILL_WAVES).
    """

    stills: VLFM
    """The loss of clips that stand still."""
    times_per_clip: int
    """Frames drawn of each clip of a batch."""

    def loss(self, backbone: nn.Module, batch: ClipBatch, generator: torch.Generator) -> dict[str, Tensor]:
        """As `VLFM.loss`, over frames of the clips drawn from the times that VLFM draws on a clip."""
        count, device = batch.coefficients.shape[0], batch.coefficients.device
        on_clip = dataclasses.replace(self.stills, warmup_share=0.0, times_per_clip=self.times_per_clip)
        times = on_clip.draw_times(count, generator, device)  # (B, K)
        frames, _ = curve(batch.coefficients, times)

        def repeated(values: Tensor) -> Tensor:
            return values.repeat_interleave(self.times_per_clip, 0)

        stills = ClipBatch(
            clip_ids=tuple(name for name in batch.clip_ids for _ in range(self.times_per_clip)),
            coefficients=frames.flatten(0, 1)[:, None],
            text=repeated(batch.text),
            text_length=repeated(batch.text_length),
            empty_text=batch.empty_text,
            clip_start=repeated(batch.clip_start),
            duration=(STILL_WAVES * times.flatten()).exp(),
        )
        return self.stills.loss(backbone, stills, generator)


def make_per_frame(
    recipe: TrainRecipe, clip: Mapping[str, Any], mean_scale: float = 1.0, derivative_scale: float = 1.0
) -> PerFrame:
    """The per-frame method of a recipe; arguments and errors as for `make_vlfm`."""
    # All times fall on the warm-up (a share of 1 would divide by zero), and the first frame is never given away.
    stills = dataclasses.replace(
        make_vlfm(recipe, clip, mean_scale, derivative_scale),
        times_per_clip=1,
        warmup_share=1 - 1e-6,
        context_dropout=1.0,
    )
    return PerFrame(stills, recipe.times_per_clip)


def sample_frames(
    sampler: Sampler, clips: Sequence[Clip], steps: int, source: str = "mean"
) -> tuple[list[Tensor], int]:
    """Every clip's kept frames (k, C, h, w), and the network calls for a clip that kept the most.

    Args:
        sampler: a run that was trained with `make_per_frame`.
        clips: what to sample; clip number i has the noise of seed i, the same for all its frames.
        steps: Euler steps from noise to a frame.
        source: `mean` or `state`, as in `Trajectory.read`.
    """
    method = sampler.method
    grid = torch.linspace(method.path.start, 0, steps + 1, dtype=torch.float64)
    found: list[Tensor] = []
    for number, clip in enumerate(clips):
        times = times_of(clip, sampler)
        count = len(times)
        given = sampler.conditioning([clip.about["caption"]] * count, [clip.about["clip_start"]] * count)
        given = dataclasses.replace(given, log_duration=STILL_WAVES * times.float().to(sampler.device))

        @torch.no_grad()
        def predict(latents: Tensor, now: float, given: Conditioning = given) -> tuple[Tensor, Tensor]:
            time = torch.full((len(latents), 1), now, device=latents.device)
            mean, slope = sampler.backbone(latents[:, None], time, given)
            return mean[:, 0].float() * method.mean_scale, slope[:, 0].float() * method.derivative_scale

        noise = sampler.noise([number]).expand(count, -1, -1, -1)
        found.append(solve(method.path, predict, noise, grid).read([0.0], source)[0])
    return found, (steps + 1) * max(len(read) for read in found)


def times_of(clip: Clip, sampler: Sampler) -> Tensor:
    """(k,) float64: the kept frames' places r in the clip."""
    return torch.from_numpy(clip.members["frame_time"] / sampler.window).clamp(0, 1)
