"""The toys' figures on true clips and on wrong ones, and a run of the experiment."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from model.legs import basis_torch
from pipeline.experiments import modes
from pipeline.experiments.modes import READ, SHARES, TOYS, Toy, blob, judge, locate


def frames(toy: Toy) -> torch.Tensor:
    return blob(toy.start + READ[:, None, None] * toy.way)


@pytest.mark.parametrize("name", TOYS)
def test_true_clips_are_judged_right(name: str) -> None:
    toy = TOYS[name](400, torch.Generator().manual_seed(3))
    found = judge(name, frames(toy))
    assert found["error_middle"] < 0.01
    assert found["error_end"] < 0.01
    if name == "continuous":
        assert found["speed"] == pytest.approx(modes.SPEED, abs=0.1)
        assert found["line"] < 0.06
        assert found["spread_start"] == pytest.approx(1, abs=0.08)
        assert found["spread_middle"] == pytest.approx(1, abs=0.08)
    else:
        assert found["one_mode"] == 1.0
        expected = SHARES if name == "rows" else (0.5, 0.5)
        assert found["shares"] == pytest.approx(expected, abs=0.08)


def test_averages_and_changes_of_mode_are_judged_wrong() -> None:
    generator = torch.Generator().manual_seed(3)
    crossing = TOYS["crossing"](100, generator)
    turned = frames(crossing)
    turned[9:] = turned[9:].flip(2)  # from the middle on the other path
    assert judge("crossing", turned)["one_mode"] == 0.0
    fork = TOYS["fork"](100, generator)
    average = frames(fork).mean(1, keepdim=True).expand(-1, 100, -1, -1)
    assert judge("fork", average)["error_end"] > 0.05
    still = Toy(fork.start, 0 * fork.way)
    assert judge("continuous", frames(still))["speed"] == 0.0


def test_places_are_found_to_a_tenth_of_a_pixel() -> None:
    places = 7 * torch.rand(50, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found, errors = locate(blob(places))
    assert float((found - places).abs().max()) <= 0.0501
    assert float(errors.max()) < 0.01


def test_coefficients_are_the_clips() -> None:
    toy = TOYS["continuous"](5, torch.Generator().manual_seed(0))
    read = torch.einsum("ln,bnchw->lbchw", basis_torch(READ, modes.ORDER).float(), toy.coefficients())[:, :, 0]
    assert float((read - frames(toy)).abs().max()) < 0.01


def test_a_run_writes_its_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(modes, "SAMPLES", 8)
    monkeypatch.setattr(modes, "CLIPS", 16)
    assert modes.main(["--out", str(tmp_path), "--steps", "2", "--seeds", "1", "--toy", "fork"]) == 0
    rows = json.loads((tmp_path / "modes.json").read_text())
    assert [row["network"] for row in rows] == [trial.name for trial in modes.TRIALS if trial.toy == "fork"]
    assert all(0 <= row["one_mode"] <= 1 for row in rows)
    assert capsys.readouterr().out.count("| fork |") == len(rows)
