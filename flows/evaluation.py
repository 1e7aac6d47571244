"""The flow `evaluate`: what a run has learned, measured, with the headline and the report's place in Prefect's UI."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect import flow
from prefect.artifacts import create_markdown_artifact
from prefect.runtime import flow_run
from prefect.states import Failed

from flows.artifacts import artifact_key
from flows.forms import AtLeast0, AtLeast1
from flows.steps import StepFailed, step, without_traces
from model.evaluate import evaluate as measure
from model.evaluation.headline import headline

LONGEST = 24 * 3600.0  # seconds after which a run is given up


def _run_name() -> str:
    return f"evaluate-{Path(flow_run.parameters['run']).name or 'run'}"


@flow(name="evaluate", flow_run_name=_run_name, validate_parameters=True, log_prints=False, timeout_seconds=LONGEST)
def evaluate(lake: str, run: str, out: str, clips: AtLeast1 = 16, shown: AtLeast0 = 6) -> Any:
    """Measure and show what a run has learned: report.html and metrics.json.

    The result is a dictionary with the report's path and the headline's lines.

    Args:
        lake: The lake that the run was trained on.
        run: Folder of the training run.
        out: Folder for the report.
        clips: Clips of each split to sample.
        shown: Clips with pictures in the report.
    """
    without_traces()

    def work() -> dict[str, Any]:
        found = measure(run, lake, out, most=clips, shown=shown)
        lines, report = headline(found), str((Path(out) / "report.html").resolve())
        told = "\n".join(["```text", *lines, "```"])
        text = f"# Evaluation of {Path(run).name}\n\n{told}\n\nThe report: `{report}`\n"
        create_markdown_artifact(text, artifact_key("evaluate", run, "summary"), f"Evaluation of {Path(run).name}")
        return {"report": report, "lines": lines}

    try:
        return step(f"evaluate {Path(run).name}", "evaluate", work)
    except StepFailed as error:
        return Failed(message=str(error))
