"""A lease in a store without locks: one small object that its holder renews, and that others may take when it expires.

The object says who holds the lease, until when, and a fencing number that grows with every holder. It is only ever put
under a condition (that nobody has put it meanwhile), so of many takers one wins. Its age is measured by the server's
clock. A holder that was silent for longer than the lease lasts has lost it, and finds out before it publishes: `renew`
puts the object once more under the same condition.

What this cannot exclude: a process that stands still for the whole length of a lease between its renewal and the
request that publishes, which follows at once.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import random
import secrets
import socket
import threading
import time
from dataclasses import dataclass
from typing import Any, Protocol

from storage.errors import VlfmError
from storage.store import LakeBusy, LakeError

_DATES = 1.0
"""HTTP's dates are whole seconds: an age may be wrong by so much."""


@dataclass(frozen=True)
class Seen:
    """A lease's object as it was read."""

    data: bytes
    tag: str
    """Changes with every put."""
    age: float
    """Seconds since it was put, by the server's clock."""


class LeaseObjects(Protocol):
    """The objects of leases."""

    def read(self, name: str) -> Seen | None:
        """The object, None where there is none."""
        ...

    def put(self, name: str, data: bytes, tag: str | None) -> str | None:
        """Put the object where its tag is still `tag` (None: where there is none): its new tag, or None."""
        ...


class Held:
    """A lease that this process takes, keeps by renewing it in a thread, and gives back.

    Args:
        objects: where.
        name: of the lease.
        place: address of the store, for messages.
        seconds: it ends when it was not renewed for so long.
    """

    def __init__(self, objects: LeaseObjects, name: str, place: str, seconds: float) -> None:
        self.objects, self.name, self.place, self.seconds = objects, name, place, seconds
        self.fence = 0
        """The fencing number: larger than that of every holder before."""
        self._owner = secrets.token_hex(8)
        self._tag = ""
        self._until = 0.0
        self._taken_by: str | None = None
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def acquire(self, wait: bool = False) -> None:
        """Take the lease.

        Raises:
            LakeBusy: another process holds it, and `wait` is False.
            LakeError: the object is no lease.
        """
        while True:
            seen = self.objects.read(self.name)
            state = None if seen is None else self._parsed(seen)
            if state is not None and state["owner"] == self._owner:
                break  # put by a try whose answer was lost
            free = seen is None or state is None or state["owner"] is None
            if not free and seen is not None and state is not None and seen.age <= state["seconds"] + _DATES:
                if not wait:
                    raise LakeBusy(
                        f"{self.place} is in use{_who(state)}; wait until that run ends, or stop it "
                        f"(what a dead run holds is free after {state['seconds']:g} s)"
                    )
                time.sleep(random.uniform(0.05, 0.3))
                continue
            self.fence = 1 if state is None else int(state["fence"]) + 1
            if self._put(None if seen is None else seen.tag):
                break
        self._thread = threading.Thread(target=self._keep, name=f"lease {self.name}", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raises LakeBusy where the lease is known to be lost or has not been renewed in time. Asks nobody."""
        if self._taken_by is not None or time.monotonic() > self._until:
            raise self._lost()

    def renew(self) -> None:
        """Put the object once more: the lease is this process's for its full length from now on.

        Raises:
            LakeBusy: another process has taken it.
        """
        with self._lock:
            if self._taken_by is not None:
                raise self._lost()
            if self._put(self._tag):
                return
            seen = self.objects.read(self.name)
            state = None if seen is None else self._parsed(seen)
            if seen is not None and state is not None and state["owner"] == self._owner:
                self._tag, self._until = seen.tag, time.monotonic() + self.seconds - max(seen.age, 0.0) - _DATES
                return
            self._taken_by = _who(state)
        raise self._lost()

    def release(self) -> None:
        """Give the lease back. Where that fails, it ends by itself."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
        with contextlib.suppress(VlfmError), self._lock:
            if self._taken_by is None:
                self.objects.put(self.name, self._state(owner=None), self._tag)

    def _keep(self) -> None:
        while not self._ended.wait(self.seconds / 3):
            try:
                self.renew()
            except LakeBusy:
                return
            except Exception:
                continue

    def _put(self, tag: str | None) -> bool:
        before = time.monotonic()
        put = self.objects.put(self.name, self._state(self._owner), tag)
        if put is None:
            return False
        self._tag, self._until = put, before + self.seconds
        return True

    def _state(self, owner: str | None) -> bytes:
        expires = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=self.seconds)
        state = {
            "owner": owner, "process": os.getpid(), "host": socket.gethostname(), "fence": self.fence,
            "seconds": self.seconds, "expires": expires.isoformat(),
        }  # fmt: skip
        return json.dumps(state).encode("ascii")

    def _parsed(self, seen: Seen) -> dict[str, Any]:
        try:
            state = json.loads(seen.data)
            return {**state, "fence": int(state["fence"]), "seconds": float(state["seconds"]), "owner": state["owner"]}
        except (ValueError, KeyError, TypeError):
            raise LakeError(f"the lease {self.name!r} of {self.place} is damaged; delete that object") from None

    def _lost(self) -> LakeBusy:
        return LakeBusy(
            f"this run lost its hold on {self.place}{self._taken_by or ''} after {self.seconds:g} s without a word "
            "from it; it publishes nothing, run the same command again"
        )


def _who(state: dict[str, Any] | None) -> str:
    if state is None or state.get("owner") is None:
        return ""
    host = state.get("host")
    there = f" on {host}" if isinstance(host, str) and host != socket.gethostname() else ""
    return f" by process {state.get('process')}{there}"
