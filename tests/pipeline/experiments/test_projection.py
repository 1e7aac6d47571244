"""The experiment `projection`: its figures against slow ones, and the limits that the default method has to keep."""

from __future__ import annotations

import dataclasses
import json
import statistics
from pathlib import Path

import numpy as np
import pytest

from model.legs import METHODS, evaluate, project, projection_matrix
from model.legs.select import AUTO
from pipeline import recipes
from pipeline.corpus import make_corpus
from pipeline.experiments import projection as experiment
from pipeline.experiments.projection import Clip, clip_row, clips_of, main, mean_gains, read_film, rows_of
from pipeline.interpolate.film import PIXELS
from pipeline.sources.folders import films_in
from pipeline.stages.invert import SharedCodec


def clip(count: int = 7, speed: float = 4.0) -> Clip:
    times = np.arange(2 * count - 1) / 20 + np.random.default_rng(1).uniform(0, 0.01, 2 * count - 1)
    times[0] = 0
    phase = np.arange(24).reshape(1, 2, 3, 4)
    return Clip("a", 0.0, times, np.sin(speed * times[:, None, None, None] + phase).astype(np.float32))


def decibel(made: np.ndarray, true: np.ndarray) -> float:
    return float(10 * np.log10(4 / np.square(made - true).mean()))


def test_a_clips_figures() -> None:
    one = clip()
    row = clip_row(one, {"s=N": "linear", "s=2N": "cubic"})
    seen, hidden = one.latents[::2], one.latents[1::2]
    straight = np.stack([
        np.stack([np.interp(one.times[1::2], one.times[::2], seen[:, c, y, x]) for x in range(4)], -1)
        for c in range(2) for y in range(3)
    ], 1).reshape(hidden.shape)  # fmt: skip
    assert row["psnr"]["interpolation"] == pytest.approx(decibel(straight, hidden), abs=1e-4)
    assert row["psnr"]["previous"] == pytest.approx(decibel(seen[:-1], hidden), abs=1e-4)
    for name, order in (("N", 7), ("2N", 14)):
        for method in ("linear", "cubic", "hold"):
            path = project(seen, projection_matrix(one.times[::2], one.duration, order, method))
            figure = decibel(evaluate(path, one.times[1::2], one.duration), hidden)
            assert row["psnr"][f"{method} s={name}"] == pytest.approx(figure, abs=1e-4)
        assert row["psnr"][f"auto s={name}"] == row["psnr"][f"cubic s={name}"], "smooth motion is for the spline"
    assert row["psnr"]["recipe s=N"] == row["psnr"]["linear s=N"]
    assert row["psnr"]["recipe s=2N"] == row["psnr"]["cubic s=2N"]
    still = dataclasses.replace(one, latents=np.ones_like(one.latents))
    assert clip_row(still, {"s=N": "linear", "s=2N": "cubic"})["psnr"]["previous"] == pytest.approx(106.02, abs=0.01)


def test_the_recipes_method_is_that_of_the_sum() -> None:
    """One clip that jumps a lot outweighs one of gentle motion."""
    gentle = clip()
    jumps = np.where(np.arange(13)[:, None, None, None] // 3 % 2, 1.0, -1.0) * np.ones((13, 2, 3, 4))
    rows = rows_of([gentle, dataclasses.replace(gentle, latents=jumps.astype(np.float32))])
    assert [row["auto"] for row in rows] == ["cubic", "linear"]
    for row in rows:
        assert row["psnr"]["recipe s=2N"] == row["psnr"]["linear s=2N"]
    gains = mean_gains(rows)
    assert gains["auto s=2N"] == pytest.approx(
        statistics.fmean(row["psnr"]["auto s=2N"] - row["psnr"]["interpolation"] for row in rows)
    )


def test_films_to_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_corpus(tmp_path / "films", films=1).parent
    monkeypatch.setattr(experiment, "COUNTS", (5, 60))
    assert main([str(folder), "--windows", "2", "--size", "12x16", "--codec", "linear", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["frames"], row["start"]) for row in rows] == [(5, 0.0), (5, pytest.approx(1.875))]
    assert main([str(folder), "--windows", "1", "--size", "12x16"]) == 0
    told = capsys.readouterr().out
    assert told.startswith("N = 5\n\n| clip | interpolation | previous | linear s=N |")
    assert "| mean |" in told
    assert main([str(folder), "--windows", "0"]) == 1
    monkeypatch.setattr(experiment, "COUNTS", (60,))
    assert main([str(folder), "--size", "12x16"]) == 1
    assert "no film has 119 frames without a cut; name longer films" in capsys.readouterr().err


def test_recipes_know_the_methods_of_the_model() -> None:
    assert set(recipes.METHODS) == {AUTO, *METHODS}


def test_the_default_method_keeps_its_limits_on_real_films(real_films: Path) -> None:
    """Mean over clips of the dB over linear interpolation: at s = N never below -0.2, at s = 2N never below -0.05."""
    method = recipes.demo().method
    assert recipes.stable_diffusion().method == method
    films = [read_film(film, (48, 64)) for film in films_in([real_films])]
    codec = SharedCodec(PIXELS)
    for count in (13, 25, 49):
        clips = [clip for film in films for clip in clips_of(film, count, 1, codec)]
        assert len(clips) >= 6
        gains = mean_gains(rows_of(clips))
        assert gains[f"{method} s=N"] > -0.2
        assert gains[f"{method} s=2N"] > -0.05
        assert gains[f"{method} s=2N"] > max(gains["linear s=2N"], gains["cubic s=2N"]), "what choosing is for"
