"""The flow `train`: the trainer as a process of its own, followed in Prefect's UI, and started again where it stopped.

The trainer ends with status 75 when something asked it to stop: its node is taken away, its pod is evicted. That is no
failure: it left a checkpoint, and the flow starts it again. A cancelled run passes the wish on and waits for the
checkpoint.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prefect import flow, get_run_logger
from prefect.artifacts import create_markdown_artifact, create_progress_artifact, update_progress_artifact
from prefect.runtime import flow_run
from prefect.states import Failed

from flows.artifacts import artifact_key, markdown_table
from flows.forms import AtLeast0, AtLeast1, TrainRecipeName, TrainSettings
from flows.steps import StepFailed, known_failures, step, without_traces
from model.recipes import train_recipe
from model.settings import override
from model.stop import STOPPED
from model.training.checkpoint import Run
from model.training.log import read_log

LONGEST = 30 * 24 * 3600.0  # seconds after which a run is given up; it goes on from its checkpoint when run again
GRACE = 25.0  # seconds that the trainer has for a checkpoint; Prefect's workers kill after 30
LOOK_EVERY = 5.0  # seconds between two looks at the trainer's log
TRAINER = """
import os, sys
from model.stop import end_with_parent, hold_signals
hold_signals()
end_with_parent(int(sys.argv.pop(1)))
from model.train import main
from model.training.processes import end_program
end_program(main())
"""
"""The trainer, which ends with the flow's process however that ends."""


def _run_name() -> str:
    return f"train-{Path(flow_run.parameters['run']).name or 'run'}"


@flow(name="train", flow_run_name=_run_name, validate_parameters=True, log_prints=False, timeout_seconds=LONGEST)
def train(
    lake: str,
    run: str,
    recipe: TrainRecipeName = "base",
    settings: TrainSettings | None = None,
    version: AtLeast1 | None = None,
    init_from: str | None = None,
    processes: AtLeast1 = 1,
    restarts: AtLeast0 = 3,
) -> Any:
    """Train a model on the shards of one version, resuming where the run stands.

    The result is a dictionary with the run's folder, its last step and its last values.

    Args:
        lake: Folder or s3:// address of the dataset.
        run: Folder of the run; an old one is resumed.
        recipe: The training recipe (model/recipes.py).
        settings: Single fields of the recipe to replace, such as {"steps": 2000}.
        version: Version of the dataset; the newest when left empty.
        init_from: An official DiT checkpoint, or the folder of another run, for the first weights.
        processes: Processes on the worker's machine, one for each GPU.
        restarts: How often the trainer is started again after it was asked to stop and left a checkpoint.
    """
    without_traces()
    chosen = settings.chosen() if settings else {}
    try:
        with known_failures():
            total = override(train_recipe(recipe), chosen).steps
        command = ["--lake", lake, "--run-dir", run, "--recipe", recipe, "--processes", str(processes)]
        command += [f"--set={name}={_text(value)}" for name, value in chosen.items()]
        command += [] if version is None else ["--version", str(version)]
        command += [] if init_from is None else ["--init-from", init_from]
        title = f"train {Path(run).name} to step {total}"
        return step(title, "train", lambda: _train(command, Path(run), total, restarts))
    except StepFailed as error:
        return Failed(message=str(error))


def _train(command: Sequence[str], folder: Path, total: int, restarts: int) -> dict[str, Any]:
    """Runs the trainer to its last step; its report.

    Raises:
        ValueError: it ended with an error, which is the message, or was stopped too often.
    """
    logger, key = get_run_logger(), artifact_key("train", str(folder), "progress")
    words = f"Steps of {folder}, of {total}"
    artifact: Any = create_progress_artifact(progress=_percent(folder, total), key=key, description=words)
    for attempt in range(restarts + 1):
        status, said = _follow(command, folder, total, artifact)
        if status == 0:
            break
        if status != STOPPED:
            raise ValueError(said or f"the trainer ended with status {status}; its words are in the worker's log")
        logger.warning(
            "the trainer was asked to stop and left a checkpoint (start %d of %d)", attempt + 1, restarts + 1
        )
    else:
        raise ValueError(f"the trainer was stopped {restarts + 1} times; run it again, it goes on from its checkpoint")
    last = _last_values(folder)
    create_markdown_artifact(
        training_summary(folder, last), artifact_key("train", str(folder), "summary"), f"Training of {folder.name}"
    )
    return {"run": str(folder), **last}


def _follow(command: Sequence[str], folder: Path, total: int, artifact: Any) -> tuple[int, str]:
    """Runs the trainer once, tells how it goes, and returns its status and the last line of what it said."""
    logger, told = get_run_logger(), -1.0
    with tempfile.TemporaryFile() as errors:
        program = [sys.executable, "-c", TRAINER, str(os.getpid()), *command]
        process = subprocess.Popen(program, stdin=subprocess.DEVNULL, stdout=errors, stderr=errors)
        try:
            while process.poll() is None:
                time.sleep(min(LOOK_EVERY, 0.5 if told < 0 else LOOK_EVERY))
                last = _last_values(folder)
                if last.get("step", -1) != told:
                    told = last.get("step", -1.0)
                    logger.info(
                        "%s", ", ".join(f"{name} {value:.4g}" for name, value in last.items() if name != "time")
                    )
                    update_progress_artifact(artifact, progress=_percent(folder, total))
        finally:
            if process.poll() is None:  # the run is cancelled, or too late
                process.terminate()
                try:
                    process.wait(timeout=GRACE)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
        update_progress_artifact(artifact, progress=_percent(folder, total))
        errors.seek(0)
        said = [line.strip() for line in errors.read().decode(errors="replace").splitlines() if line.strip()]
    return process.returncode, (said[-1].removeprefix("error: ") if said else "")


def _last_values(folder: Path) -> dict[str, float]:
    """The newest scalars in a run's log."""
    lines = [line for line in read_log(Run(folder).log) if "step" in line and "event" not in line]
    merged: dict[str, float] = {}
    for line in lines[-3:]:
        merged |= {name: value for name, value in line.items() if isinstance(value, int | float)}
    return merged


def _percent(folder: Path, total: int) -> float:
    done = max([*Run(folder).steps(), int(_last_values(folder).get("step", 0))], default=0)
    return round(100 * min(done, total) / total, 1)


def training_summary(folder: Path, last: Mapping[str, float]) -> str:
    """What a finished training tells: its last values, and where more is."""
    rows = [{"value": name, "last": f"{value:.6g}"} for name, value in last.items() if name != "time"]
    more = f"Curves: `tensorboard --logdir {folder}/tensorboard`. What it learned: the deployment `evaluate`."
    return f"# Training of {folder.name}\n\n{markdown_table(rows, ('value', 'last'))}\n\n{more}\n"


def _text(value: Any) -> str:
    """A setting as the command line takes it."""
    return value if isinstance(value, str) else json.dumps(value)
