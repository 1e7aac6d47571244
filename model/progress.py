"""Progress a person can read: stage, done of total, rate and time left, on a terminal or in a log file."""

from __future__ import annotations

import sys
import time
from typing import TextIO

from model import logs


class Progress:
    """Prints `stage  done/total unit  rate  ETA  note`: in place on a terminal, else a line every few seconds.

    Args:
        stage: what is being done.
        total: how many units there are; 0 when unknown.
        unit: name of one unit, in the plural.
        done: units done already, before this run (they do not count for the rate).
        every: least seconds between two lines where the output is no terminal.
    """

    def __init__(
        self, stage: str, total: int, unit: str, done: int = 0, every: float = 5.0, out: TextIO | None = None
    ) -> None:
        self.stage, self.total, self.unit, self.done = stage, total, unit, done
        self.out = sys.stderr if out is None else out
        self.terminal = self.out.isatty()
        self.every = 0.2 if self.terminal else every
        self.first, self.started = done, time.monotonic()
        self.printed, self.printed_done = float("-inf"), -1

    def update(self, done: int, note: str = "") -> None:
        """Say that `done` units are done; prints when it is time to, and always at the end."""
        self.done = done
        now = time.monotonic()
        finished = self.total > 0 and done >= self.total
        if done != self.printed_done and (finished or now - self.printed >= self.every):
            self.printed, self.printed_done = now, done
            if logs.as_json():
                self.out.write(self.as_json(now, note) + "\n")
                self.out.flush()
            else:
                self._print(self.line(now, note), finished)

    def advance(self, by: int = 1, note: str = "") -> None:
        """Say that `by` more units are done."""
        self.update(self.done + by, note)

    def line(self, now: float, note: str) -> str:
        """The line that says where things stand at the monotonic time `now`."""
        seconds = max(now - self.started, 1e-9)
        rate = (self.done - self.first) / seconds
        total = f"/{self.total}" if self.total else ""
        left = f"  ETA {clock((self.total - self.done) / rate)}" if self.total > self.done and rate > 0 else ""
        end = f"  in {clock(seconds)}" if self.total and self.done >= self.total else ""
        return f"{self.stage:<10} {self.done}{total} {self.unit}  {rate:.3g}/s{left}{end}" + (
            f"  {note}" if note else ""
        )

    def as_json(self, now: float, note: str) -> str:
        """The same as one line of JSON."""
        rate = (self.done - self.first) / max(now - self.started, 1e-9)
        told = {"stage": self.stage, "done": self.done, "total": self.total, "unit": self.unit, "rate": round(rate, 4)}
        return logs.line("info", "progress", note, time.time(), **told)

    def _print(self, line: str, finished: bool) -> None:
        if self.terminal:
            self.out.write(f"\r\x1b[2K{line}" + ("\n" if finished else ""))
        else:
            self.out.write(line + "\n")
        self.out.flush()


def clock(seconds: float) -> str:
    """Seconds as `45s`, `3m20s` or `2h05m`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
