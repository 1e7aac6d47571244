"""Flowception's training: the states it draws, its losses against a slow reference, and what minimises them."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.backbones.attention import count_pairs
from model.flow.times import TIME_LAWS
from model.methods.base import Batch
from model.methods.context import ContextOptions, draw_context
from model.methods.draws import Draws
from model.methods.flowception import Flowception, FlowceptionOptions, State
from model.methods.insertion import hazard
from tests.model.methods.growth import NO_CONTEXT, SHAPE, backbone, batch, flowception
from tests.reference import insertion as slow

LENGTHS = [9, 5, 7, 9, 6, 8]
EVERY = {"context_first": 0.2, "context_start": 0.2, "context_ends": 0.2, "context_any": 0.2}


class Noted(torch.nn.Module):
    """Answers with numbers of its own, and notes what it is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: dict[str, Any] = {}

    def forward(self, latents: torch.Tensor, flow_time: torch.Tensor, told: Any, **more: Any) -> Any:
        generator = torch.Generator().manual_seed(12)
        velocity = torch.randn(latents.shape, generator=generator, dtype=latents.dtype)
        rate = torch.randn(flow_time.shape, generator=generator, dtype=latents.dtype)
        self.asked = {
            "latents": latents,
            "time": 1 + 4 * flow_time,
            "told": told,
            "rate": rate,
            "velocity": velocity,
            **more,
        }
        return {"velocity": velocity, "log_rate": rate}


def kept_state(method: Flowception, monkeypatch: pytest.MonkeyPatch) -> list[State]:
    states: list[State] = []
    draw = Flowception.draw_state

    def noted(*args: Any) -> State:
        states.append(draw(*args))
        return states[-1]

    monkeypatch.setattr(Flowception, "draw_state", noted)
    return states


@pytest.mark.parametrize(
    "options", [{}, {"reduction": "clip"}, {"weighting": "elbo"}, {"scheduler": "power", "snr_shift": 3.0}]
)
def test_the_loss_is_that_of_loops(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    method = flowception(5, scale=1.3, insertion_weight=0.7, context_noise=0.0, **EVERY, **options)
    clips, network, states = batch(LENGTHS).to("cpu", torch.float64), Noted(), kept_state(method, monkeypatch)
    found = method.loss(network, clips, Draws(4, len(LENGTHS), dtype=torch.float64))
    state = states[0]
    valid = clips.part("valid")
    tau = torch.where(valid, state.growth.tau, math.nan).numpy()
    # The noise that was drawn can be read off what the network saw.
    clean, given, noise = clips.part("latents") / 1.3, state.growth.tau == 2.0, torch.zeros(clips.part("latents").shape)
    noise = noise.double()
    time = network.asked["time"].double()
    for b in range(len(LENGTHS)):
        for row, i in enumerate(state.growth.visible[b].nonzero().flatten().tolist()):
            if state.growth.active[b, i]:
                t = time[b, row]
                noise[b, i] = (network.asked["latents"][b, row] - t * clean[b, i]) / (1 - t)
            elif given[b, i]:
                torch.testing.assert_close(network.asked["latents"][b, row], clean[b, i])
    counts = network.asked["valid"].sum(1).tolist()
    weights = None
    if method.options.weighting == "elbo":
        weights = hazard(method.scheduler, state.clock.clamp(max=1)).clamp(max=100).tolist()
    velocity, insertion = slow.losses(
        clean.flatten(2).numpy(), noise.flatten(2).numpy(), tau, given.numpy(),
        [v[:n].flatten(1).numpy() for v, n in zip(network.asked["velocity"], counts, strict=True)],
        [r[:n].numpy() for r, n in zip(network.asked["rate"], counts, strict=True)],
        by_clip=method.options.reduction == "clip", weights=weights,
    )  # fmt: skip
    assert float(found["velocity"]) == pytest.approx(velocity, rel=1e-9)
    assert float(found["insertion"]) == pytest.approx(insertion, rel=1e-9)
    assert float(found["loss"]) == pytest.approx(velocity + 0.7 * insertion, rel=1e-9)
    counted = ~found["place"].isnan()
    assert torch.equal(counted, state.alignment.of(state.growth.active))
    assert float(found["errors"][counted].mean()) == pytest.approx(velocity, rel=1e-9) or options == {
        "reduction": "clip"
    }
    assert bool(((found["place"][counted] >= -1) & (found["place"][counted] < 0)).all())


def test_what_the_network_sees_is_the_visible_frames_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    method = flowception(5, **EVERY)
    clips, network, states = batch(LENGTHS), Noted(), kept_state(method, monkeypatch)
    method.loss(network, clips, Draws(1, len(LENGTHS)))
    visible = states[0].growth.visible
    assert network.asked["valid"].sum(1).tolist() == visible.sum(1).tolist()
    torch.testing.assert_close(network.asked["frame_time"][0] * 32, torch.arange(max(LENGTHS)).float())
    for b in range(len(LENGTHS)):
        times = states[0].growth.time[b][visible[b]]
        torch.testing.assert_close(network.asked["time"][b, : len(times)], times)
    told = network.asked["told"]
    assert told.start_given.tolist() == [0.0] * len(LENGTHS)
    assert told.log_duration.tolist() == [0.0] * len(LENGTHS), "the duration would tell the length"


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=6),
    st.integers(1, 4),
    st.sampled_from(TIME_LAWS),
    st.integers(0, 999),
)
def test_every_state_has_something_to_learn(lengths: list[int], start_frames: int, law: str, seed: int) -> None:
    """tau_max leaves no draw without an active frame; with given ones there may be none yet, but then some to come."""
    for options in (NO_CONTEXT, EVERY):
        method = flowception(9, start_frames=start_frames, time_law=law, **options)
        clips, draws = batch(lengths), Draws(seed, len(lengths))
        valid = clips.part("valid")
        context = draw_context(method.options, clips, clips.part("latents"), valid, draws)
        assert not (context.given & ~valid).any()
        assert not (context.told & ~context.given).any()
        state = method.draw_state(valid, context.given, draws)
        active, deleted = state.growth.active.any(1), state.growth.deleted.any(1)
        assert bool((active | deleted).all())
        if options is NO_CONTEXT:
            assert bool(active.all())
        assert bool(state.growth.visible[:, 0].all())
        assert bool((state.growth.visible | ~context.given).all())
        assert not (context.given & state.growth.active).any()
        inserted = torch.where(valid, state.clock[:, None] - state.growth.tau, 9.0)
        fewest = torch.minimum(valid.sum(1), torch.tensor(start_frames))
        if options is NO_CONTEXT:
            assert bool(((inserted.abs() < 1e-6).sum(1) >= fewest).all())


def test_the_printed_law_of_the_clock_leaves_nothing_active_in_half_of_its_draws() -> None:
    """Printed: tau_g ~ lognorm(0, 1) tau_max."""
    share = torch.randn(4000, generator=torch.Generator().manual_seed(1)).exp()
    assert float((share >= 1).float().mean()) == pytest.approx(0.5, abs=0.03)


def test_given_frames_alone_are_a_state_of_training() -> None:
    """A sampler with given frames begins there. Redrawn until a frame is active, as in the authors' program, such a
    state would never be seen."""
    method = flowception(8, context_ends=1.0)
    clips = batch([8] * 200)
    valid = clips.part("valid")
    context = draw_context(method.options, clips, clips.part("latents"), valid, Draws(1, 200))
    state = method.draw_state(valid, context.given, Draws(1, 200))
    alone = ~state.growth.active.any(1)
    assert 5 < int(alone.sum()) < 100
    assert bool(state.growth.deleted[alone].any(1).all())


def test_each_task_gives_its_frames_and_some_are_hidden_from_the_channels() -> None:
    clips = batch([9] * 400)
    valid, latents = clips.part("valid"), clips.part("latents")

    def masks(**options: float) -> torch.Tensor:
        return draw_context(ContextOptions(**{**NO_CONTEXT, **options}), clips, latents, valid, Draws(1, 400)).given

    first = masks(context_first=1.0)
    assert bool(first[:, 0].all())
    assert int(first.sum()) == 400
    start = masks(context_start=1.0)
    assert sorted(set(start.sum(1).tolist())) == [1, 2, 3, 4, 5]
    assert bool((start.long().diff(dim=1) <= 0).all())
    ends = masks(context_ends=1.0)
    assert bool((ends[:, 0] & ends[:, -1]).all())
    assert sorted(set(ends.sum(1).tolist())) == [2, 3, 4]
    some = masks(context_any=1.0)
    assert bool((some.sum(1) < 9).all())
    assert 0.35 < float(some.float().mean()) < 0.5, "half of the frames, but of no clip all"
    assert float(masks(context_first=0.3, context_ends=0.2).any(1).float().mean()) == pytest.approx(0.5, abs=0.07)
    assert not masks().any()

    options = ContextOptions(**{**NO_CONTEXT, "context_ends": 1.0}, context_dropout=0.2, context_noise=0.0)
    context = draw_context(options, clips, latents, valid, Draws(2, 400))
    hidden = (~context.told & context.given).sum(1) == context.given.sum(1)
    assert float(hidden.float().mean()) == pytest.approx(0.2, abs=0.06)
    assert torch.equal(context.frames, latents)
    noisy = draw_context(
        dataclasses.replace(options, context_ends=0.0, context_first=1.0, context_noise=0.1),
        clips,
        latents,
        valid,
        Draws(2, 400),
    )
    moved = noisy.frames[:, 0] - 0.9 * latents[:, 0]
    assert float(moved.std()) == pytest.approx(0.1, abs=0.01)
    assert torch.equal(noisy.frames[:, 1:], latents[:, 1:])


def test_the_batch_says_which_frames_are_given() -> None:
    clips = batch([4, 6])
    mask = torch.zeros(2, 6, dtype=torch.bool)
    mask[:, 2:] = True
    network = Noted()
    flowception(6, context_dropout=0.0).loss(network, dataclasses.replace(clips, given=mask), Draws(0, 2))
    latents, told = clips.part("latents"), network.asked["told"]
    assert bool(told.context_given.any(1).all())
    for b, frames in ((0, [2, 3]), (1, [2, 3, 4, 5])):
        torch.testing.assert_close(told.context[b][told.context_given[b]], latents[b, frames])


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("reduction", ["batch", "clip"])
def test_the_loss_of_several_processes_is_that_of_one(world: int, reduction: str) -> None:
    """Processes pad to other lengths and average over other frames; the draws and the means are those of the batch."""
    method, network, clips = flowception(9, reduction=reduction, **EVERY), backbone(), batch(LENGTHS)
    whole = method.loss(network, clips, Draws(7, 6))
    sums: list[torch.Tensor] = []

    def total(value: torch.Tensor) -> torch.Tensor:
        sums.append(value)
        return value

    for rank in range(world):  # what each process adds to a mean over the batch
        method.loss(network, clips.every(world, rank), Draws(7, 6, rank, world, total=total))
    calls = len(sums) // world
    totals = [sum(sums[k::calls]) for k in range(calls)]
    parts = []
    for rank in range(world):
        left = list(totals)
        part = _without_padding(clips.every(world, rank))
        parts.append(method.loss(network, part, Draws(7, 6, rank, world, total=lambda _, left=left: left.pop(0))))
    for name in ("loss", "velocity", "insertion"):
        torch.testing.assert_close(sum(part[name] for part in parts) / world, whole[name], rtol=1e-5, atol=1e-5)


def _without_padding(clips: Batch) -> Batch:
    most = int(clips.part("valid").sum(1).max())
    return dataclasses.replace(clips, latents=clips.part("latents")[:, :most], valid=clips.part("valid")[:, :most])


def test_the_tabular_minimiser_of_the_insertion_loss_is_the_mean_pending_count() -> None:
    """With one frame at the start, n - m frames are still to come in the m slots, all alike: (n - m) / m each."""
    frames, clips = 6, 3000

    class Table(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rate = torch.nn.Parameter(torch.zeros(frames + 1))

        def forward(self, latents: torch.Tensor, flow_time: torch.Tensor, told: Any, **more: Any) -> Any:
            # Known at the first frame, which came at 0: whether anything can still come.
            growing = flow_time[:, 0] < -1e-6
            row = torch.where(growing, more["valid"].sum(1), 0)
            return {"velocity": torch.zeros_like(latents), "log_rate": self.rate[row][:, None].expand(flow_time.shape)}

    method, table, data = flowception(frames, start_frames=1), Table(), batch([frames] * clips, shape=(1, 1, 1))
    optimizer = torch.optim.LBFGS(table.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = method.loss(table, data, Draws(2, clips))["loss"]
        loss.backward()
        return loss

    optimizer.step(closure)
    found = table.rate.detach().exp()[1:frames].tolist()
    wanted = [(frames - m) / m for m in range(1, frames)]
    print([f"{a:.3f}/{b:.3f}" for a, b in zip(found, wanted, strict=True)])
    assert found == pytest.approx(wanted, rel=0.05)
    assert float(table.rate.detach()[frames]) < -3, "nothing is to come where all frames are there"


def test_a_new_frames_first_velocity_is_the_pending_frames_mean_less_its_noise() -> None:
    """Two clips of three frames, known by their first one at its time: the closed form with the clips' posterior."""
    films = torch.tensor([[-1.0, 0.5, 2.0], [1.0, -2.0, -1.0]])
    count = 120_000
    latents = films.repeat(count // 2, 1)[..., None, None, None]
    data = dataclasses.replace(batch([3] * 2), latents=latents, valid=torch.ones(count, 3, dtype=torch.bool))
    data = dataclasses.replace(
        data, clip_ids=("",) * count, text=torch.zeros(count, 1, 1), text_length=torch.ones(count, dtype=torch.long),
        empty_text=torch.zeros(1, 1), clip_start=torch.zeros(count), duration=torch.ones(count),
    )  # fmt: skip
    bins = torch.linspace(-1.2, 1.2, 5)

    class Table(torch.nn.Module):
        """E[X_1] of a frame that has just come beside the first one, by what the first one looks like."""

        def __init__(self) -> None:
            super().__init__()
            self.mean = torch.nn.Parameter(torch.zeros(len(bins) + 1, dtype=torch.float64))
            self.seen: tuple[torch.Tensor, ...] = ()

        def forward(self, latents: torch.Tensor, flow_time: torch.Tensor, told: Any, **more: Any) -> Any:
            time, x = 1 + 4 * flow_time, latents[..., 0, 0, 0]
            fresh = (more["valid"].sum(1) == 2) & (time[:, 1] < 0.05) & (time[:, 0] > 0.3) & (time[:, 0] < 0.7)
            box = torch.bucketize(x[:, 0].contiguous(), bins.double())
            self.seen = (fresh, box, x[:, 0], time[:, 0])
            velocity = torch.zeros_like(latents)
            velocity[fresh, 1, 0, 0, 0] = (self.mean[box] - x[:, 1])[fresh] / (1 - time[:, 1])[fresh]
            return {"velocity": velocity, "log_rate": torch.zeros_like(flow_time)}

    method, table, data64 = flowception(3, start_frames=1), Table(), data.to("cpu", torch.float64)

    def gradient() -> torch.Tensor:
        (found,) = torch.autograd.grad(
            method.loss(table, data64, Draws(6, count, dtype=torch.float64))["loss"], table.mean
        )
        return found

    at_0 = gradient()
    with torch.no_grad():
        table.mean += 1
    slope = gradient() - at_0  # the loss is quadratic, each entry on its own
    minimiser = -at_0 / slope.clamp(min=1e-30)

    fresh, box, x, t = (value.detach() for value in table.seen)
    # Closed form: the clip's posterior given its first frame at its time, and the mean of the frames still to come.
    density = torch.stack([torch.exp(-((x - t * film[0]) ** 2) / (2 * (1 - t) ** 2)) for film in films.double()])
    posterior = density / density.sum(0)
    pending = (posterior * films.double()[:, 1:].mean(1)[:, None]).sum(0)
    compared = []
    for number in range(len(bins) + 1):
        inside = fresh & (box == number)
        if int(inside.sum()) > 150:
            wanted, spread = float(pending[inside].mean()), 2.0 / math.sqrt(int(inside.sum()))
            print(f"{float(minimiser[number]):.3f} / {wanted:.3f}")
            assert float(minimiser[number]) == pytest.approx(wanted, abs=4 * spread)
            compared.append(wanted)
    assert len(compared) >= 4
    assert compared[0] - compared[-1] > 1.0, "it is not one mean for all: the state tells the clip"


@pytest.mark.parametrize(("law", "wanted"), [("uniform", 2 / 3), ("logit_normal", 0.74)])
def test_counted_cost_of_training(law: str, wanted: float) -> None:
    """In units of (n L)^2: the paper's 1/3 forgets that all frames are visible for tau_g in [1, 2]."""
    frames, clips = 60, 128
    method = flowception(frames, start_frames=1, time_law=law)
    network = backbone(rates=False, channels=1, height=1, width_latent=1, width=8, depth=1)

    class Rated(torch.nn.Module):
        def forward(self, *asked: Any, **more: Any) -> Any:
            return network(*asked, **more) | {"log_rate": torch.zeros(asked[1].shape)}

    with count_pairs(network) as count, torch.no_grad():
        method.loss(Rated(), batch([frames] * clips, shape=(1, 1, 1)), Draws(1, clips))
    found = count.total() / (clips * frames**2)
    print(f"{law}: {found:.3f}")
    assert found == pytest.approx(wanted, abs=0.03)


def test_finished_frames_are_keys_in_training_where_they_are_in_sampling() -> None:
    network = Noted()
    flowception(9, finished="keys", **EVERY).loss(network, batch([9] * 40), Draws(3, 40))
    assert torch.equal(network.asked["finished"], network.asked["valid"] & (network.asked["time"] >= 1))
    assert network.asked["finished"].any()
    flowception(9).loss(network, batch([9] * 4), Draws(3, 4))
    assert "finished" not in network.asked


def test_figures_are_measured_and_short_clips_named() -> None:
    @dataclasses.dataclass
    class Stored:
        members: dict[str, Any]

    rng = np.random.default_rng(0)
    clips = [Stored({"latents": (3 * rng.standard_normal((n, *SHAPE))).astype(np.float16)}) for n in (4, 2, 6)]
    figures = Flowception.prepare(clips, {})
    assert figures["latent_scale"] == pytest.approx(3, rel=0.2)
    assert (figures["shortest"], figures["longest"]) == (2.0, 6.0)
    with pytest.raises(ValueError, match=r"a clip has 2 frames, fewer.*--set start_frames=2.*shots.min_frames"):
        Flowception.build(FlowceptionOptions(), figures, {})
    assert Flowception.build(FlowceptionOptions(start_frames=2), figures, {}).longest == 6


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"scheduler": "cubic"}, "scheduler is 'cubic'; it must be linear, power or delayed"),
        ({"start_frames": 0}, "start_frames is 0"),
        ({"weighting": "all"}, "weighting is 'all'; it must be none or elbo"),
        ({"reduction": "sum"}, "reduction is 'sum'"),
        ({"time_law": "lognorm"}, "time_law is 'lognorm'"),
        ({"snr_shift": 0.0}, "snr_shift is 0.0"),
        ({"context_any": 1.2}, "context_any is 1.2"),
        ({"context_any": 0.6, "context_first": 0.6}, "add up to"),
        ({"finished": "cached"}, "finished is 'cached'; it must be attend or keys"),
        ({"insertion_weight": -1.0}, "insertion_weight is -1.0"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        FlowceptionOptions(**options)
