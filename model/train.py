"""The trainer: reads the shards of one version, and nothing else of the pipeline.

Run it as `vlfm train`, or on N processes as `torchrun --nproc-per-node=N -m model.train --lake DIR --run-dir DIR`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from model import checkpoint
from model.checkpoint import Run
from model.data import Clips, Collate, Steps, curve_scales, lake_and_version, loader
from model.dit import Backbone, BackboneConfig
from model.ema import MovingAverage
from model.methods.base import ClipBatch, Method
from model.methods.vlfm import make_vlfm
from model.optimizers import learning_rate_factor, make_optimizers, set_learning_rate
from model.program import add_settings_option, parse_settings, run_program
from model.progress import Progress
from model.recipes import TrainRecipe, override, train_recipe
from storage.layout import Lake
from storage.version import Version, read_empty_text

UNCHECKED = {"steps", "log_every", "checkpoint_every", "checkpoints_kept", "validate_every", "loader_workers"}
"""Fields of the recipe that a resumed run may change."""
MakeMethod = Callable[[TrainRecipe, Mapping[str, Any], float, float], Method]


@dataclasses.dataclass(frozen=True)
class Processes:
    """This process among those of the run."""

    rank: int
    world: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this process writes what the run leaves behind."""
        return self.rank == 0


def train(
    lake: str | Path, run: str | Path, recipe: TrainRecipe, version: int | None = None, method: MakeMethod = make_vlfm
) -> Path:
    """Train on one version of a lake until the recipe's last step, resuming where the run stands.

    SIGTERM and Ctrl-C end the run after the step in flight, with a checkpoint. Another method than VLFM is what
    `method` makes of the same arguments.

    Returns:
        The folder of the last checkpoint.

    Raises:
        ValueError, FileNotFoundError: bad settings, or no such lake, version or shard; the message says the mend.
        FloatingPointError: the loss is not finite; the last good checkpoint stays.
    """
    opened, chosen = lake_and_version(lake, version)
    processes = join_processes()
    try:
        return _train(opened, Run(Path(run)), recipe, chosen, processes, method)
    finally:
        if processes.world > 1:
            dist.destroy_process_group()


def _train(
    lake: Lake, run: Run, recipe: TrainRecipe, version: Version, processes: Processes, make_method: MakeMethod
) -> Path:
    clips = Clips(lake, version, "train")
    about = describe(recipe, version, clips)
    if run.file.is_file():
        check_same(run.read(), about, run)
    elif processes.first:
        run.write(about)
    if run.steps() and run.steps()[-1] >= recipe.steps:
        return run.checkpoint()

    torch.manual_seed(recipe.seed)
    backbone = Backbone(BackboneConfig(**about["backbone"])).to(processes.device)
    average = MovingAverage(backbone, recipe.ema_decay)
    optimizers = make_optimizers(backbone, recipe)
    method = make_method(recipe, version.clip, about["mean_scale"], about["derivative_scale"])
    done = checkpoint.restore(run.checkpoint(), backbone, average, optimizers) if run.steps() else 0
    trained = DistributedDataParallel(backbone) if processes.world > 1 else backbone
    collate = Collate(read_empty_text(lake, version))
    steps = Steps(len(clips), recipe.batch, recipe.seed, done, recipe.steps, processes.rank, processes.world)
    validation = Clips(lake, version, "validation")

    stop = StopSignal()
    progress = Progress("train", recipe.steps, "steps", done) if processes.first else None
    with Log(run, enabled=processes.first) as log:
        log.event(event="start", step=done, clips=len(clips), parameters=sum(p.numel() for p in backbone.parameters()))
        waited, began = 0.0, time.perf_counter()
        batches = iter(loader(clips, steps, collate, recipe.loader_workers))
        for step in range(done + 1, recipe.steps + 1):
            before = time.perf_counter()
            batch = next(batches).to(processes.device)
            waited += time.perf_counter() - before
            for optimizer in optimizers:
                set_learning_rate(optimizer, learning_rate_factor(step, recipe))
            losses = optimise(trained, backbone, method, batch, optimizers, recipe, step, processes)
            average.update(backbone)

            if step % recipe.log_every == 0 or step == recipe.steps:
                values = {name: float(value) for name, value in across(losses, processes).items()}
                if not math.isfinite(values["loss"]):
                    raise FloatingPointError(
                        f"the loss is {values['loss']} at step {step}; the last good checkpoint stays in {run.root}: "
                        "lower --set learning_rate=... and start another run"
                    )
                seconds = time.perf_counter() - began
                count = (step - done - 1) % recipe.log_every + 1
                rate = count * recipe.batch * recipe.times_per_clip / seconds
                log.scalars(step, **values, samples_per_second=rate, data_wait=waited / seconds)
                if progress is not None:
                    progress.update(step, f"loss {values['loss']:.4f}  mean {values['mean']:.4f}")
                waited, began = 0.0, time.perf_counter()
            aside = time.perf_counter()
            if len(validation) and (step % recipe.validate_every == 0 or step == recipe.steps):
                value = validate(backbone, average, method, validation, collate, recipe, processes)
                log.scalars(step, validation_loss=value)
            ending = stop.asked(processes)
            if processes.first and (step % recipe.checkpoint_every == 0 or step == recipe.steps or ending):
                checkpoint.save(run, step, backbone, average, optimizers, recipe.checkpoints_kept)
            began += time.perf_counter() - aside
            if ending and step < recipe.steps:
                if processes.first:
                    print(f"stopped at step {step} with a checkpoint; the same command goes on", file=sys.stderr)
                break
        log.event(event="end", step=step)
    if processes.world > 1:
        dist.barrier()
    return run.checkpoint()


def optimise(
    trained: nn.Module,
    backbone: nn.Module,
    method: Method,
    batch: ClipBatch,
    optimizers: Sequence[Optimizer],
    recipe: TrainRecipe,
    step: int,
    processes: Processes,
) -> dict[str, Tensor]:
    """One step: loss, gradients, clipped, applied. Noise and times depend on seed, step and process alone."""
    generator = torch.Generator(processes.device).manual_seed(mixed_seed(recipe.seed, step, processes.rank))
    with torch.autocast(processes.device.type, torch.bfloat16, enabled=recipe.precision == "bfloat16"):
        losses = method.loss(trained, batch, generator)
    losses["loss"].backward()
    norm = nn.utils.clip_grad_norm_(backbone.parameters(), recipe.gradient_clip)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return {**{name: value.detach() for name, value in losses.items()}, "gradient_norm": norm.detach()}


@torch.no_grad()
def validate(
    backbone: Backbone,
    average: MovingAverage,
    method: Method,
    clips: Clips,
    collate: Collate,
    recipe: TrainRecipe,
    processes: Processes,
    most: int = 256,
) -> float:
    """Loss of the averaged weights on the validation split, with the same times and noise every time."""
    weights = {name: value.detach().clone() for name, value in backbone.named_parameters()}
    average.copy_to(backbone)
    backbone.eval()
    chosen = range(min(len(clips), most))
    total = 0.0
    for start in range(0, len(chosen), recipe.batch):
        part = [clips[i] for i in chosen[start : start + recipe.batch]]
        generator = torch.Generator(processes.device).manual_seed(mixed_seed(recipe.seed, start, -1))
        with torch.autocast(processes.device.type, torch.bfloat16, enabled=recipe.precision == "bfloat16"):
            loss = method.loss(backbone, collate(part).to(processes.device), generator)["loss"]
        total += float(loss) * len(part)
    backbone.train()
    for name, value in backbone.named_parameters():
        value.copy_(weights[name])
    return total / len(chosen)


def describe(recipe: TrainRecipe, version: Version, clips: Clips) -> dict[str, Any]:
    """Everything that sampling and resuming need to know, without the lake."""
    channels, height, width = version.clip["latent_shape"]
    config = BackboneConfig(
        channels=channels,
        height=height,
        width_latent=width,
        text_dim=version.text["dim"],
        width=recipe.width,
        depth=recipe.depth,
        heads=recipe.heads,
        patch=recipe.patch,
    )
    mean_scale, derivative_scale = curve_scales(clips)
    return {
        "format": 1,
        "method": "vlfm",
        "recipe": dataclasses.asdict(recipe),
        "backbone": config.to_json(),
        "mean_scale": mean_scale,
        "derivative_scale": derivative_scale,
        "clip": version.clip,
        "codec": version.codec,
        "text": version.text,
        "version": {
            "number": version.number,
            "merkle_root": version.merkle_root,
            "recipe_fingerprint": version.recipe_fingerprint,
        },
    }


def check_same(old: Mapping[str, Any], new: Mapping[str, Any], run: Run) -> None:
    """Refuse to go on with a run under other settings or on another version."""
    for name, value in new["recipe"].items():
        if name not in UNCHECKED and old["recipe"].get(name) != value:
            raise ValueError(
                f"the run {run.root} was started with {name}={old['recipe'].get(name)!r}, not {value!r}; "
                "give another --run, or the same setting"
            )
    if old["version"]["merkle_root"] != new["version"]["merkle_root"]:
        raise ValueError(
            f"the run {run.root} trains on version {old['version']['number']} of its lake, "
            f"not on {new['version']['number']}; give another --run, or --version {old['version']['number']}"
        )


def mixed_seed(*parts: int) -> int:
    """One 63-bit seed from several whole numbers."""
    mixed = 0x9E3779B97F4A7C15
    for part in parts:
        mixed = ((mixed ^ (part & (2**64 - 1))) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
        mixed ^= mixed >> 31
    return mixed >> 1


def join_processes() -> Processes:
    """This process's place, from torchrun's environment; alone where there is none."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    rank, local = int(os.environ.get("RANK", "0")), int(os.environ.get("LOCAL_RANK", "0"))
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", local) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("nccl" if gpu else "gloo")
    return Processes(rank, world, device)


def across(values: Mapping[str, Tensor], processes: Processes) -> dict[str, Tensor]:
    """The mean of named scalars over the processes."""
    if processes.world == 1:
        return dict(values)
    joined = torch.stack([value.float() for value in values.values()])
    dist.all_reduce(joined)
    return dict(zip(values, joined / processes.world, strict=True))


class StopSignal:
    """Remembers SIGTERM and Ctrl-C, so that a step in flight ends whole; a second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.seen = False
        try:
            self.before: dict[int, Any] = {s: signal.signal(s, self._note) for s in (signal.SIGTERM, signal.SIGINT)}
        except ValueError:  # not in the main thread, as inside a Prefect task
            self.before = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.seen = True
        for each, handler in self.before.items():
            signal.signal(each, handler)

    def asked(self, processes: Processes) -> bool:
        """Whether any process was asked to stop."""
        if processes.world == 1:
            return self.seen
        flag = torch.tensor(float(self.seen), device=processes.device)
        dist.all_reduce(flag)
        return bool(flag > 0)


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
    add_settings_option(parser, "steps=2000")
    return run_arguments


def run_arguments(options: argparse.Namespace) -> int:
    """Train as the options say."""
    recipe = override(train_recipe(options.recipe), parse_settings(options.settings))
    folder = train(options.lake, options.run, recipe, options.version)
    if int(os.environ.get("RANK", "0")) == 0:
        print(f"checkpoint: {folder}")
    return 0


def main(arguments_given: Sequence[str] | None = None) -> int:
    """Entry of `torchrun -m model.train`."""
    return run_program("model.train", "Train on the shards of one version of a lake.", arguments, arguments_given)


if __name__ == "__main__":
    sys.exit(main())
