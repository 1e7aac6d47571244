"""Kills a trainer at random moments, again and again: its run must be usable after each.

    python tests/bench/kills.py FOLDER [--kills N] [--seed S] [--checkpoints distributed]

Each trainer is forked from this process, which has imported all that a trainer does, so that a kill costs its steps
alone. A checkpoint is written after every step, so most kills fall into one. After each kill the newest whole
checkpoint is loaded, and each step must stand once in the log that the next trainer goes on with. At the end a run that
nobody disturbed must have the same losses, digit by digit.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import time
from pathlib import Path

import pyarrow.compute  # noqa: F401  (what a trainer imports when it runs)
import torch
import torch.utils.tensorboard

from model.backbones.dit import Backbone
from model.recipes import TrainRecipe
from model.settings import override
from model.train import train
from model.training import saving  # noqa: F401
from model.training.checkpoint import Run, load_average
from model.training.log import read_log
from model.training.record import RunRecord
from tests.model.test_train import TINY
from tests.model.tiny_lake import make_lake


def killed(lake: Path, run: Run, recipe: TrainRecipe, steps: int, seconds: float) -> None:
    """A trainer that is killed so many seconds after it has made checkpoints of so many steps, or was started."""
    until = (run.steps() or [0])[-1] + steps
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        train(lake, run.root, recipe)
        os._exit(1)
    try:
        while (run.steps() or [0])[-1] < until:
            if os.waitpid(child, os.WNOHANG)[0]:
                raise RuntimeError(f"the trainer ended by itself; run `vlfm train --run {run.root}` to see why")
            time.sleep(0.005)
        time.sleep(seconds)
    finally:
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def losses(run: Run) -> dict[int, float]:
    """The logged losses by step. Raises ValueError where a step stands twice."""
    lines = [line for line in read_log(run.log) if "loss" in line]
    found = {line["step"]: line["loss"] for line in lines}
    if sorted(found) != [line["step"] for line in lines]:
        raise ValueError(f"{run.log} has a step twice, or out of order")
    return found


def usable(run: Run) -> bool:
    """Whether the newest checkpoint can be sampled from; a run without one starts anew."""
    if not run.steps():
        return True
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
    never = 100_000
    every = {"steps": never, "checkpoint_every": 1, "validate_every": never, "learning_rate_decay": 0.0}
    every |= {"checkpoints": options.checkpoints}
    recipe, moment, bad = override(TINY, every), random.Random(options.seed), 0
    for number in range(options.kills):
        killed(lake, run, recipe, moment.randint(0, 4), moment.uniform(0, 0.1))
        logged = losses(run)
        good = usable(run) and list(logged) == list(range(1, len(logged) + 1))
        bad += not good
        print(f"kill {number + 1}: at step {len(logged)}, {'usable' if good else 'UNUSABLE'}", flush=True)
    undisturbed = Run(options.folder / "undisturbed")
    train(lake, undisturbed.root, override(recipe, {"steps": len(logged), "checkpoint_every": never}))
    same = losses(undisturbed) == logged
    print(f"the losses are {'those' if same else 'NOT those'} of a run that nobody disturbed")
    print(f"{options.kills} kills, {bad} unusable, {len(logged)} steps")
    return int(bad > 0 or not same)


if __name__ == "__main__":
    sys.exit(main())
