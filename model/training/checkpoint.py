"""Checkpoints: tensors as safetensors, everything else as JSON, published by one rename. No pickle.

A run's folder holds `run.json` (the recipe, the backbone, the method and all of the dataset's version that sampling
needs), `log.jsonl`, TensorBoard's files and `checkpoints/step-<n>/`, each with the checksums of its files.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from model.training import parts
from model.training.integrity import FILES, complete, damage, missing, publish
from model.training.sharding import is_sharded, whole
from model.training.state import TrainingState
from storage.errors import Kind, VlfmError
from storage.layout import write_atomic
from storage.local import LocalStore, naming_full_disk

FORMAT = 2
"""Of a checkpoint: from 2 on it has checksums; before, `state.json` named no format."""
_NAME = re.compile(r"step-(\d{8,})")


class DamagedCheckpoint(VlfmError, ValueError):
    """A checkpoint is not whole. The message names it, what is wrong with it and the remedy."""

    kind = Kind.DAMAGE


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

    def lock(self) -> AbstractContextManager[None]:
        """Hold the folder for one trainer; whatever ends its process releases it.

        Raises:
            LakeBusy: another trainer holds it; the message has its process id.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        return LocalStore(self.root).lease("writing")

    def steps(self) -> list[int]:
        """Steps of the checkpoints in the folder, whole or not, in rising order."""
        return sorted(int(match[1]) for name in self._names() if (match := _NAME.fullmatch(name)))

    def folder(self, step: int) -> Path:
        """Where the checkpoint of a step is, or would be."""
        return self.root / "checkpoints" / f"step-{step:08d}"

    def newest(self) -> tuple[int | None, dict[str, str]]:
        """Step of the newest whole checkpoint, None where there is none; and what else is wrong in the folder.

        That is what is wrong by folder: newer checkpoints that are not whole, older ones that lack a file, and folders
        that are no checkpoints.
        """
        wrong = {name: "is no checkpoint" for name in self._names() if not _NAME.fullmatch(name)}
        chosen = None
        for step in reversed(self.steps()):
            folder = self.folder(step)
            if found := damage(folder) if chosen is None else missing(folder):
                wrong[folder.name] = f"is damaged ({found})"
            elif chosen is None:
                chosen = step
        return chosen, wrong

    def checkpoint(self, step: int | None = None) -> Path:
        """The folder of a whole checkpoint, the newest unless a step is given.

        One line on stderr says which newer ones are damaged.

        Raises:
            FileNotFoundError: there is none; the message says what there is.
            DamagedCheckpoint: the one of the given step, or every one, is damaged; the message says how.
        """
        steps = self.steps()
        if not steps or (step is not None and step not in steps):
            which = "no checkpoint yet" if not steps else f"no checkpoint of step {step}, only of {steps}"
            raise FileNotFoundError(f"the run {self.root} has {which}; train it with `vlfm train`")
        if step is not None:
            if found := damage(self.folder(step)):
                raise DamagedCheckpoint(f"{self.folder(step)} is damaged ({found})", "restore it, or take another step")
            return self.folder(step)
        chosen, wrong = self.newest()
        if chosen is None:
            raise self.none_whole(wrong)
        if newer := {
            name: told for name, told in wrong.items() if name > self.folder(chosen).name and "damaged" in told
        }:
            self.warn(newer, f"step {chosen} is used")
        return self.folder(chosen)

    def none_whole(self, wrong: Mapping[str, str]) -> DamagedCheckpoint:
        """The error where a run has checkpoints and none is whole."""
        told = ", ".join(f"{name} {what}" for name, what in wrong.items())
        return DamagedCheckpoint(
            f"the run {self.root} has no whole checkpoint: {told}", "restore one from a copy, or train a new run"
        )

    def warn(self, wrong: Mapping[str, str], so: str) -> None:
        """One line on stderr: what is wrong by folder, and what is done about it."""
        told = ", ".join(f"{name} {what}" for name, what in wrong.items())
        print(f"warning: {self.root / 'checkpoints'}: {told}; {so}", file=sys.stderr)

    def set_aside(self) -> int | None:
        """Step of the newest whole checkpoint, for a trainer that goes on from it; None where there is none yet.

        Damaged ones are renamed to `damaged-<n>`, so that they neither stand where a checkpoint is to be written nor
        count among those that stay; one line on stderr says so.

        Raises:
            DamagedCheckpoint: there are checkpoints, and none is whole; nothing is renamed.
        """
        chosen, wrong = self.newest()
        if chosen is None and self.steps():
            raise self.none_whole(wrong)
        for name in wrong:
            if _NAME.fullmatch(name):
                aside = self.root / "checkpoints" / name.replace("step", "damaged")
                shutil.rmtree(aside, ignore_errors=True)
                (self.root / "checkpoints" / name).rename(aside)
                wrong[name] += f" and now called {aside.name}"
        if wrong:
            self.warn(wrong, "training starts anew" if chosen is None else f"training goes on from step {chosen}")
        return chosen

    def keep_newest(self, count: int) -> None:
        """Remove all but the newest checkpoints."""
        for old in self.steps()[:-count]:
            shutil.rmtree(self.folder(old), ignore_errors=True)

    def _names(self) -> list[str]:
        return sorted(path.name for path in (self.root / "checkpoints").glob("step-*"))


def save(run: Run, state: TrainingState, keep: int, identity: Mapping[str, Any] | None = None) -> Path:
    """Write a checkpoint under a temporary name, rename it, and remove all but the newest `keep`.

    identity: what it is of (`check_identity`).

    Raises:
        FloatingPointError: a tensor is not finite; nothing is written and nothing removed.
        DiskFull: no room; the checkpoints that there are stay.
    """
    files = tensors_by_file(state)
    final = run.folder(state.step)
    unfinished = final.with_name(f".part-{state.step:08d}")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        with naming_full_disk(unfinished):
            unfinished.mkdir(parents=True)
            for name, tensors in files.items():
                _write_tensors(unfinished / f"{name}.safetensors", tensors)
            about = {"format": FORMAT, "identity": dict(identity or {}), **plain_values(state)}
            (unfinished / "state.json").write_text(json.dumps(about))
            complete(unfinished, FILES)
            publish(unfinished, final)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    run.keep_newest(keep)
    return final


def check_identity(folder: Path, identity: Mapping[str, Any], allow: bool = False) -> None:
    """Refuses to go on from a checkpoint of another dataset, recipe or codec, as after files were copied.

    identity: by name; what only one of the two knows is not compared. The program may be another: one line says so.
    allow: whether to say what differs and go on all the same.

    Raises:
        ValueError: what differs, with both values and the remedy.
    """
    before = json.loads((folder / "state.json").read_text()).get("identity", {})
    other = {k: (before[k], now) for k, now in identity.items() if k in before and before[k] != now}
    told = ", ".join(f"{name}={was!r}, not {now!r}" for name, (was, now) in other.items())
    if other.keys() <= {"program"} or allow:
        if other:
            print(f"warning: {folder} is of {told}; training goes on", file=sys.stderr)
        return
    raise ValueError(f"{folder} is of {told}; give another --run, or --allow-mismatch to go on from it all the same")


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    try:
        save_file({name: value.contiguous() for name, value in tensors.items()}, path)
    except SafetensorError as error:  # the library has no OSError; the system's number is in its text
        if number := re.search(r"os error (\d+)", str(error)):
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from None
        raise


def plain_values(state: TrainingState) -> dict[str, Any]:
    """What a checkpoint holds beside tensors."""
    values = state.state_dict()
    groups = [optimizer["param_groups"] for optimizer in values["optimizers"]]
    updates = values["average"]["updates"]
    return {"step": values["step"], "average_updates": updates, "norms": values["norms"], "optimizers": groups}


def tensors_by_file(state: TrainingState) -> dict[str, dict[str, Tensor]]:
    """What a checkpoint holds, all of it finite: tensors by name, by the name of their file without suffix.

    Where the state is sharded every process must call this, since whole tensors are gathered. The first process has
    them in the CPU's memory then, the others get empty ones.

    Raises:
        FloatingPointError: a tensor is not finite.
    """
    files = held_by_file(state)
    every = flat_tensors(state)
    finite = torch.ones(len(every), dtype=torch.bool)
    for number, (name, value) in enumerate(every.items()):
        full = whole(value)  # one at a time: a GPU need not hold all of them
        finite[number] = torch.isfinite(full).all()
        if is_sharded(value):
            file, _, key = name.partition("/")
            files[file][key] = full.cpu() if dist.get_rank() == 0 else full.new_empty(0)
    if not finite.all():
        name = list(every)[int(finite.int().argmin())]
        raise not_finite(name)
    return files


def held_by_file(state: TrainingState) -> dict[str, dict[str, Tensor]]:
    """The tensors of a state as they are, whole or sharded, by name and by the name of their file without suffix."""
    values = state.state_dict()
    files: dict[str, dict[str, Tensor]] = {"backbone": dict(values["network"]), "average": values["average"]["tensors"]}
    files["optimizers"] = {
        f"{number}.{index}.{name}": torch.as_tensor(value)
        for number, optimizer in enumerate(values["optimizers"])
        for index, of_one in optimizer["state"].items()
        for name, value in of_one.items()
    }
    return files


def flat_tensors(state: TrainingState) -> dict[str, Tensor]:
    """The tensors of a state as they are, by file and name, such as `average/position`."""
    files = held_by_file(state).items()
    return {f"{file}/{name}": value for file, held in files for name, value in held.items()}


def not_finite(name: str) -> FloatingPointError:
    """The error where a tensor of that name must not be written."""
    return FloatingPointError(
        f"the tensor {name} is not finite, so no checkpoint is written; those that there are stay: "
        "start another run with a lower learning rate"
    )


def restore(folder: Path, state: TrainingState) -> None:
    """Load a checkpoint into the state of a training.

    Raises:
        FileNotFoundError, ValueError: a file is gone or damaged; the message says the remedy.
    """
    plain = json.loads((folder / "state.json").read_text())
    if "files" in plain:
        files = _parts_by_file(folder, state)
    else:
        files = {name: tensors_of(folder / f"{name}.safetensors") for name in ("backbone", "average", "optimizers")}
    slots: list[dict[int, dict[str, Tensor]]] = [{} for _ in plain["optimizers"]]
    for key, value in files["optimizers"].items():
        number, index, name = key.split(".", 2)
        slots[int(number)].setdefault(int(index), {})[name] = value
    state.load_state_dict(
        {
            "network": files["backbone"],
            "average": {"tensors": files["average"], "updates": plain["average_updates"]},
            "optimizers": [
                {"state": of_one, "param_groups": groups}
                for of_one, groups in zip(slots, plain["optimizers"], strict=True)
            ],
            "step": plain["step"],
            "norms": plain.get("norms"),
        }
    )


def _parts_by_file(folder: Path, state: TrainingState) -> dict[str, dict[str, Tensor]]:
    """What `held_by_file` gave, of a checkpoint that processes wrote together; of each tensor this process's part."""
    ours = flat_tensors(state)
    weights = [[p for group in o.param_groups for p in group["params"]] for o in state.optimizers]

    def like(name: str) -> Tensor | None:
        file, _, key = name.partition("/")
        if file != "optimizers":
            return ours.get(name)
        number, index, _ = key.split(".", 2)
        return weights[int(number)][int(index)]

    files: dict[str, dict[str, Tensor]] = {"backbone": {}, "average": {}, "optimizers": {}}
    for name, value in parts.read(folder, like).items():
        file, _, key = name.partition("/")
        files[file][key] = value
    return files


def averaged_weights(folder: Path) -> dict[str, Tensor]:
    """A checkpoint's averaged weights, which sampling uses; whole, on the CPU. Raises as `tensors_of`."""
    if "files" not in json.loads((folder / "state.json").read_text()):
        return tensors_of(folder / "average.safetensors")
    found = parts.read(folder, lambda name: None, "average/")
    return {name.removeprefix("average/"): value for name, value in found.items()}


def load_average(folder: Path, backbone: nn.Module) -> None:
    """Load a checkpoint's averaged weights."""
    backbone.load_state_dict(averaged_weights(folder), strict=True)


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
