"""A stop leaves a checkpoint and ends with a status of its own: real signals to real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from flows import cli, demo
from model import stop as module
from model.settings import override
from model.stop import STOPPED, Stopped, StopSignal
from model.train import main, train
from model.training.checkpoint import Run
from model.training.launch import launch
from model.training.objective import Objective
from storage.layout import Lake
from tests.model.test_train import TINY, command, environment, logged, weights
from tests.model.tiny_lake import make_lake
from tests.model.wrapped_method import Wrapper, vlfm_wrapped

STEADY = "--set=learning_rate_decay=0"
"""So that a step does not depend on how many there are."""
ENDLESS = ["--set=steps=100000", "--set=checkpoint_every=100000", "--set=validate_every=100000", STEADY]
MARK = "VLFM_TEST_RUN"


@pytest.fixture(scope="module")
def lake(tmp_path_factory: pytest.TempPathFactory) -> Lake:
    return make_lake(tmp_path_factory.mktemp("stop") / "lake")


class Program:
    """A program in a process group of its own, and all that it started."""

    def __init__(self, words: list[str]) -> None:
        self.mark = uuid.uuid4().hex
        self.process = subprocess.Popen(
            [sys.executable, *words], env={**environment(), MARK: self.mark}, text=True, start_new_session=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )  # fmt: skip

    def left(self) -> list[int]:
        """Processes of the program that are still there."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                there = f"{MARK}={self.mark}".encode() in (folder / "environ").read_bytes()
                state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
            except OSError:
                continue
            if there and state != "Z":
                found.append(int(folder.name))
        return found

    def wait_for_steps(self, run: Path, steps: int = 2) -> None:
        """Until the run has logged some steps."""
        deadline = time.monotonic() + 120
        while not ((run / "log.jsonl").exists() and len(logged(run, "loss")) >= steps):
            assert self.process.poll() is None, self.process.communicate()[1]
            assert time.monotonic() < deadline, "no step was made"
            time.sleep(0.05)

    def end(self) -> tuple[int, str]:
        """Exit status and what went to stderr."""
        _, told = self.process.communicate(timeout=90)
        return self.process.returncode, told

    def gone_within(self, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while self.left() and time.monotonic() < deadline:
            time.sleep(0.1)
        return not self.left()


@contextmanager
def program(*words: str) -> Iterator[Program]:
    started = Program(list(words))
    try:
        yield started
    finally:
        for process in started.left():
            os.kill(process, signal.SIGKILL)
        started.process.communicate(timeout=30)


def resume(lake: Lake, run: Path) -> int:
    """The exit status of going on for two more steps, to the end."""
    step = Run(run).steps()[-1]
    words = command(lake, run, f"--set=steps={step + 2}", STEADY)[2:]
    status = main(words)
    assert Run(run).steps()[-1] == step + 2
    return status


# --- the cases: signal, to whom, how many loader workers ---


TERM, INT = signal.SIGTERM, signal.SIGINT
CASES = [
    *((way, number, workers) for way in ("process", "group") for number in (TERM, INT) for workers in (0, 2)),
    # Two processes, with a worker each or none.
    ("launcher", TERM, 1), ("launcher", INT, 0), ("launcher's group", TERM, 0), ("launcher's group", INT, 1),
]  # fmt: skip


@pytest.mark.parametrize(("way", "number", "workers"), CASES, ids=lambda value: str(getattr(value, "name", value)))
def test_a_stop_leaves_a_checkpoint(lake: Lake, tmp_path: Path, way: str, number: signal.Signals, workers: int) -> None:
    run = tmp_path / "run"
    processes = ["--processes=2"] if way.startswith("launcher") else []
    words = command(lake, run, *ENDLESS, f"--set=loader_workers={workers}", *processes)
    with program(*words) as running:
        running.wait_for_steps(run)
        sent = time.monotonic()
        if way.endswith("group"):
            os.killpg(running.process.pid, number)
        else:
            running.process.send_signal(number)
        status, told = running.end()
        waited = time.monotonic() - sent
        assert status == STOPPED, told
        assert "Traceback" not in told
        assert told.count("with a checkpoint; the same command goes on") == 1
        assert waited < 60
        assert running.gone_within(20), running.left()
    assert Run(run).steps()[-1] == max(logged(run, "loss"))
    assert all(torch.isfinite(value).all() for value in weights(run).values())
    assert resume(lake, run) == 0
    if not processes:
        recipe = override(TINY, {"steps": Run(run).steps()[-1], "learning_rate_decay": 0.0})
        train(lake.root, tmp_path / "undisturbed", recipe)
        expected = weights(tmp_path / "undisturbed")
        assert all(torch.equal(value, expected[name]) for name, value in weights(run).items()), "bit by bit"


def test_torchrun_leaves_a_checkpoint_too(lake: Lake, tmp_path: Path) -> None:
    """Its own status is 1 with a traceback of its own, whatever its processes do; theirs is none."""
    run = tmp_path / "run"
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    with program(*torchrun, *command(lake, run, *ENDLESS, "--set=loader_workers=1")) as running:
        running.wait_for_steps(run)
        os.killpg(running.process.pid, signal.SIGTERM)
        status, told = running.end()
        assert status == 1
        assert told.count("Traceback") == 1
        assert "SignalException" in told
        assert "with a checkpoint; the same command goes on" in told
        assert running.gone_within(20), running.left()
    step = Run(run).steps()[-1]
    assert resume(lake, run) == 0
    # Finished and started again, all is well.
    words = command(lake, run, f"--set=steps={step + 2}", STEADY)
    done = subprocess.run([sys.executable, *torchrun, *words], env=environment(), capture_output=True, text=True)
    assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr


# --- early, and with no time to do anything ---


def test_a_signal_while_libraries_are_imported_waits(lake: Lake, tmp_path: Path) -> None:
    run = tmp_path / "run"
    vlfm = ["-c", "import sys; from flows.cli import main; sys.exit(main())", "train"]
    words = [word.replace("--run-dir", "--run") for word in command(lake, run, *ENDLESS)[2:]]
    with program(*vlfm, *words) as running:
        held = 1 << (signal.SIGTERM - 1)
        status_file = Path(f"/proc/{running.process.pid}/status")
        while not int(status_file.read_text().split("SigBlk:")[1].split()[0], 16) & held:
            assert running.process.poll() is None
        running.process.send_signal(signal.SIGTERM)
        status, told = running.end()
    assert status == STOPPED, told
    assert told.strip() == "stopped before the first step; the same command goes on"


def test_a_launcher_stops_processes_that_have_only_begun(lake: Lake, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with program(*command(lake, run, *ENDLESS, "--processes=2")) as running:
        while len(running.left()) < 3:
            assert running.process.poll() is None
        os.killpg(running.process.pid, signal.SIGINT)
        status, told = running.end()
    assert status == STOPPED, told
    assert told.strip() == "stopped before the first step; the same command goes on"


@pytest.mark.parametrize("launcher", ["--processes", "torchrun"])
def test_nothing_outlives_a_launcher_that_is_killed(lake: Lake, tmp_path: Path, launcher: str) -> None:
    run = tmp_path / "run"
    words = command(lake, run, *ENDLESS, "--set=loader_workers=1")
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    with program(*([*torchrun, *words] if launcher == "torchrun" else [*words, "--processes=2"])) as running:
        running.wait_for_steps(run)
        assert len(running.left()) >= 5
        running.process.kill()
        assert running.gone_within(20), running.left()


def test_a_process_that_fails_ends_the_others_with_its_status(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("model.training.launch.GRACE", 0.5)
    code = "import os, sys, time; time.sleep(0 if os.environ['RANK'] == '1' else 1000); sys.exit(7)"
    began = time.monotonic()
    assert launch([sys.executable, "-c", code], 2) == 7
    assert time.monotonic() - began < 60
    assert capfd.readouterr().err == ""
    assert launch([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"], 1) == 128 + 9
    said = "error: SIGKILL ended one of the 1 processes (out of memory?); run it again: it goes on from its newest"
    assert capfd.readouterr().err.startswith(said)
    assert launch([sys.executable, "-c", ""], 2) == 0


@pytest.mark.parametrize(
    ("processes", "message"),
    [("0", "--processes is 0; it must be at least 1"), ("3", "batch 4 is no multiple of the 3 processes")],
)
def test_a_wrong_number_of_processes_is_one_line(
    lake: Lake, tmp_path: Path, processes: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command(lake, tmp_path / "run")[2:], f"--processes={processes}"]) == 1
    told = capsys.readouterr().err
    assert told.startswith(f"error: {message}")
    assert told.count("\n") == 1
    assert not (tmp_path / "run").exists()


# --- when in a run: signals to this process ---


class Interrupted(Wrapper):
    """VLFM that sends this process a signal at a moment of its own: at a step, or in the first validation."""

    signals: ClassVar = (signal.SIGTERM, signal.SIGINT, signal.SIGTERM)

    def __init__(self, method: Any, step: int = 0, validating: bool = False) -> None:
        super().__init__(method)
        self.step, self.validating, self.calls = step, validating, 0

    def loss(self, backbone: nn.Module, batch: Any, draws: Any) -> dict[str, torch.Tensor]:
        self.calls += torch.is_grad_enabled()
        if self.calls == self.step if torch.is_grad_enabled() else self.validating:
            for number in self.signals:
                os.kill(os.getpid(), number)
        losses: dict[str, torch.Tensor] = self.method.loss(backbone, batch, draws)
        return losses


@pytest.fixture
def handlers() -> Iterator[None]:
    """After a stop the handlers stay; the other tests get theirs back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def whole(lake: Lake, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("whole") / "run"
    train(lake.root, run, TINY)
    return run


@pytest.mark.parametrize(
    ("moment", "message", "steps"),
    [({"step": 2}, "at step 2 with a checkpoint", [2]), ({"validating": True}, "at step 4 with", [3, 4])],
    ids=["in a step", "in validation"],
)
@pytest.mark.usefixtures("handlers")
def test_a_signal_in_the_run(
    lake: Lake, tmp_path: Path, whole: Path, moment: dict[str, Any], message: str, steps: list[int]
) -> None:
    """Repeated at once it is one signal; and the run goes on bit by bit."""
    run = tmp_path / "run"
    with vlfm_wrapped(lambda method: Interrupted(method, **moment)), pytest.raises(Stopped, match=message):
        train(lake.root, run, TINY)
    assert Run(run).steps() == steps
    train(lake.root, run, TINY)
    assert all(torch.equal(value, weights(whole)[name]) for name, value in weights(run).items())


@pytest.mark.usefixtures("handlers")
def test_a_signal_before_the_first_step(lake: Lake, tmp_path: Path) -> None:
    def make(method: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return method

    told = "stopped before the first step; the same command goes on"
    with vlfm_wrapped(make), pytest.raises(Stopped, match=told):
        train(lake.root, tmp_path / "run", TINY)
    assert Run(tmp_path / "run").steps() == []


@pytest.mark.usefixtures("handlers")
def test_a_signal_in_the_last_step_finishes(lake: Lake, tmp_path: Path) -> None:
    with vlfm_wrapped(lambda method: Interrupted(method, step=6)):
        made = train(lake.root, tmp_path / "run", TINY)
    assert made.name == "step-00000006"


@pytest.mark.usefixtures("handlers")
def test_a_signal_in_a_checkpoint(lake: Lake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = Path.rename

    def interrupted(self: Path, target: Path) -> Path:
        os.kill(os.getpid(), signal.SIGTERM)
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(Stopped, match="at step 4"):
        train(lake.root, tmp_path / "run", TINY)
    assert Run(tmp_path / "run").steps() == [3, 4]


@pytest.mark.usefixtures("handlers")
def test_only_a_later_ctrl_c_stops_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with StopSignal() as stop:
        for number in (signal.SIGINT, signal.SIGINT, signal.SIGTERM):
            os.kill(os.getpid(), number)
        assert stop.seen
    monkeypatch.setattr(module, "REPEATS_WITHIN", 0.0)
    os.kill(os.getpid(), signal.SIGTERM)  # however late
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
    before = signal.getsignal(signal.SIGINT)
    with StopSignal() as stop:
        assert signal.getsignal(signal.SIGINT) != before
    assert signal.getsignal(signal.SIGINT) == before, "without a signal all is as it was"


def test_outside_the_main_thread_nothing_is_remembered() -> None:
    seen = []

    def use() -> None:
        with StopSignal() as stop:
            seen.append(stop.seen)

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert seen == [False]


@pytest.mark.usefixtures("handlers")
def test_the_demo_does_not_go_on_with_half_a_model(
    lake: Lake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("PREFECT_SERVER_ANALYTICS_ENABLED", "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL"):
        monkeypatch.setenv(name, os.environ.get(name, "CRITICAL"))  # main() sets them where they are unset
    monkeypatch.setattr("flows.demo._ingest", lambda *_: (1, 0))
    inner = Objective.losses

    def interrupted(*given: Any) -> dict[str, torch.Tensor]:
        os.kill(os.getpid(), signal.SIGTERM)
        return inner(*given)

    monkeypatch.setattr(Objective, "losses", interrupted)
    out = tmp_path / "demo"
    base = out / demo._folder_name("films")
    base.mkdir(parents=True)
    (base / "lake").symlink_to(lake.root)
    assert cli.main(["demo", "--source", "films", "--out", str(out), "--steps", "3"]) == STOPPED
    assert "stopped at step 1 with a checkpoint; the same command goes on" in capsys.readouterr().err
    assert not (base / "report-1").exists()
