"""The flow `lake-to-model`: a lake brought up to date, and a model brought up to date with its lake."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect import flow, get_run_logger
from prefect.artifacts import create_markdown_artifact
from prefect.runtime import flow_run
from prefect.states import Failed

from flows.artifacts import artifact_key
from flows.dataset import IngestFailed, ingest
from flows.evaluation import evaluate
from flows.forms import AtLeast1, DataRecipeName, DataSettings, TrainRecipeName, TrainSettings
from flows.training import train
from model.training.checkpoint import Run
from storage.address import last_name

LONGEST = 37 * 24 * 3600.0  # seconds after which a run is given up: an ingest, a training and an evaluation


def _lake_name() -> str:
    return f"{flow_run.flow_name}-{last_name(flow_run.parameters['lake']) or 'lake'}"


@flow(name="lake-to-model", flow_run_name=_lake_name, validate_parameters=True, timeout_seconds=LONGEST)
def lake_to_model(
    source: list[str] | str,
    lake: str,
    runs: str,
    captions: str | None = None,
    data_recipe: DataRecipeName = "demo",
    data_settings: DataSettings | None = None,
    train_recipe: TrainRecipeName = "base",
    train_settings: TrainSettings | None = None,
    processes: AtLeast1 = 1,
    ray_address: str | None = None,
) -> Any:
    """Refresh a lake, train on its newest version, evaluate, and publish the report.

    Each version has a run of its own, `runs`/version-<n>. A run that was interrupted goes on; the first run of a new
    version starts from the averaged weights of the run before it. What is done is not done again.

    Args:
        source: Folders of films, or tables with the columns file and caption.
        lake: Folder or s3:// address of the dataset; made when it is not there.
        runs: Folder of the training runs and their reports.
        captions: Table of captions with the columns file and caption.
        data_recipe: The data recipe.
        data_settings: Single fields of the data recipe to replace.
        train_recipe: The training recipe.
        train_settings: Single fields of the training recipe to replace.
        processes: Processes of the trainer, one for each GPU.
        ray_address: Address of a Ray cluster; without one, Ray is started on this machine for the ingest.
    """
    data = {"captions": captions, "recipe": data_recipe, "settings": data_settings, "ray_address": ray_address}
    refreshed: Any = ingest(source, lake, wait=True, return_state=True, **data)
    result: Any = refreshed.result(raise_on_failure=False)
    report = result.report if isinstance(result, IngestFailed) else result
    if isinstance(report, BaseException):
        raise report
    number = report["version"]
    if number is None or report["exit_status"] == 1:
        return Failed(message=f"there is nothing to train on: {report['lines'][-1]}")
    run = Path(runs) / f"version-{number}"
    before = run_before(Path(runs), number) if not Run(run).file.is_file() else None
    if before is not None:
        get_run_logger().info("the run of version %d starts from the weights of %s", number, before)
    trained: Any = train(
        lake,
        str(run),
        train_recipe,
        train_settings,
        version=number,
        init_from=None if before is None else str(before),
        processes=processes,
        return_state=True,
    )
    if not trained.is_completed():
        return Failed(message=f"training on version {number}: {trained.message}")
    out = Path(runs) / f"report-{number}"
    evaluated: Any = evaluate(lake, str(run), str(out), return_state=True)
    if not evaluated.is_completed():
        return Failed(message=f"evaluation of {run}: {evaluated.message}")
    found = evaluated.result()
    lines = [*report["lines"][-2:], f"run {run}" + (f", from the weights of {before}" if before else "")]
    text = "\n\n".join([f"# {last_name(lake)}, version {number}", *lines, "```text", "\n".join(found["lines"]), "```"])
    create_markdown_artifact(
        f"{text}\n\nThe report: `{found['report']}`\n",
        artifact_key("lake-to-model", lake, "summary"),
        f"From {last_name(lake)} to a model",
    )
    return {"version": number, "run": str(run), "report": found["report"], "lines": found["lines"]}


def run_before(runs: Path, number: int) -> Path | None:
    """The run of the newest earlier version that has a checkpoint."""
    for earlier in range(number - 1, 0, -1):
        run = runs / f"version-{earlier}"
        if Run(run).steps():
            return run
    return None
