"""What a clip or film is by rule: its identity, its row before it is read, its split, its observed frames."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from storage.fingerprint import fingerprint, short_id

_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
_UNUSABLE = re.compile("[\x00\ud800-\udfff]")


def printable(text: str) -> str:
    """`text` with escapes for what no table, JSON or terminal can show: bytes that are not UTF-8, control characters.

    It takes the names that Python makes of files (with lone surrogates for bytes that are not UTF-8).
    """

    def escaped(found: re.Match[str]) -> str:
        code = ord(found[0])
        return f"\\x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else found[0].encode("unicode_escape").decode()

    return _CONTROL.sub(escaped, text)


def unusable(text: str) -> bool:
    """Whether `text` has a NUL or a lone surrogate: tables, JSON and databases cannot hold it."""
    return _UNUSABLE.search(text) is not None


def part_of(film: str) -> str:
    """`#start-end` at the end of a film's name; empty for a whole film."""
    found = re.search(r"#[0-9.e+-]+-[0-9.e+-]*$", film)
    return found[0] if found else ""


def place(path: str, film: str) -> str:
    """The identity of a film: its file's path, and which part of it. `film` is any name the film goes by."""
    return printable(path) + part_of(film)


def film_row(film: str, caption: str, size: int, modified_ns: int, path: str, source: str = "") -> dict[str, Any]:
    """A row of storage.schema.FILM_SCHEMA for a film that has not been read."""
    return {
        "film": film,
        "film_id": "",
        "caption": caption,
        "bytes": size,
        "modified_ns": modified_ns,
        "sha256": "",
        "status": "",
        "reason": "",
        "detail": "",
        "clips": 0,
        "seconds": float("nan"),
        "codec": "",
        "width": 0,
        "height": 0,
        "frame_rate": float("nan"),
        "decoder": "",
        "path": path,
        "source": source,
    }


def caption_id(caption: str) -> str:
    """16 digits that name a caption's text."""
    return short_id(fingerprint({"caption": caption}))


def split_of(film_id: str, validation_fraction: float) -> str:
    """`validation` for that share of all films, by a hash of the film: it never changes as others come and go."""
    return "validation" if int(fingerprint({"split": film_id})[:12], 16) / 16**12 < validation_fraction else "train"


def observed_frames(count: int, observe: str, clip_id: str) -> np.ndarray:
    """(count,) bool: which kept frames the projection sees, always with both ends.

    Outside the observed times a projection can only hold its end value, so a kept frame there would be lost.
    `random` draws half by the clip's id.
    """
    if observe == "all":
        return np.ones(count, dtype=bool)
    seen = np.zeros(count, dtype=bool)
    if observe == "every_second":
        seen[::2] = True
    else:
        seen[:] = np.random.default_rng(int(clip_id, 16)).random(count) < 0.5
    seen[:1] = seen[-1:] = True
    return seen
