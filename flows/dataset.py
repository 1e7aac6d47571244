"""The flow `ingest`: films and captions to the next version of a lake, visible step by step in Prefect's UI.

Each step is one Prefect task with a name people understand; the clips themselves are Ray's business (pipeline.runner),
never Prefect tasks. What is known to go wrong (a missing folder, a full disk, a lake in use) is one line, not a
traceback: the message of a failed state and the `error` of the report.

    prefect deployment run ingest/ingest --param source=films --param lake=lake
"""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

from prefect import flow, get_run_logger, task
from prefect.artifacts import create_image_artifact, create_markdown_artifact, create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.runtime import flow_run
from prefect.states import Failed

from flows.artifacts import accounts_table, contact_sheet, data_address, summary
from flows.server import ServerError, start_server
from model.progress import Progress
from model.settings import override
from pipeline.ingest import IngestReport, commit, embed_captions, plan_ingest, run_blocks
from pipeline.ingest.block import Block
from pipeline.recipes import DataRecipe, recipe_named
from pipeline.runner import Runner
from pipeline.sources.folders import discover
from storage.errors import VlfmError, is_expected
from storage.layout import Lake
from storage.version import load

Result = TypeVar("Result")
Listener = Callable[[str, int, int], None]
"""Called with what is counted, how many are done, and how many there are."""

GROUPS = 12  # most tasks the blocks are shared out to
GROUP_BLOCKS = 8  # fewest blocks in a task, unless there are no more: every group starts its workers anew

_listener: ContextVar[Listener | None] = ContextVar("listener", default=None)


class StepFailed(Exception):
    """A step could not do its work, for a known reason; the message is one line that says the mend."""


class IngestFailed(Exception):
    """The flow ended in the state Failed; `report` is what it would have returned."""

    def __init__(self, message: str, report: dict[str, Any]) -> None:
        super().__init__(message)
        self.report = report


def run_ingest(
    source: Sequence[str] | str,
    lake: str,
    captions: str | None = None,
    recipe: str = "demo",
    settings: dict[str, Any] | None = None,
    limit: int | None = None,
    ray_address: str | None = None,
    on_progress: Listener | None = None,
) -> dict[str, Any]:
    """Calls the flow `ingest` in this process and returns its report, whatever state it ended in.

    The report is pipeline.ingest.report.IngestReport.to_json() with `lines` (text for people), `exit_status` (0, 3 or
    1) and, where the run could not be done, `error` (one line).

    Raises:
        Exception: whatever is no known failure.
    """
    token = _listener.set(on_progress)
    try:
        start_server()
        sources = [source] if isinstance(source, str) else list(source)
        arguments = (sources, lake, captions, recipe, settings, limit, ray_address)
        state = cast(State[Any], ingest(*arguments, return_state=True))
    except ServerError as error:
        return _nothing(str(error), lake)
    finally:
        _listener.reset(token)
    report: Any = state.result(raise_on_failure=False)
    if isinstance(report, IngestFailed):
        return report.report
    if isinstance(report, BaseException):
        raise report
    return dict(report)


def _nothing(message: str, lake: str) -> dict[str, Any]:
    """The report of a run that could not be done."""
    lost = {"error": message, "lines": [message], "lake": lake, "version": None, "published": False}
    return {**lost, "exit_status": 1}


def _run_name() -> str:
    """`ingest-<source>-to-<lake>`, by the last parts of their paths."""
    parameters = flow_run.parameters
    source = parameters["source"]
    sources = [source] if isinstance(source, str) else list(source)
    names = [Path(name).name or "folder" for name in sources[:1]] + [f"{len(sources) - 1}-more"] * (len(sources) > 1)
    return f"ingest-{'-and-'.join(names) or 'nothing'}-to-{Path(parameters['lake']).name or 'lake'}"


@flow(name="ingest", flow_run_name=_run_name, validate_parameters=True, log_prints=False)
def ingest(
    source: list[str] | str,
    lake: str,
    captions: str | None = None,
    recipe: str = "demo",
    settings: dict[str, Any] | None = None,
    limit: int | None = None,
    ray_address: str | None = None,
) -> Any:
    """Films and captions to the next version of a lake.

    The report (a dictionary, see run_ingest) is the flow's result. The state is Completed when all went well or no more
    films failed than the recipe tolerates; else Failed with one line (IngestFailed), what was good is published then.

    Args:
        source: Folders of films, read recursively, or tables (CSV, JSONL, Parquet) with the columns file and caption.
        lake: Folder of the dataset; made when it is not there.
        captions: Table of captions with the columns file and caption, for films in folders.
        recipe: Name of the data recipe (pipeline/recipes.py).
        settings: Single fields of the recipe to replace, such as {"rate": 8}.
        limit: Only this many films, the first by name.
        ray_address: Address of a Ray cluster; without one, Ray is started on this machine for the run.
    """
    sources = [source] if isinstance(source, str) else list(source)
    logging.getLogger("prefect.task_runs").addFilter(_without_trace)
    try:
        report = _ingest(sources, lake, captions, _recipe(recipe, settings), limit, ray_address)
    except StepFailed as error:
        return Failed(message=str(error), data=IngestFailed(str(error), _nothing(str(error), lake)))
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
    return Failed(message=message, data=IngestFailed(message, result))


def _ingest(
    sources: list[str], lake: str, captions: str | None, recipe: DataRecipe, limit: int | None, ray_address: str | None
) -> IngestReport:
    """The steps, one task each, and the artifacts."""
    names = ", ".join(Path(source).name or source for source in sources)
    place = _step(f"look for films in {names}", "discover", lambda: _open(sources, lake, captions, recipe))
    with _known(), place.writing():
        told = _told("plan")
        plan = _step(
            f"plan the clips of {names}",
            "plan",
            lambda: plan_ingest(place, sources, captions, recipe, limit, on_progress=told),
        )
        for line in plan.lines():
            get_run_logger().info(line)
        texts = None
        if plan.blocks:
            texts = _step(f"embed the captions of {len(plan.clips)} clips", "embed", lambda: embed_captions(plan))
        results: list[dict[str, Any]] = []
        with Runner(ray_address) as runner:
            for title, blocks in _groups(plan.blocks):
                make = partial(run_blocks, plan, blocks, runner, _told("clips"))
                results += _step(title, "decode+invert+project", make)
        report = _step("pack shards and commit", "commit", lambda: commit(plan, texts, results))
    _step("leave artifacts", "artifacts", lambda: _leave_artifacts(report, recipe, names, place))
    return report


def _step(title: str, name: str, work: Callable[[], Result]) -> Result:
    """Does `work` as one Prefect task called `title`. A known failure fails the task in one line: StepFailed."""

    def run() -> Any:
        try:
            with _known():
                return work()
        except StepFailed as error:
            return Failed(message=str(error), data=error)

    # Nothing is passed in or persisted: plans are large, and a run that is started again takes up staged blocks anyway.
    step = task(name=name, task_run_name=lambda: title, cache_policy=NO_CACHE, persist_result=False)(run)
    state: State[Any] = step(return_state=True)
    result = state.result(raise_on_failure=False)
    if isinstance(result, BaseException):
        raise result
    return cast(Result, result)


def _without_trace(record: logging.LogRecord) -> bool:
    """Takes the empty trace off the line that Prefect logs for a task that returns Failed."""
    if record.exc_info and record.exc_info[1] is None:
        record.exc_info = None
    return True


@contextmanager
def _known() -> Iterator[None]:
    """Turns what can go wrong without any fault of the program into StepFailed."""
    try:
        yield
    except (VlfmError, OSError) as error:
        if not is_expected(error):
            raise
        raise StepFailed(" ".join(str(error).split())) from error


def _recipe(name: str, settings: dict[str, Any] | None) -> DataRecipe:
    try:
        return override(recipe_named(name), settings or {})
    except ValueError as error:
        raise StepFailed(str(error)) from error


def _open(sources: list[str], lake: str, captions: str | None, recipe: DataRecipe) -> Lake:
    """The lake, made only when there is something to put into it."""
    discover(sources, captions, recipe.captions_required)
    return Lake.create(lake)


def _groups(blocks: Sequence[Block]) -> list[tuple[str, Sequence[Block]]]:
    """The blocks shared out to tasks, with the tasks' titles."""
    size = max(GROUP_BLOCKS, -(-len(blocks) // GROUPS))
    groups = []
    for first in range(0, len(blocks), size):
        group = blocks[first : first + size]
        numbers = f"blocks {first + 1}-{first + len(group)}" if len(group) > 1 else f"block {first + 1}"
        groups.append((f"decode, invert, project {numbers} of {len(blocks)}", group))
    return groups


def _told(stage: str) -> Listener:
    """Progress of one step: into the run's log every few seconds, and to the caller of run_ingest."""
    logger, listener = get_run_logger(), _listener.get()
    log = Progress(stage, 0, "films" if stage == "plan" else "clips", out=_LogLines(logger))

    def tell(what: str, done: int, total: int) -> None:
        log.total = total
        log.update(done)
        if listener is not None:
            listener(what, done, total)

    return tell


class _LogLines(io.StringIO):
    """A text file whose lines go to the run's log."""

    def __init__(self, logger: Any) -> None:
        super().__init__()
        self.logger = logger

    def write(self, text: str) -> int:
        if text.strip():
            self.logger.info(text.strip())
        return len(text)


def _leave_artifacts(report: IngestReport, recipe: DataRecipe, names: str, lake: Lake) -> None:
    title = f"{names} into {lake.root.name}"
    create_table_artifact(accounts_table(report), key="ingest-accounts", description=f"What became of {title}")
    create_markdown_artifact(summary(report, recipe, names), key="ingest-summary", description=f"Ingest of {title}")
    if report.version is not None:
        sheet = contact_sheet(lake, load(lake, report.version))
        if sheet is not None:
            words = f"Frames of version {report.version} of {lake.root.name}, as the model is to see them"
            create_image_artifact(data_address(sheet), key="ingest-contact-sheet", description=words)
