"""Ingest in this process: a runner that is no cluster, and what is asked of the lake afterwards."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.ingest import ingest
from pipeline.ingest.report import IngestReport
from pipeline.recipes import DataRecipe, linear
from pipeline.runner import Runner, Task
from storage.layout import Lake
from storage.verify import verify
from storage.version import load, read_manifest

RECIPE = dataclasses.replace(linear(), size=(16, 16), duration=1.0, rate=8.0, block_clips=3, tolerate=0.3)


class InProcess(Runner):
    """Tasks one after the other, here; `crash` may stop the run, `die` loses items as a dying worker would."""

    def __init__(self, crash: BaseException | None = None, after: int = 10**9, die: Sequence[float] = ()) -> None:
        super().__init__()
        self.crash, self.after, self.die = crash, after, die
        self.tasks: list[str] = []
        self.clips = 0

    def run(self, worker: Any, tasks: Any, key: Any, done: Any, given_up: Any) -> None:
        for number, (task_id, items) in enumerate(tasks):
            if self.crash is not None and number >= self.after:
                raise self.crash
            self.tasks.append(task_id)
            self.clips += len(items)
            if not any(item.window.start in self.die for item in items):
                done(Task(task_id, tuple(items), task_id), worker.process(task_id, items))
                continue
            for item in items:
                part = Task(f"{task_id}-{key(item)}", (item,), task_id)
                if item.window.start in self.die:
                    given_up(part, "worker_died", "the worker died; re-encode the film")
                else:
                    done(part, worker.process(part.task_id, part.items))


class NoWork(Runner):
    """Fails where there is anything to do."""

    def run(self, worker: Any, tasks: Any, key: Any, done: Any, given_up: Any) -> None:
        assert not tasks


def make(
    films: Path | str, lake: Path | str, recipe: DataRecipe = RECIPE, runner: Runner | None = None, **how: Any
) -> IngestReport:
    return ingest(films, lake, recipe=recipe, runner=runner or InProcess(), **how)


def rows(lake: Path, number: int | None = None, table: str = "clips") -> list[dict[str, Any]]:
    opened = Lake.open(lake)
    return list(read_manifest(opened, load(opened, number), table).to_pylist())


def sound(lake: Path) -> None:
    opened = Lake.open(lake)
    for path in sorted(opened.versions.glob("*.json")):
        assert verify(opened, load(opened, int(path.stem))) == []
