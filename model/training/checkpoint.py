"""Checkpoints: tensors as safetensors, everything else as JSON, published by one rename. No pickle.

A run's folder holds `run.json` (the recipe, the backbone, the method and all of the dataset's version that sampling
needs), `log.jsonl`, TensorBoard's files and `checkpoints/step-<n>/`.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from model.training.state import TrainingState
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


def save(run: Run, state: TrainingState, keep: int) -> Path:
    """Write a checkpoint under a temporary name, rename it, and remove all but the newest `keep`.

    Raises:
        FloatingPointError: a tensor is not finite; nothing is written and nothing removed.
    """
    files = tensors_by_file(state)
    final = run.root / "checkpoints" / f"step-{state.step:08d}"
    part = final.with_name(f".part-{state.step:08d}")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    for name, tensors in files.items():
        save_file({k: v.contiguous() for k, v in tensors.items()}, part / f"{name}.safetensors")
    values = state.state_dict()
    groups = [optimizer["param_groups"] for optimizer in values["optimizers"]]
    plain = {"step": values["step"], "average_updates": values["average"]["updates"], "optimizers": groups}
    (part / "state.json").write_text(json.dumps(plain))
    for path in (*part.iterdir(), part):
        _force(path)
    shutil.rmtree(final, ignore_errors=True)
    part.rename(final)
    _force(final.parent)  # the rename is safe on disk only when its folder is; only then may the old ones go
    for old in run.steps()[:-keep]:
        shutil.rmtree(run.root / "checkpoints" / f"step-{old:08d}", ignore_errors=True)
    return final


def tensors_by_file(state: TrainingState) -> dict[str, dict[str, Tensor]]:
    """What a checkpoint holds, all of it finite: tensors by name, by the name of their file without suffix.

    Raises:
        FloatingPointError: a tensor is not finite.
    """
    values = state.state_dict()
    files: dict[str, dict[str, Tensor]] = {"backbone": dict(values["network"]), "average": values["average"]["tensors"]}
    files["optimizers"] = {
        f"{number}.{index}.{name}": torch.as_tensor(value)
        for number, optimizer in enumerate(values["optimizers"])
        for index, of_one in optimizer["state"].items()
        for name, value in of_one.items()
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


def restore(folder: Path, state: TrainingState) -> None:
    """Load a checkpoint into the state of a training.

    Raises:
        FileNotFoundError, ValueError: a file is gone or damaged; the message says the remedy.
    """
    plain = json.loads((folder / "state.json").read_text())
    slots: list[dict[int, dict[str, Tensor]]] = [{} for _ in plain["optimizers"]]
    for key, value in tensors_of(folder / "optimizers.safetensors").items():
        number, index, name = key.split(".", 2)
        slots[int(number)].setdefault(int(index), {})[name] = value
    average = tensors_of(folder / "average.safetensors")
    state.load_state_dict(
        {
            "network": tensors_of(folder / "backbone.safetensors"),
            "average": {"tensors": average, "updates": plain["average_updates"]},
            "optimizers": [
                {"state": of_one, "param_groups": groups}
                for of_one, groups in zip(slots, plain["optimizers"], strict=True)
            ],
            "step": plain["step"],
        }
    )


def load_average(folder: Path, backbone: nn.Module) -> None:
    """Load a checkpoint's averaged weights, which sampling uses."""
    backbone.load_state_dict(tensors_of(folder / "average.safetensors"), strict=True)


def tensors_of(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint's file.

    Raises:
        FileNotFoundError, ValueError: the file is gone or damaged; the message says the remedy.
    """
    remedy = f"remove {path.parent}, and the run goes on from the checkpoint before"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; {remedy}")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}); {remedy}") from None
