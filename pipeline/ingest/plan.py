"""The plan of an ingest: what is new, what is not, what cannot be used, and the blocks of work. Nothing is decoded.

(But where clips are whole shots, each new film is, once and small: pipeline/ingest/cut.py.)

Films that are as the newest version knows them (name, size, time of change, caption) are neither opened nor hashed.
Blocks are cut from the sorted new clips before any work starts, so the order in which workers finish changes nothing.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.gates import decide, rejection
from pipeline.ingest.block import codec_facts, cut_blocks
from pipeline.ingest.cut import Cut, cut_film
from pipeline.ingest.environment import LASTING, STOP_FILMS, check_environment, decoder_version
from pipeline.ingest.history import as_in_lake, dataset_clips, dataset_films, newest_of_recipe, older_rows
from pipeline.ingest.identity import Identities, content
from pipeline.ingest.reuse import with_stored
from pipeline.ingest.state import PARTIAL, FilmState, IngestPlan, Progress
from pipeline.items import ClipPlan, CodecFacts, Failure, Row
from pipeline.media.decode import Probe, ffmpeg_binary, probe, select_frames, with_next_frame
from pipeline.media.faults import DecodeError, digest_of
from pipeline.media.latents import probe_latents
from pipeline.recipes import DataRecipe, Shots
from pipeline.rows import caption_id, film_row, observed_frames, place, printable, split_of
from pipeline.sources.entries import Discovery, FilmEntry
from pipeline.sources.fetch import FilmChanged, as_file
from pipeline.sources.tables import SourceError
from pipeline.stages.invert import SharedCodec
from storage.fingerprint import fingerprint, short_id
from storage.layout import DiskFull, Lake
from storage.version import Version, latest, read_manifest


def plan_ingest(
    lake: Lake,
    found: Discovery,
    recipe: DataRecipe,
    limit: int | None = None,
    now: float | None = None,
    on_progress: Progress | None = None,
    prune: bool = False,
) -> IngestPlan:
    """Plans an ingest into `lake`. Starts no Ray and decodes nothing.

    Args:
        lake: the lake.
        found: the films, as pipeline.sources.folders.discover finds them.
        recipe: how.
        limit: this many films only, the first by name.
        now: seconds since 1970, for the run's name.
        on_progress: told how many films have been read.
        prune: whether films that these sources had and have no longer leave the dataset; else they stay, and are named.

    Raises:
        DecodeError: `no_ffmpeg`.
        ValueError, CodecUnavailable: the recipe's codec, which says how imported latents must look, cannot be loaded;
            it is only where no version has clips of this recipe.
        SourceError: a source of films to be pruned has none at all.
        RunnerError: all of the first films fail for one reason that lies outside them.
    """
    begin = time.perf_counter()
    moment = time.gmtime(time.time() if now is None else now)
    recipe = as_in_lake(lake, recipe)
    recipe_fingerprint = fingerprint(recipe.data_fields())
    parent = latest(lake)
    base, damage = newest_of_recipe(lake, parent, recipe_fingerprint)
    notes = [*found.notes, *(f"an older version is damaged, which stops nothing: {problem}" for problem in damage)]
    if parent is not None and base is None:
        notes.append(f"the recipe differs from version {parent.number}'s: its clips are not carried on, all are new")
    base_films = dataset_films(lake, parent, base)
    base_clips = dataset_clips(lake, parent, base, base_films, recipe.in_step)
    rejected = read_manifest(lake, base, "rejected").to_pylist() if base else []
    rejected = _without_lost_originals(rejected, base_clips)
    whole = _without_known_missing(found, base_films)
    found = whole.limited(limit)
    plan = IngestPlan(
        lake=lake,
        recipe=recipe,
        recipe_fingerprint=recipe_fingerprint,
        run_id=f"{time.strftime('%Y%m%dT%H%M%SZ', moment)}-{os.urandom(3).hex()}",
        created=time.strftime("%Y-%m-%dT%H:%M:%SZ", moment),
        parent=parent,
        base=base,
        identities=Identities(base_films, found.items, whole, recipe.in_step),
        films=[],
        blocks=[],
        staged={},
        base_clips=base_clips,
        base_films=base_films,
        restored=[],
        gate_decision=decide(base_clips, rejected, recipe.gates, recipe.below_gate, recipe.score_only),
        failures=[],
        notes=notes,
        seconds={},
        prune=prune,
    )
    _plan_films(plan, found, on_progress or (lambda stage, done, total: None))
    _note_missing(plan, whole)
    plan.films.sort(key=lambda film: film.name)
    plan.failures.extend(
        Failure(film.name, "source" if film.row["sha256"] == "" else "plan", it.reason, it.detail, it.status)
        for film in plan.films
        if (it := film.outcome).status in ("failed", "filtered")
    )
    plan.seconds["plan"] = time.perf_counter() - begin
    return plan


def _without_known_missing(found: Discovery, films: Sequence[Row]) -> Discovery:
    """The sources without films that a table names, that are not there, and that the dataset has.

    They are no failures of every run to come: they are missing from the source, and can be pruned.
    """
    known = {place(row["path"], row["film"]) for row in films if row["path"] and row["clips"]}
    failures = [it for it in found.failures if it.reason != "film_missing" or it.place not in known]
    return replace(found, failures=failures)


def _without_lost_originals(rejected: Sequence[Row], clips: Sequence[Row]) -> list[Row]:
    """Clips that were kept out; one is no duplicate any more where what it was like has left the dataset."""
    held = {clip["frames_id"] for clip in clips}
    return [
        {**row, "duplicates": 0.0} if row["duplicates"] > 0 and row["frames_id"] not in held else row
        for row in rejected
    ]


def _note_missing(plan: IngestPlan, sources: Discovery) -> None:
    """Fills in `missing`, and says so."""
    held = {clip["film"] for clip in plan.base_clips}
    missing = plan.identities.missing()
    plan.missing = missing
    named = sorted(film for film in missing if film in held)
    if not named:
        return
    if plan.prune:
        for origin in {missing[film] for film in named}:
            if not any(item.origin == origin for item in sources.items):
                count = sum(missing[film] == origin for film in named)
                raise SourceError(
                    f"--prune would take out all {count} films of {origin}, which has none now; correct the source, "
                    "or take them out one by one with: vlfm erase FILM"
                )
    shown = ", ".join(printable(film) for film in named[:5]) + (", ..." if len(named) > 5 else "")
    are = "film of the dataset is" if len(named) == 1 else "films of the dataset are"
    its = "its" if len(named) == 1 else "their"
    what = f"{its} clips leave the dataset" if plan.prune else f"{its} clips stay, --prune takes them out"
    plan.notes.append(f"{len(named)} {are} not in the source ({shown}); {what}")


def _unusable(plan: IngestPlan, failure: Failure) -> FilmState:
    row = film_row(plan.identities.name(failure), "", 0, 0, failure.path, failure.origin)
    state = FilmState(_remembered(row, plan.identities.row(failure)))
    state.reject(failure)
    return state


def _remembered(row: dict[str, Any], before: Row | None) -> dict[str, Any]:
    """The row of a film that could not be looked at this time, with what the dataset knows of it."""
    facts = ("caption", "bytes", "modified_ns", "sha256", "film_id", "seconds", "codec", "width", "height")
    known = () if before is None or not before["sha256"] else (*facts, "frame_rate", "decoder")
    return {**row, **{name: before[name] for name in known if before is not None}}


# --- films ---


def _plan_films(plan: IngestPlan, found: Discovery, on_progress: Progress) -> None:
    """Fills in films, blocks, staged and restored."""
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
        where = {"path": printable(entry.path), "source": entry.origin}
        state = FilmState({**row, **where, **({"status": "unchanged"} if done else {})})
        state.remembered = True
        if done:
            state.known = clips_of.get(state.name, [])
            _keep_out(plan, state, [clip for clip in state.known if clip in plan.gate_decision.leaving])
        plan.films.append(state)
    if any(entry.latents for entry in to_read):
        plan.imported = _codec_of(plan.recipe, plan.base)
    elif to_read:
        ffmpeg_binary()
    with ThreadPoolExecutor(max_workers=len(os.sched_getaffinity(0))) as pool:
        films: list[tuple[FilmState, FilmEntry, tuple[Probe, Cut] | None]] = []
        for part in (to_read[:STOP_FILMS], to_read[STOP_FILMS:]):
            for entry, (state, film) in zip(part, pool.map(partial(_read_film, plan), part), strict=True):
                films.append((state, entry, film))
                on_progress("plan", len(films), len(to_read))
            check_environment([state.outcome for state, _, _ in films], plan.tolerated, STOP_FILMS)
    unread = [entry for entry in found.entries if entry.place in settled]
    unread += [entry for state, entry, _ in films if not state.row["sha256"]]
    read = [(entry, state.row["sha256"]) for state, entry, _ in films if state.row["sha256"]]
    plan.identities.settle([*unread, *found.failures], read)
    _rename(plan)
    films = [(state, replace(entry, film=plan.identities.name(entry)), film) for state, entry, film in films]
    for state, entry, _ in films:
        state.row["film"] = entry.film
    plan.films += [_unusable(plan, failure) for failure in found.failures]
    in_base = {clip["clip_id"] for clip in plan.base_clips}
    claimed: dict[str, str] = {clip: film.name for film in plan.films for clip in film.known}
    clips: list[ClipPlan] = []
    for state, entry, film in films:
        plan.films.append(state)
        if film is not None:
            clips += _plan_clips(plan, state, entry, *film, in_base, claimed)
    older = older_rows(plan.lake, plan.base, {clip.clip_id for clip in clips})
    plan.restored = [{**older[clip.clip_id], "film": clip.film} for clip in clips if clip.clip_id in older]
    clips = [clip for clip in clips if clip.clip_id not in older]
    clips = with_stored(plan.lake, plan.recipe, clips)
    clips = _with_previews(plan, sorted(clips, key=lambda clip: (clip.film_id, clip.window.start, clip.clip_id)))
    plan.blocks, plan.staged = cut_blocks(plan.lake, clips, plan.recipe.block_clips, plan.recipe_fingerprint)


def _rename(plan: IngestPlan) -> None:
    """Gives what the dataset has of films that moved their new names."""
    renamed = plan.identities.renamed
    if not renamed:
        return
    plan.base_clips = [{**clip, "film": renamed.get(clip["film"], clip["film"])} for clip in plan.base_clips]
    plan.base_films = [row for row in plan.base_films if row["film"] not in renamed]
    plan.gate_decision = plan.gate_decision.renamed(renamed)


def _keep_out(plan: IngestPlan, state: FilmState, clips: Sequence[str]) -> None:
    """Counts clips that the gates keep out; a film that has no others is filtered."""
    failures = [rejection(plan.gate_decision.rejected[clip], plan.recipe.rejecting_gates) for clip in clips]
    plan.failures += [replace(failure, film=state.name) for failure in failures]
    state.gated += clips
    state.known = [clip for clip in state.known if clip not in clips]
    if clips and not state.known and not state.new:
        state.reject(failures[0])


def _as_before(row: Row, entry: FilmEntry) -> bool:
    """Whether a film need not be looked at again; one that failed is, by another decoder than before."""
    if (row["bytes"], row["modified_ns"], row["caption"]) != (entry.bytes, entry.modified_ns, entry.caption):
        return False
    if row["status"] in ("done", "unchanged"):
        return bool(row["reason"] != PARTIAL)
    if row["status"] != "failed" or entry.latents:
        return row["reason"] in LASTING
    return row["reason"] in LASTING and decoder_version() in ("", row["decoder"])


def _settled_rows(plan: IngestPlan, entries: Sequence[FilmEntry]) -> dict[str, Row]:
    """Rows of the films, by place, that need not be read: nothing about them or about their twins has changed."""
    regained = plan.gate_decision.regained
    held = {content(clip) for clip in plan.base_clips if plan.identities.in_run(clip["film"])}
    settled: dict[str, Row] = {}
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


def _read_film(plan: IngestPlan, entry: FilmEntry) -> tuple[FilmState, tuple[Probe, Cut] | None]:
    """Hashes (unless the digest is known), probes and cuts one film."""
    facts = (entry.film, entry.caption, entry.bytes, entry.modified_ns, printable(entry.path), entry.origin)
    state = FilmState(film_row(*facts))
    state.row["decoder"] = "" if entry.latents else decoder_version()
    try:
        with as_file(entry.path, entry.bytes, entry.modified_ns) as file:
            film = _probe(plan, entry, file)
            state.row["sha256"] = plan.identities.digest(entry) or digest_of(file, plan.recipe.limits)
            cut = cut_film(film, entry, plan.recipe, file)
    except DiskFull:
        raise
    except FilmChanged as error:
        state.settle("failed", "film_changed", str(error))
        return state, None
    except DecodeError as error:
        state.settle("failed", error.reason, error.detail)
        return state, None
    except OSError as error:
        state.settle("failed", "unreadable", f"it cannot be read ({error.strerror}); check its permissions")
        return state, None
    state.row |= {
        "film_id": short_id(state.row["sha256"]),
        "seconds": film.seconds,
        "codec": film.codec,
        "width": film.width,
        "height": film.height,
        "frame_rate": film.frame_rate,
    }
    return state, (film, cut)


def _probe(plan: IngestPlan, entry: FilmEntry, file: Path) -> Probe:
    if not entry.latents:
        return probe(file, plan.recipe.limits)
    assert plan.imported is not None
    return probe_latents(file, plan.imported, plan.recipe.limits)


def _codec_of(recipe: DataRecipe, base: Version | None) -> CodecFacts:
    """The recipe's codec, which imported latents must be of; it is not loaded where a version says what it is."""
    if base is None:
        return codec_facts(SharedCodec(recipe.codec), recipe.size)
    return CodecFacts.from_json({**base.codec, "latent_shape": base.clip["latent_shape"]})


def _plan_clips(
    plan: IngestPlan,
    state: FilmState,
    entry: FilmEntry,
    film: Probe,
    cut: Cut,
    in_base: set[str],
    claimed: dict[str, str],
) -> list[ClipPlan]:
    """The new clips of one film; fills in `state` and the failures of windows."""
    recipe, digest, shots = plan.recipe, state.row["sha256"], plan.recipe.whole_shots
    if shots is not None and not cut.spans:
        detail = f"the part begins at {entry.start:g} s, where the film ({film.seconds:.3g} s) has ended"
        state.settle("filtered", "too_few_frames", detail)
        return []
    if not cut.spans and not cut.missing:
        length = (min(film.seconds, entry.end) if entry.end is not None else film.seconds) - entry.start
        detail = (
            f"{max(length, 0):.3g} s of video, the window takes {recipe.duration:g} s; set duration or leave it out"
        )
        state.settle("filtered", "shorter_than_window", detail)
        return []
    if cut.missing:
        detail = (
            f"{cut.missing} of {cut.missing + len(cut.spans)} windows hold no frame: its times jump; re-encode it if "
            "they should not"
        )
        plan.failures.append(Failure(entry.film, "plan", "too_few_frames", detail, "filtered"))
    clips: list[ClipPlan] = []
    outside: list[str] = []
    shared: dict[str, Failure] = {}
    few: dict[str, Failure] = {}
    for span in cut.spans:
        start = span.start
        identity = {"film": digest, "caption": entry.caption, "clip_start": start, "recipe": plan.recipe_fingerprint}
        if shots is not None:
            identity["duration"] = span.duration
        clip = short_id(fingerprint(identity))
        if clip in claimed:
            detail = f"{claimed[clip]} has this window of the same film with the same caption; it is kept once"
            shared[clip] = Failure(entry.film, "plan", "duplicate_window", detail, "filtered", clip, start)
            continue
        window = select_frames(film, start, span.duration, recipe.rate)
        if recipe.uses_next_frame:
            window = with_next_frame(film, window, span.duration, recipe.rate, span.shot_end)
        observed = observed_frames(len(window.ticks), recipe.observe, clip)
        if shots is not None and not shots.min_frames <= len(window.ticks) <= shots.max_frames:
            few[clip] = _wrong_length(entry.film, clip, start, len(window.ticks), shots)
        elif observed.sum() < recipe.min_observed:
            detail = f"{int(observed.sum())} observed frames, fewer than {recipe.min_observed} (min_observed)"
            few[clip] = Failure(entry.film, "plan", "too_few_frames", detail, "filtered", clip, start)
        elif clip in plan.gate_decision.rejected:
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
                    path=entry.path,
                    bytes=entry.bytes,
                    modified_ns=entry.modified_ns,
                    caption=entry.caption,
                    caption_id=caption_id(entry.caption),
                    window=window,
                    duration=span.duration,
                    observed=tuple(bool(seen) for seen in observed),
                    split=split_of(state.row["film_id"], recipe.validation_fraction),
                    preview=False,
                    short_side=float(min(film.width, film.height)) or math.nan,
                    film_seconds=film.seconds,
                    latents=entry.latents,
                    origin=entry.origin,
                )
            )
    if shared and not (clips or state.known or outside):
        twin = claimed[next(iter(shared))]
        state.settle("filtered", "duplicate", f"the same film and caption as {twin}")
        return []
    dropped = [*shared.values(), *few.values()]
    plan.failures.extend(dropped)
    state.filtered = len(dropped)
    claimed |= dict.fromkeys([*state.new, *state.known], entry.film)
    if not state.new:
        if state.known:
            state.settle("unchanged")
        else:
            state.settle("filtered", *_no_clip(recipe, few))
    _keep_out(plan, state, outside)
    return clips


def _wrong_length(film: str, clip: str, start: float, frames: int, shots: Shots) -> Failure:
    """Why a shot is no clip."""
    short = frames < shots.min_frames
    than = f"fewer than {shots.min_frames} (shots.min_frames)" if short else f"more than {shots.max_frames}"
    remedy = "" if short else "; raise shots.max_frames, lower rate, or name shorter parts"
    reason = "too_few_frames" if short else "too_many_frames"
    return Failure(film, "plan", reason, f"{frames} frames, {than}{remedy}", "filtered", clip, start)


def _no_clip(recipe: DataRecipe, dropped: Mapping[str, Failure]) -> tuple[str, str]:
    """Reason and detail of a film that no clip is made of, because of what became of its windows or shots."""
    if recipe.whole_shots is None:
        return "too_few_frames", f"no window has {recipe.min_observed} observed frames (min_observed)"
    reasons = [failure.reason for failure in dropped.values()]
    lengths = f"{recipe.whole_shots.min_frames} to {recipe.whole_shots.max_frames}"
    return max(reasons, key=reasons.count), f"none of {len(reasons)} shots has {lengths} frames (shots.min_frames)"


def _with_previews(plan: IngestPlan, clips: Iterable[ClipPlan]) -> list[ClipPlan]:
    """The clips with `preview` set: all of the validation split, and of training clips a fixed number over all runs."""
    clips = list(clips)
    kept = sum(row["preview"] and row["split"] == "train" for row in [*plan.base_clips, *plan.restored])
    training = sorted(clip.clip_id for clip in clips if clip.split == "train" and not clip.latents)
    chosen = set(training[: max(0, plan.recipe.preview_clips - kept)])
    previews = [
        # A clip that is copied keeps what there is.
        (clip.split == "validation" and not clip.latents)
        or (clip.stored.preview if clip.copied and clip.stored else clip.clip_id in chosen)
        for clip in clips
    ]
    return [replace(clip, preview=preview) for clip, preview in zip(clips, previews, strict=True)]
