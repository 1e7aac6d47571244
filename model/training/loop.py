"""The one training loop: data in, loss, update, log, checkpoint, validation, and a stop after any step.

The trainer of backbones and that of codecs both run it; what differs between them is a `Training`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.progress import Progress
from model.stop import Stopped, StopSignal, signals_held
from model.telemetry import Alive
from model.training import checkpoint
from model.training.checkpoint import Run
from model.training.copies import Copies
from model.training.hardware import memory_bytes
from model.training.log import Log
from model.training.optimizers import set_learning_rate
from model.training.processes import Processes
from model.training.saving import make_saver
from model.training.state import TrainingState
from model.training.updates import Updates, late


@dataclass(frozen=True)
class Schedule:
    """How long a training goes on, and what it leaves behind when; all in steps."""

    steps: int
    """Steps of the whole run."""
    log_every: int
    """Steps between two lines of the log; the last step has one too."""
    checkpoint_every: int
    """Steps between two checkpoints; the last step has one too."""
    checkpoints_kept: int
    """Newest checkpoints that stay on disk."""
    bad_steps_allowed: int = 10
    """Steps in a row that may be skipped because loss or gradient are not finite or a spike; one more ends the run."""
    validate_every: int = 1
    """Steps between two validations; there is one after the last step too."""
    sample_every: int = 0
    """Steps between two sets of pictures; there is one after the last step too. 0 makes none."""
    spike_factor: float = 0.0
    """How many times its running mean a gradient norm may be; 0 allows any."""
    mean_losses: bool = False
    """Whether a line of the log has the mean of the losses since the line before, instead of its own step's."""
    checkpoints: str = "whole"
    """How checkpoints are written: `whole` or `distributed` (model.training.saving)."""


class Batches(Protocol):
    """Batches one after the other, from a reader that must be closed."""

    def __next__(self) -> Any: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Training:
    """What one training does that another does not."""

    losses: Callable[[int, Any], dict[str, Tensor]]
    """Named scalars of a step, counted from 1, and its batch: `loss`, the first, is minimised."""
    learning_rate: Callable[[int], float]
    """Share of the peak learning rate at a step, counted from 1."""
    gradient_clip: float
    """Largest global gradient norm."""
    samples: int
    """Samples of a step over all processes, for the throughput in the log."""
    batches: Callable[[int], Batches] | None = None
    """The batches that follow so many done steps, on the device; None where the losses make their own."""
    validate: Callable[[], Mapping[str, float] | None] | None = None
    """Named losses on clips that are not trained on; None where a stop is more urgent."""
    sample: Callable[[], Mapping[str, NDArray[np.uint8]]] | None = None
    """Pictures (H, W, 3) of what was learned, by name; in the first process alone, the others have none."""
    states_per_sample: int = 1
    """What a step learns from each sample, such as the flow times of a clip."""
    unit: str = "samples"
    """What people call samples."""
    seconds_at_peak: float | None = None
    """Seconds that a sample would take at the devices' peak, for the MFU; None where that is not known."""
    name: str = "train"
    """What people see it called."""
    part: str = ""
    """Which part of a run it is, for the message of a stop; empty where a run has one."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What the log says at the start."""
    identity: Mapping[str, Any] = field(default_factory=dict)
    """What its checkpoints are of (`checkpoint.check_identity`)."""
    allow_mismatch: bool = False
    """Whether to go on from a checkpoint of something else."""


def run_training(
    training: Training,
    state: TrainingState,
    run: Run,
    schedule: Schedule,
    processes: Processes,
    stop: StopSignal,
    copies: Copies | None = None,
) -> Path:
    """Go on from the run's newest whole checkpoint, or from `state`, to the last step.

    A step whose loss or gradient is not finite or a spike changes nothing and is logged. While steps are skipped, no
    checkpoint takes the place of one from before, except when the run ends. Damaged checkpoints are set aside.

    On a GPU the host hears of skipped steps, and of signals to the processes, some steps late, so that it need not wait
    (model.training.updates); before a line of the log and before a checkpoint it waits.

    copies: where checkpoints are copied to, in the first process; None where they are not.

    Returns:
        The folder of the last checkpoint.

    Raises:
        Stopped: a signal came before the last step; there is a checkpoint of the step in flight.
        FloatingPointError: too many steps in a row are not finite; the last good checkpoint stays.
        DamagedCheckpoint: there are checkpoints, and none is whole.
        DiskFull: no room for a checkpoint; the last one stays.
        FirstFailed: the first of several processes failed at what it does for all.
    """
    done = processes.by_first(run.set_aside)
    if done is not None:
        checkpoint.check_identity(run.folder(done), training.identity, training.allow_mismatch)
        checkpoint.restore(run.folder(done), state)
        if done >= schedule.steps:
            return run.folder(done)
    clip, allowed, factor = training.gradient_clip, schedule.bad_steps_allowed, schedule.spike_factor
    updates = Updates(state, clip, allowed, run.root, processes, factor, late(processes.device))
    if processes.any(stop.seen)[0]:
        raise Stopped(state.step, training.part)
    progress = Progress(training.name, schedule.steps, "steps", state.step) if processes.first else None
    with ExitStack() as held:
        log = held.enter_context(Log(run, state.step, enabled=processes.first))
        log.event(event="start", step=state.step, **training.facts)
        with signals_held():  # a signal to the whole process group must not end the loader's workers
            batches = held.enter_context(closing(training.batches(state.step))) if training.batches else None
        saver = make_saver(schedule.checkpoints, run, schedule.checkpoints_kept, processes, training.identity, copies)
        held.callback(saver.close)
        alive = Alive()
        recent, due = Recent(schedule.mean_losses), False
        for step in range(state.step + 1, schedule.steps + 1):
            before = time.perf_counter()
            batch = next(batches) if batches is not None else None
            recent.waited += time.perf_counter() - before
            for optimizer in state.optimizers:
                set_learning_rate(optimizer, training.learning_rate(step))
            losses = training.losses(step, batch)
            losses["loss"].backward()
            update = updates.apply(step, losses["loss"], stop.seen)
            state.step = step
            alive.touch()
            recent.add({**losses, "gradient_norm": update.gradient_norm}, update.skipped)
            last, line = step == schedule.steps, step % schedule.log_every == 0
            due = due or step % schedule.checkpoint_every == 0

            applied, stopping = hear(updates, log, wait=last or line or due)
            if stopping:
                hear(updates, log, wait=True)
            if line or last:
                values = {name: float(value) for name, value in processes.mean(recent.values()).items()}
                speed = recent.speed(training, processes.device)
                log.scalars(step, **values, **speed)
                if progress is not None:
                    progress.update(step, note(training, values, speed, updates.skipped))
                recent = Recent(schedule.mean_losses)
            aside = time.perf_counter()
            if last or stopping or (due and applied):
                due = False
                log.flush()
                saver.save(state, wait=last or stopping)
            if stopping and not last:
                log.event(event="stop", step=step)
                processes.barrier()
                raise Stopped(step, training.part)
            if training.validate is not None and (last or step % schedule.validate_every == 0):
                log.scalars(step, **(training.validate() or {}))
            if training.sample is not None and schedule.sample_every and (last or step % schedule.sample_every == 0):
                log.pictures(step, training.sample())
            recent.began += time.perf_counter() - aside
        log.event(event="end", step=schedule.steps, skipped=updates.skipped)
    processes.barrier()
    return run.folder(schedule.steps)


def hear(updates: Updates, log: Log, wait: bool) -> tuple[bool, bool]:
    """Log the skipped steps that the host had not heard of, waiting for the last of them where told.

    Returns:
        Whether the last step heard of was applied, and whether any process was asked to stop.

    Raises:
        FloatingPointError: too many steps in a row were skipped.
    """
    applied, stop = True, False
    for outcome in updates.outcomes(0 if wait else None):
        applied, stop = not outcome.reason, stop or outcome.stop
        if outcome.reason:
            log.event(event="skipped", step=outcome.step, reason=outcome.reason)
    return applied, stop


class Recent:
    """Losses and times since the last line of the log.

    mean: whether `values` are means over the applied steps, or those of the last step.
    """

    def __init__(self, mean: bool) -> None:
        self.mean = mean
        self.steps, self.waited, self.began = 0, 0.0, time.perf_counter()
        self._applied, self._sums = torch.zeros(()), dict[str, Tensor]()

    def add(self, values: Mapping[str, Tensor], skipped: Tensor) -> None:
        """Take in a step, which may have been `skipped` (a scalar bool); no host synchronisation."""
        self.steps += 1
        if not self.mean or not self._sums:
            self._applied, self._sums = torch.zeros((), device=skipped.device), {}
        self._applied = self._applied + ~skipped
        for name, value in values.items():
            value = value.detach().double() if self.mean else value.detach()
            self._sums[name] = self._sums.get(name, 0) + value.masked_fill(skipped, 0)

    def values(self) -> dict[str, Tensor]:
        """Scalars by name; none where no step was applied. The host waits for the device."""
        applied = float(self._applied)
        return {name: value / applied for name, value in self._sums.items()} if applied else {}

    def speed(self, training: Training, device: torch.device) -> dict[str, float]:
        """What the log says of the hardware's use.

        `samples_per_second` counts the states learned from; clips, for a trainer of clips, go by their own unit.
        `data_wait` is the share of the time that was spent waiting for data, `mfu` that of the devices' peak.
        """
        seconds = time.perf_counter() - self.began
        rate = self.steps * training.samples / seconds
        found = {"samples_per_second": rate * training.states_per_sample, f"{training.unit}_per_second": rate}
        found |= {"data_wait": self.waited / seconds, "memory_gib": memory_bytes(device) / 2**30}
        return found if training.seconds_at_peak is None else {**found, "mfu": rate * training.seconds_at_peak}


def note(training: Training, values: Mapping[str, float], speed: Mapping[str, float], skipped: int) -> str:
    """What a line of the console says beside steps, rate and time left."""
    told = [f"{name} {value:.4f}" for name, value in [*values.items()][:2]]
    told += [f"{speed[f'{training.unit}_per_second']:.3g} {training.unit}/s", f"data wait {speed['data_wait']:.1%}"]
    told += [f"memory {speed['memory_gib']:.2f} GiB"]
    told += [f"MFU {speed['mfu']:.1%}"] if "mfu" in speed else []
    return "  ".join(told + ([f"{skipped} bad steps skipped"] if skipped else []))
