"""Sharded and accumulated training is the training of one process that holds all: real processes over gloo."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from model.settings import override
from model.stop import STOPPED
from model.train import check_divides, train
from model.training.checkpoint import Run
from model.training.log import Log
from storage.layout import Lake
from tests.model.test_exact import in_full, on_processes
from tests.model.test_train import TINY, logged, weights
from tests.model.tiny_lake import make_lake

BASE: Mapping[str, Any] = {
    "batch": 6, "steps": 4, "checkpoint_every": 2, "validate_every": 4, "learning_rate_decay": 0.0, "weight_decay": 0.1,
}  # fmt: skip
ONE: Mapping[str, Mapping[str, Any]] = {
    "float32": BASE,
    "float64": {**BASE, "precision": "float64"},
    "bfloat16": {**BASE, "precision": "bfloat16", "steps": 2},
    "grams": {**BASE, "precision": "float64", "optimizer": "grams", "qk_norm": "rms", "steps": 2},
    "muon": {**BASE, "precision": "float64", "matrix_learning_rate": 1e-3, "steps": 2},
}
"""Runs of one process, with which others are compared."""
TOLERANCES = {"float32": 1e-5, "float64": 1e-10, "bfloat16": 5e-3, "grams": 1e-10, "muon": 1e-10}
FSDP, PARTS = {"sharding": "fsdp"}, {"accumulate": 3}
TOGETHER = {"checkpoints": "distributed"}
TWO: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "ddp": ("float32", {}),
    "ddp_parts": ("float64", PARTS),
    "fsdp": ("float32", FSDP),
    "fsdp_parts": ("float64", {**FSDP, **PARTS, "activation_checkpointing": True}),
    "fsdp_bfloat16": ("bfloat16", FSDP),
    "fsdp_grams": ("grams", FSDP),
    "fsdp_muon": ("muon", FSDP),
    "resumed_from_one": ("float64", FSDP),
    "fsdp_together": ("float64", {**FSDP, **TOGETHER}),
    "ddp_together": ("float64", TOGETHER),
}
"""Runs of two processes: what they are compared with, and what differs."""
THREE: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "resumed_by_fsdp": ("float64", FSDP),
    "resumed_by_ddp": ("float64", {}),
    "together_resumed_by_fsdp": ("float64", {**FSDP, **TOGETHER}),
    "together_resumed_by_ddp": ("float64", {}),
}
"""Runs that two sharded processes began and three go on with."""


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
    shutil.rmtree(Run(folder).folder(4))
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
    stopped = {**BASE, **FSDP, "validate_every": 1}
    assert on_processes(2, lake, folder, {**settings(TWO), "stopped": stopped}) == STOPPED
    return folder


@pytest.fixture(scope="module")
def three(lake: Lake, two: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("three")
    for name in THREE:
        half(two / ("fsdp_together" if "together" in name else "fsdp_parts"), folder / name)
    assert on_processes(3, lake, folder, settings(THREE)) == 0
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


@pytest.mark.parametrize("variant", TWO)
def test_two_processes_equal_one(one: Path, two: Path, variant: str) -> None:
    like = TWO[variant][0]
    check_alike(one / like, two / variant, TOLERANCES[like])


@pytest.mark.parametrize("variant", THREE)
def test_saved_sharded_on_two_it_goes_on_with_three(one: Path, three: Path, variant: str) -> None:
    check_alike(one / "float64", three / variant, TOLERANCES["float64"])
    assert starts(three / variant) == [0, 2]


@pytest.mark.parametrize("saved", ["fsdp_parts", "fsdp_together", "ddp_together"])
def test_saved_on_two_it_goes_on_with_one(lake: Lake, one: Path, two: Path, tmp_path: Path, saved: str) -> None:
    run = half(two / saved, tmp_path / "run")
    trained(lake, run, {**ONE["float64"], "accumulate": 2})
    check_alike(one / "float64", run, TOLERANCES["float64"])
    assert starts(run) == starts(two / "resumed_from_one") == [0, 2]


def test_a_signal_to_one_of_two_sharded_processes_in_a_validation_stops_both(two: Path) -> None:
    assert Run(two / "stopped").steps() == [2]
    assert logged(two / "stopped", "validation_loss") == {}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sharding": "zero"}, "sharding is 'zero'; it must be none or fsdp"),
        ({"accumulate": 0}, "accumulate is 0; it must be at least 1"),
        ({"accumulate": 4}, "batch 6 is no multiple of accumulate 4; change one of them"),
        ({"accumulate": 2, "error_focus": 1.0}, "accumulate is 2 and error_focus 1, which weighs the clips of a whole"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        override(TINY, {**BASE, **changes})


def test_a_batch_that_processes_and_parts_do_not_share_evenly_is_refused() -> None:
    recipe = override(TINY, {**BASE, **PARTS})
    check_divides(recipe, 2)
    with pytest.raises(ValueError, match="batch 6 is no multiple of the 4 processes x 3 parts; set it with --set bat"):
        check_divides(recipe, 4)


def starts(run: Path) -> list[int]:
    """Steps after which the run was started."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [line["step"] for line in lines if line.get("event") == "start"]
