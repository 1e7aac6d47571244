"""What is a film's own fault and what lies outside the films: reasons, the decoder, one cause for all failures.

A film is blamed for its own faults only. Where all films of a run fail for one reason, the films seldom are the cause:
the run ends in one line then, nothing is published or staged, and the next run tries all of them again.
"""

from __future__ import annotations

from collections.abc import Iterable

from model.ffmpeg import NoFfmpeg, find_ffmpeg
from pipeline.cluster import RunnerError
from pipeline.gates import BELOW_GATE
from pipeline.items import Outcome
from pipeline.media.latents import BAD_FRAME_TIMES, CODEC_MISMATCH, NOT_LATENTS, WRONG_SHAPE

LASTING = frozenset(
    [
        "empty_file",
        "not_a_video",
        "no_video_stream",
        "truncated",
        "corrupt",
        "shorter_than_window",
        "too_few_frames",
        "too_many_frames",
        "duplicate",
        BELOW_GATE,
        NOT_LATENTS,
        BAD_FRAME_TIMES,
        CODEC_MISMATCH,
        WRONG_SHAPE,
    ]
)
"""Faults of the film itself: not looked at again before the file or the decoder changes, or the recipe's gates open.
What fails for any other reason is tried again by the next run."""

RECIPE_BOUND = frozenset(
    [
        *("shorter_than_window", "too_few_frames", "too_many_frames", "duplicate"),
        *(BELOW_GATE, NOT_LATENTS, CODEC_MISMATCH, WRONG_SHAPE),
    ]
)
"""Those of them that another recipe may see otherwise."""

CERTAIN = frozenset(["no_ffmpeg", "decoder_failed"])
"""Reasons that the tool itself was found to be broken: one film that fails for them tells enough."""

STOP_FILMS = 20
"""After so many films that all failed for one reason a run does not go on to the others."""

OTHER = "{decoder} does not work; name another one in VLFM_FFMPEG"
CAUSES = {
    "no_ffmpeg": OTHER,
    "decoder_failed": OTHER,
    "decode_failed": OTHER,
    "corrupt": "{decoder} does not work, or all of them are damaged; name another one in VLFM_FFMPEG",
    "timeout": "the machine or the disk of the films is too slow; wait until it is less busy, or raise timeout",
    "unreadable": "the films are closed to this user, or their disk has faults; correct the permissions or the disk",
    "film_missing": "the folder of the films was moved, or is not there on the workers; correct the source",
    "film_changed": "the films are still being written; wait until that is done",
    "worker_died": "the workers run out of memory; use smaller frames (size), shorter windows or a larger machine",
    "worker_failed": "the workers cannot run here; correct what the message names",
    "invert_failed": "the codec cannot run here, or runs out of memory; correct what the message names, or use another",
}
"""Reasons that the environment may have, with the likely cause and the remedy."""

UNTRIED = frozenset(
    [
        "bad_times",
        "no_caption",
        "duplicate_name",
        "empty_file",
        "not_a_video",
        "shorter_than_window",
        "too_few_frames",
        "too_many_frames",
    ]
)
"""Reasons found without decoding a frame: such a film says nothing about the environment."""


def decoder_version() -> str:
    """The version of the ffmpeg that decodes; empty where there is none that works."""
    try:
        return find_ffmpeg().version
    except NoFfmpeg:
        return ""


def check_environment(outcomes: Iterable[Outcome], tolerated: int = 0, least: int = 2) -> None:
    """Makes sure that films were not all lost for one reason that the environment may have.

    One film alone may well be broken, so its fault is the environment's only where that is CERTAIN.

    Args:
        outcomes: what became of films or clips of this run.
        tolerated: so many films may fail without this being said.
        least: so many films must have failed.

    Raises:
        RunnerError: they were; the line names reason, likely cause and remedy.
    """
    tried = [outcome for outcome in outcomes if outcome.status != "filtered" and outcome.reason not in UNTRIED]
    reasons = {outcome.reason if outcome.status == "failed" else "" for outcome in tried}
    films = {outcome.film for outcome in tried}
    reason = reasons.pop() if len(reasons) == 1 else ""
    if reason not in CAUSES or (reason not in CERTAIN and (len(films) < least or len(films) <= tolerated)):
        return
    many = f"all {len(films)} films that were tried" if len(films) > 1 else "the only film that was tried"
    cause = CAUSES[reason].format(decoder=_decoder())
    again = "then run the same command again, nothing of this run was kept"
    raise RunnerError(f"{many} failed for one reason, {reason}: {tried[0].detail}; likely cause: {cause}; {again}")


def _decoder() -> str:
    try:
        found = find_ffmpeg()
    except NoFfmpeg:
        return "ffmpeg"
    return f"{found} at {found.path}"
