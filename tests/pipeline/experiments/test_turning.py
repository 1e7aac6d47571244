"""The experiment on 3x3 pixels: its whole way in small, and its figures of videos that are known."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from model.video import from_frames
from pipeline.corpus.turning import make_turning, plan_turning
from pipeline.experiments import turning as experiment
from pipeline.experiments.turning import METHODS, ORDERS, Row, cells, main, row, true_videos
from pipeline.recipes import turning
from tests.pipeline.ingest.in_process import make

TINY = [f"--set={setting}" for setting in ("width=32", "depth=1", "heads=2", "batch=4", "steps=4", "validate_every=4")]


def test_the_whole_way_in_small(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experiment, "MOST_STEPS", 3)
    make_turning(tmp_path / "films", films=8)
    make(tmp_path / "films", tmp_path / "lake", recipe=turning())
    words = ["--out", str(tmp_path), "--samples", "4", "--steps", "2", *TINY]
    assert main(words) == 0
    told = capsys.readouterr().out
    for text in ("length told: ", "length not told: mean", "true films (floor)", "flowception: 4 steps"):
        assert text in told
    found = json.loads((tmp_path / "turning.json").read_text())
    names = [each["name"] for each in found["rows"]]
    orders = [f"flowception, {order}" for order in ("learned", *ORDERS)]
    assert names == ["true films (floor)", "look-up of a training film by its caption", *orders, *METHODS[1:]]
    assert found["lengths of flowception"]["untold"]["true_mean"] == 22.5
    assert found["lengths of flowception"]["told"]["samples"] == 16
    near = found["lengths of flowception"]["untold"]["near_a_peak"]
    assert list(near) == ["15", "20", "25", "30"]
    assert 0 <= sum(near.values()) <= 1
    by_name = {each["name"]: each for each in found["rows"]}
    assert by_name["full"]["within_one"] == 1.0, "it is told the length"
    assert by_name["look-up of a training film by its caption"]["one_jump"] == 1.0
    assert by_name["vlfm"]["steps"] == 3, "the most it may take: it asks for single frames, which cost little"
    counted = [found["runs"][name]["parameters"] for name in METHODS]
    assert max(counted) < 1.1 * min(counted), "the same backbone"


def test_figures_of_known_videos() -> None:
    films = plan_turning(5, films=8, told=1.0)
    true = true_videos(plan_turning(6, films=32, told=1.0))
    exact = row("exact", true_videos(films), true, 0, 0, 0)
    assert (exact.within_one, exact.one_jump) == (1.0, 1.0)
    assert exact.turns < 0.02
    still = row("still", [(film, from_frames(np.repeat(film.draw()[:1], 10, 0))) for film in films], true, 4, 4, 80)
    assert (still.within_one, still.one_jump) == (0.0, 0.0)
    assert still.turns >= 1
    assert still.frechet > exact.frechet
    assert still.pairs == 10
    noise = [(film, torch.randn(film.frames, 3, 3, 3, generator=torch.Generator().manual_seed(1))) for film in films]
    noisy = row("noise", noise, true, 4, 4, 80)
    assert min(noisy.drift) > max(exact.drift)


def test_a_line_of_the_table() -> None:
    one = Row("x", 3, 6, 2.5e6, 0.5, 0.25, 1.0, 2.0, (0.1, 0.2, 0.3, 0.4))
    assert cells(one) == "| x | 3 | 6 | 2.50 | 50 % | 0.25 | 100 % | 2.00 | 0.10 / 0.20 / 0.30 / 0.40 |"


def test_too_few_samples_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--out", str(tmp_path), "--samples", "2"]) == 1
    assert "--samples is 2; give at least 4, one of each length" in capsys.readouterr().err
