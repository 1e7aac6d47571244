"""Films and captions to the next version of a dataset, in stages that a flow can run one by one.

    plan = plan_ingest(lake, sources, captions, recipe)      what is new; no Ray
    texts = embed_captions(plan)                             each caption once
    results = run_blocks(plan, plan.blocks, runner)          decode > invert > project on Ray, staged block by block
    report = commit(plan, texts, results)                    shards > arrays > manifest > version

`ingest` chains them. Whatever interrupts it, running it again goes on: a staged clip is never made twice. What failed
is not staged: the next run tries it again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.gates import REJECT, flags, rejected_row, rejection
from pipeline.ingest.block import Block, BlockWorker, merge_parts
from pipeline.ingest.environment import STOP_FILMS, check_environment
from pipeline.ingest.identity import content
from pipeline.ingest.pack import Packed, pack, publish_version
from pipeline.ingest.plan import LASTING, PARTIAL, FilmState, IngestPlan, Progress, plan_ingest
from pipeline.ingest.report import Account, IngestReport
from pipeline.recipes import DataRecipe
from pipeline.rows import failure_row
from pipeline.runner import Runner, Task, Worker
from pipeline.sources.tables import BAD_ROW
from pipeline.stage import ClipPlan
from pipeline.stages.embed import Texts, embed
from storage.failures import write_failures
from storage.layout import Lake
from storage.schema import certificate_spread

__all__ = ["IngestPlan", "IngestReport", "commit", "embed_captions", "ingest", "plan_ingest", "run_blocks"]

BlockResult = dict[str, Any]
"""block_id, done (clip ids), certificates (rows), failures (rows of facts), seconds by stage, codec facts."""


def embed_captions(plan: IngestPlan) -> Texts | None:
    """Embeddings of the captions of the new clips; None where there are none, and no encoder is loaded.

    Raises as `pipeline.stages.embed.embed`.
    """
    if not plan.blocks:
        return None
    begin = time.perf_counter()
    texts = embed((clip.caption for clip in plan.clips), plan.recipe.text, plan.lake, plan.base)
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
    results: dict[str, BlockResult] = {
        block_id: {"block_id": block_id, **plan.staged[block_id]} for block_id in by_id if block_id in plan.staged
    }
    parts: dict[str, dict[str, Mapping[str, Any]]] = {block_id: {} for block_id in by_id}
    lost: dict[str, list[dict[str, Any]]] = {block_id: [] for block_id in by_id}
    missing = {block_id: {clip.clip_id for clip in block.clips} for block_id, block in by_id.items()}
    total = sum(len(block.clips) for block in blocks)

    def tell() -> None:
        if on_progress:
            left = sum(len(missing[block_id]) for block_id in by_id if block_id not in results)
            on_progress("clips", total - left, total)

    def finish(block_id: str, result: Mapping[str, Any]) -> None:
        results[block_id] = {"block_id": block_id, **result}
        films = {clip.clip_id: clip.film for clip in by_id[block_id].clips}
        plan.tried += [{"film": films[clip], "status": "done", "reason": "", "detail": ""} for clip in result["done"]]
        plan.tried += [{**row, "status": "failed"} for row in result["failures"]]
        if not plan.staged and not result["done"]:
            check_environment(plan.tried, plan.tolerated, STOP_FILMS)

    def settle(task: Task) -> None:
        missing[task.parent] -= {clip.clip_id for clip in task.items}
        if not missing[task.parent]:
            block, own = by_id[task.parent], parts[task.parent]
            finish(task.parent, merge_parts(plan.lake, block, own, lost[task.parent], plan.recipe_fingerprint))
        tell()

    def done(task: Task, result: Mapping[str, Any]) -> None:
        if task.task_id == task.parent:
            finish(task.parent, result)
            tell()
        else:
            parts[task.parent][task.task_id] = result
            settle(task)

    def given_up(task: Task, reason: str, detail: str) -> None:
        clip: ClipPlan = task.items[0]
        where = {"clip_id": clip.clip_id, "clip_start": clip.window.start, "film": clip.film}
        lost[task.parent].append({**where, "stage": "worker", "reason": reason, "detail": detail})
        settle(task)

    tell()
    work = [(block.block_id, block.clips) for block in blocks if block.block_id not in results]
    chosen = worker or BlockWorker(plan.lake, plan.recipe, plan.recipe_fingerprint)
    runner.run(chosen, work, lambda clip: clip.clip_id, done, given_up)
    return [results[block.block_id] for block in blocks]


def commit(plan: IngestPlan, texts: Texts | None, results: Sequence[BlockResult]) -> IngestReport:
    """Publishes the next version from all blocks' results, or says that there is nothing new.

    Raises:
        RunnerError: every film that was tried failed for one reason that lies outside the films; nothing is published.
        AccountError: films or clips do not add up; nothing is published then.
        PackError, LakeError, DiskFull: the version cannot be written; staged blocks are kept for the next run.
    """
    begin = time.perf_counter()
    made = {clip for result in results for clip in result["done"]} | {row["clip_id"] for row in plan.revived}
    faults = {row["clip_id"]: row for result in results for row in result["failures"]}
    rejected = _rejected(plan, results)
    made -= set(rejected)
    for clip, row in rejected.items():
        faults[clip] = {**row, "stage": "gate", **rejection(row, plan.recipe.gates)}
    failures = plan.failures + [
        failure_row(row["film"], row["stage"], row, row["clip_id"], row["clip_start"]) for row in faults.values()
    ]
    here = {film.name for film in plan.films}
    others = [plan.judgement.rejected[clip] for clip in plan.judgement.leaving]  # of films that are not in this run
    failures += [
        failure_row(row["film"], "gate", rejection(row, plan.recipe.gates), row["clip_id"], row["clip_start"])
        for row in others
        if row["film"] not in here
    ]
    for state in plan.films:
        _settle_film(state, made, faults)
    if not made:
        check_environment((state.row for state in plan.films if not state.remembered), plan.tolerated)
    films, clips = accounts(plan, made, faults)
    version, packed = plan.parent, None
    superseded, owners = _ownership(plan, made)
    leaving = superseded | plan.judgement.leaving
    stays = any(row["clip_id"] not in leaving for row in plan.base_clips)
    if made or (stays and (plan.goes_back or rejected or superseded or plan.judgement.changes or _joined(plan))):
        with_clips = [block for block in plan.blocks if any(clip.clip_id in made for clip in block.clips)]
        packed = pack(plan, texts, with_clips, leaving, set(rejected))
        packed = replace(packed, rows=[{**row, "film": owners.get(row["clip_id"], row["film"])} for row in packed.rows])
        rows = _all_films(plan, packed)
        counts = {"films": films.to_json(), "clips": clips.to_json()}
        waiting = {clip: row for clip, row in plan.judgement.open.items() if row["film"] not in here}
        outside = {**waiting, **plan.judgement.rejected, **rejected}
        version = publish_version(plan, packed, rows, counts, list(outside.values()))
    write_failures(plan.lake, plan.run_id, failures)
    for result in results:
        for stage, seconds in result["seconds"].items():
            plan.seconds[stage] = plan.seconds.get(stage, 0.0) + seconds
    plan.seconds["commit"] = time.perf_counter() - begin
    return IngestReport(
        run_id=plan.run_id,
        lake=str(plan.lake.root),
        version=version.number if version else None,
        published=packed is not None,
        films=films,
        clips=clips,
        failures=failures,
        superseded=len(superseded - plan.judgement.leaving) if packed else 0,
        bytes=sum(shard.bytes for shard in version.shards) if version else 0,
        certificate=certificate_spread(packed.rows) if packed else {},
        gates=dict(plan.recipe.gates),
        below_gate=plan.recipe.below_gate,
        flagged=sum(bool(row["flags"]) for row in packed.rows) if packed else 0,
        seconds=dict(plan.seconds),
        tolerate=plan.recipe.tolerate,
        faulty_films=sum(film.row["status"] == "failed" or film.row["reason"] == PARTIAL for film in plan.films),
        notes=[],
    )


def ingest(
    sources: Sequence[str | Path] | str | Path,
    lake: Lake | str | Path,
    captions: str | Path | None = None,
    recipe: DataRecipe | None = None,
    limit: int | None = None,
    runner: Runner | None = None,
    on_progress: Progress | None = None,
    say: Callable[[str], None] | None = None,
) -> IngestReport:
    """The whole ingest in one call, in this process and Ray's. Arguments as in the stages; `say` gets the plan's lines.

    Raises:
        what the stages raise; LakeBusy where another run is writing to the lake.
    """
    from pipeline.recipes import demo
    from pipeline.sources.folders import discover

    recipe = recipe or demo()
    if not isinstance(lake, Lake):
        discover(sources, captions, recipe.captions_required)  # nothing is made for sources that are not there
        lake = Lake.create(lake)
    with lake.writing():
        plan = plan_ingest(lake, sources, captions, recipe, limit, on_progress=on_progress)
        if say:
            for line in plan.lines():
                say(line)
        texts = embed_captions(plan)
        if runner is not None:
            results = run_blocks(plan, plan.blocks, runner, on_progress)
        else:
            with Runner() as own:
                results = run_blocks(plan, plan.blocks, own, on_progress)
        return commit(plan, texts, results)


def accounts(plan: IngestPlan, made: set[str], faults: Mapping[str, Any]) -> tuple[Account, Account]:
    """The accounts of films and of clips; the discovered are counted from the plan, the rest from what happened."""
    films = Account.of("films", len(plan.films), [(film.row["status"], film.row["reason"]) for film in plan.films])
    planned = [clip.clip_id for clip in plan.clips] + [row["clip_id"] for row in plan.revived]
    known = [clip for film in plan.films for clip in film.known]
    narrow = sum(film.filtered + len(film.gated) for film in plan.films)
    outcomes = [("done", "") for clip in planned if clip in made]
    lost = [faults[clip] for clip in planned if clip in faults and clip not in made]
    outcomes += [(row.get("status", "failed"), row["reason"]) for row in lost]
    outcomes += [("unchanged", "") for _ in known]
    outcomes += [("filtered", row["reason"]) for row in plan.failures if row["clip_id"]]
    discovered = sum(len(film.new) + len(film.known) for film in plan.films) + narrow
    return films, Account.of("clips", discovered, outcomes)


def _settle_film(state: FilmState, made: set[str], faults: Mapping[str, Mapping[str, Any]]) -> None:
    """The film's status from its clips'."""
    lost = [faults[clip] for clip in state.new if clip in faults]
    failed = [row for row in lost if row.get("status", "failed") == "failed"]
    if not state.new:
        return
    got = sum(clip in made for clip in state.new)
    if got or state.known:
        reason = PARTIAL if failed else ""
        detail = f"{len(failed)} clips failed ({failed[0]['reason']}); run again to try them again" if failed else ""
        state.row |= {"status": "done" if got else "unchanged", "reason": reason, "detail": detail}
    else:
        # A film whose clips failed for several reasons is tried again if one of them is not its own.
        failed.sort(key=lambda row: row["reason"] in LASTING)
        first: Mapping[str, Any] = (failed or lost or [{"reason": "lost", "detail": "no result; run again"}])[0]
        state.row |= {"status": first.get("status", "failed"), "reason": first["reason"], "detail": first["detail"]}


def _rejected(plan: IngestPlan, results: Sequence[BlockResult]) -> dict[str, dict[str, Any]]:
    """Rows of storage.schema.REJECTED_SCHEMA of new clips that the recipe's gates keep out, by id."""
    if plan.recipe.below_gate != REJECT:
        return {}
    certificates = [row for result in results for row in result["certificates"]] + plan.revived
    return {row["clip_id"]: rejected_row(row) for row in certificates if flags(row, plan.recipe.gates)}


def _ownership(plan: IngestPlan, made: set[str]) -> tuple[set[str], dict[str, str]]:
    """Clips of the base that leave, and the films that the others belong to from now on, as far as that is new.

    Clips leave that a film had and has no longer, if it has others now, or another film has what it has. A film that
    gave nothing keeps its own. A clip that a film of another source has too stays, or becomes, that film's.
    """
    before = {row["clip_id"]: row["film"] for row in plan.base_clips}
    current = {clip: film.name for film in plan.films for clip in [*film.new, *film.known]}
    owners = {
        clip: film
        for clip, film in current.items()
        if before.get(clip) != film and not (clip in before and plan.identities.elsewhere(before[clip]))
    }
    renewed = {
        film.name
        for film in plan.films
        if film.known or film.row["reason"] == "duplicate" or any(clip in made for clip in film.new)
    }
    leaving = set()
    for row in plan.base_clips:
        if row["film"] in renewed and row["clip_id"] not in current:
            heir = plan.identities.heir(row)
            if heir is None:
                leaving.add(row["clip_id"])
            else:
                owners[row["clip_id"]] = heir
    return leaving, owners


def _joined(plan: IngestPlan) -> bool:
    """Whether a film that gives nothing new has no row of its content and place yet.

    By its row it keeps its clips when another film that shares them changes. Rows without a path are of older programs.
    """
    recorded = {row["film"]: row for row in plan.base_films}
    for film in plan.films:
        if film.known or film.row["reason"] == "duplicate":
            row = recorded.get(film.name)
            if row is None or content(row) != content(film.row) or row["path"] not in ("", film.row["path"]):
                return True
    return False


def _all_films(plan: IngestPlan, packed: Packed) -> list[dict[str, Any]]:
    """Rows of this run's films and of those that other runs brought."""
    held: dict[str, int] = {}
    for row in packed.rows:
        held[row["film"]] = held.get(row["film"], 0) + 1
    here = {film.name for film in plan.films}
    others = [{**row, "status": "unchanged"} if row["status"] == "done" else row for row in plan.base_films]
    left = {row["film"]: row for clip, row in plan.judgement.rejected.items() if clip in plan.judgement.leaving}
    emptied = {film: rejection(row, plan.recipe.gates) for film, row in left.items() if film not in held}
    others = [{**row, **emptied.get(row["film"], {})} for row in others]
    heirs = {"status": "unchanged", "reason": "", "detail": ""}
    others = [{**row, **heirs} if row["reason"] == "duplicate" and row["film"] in held else row for row in others]
    rows = [film.row for film in plan.films if film.row["reason"] != BAD_ROW]
    rows += [row for row in others if row["film"] not in here]
    return [{**row, "clips": held.get(row["film"], 0)} for row in sorted(rows, key=lambda row: row["film"])]
