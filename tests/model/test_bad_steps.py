"""A loss or gradient that is not finite costs its step and nothing else, in both trainers and on several processes."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable, Container, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from model.codec_train import CodecRecipe, Stage
from model.settings import override
from model.stop import StopSignal
from model.train import train
from model.training.checkpoint import Run
from model.training.ema import MovingAverage
from model.training.log import read_log
from model.training.loop import Schedule, Training, run_training
from model.training.optimizers import adamw
from model.training.processes import ALONE
from model.training.state import TrainingState
from storage.layout import Lake
from tests.model.test_train import TINY, environment, logged, weights
from tests.model.tiny_lake import make_lake
from tests.model.wrapped_method import Wrapper, vlfm_wrapped

RECIPE = override(
    TINY, {"steps": 40, "log_every": 20, "checkpoint_every": 3, "checkpoints_kept": 2, "validate_every": 40}
)
NAN = float("nan")
SPOIL: dict[str, Callable[[Tensor], Tensor]] = {
    "loss": lambda loss: loss * NAN,
    "loss alone": lambda loss: loss + NAN,
    "gradient alone": lambda loss: nan_gradient(loss),
}


def nan_gradient(loss: Tensor) -> Tensor:
    loss.register_hook(lambda gradient: gradient * NAN)
    return loss


class Spoiled(Wrapper):
    """A method whose loss is spoiled at some steps, counted from `done`; validation is left alone."""

    def __init__(self, method: Any, bad: Container[int], kind: str, done: int = 0) -> None:
        super().__init__(method)
        self.bad, self.kind, self.step = bad, kind, done

    def loss(self, backbone: nn.Module, batch: Any, draws: Any) -> dict[str, Tensor]:
        losses: dict[str, Tensor] = self.method.loss(backbone, batch, draws)
        if torch.is_grad_enabled():
            self.step += 1
            if self.step in self.bad:
                losses = {**losses, "loss": SPOIL[self.kind](losses["loss"])}
        return losses


def spoiled(bad: Container[int], kind: str = "loss", done: int = 0) -> AbstractContextManager[None]:
    return vlfm_wrapped(lambda method: Spoiled(method, bad, kind, done))


def skipped(run: Path) -> list[int]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [line["step"] for line in lines if line.get("event") == "skipped"]


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def finite(tensors: dict[str, Tensor]) -> bool:
    return all(bool(torch.isfinite(value).all()) for value in tensors.values())


@pytest.fixture(scope="module")
def lake(tmp_path_factory: pytest.TempPathFactory) -> Lake:
    return make_lake(tmp_path_factory.mktemp("bad") / "lake")


@pytest.fixture(scope="module")
def healthy(lake: Lake, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("healthy") / "run"
    train(lake.root, run, override(RECIPE, {"checkpoints_kept": 20}))
    return run


@pytest.mark.parametrize("kind", SPOIL)
def test_a_bad_step_changes_nothing_the_last_one_neither(lake: Lake, tmp_path: Path, kind: str) -> None:
    run = tmp_path / "run"
    with spoiled({31, 32, 40}, kind):
        train(lake.root, run, RECIPE)
    assert skipped(run) == [31, 32, 40]
    assert Run(run).steps() == [39, 40]
    assert finite(weights(run, 39))
    assert same(weights(run, 39), weights(run, 40))
    assert json.loads((Run(run).checkpoint() / "state.json").read_text())["average_updates"] == 37
    assert set(logged(run, "loss")) == {20}, "the mean over a bad step is not logged"


@pytest.mark.parametrize("kind", SPOIL)
def test_ten_random_bad_steps_leave_no_file_that_is_not_finite(lake: Lake, tmp_path: Path, kind: str) -> None:
    """The last step among them; a checkpoint is due after every step, and all stay to be looked at."""
    run, bad = tmp_path / "run", {*random.Random(kind).sample(range(1, 20), 9), 20}
    with spoiled(bad, kind):
        train(lake.root, run, override(RECIPE, {"steps": 20, "checkpoint_every": 1, "checkpoints_kept": 20}))
    assert skipped(run) == sorted(bad)
    assert Run(run).steps() == sorted({*range(1, 21)} - bad | {20}), "every good step has its checkpoint"
    assert all(finite(weights(run, step)) for step in Run(run).steps())
    assert json.loads((Run(run).checkpoint() / "state.json").read_text())["average_updates"] == 10


@pytest.mark.parametrize("kind", SPOIL)
def test_many_in_a_row_end_the_run_and_the_good_checkpoints_stay(
    lake: Lake, healthy: Path, tmp_path: Path, kind: str
) -> None:
    run, recipe = tmp_path / "run", override(RECIPE, {"bad_steps_allowed": 5})
    told = r"step 36 .* 6 steps in a row where 5 are allowed; the last"
    with spoiled(range(31, 99), kind), pytest.raises(FloatingPointError, match=told) as error:
        train(lake.root, run, recipe)
    assert "\n" not in str(error.value)
    assert Run(run).steps() == [27, 30]
    assert same(weights(run, 27), weights(healthy, 27))
    assert same(weights(run, 30), weights(healthy, 30))
    train(lake.root, run, RECIPE)
    assert same(weights(run), weights(healthy))


def test_a_checkpoint_that_is_due_waits_for_a_good_step(lake: Lake, tmp_path: Path) -> None:
    recipe = override(RECIPE, {"checkpoint_every": 15, "checkpoints_kept": 9})
    with spoiled({15, 16}):
        train(lake.root, tmp_path / "run", recipe)
    assert Run(tmp_path / "run").steps() == [17, 30, 40]


def test_the_number_allowed_is_checked_and_old_runs_without_it_go_on(lake: Lake, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(ValueError, match="bad_steps_allowed is -1; it must be 0 or more"):
        train(lake.root, run, override(TINY, {"bad_steps_allowed": -1}))
    train(lake.root, run, override(TINY, {"steps": 3}))
    about = Run(run).read()
    del about["recipe"]["bad_steps_allowed"]
    Run(run).write(about)
    train(lake.root, run, override(TINY, {"bad_steps_allowed": 0}))
    assert Run(run).steps()[-1] == 6


def test_a_spike_is_skipped_like_a_bad_step_and_the_run_resumes_bit_by_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gradient norm above 20 times its running mean; below, before there was a mean, or where it is off, is none."""
    monkeypatch.setattr("model.training.state.WINDOW", 8)

    def trained(
        run: Path, parts: Sequence[int], spikes: dict[int, float], factor: float = 20.0, allowed: int = 2
    ) -> Run:
        for steps in parts:
            torch.manual_seed(0)
            network = nn.Linear(4, 4)
            state = TrainingState(network, MovingAverage(network, 0.9), [adamw(network.parameters(), 1e-2, 0.0, 0.9)])

            def losses(step: int, _: None, network: nn.Module = network) -> dict[str, Tensor]:
                return {"loss": spikes.get(step, 1.0) * network(torch.linspace(-1, 1, 4)).square().mean()}

            training = Training(losses, lambda step: 1.0, gradient_clip=1.0, samples=1)
            plan = Schedule(steps, 1, 100, 9, allowed, spike_factor=factor)
            run_training(training, state, Run(run), plan, ALONE, StopSignal())
        return Run(run)

    spikes = {4: 1e3, 12: 10.0, 15: 1e3, 18: 1e3, 19: 1e4}
    whole = trained(tmp_path / "whole", [30], spikes)
    assert skipped(whole.root) == [15, 18, 19]
    reasons = {line["reason"] for line in read_log(whole.log) if line.get("event") == "skipped"}
    assert reasons == {"the gradient's norm is more than 20 times its running mean"}
    parts = trained(tmp_path / "parts", [14, 17, 30], spikes)
    assert skipped(parts.root) == [15, 18, 19], "the running mean is in the checkpoint"
    assert same(weights(whole.root, 30), weights(parts.root, 30))
    assert (whole.folder(30) / "state.json").read_bytes() == (parts.folder(30) / "state.json").read_bytes()
    assert skipped(trained(tmp_path / "off", [30], spikes, factor=0.0).root) == []
    with pytest.raises(FloatingPointError, match=r"norm is more than 20 times .* at step 19 .* 2 steps in a row"):
        trained(tmp_path / "ended", [30], spikes, allowed=1)


PROGRAM = """
import os, sys
from model.train import train
from tests.model.test_bad_steps import RECIPE, spoiled
from model.settings import override
rank = int(os.environ["RANK"])
try:
    recipe = override(RECIPE, {"steps": 12, "bad_steps_allowed": 1})
    with spoiled({2, 8, 9} if rank else (), "loss alone"):
        train(sys.argv[1], sys.argv[2], recipe)
except FloatingPointError as error:
    os.write(1, f"{rank} {error}\\n".encode())  # at once: the other process writes here too
"""


def test_processes_agree_when_one_of_them_has_a_bad_loss(lake: Lake, tmp_path: Path) -> None:
    run, code = tmp_path / "run", tmp_path / "program.py"
    code.write_text(PROGRAM)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", str(code)]
    done = subprocess.run(
        [*launch, str(lake.root), str(run)], text=True, capture_output=True, env=environment(), timeout=120
    )
    assert done.returncode == 0, done.stderr
    for rank in "01":
        assert f"{rank} the loss or its gradient is not finite at step 9" in done.stdout
    assert skipped(run) == [2, 8]
    assert Run(run).steps() == [3, 6]
    assert finite(weights(run))
    train(lake.root, run, override(RECIPE, {"steps": 12}))
    assert Run(run).steps()[-1] == 12


@pytest.mark.parametrize("kind", SPOIL)
def test_a_codecs_training_skips_and_ends_alike(tmp_path: Path, kind: str) -> None:
    torch.manual_seed(0)
    network = nn.Linear(4, 4)
    recipe = CodecRecipe(save_every=3)

    def loss(bad: Container[int]) -> Callable[[int], dict[str, Tensor]]:
        def of(step: int) -> dict[str, Tensor]:
            value = network(torch.linspace(-1, 1, 4)).square().mean()
            return {"loss": SPOIL[kind](value) if step + 1 in bad else value}

        return of

    with pytest.raises(FloatingPointError, match=r"step 21 .* 11 steps in a row where 10 are allowed"):
        Stage("vae", network, 60, 1e-2, loss({3, *range(11, 60)})).train(tmp_path, recipe)
    run = Run(tmp_path / "vae")
    assert run.steps() == [9]
    assert json.loads((run.checkpoint() / "state.json").read_text())["average_updates"] == 8
    Stage("vae", network, 60, 1e-2, loss({60})).train(tmp_path, recipe)
    assert run.steps() == [60]
    assert finite(weights(tmp_path / "vae"))
    loss = logged(tmp_path / "vae", "loss")
    assert set(loss) == {50, 60}, "means over the steps that were applied"
    assert 0 < loss[60] < loss[50] < 1
    assert skipped(tmp_path / "vae") == [3, *range(11, 21), 60]
