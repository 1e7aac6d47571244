"""Checkpoints that are written while training goes on: whole or not there, of the step they are named after."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from model.sample import Sampler
from model.settings import override
from model.train import train
from model.training import integrity, parts
from model.training.checkpoint import DamagedCheckpoint, Run, check_identity
from model.training.integrity import CHECKSUMS, damage
from model.training.processes import ALONE
from model.training.saving import DistributedSaver
from storage.layout import DiskFull, Lake
from tests.model.test_bad_steps import same, spoiled
from tests.model.test_train import TINY, weights
from tests.model.tiny_lake import make_lake
from tests.model.training.test_checkpoint import Trained

TOGETHER = override(TINY, {"checkpoints": "distributed"})


@pytest.fixture(scope="module")
def lake(tmp_path_factory: pytest.TempPathFactory) -> Lake:
    return make_lake(tmp_path_factory.mktemp("saving") / "lake")


def saver(folder: Path, keep: int = 2) -> DistributedSaver:
    return DistributedSaver(Run(folder), keep, ALONE, {})


def save(to: DistributedSaver, trained: Trained, step: int, wait: bool = True) -> None:
    trained.state.step = step
    to.save(trained.state, wait)


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is of the step at which it was asked for, and has its name only when all of it is there."""
    first, second, run = Trained(5), Trained(0), Run(tmp_path)
    expected = {name: value.clone() for name, value in first.backbone.state_dict().items()}
    go, complete = threading.Event(), integrity.complete
    monkeypatch.setattr(integrity, "complete", lambda *given: (go.wait(30), complete(*given)))
    to = saver(tmp_path)
    save(to, first, 5, wait=False)
    first.step()
    assert run.steps() == []
    go.set()
    to.close()
    assert run.steps() == [5]
    assert second.restore(run.folder(5)) == 5
    assert same(second.backbone.state_dict(), expected)
    second.step()
    assert same(second.backbone.state_dict(), first.backbone.state_dict())
    names = {path.name for path in run.folder(5).iterdir()}
    assert names == {"shard-00001-model-00001-of-00001.safetensors", "state.json", CHECKSUMS}


def test_a_run_resumes_bit_by_bit_in_either_format_and_is_sampled(lake: Lake, tmp_path: Path) -> None:
    recipe = override(TOGETHER, {"learning_rate_decay": 0.0})
    train(lake.root, tmp_path / "whole", recipe)
    train(lake.root, tmp_path / "parts", override(recipe, {"steps": 3}))
    train(lake.root, tmp_path / "parts", override(recipe, {"checkpoints": "whole"}))
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    assert Run(tmp_path / "whole").steps() == [3, 6]
    one, other = (Sampler(tmp_path / name) for name in ("whole", "parts"))
    assert same(one.backbone.state_dict(), other.backbone.state_dict())


def broken(name: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        path = next(folder.glob(name))
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)

    return spoil


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "a bit": (broken("shard-*"), "not what was written, by its checksum"),
    "a bit of the state": (broken("state.json"), "."),
    "cut": (lambda folder: next(folder.glob("shard-*")).write_bytes(b"x"), "not what was written"),
    "gone": (lambda folder: next(folder.glob("shard-*")).unlink(), "safetensors is missing"),
    "state gone": (lambda folder: (folder / "state.json").unlink(), "state.json is missing"),
    "checksums gone": (lambda folder: (folder / CHECKSUMS).unlink(), "SHA256SUMS is missing"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_found_and_the_one_before_is_used(tmp_path: Path, kind: str) -> None:
    spoil, message = DAMAGE[kind]
    trained, to, run = Trained(2), saver(tmp_path), Run(tmp_path)
    for step in (2, 3):
        save(to, trained, step)
    spoil(run.folder(3))
    assert message.strip(".") in damage(run.folder(3)) != ""
    assert run.set_aside() == 2
    spoil(run.folder(2))
    with pytest.raises(DamagedCheckpoint, match="no whole checkpoint"):
        run.set_aside()


def test_a_failure_is_told_by_the_next_call_and_what_was_there_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained, to, run = Trained(2), saver(tmp_path), Run(tmp_path)
    save(to, trained, 2)

    def full(*given: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(integrity, "complete", full)
        save(to, trained, 3, wait=False)
        with pytest.raises(DiskFull):
            save(to, trained, 4)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000002"]
    save(to, trained, 5)
    assert run.steps() == [2, 5]
    trained.average.tensors["0.bias"][0] = torch.nan
    with pytest.raises(FloatingPointError, match=r"average/0\.bias is not finite, so no checkpoint is written"):
        save(to, trained, 6)
    assert run.steps() == [2, 5]


def test_a_run_that_ends_badly_leaves_its_last_checkpoint_whole(lake: Lake, tmp_path: Path) -> None:
    with spoiled(range(4, 99)), pytest.raises(FloatingPointError, match="2 steps in a row"):
        train(lake.root, tmp_path / "run", override(TOGETHER, {"bad_steps_allowed": 1}))
    assert Run(tmp_path / "run").steps() == [3]
    assert damage(Run(tmp_path / "run").folder(3)) == ""


def test_a_checkpoint_of_something_else_is_refused_unless_it_is_allowed(
    lake: Lake, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    train(lake.root, run, override(TOGETHER, {"steps": 3}))
    identity = json.loads((Run(run).folder(3) / "state.json").read_text())["identity"]
    assert {"dataset_merkle_root", "dataset_number", "codec", "program", "setting_width"} <= identity.keys()
    folder = Run(run).folder(3)
    check_identity(folder, {**identity, "program": "another", "something_new": 1})
    assert "program=" in capsys.readouterr().err
    changed = {**identity, "codec": "other"}
    with pytest.raises(ValueError, match=r"is of codec='.*', not 'other'; give another --run, or --allow-mismatch"):
        check_identity(folder, changed)
    check_identity(folder, changed, allow=True)
    assert "training goes on" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"was started with learning_rate=0\.002, not 0\.001"):
        train(lake.root, run, override(TOGETHER, {"learning_rate": 1e-3}))
    train(lake.root, run, override(TOGETHER, {"learning_rate": 1e-3}), allow_mismatch=True)
    assert Run(run).steps() == [3, 6]
    assert "was started with learning_rate=0.002, now 0.001; it goes on" in capsys.readouterr().err
    train(lake.root, run, override(TOGETHER, {"learning_rate": 1e-3, "steps": 7}))


def test_what_is_read_of_parts_can_be_chosen(tmp_path: Path) -> None:
    trained = Trained(2)
    save(saver(tmp_path), trained, 2)
    found = parts.read(Run(tmp_path).folder(2), lambda name: None, "average/")
    assert {name.removeprefix("average/") for name in found} == trained.average.tensors.keys()
