"""What can happen to a run's folder: damaged checkpoints, a second trainer, a kill, a full disk. No run is lost."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from model import sample
from model.settings import override
from model.train import main, train
from model.training.checkpoint import DamagedCheckpoint, Run
from model.training.integrity import CHECKSUMS, FILES, damage
from model.training.log import read_log
from storage.layout import Lake
from tests.model.test_train import TINY, command, environment, weights
from tests.model.tiny_lake import make_lake

RECIPE = override(TINY, {"steps": 6, "checkpoint_every": 2, "validate_every": 8, "learning_rate_decay": 0.0})
FURTHER = override(RECIPE, {"steps": 8})


@pytest.fixture(scope="module")
def lake(tmp_path_factory: pytest.TempPathFactory) -> Lake:
    return make_lake(tmp_path_factory.mktemp("damage") / "lake")


@pytest.fixture(scope="module")
def whole(lake: Lake, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps with checkpoints of steps 4 and 6."""
    run = tmp_path_factory.mktemp("whole") / "run"
    train(lake.root, run, RECIPE)
    return run


@pytest.fixture(scope="module")
def further(lake: Lake, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The weights of a run of eight steps."""
    run = tmp_path_factory.mktemp("further") / "run"
    train(lake.root, run, FURTHER)
    return weights(run)


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    shutil.copytree(whole, tmp_path / "run")
    return tmp_path / "run"


# --- damaged checkpoints ---


def flipped(name: str, place: int) -> Callable[[Path], None]:
    """One bit of a file of the newest checkpoint; `place` counts from the end where it is negative."""

    def do(checkpoints: Path) -> None:
        path = checkpoints / "step-00000006" / name
        data = bytearray(path.read_bytes())
        data[place] ^= 4
        path.write_bytes(data)

    return do


def cut(name: str, share: float) -> Callable[[Path], None]:
    def do(checkpoints: Path) -> None:
        path = checkpoints / "step-00000006" / name
        os.truncate(path, int(share * path.stat().st_size))

    return do


def gone(*names: str, step: int = 6) -> Callable[[Path], None]:
    return lambda checkpoints: [(checkpoints / f"step-{step:08d}" / name).unlink() for name in names] and None


SIX = "step-00000006 is damaged"
DAMAGES: dict[str, tuple[Callable[[Path], object], int, str]] = {
    "weights cut": (cut("backbone.safetensors", 0.5), 4, rf"{SIX} \(backbone.safetensors is not what was written"),
    "average cut by a byte": (cut("average.safetensors", 0.9999), 4, rf"{SIX} \(average.safetensors is not what"),
    "optimizers empty": (cut("optimizers.safetensors", 0), 4, rf"{SIX} \(optimizers.safetensors is not what"),
    "state cut": (cut("state.json", 0.5), 4, rf"{SIX} \(it cannot be read: "),
    "checksums cut": (cut(CHECKSUMS, 0.4), 4, rf"{SIX} \("),
    "weights gone": (gone("backbone.safetensors"), 4, rf"{SIX} \(backbone.safetensors is missing\)"),
    "state gone": (gone("state.json"), 4, rf"{SIX} \(state.json is missing\)"),
    "checksums gone": (gone(CHECKSUMS), 4, rf"{SIX} \({CHECKSUMS} is missing\)"),
    "all gone": (gone(*FILES, CHECKSUMS), 4, rf"{SIX} \(backbone.safetensors and .* are missing\)"),
    "bit in the average": (flipped("average.safetensors", -99), 4, rf"{SIX} \(average.safetensors is not what"),
    "bit in a header": (flipped("optimizers.safetensors", 20), 4, rf"{SIX} \(optimizers.safetensors is not what"),
    "bit in the checksums": (flipped(CHECKSUMS, 0), 4, rf"{SIX} \(backbone.safetensors is not what"),
    "bit in the state": (flipped("state.json", -40), 4, rf"{SIX} \("),
    "files of another step": (
        lambda c: shutil.copy(c / "step-00000004/backbone.safetensors", c / "step-00000006"), 4,
        rf"{SIX} \(backbone.safetensors is not what",
    ),
    "another name": (
        lambda c: (c / "step-00000006").rename(c / "step-00000009"), 4,
        r"step-00000009 is damaged \(it is of step 6\)",
    ),
    "older half deleted": (
        gone("average.safetensors", "state.json", step=4), 6,
        r"step-00000004 is damaged \(average.safetensors and state.json are missing\)",
    ),
    "stray folder": (lambda c: (c / "step-abc").mkdir(), 6, "step-abc is no checkpoint"),
    "stray copy": (lambda c: (c / "step-000010.tmp").mkdir(), 6, "step-000010.tmp is no checkpoint"),
    "a file": (lambda c: (c / "step-00000007").write_text(""), 6, r"step-00000007 is damaged \(.* are missing\)"),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_checkpoint_costs_the_steps_since_the_one_before(
    lake: Lake, run: Path, further: dict[str, torch.Tensor], kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    do, step, told = DAMAGES[kind]
    do(run / "checkpoints")
    assert Run(run).checkpoint().name == f"step-{step:08d}", "sampling takes the newest whole one"
    assert capsys.readouterr().err.count("\n") == (step == 4 or kind == "a file"), "older ones are not its concern"
    train(lake.root, run, FURTHER)
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 1
    (warning,) = warnings
    assert warning.endswith(f"; training goes on from step {step}")
    assert re.search(told, warning), warning
    found = weights(run, 8)
    assert all(torch.equal(found[name], value) for name, value in further.items())
    assert all(not damage(Run(run).folder(step)) for step in Run(run).steps())
    train(lake.root, run, FURTHER)
    assert Run(run).steps()[-1] == 8


def test_a_damaged_checkpoint_that_is_asked_for_is_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flipped("average.safetensors", -99)(run / "checkpoints")
    asked = ["--run", str(run), "--prompt", "square 1 slides over grey", "--duration", "0.1", "--steps", "1"]
    assert sample.main([*asked, "--step", "6", "--out", str(run / "a.png")]) == 1
    told = capsys.readouterr().err
    assert re.fullmatch(
        r"error: .*step-00000006 is damaged \(average.safetensors is not .*\); restore it, or .*\n", told
    )
    assert sample.main([*asked, "--out", str(run / "a.png")]) == 0
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert re.match(r"warning: .*step-00000006 is damaged \(average.safetensors is .*\); step 4 is used", told)


def test_where_none_is_whole_nothing_is_touched(lake: Lake, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gone("state.json")(run / "checkpoints")
    gone("average.safetensors", step=4)(run / "checkpoints")
    for go_on in (lambda: train(lake.root, run, FURTHER), lambda: Run(run).checkpoint()):
        with pytest.raises(
            DamagedCheckpoint, match=r"no whole checkpoint: step-00000006 .*, step-00000004 .*; restore"
        ):
            go_on()
    assert Run(run).steps() == [4, 6]
    assert capsys.readouterr().err == ""


def test_checkpoints_of_before_without_checksums_are_read(
    lake: Lake, run: Path, further: dict[str, torch.Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (4, 6):
        folder = Run(run).folder(step)
        (folder / CHECKSUMS).unlink()
        plain = json.loads((folder / "state.json").read_text())
        del plain["format"]
        (folder / "state.json").write_text(json.dumps(plain))
    cut("backbone.safetensors", 0.9)(run / "checkpoints")
    train(lake.root, run, FURTHER)
    assert "step-00000006 is damaged (it cannot be read: " in capsys.readouterr().err
    found = weights(run)
    assert all(torch.equal(found[name], value) for name, value in further.items())


# --- one trainer at a time ---


def test_a_second_trainer_is_refused(lake: Lake, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Alone or as several processes; that a kill releases the folder is seen below."""
    before = weights(run)
    told = rf"error: .*run is in use by process {os.getpid()}; wait until that run ends, or stop it\n"
    with Run(run).lock():
        assert main(command(lake, run, "--set=steps=8")[2:]) == 1
        assert re.fullmatch(told, capsys.readouterr().err)
        several = [sys.executable, *command(lake, run, "--set=steps=8", "--processes=2")]
        second = subprocess.run(several, env=environment(), capture_output=True, text=True)
        assert second.returncode == 1
        assert re.fullmatch(told, second.stderr), second.stderr
    assert all(torch.equal(value, before[name]) for name, value in weights(run).items())


# --- each step once ---


def board_steps(run: Path, name: str) -> list[int]:
    """The steps of a scalar that TensorBoard shows."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return [event.step for event in events.Scalars(name)]


KILLED = """
import os, sys
from model.train import train
from tests.model.test_damage import FURTHER
from tests.model.test_stop import Interrupted
from tests.model.wrapped_method import vlfm_wrapped
import signal
Interrupted.signals = [signal.SIGKILL]
with vlfm_wrapped(lambda method: Interrupted(method, step=8)):
    train(sys.argv[1], sys.argv[2], FURTHER)
"""


def test_after_a_kill_each_step_stands_once(lake: Lake, tmp_path: Path) -> None:
    run, code = tmp_path / "run", tmp_path / "killed.py"
    code.write_text(KILLED)
    killed = subprocess.run([sys.executable, str(code), str(lake.root), str(run)], env=environment())
    assert killed.returncode == -signal.SIGKILL
    assert [line["step"] for line in read_log(run / "log.jsonl") if "loss" in line] == [1, 2, 3, 4, 5, 6, 7]
    with open(run / "log.jsonl", "a") as log:
        log.write('{"step": 8, "lo')  # torn
    time.sleep(1.1)  # TensorBoard orders files by the second in their names
    train(lake.root, run, FURTHER)
    assert [line["step"] for line in read_log(run / "log.jsonl") if "loss" in line] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [line["step"] for line in read_log(run / "log.jsonl") if line.get("event") == "start"] == [0, 6]
    assert all(json.loads(line) for line in (run / "log.jsonl").read_text().splitlines())
    assert board_steps(run, "train/loss") == [1, 2, 3, 4, 5, 6, 7, 8]


# --- a full disk ---


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 8 MiB of its own, or a skip where this user may not mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    if (mounted := subprocess.run(mount, capture_output=True, text=True)).returncode:
        pytest.skip(f"no small disk to fill: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("share", [0.3, 0.9])
def test_a_full_disk_is_one_line_and_the_last_checkpoint_stays(
    lake: Lake, run: Path, small_disk: Path, share: float, capsys: pytest.CaptureFixture[str]
) -> None:
    """There is room for such a share of a checkpoint."""
    more = ["--set=checkpoint_every=2", "--set=learning_rate_decay=0"]
    shutil.copytree(run, small_disk / "run")
    left = int(share * sum(path.stat().st_size for path in Run(run).folder(6).iterdir()))
    (small_disk / "filler").write_bytes(b"0" * (shutil.disk_usage(small_disk).free - left))
    assert main(command(lake, small_disk / "run", *more, "--set=steps=8")[2:]) == 1
    told = capsys.readouterr().err
    errors = [line for line in told.splitlines() if not line.startswith("train ")]
    assert len(errors) == 1, told
    assert re.match(
        r"error: .*the disk is full \(\d+ bytes free\); make room and run the same command again", errors[0]
    )
    found = Run(small_disk / "run")
    assert (found.steps(), damage(found.folder(6))) == ([4, 6], "")
    assert not list((small_disk / "run" / "checkpoints").glob(".part*"))
    (small_disk / "filler").unlink()
    assert main(command(lake, small_disk / "run", *more, "--set=steps=7")[2:]) == 0


# --- kills ---


def test_no_kill_makes_a_run_unusable(tmp_path: Path) -> None:
    """Six at random moments; `python tests/bench/kills.py FOLDER --kills 100` for more."""
    program = [sys.executable, str(Path(__file__).parents[1] / "bench" / "kills.py"), str(tmp_path), "--kills=6"]
    done = subprocess.run(program, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.search(r"6 kills, 0 unusable, [1-9]\d* steps", done.stdout)
