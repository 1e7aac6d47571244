"""The flows `ingest` and `refresh`: films and captions to the next version of a lake, step by step in Prefect's UI.

Each step is one Prefect task with a name people understand; the clips themselves are Ray's business (pipeline.runner),
never Prefect tasks. What is known to go wrong (a missing folder, a full disk, a lake in use) is one line, not a
traceback: the message of a failed state and the `error` of the report.

    prefect deployment run ingest/ingest --param source=films --param lake=lake
"""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from typing import Any, cast

from prefect import flow, get_run_logger
from prefect.artifacts import create_image_artifact, create_markdown_artifact, create_table_artifact
from prefect.client.schemas.objects import State
from prefect.runtime import flow_run
from prefect.states import Completed, Failed

from flows.artifacts import accounts_table, artifact_key, contact_sheet, data_address, lost_sheet, page, summary
from flows.forms import AtLeast0, AtLeast1, DataRecipeName, DataSettings
from flows.server import ServerError, start_server
from flows.steps import StepFailed, known_failures, step, without_traces
from model.logs import as_json, start_logging
from model.progress import Progress
from model.settings import override
from pipeline.ingest import IngestReport
from pipeline.ingest import ingest as pipeline_ingest
from pipeline.recipes import DataRecipe, recipe_named
from pipeline.sources.folders import Discovery
from storage.address import last_name
from storage.garbage import collect
from storage.layout import Lake, LakeBusy
from storage.version import load

Report = dict[str, Any]
"""JSON, as run_ingest says."""
Settings = dict[str, Any]
"""Fields of a recipe and their values."""
RunLogger = logging.Logger | logging.LoggerAdapter[logging.Logger]
Listener = Callable[[str, int, int], None]
"""Called with what is counted, how many are done, and how many there are."""

LONGEST = 7 * 24 * 3600.0
"""Seconds after which a run is given up: no run of a schedule may stay for ever, and no dataset takes a week."""

_caller: ContextVar[tuple[Listener | None, Discovery | None]] = ContextVar("caller", default=(None, None))
"""What the caller of run_ingest gave beside the flow's parameters."""


class IngestFailed(Exception):
    """The flow ended in the state Failed; `report` is what it would have returned."""

    def __init__(self, message: str, report: Report) -> None:
        super().__init__(message)
        self.report = report


def run_ingest(
    source: Sequence[str] | str,
    lake: str,
    captions: str | None = None,
    recipe: str = "demo",
    settings: Settings | None = None,
    limit: int | None = None,
    ray_address: str | None = None,
    columns: dict[str, str] | None = None,
    prune: bool = False,
    allow_outside: bool = False,
    table_format: str | None = None,
    report_file: str | None = None,
    latents: bool = False,
    workers: int = 0,
    send_code: bool = False,
    on_progress: Listener | None = None,
    found: Discovery | None = None,
) -> Report:
    """Calls the flow `ingest` in this process and returns its report, whatever state it ended in.

    The report is pipeline.ingest.report.IngestReport.to_json() with `lines` (text for people), `exit_status` (0, 3 or
    1) and, where the run could not be done, `error` (one line).

    Args:
        source, lake, captions, recipe, settings, limit, ray_address, columns, prune, allow_outside,
            table_format, report_file, latents, workers, send_code: the flow's.
        on_progress: told of films read and clips done; warnings are printed where it is given.
        found: what pipeline.sources.folders.discover found for these sources, where that was called already.

    Raises:
        Exception: whatever is no known failure.
    """
    token = _caller.set((on_progress, found))
    try:
        start_server()
        sources = [source] if isinstance(source, str) else list(source)
        given = (sources, lake, captions, recipe, settings, limit, ray_address)
        arguments = (*given, columns, prune, allow_outside, table_format, report_file)
        more = {"latents": latents, "workers": workers, "send_code": send_code}
        state = cast(State[Any], ingest(*arguments, **more, return_state=True))
    except ServerError as error:
        return _nothing(str(error), lake)
    finally:
        _caller.reset(token)
    report: Any = state.result(raise_on_failure=False)
    if isinstance(report, IngestFailed):
        return report.report
    if isinstance(report, BaseException):
        raise report
    return dict(report)


def _nothing(message: str, lake: str) -> Report:
    """The report of a run that could not be done."""
    lost = {"error": message, "lines": [message], "lake": lake, "version": None, "published": False}
    return {**lost, "exit_status": 1}


def _run_name() -> str:
    """`ingest-<source>-to-<lake>` (or refresh), by the last parts of their paths."""
    parameters = flow_run.parameters
    source = parameters["source"]
    sources = [source] if isinstance(source, str) else list(source)
    names = [Path(name).name or "folder" for name in sources[:1]] + [f"{len(sources) - 1}-more"] * (len(sources) > 1)
    return f"{flow_run.flow_name}-{'-and-'.join(names) or 'nothing'}-to-{last_name(parameters['lake']) or 'lake'}"


@flow(name="ingest", flow_run_name=_run_name, validate_parameters=True, log_prints=False, timeout_seconds=LONGEST)
def ingest(
    source: list[str] | str,
    lake: str,
    captions: str | None = None,
    recipe: DataRecipeName = "demo",
    settings: DataSettings | None = None,
    limit: AtLeast1 | None = None,
    ray_address: str | None = None,
    columns: dict[str, str] | None = None,
    prune: bool = False,
    allow_outside: bool = False,
    table_format: str | None = None,
    report_file: str | None = None,
    wait: bool = False,
    latents: bool = False,
    workers: AtLeast0 = 0,
    send_code: bool = False,
) -> Any:
    """Films and captions to the next version of a lake.

    The report (a dictionary, see run_ingest) is the flow's result. The state is Completed when all went well or no more
    films failed than the recipe tolerates; else Failed with one line (IngestFailed), what was good is published then.

    Args:
        source: Folders of films, read recursively, or tables (CSV, JSONL, Parquet) with the columns file and caption.
        lake: Folder or s3:// address of the dataset; made when it is not there.
        captions: Table of captions with the columns file and caption, for films in folders.
        recipe: The data recipe (pipeline/recipes.py).
        settings: Single fields of the recipe to replace, such as {"rate": 8}.
        limit: Only this many films, the first by name.
        ray_address: Address of a Ray cluster; without one, Ray is started on this machine for the run.
        columns: The tables' own names for file, caption, start and end, where they differ.
        prune: Takes films out of the dataset that the sources had and have no longer.
        allow_outside: Reads films that links or '..' reach outside their source.
        table_format: Name of the dataset whose published annotation file the table is, such as kinetics.
        report_file: An HTML file to write the report to, with frames of what is in the dataset and of what is not.
        wait: While another run writes to this lake, wait for its turn, in order of arrival; else fail at once.
        latents: The sources hold files of latents (safetensors) in the place of films; they are only projected.
        workers: Ask the cluster for so many workers though it has no room for all yet; an autoscaler makes room.
        send_code: Give the cluster's nodes this project's code from the worker's machine.
    """
    how: dict[str, Any] = {
        "columns": columns,
        "prune": prune,
        "allow_outside": allow_outside,
        "table_format": table_format,
        "report_file": report_file,
        "wait": wait,
        "latents": latents,
        "workers": workers,
        "send_code": send_code,
    }
    found = _attempt(source, lake, captions, recipe, settings, limit, ray_address, **how)
    return found if isinstance(found, dict) else Failed(message=str(found), data=found)


@flow(name="refresh", flow_run_name=_run_name, validate_parameters=True, log_prints=False, timeout_seconds=LONGEST)
def refresh(
    source: list[str] | str,
    lake: str,
    captions: str | None = None,
    recipe: DataRecipeName = "demo",
    settings: DataSettings | None = None,
    ray_address: str | None = None,
    columns: dict[str, str] | None = None,
    prune: bool = False,
    allow_outside: bool = False,
    table_format: str | None = None,
    keep_versions: AtLeast1 | None = None,
    latents: bool = False,
    workers: AtLeast0 = 0,
    send_code: bool = False,
) -> Any:
    """Bring a lake up to date on a schedule: a version is published only when something changed.

    While another run writes to the lake nothing is done: the state is Completed, by the name of Skipped. Else as
    `ingest`.

    Args:
        source: Folders of films, read recursively, or tables (CSV, JSONL, Parquet) with the columns file and caption.
        lake: Folder or s3:// address of the dataset; made when it is not there.
        captions: Table of captions with the columns file and caption, for films in folders.
        recipe: The data recipe (pipeline/recipes.py).
        settings: Single fields of the recipe to replace, such as {"rate": 8}.
        ray_address: Address of a Ray cluster; without one, Ray is started on this machine for the run.
        columns: The tables' own names for file, caption, start and end, where they differ.
        prune: Takes films out of the dataset that the sources had and have no longer.
        allow_outside: Reads films that links or '..' reach outside their source.
        table_format: Name of the dataset whose published annotation file the table is, such as kinetics.
        keep_versions: After a new version, only so many of the newest stay; empty keeps all.
        latents: The sources hold files of latents (safetensors) in the place of films; they are only projected.
        workers: Ask the cluster for so many workers though it has no room for all yet; an autoscaler makes room.
        send_code: Give the cluster's nodes this project's code from the worker's machine.
    """
    how: dict[str, Any] = {
        "columns": columns,
        "prune": prune,
        "allow_outside": allow_outside,
        "table_format": table_format,
        "latents": latents,
        "workers": workers,
        "send_code": send_code,
    }
    found = _attempt(source, lake, captions, recipe, settings, None, ray_address, **how)
    if isinstance(found, IngestFailed) and isinstance(found.__cause__, LakeBusy):
        return Completed(message=f"nothing was done: {found}", name="Skipped")
    report = found if isinstance(found, dict) else found.report
    if keep_versions is not None and report["published"]:
        try:
            step(f"keep the newest {keep_versions} versions", "expire", lambda: _expire(lake, keep_versions))
        except StepFailed as error:
            return Failed(message=f"{report['lines'][-1]}, but old versions stay: {error}")
    return found if isinstance(found, dict) else Failed(message=str(found), data=found)


def _expire(lake: str, keep: int) -> None:
    """Removes the versions before the newest `keep`, and what they alone needed. What is kept stays byte for byte."""
    opened = Lake.open(lake)
    with opened.writing(wait=True):
        garbage, freed = collect(opened, keep)
    get_run_logger().info("versions %s are gone, %.1f MB are free", list(garbage.expired), freed / 1e6)


def _attempt(
    source: list[str] | str,
    lake: str,
    captions: str | None,
    recipe: str,
    settings: DataSettings | None,
    limit: int | None,
    ray_address: str | None,
    **how: Any,
) -> Report | IngestFailed:
    """The report of an ingest, or how it failed, with what caused it; `how` is for pipeline.ingest.ingest."""
    sources = [source] if isinstance(source, str) else list(source)
    without_traces()
    start_logging()
    try:
        report = _ingest(sources, lake, captions, _recipe(recipe, settings), limit, ray_address, **how)
    except StepFailed as error:
        failed = IngestFailed(str(error), _nothing(str(error), lake))
        failed.__cause__ = error.__cause__
        return failed
    for line in report.lines():
        get_run_logger().info(line)
    result = {**report.to_json(), "lines": report.lines(), "exit_status": report.exit_status}
    if report.exit_status == 0:
        return result
    if report.exit_status == 3:
        message = f"{report.faulty_films} of {report.films.discovered} films failed, more than the recipe tolerates"
        message += f" ({report.tolerate:.0%}); version {report.version} holds the others"
    else:
        message = report.lines()[-1]
    return IngestFailed(message, result)


def _ingest(
    sources: list[str],
    lake: str,
    captions: str | None,
    recipe: DataRecipe,
    limit: int | None,
    ray_address: str | None,
    report_file: str | None = None,
    **how: Any,
) -> IngestReport:
    """The steps of pipeline.ingest, one task each, and the artifacts."""
    logger, (listener, found) = get_run_logger(), _caller.get()
    with known_failures(), _warnings_to(logger, aloud=listener is not None and not as_json()):
        report = pipeline_ingest(
            sources,
            lake,
            captions,
            recipe,
            limit,
            on_progress=_told(logger, listener),
            say=logger.info,
            step=step,
            ray_address=ray_address,
            found=found,
            **how,
        )
    names = ", ".join(Path(source).name or source for source in sources)
    if report.published or report.exit_status != 0 or report_file is not None:
        leave = partial(_leave_artifacts, report, recipe, names, Lake.open(lake), report_file)
        step("leave artifacts", "artifacts", leave)
    return report


def _recipe(name: str, settings: DataSettings | None) -> DataRecipe:
    try:
        return override(recipe_named(name), settings.chosen() if settings else {})
    except ValueError as error:
        raise StepFailed(str(error)) from error


def _told(logger: RunLogger, listener: Listener | None) -> Listener:
    """Progress of the steps: into the run's log every few seconds, and to the caller of run_ingest."""
    log: dict[str, Progress] = {}

    def tell(what: str, done: int, total: int) -> None:
        line = log.get(what)
        if line is None or line.total != total or done < line.done:  # every group of blocks begins anew
            unit = "films" if what == "plan" else what
            line = log[what] = Progress(what, total, unit, out=_LogLines(logger))
        line.update(done)
        if listener is not None:
            listener(what, done, total)

    return tell


@contextmanager
def _warnings_to(logger: RunLogger, aloud: bool) -> Iterator[None]:
    """Sends what the pipeline and its workers warn of meanwhile to the run's log; `aloud` also prints it."""

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            line = record.getMessage()
            logger.log(record.levelno, line)
            if aloud:
                print(f"{record.levelname.lower()}: {line}", file=sys.stderr, flush=True)

    handler, pipeline_log = Handler(logging.WARNING), logging.getLogger("pipeline")
    pipeline_log.addHandler(handler)
    try:
        yield
    finally:
        pipeline_log.removeHandler(handler)


class _LogLines(io.StringIO):
    """A text file whose lines go to the run's log."""

    def __init__(self, logger: RunLogger) -> None:
        super().__init__()
        self.logger = logger

    def write(self, text: str) -> int:
        if text.strip():
            self.logger.info(text.strip())
        return len(text)


def _leave_artifacts(
    report: IngestReport, recipe: DataRecipe, names: str, lake: Lake, report_file: str | None = None
) -> None:
    """Summary, table and sheets, under keys of the lake's own: a lake's history is one page in Prefect's UI.

    A run without news and without failures leaves none. `report_file` is written in any case.
    """
    title = f"{names} into {last_name(report.lake)}"
    sheet = contact_sheet(lake, load(lake, report.version)) if report.version is not None else None
    lost = lost_sheet(report, recipe)
    if report_file is not None:
        pictures = {"Clips of the dataset": sheet, "Clips that were filtered or failed": lost}
        Path(report_file).write_text(page(report, report.lines(), pictures), encoding="utf-8")
    if not report.published and report.exit_status == 0:
        return

    def key(what: str) -> str:
        return artifact_key("ingest", report.lake, what)

    create_markdown_artifact(summary(report, recipe, names), key=key("summary"), description=f"Ingest of {title}")
    words = f"Films and clips of {names}: how many are done, unchanged, filtered, failed, and why"
    create_table_artifact(accounts_table(report), key=key("accounts"), description=words)
    if sheet is not None:
        words = f"Frames of version {report.version} of {last_name(report.lake)}, as the model is to see them"
        create_image_artifact(data_address(sheet), key=key("contact-sheet"), description=words)
    if lost is not None:
        words = f"Frames of clips of {names} that were filtered or failed, and why"
        create_image_artifact(data_address(lost), key=key("lost-clips"), description=words)
