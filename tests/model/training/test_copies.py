"""A run goes on from the copies of its checkpoints where its folder is gone, from a folder or a bucket."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from model.settings import override
from model.train import train
from model.training.checkpoint import Run
from model.training.copies import Copies
from model.training.integrity import CHECKSUMS
from storage.address import store_at
from storage.layout import Lake
from storage.store import LakeError
from tests.model.test_bad_steps import same
from tests.model.test_train import TINY, weights
from tests.model.tiny_lake import make_lake
from tests.s3_server import S3Server

RECIPE = override(TINY, {"checkpoint_every": 2, "learning_rate_decay": 0.0, "validate_every": 100})
TOGETHER = {"checkpoints": "distributed"}


@pytest.fixture(scope="module")
def lake(tmp_path_factory: pytest.TempPathFactory) -> Lake:
    return make_lake(tmp_path_factory.mktemp("copies") / "lake")


@pytest.fixture(scope="module")
def whole(lake: Lake, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("whole") / "run"
    train(lake.root, run, RECIPE)
    return run


def gone_and_resumed(lake: Lake, whole: Path, folder: Path, address: str, changes: dict[str, Any]) -> None:
    recipe = override(RECIPE, changes)
    train(lake.root, folder / "here", override(recipe, {"steps": 4}), copy_to=address)
    shutil.rmtree(folder / "here")
    train(lake.root, folder / "there", recipe, copy_to=address)
    assert same(weights(folder / "there"), weights(whole))
    assert Copies(Run(folder / "there"), store_at(address), 2).steps() == [4, 6]


@pytest.mark.parametrize("changes", [{}, TOGETHER], ids=["whole", "distributed"])
def test_a_run_whose_folder_is_gone_goes_on_bit_by_bit(
    lake: Lake, whole: Path, tmp_path: Path, changes: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    gone_and_resumed(lake, whole, tmp_path, str(tmp_path / "store"), changes)
    assert "fetched step-00000004 from" in capsys.readouterr().err


def test_the_same_from_a_bucket(lake: Lake, whole: Path, tmp_path: Path, s3: S3Server, s3_environment: None) -> None:
    bucket = "copies"
    s3.client.create_bucket(Bucket=bucket)
    gone_and_resumed(lake, whole, tmp_path, f"s3://{bucket}/run", TOGETHER)


def test_copies_that_are_not_whole_are_passed_over(
    lake: Lake, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without checksums it was never finished; with a wrong byte it is named. What is newer here is copied."""
    address = str(tmp_path / "store")
    train(lake.root, tmp_path / "run", RECIPE, copy_to=address)
    spoiled = tmp_path / "store" / "checkpoints" / "step-00000006" / "average.safetensors"
    spoiled.chmod(0o644)
    spoiled.write_bytes(spoiled.read_bytes()[:-1] + b"x")
    train(lake.root, tmp_path / "other", override(RECIPE, {"steps": 4}), copy_to=address)
    told = capsys.readouterr().err
    assert "step-00000006 is damaged (average.safetensors is not what was written" in told
    assert "fetched step-00000004" in told
    copies = Copies(Run(tmp_path / "run"), store_at(address), 2)
    (spoiled.parent / CHECKSUMS).unlink()
    assert copies.steps() == [4]
    train(lake.root, tmp_path / "run", RECIPE, copy_to=address)
    assert copies.steps() == [4, 6]
    fetched = tmp_path / "again"
    train(lake.root, fetched, RECIPE, copy_to=address)
    assert same(weights(fetched), weights(whole))


def test_a_store_that_fails_costs_a_line_and_at_the_end_the_status(
    lake: Lake, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(self: Copies, folder: Path) -> None:
        raise LakeError("the bucket does not answer")

    with monkeypatch.context() as patch:
        patch.setattr(Copies, "push", fails)
        with pytest.raises(LakeError, match="does not answer"):
            train(lake.root, tmp_path / "run", RECIPE, copy_to=str(tmp_path / "store"))
    assert "step-00000002 could not be copied to" in capsys.readouterr().err
    assert Run(tmp_path / "run").steps() == [4, 6]
    train(lake.root, tmp_path / "run", RECIPE, copy_to=str(tmp_path / "store"))
    assert Copies(Run(tmp_path / "run"), store_at(tmp_path / "store"), 2).steps() == [6]
