"""The Icechunk repository under the arrays: opened, read at a snapshot, kept to one committer, swept.

Icechunk's own warning on local disks ("not safe for concurrent commits") goes to stdout; it is silenced here, and
answered by a lock. In a bucket Icechunk finds credentials as the bucket's own client does. Its errors are raised as one
line each, a full disk as `DiskFull`.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

from storage.layout import DiskFull, Lake, LakeError
from storage.local import free_bytes, fsync_path, naming_full_disk
from storage.s3 import S3Store
from storage.version import latest, list_versions, load

if TYPE_CHECKING:
    import icechunk

_ARRAYS = "arrays"
_BEGINNING = "1CECHNKREP0F1RSTCMT0"
"""Icechunk's name of the empty snapshot that every repository begins with."""
REMEDY = "restore the lake from a copy, or ingest the films into a new one"


def committing(lake: Lake) -> AbstractContextManager[None]:
    """Hold the arrays for one commit; others wait."""
    return lake.store.lease("arrays", wait=True)


def open_repository(lake: Lake, create: bool = False) -> icechunk.Repository:
    """The lake's repository, made where `create` says so and there is none.

    Raises:
        LakeError: there is none.
    """
    import icechunk

    icechunk.set_logs_filter("error")
    if isinstance(lake.store, S3Store):
        storage = _in_bucket(lake.store)
    else:
        folder = lake.store.local_path(_ARRAYS)
        if not folder.is_dir():
            if not create:
                raise LakeError(f"{folder} is missing; {REMEDY}")
            folder.mkdir()
        storage = icechunk.local_filesystem_storage(str(folder))
    if not icechunk.Repository.exists(storage):
        if not create:
            raise LakeError(f"{address(lake)} is no Icechunk repository; {REMEDY}")
        icechunk.Repository.create(storage)
    # Icechunk reads manifests ahead in the background; those that `expire_history` deletes meanwhile it calls errors.
    nothing = icechunk.ManifestPreloadConfig(max_total_refs=0, preload_if=icechunk.ManifestPreloadCondition.false())
    config = icechunk.RepositoryConfig(manifest=icechunk.ManifestConfig(preload=nothing))
    return icechunk.Repository.open(storage, config)


def address(lake: Lake) -> str:
    """Where the repository is, for people."""
    return lake.store.address(_ARRAYS)


def at_snapshot(lake: Lake, snapshot: str) -> icechunk.Session:
    """A session that reads the repository as of `snapshot`, whatever came after.

    Raises:
        LakeError: no such snapshot.
    """
    import icechunk

    repository = open_repository(lake)
    try:
        return repository.readonly_session(snapshot_id=snapshot)
    except icechunk.IcechunkError as error:
        raise LakeError(f"{address(lake)} has no snapshot {snapshot} ({first_line(error)}); {REMEDY}") from error


def writable_from(lake: Lake, repository: icechunk.Repository, parent: str | None) -> icechunk.Session:
    """A session that continues `parent` (by default the newest version's snapshot, or nothing before the first).

    What is ahead of it belongs to no version: the append of a run that died. It is dropped from the history.

    Raises:
        LakeError: no such snapshot.
    """
    import icechunk

    base = parent or _newest(lake, repository)
    if repository.lookup_branch("main") != base:
        try:
            repository.reset_branch("main", base)
        except icechunk.IcechunkError as error:
            raise LakeError(f"{address(lake)} has no snapshot {base} ({first_line(error)}); {REMEDY}") from error
    return repository.writable_session("main")


def fresh_session(lake: Lake) -> tuple[str, icechunk.Session]:
    """A session with no history before it, and where a repository was put aside that cannot have one (else empty).

    Call it inside `committing`. Versions keep their snapshots until garbage is collected.

    Raises:
        LakeError: the repository cannot be used, and not put aside because the lake is on no local disk.
    """
    import icechunk

    try:
        repository = open_repository(lake, create=True)
        repository.reset_branch("main", _BEGINNING)
        return "", repository.writable_session("main")
    except icechunk.IcechunkError:
        aside = lake.arrays.with_name(f"arrays-damaged-{int(time.time())}")
        lake.arrays.rename(aside)
        fsync_path(aside.parent)
        return str(aside), open_repository(lake, create=True).writable_session("main")


def collect_garbage(lake: Lake) -> int:
    """Drop from the repository what no version needs: the bytes freed. Call it inside `lake.writing()`.

    Raises:
        LakeError: a version's snapshot is not in the repository's history; then nothing is dropped.
    """
    with committing(lake), storage_errors(lake):
        repository = open_repository(lake)
        writable_from(lake, repository, None)
        return drop_unreachable(lake, repository)


def expire_history(lake: Lake) -> int:
    """Drop every snapshot but the newest version's, and what only those need: the bytes freed.

    Rows are only ever appended, so the newest snapshot holds those of all versions; a version's file has to name it
    first (storage.change). Call it inside `lake.writing()`.

    Raises:
        LakeError: a version names another snapshot; then nothing is dropped.
    """
    version = latest(lake)
    if version is None:
        return 0
    with committing(lake), storage_errors(lake):
        repository = open_repository(lake)
        for number in list_versions(lake):
            if load(lake, number).snapshot != version.snapshot:
                raise LakeError(f"version {number} names a snapshot of its own in {address(lake)}; nothing is dropped")
        writable_from(lake, repository, version.snapshot)
        repository.expire_snapshots(datetime.datetime.now(datetime.UTC))
        return drop_unreachable(lake, repository)


def history(lake: Lake) -> list[str]:
    """Ids of the arrays' newest snapshot and those before it. Raises LakeError as reading does."""
    with storage_errors(lake):
        return [snapshot.id for snapshot in open_repository(lake).ancestry(branch="main")]


def drop_unreachable(lake: Lake, repository: icechunk.Repository) -> int:
    """Drop what is not in the history of the main branch: the bytes freed. Raises as `collect_garbage` does."""
    kept = {snapshot.id for snapshot in repository.ancestry(branch="main")}
    for number in list_versions(lake):
        if load(lake, number).snapshot not in kept:
            raise LakeError(
                f"version {number}'s snapshot is not in the history of {address(lake)}; nothing is collected"
            )
    return int(repository.garbage_collect(datetime.datetime.now(datetime.UTC)).bytes_deleted)


def fsync_changed(lake: Lake, since: float) -> None:
    """Bring every file of the repository that changed since then (seconds since 1970) to disk: Icechunk does not.

    What a bucket has acknowledged is there.
    """
    if isinstance(lake.store, S3Store):
        return
    for folder, _, files in os.walk(lake.arrays):
        paths = [os.path.join(folder, name) for name in files]
        changed = [path for path in paths if os.stat(path).st_mtime >= since - 2]
        for path in [*changed, *([folder] if changed else [])]:
            fsync_path(Path(path))


@contextlib.contextmanager
def storage_errors(lake: Lake) -> Iterator[None]:
    """Say in one line what Icechunk says in forty (LakeError); a full disk is a DiskFull."""
    import icechunk

    try:
        with contextlib.nullcontext() if isinstance(lake.store, S3Store) else naming_full_disk(lake.arrays):
            yield
    except ValueError as error:
        if isinstance(error, FileNotFoundError):  # Zarr's: what a snapshot names is not there, or it is damaged
            raise LakeError(f"{lake.store.address('arrays')}: {first_line(error)}; {REMEDY}") from error
        if "checksum" in str(error):  # of a chunk, in Zarr's words
            raise LakeError(f"{address(lake)}: a chunk is damaged ({first_line(error)}); {REMEDY}") from error
        raise
    except icechunk.IcechunkError as error:
        if is_disk_full(error):
            raise DiskFull(lake.arrays, free_bytes(lake.arrays)) from error
        raise LakeError(f"{address(lake)}: {first_line(error)}; {REMEDY}") from error


def is_disk_full(error: BaseException) -> bool:
    """Whether an error of Icechunk's (which has text only) means a full disk or a used-up quota."""
    return "No space left on device" in str(error) or "os error 122" in str(error)


def first_line(error: BaseException) -> str:
    """The first line of an error that says something."""
    return next((line.strip(" x|") for line in str(error).splitlines() if line.strip(" x|")), type(error).__name__)


def _newest(lake: Lake, repository: icechunk.Repository) -> str:
    version = latest(lake)
    return version.snapshot if version is not None else list(repository.ancestry(branch="main"))[-1].id


def _in_bucket(store: S3Store) -> icechunk.Storage:
    import icechunk

    service, region, path_style = store.service
    return icechunk.s3_storage(
        bucket=store.bucket,
        prefix=store.key_in_bucket(_ARRAYS),
        region=region,
        endpoint_url=service if path_style else None,
        allow_http=service.startswith("http:"),
        force_path_style=path_style,
        from_env=True,
    )
