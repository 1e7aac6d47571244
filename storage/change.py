"""A change of what is published: the one way in which versions are rewritten or go, whole even if it is interrupted.

Publishing only ever adds. Expiry and erasure change what is there, in this order:

    1. new shards, tables and a snapshot of the arrays are written beside the old ones; nothing names them yet
    2. `maintenance.json` is written: what the version files will say, and what goes. This is the commit point
    3. `finish`: version files are replaced, expired ones deleted; then all that no version names is removed
    4. `maintenance.json` is removed

A crash before step 2 changes nothing. After it, `finish` does step 3 again from its start, in whichever command comes
next (every writer calls it first), and each of its steps may be repeated. A reader finds whole versions at any time.
"""

from __future__ import annotations

import dataclasses
import io
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from storage.failures import failures_key
from storage.fingerprint import canonical_json
from storage.layout import Lake, LakeError, version_texts
from storage.repository import expire_history
from storage.schema import FAILURE_SCHEMA, completed
from storage.search import Needles, occurrences_in
from storage.staging import remove_block
from storage.version import Version, version_bytes, version_key

JOURNAL = "maintenance.json"


@dataclass(frozen=True)
class Change:
    """What the lake is to be once `finish` has come to its end."""

    command: str
    """Who asked, as `gc`."""
    versions: Mapping[str, Any] = field(default_factory=dict)
    """Number to the new text of the version file, for those that change."""
    expired: tuple[int, ...] = ()
    """Versions that go."""
    runs: tuple[str, ...] = ()
    """Runs whose failure tables go."""
    blocks: tuple[str, ...] = ()
    """Staged blocks that go."""
    erased: Mapping[str, Any] = field(default_factory=dict)
    """Of an erasure: `needles` (storage.search.Needles as JSON), and what its report says."""


def write_change(lake: Lake, change: Change) -> None:
    """Decide for a change: from here on it will happen. Call `finish` next. Call it inside `lake.writing()`.

    Raises:
        LakeError: a version would name a file that is not there.
        DiskFull: no room; nothing has changed.
    """
    for number, text in change.versions.items():
        body = json.loads(text)
        for key in [entry["path"] for entry in body["manifest"].values()] + [
            f"shards/{shard['name']}" for shard in body["shards"]
        ]:
            if lake.store.size(key) is None:
                raise LakeError(f"version {number} would name {key}, which is not there; nothing was changed")
    lake.store.write(JOURNAL, canonical_json(dataclasses.asdict(change)).encode("ascii"))


def rewritten(version: Version) -> tuple[str, str]:
    """An entry of `Change.versions`."""
    return str(version.number), version_bytes(version).decode("ascii")


def finish(lake: Lake) -> Change | None:
    """Finish the change that is under way, if there is one, and return it. Call it inside `lake.writing()`, first.

    Raises:
        LakeError: maintenance.json is damaged, or what is to be removed cannot be read.
    """
    try:
        found = json.loads(lake.store.read(JOURNAL))
        lists = {name: tuple(found[name]) for name in ("expired", "runs", "blocks")}
        change = Change(**{**found, **lists})
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        where = lake.store.address(JOURNAL)
        raise LakeError(f"{where} is damaged ({error}); delete it, and run the command that was interrupted") from error
    for text in sorted(change.versions, key=int):
        lake.store.write(version_key(int(text)), change.versions[text].encode("ascii"))
    for number in sorted(change.expired):
        lake.store.delete(version_key(number))
    for run in change.runs:
        lake.store.delete(failures_key(run))
    for block in change.blocks:
        remove_block(lake, block)
    if change.erased:
        _purge(lake, Needles.from_json(change.erased["needles"]))
    for key in orphans(lake):
        lake.store.delete(key)
    lake.store.clean(delete=True)
    expire_history(lake)
    lake.store.delete(JOURNAL)
    return change


def orphans(lake: Lake) -> list[str]:
    """Keys of shards, indexes, tables and texts that no version names, a damaged one neither.

    Call it inside `lake.writing()` only, or a run's fresh files look like garbage too.
    """
    named: set[str] = set()
    for text in version_texts(lake).values():
        named.update(re.findall(r'"(?:[a-z]+/)?([^"/]+)"', text))
    found = []
    for folder in ("manifests/", "shards/", "texts/"):
        for key in lake.store.list_keys(folder):
            name = key.rpartition("/")[2]
            if name.replace(".index.json", ".tar") not in named:
                found.append(key)
    return found


def _purge(lake: Lake, needles: Needles) -> None:
    """Take what is erased out of failure tables, staged blocks and everything else beside the versions."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    for key in lake.store.list_keys("failures/"):
        if not occurrences_in(lake, key, needles):
            continue
        if not key.endswith(".parquet"):
            lake.store.delete(key)
            continue
        try:
            table = pq.ParquetFile(pa.BufferReader(lake.store.read(key))).read(use_threads=False)
        except pa.ArrowInvalid:
            lake.store.delete(key)
            continue
        rows = completed(table, FAILURE_SCHEMA).to_pylist()
        kept = [row for row in rows if not needles.names_row(row)]
        kept = [{name: needles.redacted(value) for name, value in row.items()} for row in kept]
        buffer = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(kept, schema=table.schema), buffer)
        lake.store.write(key, buffer.getvalue())
    versioned = ("failures/", "versions/", "manifests/", "shards/", "texts/", "arrays/")
    for key in lake.store.list_keys():
        # Blocks of dead runs, caches, pictures of reports: what can be made again goes whole.
        if key != JOURNAL and not key.startswith(versioned) and occurrences_in(lake, key, needles):
            lake.store.delete(key)
