"""Folders of Ray sessions: one for each run, whose lock ends with the run, and what is left of dead ones removed.

Ray keeps a session's logs and sockets for ever, and after a kill -9 its agents live on for a minute. A session of ours
has a folder of its own, named on the command lines of all its processes, so that the next run can end and remove it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
import signal
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

END_SECONDS = 5.0
"""Longest wait for processes that were killed to go."""


class SessionFolder:
    """A folder for one Ray session of this process, below that of all sessions of this user.

    Args:
        parent: of the sessions' folders; None for one in the folder of temporary files.
    """

    def __init__(self, parent: Path | None = None) -> None:
        self.parent = sessions_folder() if parent is None else parent
        while True:
            # Short: the sockets in it have paths of at most 107 bytes.
            self.path = self.parent / secrets.token_hex(4)
            self.path.mkdir(mode=0o700)
            lock = _locked(self.path)
            if lock is not None:  # else another run took it for a dead one
                self._lock = lock
                return

    def remove(self) -> None:
        """Ends what is left of the session, and removes the folder."""
        _end(self.path)
        os.close(self._lock)


def sessions_folder() -> Path:
    """The folder of this user's sessions, made where it is not there."""
    folder = Path(tempfile.gettempdir()) / f"vlfm-ray-{os.getuid()}"
    if len(str(folder)) > 40:
        folder = Path(os.sep, "tmp", folder.name)
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        return Path(tempfile.mkdtemp(prefix="vlfm-ray-", dir=folder.parent))  # somebody else's: not trusted
    return folder


def end_dead_sessions(parent: Path | None = None) -> list[Path]:
    """Ends the processes and removes the folders of sessions whose run is no more: the folders."""
    ended = []
    for path in sorted((sessions_folder() if parent is None else parent).iterdir()):
        lock = _locked(path)
        if lock is not None:
            _end(path)
            os.close(lock)
            ended.append(path)
    return ended


def _locked(path: Path) -> int | None:
    """The lock of a session's folder, an open file; None where a run holds it."""
    try:
        file = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(file)
        return None
    return file


def _end(path: Path) -> None:
    deadline = time.monotonic() + END_SECONDS
    while (alive := list(_processes(path))) and time.monotonic() < deadline:
        for process in alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        time.sleep(0.02)
    shutil.rmtree(path, ignore_errors=True)


def _processes(path: Path) -> Iterator[int]:
    """This user's processes, but this one, that name the folder on their command line."""
    name = os.fsencode(f"{path}/")
    for entry in Path("/proc").iterdir() if Path("/proc").is_dir() else ():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                if entry.stat().st_uid == os.getuid() and name in (entry / "cmdline").read_bytes():
                    yield int(entry.name)
