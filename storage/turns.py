"""Turns at a lock of a local store: who came first goes first.

The system wakes all that wait for a lock and lets any of them have it. So each takes a ticket: a file with its time of
arrival in its name, locked by the process that waits. A ticket's owner waits for the tickets before its own, one after
the other; a process that dies leaves its ticket unlocked, and the next in line removes it. Nothing polls.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def turn(folder: Path, name: str) -> Iterator[None]:
    """The block begins when nobody is before this process in the line `name` of `folder`, and is quickly left again."""
    ticket = folder / f".{name}.{time.time_ns():020d}-{secrets.token_hex(4)}.turn"
    made = ticket.with_suffix(".making")
    with open(made, "xb") as own:
        try:
            fcntl.flock(own, fcntl.LOCK_EX)
            os.replace(made, ticket)  # locked before anybody can see it
            for earlier in sorted(folder.glob(f".{name}.*.turn")):
                if earlier.name < ticket.name:
                    _wait_for(earlier)
            yield
        finally:
            made.unlink(missing_ok=True)
            ticket.unlink(missing_ok=True)


def _wait_for(ticket: Path) -> None:
    """Until the ticket's owner has had its turn, or is dead."""
    with contextlib.suppress(FileNotFoundError), open(ticket, "rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        ticket.unlink()
