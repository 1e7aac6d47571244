"""The experiment on drift on a tiny lake: all its rows, nothing twice, and its own parts against closed forms."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from model.flow.path import WarmupPath
from model.stop import STOPPED
from model.training.objective import Objective
from pipeline.experiments import drift
from pipeline.experiments.drift import READINGS, VARIANTS, main
from pipeline.experiments.looks import LOOKS, Looks
from storage.layout import Lake
from tests.model.tiny_lake import KEPT, make_lake
from tests.model.wrapped_method import Told

TINY = ["width=32", "depth=1", "heads=2", "batch=4", "log_every=1", "learning_rate_warmup=1", "ema_decay=0.5"]
KINDS = ("sigma 0.1", "sigma 0.3, no jitter", "per frame", "paper path")


def run(lake: Path, out: Path, steps: int = 2, *more: str) -> int:
    settings = [word for setting in TINY for word in ("--set", setting)]
    return main(["--lake", str(lake), "--out", str(out), "--steps", str(steps), *settings, *more])


@pytest.fixture(scope="module")
def lake(tmp_path_factory: pytest.TempPathFactory) -> Lake:
    return make_lake(tmp_path_factory.mktemp("drift") / "lake", clips=3)


@pytest.fixture(scope="module")
def made(lake: Lake) -> Iterator[Path]:
    """A whole experiment, but with one network of each kind alone."""
    out = lake.root.parent / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drift, "VARIANTS", [variant for variant in VARIANTS if variant.name in KINDS])
        quick = ("looks twice, 16 steps", "rk4, 8 steps")
        patch.setattr(drift, "MORE_READINGS", tuple(r for r in drift.MORE_READINGS if r.name in quick))
        patch.setattr(drift, "PAPER_READINGS", READINGS)
        assert run(lake.root, out) == 0
        yield out


def written(out: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in sorted((out / "runs").rglob("*")) if path.is_file()}


def test_what_is_compared() -> None:
    """The networks and readings that the question is about."""
    paths = {(v.settings.get("sigma_end"), v.settings.get("state_jitter")) for v in VARIANTS}
    assert paths >= {(sigma, jitter) for sigma in (0.01, 0.03, 0.1, 0.3) for jitter in (None, 0.0)}
    assert {(r.source, r.settings.reanchor) for r in READINGS} >= {(s, a) for s in ("mean", "state") for a in (0, 1)}
    assert drift.drift_recipe().options.state_jitter == 0.3
    assert all(variant.settings.keys() <= drift.VARIED for variant in VARIANTS)


def test_the_table_has_every_row(made: Path) -> None:
    rows = json.loads((made / "drift.json").read_text())
    places = [(row["network"], row["reading"]) for row in rows]
    assert len(places) == len(set(places))
    assert [reading for network, reading in places if network == "–"] == [
        "the projection (ceiling)", "the clip's mean frame, held", "the clip's first frame, held",
    ]  # fmt: skip
    for variant in drift.VARIANTS:
        named = {reading for network, reading in places if network == variant.name}
        assert named >= ({"mean", "state"} if "method" in variant.settings else {reading.name for reading in READINGS})
    text = (made / "drift.md").read_text().splitlines()
    assert len(text) == len(rows) + 2
    for line, row in zip(text[2:], rows, strict=True):
        assert line.startswith(f"| {row['network']} | {row['reading']} |")
        assert len(row["clips"]) == 3
        assert row["observed"] == pytest.approx(sum(clip["observed"] for clip in row["clips"]) / 3)
        assert row["worst"] == min(clip["worst"] for clip in row["clips"])
        assert f"| {row['held_out']:.1f} |" in line


def test_calls_are_counted(made: Path) -> None:
    rows = json.loads((made / "drift.json").read_text())
    calls = {(row["network"], row["reading"]): row["calls"] for row in rows}
    assert calls["sigma 0.3, no jitter", "mean, re-anchored"] == 16 + 16 + 1
    assert calls["sigma 0.1", "looks twice, 16 steps"] == 16 + 2 * 17
    assert calls["sigma 0.1", "rk4, 8 steps"] == 4 * 24 + 1
    assert calls["paper path", "mean, re-anchored"] == 17
    assert calls["per frame", "mean"] == 17 * KEPT, "every frame costs its own calls"


def test_the_ceiling_is_the_projection(made: Path) -> None:
    """A polynomial of ORDER coefficients through half the frames: near them at the observed times, farther between."""
    rows = json.loads((made / "drift.json").read_text())
    ceiling, still = rows[0], rows[2]
    assert ceiling["observed"] > still["observed"]
    assert ceiling["observed"] > ceiling["held_out"]
    assert ceiling["calls"] == 0
    assert all(clip["first"] == 100.0 for clip in still["clips"]), "the first frame, held, is itself at first"


def test_a_second_run_makes_nothing_again(made: Path, lake: Lake, capfd: pytest.CaptureFixture[str]) -> None:
    before, table = written(made), (made / "drift.md").read_text()
    capfd.readouterr()
    assert run(lake.root, made) == 0
    out, err = capfd.readouterr()
    assert written(made) == before
    assert out == table
    assert err == ""


@pytest.mark.bit_identical
def test_what_is_missing_alone_is_made_again(made: Path, lake: Lake, capfd: pytest.CaptureFixture[str]) -> None:
    before = written(made)
    gone = next(path for path in before if path.name == "figures.json" and "per-frame" in str(path))
    rows = (made / "drift.json").read_text()
    gone.unlink()
    capfd.readouterr()
    assert run(lake.root, made, 2, "--json") == 0
    assert [path for path, time in written(made).items() if time != before[path]] == [gone]
    assert json.loads(capfd.readouterr().out) == json.loads(rows), "sampling is repeatable"


def test_other_settings_are_other_networks(made: Path, lake: Lake, monkeypatch: pytest.MonkeyPatch) -> None:
    before = written(made)
    monkeypatch.setattr(drift, "VARIANTS", VARIANTS[:1])
    assert run(lake.root, made, 3) == 0
    after = written(made)
    assert {path: after[path] for path in before} == before
    assert len({path.relative_to(made).parts[1] for path in after}) == len(KINDS) + 1


def test_a_training_that_was_stopped_is_no_result(lake: Lake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGTERM ends a training with a checkpoint; the table must not be made of it, and the next run goes on."""
    inner, before = Objective.losses, signal.getsignal(signal.SIGTERM)
    interrupts = signal.getsignal(signal.SIGINT)

    def stopping(*given: Any) -> dict[str, torch.Tensor]:
        os.kill(os.getpid(), signal.SIGTERM)
        return inner(*given)

    monkeypatch.setattr(drift, "VARIANTS", VARIANTS[:1])
    monkeypatch.setattr(Objective, "losses", stopping)
    try:
        assert run(lake.root, tmp_path) == STOPPED
    finally:  # after a stop the handlers stay
        signal.signal(signal.SIGTERM, before)
        signal.signal(signal.SIGINT, interrupts)
    assert not (tmp_path / "drift.md").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--set", "sigma_end=0.2"], "--set sigma_end: the experiment varies sigma_end itself"),
        (["--set", "state_jitter=0"], "--set state_jitter: the experiment varies state_jitter itself"),
        (["--set", "sigma=0.2"], "setting 'sigma' is unknown"),
        (["--set", "width"], "--set takes key=value; it was given 'width'"),
        (["--steps", "0"], "steps is 0; it must be at least 1"),
    ],
)
def test_slips_of_the_pen(
    words: list[str], message: str, lake: Lake, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--lake", str(lake.root), "--out", str(tmp_path / "out"), *words]) == 1
    assert capsys.readouterr().err.startswith(f"error: {message}")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_no_lake(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--lake", str(tmp_path / "none"), "--out", str(tmp_path / "out")]) == 1
    assert str(tmp_path / "none") in capsys.readouterr().err


@pytest.mark.parametrize("look", LOOKS)
def test_what_the_network_is_shown(look: str) -> None:
    draw = torch.Generator().manual_seed(0)
    noise, truth = torch.randn(2, 3, 4, 4, generator=draw), torch.randn(2, 1, 3, 4, 4, generator=draw)
    network, state = Told(0.5), torch.ones(2, 1, 3, 4, 4)
    looks = Looks(network, look, WarmupPath(sigma_end=0.2), 2.0, noise, truth)
    none: Any = None
    for now in (-0.1, 0.0, 0.5):
        looks(state, torch.full((2, 1), now), none)
    anchored = 0.5 * 2.0 + 0.2 * noise[:, None]
    true = truth + 0.2 * noise[:, None]  # a clip of order 1 stands still
    shown = {
        "solver": [state, state, state],
        "twice": [state, state, anchored, state, anchored],
        "first": [state, state, anchored],
        "truth": [state, true, true],
    }[look]
    assert looks.calls == len(network.states) == len(shown)
    for seen, expected in zip(network.states, shown, strict=True):
        torch.testing.assert_close(seen, expected)


def test_an_unknown_look_is_refused() -> None:
    with pytest.raises(ValueError, match="look is 'away'; it must be one of solver, twice, first, truth"):
        Looks(Told(0.0), "away", WarmupPath(), 1.0, torch.zeros(()), torch.zeros(()))
