"""The probes: right on true films, also blurred ones; near chance on other films; wrong on what shows nothing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from pipeline.corpus import Film, Reading, plan_combinations, read_attributes, spread
from pipeline.corpus.drawing import draw_frames

TIMES = np.arange(16) / 8


@pytest.fixture(scope="module")
def films() -> list[Film]:
    """200 combinations, a quarter of them held out."""
    return plan_combinations(7, 150, films_per_caption=1) + plan_combinations(7, 50, held_out=True, films_per_caption=1)


@pytest.fixture(scope="module")
def readings(films: list[Film]) -> list[Reading]:
    return [read_attributes(drawn(film), TIMES) for film in films]


def drawn(film: Film) -> np.ndarray:
    """Its frames at TIMES."""
    return draw_frames(film.attributes, film.path, TIMES)


def blurred_and_noisy(frames: np.ndarray) -> np.ndarray:
    """A Gaussian blur of 1.5 pixels, then noise."""
    waves = np.fft.fftfreq(64)[:, None] ** 2 + np.fft.rfftfreq(64) ** 2
    weights = np.exp(-2 * (1.5 * np.pi) ** 2 * waves)[:, :, None]
    blurred = np.fft.irfft2(np.fft.rfft2(frames, axes=(1, 2)) * weights, (64, 64), axes=(1, 2))
    noisy = blurred + np.random.default_rng(0).normal(0, 12, frames.shape)
    return np.clip(np.round(noisy), 0, 255).astype(np.uint8)


def rates(readings: list[Reading], films: list[Film]) -> dict[str, float]:
    """How often each attribute is read right, and all of them."""
    found = [reading.right(film.attributes) for reading, film in zip(readings, films, strict=True)]
    whole = {"whole": float(np.mean([all(right.values()) for right in found]))}
    return {name: float(np.mean([right[name] for right in found])) for name in found[0]} | whole


def test_true_films_are_read_right(films: list[Film], readings: list[Reading]) -> None:
    found = rates(readings, films)
    assert len(found) == 8
    assert min(found.values()) >= 0.99, found


def test_blurred_and_noisy_films_are_read_right(films: list[Film]) -> None:
    films = films[::2]
    error = blurred_and_noisy(drawn(films[0])) / 255.0 - drawn(films[0]) / 255.0
    assert 25 <= -10 * np.log10((error**2).mean()) <= 27
    found = rates([read_attributes(blurred_and_noisy(drawn(film)), TIMES) for film in films], films)
    assert min(found.values()) >= 0.95, found


def test_other_films_are_right_by_chance(films: list[Film], readings: list[Reading]) -> None:
    found = rates(readings[1:] + readings[:1], films)
    assert found["whole"] <= 0.01
    for name, values in {"background": 4, "colour": 5, "object": 4, "size": 2, "direction": 6}.items():
        assert abs(found[name] - 1 / values) <= 0.12, (name, found)


def test_start_lane_and_speed_are_read_to_a_tenth_of_a_pixel(films: list[Film], readings: list[Reading]) -> None:
    for film, found in zip(films, readings, strict=True):
        off = (found.phase - film.path.phase + 0.5) % 1.0 - 0.5
        for error in (off, found.lane - film.path.lane, found.speed - film.path.speed):
            assert abs(error) * 64 <= 0.1, film


@pytest.mark.parametrize("what", ["still", "noise", "grey", "jumps", "two at once", "one, then another"])
def test_what_shows_no_film_is_never_right(films: list[Film], what: str) -> None:
    noise = np.random.default_rng(0)
    for film in films[:12]:
        frames = drawn(film)
        path = replace(film.path, phase=film.path.phase + 0.5)
        other = drawn(replace(film, path=path))
        shown = {
            "still": np.repeat(frames[:1], len(frames), axis=0),
            "noise": noise.integers(0, 256, frames.shape, dtype=np.uint8),
            "grey": np.full_like(frames, 128),
            "jumps": frames[noise.permutation(len(frames))],
            "two at once": frames // 2 + other // 2,  # what a mean over all starts looks like
            "one, then another": np.concatenate([frames[:8], other[8:]]),
        }[what]
        assert not all(read_attributes(shown, TIMES).right(film.attributes).values()), film


def test_frames_that_cannot_be_read_are_refused() -> None:
    with pytest.raises(ValueError, match="pass uint8"):
        read_attributes(np.zeros((8, 64, 64, 3)), np.arange(8) / 8)
    with pytest.raises(ValueError, match="3 frames at 3 times"):
        read_attributes(np.zeros((3, 64, 64, 3), np.uint8), np.arange(3) / 8)


def test_spread_is_the_mean_distance() -> None:
    assert spread([1.0, 2.0, 4.0]) == 2.0
    assert spread([0.05, 0.95], period=1.0) == pytest.approx(0.1)
    assert spread([0.3]) == 0.0
    assert spread(np.arange(1000) / 1000, period=1.0) == pytest.approx(0.25, rel=0.01)
