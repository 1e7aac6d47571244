"""Films and captions to the next version of a dataset, in the one sequence of steps that every program runs.

    found = discover(sources, captions)                      the films and captions there are
    plan = plan_ingest(lake, found, recipe)                  what is new; no Ray
    texts = embed_captions(plan)                             each caption once
    results = run_blocks(plan, plan.blocks, runner)          decode > invert > project on Ray, staged block by block
    report = commit(plan, texts, results)                    shards > arrays > manifest > version

`ingest` does all of it, `carry_out` what follows the plan. Whatever interrupts it, running it again goes on: a staged
clip is never made twice. What failed is not staged: the next run tries it again.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

from model.telemetry import metrics
from pipeline.actor import Worker
from pipeline.health.nodes import NodeRequest, check_nodes, film_bytes
from pipeline.ingest.block import Block, BlockWorker, merge_parts
from pipeline.ingest.environment import STOP_FILMS, check_environment
from pipeline.ingest.plan import plan_ingest
from pipeline.ingest.publish import commit
from pipeline.ingest.report import IngestReport
from pipeline.ingest.reuse import copy_block
from pipeline.ingest.state import IngestPlan, Progress
from pipeline.items import BlockResult, ClipPlan, Failure, Outcome
from pipeline.recipes import DataRecipe, demo
from pipeline.runner import Runner, Task
from pipeline.sources.folders import Discovery, discover
from pipeline.stages.embed import Texts, embed
from storage.change import finish
from storage.layout import Lake

log = logging.getLogger(__name__)
Result = TypeVar("Result")

GROUPS = 12  # most steps the blocks are shared out to
GROUP_BLOCKS = 8  # fewest blocks in a step, unless there are no more: every group starts its workers anew


class Step(Protocol):
    """Does one step of an ingest; flows.dataset makes it visible."""

    def __call__(self, title: str, name: str, work: Callable[[], Result]) -> Result:
        """The result of `work`; `title` is for people, `name` one word that is the same in every run."""


def plainly(title: str, name: str, work: Callable[[], Result]) -> Result:
    """Does a step and says nothing."""
    return work()


def embed_captions(plan: IngestPlan) -> Texts | None:
    """Embeddings of the captions of the new clips; None where there are none, and no encoder is loaded.

    Raises as `pipeline.stages.embed.embed`.
    """
    if not plan.blocks:
        return None
    begin = time.perf_counter()
    texts = embed((clip.caption for clip in plan.clips), plan.recipe.text, plan.lake, plan.base or plan.parent)
    plan.seconds["embed"] = time.perf_counter() - begin
    return texts


def run_blocks(
    plan: IngestPlan,
    blocks: Sequence[Block],
    runner: Runner,
    on_progress: Progress | None = None,
    worker: Worker | None = None,
) -> list[BlockResult]:
    """Makes and stages the blocks that are not staged yet; results of all of them, in their order.

    Args:
        plan: the plan.
        blocks: all of the plan's, or some.
        runner: Ray; not started where everything is staged.
        on_progress: told ("clips", clips finished or given up, clips of these blocks) after every block.
        worker: what makes a block, in place of BlockWorker; it stages in the same form.

    Raises:
        DiskFull: no room; the blocks finished before are kept.
        RunnerError: Ray or the stages cannot be set up, or every film so far fails for one reason of the environment.
    """
    by_id = {block.block_id: block for block in blocks}
    results = {block_id: plan.staged[block_id] for block_id in by_id if block_id in plan.staged}
    parts: dict[str, list[BlockResult]] = {block_id: [] for block_id in by_id}
    lost: dict[str, list[Failure]] = {block_id: [] for block_id in by_id}
    missing = {block_id: {clip.clip_id for clip in block.clips} for block_id, block in by_id.items()}
    total = sum(len(block.clips) for block in blocks)

    def tell() -> None:
        if on_progress:
            left = sum(len(missing[block_id]) for block_id in by_id if block_id not in results)
            on_progress("clips", total - left, total)

    watched = metrics()
    watched.set("ingest_clips_planned", sum(len(block.clips) for block in plan.blocks))

    def finish(result: BlockResult) -> None:
        results[result.block_id] = result
        for clip in result.made:
            log.info("done", extra={"run": plan.run_id, "film": clip.film, "clip": clip.clip_id})
            watched.count("ingest_clips", outcome="done", reason="")
        for failure in result.failures:
            tell_failure(plan.run_id, failure)
            watched.count("ingest_clips", outcome=failure.status, reason=failure.reason)
        plan.tried += [Outcome(clip.film, "done") for clip in result.made]
        plan.tried += [failure.outcome for failure in result.failures]
        if not plan.staged and not result.made:
            check_environment(plan.tried, plan.tolerated, STOP_FILMS)

    def settle(task: Task) -> None:
        missing[task.parent] -= {clip.clip_id for clip in task.items}
        if not missing[task.parent]:
            block, own = by_id[task.parent], parts[task.parent]
            finish(merge_parts(plan.lake, block, own, lost[task.parent], plan.recipe_fingerprint))
        tell()

    def done(task: Task, result: BlockResult) -> None:
        if task.task_id == task.parent:
            finish(result)
            tell()
        else:
            parts[task.parent].append(result)
            settle(task)

    def given_up(task: Task, reason: str, detail: str) -> None:
        clip: ClipPlan = task.items[0]
        failure = Failure(clip.film, "worker", reason, detail, clip_id=clip.clip_id, clip_start=clip.window.start)
        lost[task.parent].append(failure)
        settle(task)

    tell()
    for block in blocks:
        if block.block_id not in results and block.copied:
            missing[block.block_id].clear()
            finish(copy_block(plan.lake, plan.recipe, plan.recipe_fingerprint, block))
            tell()
    work = [(block.block_id, block.clips) for block in blocks if block.block_id not in results]
    chosen = worker or BlockWorker(plan.lake, plan.recipe, plan.recipe_fingerprint, plan.imported)
    runner.run(chosen, work, lambda clip: clip.clip_id, done, given_up)
    return [results[block.block_id] for block in blocks]


def check_cluster(plan: IngestPlan, runner: Runner) -> None:
    """Makes sure that every node of a cluster can do the plan's work, before any is given to it.

    Raises:
        RunnerError: a node cannot; the line names it, what it lacks, and the remedy.
    """
    runner.start()
    film = plan.clips[0].path
    check_nodes(NodeRequest(plan.recipe, plan.lake.store, film, film_bytes(film)))


def tell_failure(run_id: str, failure: Failure) -> None:
    """A line of the log for a film or clip that failed; it is no warning: the report lists it."""
    ids = {"run": run_id, "film": failure.film, "clip": failure.clip_id}
    log.info(failure.detail, extra={**ids, "stage": failure.stage, "reason": failure.reason})


def carry_out(
    plan: IngestPlan,
    runner: Runner | None = None,
    on_progress: Progress | None = None,
    step: Step = plainly,
    ray_address: str | None = None,
    workers: int = 0,
    send_code: bool = False,
) -> IngestReport:
    """What follows the plan: captions, blocks, commit. The lake is locked by the caller (Lake.writing).

    Args:
        plan: the plan.
        runner: a Ray session to use; None opens one for the blocks and ends it before the commit.
        on_progress: as in `run_blocks`, for each group of blocks anew.
        step: does each step.
        ray_address, workers, send_code: Runner's address, workers and send_code for a session of its own.

    Raises what the steps raise.
    """
    for failure in plan.failures:
        tell_failure(plan.run_id, failure)
        metrics().count("ingest_films", outcome=failure.status, reason=failure.reason)
    texts = None
    if plan.blocks:
        texts = step(f"embed the captions of {len(plan.clips)} clips", "embed", lambda: embed_captions(plan))
    results: list[BlockResult] = []
    with ExitStack() as stack:
        chosen = runner or stack.enter_context(Runner(ray_address, workers=workers, send_code=send_code))
        if not all(block.copied or block.block_id in plan.staged for block in plan.blocks) and chosen.on_cluster:
            step("check the nodes of the cluster", "preflight", partial(check_cluster, plan, chosen))
        for title, blocks in groups(plan.blocks):
            make = partial(run_blocks, plan, blocks, chosen, on_progress)
            results += step(title, "decode+invert+project", make)
    return step("pack shards and commit", "commit", lambda: commit(plan, texts, results))


def ingest(
    sources: Sequence[str | Path] | str | Path,
    lake: Lake | str | Path,
    captions: str | Path | None = None,
    recipe: DataRecipe | None = None,
    limit: int | None = None,
    runner: Runner | None = None,
    on_progress: Progress | None = None,
    say: Callable[[str], None] | None = None,
    step: Step = plainly,
    ray_address: str | None = None,
    workers: int = 0,
    send_code: bool = False,
    columns: Mapping[str, str] | None = None,
    found: Discovery | None = None,
    prune: bool = False,
    allow_outside: bool = False,
    table_format: str | None = None,
    wait: bool = False,
    latents: bool = False,
) -> IngestReport:
    """Films and captions to the next version of `lake`, which is made once there is something to put into it.

    Args:
        sources, captions, columns, allow_outside, table_format, latents: as in pipeline.sources.folders.discover.
        lake: a lake or its path.
        recipe: how; None for the demo's.
        limit: this many films only, the first by name.
        runner, on_progress, step, ray_address, workers, send_code: as in `carry_out`; `on_progress` is told of the
            plan too.
        say: gets the plan's lines.
        found: what `discover` found, where that has been called already.
        prune: as in `plan_ingest`.
        wait: whether to wait for other runs that write to the lake, in order of arrival.

    Raises:
        SourceError: there is nothing to ingest, or nothing left of what is to be pruned.
        LakeBusy: another run is writing to the lake, and `wait` is False.
        and what the steps raise.
    """
    recipe = recipe or demo()
    given = [sources] if isinstance(sources, (str, Path)) else list(sources)
    names = ", ".join(Path(source).name or str(source) for source in given)

    def look() -> tuple[Discovery, Lake]:
        how = (recipe.captions_required, columns, allow_outside, table_format, latents)
        films = found or discover(given, captions, *how)
        return films, lake if isinstance(lake, Lake) else Lake.create(lake)

    films, place = step(f"look for films in {names}", "discover", look)
    with ExitStack() as held:
        if wait:
            step(f"wait for {place.store.address()}", "wait", lambda: held.enter_context(place.writing(wait=True)))
        else:
            held.enter_context(place.writing())
        place.store.clean(delete=True)
        finish(place)
        plan = step(
            f"plan the clips of {names}",
            "plan",
            lambda: plan_ingest(place, films, recipe, limit, on_progress=on_progress, prune=prune),
        )
        if say:
            for line in plan.lines():
                say(line)
        return carry_out(plan, runner, on_progress, step, ray_address, workers, send_code)


def groups(blocks: Sequence[Block]) -> list[tuple[str, Sequence[Block]]]:
    """The blocks shared out to steps, with the steps' titles."""
    size = max(GROUP_BLOCKS, -(-len(blocks) // GROUPS))
    found = []
    for first in range(0, len(blocks), size):
        group = blocks[first : first + size]
        numbers = f"blocks {first + 1}-{first + len(group)}" if len(group) > 1 else f"block {first + 1}"
        found.append((f"decode, invert, project {numbers} of {len(blocks)}", group))
    return found
