"""Programs that act as other ffmpegs: the real one behind a script that changes what it is told, prints or does."""

from __future__ import annotations

import shlex
from pathlib import Path

from model.ffmpeg import find_ffmpeg

OF_5_1 = r"s/ duration: *[0-9-]* duration_time:[^ ]* */ pos:       48 /"
"""For sed: the lines of showinfo as versions up to 5.1 print them."""


def shim(path: Path, script: str, only_films: bool = False) -> Path:
    """An ffmpeg at `path` that is this bash script, in which $REAL is the real one.

    only_films: whether the self-test meets the real one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    passed = 'case "$*" in *vlfm-ffmpeg-*) exec "$REAL" "$@";; esac\n' if only_films else ""
    path.write_text(f"#!/bin/bash\nREAL={find_ffmpeg().path}\n{passed}{script}\n")
    path.chmod(0o755)
    return path


def printing(command: str) -> str:
    """A script in which the real ffmpeg's messages pass through the filter `command`."""
    return f'{{ "$REAL" "$@" 2>&1 1>&3 | {command} 1>&2; exit "${{PIPESTATUS[0]}}"; }} 3>&1'


def refusing(option: str) -> str:
    """A script that does not know `option`."""
    words = (
        f"echo \"Unrecognized option '{option}'.\" >&2; echo 'Error splitting the argument list: Option not found' >&2"
    )
    return f'case " $* " in *" -{option} "*) {words}; exit 1;; esac\nexec "$REAL" "$@"'


def saying(words: str, status: int) -> str:
    """A script that says `words` and ends."""
    return f"echo {shlex.quote(words)} >&2\nexit {status}"


def before_5_1() -> str:
    """A script that acts as 4.4: it prints no durations, and knows `vsync` in place of `fps_mode`."""
    refused = refusing("fps_mode").splitlines()[0]
    return f'{refused}\nset -- "${{@/#-vsync/-{find_ffmpeg().sync_option}}}"\n' + printing(f"sed -u '{OF_5_1}'")
