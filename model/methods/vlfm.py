"""Video Latent Flow Matching: the flow that carries noise to a clip's first frame and then along the clip.

The clip is the curve m(r) of its HiPPO-LegS coefficients, r = t / T; the flow's path around it is an object of
model/flow/path.py. The network predicts m(max(r, 0)) and m'(max(r, 0)), and the path assembles the velocity from them
(arXiv 2502.00500, Theorem 4.1, on a path of our own: the printed one cannot be sampled between frames).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from model.backbones.conditioning import Conditioning
from model.flow.path import PaperPath, WarmupPath
from model.flow.solver import Trajectory, solve
from model.legs import basis_torch, derivative_torch
from model.methods.base import Batch, Clip, Request, drop_captions
from model.settings import ABOVE_0, AT_LEAST_0, AT_LEAST_1, SHARE, SHARE_BELOW_1, check_settings

END_SHARE, END_FROM = 0.06, 0.9
"""Share of the clip's training times that fall on its end, from END_FROM on, beside the even spread: the end has
neighbours on one side only. The beginning needs none, the warm-up trains it."""


@dataclass(frozen=True)
class VLFMOptions:
    """What a training recipe chooses of VLFM."""

    path: str = "warmup"
    """Flow path: `warmup` (docs/method.md) or `paper` (as printed, for comparison)."""
    warmup: float = 0.25
    """Length of the noise-to-first-frame part, in units of the clip's duration."""
    sigma_end: float = 0.1
    """Standard deviation of the path at every time of the clip, in latents of unit variance."""
    times_per_clip: int = 4
    """Flow times drawn for each clip of a step: one read of the clip serves them all."""
    warmup_share: float = 0.3
    """Share of the training times that fall on the warm-up, in (0, 1)."""
    warmup_focus: float = 2.0
    """Draws the warm-up's times towards the noise, where the caption alone must tell the frame; 1 is uniform."""
    state_jitter: float = 0.3
    """How far along the clip (standard deviation, in flow time) a state may be from its time in training. Without it
    the network reads the time off the state, and a sample that once lags stays behind (docs/experiments.md)."""
    error_focus: float = 1.0
    """Exponent that weighs a state by its error relative to the others', so that no time of a clip is left behind; 0
    weighs all alike."""
    derivative_weight: float = 0.1
    """Weight of the derivative's loss beside the mean's; each is in units of its own mean square over the data."""
    caption_dropout: float = 0.1
    """Rate at which caption and clip_start are replaced by the empty caption, for guidance."""
    context_dropout: float = 0.75
    """Rate at which the first frame is hidden; high, because most videos start from a prompt alone."""

    def __post_init__(self) -> None:
        """Raises ValueError for a field that cannot be, with its name, its value and what it must be."""
        rules = dict.fromkeys(("state_jitter", "error_focus", "derivative_weight"), AT_LEAST_0)
        rules |= dict.fromkeys(("caption_dropout", "context_dropout"), SHARE)
        rules |= {"times_per_clip": AT_LEAST_1, "warmup_share": SHARE_BELOW_1, "warmup_focus": ABOVE_0}
        check_settings(self, rules)


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

    name: ClassVar[str] = "vlfm"
    members: ClassVar[tuple[str, ...]] = ("coefficients",)
    heads: ClassVar[tuple[str, ...]] = ("mean", "derivative")
    temporal: ClassVar[bool] = False
    takes_first_frame: ClassVar[bool] = True
    Options: ClassVar[type[VLFMOptions]] = VLFMOptions

    options: VLFMOptions
    """What the recipe chose."""
    path: WarmupPath | PaperPath
    """The flow's path."""
    mean_scale: float
    """Root mean square of m over the data and over r in [0, 1]."""
    derivative_scale: float
    """The same of m', per unit of flow time."""

    @property
    def states_per_clip(self) -> int:
        """Flow times drawn for each clip."""
        return self.options.times_per_clip

    @classmethod
    def prepare(cls, clips: Sequence[Clip], clip_format: Mapping[str, Any]) -> dict[str, float]:
        """`mean_scale` and `derivative_scale` of the clips."""
        mean, derivative = curve_scales(clips, clip_format["order"])
        return {"mean_scale": mean, "derivative_scale": derivative}

    @classmethod
    def build(cls, options: VLFMOptions, figures: Mapping[str, float], clip_format: Mapping[str, Any]) -> VLFM:
        """The method on a version's clips (`Version.clip`). Raises ValueError for values a path cannot have."""
        if options.path not in ("warmup", "paper"):
            raise ValueError(f"path is {options.path!r}; it must be warmup or paper: --set path=warmup")
        path: WarmupPath | PaperPath = WarmupPath(options.warmup, options.sigma_end)
        if options.path == "paper":
            path = PaperPath(frames=clip_format["frames_observed_max"], duration=clip_format["duration"])
        return cls(options, path, figures["mean_scale"], figures["derivative_scale"])

    def loss(self, backbone: nn.Module, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """The flow-matching loss of a batch: `loss`, and its parts `mean`, `derivative` and `velocity`.

        `mean` and `derivative` are relative mean squared errors; `velocity` is the error of the assembled velocity in
        latents per unit of flow time, squared: what the paper's equation calls the loss, for the record.
        """
        options, coefficients = self.options, batch.part("coefficients")
        device = coefficients.device
        count, times = coefficients.shape[0], options.times_per_clip
        flow_time = self.draw_times(count, generator, device)  # (B, K)
        mean, derivative = curve(coefficients, flow_time.clamp(min=0))  # (B, K, C, h, w)
        noise = torch.randn(mean.shape, generator=generator, device=device)
        wide = flow_time[:, :, None, None, None]
        shown = mean
        if options.state_jitter > 0:
            step = options.state_jitter * torch.randn(flow_time.shape, generator=generator, device=device)
            shown, _ = curve(coefficients, torch.where(flow_time > 0, flow_time + step, 0.0).clamp(0, 1))
        centre, sigma = self.path.evaluate(wide, shown)
        latents = centre + sigma * noise

        given = self.conditioning(batch, generator)
        # The caption is told once for all times of a clip; the backbone reads it once then.
        told = {name: value.repeat_interleave(times, 0) for name, value in vars(given).items()}
        given = Conditioning(**{**told, "text": given.text, "text_length": given.text_length})
        found = backbone(latents.flatten(0, 1)[:, None], flow_time.reshape(-1, 1), given)
        predicted = found["mean"][:, 0].unflatten(0, (count, times)).float() * self.mean_scale
        slope = found["derivative"][:, 0].unflatten(0, (count, times)).float() * self.derivative_scale

        errors = (predicted - mean).square().mean(dim=(2, 3, 4)) / self.mean_scale**2  # (B, K)
        weights = (errors.detach() / errors.detach().mean().clamp(min=1e-12)) ** options.error_focus
        mean_loss = (errors * weights / weights.mean().clamp(min=1e-12)).mean()
        derivative_loss = (slope - derivative).square().mean() / self.derivative_scale**2
        with torch.no_grad():
            target = self.path.velocity(latents, wide, mean, derivative)
            velocity_loss = (self.path.velocity(latents, wide, predicted, slope) - target).square().mean()
        return {
            "loss": mean_loss + options.derivative_weight * derivative_loss,
            "mean": errors.detach().mean(),
            "derivative": derivative_loss.detach(),
            "velocity": velocity_loss,
        }

    def draw_times(self, count: int, generator: torch.Generator, device: torch.device) -> Tensor:
        """(count, K) flow times: stratified over the clips, `warmup_share` of them before 0."""
        total = count * self.options.times_per_clip
        order = torch.randperm(total, generator=generator, device=device)
        even = (order + torch.rand(total, generator=generator, device=device)) / total
        share = self.options.warmup_share if self.path.start < 0 else 0.0
        early = self.path.start * (1 - (even / max(share, 1e-9)).clamp(max=1) ** self.options.warmup_focus)
        place = ((even - share) / (1 - share)).clamp(0, 1)
        spread, at_end = place / (1 - END_SHARE), 1 - (1 - END_FROM) * (1 - place) / END_SHARE
        late = torch.where(spread < 1, spread, at_end)
        return torch.where(even < share, early, late).reshape(count, self.options.times_per_clip)

    def conditioning(self, batch: Batch, generator: torch.Generator) -> Conditioning:
        """What the network is told of each clip in training, with captions and first frames dropped at their rates."""
        coefficients = batch.part("coefficients")
        device, count = coefficients.device, coefficients.shape[0]
        dropped = torch.rand(count, generator=generator, device=device) < self.options.caption_dropout
        hidden = torch.rand(count, generator=generator, device=device) < self.options.context_dropout
        if batch.given is not None:
            if bool(batch.given[:, 1:].any()):
                raise ValueError("the batch gives other frames than the first; vlfm can be given the first frame alone")
            hidden = ~batch.given[:, 0]
        text, length = drop_captions(batch, dropped)
        context, _ = curve(coefficients, torch.zeros(count, 1, device=device))  # (B, 1, C, h, w)
        shown = ~hidden[:, None]  # (B, 1)
        return Conditioning(
            text=text,
            text_length=length,
            clip_start=batch.clip_start.float(),
            named=(~dropped).float(),
            log_duration=batch.duration.log().float(),
            context=context * shown[:, :, None, None, None],
            context_given=shown,
        )

    @torch.no_grad()
    def sample(self, backbone: nn.Module, request: Request) -> Trajectory:
        """Integrate the flow from noise; the trajectory is read at any time of the clip.

        Guidance acts on the warm-up alone: on the clip it would scale motion. With a given first frame the flow starts
        on the clip, at r = 0.

        Raises:
            ValueError: guidance without the empty caption, or other frames given than the first.
        """
        settings, first_frame, noise = request.settings, request.first_frame(), request.noise()
        guidance, unconditional = settings.guidance, request.unconditional
        if guidance != 1.0 and unconditional is None:
            raise ValueError(f"guidance is {guidance}, so the empty caption's conditioning must be given")
        told = with_first_frame(request.conditioning, first_frame)
        untold = None if unconditional is None else with_first_frame(unconditional, first_frame)
        grid = torch.linspace(0, 1, settings.steps + 1, dtype=torch.float64)
        if first_frame is None and self.path.start < 0:
            before = torch.linspace(self.path.start, 0, settings.warmup_steps + 1, dtype=torch.float64)[:-1]
            grid = torch.cat([before, grid])

        def predict(latents: Tensor, flow_time: float) -> tuple[Tensor, Tensor]:
            return self.predict(backbone, latents, flow_time, told, untold, guidance if flow_time < 0 else 1.0)

        trajectory = solve(
            self.path,
            predict,
            noise,
            grid,
            method=settings.solver,
            reanchor=settings.reanchor,
            start_mean=first_frame,
        )
        # The printed path's network learns no clean mean at its noisy times; it is read as the paper does.
        return dataclasses.replace(trajectory, source="state" if self.options.path == "paper" else "mean")

    def predict(
        self,
        backbone: nn.Module,
        latents: Tensor,
        flow_time: float,
        told: Conditioning,
        untold: Conditioning | None = None,
        guidance: float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """m and m' (B, C, h, w), float32, of latents that all have one flow time, in the units of the data.

        Guidance other than 1 asks for `untold`, the empty caption's conditioning, too.
        """
        time = torch.full((latents.shape[0], 1), flow_time, device=latents.device)

        def heads(given: Conditioning) -> tuple[Tensor, Tensor]:
            found = backbone(latents[:, None], time, given)
            return found["mean"][:, 0].float(), found["derivative"][:, 0].float()

        mean, slope = heads(told)
        if guidance != 1.0:
            assert untold is not None
            free, free_slope = heads(untold)
            mean, slope = free + guidance * (mean - free), free_slope + guidance * (slope - free_slope)
        return mean * self.mean_scale, slope * self.derivative_scale


def with_first_frame(given: Conditioning, first_frame: Tensor | None) -> Conditioning:
    """The conditioning with the first frame (B, C, h, w) as its context; unchanged where there is none."""
    if first_frame is None:
        return given
    context = first_frame[:, None]
    return dataclasses.replace(given, context=context, context_given=torch.ones_like(given.context_given))


def curve(coefficients: Tensor, flow_time: Tensor) -> tuple[Tensor, Tensor]:
    """m(r) and m'(r), per unit of r, of clips (B, order, C, h, w) at (B, K) times in [0, 1]: each (B, K, C, h, w)."""
    order = coefficients.shape[1]
    flat = coefficients.flatten(2)
    shape = (*flow_time.shape, *coefficients.shape[2:])
    return (
        torch.bmm(basis_torch(flow_time, order).to(flat.dtype), flat).view(shape),
        torch.bmm(derivative_torch(flow_time, order).to(flat.dtype), flat).view(shape),
    )


def curve_scales(clips: Sequence[Clip], order: int, most: int = 4096) -> tuple[float, float]:
    """Root mean squares of m(r) and m'(r) over r in [0, 1] and over the clips (`most` of them, evenly spread).

    Exact for each clip: the basis is orthonormal, so the mean square of a curve is the sum of its squared coefficients,
    and Gauss-Legendre quadrature of the derivative is exact for polynomials.
    """
    chosen = np.unique(np.linspace(0, len(clips) - 1, min(len(clips), most)).astype(int))
    nodes, weights = np.polynomial.legendre.leggauss(order + 1)
    at = torch.from_numpy((nodes + 1) / 2)
    gram = torch.from_numpy(weights / 2)
    slopes = derivative_torch(at, order)  # (nodes, order)
    gram_matrix = (slopes.T * gram) @ slopes  # (order, order): integral of g'_n g'_m
    values = torch.zeros(2, dtype=torch.float64)
    for index in chosen:
        flat = torch.from_numpy(clips[int(index)].members["coefficients"].astype(np.float64)).flatten(1)
        energy = flat @ flat.T / flat.shape[1]
        values += torch.stack([energy.trace(), (gram_matrix * energy).sum()])
    mean, derivative = (values / len(chosen)).sqrt().tolist()
    return max(mean, 1e-6), max(derivative, 1e-6)
