"""Both streaming forms equal the one-shot projection, at any cut, through a save, on any times."""

from __future__ import annotations

import io
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.legs import project, projection_matrix
from model.legs.stream import ChunkedProjection, GrowingProjection, dilation, growing_matrix
from tests.reference import legs as reference


def saved_and_loaded(stream):
    file = io.BytesIO()
    stream.save(file)
    file.seek(0)
    return type(stream).load(file)


@settings(deadline=None, max_examples=25)
@given(
    count=st.integers(1, 30),
    order=st.integers(1, 60),
    cuts=st.lists(st.integers(0, 30), max_size=4),
    method=st.sampled_from(["hold", "linear", "cubic"]),
    seed=st.integers(0, 2**32 - 1),
)
def test_chunks_equal_one_shot(count: int, order: int, cuts: list[int], method: str, seed: int) -> None:
    random = np.random.default_rng(seed)
    times = np.sort(random.uniform(0, 3, count))
    frames = random.standard_normal((count, 2, 3))
    stream = ChunkedProjection(times, 3.0, order, method)
    edges = [0, *sorted(min(cut, count) for cut in cuts), count]
    for first, last in pairwise(edges):
        stream.add(frames[first:last])
        stream = saved_and_loaded(stream)
    one_shot = project(frames, projection_matrix(times, 3.0, order, method))
    np.testing.assert_allclose(stream.coefficients(), one_shot, atol=1e-10, rtol=0)


@settings(deadline=None, max_examples=25)
@given(
    count=st.integers(1, 40),
    order=st.integers(1, 90),
    method=st.sampled_from(["hold", "linear"]),
    from_zero=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_a_growing_window_equals_one_shot(count: int, order: int, method: str, from_zero: bool, seed: int) -> None:
    random = np.random.default_rng(seed)
    times = np.sort(random.uniform(0.01, 3, count))
    times[0] = 0.0 if from_zero else times[0]
    frames = random.standard_normal((count, 2, 3))
    stream = GrowingProjection(order, method)
    for k, (frame, time) in enumerate(zip(frames, times, strict=True)):
        stream.add(frame, float(time))
        if k == count // 2:
            stream = saved_and_loaded(stream)
        if time > 0:  # the window may be closed after every frame, and go on
            so_far = project(frames[: k + 1], projection_matrix(times[: k + 1], float(time), order, method))
            np.testing.assert_allclose(stream.coefficients(), so_far, atol=1e-10, rtol=0)
    one_shot = project(frames, projection_matrix(times, 3.5, order, method))
    np.testing.assert_allclose(stream.coefficients(3.5), one_shot, atol=1e-10, rtol=0)


def test_a_long_film_does_not_wear_out() -> None:
    times = (np.arange(400) + 0.5) / 400
    for method in ("hold", "linear"):
        grown = growing_matrix(times, 1.0, 48, method)
        assert np.abs(grown - projection_matrix(times, 1.0, 48, method)).max() < 1e-11


def test_dilation_is_the_power_of_the_recurrence_and_never_enlarges() -> None:
    np.testing.assert_allclose(dilation(0.7, 24), reference.dilation_power(0.7, 24), atol=1e-13)
    assert np.linalg.norm(dilation(0.97, 64), 2) <= 1 + 1e-12


def test_a_spline_cannot_grow() -> None:
    with pytest.raises(ValueError, match="method is 'cubic'; a growing window takes 'linear' or 'hold'"):
        GrowingProjection(8, "cubic")


def test_bad_frames_are_refused() -> None:
    stream = ChunkedProjection(np.array([0.1, 0.2, 0.3]), 1.0, 4)
    with pytest.raises(ValueError, match="0 of 3 frames have come"):
        stream.coefficients()
    with pytest.raises(ValueError, match=r"latents\[1\] holds values that are not finite"):
        stream.add(np.array([[1.0], [np.nan]]))
    stream.add(np.ones((1, 2)))
    with pytest.raises(ValueError, match=r"chunk has frames of shape \(3,\); those before had \(2,\)"):
        stream.add(np.ones((1, 3)))
    with pytest.raises(ValueError, match="chunk holds 3 frames; only 2 are still to come"):
        stream.add(np.ones((3, 2)))
    growing = GrowingProjection(4)
    with pytest.raises(ValueError, match="no frames have come"):
        growing.coefficients()
    growing.add(np.ones(2), 0.5)
    with pytest.raises(ValueError, match=r"time is 0.5; it must be .* after the last frame's, 0.5"):
        growing.add(np.ones(2), 0.5)
    with pytest.raises(ValueError, match=r"frame at 0.6 s holds values that are not finite"):
        growing.add(np.array([1.0, np.inf]), 0.6)
    with pytest.raises(ValueError, match=r"frame has the shape \(3,\); those before had \(2,\)"):
        growing.add(np.ones(3), 0.6)
    with pytest.raises(ValueError, match=r"duration is 0.4; .* at least 0.5"):
        growing.coefficients(0.4)
