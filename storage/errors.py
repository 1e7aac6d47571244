"""What is expected to go wrong: one base class, so that a program catches it without a list of names.

It stands at the bottom of the layers and imports nothing, so every package derives its errors from it and a program can
catch them without loading what raises them. An error keeps its second base class (ValueError, OSError ...) where code
that knows nothing of this package catches that.
"""

from __future__ import annotations

from enum import Enum


class Kind(Enum):
    """What an error is about; its value is the word in reports."""

    INPUT = "input"
    """What was given: a file, a table, an option. Correct it."""
    ENVIRONMENT = "environment"
    """The machine or what is installed on it: ffmpeg, Ray, the disk, weights. Correct that and run again."""
    DAMAGE = "damage"
    """Something stored is missing or altered. Restore it, or make it again."""
    CONFLICT = "conflict"
    """It does not go together with what is there: another run, another codec, another version."""
    DEFECT = "defect"
    """The program itself is wrong. Report it, with the traceback."""


class VlfmError(Exception):
    """An expected error: `str(error)` is one line with the thing, the value and the remedy.

    Args:
        message: what is wrong; the whole line where `remedy` is empty.
        remedy: what to do about it, where it is a part of its own; it follows the message after a semicolon.
        kind: what it is about, where that differs from the class's.
    """

    kind: Kind = Kind.INPUT
    remedy: str = ""

    def __init__(self, message: str = "", remedy: str = "", kind: Kind | None = None) -> None:
        super().__init__(f"{message}; {remedy}" if remedy else message)
        self.message, self.remedy = message, remedy
        if kind is not None:
            self.kind = kind


def is_expected(error: BaseException) -> bool:
    """Whether an error is about the input or the machine, so that its message is the whole answer.

    Python's own ValueError, OSError and FloatingPointError count: libraries raise them for bad input.
    """
    if isinstance(error, VlfmError):
        return error.kind is not Kind.DEFECT
    return isinstance(error, (ValueError, OSError, FloatingPointError))
