"""What a running program tells those who watch it: Prometheus metrics, and a file that shows that it goes on.

Both are asked for by the environment, because they belong to where a program runs and not to what it does:

    VLFM_METRICS=9400 (or HOST:PORT)    serves metrics below /metrics; a port alone: on all addresses
    VLFM_ALIVE=FILE                     a file that is touched after every step, at most once a second

Neither can hurt the work: a port that is taken, or a folder that is not there, is a warning.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge, start_http_server

METRICS, ALIVE = "VLFM_METRICS", "VLFM_ALIVE"
log = logging.getLogger(__name__)


class Metrics:
    """Gauges and counters of this process; `vlfm_` is put before their names."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._gauges: dict[str, Gauge] = {}
        self._counters: dict[str, Counter] = {}

    def set(self, name: str, value: float, **labels: str) -> None:
        """Set a gauge, which is made when it is first set, with the same labels each time."""
        self._gauge(name, *labels).labels(**labels).set(value) if labels else self._gauge(name).set(value)

    def follow(self, name: str, value: Callable[[], float]) -> None:
        """A gauge whose value is asked for when somebody looks."""
        self._gauge(name).set_function(value)

    def count(self, name: str, by: float = 1, **labels: str) -> None:
        """Add to a counter, which is called `name` and `_total`."""
        if name not in self._counters:
            self._counters[name] = Counter(f"vlfm_{name}", name.replace("_", " "), list(labels), registry=self.registry)
        counter = self._counters[name]
        (counter.labels(**labels) if labels else counter).inc(by)

    def _gauge(self, name: str, *labels: str) -> Gauge:
        name = re.sub(r"\W", "_", name, flags=re.ASCII)
        if name not in self._gauges:
            self._gauges[name] = Gauge(f"vlfm_{name}", name.replace("_", " "), labels, registry=self.registry)
        return self._gauges[name]


def metrics() -> Metrics:
    """This process's metrics, served from now on where VLFM_METRICS says so, else kept for nobody."""
    return _served(os.environ.get(METRICS, ""))


@cache
def _served(address: str) -> Metrics:
    """The metrics that are served at this address: a process has one of each."""
    found = Metrics()
    if address:
        host, _, port = address.rpartition(":")
        try:
            start_http_server(int(port), host or "0.0.0.0", found.registry)
        except (OSError, ValueError, OverflowError) as error:
            log.warning("no metrics at %s=%s: %s; name a free port, as PORT or HOST:PORT", METRICS, address, error)
    return found


class Alive:
    """Touches the file of VLFM_ALIVE; nothing where none is named."""

    def __init__(self) -> None:
        named = os.environ.get(ALIVE, "")
        self.file = Path(named) if named else None
        self.touched = float("-inf")

    def touch(self) -> None:
        """Show that the program goes on."""
        now = time.monotonic()
        if self.file is not None and now - self.touched >= 1:
            self.touched = now
            try:
                self.file.touch()
            except OSError as error:
                log.warning("%s=%s cannot be touched: %s; its folder must be there", ALIVE, self.file, error.strerror)
                self.file = None
