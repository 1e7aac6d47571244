"""The figures of captions that were never seen, of samplers whose answers are known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from model.methods.base import SampleSettings
from model.spread import spread_evenly
from model.video import from_frames
from pipeline.corpus.combinations import plan_film
from pipeline.corpus.drawing import draw_frames
from pipeline.corpus.grammar import Attributes, attributes_of, combinations
from pipeline.experiments import combinations as experiment
from pipeline.experiments.combinations import RATE, Judge, between, diversity, long_videos, main

WINDOW = 2.0
HELD = combinations(held_out=True)[::90]


class Artist:
    """A sampler that draws the true film of a caption; the seed draws what the caption leaves open."""

    window = WINDOW

    def __init__(self, same: bool = False, step: float = 0.0) -> None:
        self.same, self.step = same, step
        self.codec = SimpleNamespace(decode=lambda latents, text="": latents, encode=self.encode)

    @staticmethod
    def encode(frames: torch.Tensor, text: str = "") -> Any:
        return SimpleNamespace(latents=frames)

    def sample(self, captions: Sequence[str], starts: None, seeds: Sequence[int], settings: SampleSettings) -> Any:
        films = [plan_film(attributes_of(c), 0 if self.same else s) for c, s in zip(captions, seeds, strict=True)]

        def read(times: torch.Tensor) -> torch.Tensor:
            seconds = times.numpy() * WINDOW
            return torch.stack([from_frames(draw_frames(f.attributes, f.path, seconds)) for f in films], dim=1)

        return SimpleNamespace(read=read)

    def videos(self, captions: Sequence[str], rate: float, duration: float, settings: Any, image: torch.Tensor) -> Any:
        """Goes on rightly from the picture of the film that `long_videos` draws, but for a jump at each seam."""
        one = attributes_of(captions[0])
        number = spread_evenly([each for each in HELD if each.speed], 8).index(one)
        film = plan_film(one, seed=number, seconds=experiment.LONG)
        times = np.arange(round(duration * rate)) / rate
        jumped = times + self.step * np.floor(times / WINDOW)
        return [draw_frames(one, film.path, jumped)]


def judge(artist: Artist) -> Judge:
    made: Any = Judge.__new__(Judge)
    made.sampler, made.settings, made.times = artist, SampleSettings(), np.arange(round(WINDOW * RATE)) / RATE
    return made  # type: ignore[no-any-return]


def test_true_films_are_wholly_right_and_others_are_not() -> None:
    made = judge(Artist())
    videos = made.sample(HELD, list(range(len(HELD))))
    row = made.row("true", HELD, videos)
    assert (row.right["whole"], row.videos) == (1.0, len(HELD))
    assert row.error < 3.0, "grey levels: places are read to a tenth of a pixel"
    shuffled = made.row("shuffled", HELD[1:] + HELD[:1], videos)
    assert shuffled.right["whole"] == 0.0
    grey = made.row("grey", HELD[:1], [np.full_like(videos[0], 128)])
    assert grey.right["whole"] == 0.0
    assert np.isnan(grey.error)


def test_diversity_is_the_datas_or_none() -> None:
    wide, none = diversity(judge(Artist())), diversity(judge(Artist(same=True)))
    for name in experiment.OPEN:
        assert wide[name] == pytest.approx(1, abs=0.35), name
        assert none[name] == pytest.approx(0, abs=0.01), name
    assert wide["readable"] == wide["samples"] == 64


def test_frames_between_the_grid_points_and_seams() -> None:
    assert between(judge(Artist()), HELD[:3])["ratio"] == pytest.approx(1, abs=0.3)
    smooth, jumps = (long_videos(judge(Artist(step=step)), HELD) for step in (0.0, 0.4))
    assert smooth["third_window"] > 60
    assert smooth["seam"] == pytest.approx(1, abs=0.3)
    assert jumps["seam"] > 2
    assert jumps["third_window"] < smooth["third_window"]
    assert max(smooth["hold_first"], smooth["hold_window"]) < 30


def test_the_nearest_training_caption_differs_in_one_value() -> None:
    wanted = Attributes("large", "red", "ring", "slides", "to the left", "slowly", "black")
    assert wanted.held_out
    near = replace(wanted, colour="green")
    assert experiment._nearest(wanted, [replace(near, size="small"), near, replace(near, speed="quickly")]) == near


def test_slips_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--run", "nowhere", "--captions", "0"]) == 1
    assert "--captions 0 --seeds 4: both must be at least 1" in capsys.readouterr().err
    assert main(["--run", "nowhere"]) == 1
    assert "nowhere" in capsys.readouterr().err
