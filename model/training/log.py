"""The log of a training: JSON lines, and the same scalars for TensorBoard."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model.telemetry import metrics
from model.training.checkpoint import Run
from storage.layout import write_atomic
from storage.local import naming_full_disk

PACE = ("data_wait", "memory_gib", "mfu")
"""Scalars that tell how a training runs, not what it learns; `..._per_second` are others."""


class Log:
    """Writes the log of a run; appends to what is there of the steps that are done.

    Values of later steps, which a killed run had logged after its last checkpoint, are dropped: those steps are done
    again, and each stands once. Events stay: they tell what happened.

    done: steps done.
    enabled: False writes nothing, for all processes but the first.
    """

    def __init__(self, run: Run, done: int = 0, enabled: bool = True) -> None:
        self.run, self.done, self.enabled = run, done, enabled

    def __enter__(self) -> Log:
        if self.enabled:
            self.metrics = metrics()
            self.metrics.follow("train_checkpoint_age_seconds", self._checkpoint_age)
            from torch.utils.tensorboard import SummaryWriter

            self.run.root.mkdir(parents=True, exist_ok=True)
            self._drop_later_steps()
            with naming_full_disk(self.run.root):
                self.board = SummaryWriter(str(self.run.root / "tensorboard"), purge_step=self.done + 1)
                self.file = self.run.log.open("ab", buffering=0)  # nothing is left to write where the disk is full
        return self

    def __exit__(self, *exception: object) -> None:
        if self.enabled:
            self.file.close()
            self.board.close()

    def event(self, **values: Any) -> None:
        """Write a line that is no scalar."""
        if self.enabled:
            with naming_full_disk(self.run.log):
                self.file.write((json.dumps({"time": round(time.time(), 3), **values}) + "\n").encode())
            if "event" in values:
                self.metrics.count("train_events", event=str(values["event"]))

    def scalars(self, step: int, **values: float) -> None:
        """Write named values of a step, with six digits; none, no line."""
        if not values:
            return
        if self.enabled:
            self.metrics.set("train_step", step)
            for name, value in values.items():
                self.metrics.set(f"train_{name}", value)
        self.event(step=step, **{name: float(f"{value:.6g}") for name, value in values.items()})
        if self.enabled:
            for name, value in values.items():
                self.board.add_scalar(board_tag(name), value, step)

    def pictures(self, step: int, by_name: Mapping[str, NDArray[np.uint8]]) -> None:
        """Write named pictures (H, W, 3) of a step, for TensorBoard alone."""
        if self.enabled:
            for name, picture in by_name.items():
                self.board.add_image(name, picture, step, dataformats="HWC")

    def flush(self) -> None:
        """Bring TensorBoard's values to the disk, which else come there every two minutes."""
        if self.enabled:
            self.board.flush()

    def _checkpoint_age(self) -> float:
        """Seconds since the run's newest checkpoint was published; not a number where there is none."""
        try:
            return time.time() - self.run.folder(self.run.steps()[-1]).stat().st_mtime
        except (OSError, IndexError):
            return math.nan

    def _drop_later_steps(self) -> None:
        lines = read_log(self.run.log)
        kept = [line for line in lines if "event" in line or line["step"] <= self.done]
        text = "".join(json.dumps(line) + "\n" for line in kept)
        if self.run.log.is_file() and self.run.log.read_text() != text:
            write_atomic(self.run.log, text.encode())


def board_tag(name: str) -> str:
    """A scalar's name for TensorBoard, which makes a section of what stands before the first slash."""
    if name.startswith("validation_"):
        return name.replace("_", "/", 1)
    return f"pace/{name}" if name.endswith("_per_second") or name in PACE else f"train/{name}"


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log; a torn last line is left out, and a log that is not there has none."""
    lines = []
    for text in path.read_text(errors="replace").splitlines() if path.is_file() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return lines
