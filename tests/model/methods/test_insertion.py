"""The mathematics of insertion against slow references, property by property."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from model.methods.insertion import (
    Delayed,
    Growth,
    Linear,
    Power,
    Scheduler,
    clock_end,
    grown,
    hazard,
    pending_counts,
    places_after,
    shifted,
    step_probability,
    strip,
)
from tests.reference import insertion as slow

SCHEDULERS = [Linear(), Power(2.0), Power(0.5), Delayed(0.3)]
FRAMES = st.lists(st.lists(st.sampled_from(["visible", "deleted", "padding"]), min_size=1, max_size=9), max_size=5)


def numbers(count: int) -> torch.Tensor:
    return torch.linspace(0, 1, count, dtype=torch.float64)


@pytest.mark.parametrize("scheduler", SCHEDULERS, ids=str)
def test_a_scheduler_is_a_distribution_with_its_inverse_density_and_hazard(scheduler: Scheduler) -> None:
    time = numbers(1001)
    kappa = scheduler.kappa(time)
    assert float(kappa[0]) == 0
    assert float(kappa[-1]) == pytest.approx(1)
    assert bool((kappa.diff() >= 0).all())
    share = numbers(101)[1:]
    torch.testing.assert_close(scheduler.kappa(scheduler.inverse(share)), share)
    # The inverse is the earliest such time: a little before it, kappa is below the share.
    assert bool((scheduler.kappa((scheduler.inverse(share) - 1e-6).clamp(min=0)) < share).all())
    inside = torch.tensor([0.1, 0.45, 0.7, 0.95], dtype=torch.float64)
    step = 1e-6
    slope = (scheduler.kappa(inside + step) - scheduler.kappa(inside - step)) / (2 * step)
    torch.testing.assert_close(scheduler.derivative(inside), slope, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(hazard(scheduler, inside), slope / (1 - scheduler.kappa(inside)), rtol=1e-5, atol=1e-8)
    assert float(hazard(scheduler, torch.tensor(1.0))) == 0


@pytest.mark.parametrize("scheduler", SCHEDULERS, ids=str)
@pytest.mark.parametrize("steps", [1, 3, 49, 50])
def test_step_probabilities_multiply_to_the_law_and_the_last_one_is_1(scheduler: Scheduler, steps: int) -> None:
    left = 1.0
    for k in range(steps):
        chance = step_probability(scheduler, k / steps, 1 / steps)
        now, later = scheduler.kappa(torch.tensor([k, k + 1], dtype=torch.float64) / steps).tolist()
        if k < steps - 1:
            assert chance == pytest.approx(slow.probability(now, later))
        left *= 1 - chance
        assert left == pytest.approx(1 - later, abs=1e-12)
    assert chance == 1
    small = 1e-7
    assert step_probability(scheduler, 0.6, small) / small == pytest.approx(
        float(hazard(scheduler, torch.tensor(0.6, dtype=torch.float64))), rel=1e-5
    )


def test_the_printed_hazard_is_infinite_at_the_last_step() -> None:
    """Algorithm 1 takes it at t_g after the step, where kappa is 1; a probability of h rho exceeds 1 a step before."""
    step, last = 0.02, torch.tensor(1.0, dtype=torch.float64)
    law = Linear()
    assert math.isinf(float(law.derivative(last) / (1 - law.kappa(last))))
    assert step * float(hazard(Power(2.0), last - step)) < 1 < step * float(hazard(Power(4.0), last - step / 2))
    assert step_probability(law, float(last) - step, step) == 1


@pytest.mark.parametrize("scheduler", SCHEDULERS, ids=str)
def test_insertion_times_drawn_for_training_follow_kappa(scheduler: Scheduler) -> None:
    times = scheduler.inverse(torch.rand(4000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)).numpy()
    law = lambda t: scheduler.kappa(torch.as_tensor(t)).numpy()  # noqa: E731
    assert stats.kstest(times, law).pvalue > 0.01
    other = Linear() if not isinstance(scheduler, Linear) else Power(2.0)
    assert stats.kstest(times, lambda t: other.kappa(torch.as_tensor(t)).numpy()).pvalue < 1e-6


@settings(max_examples=60, deadline=None)
@given(FRAMES)
def test_pending_counts_and_strip_are_those_of_loops(clips: list[list[str]]) -> None:
    if not clips:
        return
    width = max(map(len, clips))
    rows = [clip + ["padding"] * (width - len(clip)) for clip in clips]
    visible = torch.tensor([[kind == "visible" for kind in row] for row in rows])
    deleted = torch.tensor([[kind == "deleted" for kind in row] for row in rows])
    counts = pending_counts(visible, deleted)
    assert counts.tolist() == [slow.pending(v, d) for v, d in zip(visible.tolist(), deleted.tolist(), strict=True)]
    values = torch.arange(visible.numel(), dtype=torch.float32).view(visible.shape) + 1
    alignment = strip(visible)
    kept = alignment.of(values)
    assert kept.shape[1] == max(1, int(visible.sum(1).max()))
    for row, valid, value, keep in zip(kept, alignment.valid, values, visible, strict=True):
        wanted = slow.stripped(value.tolist(), keep.tolist())
        assert row.tolist() == wanted + [0.0] * (len(row) - len(wanted))
        assert valid.tolist() == [True] * len(wanted) + [False] * (len(row) - len(wanted))
    wide = alignment.of(values[..., None].expand(-1, -1, 3))
    assert torch.equal(wide, kept[..., None].expand(-1, -1, 3))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=8), st.integers(0, 3))
def test_frames_move_right_by_what_is_inserted_before_them(counts: list[int], padding: int) -> None:
    valid = torch.tensor([[True] * len(counts) + [False] * padding])
    places = places_after(torch.tensor([counts + [5] * padding]), valid)[0].tolist()
    sequence = []
    for number, count in enumerate(counts):
        sequence += [number] + [-1] * count
    assert places[: len(counts)] == [sequence.index(number) for number in range(len(counts))]
    assert places[len(counts) :] == list(range(len(sequence), len(sequence) + padding))


def test_phases_of_extended_time() -> None:
    inserted = torch.tensor([[0.0, 0.5, 0.9, 0.2, 0.0]])
    valid = torch.tensor([[True, True, True, True, False]])
    growth = grown(inserted, torch.tensor([0.6]), valid)
    assert growth.visible.tolist() == [[True, True, False, True, False]]
    assert growth.active.tolist() == growth.visible.tolist()
    assert growth.deleted.tolist() == [[False, False, True, False, False]]
    torch.testing.assert_close(growth.time, torch.tensor([[0.6, 0.1, 0.0, 0.4, 0.0]]))
    assert growth.pending.tolist() == [[0, 1, 0, 0, 0]]
    later = grown(inserted, torch.tensor([1.5]), valid)
    assert later.finished.tolist() == [[True, True, False, True, False]]
    assert later.active.tolist() == [[False, False, True, False, False]]
    assert float(clock_end(inserted, valid)) == pytest.approx(1.9)
    assert not grown(inserted, clock_end(inserted, valid), valid).active.any()
    assert isinstance(later, Growth)


def test_the_shift_divides_the_signal_to_noise_ratio() -> None:
    time = numbers(12)[1:-1]
    moved = shifted(time, 3.0)
    torch.testing.assert_close(moved / (1 - moved), time / (1 - time) / 3)
    assert shifted(torch.tensor([0.0, 1.0]), 3.0).tolist() == [0.0, 1.0]
    assert shifted(time, 1.0) is time


@pytest.mark.parametrize(("kind", "value"), [(Power, 0.0), (Power, math.inf), (Delayed, 1.0), (Delayed, -0.1)])
def test_a_scheduler_that_cannot_be_is_refused(kind: type, value: float) -> None:
    with pytest.raises(ValueError, match="it must be"):
        kind(value)
