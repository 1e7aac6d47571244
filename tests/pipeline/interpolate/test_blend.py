"""Paths that overlap: one path in the middle of two, no seam anywhere, the frames themselves at their times."""

from __future__ import annotations

import numpy as np
import pytest

from model.legs import evaluate, project, projection_matrix
from pipeline.interpolate.blend import ORDER, readout_matrix

TIMES = np.cumsum(np.random.default_rng(5).uniform(0.03, 0.06, 40))
CHUNKS = [TIMES[:8], TIMES[8:16], TIMES[16:24], TIMES[24:32], TIMES[32:]]
FRAMES = np.cumsum(np.random.default_rng(6).standard_normal((40, 5)), axis=0)


def film_at(due: np.ndarray, methods: tuple[str, ...]) -> np.ndarray:
    """The whole film, chunk by chunk, as pipeline.interpolate.film reads it; methods are those of the four paths."""
    values = []
    for k, here in enumerate(CHUNKS):
        before, after = (CHUNKS[j] if 0 <= j < len(CHUNKS) else None for j in (k - 1, k + 1))
        part = due[(due >= (here[0] if k else -1)) & (due < (np.inf if after is None else after[0]))]
        left, right = (methods[j] if 0 <= j < len(methods) else None for j in (k - 1, k))
        matrix = readout_matrix(before, here, after, part, left, right)
        first = 8 * max(0, k - 1)
        values.append(matrix @ FRAMES[first : first + matrix.shape[1]])
    return np.concatenate(values)


def test_one_chunk_is_one_projection() -> None:
    times, due = TIMES[:8], np.linspace(TIMES[0], TIMES[7], 30)
    matrix = readout_matrix(None, times, None, due, None, "cubic")
    span = times[-1] - times[0]
    path = project(FRAMES[:8], projection_matrix(times - times[0], span, ORDER * 8, "cubic"))
    np.testing.assert_allclose(matrix @ FRAMES[:8], evaluate(path, due - times[0], span), atol=1e-9)


@pytest.mark.parametrize("methods", [("cubic",) * 4, ("linear",) * 4, ("cubic", "linear", "cubic", "linear")])
def test_there_is_no_seam(methods: tuple[str, ...]) -> None:
    """The largest jump at borders of chunks, and at ends of paths, is no larger than elsewhere."""
    step = 1e-6
    borders = np.array([chunk[k] for chunk in CHUNKS for k in (0, -1)][1:-1])
    jumps = np.abs(film_at(borders + step, methods) - film_at(borders - step, methods)).max()
    others = (TIMES[1:] + TIMES[:-1]) / 2
    usual = np.abs(film_at(others + step, methods) - film_at(others - step, methods)).max()
    assert jumps < 3 * usual < 1e-3 * np.abs(np.diff(FRAMES, axis=0)).max()


def test_frames_stay_and_beyond_the_shot_too() -> None:
    step = np.abs(np.diff(FRAMES, axis=0)).max()
    assert np.abs(film_at(TIMES, ("cubic",) * 4) - FRAMES).max() < 0.001 * step
    assert np.abs(film_at(TIMES, ("linear",) * 4) - FRAMES).max() < 0.05 * step
    outer = film_at(np.array([TIMES[0] - 0.5, TIMES[0], TIMES[-1], TIMES[-1] + 9]), ("cubic",) * 4)
    np.testing.assert_allclose(outer[0], outer[1])
    np.testing.assert_allclose(outer[2], outer[3])
    assert readout_matrix(None, TIMES[:1], None, np.array([0.0, 7.0]), None, "linear") == pytest.approx(1)


def test_a_still_film_is_still() -> None:
    matrix = readout_matrix(CHUNKS[0], CHUNKS[1], CHUNKS[2], np.linspace(*CHUNKS[1][[0, -1]], 50), "linear", "cubic")
    np.testing.assert_allclose(matrix.sum(axis=1), 1, atol=1e-9)
