"""`python -m tests.bench.overfit FILM`: one clip of a real film, learned by heart on a CPU, and sampled from noise.

Goals: every frame of the sample at least 40 dB against the codec's reconstruction, and the sample against the film
within 1 dB of the codec's ceiling. Beside them stand what no network gives: the stored coefficients decoded, the first
frame held, and the mean frame held. The clip is the film's window from --start on, all of its frames observed.
"""

from __future__ import annotations

import argparse
import csv
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from model.evaluate import evaluate
from model.recipes import train_recipe
from model.settings import override
from model.train import train
from pipeline.ingest import commit, embed_captions, plan_ingest
from pipeline.ingest.block import BlockWorker
from pipeline.recipes import demo
from pipeline.sources.folders import discover
from storage.layout import Lake

FRAME_GOAL, CEILING_GOAL = 40.0, 1.0
"""dB of the worst frame against the codec, and dB below the codec's ceiling against the film."""
CHANGES = {
    "depth": 3, "qk_norm": "rms", "batch": 1, "times_per_clip": 16, "derivative_weight": 0.01,
    "clip_start_dropout": 1.0, "caption_dropout": 0.0, "ema_decay": 0.99, "learning_rate": 2e-3,
    "learning_rate_decay": 1.0, "learning_rate_fall": "cosine", "checkpoint_every": 1000, "log_every": 100,
    "validate_every": 100_000,
}  # fmt: skip
"""Of the demo's recipe: there is one clip, which its caption names. At the sampler's steps frames are read from the
predicted mean alone, so the derivative counts little; the rate falls all along, since nothing is left to find later."""
FIGURES = ("recall_worst", "recall", "recall_lookup", "recall_first_frame", "recall_mean_frame", "film_sample",
           "film_ceiling", "film_lookup", "film_first_frame")  # fmt: skip


def lake_of(film: Path, start: float, folder: Path) -> Path:
    """A lake of one clip, of the demo's data recipe with every frame observed; made once in a folder, without Ray."""
    lake, table = folder / "lake", folder / "clip.csv"
    if (lake / "versions" / "1.json").is_file():
        return lake
    with open(table, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "caption", "start", "end"])
        writer.writerow([film.resolve(), "a clip to be learned by heart", start, start + 2])
    recipe = replace(demo(), observe="all", method="cubic", validation_fraction=0.0)
    opened = Lake.create(lake)
    with opened.writing():
        plan = plan_ingest(opened, discover([table], None, True, allow_outside=True), recipe)
        if len(plan.clips) != 1:
            raise ValueError(f"{film} has no window of 2 s from {start:g} s on; give another --start")
        worker = BlockWorker(opened, recipe, plan.recipe_fingerprint)
        worker.setup()
        commit(plan, embed_captions(plan), [worker.process(block.block_id, block.clips) for block in plan.blocks])
    return lake


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the figures; 1 where a goal is missed."""
    parser = argparse.ArgumentParser(prog="tests.bench.overfit", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("film", type=Path)
    parser.add_argument("--start", type=float, default=0.0, help="seconds of the film where the clip begins")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--folder", type=Path, help="keeps lake and run; a run that is there goes on")
    parser.add_argument("--lake", type=Path, help="a lake of one clip that is there already")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of the training recipe")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        lake = options.lake or lake_of(options.film, options.start, folder)
        changes: dict[str, Any] = {**CHANGES, "steps": options.steps}
        changes |= dict(pair.split("=", 1) for pair in options.set)
        began, cpu = time.monotonic(), time.process_time()
        train(lake, folder / "run", override(train_recipe("demo"), changes))
        taken, cpu = time.monotonic() - began, time.process_time() - cpu
        (figures,) = evaluate(folder / "run", lake, folder / "report", most=1, shown=1)["clips"]
    for name in FIGURES:
        print(f"{name:20} {figures[name]:6.2f} dB")
    worst, below = figures["recall_worst"], figures["film_ceiling"] - figures["film_sample"]
    good = worst >= FRAME_GOAL and below <= CEILING_GOAL
    print(
        f"{options.film.name}, {options.steps} steps in {taken:.0f} s ({cpu:.0f} s of CPU): worst frame {worst:.1f} dB "
        f"against the codec (goal {FRAME_GOAL:g}), {below:.2f} dB below the ceiling against the film (goal "
        f"{CEILING_GOAL:g}): {'met' if good else 'MISSED'}"
    )
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
