"""How a training writes its checkpoints: whole files by the first process, or by all of them while training goes on.

`distributed` is torch.distributed.checkpoint, in safetensors and without its pickled metadata: every process writes
what it holds, so nothing is gathered, and goes on as soon as that is copied to the CPU's memory. `whole` waits for one
process, but its files are those of one process whatever the sharding, and other programs read them. Either is resumed
by any number of processes.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from model.training import checkpoint, integrity, parts
from model.training.checkpoint import Run
from model.training.copies import Copies
from model.training.processes import Processes
from model.training.sharding import part
from model.training.state import TrainingState
from storage.errors import VlfmError
from storage.local import naming_full_disk

FORMAT = 3
"""Of a checkpoint that its processes wrote together; `state.json` lists its files."""


class Saver(Protocol):
    """Writes the checkpoints of a run; all processes call it alike."""

    def save(self, state: TrainingState, wait: bool) -> None:
        """Write a checkpoint of the state as it is now, and remove older ones beyond those that are kept.

        wait: whether it must be on the disk on return. Else what goes wrong may be raised by the next call.

        Raises:
            FloatingPointError: a tensor is not finite; nothing is written and nothing removed.
            DiskFull: no room; the checkpoints that there are stay.
            FirstFailed: the first process failed, and says why.
        """
        ...

    def close(self) -> None:
        """Let a checkpoint that is being written be finished, if it can be."""
        ...


def make_saver(
    kind: str, run: Run, keep: int, processes: Processes, identity: Mapping[str, Any], copies: Copies | None = None
) -> Saver:
    """The saver of `checkpoints=kind` for a run.

    identity: what a checkpoint must be of, to be gone on from. copies: where they are copied to.
    """
    return (DistributedSaver if kind == "distributed" else WholeSaver)(run, keep, processes, identity, copies)


class _Saver:
    """What both have: a thread that completes and copies checkpoints, and what came of the last one."""

    def __init__(
        self, run: Run, keep: int, processes: Processes, identity: Mapping[str, Any], copies: Copies | None = None
    ) -> None:
        self.run, self.keep, self.processes, self.identity, self.copies = run, keep, processes, identity, copies
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._under_way: Future[None] | None = None

    def close(self) -> None:
        """As `Saver.close`."""
        self._thread.shutdown()

    def _begin(self, work: Callable[[], None]) -> None:
        self._under_way = self._thread.submit(work)

    def _finish(self) -> None:
        """Wait for what is under way. What went wrong is raised by the first process, by the others FirstFailed."""
        under_way, self._under_way = self._under_way, None
        if under_way is None:
            return
        if not self.processes.first:
            under_way.exception()  # the first process has the same one, and tells it
        self.processes.by_first(under_way.result)

    def _copy(self, folder: Path, last: bool) -> None:
        """Copy a checkpoint to the store; unless it is the last, a failure is one line: the next one is copied too."""
        if self.copies is None:
            return
        try:
            self.copies.push(folder)
        except (VlfmError, OSError) as error:
            if last:
                raise
            told = f"{folder.name} could not be copied to {self.copies.store.address()} ({error})"
            print(f"warning: {told}; training goes on, and the next checkpoint is copied", file=sys.stderr)


class WholeSaver(_Saver):
    """The first process writes all of the state; the others wait."""

    def save(self, state: TrainingState, wait: bool) -> None:
        """As `Saver.save`; it always waits for the disk."""
        self._finish()
        if not self.processes.first:  # so that all processes raise, or none
            checkpoint.tensors_by_file(state)
        folder = self.processes.by_first(lambda: checkpoint.save(self.run, state, self.keep, self.identity))
        if self.processes.first:
            self._begin(lambda: self._copy(folder, wait))
        else:
            self._begin(lambda: None)
        if wait:
            self._finish()


class DistributedSaver(_Saver):
    """Each process writes what it holds, in a thread; the first one then makes a checkpoint of it, by one rename."""

    @cached_property
    def _group(self) -> Any:
        """Of their own: the thread's messages must not come between those of the training."""
        return dist.new_group(backend="gloo") if self.processes.world > 1 else None

    def save(self, state: TrainingState, wait: bool) -> None:
        """As `Saver.save`."""
        self._finish()
        tensors = checkpoint.flat_tensors(state)
        self._check_finite(tensors)
        folder = self.run.folder(state.step)
        unfinished = folder.with_name(f".part-{state.step:08d}")
        self.processes.by_first(lambda: shutil.rmtree(unfinished, ignore_errors=True))
        plain = {"format": FORMAT, "identity": dict(self.identity), **checkpoint.plain_values(state)}
        written = parts.write(tensors, unfinished, self._group)
        self._begin(lambda: self._publish(written, plain, unfinished, folder, wait))
        if wait:
            self._finish()

    def _publish(self, written: Any, plain: Mapping[str, Any], unfinished: Path, folder: Path, last: bool) -> None:
        """Once all processes have written their parts, the first completes the checkpoint, names it and copies it."""
        try:
            with naming_full_disk(unfinished):
                parts.wait(written)
                if not self.processes.first:
                    return
                files = sorted(path.name for path in unfinished.glob(parts.PATTERN))
                about = {**plain, "files": [*files, "state.json"]}
                (unfinished / "state.json").write_text(json.dumps(about))
                integrity.complete(unfinished, about["files"])
                integrity.publish(unfinished, folder)
        except BaseException:
            if self.processes.first:
                shutil.rmtree(unfinished, ignore_errors=True)
            raise
        self.run.keep_newest(self.keep)
        self._copy(folder, last)

    def _check_finite(self, tensors: Mapping[str, Tensor]) -> None:
        here = torch.stack([~torch.isfinite(part(value)).all() for value in tensors.values()])
        bad = self.processes.highest(*here.to(self.processes.device)).tolist()
        if any(bad):
            raise checkpoint.not_finite(list(tensors)[bad.index(1.0)])
