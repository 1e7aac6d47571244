"""Crashes of what changes a lake in a folder, each at a chosen change of the file system (or moment of a commit)."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import icechunk

from storage import staging
from storage.change import JOURNAL
from storage.layout import Lake, LakeError
from storage.repair import repair
from tests.bench.chaos.operations import OPERATIONS, publish_next
from tests.bench.chaos.trials import Place, Trial, in_child

COMMIT_SECONDS = 0.1
"""About how long Icechunk's commit takes; `clock` kills within it."""


class Folder(Place):
    """Lakes in a folder."""

    name = "folder"

    def address(self, name: str) -> str:
        return str(self.folder / name)

    def copy(self, base: str, address: str) -> None:
        shutil.copytree(base, address)

    def remove(self, address: str) -> None:
        shutil.rmtree(address)

    def observed(self, address: str, operation: str) -> list[str]:
        changes: list[str] = []
        self.watch(address, changes)
        OPERATIONS[operation](Lake.open(address))
        return changes

    def faulted(self) -> str:
        note = self.folder / "note"
        if not note.exists():
            return ""
        step = note.read_text()
        note.unlink()
        return step

    def suffer(self, address: str, trial: Trial) -> None:
        lake, operation = Lake.open(address), OPERATIONS[trial.operation]
        if trial.fault == "worker":
            publish_next(lake, _staged_by_worker(functools.partial(self.arm, address, "driver", trial.step)))
        elif trial.fault == "clock":
            _kill_in_commit(COMMIT_SECONDS * trial.step / 16)
            operation(lake)
        else:
            self.arm(address, "driver" if trial.fault == "unsynced" else trial.fault, trial.step)
            if trial.operation == "publish" and trial.fault == "group":
                operation = functools.partial(publish_next, stage=_staged_by_worker(lambda: None))
            operation(lake)

    def again(self, address: str, trial: Trial) -> dict[str, Any]:
        try:
            return super().again(address, trial)
        except LakeError as error:
            # A disk that loses what was fsynced may tear a commit itself. Then people are told what to do.
            if trial.fault != "tear" or not _did_as_told(Lake.open(address), str(error)):
                raise
            return super().again(address, trial)

    def cut_power(self, base: str, address: str, trial: Trial) -> None:
        """Every file is cut in half that is new and that neither a version nor the journal names.

        What these name was fsynced before, and so was all of Icechunk's commit.
        """
        if trial.fault != "unsynced":
            return
        lake, before = Lake.open(address), set(Lake.open(base).store.list_keys())
        keys = lake.store.list_keys()
        commits = [key for key in keys if key.startswith("versions/") or key == JOURNAL]
        named = "".join(lake.store.read(key).decode() for key in commits)
        fsynced = ("versions/", JOURNAL, "arrays/" if set(commits) - before else "arrays/refs")
        for key in keys:
            name = key.rpartition("/")[2].replace(".index.json", ".tar")
            if key not in before and name not in named and not key.startswith(fsynced):
                os.truncate(lake.root / key, (lake.root / key).stat().st_size // 2)

    def watch(self, root: str, changes: list[str]) -> None:
        """Write down this process' changes below `root`."""

        def watch(event: str, details: tuple[Any, ...]) -> None:
            if paths := _changed(event, details, root):
                changes.append(_said(event, paths, root))

        sys.addaudithook(watch)

    def arm(self, root: str, fault: str, step: int) -> None:
        """Let the fault happen at this process' `step`-th change below `root`."""
        seen, tearing, torn = 0, False, False

        def watch(event: str, details: tuple[Any, ...]) -> None:
            nonlocal seen, tearing, torn
            paths = _changed(event, details, root)
            if not paths or tearing:
                return
            seen += 1
            if seen <= step or (fault == "disk" and event not in ("open", "os.mkdir")):
                return
            if fault == "tear" and not torn:
                if event in ("os.rename", "os.link"):
                    tearing = True
                    os.truncate(paths[0], os.path.getsize(paths[0]) // 2)
                    self._note(_said(event, paths, root))
                    tearing, torn = False, True
                return  # it gets its name, and the process dies at its next change
            self._note(_said(event, paths, root))
            if fault == "disk":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), paths[-1])
            os.killpg(0, signal.SIGKILL) if fault == "group" else os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(watch)

    def _note(self, step: str) -> None:
        with contextlib.suppress(FileExistsError):
            handle = os.open(self.folder / "note", os.O_WRONLY | os.O_CREAT | os.O_EXCL)
            os.write(handle, step.encode())
            os.close(handle)


def _changed(event: str, details: tuple[Any, ...], root: str) -> list[str]:
    """The paths that an audited event changes, if one of them is below `root`; else none."""
    if event == "open":
        changes = isinstance(details[2], int) and bool(details[2] & (os.O_WRONLY | os.O_RDWR))
    else:
        changes = event in ("os.rename", "os.link", "os.remove", "os.mkdir", "os.truncate")
    ends = details[:1] if event == "open" else details[:2]
    paths = [os.fsdecode(item) for item in ends if isinstance(item, (str, bytes, os.PathLike))]
    return paths if changes and any(path.startswith(root) for path in paths) else []


def _said(event: str, paths: list[str], root: str) -> str:
    return f"{event} {os.path.relpath(paths[-1], root)}"


def _did_as_told(lake: Lake, error: str) -> bool:
    """Do what the error of a torn version file or journal says, which it has to name."""
    if f"{lake.address}/{JOURNAL} is damaged" in error and "delete it, and run the command" in error:
        lake.store.delete(JOURNAL)
        return True
    if found := re.search(r"/versions/(\d+)\.json is damaged .*--give-up \1", error):
        with lake.writing():
            assert repair(lake, give_up=[int(found[1])]).problems == []
        return True
    return False


def _staged_by_worker(first: Callable[[], None]) -> Callable[..., None]:
    """Blocks are staged by a process of their own, which `first` may end; one that dies is replaced, once."""

    def stage(*given: Any) -> None:
        for before in (first, lambda: None):

            def work(before: Callable[[], None] = before) -> None:
                before()
                staging.write_block(*given)

            if in_child(work) == 0:
                return
        raise AssertionError("two workers died")

    return stage


def _kill_in_commit(seconds: float) -> None:
    """SIGKILL so long after the next commit of Icechunk has begun, or right after it."""
    commit = icechunk.Session.commit

    def hurried(*given: Any, **named: Any) -> Any:
        threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()
        made = commit(*given, **named)
        time.sleep(seconds)
        return made

    icechunk.Session.commit = hurried  # type: ignore[method-assign,assignment]
