"""Checkpoints: tensors as safetensors, everything else as JSON, published by one rename. No pickle.

A run's folder holds `run.json` (the recipe, the backbone, the method and all of the dataset's version that sampling
needs), `log.jsonl`, TensorBoard's files and `checkpoints/step-<n>/`.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from model.training.ema import MovingAverage
from storage.layout import write_atomic


@dataclass(frozen=True)
class Run:
    """The folder of a training run."""

    root: Path
    """Where it is."""

    @property
    def file(self) -> Path:
        """The run's description."""
        return self.root / "run.json"

    @property
    def log(self) -> Path:
        """The log, a JSON object per line."""
        return self.root / "log.jsonl"

    def write(self, about: Mapping[str, Any]) -> None:
        """Write the run's description."""
        self.root.mkdir(parents=True, exist_ok=True)
        write_atomic(self.file, json.dumps(about, indent=1).encode())

    def read(self) -> dict[str, Any]:
        """The run's description.

        Raises:
            FileNotFoundError: there is no run here; the message says how to make one.
            ValueError: the description is damaged.
        """
        if not self.file.is_file():
            raise FileNotFoundError(
                f"{self.root} is no training run; make one with `vlfm train --lake DIR --run {self.root}`"
            )
        try:
            about: dict[str, Any] = json.loads(self.file.read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"{self.file} is damaged ({error}); train a new run") from None
        return about

    def steps(self) -> list[int]:
        """Steps of the checkpoints that are whole, in rising order."""
        return sorted(int(path.name.removeprefix("step-")) for path in (self.root / "checkpoints").glob("step-*"))

    def checkpoint(self, step: int | None = None) -> Path:
        """The folder of a checkpoint, the newest unless a step is given.

        Raises:
            FileNotFoundError: there is none; the message says what there is.
        """
        steps = self.steps()
        if not steps or (step is not None and step not in steps):
            which = "no checkpoint yet" if not steps else f"no checkpoint of step {step}, only of {steps}"
            raise FileNotFoundError(f"the run {self.root} has {which}; train it with `vlfm train`")
        return self.root / "checkpoints" / f"step-{steps[-1] if step is None else step:08d}"


def save(
    run: Run,
    step: int,
    backbone: nn.Module,
    average: MovingAverage,
    optimizers: Sequence[Optimizer],
    keep: int,
) -> Path:
    """Write a checkpoint under a temporary name, rename it, and remove all but the newest `keep`.

    Raises:
        FloatingPointError: a tensor is not finite; nothing is written and nothing removed.
    """
    files = tensors_by_file(backbone, average, optimizers)
    final = run.root / "checkpoints" / f"step-{step:08d}"
    part = final.with_name(f".part-{step:08d}")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    for name, tensors in files.items():
        save_file({k: v.contiguous() for k, v in tensors.items()}, part / f"{name}.safetensors")
    groups = [optimizer.state_dict()["param_groups"] for optimizer in optimizers]
    state_file = {"step": step, "average_updates": average.updates, "optimizers": groups}
    (part / "state.json").write_text(json.dumps(state_file))
    for path in (*part.iterdir(), part):
        _force(path)
    shutil.rmtree(final, ignore_errors=True)
    part.rename(final)
    _force(final.parent)  # the rename is safe on disk only when its folder is; only then may the old ones go
    for old in run.steps()[:-keep]:
        shutil.rmtree(run.root / "checkpoints" / f"step-{old:08d}", ignore_errors=True)
    return final


def tensors_by_file(
    backbone: nn.Module, average: MovingAverage, optimizers: Sequence[Optimizer]
) -> dict[str, dict[str, Tensor]]:
    """What a checkpoint holds, all of it finite: tensors by name, by the name of their file without suffix.

    Raises:
        FloatingPointError: a tensor is not finite.
    """
    files: dict[str, dict[str, Tensor]] = {"backbone": dict(backbone.state_dict()), "average": dict(average.tensors)}
    files["optimizers"] = {
        f"{number}.{index}.{name}": torch.as_tensor(value)
        for number, optimizer in enumerate(optimizers)
        for index, values in optimizer.state_dict()["state"].items()
        for name, value in values.items()
    }
    every = {f"{file}/{name}": value for file, tensors in files.items() for name, value in tensors.items()}
    finite = torch.stack([torch.isfinite(value).all().cpu() for value in every.values()])
    if not finite.all():
        name = list(every)[int(finite.int().argmin())]
        raise FloatingPointError(
            f"the tensor {name} is not finite, so no checkpoint is written; those that there are stay: "
            "start another run with a lower learning rate"
        )
    return files


def _force(path: Path) -> None:
    """Have a file or a folder on disk before going on."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def restore(folder: Path, backbone: nn.Module, average: MovingAverage, optimizers: Sequence[Optimizer]) -> int:
    """Load a checkpoint into the objects of a run, and return its step."""
    state = json.loads((folder / "state.json").read_text())
    backbone.load_state_dict(tensors_of(folder / "backbone.safetensors"))
    for name, value in tensors_of(folder / "average.safetensors").items():
        average.tensors[name].copy_(value)
    average.updates = state["average_updates"]
    states: list[dict[int, dict[str, Tensor]]] = [{} for _ in optimizers]
    for key, value in tensors_of(folder / "optimizers.safetensors").items():
        number, index, name = key.split(".", 2)
        states[int(number)].setdefault(int(index), {})[name] = value
    for optimizer, values, groups in zip(optimizers, states, state["optimizers"], strict=True):
        optimizer.load_state_dict({"state": values, "param_groups": groups})
    return int(state["step"])


def load_average(folder: Path, backbone: nn.Module) -> None:
    """Load a checkpoint's averaged weights, which sampling uses."""
    backbone.load_state_dict(tensors_of(folder / "average.safetensors"), strict=True)


def tensors_of(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint's file.

    Raises:
        FileNotFoundError, ValueError: the file is gone or damaged; the message says the mend.
    """
    mend = f"remove {path.parent}, and the run goes on from the checkpoint before"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; {mend}")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}); {mend}") from None
