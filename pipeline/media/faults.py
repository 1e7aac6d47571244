"""What is wrong with a film or with the ffmpeg that reads it, in one fixed word and one line that says the remedy."""

from __future__ import annotations

import errno
import re
import stat
import time
from dataclasses import dataclass
from pathlib import Path

from model.ffmpeg import Ffmpeg, killed_by, last_words
from storage.errors import Kind, VlfmError
from storage.fingerprint import file_digest

_BOXES = (b"ftyp", b"moov", b"mdat", b"moof", b"free", b"wide", b"skip")
"""Kinds of an MP4's outermost parts."""
MOST_BOXES = 1_000_000
"""Outermost parts that are looked at: a film in fragments of a second has as many after a week."""


class DecodeError(VlfmError):
    """A film, or a part of it, that cannot be used: `reason` is a fixed word, `detail` one line with the remedy."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail
        if reason in ("no_ffmpeg", "decoder_failed"):
            self.kind = Kind.ENVIRONMENT

    def __reduce__(self) -> tuple[type[DecodeError], tuple[str, str]]:
        # Errors of workers travel between processes.
        return DecodeError, (self.reason, self.detail)


@dataclass(frozen=True)
class MediaLimits:
    """What a film may cost."""

    max_pixels: int = 8192 * 4320
    """Largest frame, in pixels."""
    max_frames: int = 1_000_000
    """Most frames (and packets) in a film."""
    timeout: float = 120.0
    """Longest wait in seconds: for a whole probe, for the frames of one window, and for the file's digest on top of
    what its bytes take at `SLOWEST`."""
    max_bytes: int = 2**38
    """Largest file, in bytes."""


SLOWEST = 8 * 2**20
"""Bytes a second below which reading a file counts as hanging. Disks and networks that hold films are faster, so that
a film of any size has its time."""


def check_readable(path: Path, limits: MediaLimits | None = None) -> None:
    """Raises DecodeError where the file is missing, empty, too large, closed to us, or no file."""
    limits = limits or MediaLimits()
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):  # opening a pipe would wait for ever
            raise DecodeError("unreadable", f"{path.name} is no regular file; put the film itself there")
        if found.st_size == 0:
            raise DecodeError("empty_file", "the file has no bytes; copy it again or remove it")
        if found.st_size > limits.max_bytes:
            detail = f"{found.st_size} bytes; the recipe allows {limits.max_bytes}; cut the film, or raise max_bytes"
            raise DecodeError("too_large", detail)
        with path.open("rb") as file:
            file.read(1)
    except FileNotFoundError:
        raise DecodeError("film_missing", f"{path.name} is not there; correct the table or add the film") from None
    except OSError as error:
        raise _unreadable(error) from None


def _unreadable(error: OSError) -> DecodeError:
    denied = error.errno in (errno.EACCES, errno.EPERM)
    remedy = "check its permissions" if denied else "check the disk, and run again"
    return DecodeError("unreadable", f"{error.strerror}; {remedy}")


def digest_of(path: Path, limits: MediaLimits) -> str:
    """The sha256 of the film's bytes.

    Raises:
        DecodeError: `timeout`, it is read slower than `SLOWEST`.
        OSError: it cannot be read.
    """
    seconds = limits.timeout + path.stat().st_size / SLOWEST
    try:
        return file_digest(path, seconds)
    except TimeoutError:
        detail = (
            f"reading all bytes of {path.name} took over {seconds:.0f} s; copy it to a faster disk or raise timeout"
        )
        raise DecodeError("timeout", detail) from None


def ended_early(errors: str) -> bool:
    """Whether ffmpeg says so; its exit status is 0 then."""
    return "ended prematurely" in errors or "partial file" in errors


_TOOL = re.compile(
    r"error while loading shared libraries|symbol lookup error|unrecognized option|option not found|no such filter"
    r"|filter not found|unknown (en|de)coder|(en|de)coder( \(codec .*\))? not found|no decoder found"
    r"|requested output format|muxer not found|protocol not found|cannot allocate memory|out of memory"
    r"|no space left on device|error splitting the argument list",
    re.I,
)
"""Messages about ffmpeg or its machine, and not about the film."""
_UNREADABLE = re.compile(r"input/output error|too many open files|permission denied|stale file handle", re.I)
_FILM = re.compile(r"error|invalid|corrupt|broken|missing|whitelist|could not find|does not contain|matches no", re.I)
"""Messages that something is wrong with the film."""


def tool_failed(tool: Ffmpeg, what: str) -> DecodeError:
    """An ffmpeg that failed, through no fault of the film's; the film is tried again by the next run."""
    return DecodeError("decoder_failed", f"{tool}: {what}; run again, or name another ffmpeg with VLFM_FFMPEG")


def diagnosis(
    path: Path,
    errors: str,
    frames: int,
    limits: MediaLimits,
    tool: Ffmpeg,
    status: int | None,
    where: float | None = None,
) -> DecodeError:
    """What is wrong with a film, from its first bytes and ffmpeg's own words.

    A film is blamed for what ffmpeg says of it or leaves out of it, and never for an ffmpeg that cannot work.

    status: ffmpeg's exit status; None where it was stopped.
    """
    try:
        place = "" if where is None else f" in the window at {where:g} s"
        return _diagnosis(path, errors, frames, limits, tool, status, place)
    except OSError as error:
        return _unreadable(error)


def _diagnosis(
    path: Path, errors: str, frames: int, limits: MediaLimits, tool: Ffmpeg, status: int | None, place: str
) -> DecodeError:
    fault = next((line for line in errors.splitlines() if _TOOL.search(line)), None)
    if (status is not None and killed_by(status)) or fault is not None:
        return tool_failed(tool, last_words(status or 0, fault or errors) + place)
    if "exceeds specified max pixel count" in errors or "Picture size" in errors:
        return DecodeError("too_large", f"frames of more than {limits.max_pixels} pixels; raise max_pixels if wanted")
    if "Audio:" in errors and "Video:" not in errors:
        return DecodeError("no_video_stream", "it has sound but no pictures; remove it")
    if "matches no streams" in errors:
        return DecodeError("no_video_stream", "it has no pictures that move; remove it")
    known = "Video:" in errors or _starts_like_film(path)
    if known:
        no_index = "moov atom not found" in errors and frames == 0
        if no_index or ended_early(errors) or cut_short(path, limits.timeout) or _cut_riff(path):
            return DecodeError("truncated", f"the file ends before the film does{place}; copy it again")
    if unreadable := _UNREADABLE.search(errors):
        return DecodeError("unreadable", f"{unreadable[0]}{place}; check the disk, and run again")
    if status and not _FILM.search(errors):
        return tool_failed(tool, last_words(status, errors) + place)
    if known:
        message = [line for line in errors.splitlines() if _FILM.search(line)]
        heard = re.sub(r"\[.*?\] ?", "", message[0]).strip()[:120] if message else f"{frames} frames came"
        return DecodeError("corrupt", f"it cannot be decoded{place} ({heard}); re-encode it or remove it")
    return DecodeError("not_a_video", "its content is no film of a known container; remove it or convert it to mp4")


def _starts_like_film(path: Path) -> bool:
    with path.open("rb") as file:
        head = file.read(12)
    return head[4:8] in _BOXES or head[:4] in (
        b"\x1aE\xdf\xa3",
        b"RIFF",
        b"OggS",
        b"FLV\x01",
        b"GIF8",
    )


def cut_short(path: Path, timeout: float) -> bool:
    """Whether one of an MP4's boxes claims more bytes than the file has. ffmpeg reads such a film without an error.

    Of a file of more than `MOST_BOXES` boxes that is not known.

    Raises:
        DecodeError: `timeout`, the disk took longer than this many seconds.
    """
    size = path.stat().st_size
    deadline = time.monotonic() + timeout
    with path.open("rb") as file:
        position, kind = 0, b"ftyp"
        for _ in range(MOST_BOXES):
            if position + 8 > size:
                return position > size and kind in _BOXES
            if time.monotonic() > deadline:
                raise DecodeError("timeout", f"reading {path.name} took over {timeout:g} s; raise timeout")
            file.seek(position)
            head = file.read(16)
            length, kind = int.from_bytes(head[:4], "big"), head[4:8]
            if position == 0 and kind not in _BOXES:
                return False
            length = int.from_bytes(head[8:16], "big") if length == 1 else length
            if length < 8:
                return False  # up to the end of the file, or no box at all
            position += length
    return False


def _cut_riff(path: Path) -> bool:
    """Whether an AVI claims more bytes than it has; some recorders write wrong sizes, so only broken ones are asked."""
    with path.open("rb") as file:
        head = file.read(8)
    return head[:4] == b"RIFF" and int.from_bytes(head[4:8], "little") + 8 > path.stat().st_size
