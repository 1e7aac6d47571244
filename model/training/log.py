"""The log of a training: JSON lines, and the same scalars for TensorBoard."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from model.training.checkpoint import Run


class Log:
    """Writes the log of a run; appends to what is there.

    enabled: False writes nothing, for all processes but the first.
    """

    def __init__(self, run: Run, enabled: bool = True) -> None:
        self.run, self.enabled = run, enabled

    def __enter__(self) -> Log:
        if self.enabled:
            from torch.utils.tensorboard import SummaryWriter

            self.run.root.mkdir(parents=True, exist_ok=True)
            self.file = self.run.log.open("a")
            self.board = SummaryWriter(str(self.run.root / "tensorboard"))
        return self

    def __exit__(self, *exception: object) -> None:
        if self.enabled:
            self.file.close()
            self.board.close()

    def event(self, **values: Any) -> None:
        """Write a line that is no scalar."""
        if self.enabled:
            self.file.write(json.dumps({"time": round(time.time(), 3), **values}) + "\n")
            self.file.flush()

    def scalars(self, step: int, **values: float) -> None:
        """Write named values of a step, with six digits."""
        self.event(step=step, **{name: float(f"{value:.6g}") for name, value in values.items()})
        if self.enabled:
            for name, value in values.items():
                self.board.add_scalar(name, value, step)


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log; a torn last line is left out, and a log that is not there has none."""
    lines = []
    for text in path.read_text().splitlines() if path.is_file() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return lines
