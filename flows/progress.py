"""Progress of an ingest on the terminal, one line for each stage."""

from __future__ import annotations

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
