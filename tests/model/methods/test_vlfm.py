"""VLFM's sampler with a network that knows the clip: the clip comes out, at any time, at a fixed number of calls."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from model import legs
from model.backbones.conditioning import Conditioning
from model.flow.path import PaperPath, WarmupPath
from model.flow.solver import Trajectory
from model.methods.base import Batch, Request, SampleSettings
from model.methods.curves import curve
from model.methods.draws import Draws
from model.methods.vlfm import VLFM, VLFMOptions
from model.tasks import image_to_video, interpolation

ORDER, SHAPE = 8, (3, 4, 4)
MEAN_SCALE, DERIVATIVE_SCALE = 0.7, 2.5


def clips() -> torch.Tensor:
    """(2, ORDER, *SHAPE): coefficients that fall as a smooth clip's do."""
    fall = 1 / (1 + torch.arange(ORDER, dtype=torch.float64)) ** 2
    draw = torch.randn(2, ORDER, *SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return draw * fall.view(1, -1, 1, 1, 1)


def noise() -> torch.Tensor:
    return torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


class Oracle(torch.nn.Module):
    """Knows the curve; notes what it was asked. A `push` is added to what it says of the named clip."""

    def __init__(self, push: float = 0.0) -> None:
        super().__init__()
        self.push = push
        self.asked: list[tuple[float, bool]] = []
        self.seen: list[torch.Tensor] = []

    def forward(self, latents: torch.Tensor, time: torch.Tensor, given: Conditioning) -> dict[str, Any]:
        assert latents.shape == (2, 1, *SHAPE)
        assert time.shape == (2, 1)
        named = bool(given.start_given.all())
        self.asked.append((float(time[0, 0]), named))
        self.seen.append(latents[:, 0])
        mean, slope = curve(clips(), time.double().clamp(min=0))
        return {
            "mean": (mean + self.push * named) / MEAN_SCALE,
            "derivative": (slope + self.push * named) / DERIVATIVE_SCALE,
        }


class Silent(torch.nn.Module):
    """Answers zeros."""

    def forward(self, latents: torch.Tensor, time: torch.Tensor, given: Conditioning) -> dict[str, Any]:
        return {"mean": torch.zeros_like(latents), "derivative": torch.zeros_like(latents)}


def given(named: float = 1.0) -> Conditioning:
    none = torch.zeros(2)
    return Conditioning(
        text=torch.zeros(2, 1, 4), text_length=torch.ones(2, dtype=torch.long), clip_start=none,
        start_given=torch.full((2,), named), log_duration=none, context=torch.zeros(2, 1, *SHAPE),
        context_given=torch.zeros(2, 1, dtype=torch.bool),
    )  # fmt: skip


METHOD = VLFM(VLFMOptions(), WarmupPath(), MEAN_SCALE, DERIVATIVE_SCALE)


class Asked(Request):
    """A request with the noise of these tests, in float64."""

    def noises(self, frames: int) -> torch.Tensor:
        return noise()[:, None]


def sampled(
    oracle: Oracle, first_frame: torch.Tensor | None = None, unconditional: Conditioning | None = None, **settings: Any
) -> Trajectory:
    frames: dict[str, Any] = {}
    if first_frame is not None:
        given_frames = torch.ones(2, 1, dtype=torch.bool)
        frames = {"frames": first_frame[:, None], "frame_time": torch.zeros(1), "given": given_frames}
    request = Asked(given(), (0, 1), SHAPE, SampleSettings(**settings), unconditional, **frames)
    return METHOD.sample(oracle, request)


TIMES = torch.tensor([0.0, 0.013, 0.25, 1 / 3, 0.77, 0.999, 1.0], dtype=torch.float64)


@pytest.mark.parametrize("solver", ["euler", "heun", "rk4"])
def test_a_network_that_knows_the_clip_gives_the_clip_at_any_time(solver: str) -> None:
    read = sampled(Oracle(), steps=64, solver=solver).read(TIMES)
    truth = torch.stack([legs.evaluate(clip, TIMES.numpy(), 1.0) for clip in clips()], dim=1)
    assert read.shape == (7, 2, *SHAPE)
    # Between 65 grid points a polynomial of degree 7 differs from its Hermite interpolant by less than this.
    assert float((read - truth).abs().max()) < 2e-5
    at_grid = sampled(Oracle(), steps=64, solver=solver).read([0.0, 0.25, 1.0])
    truth = torch.stack([legs.evaluate(clip, [0.0, 0.25, 1.0], 1.0) for clip in clips()], dim=1)
    assert float((at_grid - truth).abs().max()) < 1e-6


def test_the_integrated_state_arrives_there_too() -> None:
    """Not only the answers at the grid: the state that the flow carries from noise is the clip plus its noise."""
    errors = []
    for steps in (16, 64):
        path = sampled(Oracle(), steps=steps, warmup_steps=steps, solver="heun")
        truth = torch.stack([legs.evaluate(clip, [0.0, 0.5, 1.0], 1.0) for clip in clips()], dim=1)
        errors.append(float((path.read([0.0, 0.5, 1.0], "state") - truth).abs().max()))
    assert errors[1] < 2e-2
    assert errors[1] < errors[0] / 4


def test_calls_do_not_depend_on_the_rate_of_reading() -> None:
    oracle = Oracle()
    trajectory = sampled(oracle, steps=10, warmup_steps=4)
    assert trajectory.network_calls == len(oracle.asked) == 16, "at r = 0 before and with the anchor"
    for rate in (8, 12, 240):
        assert len(trajectory.read(torch.arange(rate) / rate)) == rate
    assert len(oracle.asked) == 16
    assert sampled(Oracle(), steps=10, warmup_steps=4, solver="heun").network_calls == 30


def test_guidance_acts_on_the_warmup_alone() -> None:
    oracle = Oracle(push=1.0)
    guided = sampled(oracle, steps=8, warmup_steps=4, guidance=3.0, unconditional=given(named=0.0))
    free = [time for time, named in oracle.asked if not named]
    assert free == pytest.approx(METHOD.warmup_grid(4)[:-1].tolist())
    plain = sampled(Oracle(push=1.0), steps=8, warmup_steps=4)
    early = guided.grid < 0
    # free + 3 (named - free) = truth + 3 where the named answer alone is truth + 1.
    torch.testing.assert_close(guided.means[early], plain.means[early] + 2.0)
    torch.testing.assert_close(guided.means[~early], plain.means[~early])
    with pytest.raises(ValueError, match=r"guidance is 3.0, so the empty caption's conditioning must be given"):
        sampled(Oracle(), guidance=3.0)


def test_guidance_of_one_asks_once() -> None:
    oracle = Oracle()
    sampled(oracle, steps=4, warmup_steps=2, unconditional=given(named=0.0))
    assert len(oracle.asked) == 8
    assert all(named for _, named in oracle.asked)


@pytest.mark.parametrize("reanchor", [True, False])
def test_reanchoring_sets_the_state_back_on_the_answer(reanchor: bool) -> None:
    """A coarse Euler step leaves the curve; with re-anchoring the next one starts on it again."""
    oracle, path = Oracle(), METHOD.path
    sampled(oracle, steps=4, warmup_steps=2, reanchor=reanchor)
    truth, slope = curve(clips(), torch.linspace(0, 1, 5, dtype=torch.float64).expand(2, 5))
    expected = truth[:, :-1] + slope[:, :-1] / 4 + path.sigma_end * noise()[:, None]  # one step from the curve
    summed = truth[:, :1] + (slope[:, :-1] / 4).cumsum(1) + path.sigma_end * noise()[:, None]
    arrived = torch.stack(oracle.seen[-4:], dim=1)
    drift = arrived - (expected if reanchor else summed)
    assert float((expected - summed)[:, 1:].abs().max()) > 0.1
    # Without it the warm-up's own error stays in the state, the same at every step; answers are float32.
    left = torch.zeros_like(drift) if reanchor else drift[:, :1].expand_as(drift)
    torch.testing.assert_close(drift, left, rtol=0, atol=1e-5)


def test_a_first_frame_starts_the_flow_on_the_clip() -> None:
    oracle = Oracle()
    first = curve(clips(), torch.zeros(2, 1, dtype=torch.float64))[0][:, 0]
    trajectory = sampled(oracle, first_frame=first, steps=64)
    assert oracle.asked[0][0] == 0.0
    torch.testing.assert_close(oracle.seen[0], first + METHOD.path.sigma_end * noise())
    assert trajectory.network_calls == 65
    truth = torch.stack([legs.evaluate(clip, TIMES.numpy(), 1.0) for clip in clips()], dim=1)
    assert float((trajectory.read(TIMES) - truth).abs().max()) < 2e-5


def test_the_printed_path_can_be_asked_for_and_nothing_else() -> None:
    clip = {"frames_observed_max": 16, "duration": 2.0, "latent_shape": SHAPE}
    figures = {"mean_scale": 1.0, "derivative_scale": 1.0}
    assert isinstance(VLFM.build(VLFMOptions(), figures, clip).path, WarmupPath)
    paper = VLFM.build(VLFMOptions(path="paper", anchor="none"), figures, clip)
    assert paper.path == PaperPath(frames=16, duration=2.0)
    with pytest.raises(ValueError, match="path is 'straight'; it must be warmup or paper: --set path=warmup"):
        VLFM.build(VLFMOptions(path="straight"), figures, clip)
    with pytest.raises(ValueError, match="no warm-up that could generate an anchor: --set anchor=none"):
        VLFMOptions(path="paper")
    with pytest.raises(ValueError, match="anchor is 'last'; it must be one of none, first"):
        VLFMOptions(anchor="last")


def test_tasks_that_it_cannot_do_are_refused() -> None:
    """The first frame of every clip, or none: other masks wait for methods that take them."""
    clean = torch.zeros(2, 2, *SHAPE)
    for times, mask in (([0.0, 2.0], [[True, True]] * 2), ([0.0, 2.0], [[True, False]] * 2)):
        request = Asked(given(), (0, 1), SHAPE, frames=clean, frame_time=torch.tensor(times), given=torch.tensor(mask))
        with pytest.raises(ValueError, match=r"frames at \[0.0, 2.0\] s are given; this method takes the first frame"):
            METHOD.sample(Oracle(), request)
    partly = Asked(
        given(), (0, 1), SHAPE, frames=clean[:, :1], frame_time=torch.zeros(1), given=torch.tensor([[True], [False]])
    )
    with pytest.raises(ValueError, match="of every clip, or none"):
        METHOD.sample(Oracle(), partly)


def test_a_batch_may_say_which_clips_are_given_their_first_frame() -> None:
    valid = torch.ones(2, 4, dtype=torch.bool)
    batch = Batch(
        clip_ids=("a", "b"), text=torch.zeros(2, 1, 4), text_length=torch.ones(2, dtype=torch.long),
        empty_text=torch.zeros(1, 4), clip_start=torch.zeros(2), duration=torch.ones(2), coefficients=clips().float(),
        given=image_to_video(valid) & torch.tensor([[True], [False]]),
    )  # fmt: skip
    times = torch.tensor([[-0.1, 0.5], [-0.1, 0.5]])
    told = METHOD.conditioning(batch, times, Draws(0, 2))
    assert told.context_given.tolist() == [[True], [True], [False], [False]]
    assert bool(told.context[:2].flatten(1).any(1).all())
    assert not told.context[2:].any()
    with pytest.raises(ValueError, match="vlfm can be given the first frame alone"):
        METHOD.conditioning(replace(batch, given=interpolation(valid)), times, Draws(0, 2))


def test_the_curve_and_its_slope_are_those_of_the_clip() -> None:
    times = torch.tensor([[0.1, 0.6, 0.9]] * 2, dtype=torch.float64)
    mean, slope = curve(clips(), times)
    for k in range(2):
        torch.testing.assert_close(mean[k], legs.evaluate(clips()[k], times[k].numpy(), 1.0), atol=1e-9, rtol=1e-9)
        torch.testing.assert_close(slope[k], legs.derivative(clips()[k], times[k].numpy(), 1.0), atol=1e-9, rtol=1e-9)
    step = 1e-6
    ahead, behind = curve(clips(), times + step)[0], curve(clips(), times - step)[0]
    torch.testing.assert_close(slope, (ahead - behind) / (2 * step), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("most", [0.0, 9.0])
def test_states_count_by_their_signal_up_to_a_limit(most: float) -> None:
    """The weight is 1 + min(S, limit) with S = (M a / sigma)^2, and the loss is the errors' mean with these weights."""
    method = replace(METHOD, options=VLFMOptions(signal_weight=most, derivative_weight=0.5, anchor_noise=0.0))
    times = torch.tensor([[-0.25, -0.125, -0.05], [0.0, 0.5, 1.0]])
    q = (times + 0.25).clamp(max=0.25) / 0.25
    rise = q**2 * (3 - 2 * q)
    ratio = (MEAN_SCALE * rise / (1 - 0.9 * rise)) ** 2
    weights = method.signal_weights(times)
    torch.testing.assert_close(weights, 1 + ratio.clamp(max=most))
    assert float(weights[0, 0]) == 1
    assert bool((weights[1] == 1 + most).all())
    losses = method.loss(Silent(), batch_of(2), Draws(0, 2))
    place = losses["place"]
    weights = method.signal_weights(torch.where(place < 0, 0.25 * place, place))
    torch.testing.assert_close(losses["loss"], (losses["errors"] * weights).mean())


def test_no_slope_is_asked_of_the_warm_up() -> None:
    """With all states on it but a few, the derivative counts there alone where it is read: on the clip."""
    method = replace(METHOD, options=VLFMOptions(warmup_share=0.9, times_per_clip=10, anchor_noise=0.0))
    losses = method.loss(Silent(), batch_of(2), Draws(0, 2))
    on_clip = losses["place"] > 0
    assert 0 < int(on_clip.sum()) < 5
    slopes = curve(batch_of(2).part("coefficients"), losses["place"].clamp(min=0))[1]
    errors = slopes.square().mean((2, 3, 4)) / DERIVATIVE_SCALE**2
    torch.testing.assert_close(losses["derivative"], (errors * on_clip).mean())


def test_times_begin_where_the_signal_has_the_size_that_is_asked_for() -> None:
    """`least_signal` is the norm of the signal over the noise's along it, at the first step out of pure noise."""
    for least in (0.1, 1.5):
        method = VLFM(VLFMOptions(least_signal=least), WarmupPath(0.25, 0.1), MEAN_SCALE, DERIVATIVE_SCALE, 48)
        grid = method.warmup_grid(1000)
        mean, sigma = method.path.evaluate(grid, torch.full_like(grid, MEAN_SCALE))
        norm = math.sqrt(48) * mean / sigma
        assert float(norm[0]) == 0
        steps = (norm[500:-1] / least + 1).log().diff()
        torch.testing.assert_close(steps, steps[:1].expand(len(steps)), rtol=1e-3, atol=0)
    with pytest.raises(ValueError, match="least_signal is 0"):
        VLFMOptions(least_signal=0.0)


# --- anchors ---


def batch_of(count: int, **changes: Any) -> Batch:
    values = {
        "clip_ids": ("",) * count, "text": torch.zeros(count, 1, 4), "text_length": torch.ones(count, dtype=torch.long),
        "empty_text": torch.zeros(1, 4), "clip_start": torch.full((count,), 3.0), "duration": torch.full((count,), 2.0),
        "coefficients": clips().float().repeat(count // 2, 1, 1, 1, 1),
    }  # fmt: skip
    return Batch(**{**values, **changes})


def test_in_training_the_clip_is_shown_its_first_frame_and_the_warm_up_is_not() -> None:
    method = replace(METHOD, options=VLFMOptions(anchor_noise=0.0, anchor_dropout=0.2, clip_start_dropout=0.7))
    times = torch.tensor([-0.2, 0.0, 0.01, 1.0]).expand(2000, 4)
    told = method.conditioning(batch_of(2000), times, Draws(0, 2000))
    shown = told.context_given.view(2000, 4).float().mean(0)
    assert shown[:2].tolist() == [0.0, 0.0]
    assert shown[2:].tolist() == pytest.approx([0.8, 0.8], abs=0.03)
    first = curve(clips().float(), torch.zeros(2, 1))[0][:, 0]
    context = told.context.view(1000, 2, 4, *SHAPE)
    for clip in range(2):
        seen = context[:, clip, 2:].flatten(0, 1)
        seen = seen[seen.flatten(1).any(1)]
        torch.testing.assert_close(seen, first[clip].expand_as(seen))
    # The caption is dropped at 0.1, and clip_start with it or alone.
    assert float(told.start_given.mean()) == pytest.approx(0.9 * 0.3, abs=0.03)
    noisy = replace(method, options=replace(method.options, anchor_noise=0.5, anchor_dropout=0.0))
    told = noisy.conditioning(batch_of(2000), times[:, 2:], Draws(0, 2000))
    off = told.context.view(1000, 2, 2, *SHAPE) - first[:, None]
    assert float(off.std()) == pytest.approx(0.5, rel=0.02)


class Watching(Oracle):
    """Notes the anchors that it was shown."""

    def __init__(self) -> None:
        super().__init__()
        self.anchors: list[torch.Tensor | None] = []

    def forward(self, latents: torch.Tensor, time: torch.Tensor, given: Conditioning) -> dict[str, Any]:
        self.anchors.append(given.context[:, 0] if bool(given.context_given.any()) else None)
        return super().forward(latents, time, given)


def test_in_sampling_the_anchor_is_the_frame_that_the_warm_up_made() -> None:
    watching = Watching()
    trajectory = sampled(watching, steps=4, warmup_steps=3)
    assert [anchor is None for anchor in watching.anchors] == [True] * 4 + [False] * 5
    first = curve(clips(), torch.zeros(2, 1, dtype=torch.float64))[0][:, 0]
    for anchor in watching.anchors[4:]:
        torch.testing.assert_close(anchor, first.to(anchor))
    assert trajectory.grid.tolist() == [*METHOD.warmup_grid(3).tolist()[:-1], 0.0, 0.25, 0.5, 0.75, 1.0]


def test_a_given_first_frame_is_the_anchor_and_is_read_as_it_is() -> None:
    watching, picture = Watching(), torch.randn(2, *SHAPE, dtype=torch.float64)
    trajectory = sampled(watching, first_frame=picture, steps=4)
    assert len(watching.anchors) == 5
    for anchor in watching.anchors:
        torch.testing.assert_close(anchor, picture.to(anchor))
    torch.testing.assert_close(trajectory.read([0.0])[0], picture)


class Ends(torch.nn.Module):
    """Knows both ends of each clip on the warm-up; on the clip it reads the curve off nothing but r."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[float, list[bool]]] = []

    def forward(
        self, latents: torch.Tensor, time: torch.Tensor, given: Conditioning, frame_time: torch.Tensor
    ) -> dict[str, Any]:
        assert latents.shape == (2, 2, *SHAPE)
        assert frame_time.tolist() == [[0.0, 1.0]] * 2
        self.asked.append((float(time[0, 0]), given.context_given.expand(2, 2)[0].tolist()))
        on_clip = given.context_given.expand(2, 2).all(1, keepdim=True)
        at = torch.where(on_clip, time, torch.tensor([0.0, 1.0])).double()
        mean, slope = curve(clips(), at)
        return {"mean": mean / MEAN_SCALE, "derivative": slope / DERIVATIVE_SCALE}


def test_first_and_last_frame_are_generated_together() -> None:
    method = VLFM(VLFMOptions(anchor="ends"), WarmupPath(), MEAN_SCALE, DERIVATIVE_SCALE)
    assert method.temporal

    class Two(Request):
        def noises(self, frames: int) -> torch.Tensor:
            assert frames == 2
            return torch.stack([noise(), -noise()], 1)

    oracle = Ends()
    read = method.sample(oracle, Two(given(), (0, 1), SHAPE, SampleSettings(steps=64, warmup_steps=4))).read(TIMES)
    truth = torch.stack([legs.evaluate(clip, TIMES.numpy(), 1.0) for clip in clips()], dim=1)
    assert float((read - truth).abs().max()) < 2e-5
    assert [shown for time, shown in oracle.asked if time < 0] == [[False, False]] * 4
    assert all(shown == [True, True] for time, shown in oracle.asked[5:])
    # With a first frame, the last is generated beside it.
    oracle, picture = Ends(), torch.randn(2, *SHAPE, dtype=torch.float64)
    frames = {"frames": picture[:, None], "frame_time": torch.zeros(1), "given": torch.ones(2, 1, dtype=torch.bool)}
    settings = SampleSettings(steps=4, warmup_steps=2)
    method.sample(oracle, Two(given(), (0, 1), SHAPE, settings, **frames))
    assert [shown for _, shown in oracle.asked[:3]] == [[True, False]] * 3
    assert all(shown == [True, True] for _, shown in oracle.asked[3:])


def test_ends_are_trained_on_both_frames_at_once() -> None:
    method = VLFM(VLFMOptions(anchor="ends", state_jitter=0.0), WarmupPath(), MEAN_SCALE, DERIVATIVE_SCALE)

    class Knows(torch.nn.Module):
        def forward(
            self, latents: torch.Tensor, time: torch.Tensor, given: Conditioning, frame_time: torch.Tensor
        ) -> Any:
            assert frame_time.tolist() == [[0.0, 2.0]] * len(time)
            clip = torch.arange(len(time)) // method.states_per_clip % 2
            mean, slope = curve(clips().float()[clip], torch.where(time > 0, time, torch.tensor([0.0, 1.0])))
            return {"mean": mean / MEAN_SCALE, "derivative": slope / DERIVATIVE_SCALE}

    losses = method.loss(Knows(), batch_of(8), Draws(1, 8))
    assert float(losses["loss"]) < 1e-9
    assert float(losses["velocity"]) < 1e-6
