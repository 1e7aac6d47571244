"""`lake-to-model` and `train` for real, at a tiny size: a lake, a model of its version, a report."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from model.training.checkpoint import Run
from model.training.log import read_log
from pipeline.corpus import make_corpus
from tests.flows.test_dataset import read
from tests.model.tiny_lake import make_lake

TINY = {"width": 32, "depth": 1, "heads": 2, "batch": 2, "steps": 4, "checkpoint_every": 2, "log_every": 1}


@pytest.fixture(scope="module")
def server() -> Iterator[None]:
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=180):
        yield


def test_a_lake_becomes_a_model_with_its_report(server: None, tmp_path: Path) -> None:
    from flows.chain import lake_to_model

    films, lake, runs = make_corpus(tmp_path / "films", films=2).parent, tmp_path / "lake", tmp_path / "runs"
    given: dict[str, Any] = {
        "data_recipe": "linear", "data_settings": {"size": [16, 16], "rate": 4.0},
        "train_recipe": "tiny_cpu", "train_settings": TINY,
    }  # fmt: skip
    found = lake_to_model(str(films), str(lake), str(runs), **given)
    assert (found["version"], Path(found["report"]).is_file()) == (1, True)
    assert Run(runs / "version-1").steps()[-1] == TINY["steps"]
    keys = {artifact["key"].split("-lake-")[0] for artifact in read("artifacts", {})}
    assert any(key.startswith("lake-to-model") for key in keys)


def test_a_new_versions_run_starts_from_the_newest_run_before_it(tmp_path: Path) -> None:
    from flows.chain import run_before

    for number, step in ((1, 8), (3, 4)):
        (tmp_path / f"version-{number}" / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
    (tmp_path / "version-4").mkdir()
    assert run_before(tmp_path, 5) == tmp_path / "version-3"
    assert run_before(tmp_path, 3) == tmp_path / "version-1"
    assert run_before(tmp_path, 1) is None


def test_a_trainer_that_was_stopped_is_started_again(server: None, tmp_path: Path) -> None:
    """SIGTERM to the trainer alone, as when its node is taken away: the flow goes on from the checkpoint."""
    from flows.training import train

    lake, run = make_lake(tmp_path / "lake", clips=4), tmp_path / "run"

    def stop_it() -> None:
        until = time.monotonic() + 120
        while not Run(run).log.is_file() and time.monotonic() < until:
            time.sleep(0.05)
        words = ["pgrep", "-P", str(os.getpid()), "-f", str(run)]
        for line in subprocess.run(words, capture_output=True, text=True).stdout.split():
            os.kill(int(line), signal.SIGTERM)

    stopper = threading.Thread(target=stop_it)
    stopper.start()
    found = train(str(lake.root), str(run), "tiny_cpu", {**TINY, "steps": 60, "checkpoint_every": 60}, restarts=2)
    stopper.join()
    assert found["step"] == 60
    begun = [line for line in read_log(Run(run).log) if line.get("event") == "start"]
    assert len(begun) == 2, "it was stopped once, and started again"


def test_a_trainer_that_cannot_work_is_one_line(server: None, tmp_path: Path) -> None:
    from flows.training import train

    state = train(str(tmp_path / "nowhere"), str(tmp_path / "run"), "tiny_cpu", return_state=True)
    assert state.type.value == "FAILED"
    assert "does not exist; make a lake with: vlfm ingest" in state.message
