"""The same batch is the same loss on any number of processes: real ones over gloo, against one."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from model.settings import override
from model.stop import STOPPED
from model.train import train
from model.training.checkpoint import Run
from model.training.log import Log
from storage.layout import Lake
from tests.model.test_train import TINY, environment, logged
from tests.model.tiny_lake import make_lake

BASE = {
    "depth": 1, "batch": 6, "steps": 20, "checkpoint_every": 10, "validate_every": 10, "learning_rate_decay": 0.0,
    "error_focus": 1.0, "clip_start_dropout": 0.5, "spike_factor": 0.0,
}  # fmt: skip
"""Everything that is drawn, everything that is normalised over a batch; 1, 2 and 3 processes divide it."""
VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "float64": {"precision": "float64", "start_anywhere": 0.3},
    "muon": {"precision": "float64", "matrix_learning_rate": 1e-3, "steps": 6},
    "per_frame": {"precision": "float64", "method": "per_frame", "steps": 6},
    "grams": {"precision": "float64", "optimizer": "grams", "steps": 6},
    "grams32": {"optimizer": "grams"},
    "float32": {},
}
PROGRAM = """
import json, os, signal, sys
import torch, torch.distributed as dist
from model.methods.vlfm import VLFM
from model.settings import override
from model.stop import STOPPED, Stopped
from model.train import train
from model.training.log import Log
from model.training.processes import end_program
from tests.model.test_exact import in_full
from tests.model.test_train import TINY
lake, asked, folder = sys.argv[1:]
rank = os.environ["RANK"]
dist.init_process_group("gloo")  # once for all trainings
dist.init_process_group = dist.destroy_process_group = lambda *given: None
inner, loss = VLFM.prepare, VLFM.loss
def prepare(*given):
    with open(f"{folder}/prepared-{rank}", "a") as file:
        file.write("x")
    return inner(*given)
VLFM.prepare, Log.scalars = prepare, in_full
def interrupted(self, *given):
    if not torch.is_grad_enabled() and rank == "1":
        os.kill(os.getpid(), signal.SIGTERM)
    return loss(self, *given)
status = 0
for run, settings in json.loads(asked):
    if run.endswith("stopped"):
        VLFM.loss = interrupted
    try:
        train(lake, run, override(TINY, settings))
    except Stopped:
        status = STOPPED
end_program(status)
"""
"""One process of several, which train the runs asked for one after the other; one called "stopped" gets a signal in the
second process's share of a validation."""
LAUNCH = "import sys; from model.training.launch import launch; sys.exit(launch(sys.argv[2:], int(sys.argv[1])))"


@pytest.fixture(scope="module")
def lake(tmp_path_factory: pytest.TempPathFactory) -> Lake:
    """Epochs end within steps, and the validation's batches cannot be shared out evenly."""
    return make_lake(tmp_path_factory.mktemp("exact") / "lake", clips=7, validation=37)


def in_full(log: Log, step: int, **values: float) -> None:
    """Writes the log with all digits: usually it has six."""
    log.event(step=step, **values)


def trained(lake: Lake, run: Path, variant: str) -> None:
    """Trains in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Log, "scalars", in_full)
        train(lake.root, run, override(TINY, settings(variant)))


def settings(variant: str) -> dict[str, Any]:
    return {**BASE, **VARIANTS[variant]}


def on_processes(count: int, lake: Lake, folder: Path, runs: Mapping[str, Mapping[str, Any]]) -> int:
    """Trains runs in the folder, by their names; returns the exit status."""
    folder.mkdir(exist_ok=True)
    program = folder / "program.py"
    program.write_text(PROGRAM)
    asked = json.dumps([(str(folder / name), dict(values)) for name, values in runs.items()])
    command = [sys.executable, "-c", LAUNCH, str(count), sys.executable, str(program), str(lake.root), asked]
    done = subprocess.run([*command, str(folder)], env=environment(), capture_output=True, text=True, timeout=400)
    assert done.returncode in (0, STOPPED), done.stderr
    return done.returncode


@pytest.fixture(scope="module")
def one(lake: Lake, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    for variant in VARIANTS:
        trained(lake, folder / variant, variant)
    return folder


@pytest.fixture(scope="module")
def two(lake: Lake, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    stopped = {**settings("float32"), "validate_every": 2}
    status = on_processes(2, lake, folder, {**{v: settings(v) for v in VARIANTS}, "stopped": stopped})
    assert status == STOPPED
    return folder


def half(two: Path, folder: Path) -> Path:
    """A copy of a run of two processes as it was after half of its steps."""
    shutil.copytree(two / "float64", folder)
    shutil.rmtree(Run(folder).folder(20))
    return folder


@pytest.fixture(scope="module")
def three(lake: Lake, two: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("three")
    half(two, folder / "resumed")
    assert on_processes(3, lake, folder, {"float64": settings("float64"), "float32": settings("float32"),
                                          "resumed": settings("float64")}) == 0  # fmt: skip
    return folder


def check_alike(one: Path, other: Path, tolerance: float) -> None:
    for name in ("loss", "mean", "derivative", "velocity", "gradient_norm", "validation_loss"):
        ours, theirs = logged(one, name), logged(other, name)
        assert ours.keys() == theirs.keys()
        assert list(theirs.values()) == pytest.approx(list(ours.values()), rel=tolerance), name
    assert len(set(ours.values())) == len(ours) > 0


@pytest.mark.parametrize(
    ("variant", "tolerance"),
    [("float64", 1e-10), ("muon", 1e-10), ("per_frame", 1e-10), ("grams", 1e-10), ("float32", 1e-5)],
)
def test_two_processes_have_the_losses_of_one(one: Path, two: Path, variant: str, tolerance: float) -> None:
    check_alike(one / variant, two / variant, tolerance)


def test_grams_on_two_processes_begins_alike_and_its_curve_is_that_of_one(one: Path, two: Path) -> None:
    """Its steps have the signs of the gradient's entries: in float32 those near zero turn with the rounding."""
    for name in ("loss", "gradient_norm"):
        ours, theirs = (list(logged(folder / "grams32", name).values()) for folder in (one, two))
        assert theirs[0] == pytest.approx(ours[0], rel=1e-5)
        apart = max(abs(other / value - 1) for value, other in zip(ours, theirs, strict=True))
        print(f"{name}: first {abs(theirs[0] / ours[0] - 1):.1e}, most {apart:.1e} apart over {len(ours)} steps")
        assert apart < 0.02


@pytest.mark.parametrize(("variant", "tolerance"), [("float64", 1e-10), ("float32", 1e-5)])
def test_three_processes_have_the_losses_of_one(one: Path, three: Path, variant: str, tolerance: float) -> None:
    check_alike(one / variant, three / variant, tolerance)


def test_a_run_of_two_goes_on_with_one_and_with_three(
    lake: Lake, one: Path, two: Path, three: Path, tmp_path: Path
) -> None:
    run = half(two, tmp_path / "resumed")
    trained(lake, run, "float64")
    for resumed in (run, three / "resumed"):
        check_alike(one / "float64", resumed, 1e-10)
        starts = [line["step"] for line in map(json.loads, (resumed / "log.jsonl").read_text().splitlines())
                  if line.get("event") == "start"]  # fmt: skip
        assert starts == [0, 10]


def test_a_signal_to_one_process_in_its_share_of_a_validation_stops_all(two: Path) -> None:
    assert Run(two / "stopped").steps() == [3]
    assert logged(two / "stopped", "validation_loss") == {}


def test_the_first_process_alone_measures_a_new_run(two: Path, three: Path) -> None:
    assert len((two / "prepared-0").read_text()) == len(VARIANTS) + 1
    assert len((three / "prepared-0").read_text()) == 2, "a resumed run measures nothing"
    assert not [path for folder in (two, three) for path in folder.glob("prepared-[12]")]
