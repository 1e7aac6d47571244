"""Checkpoints: whole or not there, back bit by bit, and nothing in a run's folder that could run code."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from model.recipes import train_recipe
from model.settings import override
from model.train import train
from model.training.checkpoint import Run, load_average, restore, save
from model.training.ema import MovingAverage
from model.training.integrity import CHECKSUMS
from model.training.muon import Muon
from model.training.state import TrainingState
from tests.model.tiny_lake import make_lake


class Trained:
    """A small network with its average and two optimizers, some steps into training."""

    def __init__(self, steps: int) -> None:
        torch.manual_seed(0)
        self.backbone = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        self.average = MovingAverage(self.backbone, 0.9)
        matrices = [p for p in self.backbone.parameters() if p.ndim == 2]
        rest = [p for p in self.backbone.parameters() if p.ndim < 2]
        self.optimizers = [torch.optim.AdamW(rest, 1e-2, fused=True), Muon(matrices, 1e-2)]
        self.state = TrainingState(self.backbone, self.average, self.optimizers)
        for _ in range(steps):
            self.step()

    def step(self) -> None:
        x = torch.linspace(-1, 1, 12).view(3, 4)
        self.backbone(x).square().sum().backward()
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.average.update(self.backbone)

    def save(self, run: Run, step: int, keep: int = 2) -> Path:
        self.state.step = step
        return save(run, self.state, keep)

    def restore(self, folder: Path) -> int:
        restore(folder, self.state)
        return self.state.step


def test_what_comes_back_goes_on_bit_by_bit(tmp_path: Path) -> None:
    first, second = Trained(5), Trained(0)
    folder = first.save(Run(tmp_path), 5)
    assert second.restore(folder) == 5
    for _ in range(3):
        first.step()
        second.step()
    for one, other in zip(first.backbone.parameters(), second.backbone.parameters(), strict=True):
        assert torch.equal(one, other)
    assert first.average.updates == second.average.updates == 8
    assert all(torch.equal(first.average.tensors[name], second.average.tensors[name]) for name in first.average.tensors)


def test_the_average_is_what_sampling_loads(tmp_path: Path) -> None:
    trained = Trained(4)
    folder = trained.save(Run(tmp_path), 4)
    other = Trained(0).backbone
    load_average(folder, other)
    assert torch.equal(other[0].weight, trained.average.tensors["0.weight"])
    assert not torch.equal(other[0].weight, trained.backbone[0].weight)


def test_only_the_newest_stay(tmp_path: Path) -> None:
    run, trained = Run(tmp_path), Trained(1)
    for step in (10, 20, 9, 100):
        trained.save(run, step, keep=2)
    assert run.steps() == [20, 100]
    assert run.checkpoint().name == "step-00000100"
    assert run.checkpoint(20).name == "step-00000020"
    with pytest.raises(FileNotFoundError, match=r"has no checkpoint of step 10, only of \[20, 100\]"):
        run.checkpoint(10)


def test_a_torn_checkpoint_is_not_seen_and_goes_away(tmp_path: Path) -> None:
    run, trained = Run(tmp_path), Trained(2)
    whole = trained.save(run, 1)
    torn = tmp_path / "checkpoints" / ".part-00000002"
    torn.mkdir()
    (torn / "backbone.safetensors").write_bytes(b"half")
    assert run.steps() == [1]
    assert run.checkpoint() == whole
    trained.save(run, 2)
    assert run.steps() == [1, 2]
    assert not torn.exists()
    assert set(load_file(run.checkpoint() / "backbone.safetensors")) == set(trained.backbone.state_dict())


def test_the_same_step_can_be_written_again(tmp_path: Path) -> None:
    run, trained = Run(tmp_path), Trained(1)
    trained.save(run, 7)
    trained.step()
    folder = trained.save(run, 7)
    assert torch.equal(load_file(folder / "backbone.safetensors")["0.weight"], trained.backbone[0].weight)


@pytest.mark.parametrize("where", ["backbone/0.weight", "average/2.bias", "optimizers/0.0.exp_avg"])
def test_what_is_not_finite_is_never_written(tmp_path: Path, where: str) -> None:
    run, trained = Run(tmp_path), Trained(2)
    good = trained.save(run, 1, keep=1)
    tensor = {
        "backbone/0.weight": trained.backbone[0].weight.data,
        "average/2.bias": trained.average.tensors["2.bias"],
        "optimizers/0.0.exp_avg": next(iter(trained.optimizers[0].state.values()))["exp_avg"],
    }[where]
    tensor.flatten()[-1] = float("inf")
    with pytest.raises(FloatingPointError, match=f"the tensor {where} is not finite, so no checkpoint is written"):
        trained.save(run, 2, keep=1)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [good.name]


def test_the_folder_is_on_disk_before_old_checkpoints_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, trained = Run(tmp_path), Trained(1)
    trained.save(run, 1, keep=1)
    checkpoints, seen = tmp_path / "checkpoints", []
    fsync = os.fsync

    def note(handle: int) -> None:
        if os.path.samestat(os.fstat(handle), checkpoints.stat()):
            seen.append(run.steps())
        fsync(handle)

    monkeypatch.setattr(os, "fsync", note)
    trained.save(run, 2, keep=1)
    assert seen == [[1, 2]]
    assert run.steps() == [2]


def test_missing_and_damaged_runs_are_one_line(tmp_path: Path) -> None:
    run, trained = Run(tmp_path / "run"), Trained(1)
    with pytest.raises(FileNotFoundError, match=r"run is no training run; make one with `vlfm train"):
        run.read()
    with pytest.raises(FileNotFoundError, match=r"has no checkpoint yet; train it with `vlfm train`"):
        run.checkpoint()
    run.write({"method": "vlfm"})
    assert run.read() == {"method": "vlfm"}
    run.file.write_text("{")
    with pytest.raises(ValueError, match=r"run.json is damaged \(.*\); train a new run"):
        run.read()
    folder = trained.save(run, 3)
    data = (folder / "average.safetensors").read_bytes()
    (folder / "average.safetensors").write_bytes(data[:-5])
    with pytest.raises(ValueError, match=r"average.safetensors is damaged \(.*\); remove .*step-00000003, and the run"):
        trained.restore(folder)
    (folder / "average.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"average.safetensors is missing; remove"):
        load_average(folder, trained.backbone)


def test_nothing_in_a_runs_folder_is_a_pickle(tmp_path: Path) -> None:
    tiny = {"width": 32, "depth": 1, "heads": 2, "steps": 2, "batch": 2, "checkpoint_every": 1, "log_every": 1}
    lake = make_lake(tmp_path / "lake", clips=2)
    train(lake.root, tmp_path / "run", override(train_recipe("demo"), {**tiny, "matrix_learning_rate": 1e-3}))
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len(files) >= 11
    for path in files:
        data = path.read_bytes()
        assert not data.startswith((b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK")), path
        if path.suffix == ".safetensors":
            load_file(path)
        elif path.suffix == ".json":
            json.loads(data)
        elif path.suffix == ".jsonl":
            assert [json.loads(line) for line in data.splitlines()]
        elif path.name == CHECKSUMS:
            assert all(len(line.split("  ")[0]) == 64 for line in data.decode().splitlines())
        elif path.name == ".writing.lock":
            assert json.loads(data) == {"process": os.getpid()}
        else:
            assert path.name.startswith("events.out.tfevents."), path
