"""Video Latent Flow Matching: the flow that carries noise to a clip's first frame and then along the clip.

The clip is the curve m(r) of its HiPPO-LegS coefficients, r = t / T; the flow's path around it is an object of
model/flow/path.py. The network predicts m(max(r, 0)) and m'(max(r, 0)), and the path assembles the velocity from them
(arXiv 2502.00500, Theorem 4.1, on a path of our own: the printed one cannot be sampled between frames).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from model.backbones.conditioning import Conditioning
from model.flow.path import PaperPath, WarmupPath
from model.flow.solver import Trajectory, solve
from model.flow.times import TIME_LAWS, time_at
from model.methods.base import Batch, Clip, Request, SampleSettings, drop_captions
from model.methods.curves import curve, curve_scales
from model.methods.draws import Draws
from model.settings import ABOVE_0, AT_LEAST_0, AT_LEAST_1, SHARE, SHARE_BELOW_1, check_settings, one_of

END_SHARE, END_FROM = 0.06, 0.9
"""Share of the clip's training times that fall on its end, from END_FROM on, beside the even spread: the end has
neighbours on one side only. The beginning needs none, the warm-up trains it."""
ANCHORS: Mapping[str, int] = {"none": 0, "first": 1, "ends": 2}
"""What a state can be shown of its clip: how many frames, the first of them and the last."""
FIRST_GIVEN = 0.25
"""With several anchors, the share of the warm-up's states that are shown the first frame: for image to video the others
are generated from it."""


@dataclass(frozen=True)
class VLFMOptions:
    """What a training recipe chooses of VLFM."""

    path: str = "warmup"
    """Flow path: `warmup` (docs/method.md) or `paper` (as printed, for comparison)."""
    warmup: float = 0.25
    """Length of the noise-to-first-frame part, in units of the clip's duration."""
    sigma_end: float = 0.1
    """Standard deviation of the path at every time of the clip, in latents of unit variance."""
    anchor: str = "first"
    """What the network is shown of its own clip all along it, generated on the warm-up or given: `first`, its first
    frame; `ends`, its first and last, where the first leaves the motion open (twice the work); `none` leaves it to the
    state, which does not say where it is going (docs/method.md)."""
    anchor_noise: float = 0.1
    """Standard deviation of the noise on the anchor in training, in latents of unit variance: a predicted one is not
    exact."""
    anchor_dropout: float = 0.1
    """Rate at which a state of the clip is shown no anchor in training."""
    start_anywhere: float = 0.0
    """Share of the warm-up's states whose frame is from anywhere on the clip, not its first. Where windows are cut from
    films without regard to what they show, every frame is as good a first one: a few hundred clips then teach the
    warm-up thousands. Of `anchor=ends` it does nothing."""
    times_per_clip: int = 4
    """Flow times drawn for each clip of a step: one read of the clip serves them all."""
    warmup_share: float = 0.3
    """Share of the training times that fall on the warm-up, in (0, 1)."""
    warmup_law: str = "signal"
    """How the warm-up's times are drawn: `signal`, evenly over the logarithm of signal to noise, as the sampler's steps
    are; or by a law of model/flow/times.py on the straight line from noise to the frame: `uniform`, `logit_normal`,
    `mode`, `beta`."""
    least_signal: float = 0.1
    """Norm of the signal over the noise's along it from which on `signal` spreads the times, in training and sampling:
    at 1 two frames can just be told apart. What all frames share counts in that norm: where it is little, as in latents
    whose mean is near zero, 1 spends no time on noise."""
    warmup_focus: float = 0.0
    """Above 0 the power that draws even flow times of the warm-up towards the noise instead (`warmup_law=signal`)."""
    state_jitter: float = 0.3
    """How far along the clip (standard deviation, in flow time) a state may be from its time in training. Without it
    the network reads the time off the state, and a sample that once lags stays behind (docs/experiments.md)."""
    error_focus: float = 0.0
    """Exponent that weighs a state by its error relative to the others'. Above 0 it moves the minimiser: a mode of 10 %
    is sampled 21 % with 1 (docs/experiments.md)."""
    signal_weight: float = 0.0
    """How much more a state may count for its ratio S of signal to noise (of energies): its errors are weighed by
    1 + min(S, this). With 0 all count alike, and the noisiest, whose errors are the largest, rule the gradient."""
    derivative_weight: float = 0.1
    """Weight of the derivative's loss beside the mean's; each is in units of its own mean square over the data."""
    caption_dropout: float = 0.1
    """Rate at which the caption is replaced by the empty one, and clip_start dropped with it, for guidance."""
    clip_start_dropout: float = 0.9
    """Rate at which clip_start alone is dropped. Where it is always given it is a clip's name, and the network a
    look-up table; 1 leaves it out, where captions tell clips apart."""
    context_dropout: float = 0.75
    """With `anchor=none`, the rate at which the first frame is hidden all along; high, because most videos start from a
    prompt alone."""

    BEFORE: ClassVar[Mapping[str, Any]] = {"anchor": "none", "clip_start_dropout": 0.0}
    """Fields that older runs lack, as they were then."""

    def __post_init__(self) -> None:
        """Raises ValueError for a field that cannot be, with its name, its value and what it must be."""
        not_negative = (
            "anchor_noise",
            "warmup_focus",
            "state_jitter",
            "error_focus",
            "signal_weight",
            "derivative_weight",
        )
        shares = ("anchor_dropout", "start_anywhere", "caption_dropout", "clip_start_dropout", "context_dropout")
        rules = dict.fromkeys(not_negative, AT_LEAST_0) | dict.fromkeys(shares, SHARE)
        check_settings(
            self, {**rules, "times_per_clip": AT_LEAST_1, "warmup_share": SHARE_BELOW_1, "least_signal": ABOVE_0}
        )
        if self.anchor not in ANCHORS:
            raise ValueError(f"anchor is {self.anchor!r}; it must be one of {', '.join(ANCHORS)}")
        if self.path == "paper" and self.anchor != "none":
            raise ValueError("the printed path has no warm-up that could generate an anchor: --set anchor=none")
        check_settings(self, {"warmup_law": one_of("signal", *TIME_LAWS)})
        if self.warmup_law != "signal" and (self.warmup_focus > 0 or self.path == "paper"):
            other = "warmup_focus=0" if self.warmup_focus > 0 else "path=warmup"
            raise ValueError(f"warmup_law is {self.warmup_law!r}, which draws the warm-up's times: --set {other}")


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
    takes_first_frame: ClassVar[bool] = True
    rates: ClassVar[bool] = False
    frame_count: ClassVar[bool] = False
    sequences: ClassVar[bool] = False
    Sampling: ClassVar[type[SampleSettings]] = SampleSettings
    Options: ClassVar[type[VLFMOptions]] = VLFMOptions

    options: VLFMOptions
    """What the recipe chose."""
    path: WarmupPath | PaperPath
    """The flow's path."""
    mean_scale: float
    """Root mean square of m over the data and over r in [0, 1]."""
    derivative_scale: float
    """The same of m', per unit of flow time."""
    values: int = 1
    """Values d of a frame's latents."""

    @property
    def least_ratio(self) -> float:
        """Ratio of signal to noise from which on the warm-up's times are spread (WarmupPath.warmup_times)."""
        return self.options.least_signal / (self.mean_scale * math.sqrt(self.values))

    @property
    def states_per_clip(self) -> int:
        """Flow times drawn for each clip."""
        return self.options.times_per_clip

    @property
    def temporal(self) -> bool:
        """Whether a state has several frames."""
        return self.frames_of_a_state > 1

    @property
    def frames_of_a_state(self) -> int:
        """Frames A that the warm-up makes together: the anchors, or the clip's first frame alone."""
        return max(1, ANCHORS[self.options.anchor])

    @property
    def clip_start_dropout(self) -> float:
        """Rate at which clip_start was hidden in training."""
        return self.options.clip_start_dropout

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
        values = math.prod(clip_format["latent_shape"])
        return cls(options, path, figures["mean_scale"], figures["derivative_scale"], values)

    def loss(self, backbone: nn.Module, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        """The flow-matching loss of a batch and of each state: `loss`, and its parts `mean`, `derivative`, `velocity`.

        `mean` and `derivative` are relative mean squared errors; `velocity` is the error of the assembled velocity in
        latents per unit of flow time, squared: what the paper's equation calls the loss, for the record.
        """
        options, coefficients = self.options, batch.part("coefficients")
        device, count, times = coefficients.device, coefficients.shape[0], options.times_per_clip
        flow_time = self.draw_times(draws)  # (B, K)
        on_clip = (flow_time > 0)[:, :, None]  # (B, K, 1)
        # Each of the A frames of a state: on the warm-up the anchors, on the clip the one frame at its time.
        slots = self.slots(device)  # (A,) flow times
        start = slots.expand(count, times, -1)
        if options.start_anywhere > 0 and len(slots) == 1:
            start = torch.where(draws.rand(times, 1) < options.start_anywhere, draws.rand(times, 1), start)
        at = torch.where(on_clip, flow_time[:, :, None], start)  # (B, K, A)
        mean, derivative = self.frames(coefficients, at)  # (B, K, A, C, h, w)
        noise = draws.randn(*mean.shape[1:])
        noise = torch.where(on_clip[..., None, None, None], noise[:, :, :1], noise)
        wide = flow_time[:, :, None, None, None, None]
        shown = mean
        if options.state_jitter > 0:
            step = options.state_jitter * draws.randn(times, 1)
            shown, _ = self.frames(coefficients, torch.where(on_clip, (at + step).clamp(0, 1), at))
        centre, sigma = self.path.evaluate(wide, shown)
        latents = centre + sigma * noise

        given = self.conditioning(batch, flow_time, draws)
        asked_at = flow_time.reshape(-1, 1).expand(-1, len(slots))
        heads = self.ask(backbone, latents.flatten(0, 1), asked_at, given, batch.duration.repeat_interleave(times))
        predicted, slope = (head.unflatten(0, (count, times)) for head in heads)
        predicted, slope = predicted * self.mean_scale, slope * self.derivative_scale

        errors = (predicted - mean).square().mean(dim=(2, 3, 4, 5)) / self.mean_scale**2  # (B, K)
        slope_errors = (slope - derivative).square().mean(dim=(2, 3, 4, 5)) / self.derivative_scale**2  # (B, K)
        weights, focus = self.signal_weights(flow_time), self.focus(errors, draws)
        if self.path.start < 0:
            # Nothing reads a slope on the warm-up, where noise hides which clip it is of: half the gradient's noise.
            slope_errors = slope_errors * on_clip[:, :, 0]
        slope_loss = (slope_errors * weights).mean()
        with torch.no_grad():
            target = self.path.velocity(latents, wide, mean, derivative)
            velocity_loss = (self.path.velocity(latents, wide, predicted, slope) - target).square().mean()
        return {
            "loss": (errors * weights * focus).mean() + options.derivative_weight * slope_loss,
            "mean": errors.detach().mean(),
            "derivative": slope_errors.detach().mean(),
            "velocity": velocity_loss,
            "errors": (errors + options.derivative_weight * slope_errors).detach(),
            "place": torch.where(flow_time < 0, -flow_time / (self.path.start or -1.0), flow_time),
        }

    def signal_weights(self, flow_time: Tensor) -> Tensor:
        """Weights of the states (B, K) at these times, by `signal_weight`: 1 + min(S, signal_weight).

        They depend on the time alone, so they move no minimiser: the weight of Hang et al. 2023 ("Min-SNR", arXiv
        2303.09556) plus 1, without which the noisiest states would count for nothing.
        """
        if self.options.signal_weight == 0:
            return torch.ones_like(flow_time)
        signal, noise = self.path.evaluate(flow_time, torch.full_like(flow_time, self.mean_scale))
        return 1 + (signal / noise).square().clamp(max=self.options.signal_weight)

    def focus(self, errors: Tensor, draws: Draws) -> Tensor:
        """Weights of the states (B, K) of these errors, by `error_focus`; their mean over the whole batch is 1."""
        if self.options.error_focus == 0:
            return torch.ones_like(errors)
        weights = (errors.detach() / draws.mean(errors).clamp(min=1e-12)) ** self.options.error_focus
        return weights / draws.mean(weights).clamp(min=1e-12)

    def draw_times(self, draws: Draws) -> Tensor:
        """(B, K) flow times: stratified over the whole batch, `warmup_share` of them before 0."""
        even = draws.even(self.options.times_per_clip)
        share = self.options.warmup_share if self.path.start < 0 else 0.0
        early = self.early((even / max(share, 1e-9)).clamp(max=1))
        place = ((even - share) / (1 - share)).clamp(0, 1)
        spread, at_end = place / (1 - END_SHARE), 1 - (1 - END_FROM) * (1 - place) / END_SHARE
        late = torch.where(spread < 1, spread, at_end)
        return torch.where(even < share, early, late)

    def early(self, place: Tensor) -> Tensor:
        """Flow times of the warm-up, of the shape of `place` in [0, 1], from pure noise (0) to r = 0 (1)."""
        focus, law = self.options.warmup_focus, self.options.warmup_law
        if law != "signal" and isinstance(self.path, WarmupPath):
            return self.path.time_of(time_at(law, place.double())).to(place.dtype)
        if focus or not isinstance(self.path, WarmupPath):
            return self.path.start * (1 - place**focus)
        return self.path.warmup_times(place, self.least_ratio)

    def warmup_grid(self, steps: int) -> Tensor:
        """(steps + 1,) float64 flow times from pure noise to r = 0, even over the logarithm of signal to noise."""
        place = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
        # Runs of before spread them evenly over flow time, whatever the training's focus was.
        if self.options.warmup_focus or not isinstance(self.path, WarmupPath):
            return self.path.start * (1 - place)
        return self.path.warmup_times(place, self.least_ratio)

    def conditioning(self, batch: Batch, flow_time: Tensor, draws: Draws) -> Conditioning:
        """What the network is told of each state (B * K) in training, with captions and anchors dropped.

        flow_time: (B, K). A state of the clip is shown its anchors, with some noise; the warm-up, which makes them, is
        not. Captions stand once for the K states of a clip; the backbone reads them once then.
        """
        options, coefficients = self.options, batch.part("coefficients")
        device, (count, times) = coefficients.device, flow_time.shape
        dropped = draws.rand() < options.caption_dropout
        start_dropped = dropped | (draws.rand() < options.clip_start_dropout)
        slots = self.slots(device)
        frames, _ = self.frames(coefficients, slots.expand(count, times, -1))  # (B, K, A, C, h, w)
        if options.anchor == "none":
            shown = (draws.rand() >= options.context_dropout)[:, None].expand(count, times)
        else:
            shown = (flow_time > 0) & (draws.rand(times) >= options.anchor_dropout)
            frames = frames + options.anchor_noise * draws.randn(*frames.shape[1:])
        shown = shown[:, :, None].repeat(1, 1, len(slots))  # (B, K, A)
        if len(slots) > 1:
            shown[:, :, 0] |= (flow_time <= 0) & (draws.rand(times) < FIRST_GIVEN)
        if batch.given is not None:
            if bool(batch.given[:, 1:].any()):
                raise ValueError("the batch gives other frames than the first; vlfm can be given the first frame alone")
            if len(slots) > 1:
                raise ValueError(
                    "the batch gives the first frame; with anchor=ends the method draws itself what is given"
                )
            shown = batch.given[:, :1, None].expand(count, times, 1)
        text, length = drop_captions(batch, dropped)
        return Conditioning(
            text=text,
            text_length=length,
            clip_start=batch.clip_start.repeat_interleave(times),
            start_given=(~start_dropped).to(batch.clip_start.dtype).repeat_interleave(times),
            log_duration=batch.duration.log().repeat_interleave(times),
            context=(frames * shown[..., None, None, None]).flatten(0, 1),
            context_given=shown.flatten(0, 1),
        )

    @torch.no_grad()
    def sample(self, backbone: nn.Module, request: Request) -> Trajectory:
        """Integrate the flow from noise; the trajectory is read at any time of the clip.

        Guidance acts on the warm-up alone: on the clip it would scale motion. With a given first frame the flow starts
        on the clip, at r = 0.

        Raises:
            ValueError: guidance without the empty caption, or other frames given than the first.
        """
        settings, first_frame = request.settings, request.first_frame()
        guidance, unconditional = settings.guidance, request.unconditional
        if guidance != 1.0 and unconditional is None:
            raise ValueError(f"guidance is {guidance}, so the empty caption's conditioning must be given")

        def integrate(
            grid: Tensor, noise: Tensor, shown: Tensor | None, mean: Tensor | None = None, state: Tensor | None = None
        ) -> Trajectory:
            """Along `grid` from noise, or from m or x at its first point, with anchors `shown` (B, up to A, ...)."""
            told = self.shown(request.conditioning, shown)
            untold = None if unconditional is None else self.shown(unconditional, shown)

            def predict(latents: Tensor, flow_time: float) -> tuple[Tensor, Tensor]:
                return self.predict(backbone, latents, flow_time, told, untold, guidance if flow_time < 0 else 1.0)

            return solve(
                self.path, predict, noise, grid, method=settings.solver, reanchor=settings.reanchor,
                start_mean=mean, start_state=state,
            )  # fmt: skip

        noise = request.noises(self.frames_of_a_state)  # (B, A, C, h, w)
        on_clip = torch.linspace(0, 1, settings.steps + 1, dtype=torch.float64)
        warmup = self.warmup_grid(settings.warmup_steps)
        given = None if first_frame is None else first_frame[:, None]
        if self.path.start == 0 or (given is not None and not self.temporal):
            trajectory = integrate(on_clip, noise[:, 0], given, mean=first_frame)
        elif self.options.anchor == "none":
            trajectory = integrate(torch.cat([warmup[:-1], on_clip]), noise[:, 0], None)
        else:
            before = integrate(warmup, noise, given)
            anchors, state = before.means[-1].clone(), before.states[-1][:, 0]
            if first_frame is not None:
                anchors[:, 0] = first_frame
            after = integrate(on_clip, noise[:, 0], anchors, mean=first_frame, state=state)
            trajectory = after.after(before.of_frame(0))
        if first_frame is not None:  # what is given needs no prediction
            trajectory.means[int(torch.searchsorted(trajectory.grid, 0.0))] = first_frame
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
        """m and m', float32, of latents that all have one flow time, in the units of the data.

        latents: (B, A, C, h, w) on the warm-up, or (B, C, h, w). Guidance other than 1 asks for `untold`, the empty
        caption's conditioning, too.
        """
        single = latents.ndim == 4
        states = latents[:, None].expand(-1, self.frames_of_a_state, -1, -1, -1) if single else latents
        time = torch.full(states.shape[:2], flow_time, device=latents.device)

        def heads(given: Conditioning) -> tuple[Tensor, Tensor]:
            mean, slope = self.ask(backbone, states, time, given, given.log_duration.exp())
            return (mean.mean(1), slope.mean(1)) if single else (mean, slope)

        mean, slope = heads(told)
        if guidance != 1.0:
            assert untold is not None
            free, free_slope = heads(untold)
            mean, slope = free + guidance * (mean - free), free_slope + guidance * (slope - free_slope)
        return mean * self.mean_scale, slope * self.derivative_scale

    def ask(
        self, backbone: nn.Module, states: Tensor, flow_time: Tensor, given: Conditioning, duration: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The heads `mean` and `derivative` of states (N, A, C, h, w) at (N, A), in units of their scales.

        They are float32, also under autocast; float64 from a network that answers so.
        duration: (N,) seconds of the clips. Not read off `given`, whose logarithm would round what training has.
        """
        placed = {"frame_time": self.slots(states.device) * duration[:, None]} if self.temporal else {}
        found = backbone(states, flow_time, given, **placed)
        kind = torch.promote_types(found["mean"].dtype, torch.float32)
        return found["mean"].to(kind), found["derivative"].to(kind)

    def slots(self, device: torch.device) -> Tensor:
        """(A,) flow times of the frames that a state has: the anchors', or r = 0."""
        return torch.linspace(0, 1, self.frames_of_a_state, device=device)

    @staticmethod
    def frames(coefficients: Tensor, flow_time: Tensor) -> tuple[Tensor, Tensor]:
        """m and m' (B, K, A, C, h, w) at times (B, K, A)."""
        mean, derivative = curve(coefficients, flow_time.flatten(1))
        return mean.unflatten(1, flow_time.shape[1:]), derivative.unflatten(1, flow_time.shape[1:])

    def shown(self, given: Conditioning, frames: Tensor | None) -> Conditioning:
        """The conditioning with the first anchors (B, up to A, C, h, w) as its context, where there are any."""
        if frames is None and not self.temporal:
            return given
        context = given.context.new_zeros((len(given.context), self.frames_of_a_state, *given.context.shape[2:]))
        flags = torch.zeros(context.shape[:2], dtype=torch.bool, device=context.device)
        if frames is not None:
            context[:, : frames.shape[1]], flags[:, : frames.shape[1]] = frames, True
        return dataclasses.replace(given, context=context, context_given=flags)
