"""The end of an ingest: what became of every film and clip, and the version that holds what is good."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from pipeline.gates import flags, rejection
from pipeline.ingest.cost import measured
from pipeline.ingest.environment import LASTING, check_environment
from pipeline.ingest.history import OTHER_RECIPE
from pipeline.ingest.pack import pack, publish_version
from pipeline.ingest.report import Account, IngestReport
from pipeline.ingest.state import PARTIAL, FilmState, IngestPlan
from pipeline.items import BlockResult, Failure, Outcome, Rejected, Row
from pipeline.sources.tables import BAD_ROW
from pipeline.stages.embed import Texts
from storage.failures import write_failures
from storage.schema import CERTIFICATE, certificate_spread
from storage.staging import read_block_meta, remove_block, staged_blocks


def commit(plan: IngestPlan, texts: Texts | None, results: Sequence[BlockResult]) -> IngestReport:
    """Publishes the next version from all blocks' results, or says that there is nothing new.

    Raises:
        RunnerError: every film that was tried failed for one reason that lies outside the films; nothing is published.
        AccountError: films or clips do not add up; nothing is published then.
        PackError, LakeError, DiskFull: the version cannot be written; staged blocks are kept for the next run.
    """
    begin = time.perf_counter()
    results = _with_duplicates(plan, results)
    duplicates = {clip.clip_id: clip.certificate.duplicates for result in results for clip in result.made}
    made = {clip for result in results for clip in result.done} | {row["clip_id"] for row in plan.restored}
    lost = {failure.clip_id: failure for result in results for failure in result.failures}
    rejected = _rejected(plan, results)
    made -= set(rejected)
    lost |= {name: rejection(clip, plan.recipe.rejecting_gates) for name, clip in rejected.items()}
    here = {film.name for film in plan.films}
    leaving_now = [plan.gate_decision.rejected[name] for name in plan.gate_decision.leaving]
    elsewhere = [rejection(clip, plan.recipe.rejecting_gates) for clip in leaving_now if clip.film not in here]
    paths = {film.name: film.row["path"] for film in plan.films}
    failures = [*plan.failures, *lost.values(), *elsewhere]
    failures = [replace(failure, path=failure.path or paths.get(failure.film, "")) for failure in failures]
    for state in plan.films:
        _settle_film(state, made, lost)
    if not made:
        check_environment((state.outcome for state in plan.films if not state.remembered), plan.tolerated)
    films, clips = accounts(plan, made, lost)
    version, packed = plan.parent, None
    superseded, owners = _ownership(plan, made)
    leaving = superseded | plan.gate_decision.leaving
    stays = any(row["clip_id"] not in leaving for row in plan.base_clips)
    stays = stays or bool(made)
    changed = plan.goes_back or rejected or superseded or plan.gate_decision.changes
    if stays and (made or changed or _recorded_anew(plan, owners, leaving)):
        with_clips = [block for block in plan.blocks if any(clip.clip_id in made for clip in block.clips)]
        packed = pack(plan, texts, with_clips, leaving, set(rejected), duplicates)
        packed = replace(packed, rows=[{**row, "film": owners.get(row["clip_id"], row["film"])} for row in packed.rows])
        rows = _all_films(plan, packed.rows)
        counts = {"films": films.to_json(), "clips": clips.to_json()}
        waiting = {name: clip for name, clip in plan.gate_decision.open.items() if clip.film not in here}
        outside = {**waiting, **plan.gate_decision.rejected, **rejected}
        took = measured(results, time.perf_counter() - begin)
        version = publish_version(plan, packed, rows, counts, [clip.to_row() for clip in outside.values()], took)
    _remove_unwanted_blocks(plan, packed is not None)
    write_failures(plan.lake, plan.run_id, [failure.to_row() for failure in failures])
    for result in results:
        for stage, seconds in result.seconds.items():
            plan.seconds[stage] = plan.seconds.get(stage, 0.0) + seconds
    plan.seconds["commit"] = time.perf_counter() - begin
    return IngestReport(
        run_id=plan.run_id,
        lake=plan.lake.address,
        version=version.number if version else None,
        published=packed is not None,
        films=films,
        clips=clips,
        failures=failures,
        superseded=len(superseded - plan.gate_decision.leaving) if packed else 0,
        bytes=sum(shard.bytes for shard in version.shards) if version else 0,
        certificate=certificate_spread(packed.rows) if packed else {},
        gates=dict(plan.recipe.gates),
        below_gate=plan.recipe.below_gate,
        flagged=sum(bool(row["flags"]) for row in packed.rows) if packed else 0,
        seconds=dict(plan.seconds),
        rejected=_by_figure(plan, {**plan.gate_decision.rejected, **rejected}, here),
        notes=list(plan.notes),
        tolerate=plan.recipe.tolerate,
        faulty_films=sum(film.outcome.status == "failed" or film.outcome.reason == PARTIAL for film in plan.films),
    )


def _remove_unwanted_blocks(plan: IngestPlan, published: bool) -> None:
    """Removes staged blocks of dead runs that no later run could take: parts of blocks, damaged ones, those of films
    that have left a source of this run, and those of this recipe with a clip that the dataset has, or whose films this
    run looked at without wanting their clips.

    Those of films beyond this run, and of other recipes, are kept for the run that wants them.
    """
    wanted = set() if published else {block.block_id for block in plan.blocks}
    held = {row["clip_id"] for row in plan.base_clips}
    looked_at = {film.name for film in plan.films} | set(plan.missing) | set(plan.identities.renamed)
    for block_id in staged_blocks(plan.lake):
        if block_id in wanted:
            continue
        try:
            meta = read_block_meta(plan.lake, block_id)
            clips = [(clip["clip_id"], clip["film"]) for clip in meta["clips"]]
            places = meta.get("films", {})
            gone = {film for film, where in places.items() if plan.identities.left(film, *where)}
            useless = all(film in gone for _, film in clips) or (
                meta["recipe"] == plan.recipe_fingerprint
                and (any(clip in held for clip, _ in clips) or all(film in looked_at | gone for _, film in clips))
            )
        except (ValueError, KeyError, TypeError, OSError):
            useless = True
        if useless or "-" in block_id:
            remove_block(plan.lake, block_id)


def accounts(plan: IngestPlan, made: set[str], lost: Mapping[str, Failure]) -> tuple[Account, Account]:
    """The accounts of films and of clips; the discovered are counted from the plan, the rest from what happened."""
    films = Account.of("films", len(plan.films), [(film.outcome.status, film.outcome.reason) for film in plan.films])
    planned = [clip.clip_id for clip in plan.clips] + [row["clip_id"] for row in plan.restored]
    known = [clip for film in plan.films for clip in film.known]
    narrow = sum(film.filtered + len(film.gated) for film in plan.films)
    outcomes = [("done", "") for clip in planned if clip in made]
    failed = [lost[clip] for clip in planned if clip in lost and clip not in made]
    outcomes += [(failure.status, failure.reason) for failure in failed]
    outcomes += [("unchanged", "") for _ in known]
    outcomes += [("filtered", failure.reason) for failure in plan.failures if failure.clip_id]
    discovered = sum(len(film.new) + len(film.known) for film in plan.films) + narrow
    return films, Account.of("clips", discovered, outcomes)


def _settle_film(state: FilmState, made: set[str], failures: Mapping[str, Failure]) -> None:
    """The film's status from its clips'."""
    lost = [failures[clip] for clip in state.new if clip in failures]
    failed = [failure for failure in lost if failure.status == "failed"]
    if not state.new:
        return
    got = sum(clip in made for clip in state.new)
    if got or state.known:
        status = "done" if got else "unchanged"
        if failed:
            detail = f"{len(failed)} clips failed ({failed[0].reason}); run again to try them again"
            state.settle(status, PARTIAL, detail)
        else:
            state.settle(status)
        return
    # A film whose clips failed for several reasons is tried again if one of them is not its own.
    failed.sort(key=lambda failure: failure.reason in LASTING)
    if failed or lost:
        state.reject((failed or lost)[0])
    else:
        state.settle("failed", "lost", "no result; run again")


def _with_duplicates(plan: IngestPlan, results: Sequence[BlockResult]) -> list[BlockResult]:
    """The results, their clips' certificates with the number of clips that came before with the same frames."""
    leaving = plan.gate_decision.leaving
    seen = Counter(row["frames_id"] for row in [*plan.base_clips, *plan.restored] if row["clip_id"] not in leaving)
    counted = []
    for result in results:
        made = []
        for clip in result.made:
            if clip.frames_id:
                found = float(seen[clip.frames_id])
                seen[clip.frames_id] += 1
                clip = replace(clip, certificate=replace(clip.certificate, duplicates=found))
            made.append(clip)
        counted.append(replace(result, made=tuple(made)))
    return counted


def _rejected(plan: IngestPlan, results: Sequence[BlockResult]) -> dict[str, Rejected]:
    """New clips that the recipe's gates keep out, by id: before they were encoded, or now."""
    early = [
        Rejected(failure.clip_id, failure.film, failure.clip_start, failure.certificate, failure.frames_id)
        for result in results
        for failure in result.failures
        if failure.certificate is not None
    ]
    clips = [clip.rejected for result in results for clip in result.made]
    clips += [Rejected.from_row(row) for row in plan.restored]
    outside = [clip for clip in clips if flags(clip.certificate, plan.recipe.rejecting_gates)]
    return {clip.clip_id: clip for clip in [*early, *outside]}


def _by_figure(plan: IngestPlan, rejected: Mapping[str, Rejected], films: set[str]) -> dict[str, int]:
    """How many clips of these films each gate keeps out."""
    outside = [flags(clip.certificate, plan.recipe.rejecting_gates) for clip in rejected.values() if clip.film in films]
    counted = Counter(name for names in outside for name in names)
    return {measure.name: counted[measure.name] for measure in CERTIFICATE if counted[measure.name]}


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
    going = renewed | plan.pruned
    for row in plan.base_clips:
        if row["film"] in going and row["clip_id"] not in current:
            heir = plan.identities.heir(row, plan.pruned)
            if heir is None:
                leaving.add(row["clip_id"])
            else:
                owners[row["clip_id"]] = heir
    return leaving, owners


_FACTS = ("film_id", "caption", "bytes", "modified_ns", "clips", "reason")
"""What a row of the film table says that a later run goes by."""


def _recorded_anew(plan: IngestPlan, owners: Mapping[str, str], leaving: set[str]) -> bool:
    """Whether the film table says other things than before, though no clip is new.

    A film that was touched, moved, or found to be at fault is recorded, or each run would read it again. What failed
    for a reason outside the film is not worth a version. Rows without a path are of older programs.
    """
    recorded = {row["film"]: row for row in plan.base_films}
    clips = [{**row, "film": owners.get(row["clip_id"], row["film"])} for row in plan.base_clips]
    rows = _all_films(plan, [clip for clip in clips if clip["clip_id"] not in leaving])
    if not recorded.keys() <= {row["film"] for row in rows}:
        return True
    for row in rows:
        if row["status"] in ("done", "unchanged") or row["reason"] in LASTING:
            before = recorded.get(row["film"])
            if before is None or any(before[name] != row[name] for name in _FACTS):
                return True
            if before["path"] not in ("", row["path"]):
                return True
    return False


def _all_films(plan: IngestPlan, clips: Sequence[Row]) -> list[Row]:
    """Rows of this run's films and of those that other runs brought; `clips`: the dataset's from now on."""
    held: dict[str, int] = {}
    for row in clips:
        held[row["film"]] = held.get(row["film"], 0) + 1
    here = {film.name for film in plan.films}
    others: list[Row] = [{**row, "status": "unchanged"} if row["status"] == "done" else row for row in plan.base_films]
    left = [clip for name, clip in plan.gate_decision.rejected.items() if name in plan.gate_decision.leaving]
    emptied = {
        clip.film: rejection(clip, plan.recipe.rejecting_gates).outcome for clip in left if clip.film not in held
    }
    others = [{**row, **_verdict(emptied[row["film"]])} if row["film"] in emptied else row for row in others]
    heirs = {"status": "unchanged", "reason": "", "detail": ""}
    others = [
        {**row, **heirs} if row["reason"] in ("duplicate", OTHER_RECIPE) and row["film"] in held else row
        for row in others
    ]
    rows: list[Row] = [film.row for film in plan.films if film.row["reason"] != BAD_ROW]
    rows += [row for row in others if row["film"] not in here and not _forgotten(plan, row, held)]
    return [{**row, "clips": held.get(row["film"], 0)} for row in sorted(rows, key=lambda row: row["film"])]


def _forgotten(plan: IngestPlan, row: Row, held: Mapping[str, int]) -> bool:
    """Whether a film that its source no longer has, and that has no clips, is no film of the dataset any more."""
    if row["film"] not in plan.missing or row["film"] in held:
        return False
    return plan.prune or row["reason"] != OTHER_RECIPE  # else another recipe's clips of it stay, too


def _verdict(outcome: Outcome) -> dict[str, str]:
    """Columns of storage.schema.FILM_SCHEMA."""
    return {"status": outcome.status, "reason": outcome.reason, "detail": outcome.detail}
