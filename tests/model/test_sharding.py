"""Sharded and accumulated training is the training of one process that holds all: real processes over gloo."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from model.settings import override
from model.train import train
from model.training.checkpoint import Run
from model.training.log import Log
from storage.layout import Lake
from tests.model.test_exact import in_full, on_processes
from tests.model.test_train import TINY, logged, weights
from tests.model.tiny_lake import make_lake

BASE: Mapping[str, Any] = {
    "batch": 6, "steps": 6, "checkpoint_every": 3, "checkpoints_kept": 9, "validate_every": 6,
    "learning_rate_decay": 0.0, "weight_decay": 0.1,
}  # fmt: skip
WIDE = {**BASE, "precision": "float64"}
FSDP, PARTS = {"sharding": "fsdp"}, {"accumulate": 3}
ONE: Mapping[str, Mapping[str, Any]] = {
    "float32": BASE,
    "float64": WIDE,
    "bfloat16": {**BASE, "precision": "bfloat16"},
    "grams": {**WIDE, "optimizer": "grams", "qk_norm": "rms"},
    "muon": {**WIDE, "matrix_learning_rate": 1e-3},
}
"""What other runs are compared with, each on one process."""
TWO: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "ddp": ("float32", {}),
    "fsdp": ("float32", FSDP),
    "fsdp_muon": ("muon", FSDP),
    "fsdp64": ("float64", {**FSDP, "activation_checkpointing": True}),
    "ddp_parts": ("float64", PARTS),
    "fsdp_parts": ("float64", {**FSDP, **PARTS}),
    "fsdp_bfloat16": ("bfloat16", FSDP),
    "fsdp_grams": ("grams", FSDP),
    "resumed_from_one": ("float64", FSDP),
}
"""Runs on two processes: what they are compared with, and what differs."""
THREE = {
    "fsdp_from_fsdp": ("float64", FSDP),
    "ddp_from_fsdp": ("float64", {}),
}


@pytest.fixture(scope="module")
def lake(tmp_path_factory: pytest.TempPathFactory) -> Lake:
    """The three batches of a validation cannot be shared out evenly."""
    return make_lake(tmp_path_factory.mktemp("sharding") / "lake", clips=7, validation=33)


def trained(lake: Lake, run: Path, settings: Mapping[str, Any]) -> None:
    """Trains in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Log, "scalars", in_full)
        train(lake.root, run, override(TINY, dict(settings)))


def half(run: Path, folder: Path) -> Path:
    """A copy of a run as it was after half of its steps."""
    shutil.copytree(run, folder)
    shutil.rmtree(Run(folder).folder(6))
    return folder


def settings(variants: Mapping[str, tuple[str, Mapping[str, Any]]]) -> dict[str, dict[str, Any]]:
    return {name: {**ONE[like], **changes} for name, (like, changes) in variants.items()}


@pytest.fixture(scope="module")
def one(lake: Lake, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    for name, chosen in ONE.items():
        trained(lake, folder / name, chosen)
    return folder


@pytest.fixture(scope="module")
def two(lake: Lake, one: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    half(one / "float64", folder / "resumed_from_one")
    assert on_processes(2, lake, folder, settings(TWO)) == 0
    return folder


def check_alike(one: Path, other: Path, tolerance: float) -> None:
    """Losses relative to their size; in float64 tensors too, else weights alone and by what is between them.

    In float32 the gradient of a key's bias, which is 0, is rounding alone, and Adam makes a step of that.
    """
    for name in ("loss", "gradient_norm", "validation_loss"):
        ours, theirs = logged(one, name), logged(other, name)
        assert ours.keys() == theirs.keys()
        worst = max(abs(theirs[step] / ours[step] - 1) for step in ours)
        print(f"{other.name} {name} {worst:.2g}")
        assert worst <= tolerance, name
    expected, found = weights(one), weights(other)
    assert expected.keys() == found.keys()
    away = {}
    for name, value in expected.items():
        assert (value.shape, value.dtype) == (found[name].shape, found[name].dtype)
        scale = float(value.abs().max()) if tolerance < 1e-6 else 1.0
        if tolerance < 1e-6 or not name.startswith("optimizers/"):
            away[name] = float((value.double() - found[name].double()).abs().max()) / max(scale, 1e-300)
    print(f"{other.name} tensors {max(away.values()):.2g}")
    assert {name: value for name, value in away.items() if value > tolerance} == {}


TOLERANCES = {"float32": 1e-5, "float64": 1e-10, "bfloat16": 2e-2, "grams": 1e-10, "muon": 1e-10}


@pytest.mark.parametrize("variant", TWO)
def test_two_processes_equal_one(one: Path, two: Path, variant: str) -> None:
    like = TWO[variant][0]
    check_alike(one / like, two / variant, TOLERANCES[like])


@pytest.fixture(scope="module")
def three(lake: Lake, two: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("three")
    for name in THREE:
        half(two / "fsdp64", folder / name)
    assert on_processes(3, lake, folder, settings(THREE)) == 0
    return folder


@pytest.mark.parametrize("variant", THREE)
def test_saved_sharded_on_two_it_goes_on_with_three(one: Path, three: Path, variant: str) -> None:
    check_alike(one / "float64", three / variant, 1e-10)
    assert starts(three / variant) == [0, 3]


def test_saved_sharded_on_two_it_goes_on_with_one(lake: Lake, one: Path, two: Path, tmp_path: Path) -> None:
    run = half(two / "fsdp64", tmp_path / "run")
    trained(lake, run, {**WIDE, **PARTS})
    check_alike(one / "float64", run, 1e-10)
    assert starts(run) == starts(two / "resumed_from_one") == [0, 3]


def starts(run: Path) -> list[int]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [line["step"] for line in lines if line.get("event") == "start"]
