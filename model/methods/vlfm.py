"""Video Latent Flow Matching: the flow that carries noise to a clip's first frame and then along the clip.

The clip is the curve m(r) of its HiPPO-LegS coefficients, r = t / T; the flow's path around it is an object of
model/flow/path.py. The network predicts m(max(r, 0)) and m'(max(r, 0)), and the path assembles the velocity from them
(arXiv 2502.00500, Theorem 4.1, on a path of our own: the printed one cannot be sampled between frames).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from model.backbones.dit import Conditioning
from model.flow.path import PaperPath, WarmupPath
from model.flow.solver import Trajectory, solve
from model.legs import basis_torch, derivative_torch
from model.methods.base import ClipBatch, drop_captions
from model.recipes import TrainRecipe

END_SHARE, END_FROM = 0.06, 0.9
"""Share of the clip's training times that fall on its end, from END_FROM on, beside the even spread: the end has
neighbours on one side only. The beginning needs none, the warm-up trains it."""


@dataclass(frozen=True)
class VLFM:
    """Loss and sampler of VLFM on one dataset.

    The two predictions are trained in units of their root mean square over the data, so their losses compare. On the
    warm-up the velocity is linear in the mean, so the mean's squared error is the flow-matching loss up to a positive
    weight that depends on the flow time alone and leaves the minimiser where it is; on the clip the velocity is the
    derivative itself, and the mean is what frames are read from.

    On the clip a state is shown a little before or after its time, `state_jitter`: a sample's state lags by what the
    derivative was wrong before, and the network must learn to set it right from the flow time, not to follow it.
    """

    path: WarmupPath | PaperPath
    """The flow's path."""
    mean_scale: float
    """Root mean square of m over the data and over r in [0, 1]."""
    derivative_scale: float
    """The same of m', per unit of flow time."""
    times_per_clip: int = 1
    """Flow times drawn for each clip of a batch."""
    warmup_share: float = 0.3
    """Share of them on the warm-up."""
    warmup_focus: float = 2.0
    """Exponent that draws these towards the noise."""
    state_jitter: float = 0.0
    """How far along the clip a state may be from its time: standard deviation in flow time."""
    error_focus: float = 0.0
    """Exponent that weighs states by their error; 0 weighs all alike."""
    derivative_weight: float = 0.1
    """Weight of the derivative's loss."""
    caption_dropout: float = 0.1
    """Rate of the empty caption."""
    context_dropout: float = 0.75
    """Rate of the hidden first frame."""

    def loss(self, backbone: nn.Module, batch: ClipBatch, generator: torch.Generator) -> dict[str, Tensor]:
        """The flow-matching loss of a batch: `loss`, and its parts `mean`, `derivative` and `velocity`.

        `mean` and `derivative` are relative mean squared errors; `velocity` is the error of the assembled velocity in
        latents per unit of flow time, squared: what the paper's equation calls the loss, for the record.
        """
        device = batch.coefficients.device
        count, times = batch.coefficients.shape[0], self.times_per_clip
        flow_time = self.draw_times(count, generator, device)  # (B, K)
        mean, derivative = curve(batch.coefficients, flow_time.clamp(min=0))  # (B, K, C, h, w)
        noise = torch.randn(mean.shape, generator=generator, device=device)
        wide = flow_time[:, :, None, None, None]
        shown = mean
        if self.state_jitter > 0:
            step = self.state_jitter * torch.randn(flow_time.shape, generator=generator, device=device)
            shown, _ = curve(batch.coefficients, torch.where(flow_time > 0, flow_time + step, 0.0).clamp(0, 1))
        centre, sigma = self.path.evaluate(wide, shown)
        latents = centre + sigma * noise

        given = self.conditioning(batch, generator)
        # The caption is told once for all times of a clip; the backbone reads it once then.
        told = {name: value.repeat_interleave(times, 0) for name, value in vars(given).items()}
        given = Conditioning(**{**told, "text": given.text, "text_length": given.text_length})
        predicted, slope = backbone(latents.flatten(0, 1)[:, None], flow_time.reshape(-1, 1), given)
        predicted = predicted[:, 0].unflatten(0, (count, times)).float() * self.mean_scale
        slope = slope[:, 0].unflatten(0, (count, times)).float() * self.derivative_scale

        errors = (predicted - mean).square().mean(dim=(2, 3, 4)) / self.mean_scale**2  # (B, K)
        weights = (errors.detach() / errors.detach().mean().clamp(min=1e-12)) ** self.error_focus
        mean_loss = (errors * weights / weights.mean().clamp(min=1e-12)).mean()
        derivative_loss = (slope - derivative).square().mean() / self.derivative_scale**2
        with torch.no_grad():
            target = self.path.velocity(latents, wide, mean, derivative)
            velocity_loss = (self.path.velocity(latents, wide, predicted, slope) - target).square().mean()
        return {
            "loss": mean_loss + self.derivative_weight * derivative_loss,
            "mean": errors.detach().mean(),
            "derivative": derivative_loss.detach(),
            "velocity": velocity_loss,
        }

    def draw_times(self, count: int, generator: torch.Generator, device: torch.device) -> Tensor:
        """(count, K) flow times: stratified over the clips, `warmup_share` of them before 0."""
        total = count * self.times_per_clip
        order = torch.randperm(total, generator=generator, device=device)
        even = (order + torch.rand(total, generator=generator, device=device)) / total
        share = self.warmup_share if self.path.start < 0 else 0.0
        early = self.path.start * (1 - (even / max(share, 1e-9)).clamp(max=1) ** self.warmup_focus)
        place = ((even - share) / (1 - share)).clamp(0, 1)
        spread, at_end = place / (1 - END_SHARE), 1 - (1 - END_FROM) * (1 - place) / END_SHARE
        late = torch.where(spread < 1, spread, at_end)
        return torch.where(even < share, early, late).reshape(count, self.times_per_clip)

    def conditioning(self, batch: ClipBatch, generator: torch.Generator) -> Conditioning:
        """What the network is told of each clip in training, with captions and first frames dropped at their rates."""
        device, count = batch.coefficients.device, batch.coefficients.shape[0]
        dropped = torch.rand(count, generator=generator, device=device) < self.caption_dropout
        hidden = torch.rand(count, generator=generator, device=device) < self.context_dropout
        text, length = drop_captions(batch, dropped)
        context, _ = curve(batch.coefficients, torch.zeros(count, 1, device=device))
        shown = (~hidden).float()
        return Conditioning(
            text=text,
            text_length=length,
            clip_start=batch.clip_start.float(),
            named=(~dropped).float(),
            log_duration=batch.duration.log().float(),
            context=context[:, 0] * shown[:, None, None, None],
            context_given=shown,
        )

    @torch.no_grad()
    def sample(
        self,
        backbone: nn.Module,
        given: Conditioning,
        noise: Tensor,
        *,
        steps: int = 32,
        warmup_steps: int = 8,
        solver: str = "euler",
        guidance: float = 1.0,
        unconditional: Conditioning | None = None,
        first_frame: Tensor | None = None,
        reanchor: bool = True,
    ) -> Trajectory:
        """Integrate the flow from `noise` (B, C, h, w); the trajectory is read at any time of the clip.

        Args:
            backbone: the trained network.
            given: caption, clip_start and, where given, the first frame.
            noise: standard normal latents; kept as the path's noise all along.
            steps: solver steps on the clip, however many frames are read.
            warmup_steps: solver steps from noise to the first frame.
            solver: a method of model/flow/solver.py.
            guidance: weight of classifier-free guidance on the warm-up; 1 is none. On the clip it would scale motion.
            unconditional: the empty caption's conditioning; needed when guidance is not 1.
            first_frame: (B, C, h, w) latents of the first frame; the flow then starts on the clip, at r = 0.
            reanchor: whether the state is set back on the predicted mean at the clip's grid points.

        Raises:
            ValueError: guidance without the empty caption.
        """
        if guidance != 1.0 and unconditional is None:
            raise ValueError(f"guidance is {guidance}, so the empty caption's conditioning must be given")
        grid = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
        if first_frame is None and self.path.start < 0:
            grid = torch.cat([torch.linspace(self.path.start, 0, warmup_steps + 1, dtype=torch.float64)[:-1], grid])

        def predict(latents: Tensor, flow_time: float) -> tuple[Tensor, Tensor]:
            time = torch.full((latents.shape[0], 1), flow_time, device=latents.device)
            mean, slope = backbone(latents[:, None], time, given)
            if guidance != 1.0 and flow_time < 0:
                assert unconditional is not None
                free, free_slope = backbone(latents[:, None], time, unconditional)
                mean, slope = free + guidance * (mean - free), free_slope + guidance * (slope - free_slope)
            return mean[:, 0].float() * self.mean_scale, slope[:, 0].float() * self.derivative_scale

        return solve(self.path, predict, noise, grid, method=solver, reanchor=reanchor, start_mean=first_frame)


def make_vlfm(
    recipe: TrainRecipe, clip: Mapping[str, Any], mean_scale: float = 1.0, derivative_scale: float = 1.0
) -> VLFM:
    """The method of a training recipe on a version's clips (`Version.clip`) with these root mean squares.

    Raises:
        ValueError: an unknown path, or values a path cannot have.
    """
    if recipe.path not in ("warmup", "paper"):
        raise ValueError(f"path is {recipe.path!r}; it must be warmup or paper: --set path=warmup")
    path: WarmupPath | PaperPath = WarmupPath(recipe.warmup, recipe.sigma_end)
    if recipe.path == "paper":
        path = PaperPath(frames=clip["frames_observed_max"], duration=clip["duration"])
    return VLFM(
        path=path,
        mean_scale=mean_scale,
        derivative_scale=derivative_scale,
        times_per_clip=recipe.times_per_clip,
        warmup_share=recipe.warmup_share,
        warmup_focus=recipe.warmup_focus,
        state_jitter=recipe.state_jitter,
        error_focus=recipe.error_focus,
        derivative_weight=recipe.derivative_weight,
        caption_dropout=recipe.caption_dropout,
        context_dropout=recipe.context_dropout,
    )


def curve(coefficients: Tensor, flow_time: Tensor) -> tuple[Tensor, Tensor]:
    """m(r) and m'(r), per unit of r, of clips (B, order, C, h, w) at (B, K) times in [0, 1]: each (B, K, C, h, w)."""
    order = coefficients.shape[1]
    flat = coefficients.flatten(2)
    shape = (*flow_time.shape, *coefficients.shape[2:])
    return (
        torch.bmm(basis_torch(flow_time, order).to(flat.dtype), flat).view(shape),
        torch.bmm(derivative_torch(flow_time, order).to(flat.dtype), flat).view(shape),
    )
