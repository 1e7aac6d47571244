"""The trainer: reads the shards of one version, and nothing else of the pipeline.

Run it as `vlfm train`, on N processes of this machine as `vlfm train --processes N`, on those of several machines as
`torchrun ... -m model.train --lake DIR --run-dir DIR`. Exit statuses: 0 the run is finished, 75 it was asked to stop
and the same command goes on (model.stop.STOPPED), 1 an error.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from model.backbones.dit import Backbone, BackboneConfig
from model.methods.base import Batch, Method
from model.methods.registry import method_named
from model.program import add_settings_option, parse_settings, run_program
from model.progress import Progress
from model.recipes import TrainRecipe, train_recipe
from model.settings import override
from model.stop import STOPPED, Stopped, StopSignal, signals_held
from model.training import checkpoint
from model.training.checkpoint import Run
from model.training.data import Clips, Collate, Steps, lake_and_version, loader
from model.training.ema import MovingAverage
from model.training.launch import launch
from model.training.optimizers import Updates, learning_rate_factor, make_optimizers, set_learning_rate
from model.training.processes import Processes, given_rank, join_processes
from model.training.record import DatasetVersion, RunRecord
from storage.layout import Lake
from storage.version import Version, read_empty_text


def train(lake: str | Path, run: str | Path, recipe: TrainRecipe, version: int | None = None) -> Path:
    """Train on one version of a lake until the recipe's last step, resuming where the run stands.

    A step whose loss or gradient is not finite changes nothing and is logged. SIGTERM and Ctrl-C end the run after the
    step in flight, with a checkpoint.

    Returns:
        The folder of the last checkpoint; the run is finished.

    Raises:
        Stopped: SIGTERM or Ctrl-C came before the last step; the same call goes on.
        ValueError, FileNotFoundError: bad settings, or no such lake, version or shard; the message says the mend.
        FloatingPointError: too many steps in a row are not finite; the last good checkpoint stays.
    """
    with StopSignal() as stop:
        opened, chosen = lake_and_version(lake, version)
        processes = join_processes()
        try:
            return _train(opened, Run(Path(run)), recipe, chosen, processes, stop)
        finally:
            if processes.world > 1:
                dist.destroy_process_group()


def _train(lake: Lake, run: Run, recipe: TrainRecipe, version: Version, processes: Processes, stop: StopSignal) -> Path:
    collate = Collate(read_empty_text(lake, version), method_named(recipe.method).members)
    clips = Clips(lake, version, "train", collate.arrays)
    record = run_record(recipe, version, clips, run)
    if processes.first and not run.file.is_file():
        run.write(record.to_json())
    if run.steps() and run.steps()[-1] >= recipe.steps:
        return run.checkpoint()

    torch.manual_seed(recipe.seed)
    backbone = Backbone(record.backbone).to(processes.device)
    average = MovingAverage(backbone, recipe.ema_decay)
    optimizers = make_optimizers(backbone, recipe)
    updates = Updates(
        backbone, average, optimizers, recipe.gradient_clip, recipe.bad_steps_allowed, run.root, processes
    )
    method = record.method()
    done = checkpoint.restore(run.checkpoint(), backbone, average, optimizers) if run.steps() else 0
    trained = DistributedDataParallel(backbone) if processes.world > 1 else backbone
    steps = Steps(len(clips), recipe.batch, recipe.seed, done, recipe.steps, processes.rank, processes.world)
    validation = Clips(lake, version, "validation", collate.arrays)

    if processes.any(stop.seen)[0]:
        raise Stopped(done)
    progress = Progress("train", recipe.steps, "steps", done) if processes.first else None
    with Log(run, enabled=processes.first) as log:
        log.event(event="start", step=done, clips=len(clips), parameters=sum(p.numel() for p in backbone.parameters()))
        waited, began, due = 0.0, time.perf_counter(), False
        with signals_held():  # a signal to the whole process group must not end the workers
            batches = iter(loader(clips, steps, collate, recipe.loader_workers))
        for step in range(done + 1, recipe.steps + 1):
            before = time.perf_counter()
            batch = next(batches).to(processes.device)
            waited += time.perf_counter() - before
            for optimizer in optimizers:
                set_learning_rate(optimizer, learning_rate_factor(step, recipe))
            losses = gradients(trained, method, batch, recipe, step, processes)
            update = updates.apply(step, losses["loss"], stop.seen)
            last = step == recipe.steps

            if not update.applied:
                log.event(event="skipped", step=step, reason="the loss or its gradient is not finite")
            if step % recipe.log_every == 0 or last:
                means = processes.mean({**losses, "gradient_norm": update.gradient_norm}) if update.applied else {}
                values = {name: float(value) for name, value in means.items()}
                seconds = time.perf_counter() - began
                count = (step - done - 1) % recipe.log_every + 1
                rate = count * recipe.batch * method.states_per_clip / seconds
                log.scalars(step, **values, samples_per_second=rate, data_wait=waited / seconds)
                if progress is not None:
                    note = "  ".join(f"{name} {value:.4f}" for name, value in [*values.items()][:2])
                    progress.update(step, note + f"  {updates.skipped} bad steps skipped" * bool(updates.skipped))
                waited, began = 0.0, time.perf_counter()
            aside = time.perf_counter()
            # While steps are skipped, no checkpoint takes the place of one from before.
            due = due or step % recipe.checkpoint_every == 0
            if last or update.stop or (due and update.applied):
                due = False
                if processes.first:
                    checkpoint.save(run, step, backbone, average, optimizers, recipe.checkpoints_kept)
                else:  # so that all processes raise, or none
                    checkpoint.tensors_by_file(backbone, average, optimizers)
            if update.stop and not last:
                log.event(event="stop", step=step)
                if processes.world > 1:
                    dist.barrier()
                raise Stopped(step)
            if len(validation) and (last or step % recipe.validate_every == 0):
                value = validate(backbone, average, method, validation, collate, recipe, processes, stop)
                if value is not None:
                    log.scalars(step, validation_loss=value)
            began += time.perf_counter() - aside
        log.event(event="end", step=recipe.steps, skipped=updates.skipped)
    if processes.world > 1:
        dist.barrier()
    return run.checkpoint()


def gradients(
    trained: nn.Module, method: Method, batch: Batch, recipe: TrainRecipe, step: int, processes: Processes
) -> dict[str, Tensor]:
    """A step's losses, detached; their gradients are left in the network.

    Noise and times depend on seed, step and process alone.
    """
    generator = torch.Generator(processes.device).manual_seed(mixed_seed(recipe.seed, step, processes.rank))
    with torch.autocast(processes.device.type, torch.bfloat16, enabled=recipe.precision == "bfloat16"):
        losses = method.loss(trained, batch, generator)
    losses["loss"].backward()
    return {name: value.detach() for name, value in losses.items()}


@torch.no_grad()
def validate(
    backbone: Backbone,
    average: MovingAverage,
    method: Method,
    clips: Clips,
    collate: Collate,
    recipe: TrainRecipe,
    processes: Processes,
    stop: StopSignal,
    most: int = 256,
) -> float | None:
    """Loss of the averaged weights on the validation split, with the same times and noise every time.

    None where a signal came meanwhile: the checkpoint is more urgent.
    """
    weights = {name: value.detach().clone() for name, value in backbone.named_parameters()}
    average.copy_to(backbone)
    backbone.eval()
    chosen = range(min(len(clips), most))
    total = 0.0
    for start in range(0, len(chosen), recipe.batch):
        if stop.seen:
            break
        part = [clips[i] for i in chosen[start : start + recipe.batch]]
        generator = torch.Generator(processes.device).manual_seed(mixed_seed(recipe.seed, start, -1))
        with torch.autocast(processes.device.type, torch.bfloat16, enabled=recipe.precision == "bfloat16"):
            loss = method.loss(backbone, collate(part).to(processes.device), generator)["loss"]
        total += float(loss) * len(part)
    backbone.train()
    for name, value in backbone.named_parameters():
        value.copy_(weights[name])
    return None if stop.seen else total / len(chosen)


def run_record(recipe: TrainRecipe, version: Version, clips: Clips, run: Run) -> RunRecord:
    """The record of a run that is about to start, or of the one that is about to go on.

    Raises:
        ValueError: the run was started with other settings or on another version.
    """
    before = RunRecord.read(run) if run.file.is_file() else None
    method = method_named(recipe.method)
    channels, height, width = version.clip["latent_shape"]
    backbone = BackboneConfig(
        channels=channels,
        height=height,
        width_latent=width,
        text_dim=version.text["dim"],
        width=recipe.width,
        depth=recipe.depth,
        heads=recipe.heads,
        patch=recipe.patch,
        outputs=method.heads,
        temporal=method.temporal,
    )
    reference = DatasetVersion(version.number, version.merkle_root, version.recipe_fingerprint)
    figures = {} if before is None else before.figures
    record = RunRecord(recipe, figures, backbone, version.clip, version.codec, version.text, reference)
    if before is not None:
        before.check_resumable(record, run)
        return record
    return dataclasses.replace(record, figures=method.prepare(clips, version.clip))


def mixed_seed(*parts: int) -> int:
    """One 63-bit seed from several whole numbers."""
    mixed = 0x9E3779B97F4A7C15
    for part in parts:
        mixed = ((mixed ^ (part & (2**64 - 1))) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
        mixed ^= mixed >> 31
    return mixed >> 1


class Log:
    """Scalars as JSON lines and for TensorBoard."""

    def __init__(self, run: Run, enabled: bool) -> None:
        self.run, self.enabled = run, enabled

    def __enter__(self) -> Log:
        if self.enabled:
            from torch.utils.tensorboard import SummaryWriter

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
        """Write named values of a step."""
        self.event(step=step, **{name: float(f"{value:.6g}") for name, value in values.items()})
        if self.enabled:
            for name, value in values.items():
                self.board.add_scalar(name, value, step)


def arguments(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], int]:
    """Add the trainer's options to a parser; returns what runs them."""
    parser.add_argument("--lake", required=True, metavar="DIR", help="the lake that `vlfm ingest` wrote")
    # torchrun takes --run for an abbreviation of its own --run-path, even behind -m; --run-dir gets past it.
    parser.add_argument(
        "--run",
        "--run-dir",
        required=True,
        metavar="DIR",
        help="where the run is kept; an old one is resumed (under torchrun say --run-dir)",
    )
    parser.add_argument("--recipe", default="base", metavar="NAME", help="training recipe: base (default) or demo")
    parser.add_argument("--version", type=int, metavar="N", help="version of the dataset (default: the newest)")
    parser.add_argument(
        "--processes",
        type=int,
        default=1,
        metavar="N",
        help="processes on this machine, one for each GPU or several on the CPU (default: 1)",
    )
    add_settings_option(parser, "steps=2000")
    parser.epilog = (
        f"Exit status: 0 the run is finished; {STOPPED} it was asked to stop (SIGTERM or Ctrl-C) and left a "
        "checkpoint, the same command goes on; 1 an error."
    )
    return run_arguments


def run_arguments(options: argparse.Namespace) -> int:
    """Train as the options say."""
    recipe = override(train_recipe(options.recipe), parse_settings(options.settings))
    if options.processes != 1:
        return run_processes(options, recipe)
    try:
        folder = train(options.lake, options.run, recipe, options.version)
    except (Stopped, FloatingPointError) as end:
        if given_rank() == 0:
            raise
        return STOPPED if isinstance(end, Stopped) else 1  # all processes end alike, and the first says so
    if given_rank() == 0:
        print(f"checkpoint: {folder}")
    return 0


def run_processes(options: argparse.Namespace, recipe: TrainRecipe) -> int:
    """Train as several processes on this machine.

    Raises:
        ValueError: a number of processes that cannot be; the message says the mend.
    """
    count = options.processes
    if count < 1:
        raise ValueError(f"--processes is {count}; it must be at least 1")
    if "WORLD_SIZE" in os.environ:
        raise ValueError("--processes starts processes of its own; leave it out under torchrun")
    if recipe.batch % count:
        raise ValueError(f"batch {recipe.batch} is no multiple of the {count} processes; set it with --set batch=...")
    if torch.cuda.is_available() and count > torch.cuda.device_count():
        raise ValueError(f"--processes is {count}, but this machine has {torch.cuda.device_count()} GPUs")
    command = [sys.executable, "-m", "model.train", "--lake", options.lake, "--run-dir", options.run]
    command += ["--recipe", options.recipe, *(f"--set={pair}" for pair in options.settings)]
    command += [] if options.version is None else ["--version", str(options.version)]
    return launch(command, count)


def main(arguments_given: Sequence[str] | None = None) -> int:
    """Entry of `python -m model.train` and `torchrun -m model.train`."""
    return run_program("model.train", "Train on the shards of one version of a lake.", arguments, arguments_given)


if __name__ == "__main__":
    sys.exit(main())
