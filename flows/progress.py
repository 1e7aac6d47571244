"""An ingest on the terminal: a line of progress for each stage, and a standard output that only results go to."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout

from model.progress import Progress


class Stages:
    """Called with what is counted, how many are done and how many there are, it keeps a Progress for each."""

    def __init__(self) -> None:
        self.lines: dict[str, Progress] = {}

    def __call__(self, what: str, done: int, total: int) -> None:
        """Show that `done` of `total` are done; each group of blocks starts its stage again."""
        if total < 1:
            return
        line = self.lines.get(what)
        if line is None or line.total != total or done < line.done:
            line = self.lines[what] = Progress("ingest", total, what, done)
        line.update(done)


@contextmanager
def stdout_kept_clean() -> Iterator[None]:
    """Sends everything that is printed meanwhile to the standard error, by C code and by processes started here too."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
