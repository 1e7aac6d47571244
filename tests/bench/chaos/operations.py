"""What is interrupted, and what a lake is to hold after it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable
from typing import Any

from storage import staging, version
from storage.change import orphans
from storage.erase import NoSuchFilm, erase
from storage.garbage import collect
from storage.layout import Lake
from storage.repair import repair
from storage.verify import verify
from tests.storage.film_lake import Film, publish

FIRST = [Film("a.mp4", "first film", "the first of all"), Film("b.mp4", "second film", "another film", 1)]
NEXT = [FIRST[0], Film("c.mp4", "third film", "a film that is new", 3)]
Operation = Callable[[Lake], Any]


def publish_next(lake: Lake, stage: Callable[..., Any] = staging.write_block) -> None:
    """The second version, unless it is there."""
    if version.list_versions(lake) == [1]:
        publish(lake, NEXT, stage=stage)


def collect_all(lake: Lake) -> None:
    """Garbage, with all versions but the newest."""
    with lake.writing():
        collect(lake, keep=1)


def erase_first(lake: Lake) -> None:
    """A film, which may be erased already."""
    with lake.writing(), contextlib.suppress(NoSuchFilm):
        assert erase(lake, "a.mp4").complete


def repair_all(lake: Lake) -> None:
    """What `make_base` damages."""
    with lake.writing():
        assert repair(lake).problems == []


OPERATIONS: dict[str, Operation] = {
    "publish": publish_next, "gc": collect_all, "erase": erase_first, "repair": repair_all,
}  # fmt: skip


def make_base(address: str, operation: str) -> None:
    """The lake before an operation: one version before a publication, two before the others."""
    lake = Lake.create(address)
    if operation != "publish":
        publish(lake, FIRST[:1])
    publish(lake, FIRST)
    if operation == "repair":
        os.truncate(sorted(lake.shards.glob("*.tar"))[0], 1000)
        (lake.arrays / "snapshots" / version.load(lake).snapshot).unlink()


def settled(lake: Lake) -> dict[str, Any]:
    """All that a lake says once garbage that no version names is collected.

    Its keys, without those of the arrays and of the tables of failures, which are a run's own: one that dies may have
    none; of each version the tables, counts and shards' checksums, and whether the arrays hold the same (`verify`);
    and what is staged.
    """
    with lake.writing():
        collect(lake)
    assert orphans(lake) == []
    assert lake.store.clean(delete=False) == []
    keys = [key for key in lake.store.list_keys() if not key.startswith(("arrays/", "failures/"))]
    found: dict[str, Any] = {"keys": keys}
    found["staged"] = staging.staged_blocks(lake)
    for number in version.list_versions(lake):
        it = version.load(lake, number)
        rows = version.read_manifest(lake, it).to_pylist()
        facts = [[row["clip_id"], row["film"], row["caption"], row["shard"], row["shard_row"]] for row in rows]
        films = version.read_manifest(lake, it, "films").column("film").to_pylist()
        shards = [[info.name, hashlib.sha256(lake.store.read(f"shards/{info.name}")).hexdigest()] for info in it.shards]
        found[f"version {number}"] = [it.merkle_root, facts, films, shards, it.counts, verify(lake, it)]
    return json.loads(json.dumps(found))  # type: ignore[no-any-return]
