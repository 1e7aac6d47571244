"""What is wrong with a film, in one fixed word and one line that says the mend."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

_BOXES = (b"ftyp", b"moov", b"mdat", b"moof", b"free", b"wide", b"skip")
"""Kinds of an MP4's outermost parts."""


class DecodeError(Exception):
    """A film, or a part of it, that cannot be used: `reason` is a fixed word, `detail` one line with the mend."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


@dataclass(frozen=True)
class MediaLimits:
    """What a film may cost."""

    max_pixels: int = 8192 * 4320
    """Largest frame, in pixels."""
    max_frames: int = 1_000_000
    """Most frames in a film."""
    timeout: float = 120.0
    """Longest wait for ffmpeg, in seconds: for a whole probe, and for the frames of one window."""


def check_readable(path: Path) -> None:
    """Raises DecodeError where the file is missing, empty or closed to us."""
    try:
        if path.stat().st_size == 0:
            raise DecodeError("empty_file", "the file has no bytes; copy it again or remove it")
        with path.open("rb") as file:
            file.read(1)
    except FileNotFoundError:
        raise DecodeError("film_missing", f"{path.name} is not there; correct the table or add the film") from None
    except OSError as error:
        raise DecodeError("unreadable", f"{error.strerror}; check its permissions") from None


def ended_early(errors: str) -> bool:
    """Whether ffmpeg says so; its exit status is 0 then."""
    return "ended prematurely" in errors or "partial file" in errors


def diagnosis(path: Path, errors: str, frames: int, limits: MediaLimits, where: float | None = None) -> DecodeError:
    """What is wrong with a film, from its first bytes and ffmpeg's own words."""
    place = "" if where is None else f" in the window at {where:g} s"
    if "exceeds specified max pixel count" in errors or "Picture size" in errors:
        return DecodeError("too_large", f"frames of more than {limits.max_pixels} pixels; raise max_pixels if wanted")
    if "Audio:" in errors and "Video:" not in errors:
        return DecodeError("no_video_stream", "it has sound but no pictures; remove it")
    if "Video:" in errors or _starts_like_film(path):
        no_index = "moov atom not found" in errors and frames == 0
        if no_index or ended_early(errors) or cut_short(path) or _cut_riff(path):
            return DecodeError("truncated", f"the file ends before the film does{place}; copy it again")
        message = [
            line for line in errors.splitlines() if re.search("error|invalid|corrupt|broken|missing", line, re.I)
        ]
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
    )


def cut_short(path: Path) -> bool:
    """Whether one of an MP4's boxes claims more bytes than the file has. ffmpeg reads such a film without an error."""
    size = path.stat().st_size
    with path.open("rb") as file:
        position, kind = 0, b"ftyp"
        while position + 8 <= size:
            file.seek(position)
            head = file.read(16)
            length, kind = int.from_bytes(head[:4], "big"), head[4:8]
            if position == 0 and kind not in _BOXES:
                return False
            length = int.from_bytes(head[8:16], "big") if length == 1 else length
            if length < 8:
                return False  # up to the end of the file, or no box at all
            position += length
    return position > size and kind in _BOXES


def _cut_riff(path: Path) -> bool:
    """Whether an AVI claims more bytes than it has; some recorders write wrong sizes, so only broken ones are asked."""
    with path.open("rb") as file:
        head = file.read(8)
    return head[:4] == b"RIFF" and int.from_bytes(head[4:8], "little") + 8 > path.stat().st_size
