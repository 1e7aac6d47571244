"""The growing sampler: how many frames come, when, and what each of its settings does."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from model.backbones.attention import count_pairs
from model.methods.base import Request
from model.methods.chunks import Chunks, Window, blended, cut, owned
from model.methods.draws import Draws
from model.methods.flowception import Flowception
from model.methods.growing import Canvas, GrowthSampling, Learned, Sampler, local_time
from model.methods.insertion import Delayed, Linear, Power, Scheduler, hazard
from model.methods.orders import planned_order
from model.methods.sequences import Chance, FrameSequences
from tests.bench import long_videos
from tests.model.methods.growth import SHAPE, Oracle, backbone, batch, flowception, request

DOT = (1, 1, 1)


def grown(
    length: int, clips: int, begins: int = 1, last_step: bool = True, oracle: Oracle | None = None, **options: Any
) -> tuple[Canvas, Oracle]:
    """Clips of `length` frames, grown by the oracle."""
    chosen = {
        name: options.pop(name) for name in ("scheduler", "scheduler_power", "scheduler_delay") if name in options
    }
    method = flowception(length, start_frames=begins, **chosen)
    asked = request(GrowthSampling(**{"max_frames": 10 * length, **options}), clips, shape=DOT)
    oracle, chance = oracle or Oracle(length, begins), Chance(asked)
    canvas = Canvas.started(*method.given_frames(asked), chance, begins, open_end=False)
    learned = Learned(asked.settings, method.scheduler, chance, last_step)
    canvas, _ = Sampler(method, oracle, asked, chance).grow(canvas, learned, [10 * length] * clips)
    return canvas, oracle


@pytest.mark.parametrize(("length", "clips", "skipped", "poisson"), [(20, 150, 19.6, 20.5), (145, 40, 142.5, 148.6)])
def test_exact_rates_give_clips_of_their_length(length: int, clips: int, skipped: float, poisson: float) -> None:
    """Bernoulli insertion with the last step: n. Beside it the authors' code, which skips that step, and Poisson's."""
    found, errors = {}, {}
    for name, last, kind in (
        ("bernoulli", True, "bernoulli"),
        ("skipped", False, "bernoulli"),
        ("poisson", True, "poisson"),
    ):
        canvas, _ = grown(length, clips, last_step=last, insertion=kind)
        counts = canvas.valid.sum(1).double()
        found[name], errors[name] = float(counts.mean()), float(counts.std()) / clips**0.5
    print({name: f"{found[name]:.2f} +- {errors[name]:.2f}" for name in found})
    assert abs(found["bernoulli"] - length) <= 0.1
    assert abs(found["skipped"] - skipped) < 3 * errors["skipped"] + 0.1 * (length - skipped)
    assert abs(found["poisson"] - poisson) < 3 * errors["poisson"] + 0.1 * (poisson - length)
    assert found["skipped"] < length - 0.3
    assert found["poisson"] > length + 0.3


@pytest.mark.parametrize(
    ("scheduler", "chosen"),
    [
        (Linear(), {}),
        (Power(2.0), {"scheduler": "power"}),
        (Delayed(0.2), {"scheduler": "delayed"}),
    ],
    ids=["linear", "power", "delayed"],
)
def test_insertion_times_of_samples_follow_kappa(scheduler: Scheduler, chosen: dict[str, Any]) -> None:
    canvas, _ = grown(12, 150, steps=50, **chosen)
    times = canvas.inserted[canvas.valid & (canvas.inserted > 0)].double()
    # A frame of the step that ends at t came somewhere in it: its place in the law is uniform between both ends.
    before, after = (scheduler.kappa((times - back).clamp(0, 1)) for back in (0.02, 0.0))
    place = before + (after - before) * torch.rand(times.shape, generator=torch.Generator().manual_seed(2))
    assert len(place) == 150 * 11
    assert stats.kstest(place.numpy(), "uniform").pvalue > 0.01
    other = times if not isinstance(scheduler, Linear) else times**2
    assert stats.kstest(other.numpy(), "uniform").pvalue < 1e-6


def states_of_training(method: Flowception, clips: int, frames: int) -> tuple[np.ndarray, np.ndarray]:
    valid = torch.ones(clips, frames, dtype=torch.bool)
    state = method.draw_state(valid, torch.zeros_like(valid), Draws(3, clips, dtype=torch.float64))
    return state.clock.numpy(), np.where(state.growth.visible, state.growth.time, np.nan)


def states_of_sampling(frames: int, clips: int, begins: int, **chosen: Any) -> tuple[np.ndarray, np.ndarray]:
    """One state of each clip's growth, of a step drawn evenly until all its frames are clean."""
    steps = 60
    canvas, oracle = grown(frames, clips, begins, steps=steps, **chosen)
    generator = np.random.default_rng(1)
    ends = np.nanmax(np.where(canvas.valid, canvas.inserted, 0), axis=1) + 1
    clocks, times = [], np.full((clips, frames), np.nan)
    for clip in range(clips):
        # Anywhere in a step: training's clock is no multiple of it.
        at = generator.uniform() * ends[clip] * steps
        flow_time, valid = oracle.ages[int(at)]
        clocks.append(at / steps)
        shown = 1 + 4 * flow_time[clip, valid[clip]].double().numpy()
        # A frame of this step was inserted anywhere in the one before.
        times[clip, : len(shown)] = np.where(
            shown < 1, np.minimum(shown + generator.uniform(0, 1 / steps, len(shown)), 1), 1
        )
    return np.array(clocks), times


def summaries(clock: np.ndarray, times: np.ndarray) -> dict[str, np.ndarray]:
    """Figures of the joint law of the clock and the local times."""
    visible = (~np.isnan(times)).sum(1)
    ordered = np.sort(times, axis=1)  # NaN last
    return {
        "clock": clock,
        "visible": visible / times.shape[1] + 1e-6 * clock,  # no ties
        "mean": np.nanmean(times, axis=1),
        "youngest": ordered[:, 0],
        "spread": np.nanstd(times, axis=1),
        "lag": np.minimum(clock, 1) - np.nanmean(times, axis=1),
        "clock x mean": clock * np.nanmean(times, axis=1),
    }


def test_training_and_sampling_share_the_law_of_the_times_at_gamma_1_alone() -> None:
    """The paper says that a local schedule keeps the consistency with training; t = u^2 does not."""
    method = flowception(8, start_frames=2)
    trained = summaries(*states_of_training(method, 4000, 8))
    same = summaries(*states_of_sampling(8, 300, 2))
    other = summaries(*states_of_sampling(8, 300, 2, local_power=2.0))
    p = {name: stats.ks_2samp(trained[name], same[name]).pvalue for name in trained}
    q = {name: stats.ks_2samp(trained[name], other[name]).pvalue for name in trained}
    print("gamma 1:", {k: f"{v:.2g}" for k, v in p.items()}, "gamma 2:", {k: f"{v:.2g}" for k, v in q.items()})
    assert min(p.values()) > 0.01 / len(p)
    assert q["mean"] < 1e-6
    assert q["lag"] < 1e-6
    assert q["clock"] > 0.001, "the clock itself is the same: it is in u"


def test_rates_of_equations_31_and_32_insert_too_early() -> None:
    """Their minimiser is rho times the pending count, which Algorithm 1 multiplies with rho once more."""
    wrong = Oracle(12, 1, factor=lambda clock: hazard(Linear(), clock.clamp(max=0.99)))
    printed, _ = grown(12, 60, oracle=wrong)
    ours, _ = grown(12, 60)
    means = [float(c.inserted[c.valid & (c.inserted > 0)].mean()) for c in (ours, printed)]
    print("mean insertion time, of the law 0.51:", means)
    assert means[0] == pytest.approx(0.51, abs=0.03)
    assert means[1] < 0.45


def test_counted_cost_of_sampling() -> None:
    """In units of T (n L)^2 for T steps of a frame: clean frames attend, 4/3; as keys only, 5/6; the paper says 2/3."""
    frames, steps = 60, 50
    found = {}
    for finished in ("attend", "keys", "cached"):
        inner = backbone(rates=False, channels=1, height=1, width_latent=1, width=8, depth=1)
        method, oracle = flowception(frames, start_frames=1), Oracle(frames, 1, inner=inner)
        asked = request(GrowthSampling(steps=steps, max_frames=100), 1, shape=DOT)
        chance = Chance(asked)
        canvas = Canvas.started(*method.given_frames(asked), chance, 1, open_end=False)
        sampler = Sampler(method, oracle, asked, chance, finished=finished)
        with count_pairs(inner) as count:
            sampler.grow(canvas, Learned(asked.settings, method.scheduler, chance), [100])
        found[finished] = count.total() / (steps * frames**2)
    print({name: round(value, 3) for name, value in found.items()})
    assert found["attend"] == pytest.approx(4 / 3, abs=0.03)
    assert found["keys"] == pytest.approx(5 / 6, abs=0.03)
    assert found["cached"] == pytest.approx(5 / 6, abs=0.03)


# --- windows ---------------------------------------------------------------------------------------------------------


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 120), st.integers(1, 6), st.integers(2, 20), st.integers(0, 19))
def test_windows_cover_a_video_in_order_and_are_never_too_long(
    frames: int, chunks: int, chunk: int, overlap: int
) -> None:
    overlap = min(overlap, chunk - 1)
    windows = cut(frames, chunks, chunk, overlap)
    assert windows[0][0] == 0
    assert windows[-1][1] == frames
    for (start, end), (following, _) in pairwise(windows):
        assert start <= following <= end  # no frame is left out
    assert all(0 < end - start <= max(chunk, 1) for start, end in windows) or len(windows) == 1
    assert len(windows) > 1 or frames <= chunk or chunks == 1


def test_overlaps_are_blended_and_each_slot_has_one_window() -> None:
    windows = [Window(0, 0, 5), Window(0, 3, 8), Window(1, 0, 3)]
    values = torch.tensor([[1.0] * 5, [4.0] * 5, [7.0, 8.0, 9.0, 0, 0]])
    assert blended(windows, values, (2, 8)).tolist() == [
        pytest.approx([1, 1, 1, (2 * 1 + 1 * 4) / 3, (1 * 1 + 2 * 4) / 3, 4, 4, 4]),
        [7, 8, 9, 0, 0, 0, 0, 0],
    ]
    # The slot between frames 3 and 4 is as far inside both; that on the right of 4 is in the second alone.
    assert owned(windows, values, (2, 8)).tolist() == [[1, 1, 1, 1, 4, 4, 4, 4], [7, 8, 9, 0, 0, 0, 0, 0]]


def sample(settings: GrowthSampling, clips: int = 3, longest: int = 8, seed: int = 0, **more: Any) -> FrameSequences:
    """Of a network with random weights."""
    method = flowception(longest, scale=1.7, start_frames=2)
    return method.sample(backbone(seed=3), request(settings, clips, seed, **more))


def assert_same(one: FrameSequences, other: FrameSequences) -> None:
    assert [len(clip) for clip in one.clips] == [len(clip) for clip in other.clips]
    for a, b, s, t in zip(one.clips, other.clips, one.inserted, other.inserted, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(s, t)


@pytest.mark.parametrize("guidance", [1.0, 1.5])
def test_one_chunk_is_the_plain_sampler_bit_for_bit(guidance: float) -> None:
    plain = GrowthSampling(steps=6, max_frames=16, guidance=guidance)
    chunked = dataclasses.replace(plain, long="chunks", chunk=16, overlap=4)
    assert_same(sample(plain), sample(chunked))


def test_chunks_go_beyond_the_learned_length_in_windows_of_it() -> None:
    class Seen(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lengths: list[int] = []

        def forward(self, latents: torch.Tensor, flow_time: torch.Tensor, given: Any, **more: Any) -> Any:
            self.lengths.append(latents.shape[1])
            rate = torch.zeros(flow_time.shape)
            return {"velocity": torch.zeros_like(latents), "log_rate": rate}

    method, network = flowception(8, start_frames=2), Seen()
    made = method.sample(network, request(GrowthSampling(steps=8, long="chunks", max_frames=32, chunk=8, overlap=2)))
    assert max(network.lengths) <= 8
    assert all(20 <= len(clip) <= 32 for clip in made.clips)
    assert all(len(seams) == 4 for seams in made.seams)
    assert Chunks.of(32, 8, 2) == Chunks(5, 8, 2)
    assert Chunks.of(8, 8, 2).chunks == 1


def test_blocks_go_on_behind_the_frames_before_them() -> None:
    contexts: list[tuple[int, int]] = []

    class Noted(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = backbone(seed=3)

        def forward(self, latents: torch.Tensor, flow_time: torch.Tensor, told: Any, **more: Any) -> Any:
            contexts.append((int(told.context_given[0].sum()), latents.shape[1]))
            first = int(told.context_given[0].sum())
            if first > 1:  # passive frames stay together
                assert bool((flow_time[0, :first] == 0).all())
            return self.inner(latents, flow_time, told, **more)

    method = flowception(8, start_frames=2)
    made = method.sample(Noted(), request(GrowthSampling(steps=6, long="blocks", max_frames=20, chunk=8, overlap=3), 1))
    assert len(made.clips[0]) == 20
    assert made.full == [False], "so long it was to be"
    assert len(made.seams[0]) == len(set(made.seams[0])) >= 3
    assert all(0 < seam < 20 for seam in made.seams[0])
    assert {count for count, _ in contexts} == {0, 3}
    assert max(length for _, length in contexts) <= 8
    assert len(made.inserted[0]) == 20


def test_seams_are_measured_against_the_other_changes(capsys: pytest.CaptureFixture[str]) -> None:
    clip = torch.tensor([0.0, 1.0, 2.0, 5.0, 6.0])[:, None, None, None]
    assert long_videos.seam_ratios([clip, clip], [[3], []]) == [3.0]
    small = ["--steps", "2", "--width", "16", "--batch", "4", "--videos", "1", "--sampling-steps", "2"]
    assert long_videos.main(small) in (0, 1)
    told = capsys.readouterr().out
    assert "blocks" in told
    assert "chunks" in told


# --- given frames ----------------------------------------------------------------------------------------------------


def given_request(settings: GrowthSampling, counts: Sequence[int]) -> Request:
    frames = torch.randn(len(counts), max(counts), *SHAPE, generator=torch.Generator().manual_seed(8))
    mask = torch.arange(max(counts)) < torch.tensor(counts)[:, None]
    return request(settings, len(counts), frames=frames, given=mask)


@pytest.mark.parametrize("chosen", [{}, {"order": "random"}, {"long": "chunks", "max_frames": 30, "chunk": 8}])
def test_given_frames_come_back_unchanged_and_nothing_follows_the_last(chosen: dict[str, Any]) -> None:
    asked = given_request(GrowthSampling(steps=6, **chosen), [3, 1, 2])
    assert asked.frames is not None
    made = flowception(8, scale=1.7, start_frames=2).sample(backbone(seed=3), asked)
    for clip, inserted, known, count in zip(made.clips, made.inserted, asked.frames, [3, 1, 2], strict=True):
        places = inserted.isnan().nonzero().flatten().tolist()
        assert len(places) == count
        assert torch.equal(clip[places], known[:count])
        assert places[0] == 0
        assert count == 1 or places[-1] == len(clip) - 1
        assert len(clip) > count


def test_an_open_end_lets_frames_follow_the_last_given_one() -> None:
    made = flowception(8, start_frames=2).sample(
        backbone(seed=3), given_request(GrowthSampling(steps=6, open_end=True, max_frames=60), [2, 2])
    )
    assert any(not bool(inserted[-1].isnan()) for inserted in made.inserted)


def test_given_frames_keep_the_clock_running() -> None:
    """Algorithm 1 prints t_g = max(t), 1 at once with a given frame, and h_i = 0 in the insertion rate of given ones:
    nothing would ever follow."""
    printed_clock = float(local_time(GrowthSampling(), torch.tensor([2**62, 0]), 1.0).max())
    assert printed_clock == 1.0
    made = flowception(8, start_frames=1).sample(backbone(seed=3), given_request(GrowthSampling(steps=6), [1, 1]))
    assert all(len(clip) > 1 for clip in made.clips)


# --- settings --------------------------------------------------------------------------------------------------------


def test_a_clip_is_a_function_of_its_own_seed() -> None:
    both, alone = sample(GrowthSampling(steps=6), clips=3), sample(GrowthSampling(steps=6), clips=1, seed=0)
    assert torch.equal(both.inserted[0], alone.inserted[0])
    # Captions differ in `request` by their number alone; the first is the same.
    torch.testing.assert_close(both.clips[0], alone.clips[0], rtol=1e-4, atol=1e-5)
    again = sample(GrowthSampling(steps=6), clips=3)
    assert_same(both, again)
    assert len(both.clips[0]) != len(both.clips[1]) or not torch.equal(both.clips[0], both.clips[1])


def test_the_most_frames_are_kept_to_and_said() -> None:
    free, bound = sample(GrowthSampling(steps=6)), sample(GrowthSampling(steps=6, max_frames=5))
    assert free.full == [False] * 3
    assert max(len(clip) for clip in free.clips) > 5
    assert [len(clip) for clip in bound.clips] == [min(5, len(clip)) for clip in free.clips]
    assert bound.full == [len(clip) > 5 for clip in free.clips]


@pytest.mark.parametrize("order", ["random", "hierarchical", "left_to_right"])
def test_a_given_order_makes_clips_of_a_given_length(order: str) -> None:
    made = sample(GrowthSampling(steps=10, order=order, length=9), clips=4)
    assert [len(clip) for clip in made.clips] == [9] * 4
    for inserted in made.inserted:
        assert float(inserted[0]) == 0
        assert int((inserted == 0).sum()) == 2
        if order == "left_to_right":
            assert bool((inserted.diff() >= 0).all())
        if order == "hierarchical":
            assert float(inserted[-1]) == 0
            assert float(inserted[4]) == float(inserted[inserted > 0].min())


def test_orders_of_insertion() -> None:
    shares = torch.tensor([0.9, 0.1, 0.3, 0.2, 0.8])
    assert planned_order("left_to_right", 5, 2, [], shares) == ([0, 1], [2, 3, 4])
    assert planned_order("random", 5, 3, [], shares) == ([0, 1, 3], [2, 4])
    assert planned_order("hierarchical", 9, 1, [], shares) == ([0], [8, 4, 2, 6, 1, 3, 5, 7])
    assert planned_order("hierarchical", 5, 1, [0, 2, 4], shares) == ([0, 2, 4], [1, 3])
    assert planned_order("hierarchical", 1, 3, [], shares) == ([0], [])
    for order in ("random", "hierarchical", "left_to_right"):
        first, later = planned_order(order, 5, 2, [], shares)
        assert sorted(first + later) == list(range(5))


@pytest.mark.parametrize("local", [{}, {"local_power": 2.0}, {"local": "linear_quadratic"}])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_local_schedules_run_from_noise_to_clean_exactly(local: dict[str, Any], shift: float) -> None:
    chosen = GrowthSampling(steps=50, **local)
    times = local_time(chosen, torch.arange(60), shift)
    assert float(times[0]) == 0
    assert bool((times[50:] == 1).all())
    assert bool((times.diff()[:50] > 0).all())
    if shift == 1 and chosen.local == "linear_quadratic":
        torch.testing.assert_close(times[1], torch.tensor(0.001, dtype=torch.float64))
        assert float(times.diff().diff()[:49].max()) < 0.004  # no jump of speed between the halves
    if shift == 1 and chosen.local_power == 2.0:
        assert float(times[10]) == pytest.approx(0.04)


@pytest.mark.parametrize("local", [{}, {"local_power": 2.0}, {"local": "linear_quadratic"}])
def test_frames_end_where_the_velocity_leads_whenever_they_came(local: dict[str, Any]) -> None:
    """Along straight lines to one clean frame Euler's method is exact: h_i = min(h, 1 - t_i) in the state's update."""

    class Straight(torch.nn.Module):
        def forward(self, latents: torch.Tensor, flow_time: torch.Tensor, given: Any, **more: Any) -> Any:
            left = (-4 * flow_time).clamp(min=1e-9)[..., None, None, None]
            return {"velocity": (2.5 - latents) / left, "log_rate": torch.ones(flow_time.shape)}

    made = flowception(8, scale=2.0, start_frames=2).sample(Straight(), request(GrowthSampling(steps=7, **local)))
    for clip in made.clips:
        torch.testing.assert_close(clip, torch.full_like(clip, 5.0), rtol=1e-4, atol=1e-4)


def test_rate_guidance_scales_the_logarithm_and_costs_nothing_at_1() -> None:
    class Two(torch.nn.Module):
        """More frames with the caption than without."""

        def forward(self, latents: torch.Tensor, flow_time: torch.Tensor, told: Any, **more: Any) -> Any:
            captioned = torch.equal(told.text, asked.conditioning.text)
            rate = torch.full(flow_time.shape, -16.0)
            rate[:, 0] = 0.4 if captioned else -0.4
            return {"velocity": torch.zeros_like(latents), "log_rate": rate}

    lengths, calls = {}, {}
    for weight in (1.0, 2.0, 5.0):
        asked = request(GrowthSampling(steps=20, rate_guidance=weight, max_frames=400), clips=20)
        made = flowception(8, start_frames=2).sample(Two(), asked)
        lengths[weight], calls[weight] = np.mean([len(clip) for clip in made.clips]), made.network_calls
    print(lengths, calls)
    assert lengths[1.0] < lengths[2.0] < lengths[5.0]
    assert calls[1.0] == 40
    assert calls[2.0] == calls[5.0] == 80


def test_finished_frames_can_be_keys_or_cached() -> None:
    plain, keys, cached = (sample(GrowthSampling(steps=6, finished=kind)) for kind in ("attend", "keys", "cached"))
    # Insertions are over when the first frame is clean: what it does then changes the pictures, not the lengths.
    for other in (keys, cached):
        assert [len(clip) for clip in other.clips] == [len(clip) for clip in plain.clips]
        assert not torch.equal(other.clips[0], plain.clips[0])
    torch.testing.assert_close(cached.clips[0], plain.clips[0], rtol=0, atol=0.5)
    again = sample(GrowthSampling(steps=6, finished="cached", guidance=2.0))
    assert again.network_calls == 2 * cached.network_calls


def test_a_sample_is_read_at_times_as_any_other() -> None:
    made = sample(GrowthSampling(steps=4), clips=2)
    read = made.read([0.0, 0.5, 1.0])
    assert read.shape == (3, 2, *SHAPE)
    for index, clip in enumerate(made.clips):
        assert torch.equal(read[0, index], clip[0])
        assert torch.equal(read[1, index], clip[len(clip) // 2])
        assert torch.equal(read[2, index], clip[-1])


# --- bad input -------------------------------------------------------------------------------------------------------


class Broken(torch.nn.Module):
    def __init__(self, rate: float | None) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, latents: torch.Tensor, flow_time: torch.Tensor, given: Any, **more: Any) -> Any:
        found = {"velocity": torch.zeros_like(latents)}
        return found if self.rate is None else found | {"log_rate": torch.full(flow_time.shape, self.rate)}


@pytest.mark.parametrize(
    ("rate", "told"),
    [(float("nan"), "not finite at step 0 of 100.*--step"), (float("inf"), "not finite"), (None, "no insertion")],
)
def test_rates_that_are_no_rates_end_a_sample_with_the_remedy(rate: float | None, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        flowception(8).sample(Broken(rate), request(GrowthSampling()))


@pytest.mark.parametrize(
    ("chosen", "counts", "told"),
    [
        ({"max_frames": 2}, [3], "3 frames are given, but max_frames is 2.*--max-frames 3"),
        ({"max_frames": 2}, [1], "max_frames is 2, but a clip of this run begins with 3"),
        ({"order": "random", "length": 2}, [3], "3 frames are given for a length of 2"),
        ({"order": "random", "length": 9, "max_frames": 8}, [1], "length is 9, but max_frames is 8"),
        ({"long": "chunks", "max_frames": 40, "overlap": 8}, [1], "overlap is 8, but a chunk has 8 frames.*--chunk"),
        ({"long": "blocks", "max_frames": 40, "overlap": 0}, [1], "overlap is 0"),
        ({"long": "blocks", "max_frames": 40, "overlap": 4}, [2], "--open-end"),
        ({"long": "chunks", "max_frames": 40, "finished": "cached"}, [1], "--finished cached"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(chosen: dict[str, Any], counts: list[int], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        flowception(8).sample(backbone(), given_request(GrowthSampling(**chosen), counts))


@pytest.mark.parametrize(
    ("chosen", "told"),
    [
        ({"insertion": "gamma"}, "insertion is 'gamma'; it must be bernoulli or poisson"),
        ({"order": "sorted"}, "order is 'sorted'"),
        ({"finished": "gone"}, "finished is 'gone'"),
        ({"local_power": 0.0}, "local_power is 0.0"),
        ({"rate_guidance": float("nan")}, "rate_guidance is nan"),
        ({"max_frames": -1}, "max_frames is -1"),
        ({"long": "blocks"}, "--max-frames"),
        ({"long": "blocks", "max_frames": 9, "order": "random"}, "--order random"),
        ({"chunk": 8}, "--long"),
    ],
)
def test_settings_that_cannot_be_are_refused(chosen: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        GrowthSampling(**chosen)


def test_guidance_without_the_empty_caption_and_another_methods_settings_are_refused() -> None:
    asked = dataclasses.replace(request(GrowthSampling(rate_guidance=2.0)), unconditional=None)
    with pytest.raises(ValueError, match="empty caption"):
        flowception(8).sample(backbone(), asked)
    with pytest.raises(TypeError, match="takes GrowthSampling"):
        flowception(8).sample(backbone(), request(object()))
    assert batch([2]).clip_ids == ("0",)
