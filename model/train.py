"""The trainer: reads the shards of one version, and nothing else of the pipeline.

Run it as `vlfm train`, on N processes of this machine as `vlfm train --processes N`, on those of several machines as
`torchrun ... -m model.train --lake DIR --run-dir DIR`. Exit statuses: 0 the run is finished, 75 it was asked to stop
and the same command goes on (model.stop.STOPPED), 1 an error.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from model.backbones.dit import Backbone, BackboneConfig
from model.methods.base import Method
from model.methods.registry import method_named
from model.program import add_settings_option, parse_settings, run_program, take_from_environment
from model.recipes import TrainRecipe, train_recipe, train_recipes
from model.settings import override
from model.stop import STOPPED, Stopped, StopSignal
from model.strips import Strips
from model.training.checkpoint import Run
from model.training.copies import Copies
from model.training.data import Clips, Collate, Loader, Steps, lake_and_version
from model.training.ema import MovingAverage
from model.training.hardware import seconds_at_peak
from model.training.launch import launch
from model.training.loop import Schedule, Training, run_training
from model.training.objective import Objective
from model.training.optimizers import learning_rate_factor, make_optimizers
from model.training.processes import FirstFailed, Processes, end_program, given_rank, join_processes
from model.training.record import DatasetVersion, RunRecord
from model.training.sharding import replicate, shard
from model.training.start import start_from
from model.training.state import TrainingState
from storage.address import store_at
from storage.layout import Lake
from storage.version import Version, read_empty_text


def train(
    lake: str | Path,
    run: str | Path,
    recipe: TrainRecipe,
    version: int | None = None,
    init_from: Path | None = None,
    allow_mismatch: bool = False,
    copy_to: str | None = None,
) -> Path:
    """Train on one version of a lake until the recipe's last step, resuming where the run stands.

    init_from: an official DiT checkpoint or a run's folder for the first weights (model/training/start.py); a run that
    has a checkpoint of its own goes on from that.

    allow_mismatch: whether a run may go on on another version of the dataset, with other settings or another codec; one
    line says which.

    copy_to: a folder or `s3://BUCKET/PREFIX` that every checkpoint is copied to; where it has a newer one than the
    run's folder, as on a new machine, the run goes on from that.

    A step whose loss or gradient is not finite changes nothing and is logged. SIGTERM and Ctrl-C end the run after the
    step in flight, with a checkpoint.

    Returns:
        The folder of the last checkpoint; the run is finished.

    Raises:
        Stopped: SIGTERM or Ctrl-C came before the last step; the same call goes on.
        ValueError, FileNotFoundError: bad settings, or no such lake, version or shard; the message says the remedy.
        FloatingPointError: too many steps in a row are not finite; the last good checkpoint stays.
        LakeBusy: another trainer is at work in the run's folder.
        DamagedCheckpoint, DiskFull: as `run_training` has them.
        FirstFailed: the first of several processes failed at what it does for all, and says why.
    """
    with StopSignal() as stop:
        opened, chosen = lake_and_version(lake, version)
        processes = join_processes()
        folder = Run(Path(run))
        try:
            with ExitStack() as held:
                processes.by_first(lambda: held.enter_context(folder.lock()))
                copies = Copies(folder, store_at(copy_to), recipe.checkpoints_kept) if copy_to else None
                if copies is not None:
                    processes.by_first(copies.meet)
                return _train(opened, folder, recipe, chosen, processes, stop, init_from, allow_mismatch, copies)
        finally:
            if processes.world > 1:
                dist.destroy_process_group()


def _train(
    lake: Lake,
    run: Run,
    recipe: TrainRecipe,
    version: Version,
    processes: Processes,
    stop: StopSignal,
    init_from: Path | None,
    allow_mismatch: bool,
    copies: Copies | None,
) -> Path:
    check_divides(recipe, processes.world)
    collate = Collate(read_empty_text(lake, version), method_named(recipe.method).members)
    check_members(recipe.method, collate.members, version)
    clips = Clips(lake, version, "train", collate.arrays)
    validation = Clips(lake, version, "validation", collate.arrays)
    record = processes.by_first(lambda: run_record(recipe, version, clips, run, init_from, allow_mismatch))
    objective = Objective(record.method(), recipe, processes)

    torch.manual_seed(recipe.seed)
    backbone = Backbone(record.backbone)
    if init_from is not None and not run.steps():
        start_from(init_from).load(backbone)
    backbone.activation_checkpointing = recipe.activation_checkpointing
    backbone = backbone.to(processes.device, objective.dtype)
    if recipe.compile:
        backbone.compile_blocks()
    trained: nn.Module = backbone
    if recipe.sharding == "fsdp":
        shard(backbone, processes, recipe.precision)
    else:
        trained = replicate(backbone, processes)
    state = TrainingState(backbone, MovingAverage(backbone, recipe.ema_decay), make_optimizers(backbone, recipe))

    def batches(done: int) -> Loader:
        steps = Steps(len(clips), recipe.batch, recipe.seed, done, recipe.steps, processes.rank, processes.world)
        return Loader(clips, steps, collate, recipe.loader_workers, processes.device, objective.dtype)

    strips = Strips(record, validation if len(validation) else clips, processes, stop)
    training = Training(
        batches=batches,
        losses=lambda step, batch: objective.losses(trained, step, batch),
        learning_rate=lambda step: learning_rate_factor(step, recipe),
        gradient_clip=recipe.gradient_clip,
        samples=recipe.batch,
        states_per_sample=objective.method.states_per_clip,
        unit="clips",
        seconds_at_peak=seconds_at_peak(record, processes.device, processes.world),
        validate=(lambda: objective.validate(state, validation, collate, stop)) if len(validation) else None,
        sample=lambda: strips.made(state),
        facts={"clips": len(clips), "parameters": sum(p.numel() for p in backbone.parameters())},
        identity=record.identity(),
        allow_mismatch=allow_mismatch,
    )
    schedule = Schedule(
        steps=recipe.steps,
        log_every=recipe.log_every,
        checkpoint_every=recipe.checkpoint_every,
        checkpoints_kept=recipe.checkpoints_kept,
        checkpoints=recipe.checkpoints,
        bad_steps_allowed=recipe.bad_steps_allowed,
        spike_factor=recipe.spike_factor,
        validate_every=recipe.validate_every,
        sample_every=recipe.sample_every,
    )
    return run_training(training, state, run, schedule, processes, stop, copies)


def check_members(method: str, members: Sequence[str], version: Version) -> None:
    """Refuses a version whose shards lack what the method reads. Raises ValueError with the remedy."""
    if "latents" in members and not version.recipe.get("store_latents", True):
        raise ValueError(
            f"the method {method} learns from latents, which the shards of version {version.number} do not hold; "
            "ingest with --set store_latents=true"
        )


def check_divides(recipe: TrainRecipe, count: int) -> None:
    """Refuses a batch that so many processes cannot share evenly. Raises ValueError with the remedy."""
    told = f"{count} processes" if recipe.accumulate == 1 else f"{count} processes x {recipe.accumulate} parts"
    if recipe.batch % (count * recipe.accumulate):
        raise ValueError(f"batch {recipe.batch} is no multiple of the {told}; set it with --set batch=...")


def run_record(
    recipe: TrainRecipe,
    version: Version,
    clips: Clips,
    run: Run,
    init_from: Path | None = None,
    allow_mismatch: bool = False,
) -> RunRecord:
    """The record of a run that is about to start, which is written, or of the one that is about to go on.

    For a new one clips are read, for the figures that the method needs: the first process alone does it.

    Raises:
        ValueError: the run was started with other settings or on another version.
    """
    before = RunRecord.read(run) if run.file.is_file() else None
    reference = DatasetVersion(version.number, version.merkle_root, version.recipe_fingerprint)
    if before is not None:
        before.check_resumable(recipe, reference, run, allow_mismatch)
    start: Mapping[str, str] | None = None if init_from is None else start_from(init_from).describe()
    if before is not None:
        before.check_start(start, run)
        start = start or before.initialised_from
    kind = method_named(recipe.method)
    figures = kind.prepare(clips, version.clip) if before is None else before.figures
    method: Method = kind.build(recipe.options, figures, version.clip)
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
        rates=method.rates,
        frame_count=method.frame_count,
        qk_norm=recipe.qk_norm,
        architecture=recipe.architecture,
        stem=recipe.stem,
        stem_depth=recipe.stem_depth,
        caption_rows=version.text["length"] if recipe.caption_padding == "seen" else 0,
    )
    if before is None and init_from is not None:
        start_from(init_from).check(backbone)  # weights that do not fit are told before the run is described
    record = RunRecord(recipe, figures, backbone, version.clip, version.codec, version.text, reference, start)
    if before is None or (allow_mismatch and record != before):
        run.write(record.to_json())
    return record


def arguments(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], int]:
    """Add the trainer's options to a parser; returns what runs them."""
    parser.add_argument(
        "--lake",
        required=True,
        metavar="DIR",
        help="the lake that `vlfm ingest` wrote: a folder, or s3://BUCKET/PREFIX",
    )
    # torchrun takes --run for an abbreviation of its own --run-path, even behind -m; --run-dir gets past it.
    parser.add_argument(
        "--run",
        "--run-dir",
        required=True,
        metavar="DIR",
        help="where the run is kept; an old one is resumed (under torchrun say --run-dir)",
    )
    parser.add_argument(
        "--recipe", default="base", metavar="NAME", help=f"{', '.join(train_recipes())} (default: base)"
    )
    parser.add_argument("--version", type=int, metavar="N", help="version of the dataset (default: the newest)")
    parser.add_argument(
        "--init-from",
        metavar="FILE",
        help="first weights: a run's folder, whose backbone has the same shape, or an official DiT checkpoint (.pt "
        "or .safetensors), which wants --set architecture=dit",
    )
    parser.add_argument(
        "--copy-to",
        metavar="ADDRESS",
        help="a folder or s3://BUCKET/PREFIX that checkpoints are copied to; a run that is not here goes on from there",
    )
    parser.add_argument(
        "--allow-mismatch",
        action="store_true",
        help="go on with a run on another version of the dataset or with other settings, which else is refused",
    )
    parser.add_argument(
        "--processes",
        type=int,
        default=1,
        metavar="N",
        help="processes on this machine, one for each GPU or several on the CPU (default: 1)",
    )
    add_settings_option(parser, "steps=2000")
    take_from_environment(parser)
    parser.epilog = (
        "Options that are not given come from the environment: VLFM_LAKE, VLFM_RUN, VLFM_COPY_TO and so on, VLFM_SET "
        "with several key=value. VLFM_METRICS=PORT serves Prometheus metrics, VLFM_ALIVE=FILE is touched after every "
        "step, VLFM_LOG=json logs as JSON. "
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
        start = None if options.init_from is None else Path(options.init_from)
        folder = train(
            options.lake, options.run, recipe, options.version, start, options.allow_mismatch, options.copy_to
        )
    except (Stopped, FloatingPointError, FirstFailed) as end:
        if given_rank() == 0:
            raise
        return STOPPED if isinstance(end, Stopped) else 1  # all processes end alike, and the first says so
    if given_rank() == 0:
        print(f"checkpoint: {folder}")
    return 0


def run_processes(options: argparse.Namespace, recipe: TrainRecipe) -> int:
    """Train as several processes on this machine.

    Raises:
        ValueError: a number of processes that cannot be; the message says the remedy.
    """
    count = options.processes
    if count < 1:
        raise ValueError(f"--processes is {count}; it must be at least 1")
    if "WORLD_SIZE" in os.environ:
        raise ValueError("--processes starts processes of its own; leave it out under torchrun")
    check_divides(recipe, count)
    if torch.cuda.is_available() and count > torch.cuda.device_count():
        raise ValueError(f"--processes is {count}, but this machine has {torch.cuda.device_count()} GPUs")
    command = [sys.executable, "-m", "model.train", "--lake", options.lake, "--run-dir", options.run]
    command += ["--recipe", options.recipe, "--processes", "1", *(f"--set={pair}" for pair in options.settings)]
    command += [] if options.version is None else ["--version", str(options.version)]
    command += [] if options.init_from is None else ["--init-from", options.init_from]
    command += [] if options.copy_to is None else ["--copy-to", options.copy_to]
    command += ["--allow-mismatch"] if options.allow_mismatch else []
    return launch(command, count)


def main(arguments_given: Sequence[str] | None = None) -> int:
    """Entry of `python -m model.train` and `torchrun -m model.train`."""
    return run_program("model.train", "Train on the shards of one version of a lake.", arguments, arguments_given)


if __name__ == "__main__":
    end_program(main())
