"""Crashes of what changes a lake in a bucket, each at a chosen request that changes it, of our client's or Icechunk's.

killed     SIGKILL before the request is answered, its work done or not (every second step)
refused    the server refuses this request and every later one
lost       the request's work is done and its answer lost; every later one is refused
"""

from __future__ import annotations

import dataclasses
import os
import time
from pathlib import Path
from typing import Any, cast

from storage.layout import Lake, LakeBusy
from storage.s3 import S3Store
from tests.bench.chaos.operations import OPERATIONS
from tests.bench.chaos.trials import Place, Trial, in_child
from tests.s3_server import S3Server

CHANGES = r"^(PUT|POST|DELETE) (?!.*\.lease$)"
"""Requests that change the lake; a lease is renewed by the clock."""
NAME = "chaos"
LEASE_SECONDS = 2.0


class Bucket(Place):
    """Lakes in a bucket of a server of our own. Sets the variables by which programs find it."""

    name = "bucket"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.server = S3Server()
        os.environ.update(self.server.environment())
        os.environ["VLFM_CACHE"] = str(folder / "cache")
        # Built before the forks; it connects when it is used.
        assert self.server.client
        in_child(lambda: self.server.client.create_bucket(Bucket=NAME), must=True)

    def close(self) -> None:
        """End the server."""
        self.server.close()

    def address(self, name: str) -> str:
        return f"s3://{NAME}/{name}"

    def copy(self, base: str, address: str) -> None:
        old, new = base.rpartition("/")[2], address.rpartition("/")[2]
        for key in self._keys(old):
            source = {"Bucket": NAME, "Key": key}
            self.server.client.copy_object(Bucket=NAME, Key=new + key.removeprefix(old), CopySource=source)

    def remove(self, address: str) -> None:
        """Nothing: it goes with the server."""

    def observed(self, address: str, operation: str) -> list[str]:
        self.server.fault(CHANGES, 0, times=1_000_000)
        OPERATIONS[operation](Lake.open(address))
        self.server.heal()
        return [_said(request) for request in self.server.faulted()]

    def faulted(self) -> str:
        self.server.heal()
        return next(map(_said, self.server.faulted()), "")

    def suffer(self, address: str, trial: Trial) -> None:
        store = cast(S3Store, Lake.open(address).store)
        lake = Lake(dataclasses.replace(store, lease_seconds=LEASE_SECONDS))
        if trial.fault == "killed":
            self.server.fault(CHANGES, 0, skip=trial.step, kill=os.getpid(), after=trial.step % 2 == 1)
        elif trial.fault == "refused":
            self.server.fault(CHANGES, 403, times=1_000_000, skip=trial.step, code="AccessDenied")
        else:
            self.server.fault(CHANGES, 500, skip=trial.step, after=True)
            self.server.fault(CHANGES, 403, times=1_000_000, skip=trial.step + 1, code="AccessDenied")
        OPERATIONS[trial.operation](lake)

    def again(self, address: str, trial: Trial) -> dict[str, Any]:
        deadline = time.monotonic() + 60
        while True:
            try:
                return super().again(address, trial)
            except LakeBusy:  # what a dead process holds ends by itself
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.2)

    def _keys(self, prefix: str) -> list[str]:
        pages = self.server.client.get_paginator("list_objects_v2").paginate(Bucket=NAME, Prefix=f"{prefix}/")
        return [entry["Key"] for page in pages for entry in page.get("Contents", ())]


def _said(request: str) -> str:
    """Without bucket and lake."""
    method, _, path = request.partition(" ")
    return f"{method} {path.split('/', 3)[-1]}"
