"""Kills a trainer at random moments, again and again: its run must be usable after each.

    python tests/bench/kills.py FOLDER [--kills N] [--seed S] [--checkpoints distributed]

Each trainer is forked from this process, so that a kill costs its steps and not the imports. A checkpoint is written
after every step, so most kills fall into one. After each kill the newest whole checkpoint is loaded, and each step
must stand once in the log that the next trainer goes on with.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from model.settings import override
from model.train import train
from model.training.checkpoint import Run, load_average
from model.training.log import read_log
from model.training.record import RunRecord
from tests.model.test_train import TINY
from tests.model.tiny_lake import make_lake


def killed(lake: Path, run: Path, steps: int, seconds: float, checkpoints: str) -> None:
    """A trainer that is killed so many seconds after it has logged so many steps."""
    starts = len(_since_starts(run))
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        every = {"steps": 100_000, "checkpoint_every": 1, "validate_every": 100_000, "checkpoints": checkpoints}
        train(lake, run, override(TINY, every))
        os._exit(1)
    try:
        while len(since := _since_starts(run)) == starts or since[-1] < steps:
            if os.waitpid(child, os.WNOHANG)[0]:
                raise RuntimeError(f"the trainer ended by itself; run `vlfm train --run {run}` to see why")
            time.sleep(0.005)
        time.sleep(seconds)
    finally:
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def _since_starts(run: Path) -> list[int]:
    """For each start of a trainer in the log, the steps logged between it and the next."""
    counts: list[int] = []
    for line in read_log(run / "log.jsonl"):
        if line.get("event") == "start":
            counts.append(0)
        elif "loss" in line and counts:
            counts[-1] += 1
    return counts


def usable(run: Run) -> bool:
    """Whether the newest checkpoint can be sampled from; a run without one starts anew."""
    if not run.steps():
        return True
    from model.backbones.dit import Backbone

    backbone = Backbone(RunRecord.read(run).backbone)
    load_average(run.checkpoint(), backbone)
    return all(bool(torch.isfinite(value).all()) for value in backbone.parameters())


def main() -> int:
    """Kills and counts."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoints", choices=("whole", "distributed"), default="whole")
    options = parser.parse_args()
    torch.set_num_threads(1)
    lake, run = make_lake(options.folder / "lake").root, Run(options.folder / "run")
    moment, bad = random.Random(options.seed), 0
    for number in range(options.kills):
        killed(lake, run.root, moment.randint(0, 4), moment.uniform(0, 0.1), options.checkpoints)
        steps = [line["step"] for line in read_log(run.log) if "loss" in line]
        good = usable(run) and steps == list(range(1, len(steps) + 1))
        bad += not good
        print(f"kill {number + 1}: at step {steps[-1] if steps else 0}, {'usable' if good else 'UNUSABLE'}")
    print(f"{options.kills} kills, {bad} unusable, {(run.steps() or [0])[-1]} steps")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
