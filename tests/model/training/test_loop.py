"""The training loop on a network of one weight: what it logs, and that a resumed run counts its own steps."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from model.stop import StopSignal
from model.training.checkpoint import Run
from model.training.ema import MovingAverage
from model.training.loop import Recent, Schedule, Training, note, run_training
from model.training.optimizers import adamw
from model.training.processes import ALONE
from model.training.state import TrainingState


def trained(folder: Path, steps: int, **schedule: Any) -> list[dict[str, Any]]:
    """The lines of the log of a training whose loss is the number of its step."""
    network = nn.Linear(1, 1)
    state = TrainingState(network, MovingAverage(network, 0.9), [adamw(network.parameters(), 1e-2, 0.0, 0.9)])

    def losses(step: int, batch: int) -> dict[str, Tensor]:
        assert batch == step, "batches go on where the run stands"
        return {"loss": step + 0 * network(torch.ones(1)).sum()}

    training = Training(
        batches=lambda done: (step for step in itertools.count(done + 1)),
        losses=losses,
        learning_rate=lambda step: 1.0,
        gradient_clip=1.0,
        samples=8,
        validate=lambda: {"validation_loss": 7.0},
        facts={"clips": 3},
    )
    plan = Schedule(
        steps, log_every=4, checkpoint_every=100, checkpoints_kept=1, bad_steps_allowed=0, validate_every=5, **schedule
    )
    run = Run(folder)
    run_training(training, state, run, plan, ALONE, StopSignal())
    assert state.step == steps
    assert run.steps() == [steps]
    return [json.loads(line) for line in run.log.read_text().splitlines()]


@pytest.mark.parametrize(("mean", "expected"), [(False, {4: 4, 8: 8, 10: 10}), (True, {4: 2.5, 8: 6.5, 10: 9.5})])
def test_a_line_has_the_last_loss_or_the_mean(tmp_path: Path, mean: bool, expected: dict[int, float]) -> None:
    lines = trained(tmp_path, 10, mean_losses=mean)
    assert {line["step"]: line["loss"] for line in lines if "loss" in line} == expected
    assert [line["step"] for line in lines if "validation_loss" in line] == [5, 10]
    assert (lines[0]["event"], lines[0]["clips"], lines[-1]["event"]) == ("start", 3, "end")


def test_a_resumed_run_goes_on_and_a_finished_one_does_nothing(tmp_path: Path) -> None:
    trained(tmp_path, 6)
    lines = trained(tmp_path, 9)
    assert [line["step"] for line in lines if "loss" in line] == [4, 6, 8, 9]
    assert [line["step"] for line in lines if line.get("event") == "start"] == [0, 6]
    assert trained(tmp_path, 9) == lines


def test_the_throughput_counts_the_steps_since_the_last_line() -> None:
    recent = Recent(mean=False)
    for _ in range(5):
        recent.add({"loss": torch.tensor(1.0)}, skipped=torch.tensor(False))
    recent.began -= 10
    recent.waited = 1.0
    training = Training(
        losses=lambda step, batch: {}, learning_rate=lambda step: 1.0, gradient_clip=1.0, samples=8,
        states_per_sample=3, unit="clips", seconds_at_peak=0.1,
    )  # fmt: skip
    speed = recent.speed(training, torch.device("cpu"))
    memory = speed.pop("memory_gib")
    assert 0.05 < memory < 100
    expected = {"samples_per_second": 12.0, "clips_per_second": 4.0, "data_wait": 0.1, "mfu": 0.4}
    assert speed == pytest.approx(expected, rel=0.01)
    line = note(training, {"loss": 0.5, "mean": 0.25, "rest": 1.0}, {**expected, "memory_gib": 1.5}, skipped=2)
    assert line == (
        "loss 0.5000  mean 0.2500  4 clips/s  data wait 10.0%  memory 1.50 GiB  MFU 40.0%  2 bad steps skipped"
    )
    recent.add({"loss": torch.tensor(torch.nan)}, skipped=torch.tensor(True))
    assert recent.values() == {}
