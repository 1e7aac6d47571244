"""The plan of an ingest: what is new, what is not, what cannot be used, and the blocks of work. Nothing is decoded.

Films that are as the newest version knows them (name, size, time of change, caption) are neither opened nor hashed.
Blocks are cut from the sorted new clips before any work starts, so the order in which workers finish changes nothing.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.gates import Judgement, judge, rejection
from pipeline.ingest.block import Block, cut_blocks
from pipeline.ingest.environment import LASTING as LASTING
from pipeline.ingest.environment import STOP_FILMS, check_environment, decoder_version
from pipeline.ingest.history import newest_of_recipe, older_rows
from pipeline.ingest.identity import Identities, content
from pipeline.media.decode import Probe, ffmpeg_binary, probe, select_frames, window_count, window_starts
from pipeline.media.faults import DecodeError, digest_of
from pipeline.recipes import DataRecipe
from pipeline.rows import caption_id, failure_row, film_row, observed_frames, printable, split_of
from pipeline.sources.folders import Discovery, FilmEntry, FilmFailure, discover
from pipeline.stage import ClipPlan
from storage.fingerprint import fingerprint, short_id
from storage.layout import Lake
from storage.version import Version, latest, read_manifest

Progress = Callable[[str, int, int], None]
"""Called with a stage's name, how many are done, and how many there are."""

PARTIAL = "clips_failed"
"""Reason of a film that gave some clips and lost others; the next run tries those again."""


@dataclass
class FilmState:
    """A film of this run: its row of the manifest as far as it is known, and what becomes of its windows."""

    row: dict[str, Any]
    new: list[str] = field(default_factory=list)
    """Ids of clips to be made."""
    known: list[str] = field(default_factory=list)
    """Ids of clips that the dataset has already."""
    filtered: int = 0
    """Windows that gave no clip by rule."""
    gated: list[str] = field(default_factory=list)
    """Ids of clips made before that the recipe's gates keep out."""
    remembered: bool = False
    """Whether it is as the dataset knows it, and was not looked at."""

    @property
    def name(self) -> str:
        return str(self.row["film"])


@dataclass
class IngestPlan:
    """All that an ingest is going to do."""

    lake: Lake
    recipe: DataRecipe
    recipe_fingerprint: str
    run_id: str
    created: str
    """UTC, ISO 8601."""
    parent: Version | None
    """The newest version."""
    base: Version | None
    """The newest version of this recipe, whose clips are carried on."""
    identities: Identities
    films: list[FilmState]
    blocks: list[Block]
    staged: dict[str, dict[str, Any]]
    """Blocks that an interrupted run finished, with their summaries."""
    base_clips: list[dict[str, Any]]
    base_films: list[dict[str, Any]]
    revived: list[dict[str, Any]]
    """Rows of older versions for clips that are wanted again; they are copied, not made."""
    judgement: Judgement
    """What the recipe's gates make of the base."""
    failures: list[dict[str, Any]]
    """Rows of the failure table for what the plan itself found."""
    notes: list[str]
    seconds: dict[str, float]
    tried: list[dict[str, Any]] = field(default_factory=list)
    """What became of the clips that this run has finished so far: film, status, reason and detail."""

    @property
    def tolerated(self) -> int:
        """How many films may fail for one reason before the environment is blamed: as many as are known to be good."""
        return sum(bool(film.known) for film in self.films)

    @property
    def clips(self) -> list[ClipPlan]:
        """The clips to be made."""
        return [clip for block in self.blocks for clip in block.clips]

    @property
    def goes_back(self) -> bool:
        """Whether the recipe is that of a version before the newest: its clips become the newest version again."""
        return self.base is not None and self.parent is not None and self.base.number != self.parent.number

    def lines(self) -> list[str]:
        """The plan for people."""
        known = sum(len(film.known) for film in self.films)
        faulty = [film for film in self.films if film.row["status"] in ("failed", "filtered")]
        new = f"{len(self.clips)} new clips in {len(self.blocks)} blocks"
        lines = [*self.notes, f"{len(self.films)} films: {new}, {known} clips unchanged"]
        if self.judgement.leaving:
            lines.append(f"{len(self.judgement.leaving)} clips of the dataset are outside the gates and leave it")
        if self.staged:
            lines.append(f"{len(self.staged)} blocks are finished from an interrupted run and are kept")
        if faulty:
            lines.append(f"{len(faulty)} films cannot be used:")
        return lines + [f"  {printable(film.name)}: {film.row['reason']}: {film.row['detail']}" for film in faulty]


def plan_ingest(
    lake: Lake | str | Path,
    sources: Sequence[str | Path] | str | Path,
    captions: str | Path | None,
    recipe: DataRecipe,
    limit: int | None = None,
    now: float | None = None,
    on_progress: Progress | None = None,
) -> IngestPlan:
    """Plans an ingest of `sources` into `lake` (made if it is not there). Starts no Ray and decodes nothing.

    Args:
        lake: a lake or its path.
        sources, captions: as in pipeline.sources.folders.discover.
        recipe: how.
        limit: this many films only, the first by name.
        now: seconds since 1970, for the run's name.
        on_progress: told how many films have been read.

    Raises:
        SourceError: nothing to ingest.
        DecodeError: `no_ffmpeg`.
        RunnerError: all of the first films fail for one reason that lies outside them.
        LakeError: `lake` is no place for a lake.
    """
    begin = time.perf_counter()
    found = discover(sources, captions, recipe.captions_required).limited(limit)
    lake = lake if isinstance(lake, Lake) else Lake.create(lake)
    moment = time.gmtime(time.time() if now is None else now)
    recipe_fingerprint = fingerprint(recipe.data_fields())
    parent = latest(lake)
    base = newest_of_recipe(lake, recipe_fingerprint)
    notes = list(found.notes)
    if parent is not None and base is None:
        notes.append(f"the recipe differs from version {parent.number}'s: its clips are not carried on, all are new")
    base_clips = read_manifest(lake, base, "clips").to_pylist() if base else []
    base_films = read_manifest(lake, base, "films").to_pylist() if base else []
    rejected = read_manifest(lake, base, "rejected").to_pylist() if base else []
    plan = IngestPlan(
        lake=lake,
        recipe=recipe,
        recipe_fingerprint=recipe_fingerprint,
        run_id=f"{time.strftime('%Y%m%dT%H%M%SZ', moment)}-{os.urandom(3).hex()}",
        created=time.strftime("%Y-%m-%dT%H:%M:%SZ", moment),
        parent=parent,
        base=base,
        identities=Identities(base_films, [*found.entries, *found.failures]),
        films=[],
        blocks=[],
        staged={},
        base_clips=base_clips,
        base_films=base_films,
        revived=[],
        judgement=judge(base_clips, rejected, recipe.gates, recipe.below_gate),
        failures=[],
        notes=notes,
        seconds={},
    )
    _plan_films(plan, found, on_progress or (lambda stage, done, total: None))
    plan.films.sort(key=lambda film: film.name)
    plan.failures.extend(
        failure_row(film.name, "source" if film.row["sha256"] == "" else "plan", film.row)
        for film in plan.films
        if film.row["status"] in ("failed", "filtered")
    )
    plan.seconds["plan"] = time.perf_counter() - begin
    return plan


def _fault(plan: IngestPlan, failure: FilmFailure) -> FilmState:
    row = film_row(plan.identities.name(failure), "", 0, 0, failure.path)
    return FilmState({**row, "status": failure.status, "reason": failure.reason, "detail": failure.detail})


# --- films ---


def _plan_films(plan: IngestPlan, found: Discovery, on_progress: Progress) -> None:
    """Fills in films, blocks, staged and revived."""
    clips_of: dict[str, list[str]] = {}
    for clip in plan.base_clips:
        clips_of.setdefault(clip["film"], []).append(clip["clip_id"])
    settled = _settled_rows(plan, found.entries)
    to_read = []
    for entry in found.entries:
        row = settled.get(entry.place)
        if row is None:
            to_read.append(entry)
            continue
        done = row["status"] in ("done", "unchanged")
        state = FilmState({**row, "path": printable(str(entry.path)), **({"status": "unchanged"} if done else {})})
        state.remembered = True
        if done:
            state.known = clips_of.get(state.name, [])
            _keep_out(plan, state, [clip for clip in state.known if clip in plan.judgement.leaving])
        plan.films.append(state)
    if to_read:
        ffmpeg_binary()
    with ThreadPoolExecutor(max_workers=len(os.sched_getaffinity(0))) as pool:
        films: list[tuple[FilmState, FilmEntry, Probe | None]] = []
        for part in (to_read[:STOP_FILMS], to_read[STOP_FILMS:]):
            for entry, (state, film) in zip(part, pool.map(partial(_read_film, plan), part), strict=True):
                name = plan.identities.name(entry, state.row["sha256"])
                state.row["film"] = name
                films.append((state, replace(entry, film=name), film))
                on_progress("plan", len(films), len(to_read))
            check_environment([state.row for state, _, _ in films], plan.tolerated, STOP_FILMS)
    plan.films += [_fault(plan, failure) for failure in found.failures]
    in_base = {clip["clip_id"] for clip in plan.base_clips}
    claimed: dict[str, str] = {clip: film.name for film in plan.films for clip in film.known}
    clips: list[ClipPlan] = []
    for state, entry, film in films:
        plan.films.append(state)
        if film is not None:
            clips += _plan_clips(plan, state, entry, film, in_base, claimed)
    older = older_rows(plan.lake, plan.base, {clip.clip_id for clip in clips})
    plan.revived = [{**older[clip.clip_id], "film": clip.film} for clip in clips if clip.clip_id in older]
    clips = [clip for clip in clips if clip.clip_id not in older]
    clips = _with_previews(plan, sorted(clips, key=lambda clip: (clip.film_id, clip.window.start, clip.clip_id)))
    plan.blocks, plan.staged = cut_blocks(plan.lake, clips, plan.recipe.block_clips, plan.recipe_fingerprint)


def _keep_out(plan: IngestPlan, state: FilmState, clips: Sequence[str]) -> None:
    """Counts clips that the gates keep out; a film that has no others is filtered."""
    for clip in clips:
        row = plan.judgement.rejected[clip]
        fault = rejection(row, plan.recipe.gates)
        plan.failures.append(failure_row(state.name, "gate", fault, clip, row["clip_start"]))
    state.gated += clips
    state.known = [clip for clip in state.known if clip not in clips]
    if clips and not state.known and not state.new:
        state.row |= rejection(plan.judgement.rejected[clips[0]], plan.recipe.gates)


def _as_before(row: Mapping[str, Any], entry: FilmEntry) -> bool:
    """Whether a film need not be looked at again; one that failed is, by another decoder than before."""
    if (row["bytes"], row["modified_ns"], row["caption"]) != (entry.bytes, entry.modified_ns, entry.caption):
        return False
    if row["status"] in ("done", "unchanged"):
        return bool(row["reason"] != PARTIAL)
    return row["reason"] in LASTING and (row["status"] != "failed" or decoder_version() in ("", row["decoder"]))


def _settled_rows(plan: IngestPlan, entries: Sequence[FilmEntry]) -> dict[str, Mapping[str, Any]]:
    """Rows of the films, by place, that need not be read: nothing about them or about their twins has changed."""
    regained = plan.judgement.regained
    held = {content(clip) for clip in plan.base_clips if plan.identities.in_run(clip["film"])}
    settled: dict[str, Mapping[str, Any]] = {}
    for entry in entries:
        row = plan.identities.row(entry)
        if row is not None and _as_before(row, entry) and row["film"] not in regained:
            # What another film has made for this one may have left with that film.
            by_other = row["reason"] in ("", "duplicate") and not row["clips"]
            if not by_other or (row["reason"] == "duplicate" and content(row) in held):
                settled[entry.place] = row
    names = {row["film"] for row in settled.values()}
    unsettled = [
        row
        for row in plan.base_films
        if row["film"] in regained
        or (row["film"] not in names and (plan.identities.in_run(row["film"]) or row["reason"] == PARTIAL))
    ]
    # Films of the same content and caption share their clips: all of them are read, or none.
    contents = {content(row) for row in unsettled if row["film_id"]}
    return {place: row for place, row in settled.items() if content(row) not in contents}


def _read_film(plan: IngestPlan, entry: FilmEntry) -> tuple[FilmState, Probe | None]:
    """Hashes (unless the digest is known) and probes one film."""
    state = FilmState(film_row(entry.film, entry.caption, entry.bytes, entry.modified_ns, printable(str(entry.path))))
    state.row["decoder"] = decoder_version()
    try:
        film = probe(entry.path, plan.recipe.limits)
        state.row["sha256"] = plan.identities.digest(entry) or digest_of(entry.path, plan.recipe.limits)
    except DecodeError as error:
        state.row |= {"status": "failed", "reason": error.reason, "detail": error.detail}
        return state, None
    except OSError as error:
        detail = f"it cannot be read ({error.strerror}); check its permissions"
        state.row |= {"status": "failed", "reason": "unreadable", "detail": detail}
        return state, None
    state.row |= {
        "film_id": short_id(state.row["sha256"]),
        "seconds": film.seconds,
        "codec": film.codec,
        "width": film.width,
        "height": film.height,
        "frame_rate": film.frame_rate,
    }
    return state, film


def _plan_clips(
    plan: IngestPlan, state: FilmState, entry: FilmEntry, film: Probe, in_base: set[str], claimed: dict[str, str]
) -> list[ClipPlan]:
    """The new clips of one film; fills in `state` and the failures of windows."""
    recipe, digest = plan.recipe, state.row["sha256"]
    count = window_count(film, recipe.duration, entry.start, entry.end)
    starts = window_starts(film, recipe.duration, entry.start, entry.end)
    if not count:
        length = (min(film.seconds, entry.end) if entry.end is not None else film.seconds) - entry.start
        detail = (
            f"{max(length, 0):.3g} s of video, the window takes {recipe.duration:g} s; set duration or leave it out"
        )
        state.row |= {"status": "filtered", "reason": "shorter_than_window", "detail": detail}
        return []
    if len(starts) < count:
        detail = (
            f"{count - len(starts)} of {count} windows hold no frame: its times jump; re-encode it if they should not"
        )
        gaps = {"status": "filtered", "reason": "too_few_frames", "detail": detail}
        plan.failures.append(failure_row(entry.film, "plan", gaps))
    clips: list[ClipPlan] = []
    outside: list[str] = []
    shared: dict[str, dict[str, Any]] = {}
    few: dict[str, dict[str, Any]] = {}
    for start in starts:
        identity = {"film": digest, "caption": entry.caption, "clip_start": start, "recipe": plan.recipe_fingerprint}
        clip = short_id(fingerprint(identity))
        if clip in claimed:
            detail = f"{claimed[clip]} has this window of the same film with the same caption; it is kept once"
            fault = {"status": "filtered", "reason": "duplicate_window", "detail": detail}
            shared[clip] = failure_row(entry.film, "plan", fault, clip, start)
            continue
        window = select_frames(film, start, recipe.duration, recipe.rate)
        observed = observed_frames(len(window.ticks), recipe.observe, clip)
        if observed.sum() < recipe.min_observed:
            detail = f"{int(observed.sum())} observed frames, fewer than {recipe.min_observed} (min_observed)"
            fault = {"status": "filtered", "reason": "too_few_frames", "detail": detail}
            few[clip] = failure_row(entry.film, "plan", fault, clip, start)
        elif clip in plan.judgement.rejected:
            outside.append(clip)
        elif clip in in_base:
            state.known.append(clip)
        else:
            state.new.append(clip)
            clips.append(
                ClipPlan(
                    clip_id=clip,
                    film_id=state.row["film_id"],
                    film=entry.film,
                    path=str(entry.path.absolute()),
                    bytes=entry.bytes,
                    modified_ns=entry.modified_ns,
                    caption=entry.caption,
                    caption_id=caption_id(entry.caption),
                    window=window,
                    duration=recipe.duration,
                    observed=tuple(bool(seen) for seen in observed),
                    split=split_of(state.row["film_id"], recipe.validation_fraction),
                    preview=False,
                )
            )
    if shared and not (clips or state.known or outside):
        twin = claimed[next(iter(shared))]
        state.row |= {"status": "filtered", "reason": "duplicate", "detail": f"the same film and caption as {twin}"}
        return []
    dropped = [*shared.values(), *few.values()]
    plan.failures.extend(dropped)
    state.filtered = len(dropped)
    claimed |= dict.fromkeys([*state.new, *state.known], entry.film)
    if not state.new:
        detail = f"no window has {recipe.min_observed} observed frames (min_observed)"
        unusable = {"status": "filtered", "reason": "too_few_frames", "detail": detail}
        state.row |= {"status": "unchanged"} if state.known else unusable
    _keep_out(plan, state, outside)
    return clips


def _with_previews(plan: IngestPlan, clips: Iterable[ClipPlan]) -> list[ClipPlan]:
    """The clips with `preview` set: all of the validation split, and of training clips a fixed number over all runs."""
    clips = list(clips)
    kept = sum(row["preview"] and row["split"] == "train" for row in [*plan.base_clips, *plan.revived])
    training = sorted(clip.clip_id for clip in clips if clip.split == "train")
    chosen = set(training[: max(0, plan.recipe.preview_clips - kept)])
    return [replace(clip, preview=clip.split == "validation" or clip.clip_id in chosen) for clip in clips]
