"""`vlfm train --init-from`: the first weights are the checkpoint's, the record says so, and a run keeps to it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from model.backbones.dit import Backbone
from model.train import check_members, main
from model.training.checkpoint import Run
from model.training.record import RunRecord
from model.training.start import FromRun
from storage import version
from storage.layout import Lake
from tests.model.tiny_lake import make_lake

WIDTH, DEPTH, PATCH, CHANNELS = 16, 1, 2, 12
SETTINGS = {
    "width": WIDTH, "depth": DEPTH, "heads": 2, "patch": PATCH, "batch": 2, "steps": 1, "checkpoint_every": 1,
    "architecture": "dit", "learning_rate": 1e-9,
}  # fmt: skip


def official(path: Path, seed: int = 0) -> Path:
    """A checkpoint of the tiny lake's channels in the official layout, for a grid of 4x4 tokens."""
    draw = torch.Generator().manual_seed(seed)
    shapes = {
        "x_embedder.proj": (WIDTH, CHANNELS, PATCH, PATCH), "t_embedder.mlp.0": (WIDTH, 256),
        "t_embedder.mlp.2": (WIDTH, WIDTH), "blocks.0.attn.qkv": (3 * WIDTH, WIDTH),
        "blocks.0.attn.proj": (WIDTH, WIDTH), "blocks.0.mlp.fc1": (4 * WIDTH, WIDTH),
        "blocks.0.mlp.fc2": (WIDTH, 4 * WIDTH), "blocks.0.adaLN_modulation.1": (6 * WIDTH, WIDTH),
        "final_layer.linear": (PATCH * PATCH * 2 * CHANNELS, WIDTH),
        "final_layer.adaLN_modulation.1": (2 * WIDTH, WIDTH),
    }  # fmt: skip
    tensors = {f"{name}.weight": 0.1 * torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    tensors |= {f"{name}.bias": 0.1 * torch.randn(shape[0], generator=draw) for name, shape in shapes.items()}
    tensors["pos_embed"] = torch.randn(1, 16, WIDTH, generator=draw)
    tensors["y_embedder.embedding_table.weight"] = torch.zeros(1001, WIDTH)
    torch.save(tensors, path)
    return path


@pytest.fixture(scope="module")
def lake(tmp_path_factory: pytest.TempPathFactory) -> Lake:
    return make_lake(tmp_path_factory.mktemp("init") / "lake")


def run_it(lake: Lake, run: Path, *more: str, **changes: object) -> int:
    settings = [f"--set={name}={value}" for name, value in {**SETTINGS, **changes}.items()]
    return main(["--lake", str(lake.root), "--run", str(run), "--recipe", "demo", *settings, *more])


def test_a_run_starts_from_a_checkpoint_and_says_so(
    lake: Lake, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, given = tmp_path / "run", official(tmp_path / "DiT.pt")
    assert run_it(lake, run, "--init-from", str(given)) == 0
    weights = load_file(Run(run).checkpoint() / "backbone.safetensors")
    before = torch.load(given, weights_only=True)
    torch.testing.assert_close(weights["blocks.0.qkv.weight"], before["blocks.0.attn.qkv.weight"], atol=1e-6, rtol=0)
    assert float(weights["blocks.0.cross.out.weight"].abs().max()) < 1e-6
    text = (run / "run.json").read_text()
    kept = json.loads(text)["initialised_from"]
    assert kept["name"] == "DiT.pt"
    assert len(kept["sha256"]) == 64
    assert str(tmp_path) not in text

    # It goes on without the file, and with it; another one is refused.
    assert run_it(lake, run, steps=2) == 0
    assert run_it(lake, run, "--init-from", str(given), steps=3) == 0
    assert json.loads((run / "run.json").read_text())["initialised_from"] == kept
    other = official(tmp_path / "other.pt", seed=1)
    capsys.readouterr()
    assert run_it(lake, run, "--init-from", str(other), steps=4) == 1
    told = capsys.readouterr().err
    assert f"was started from DiT.pt (sha256 {kept['sha256'][:12]}), not from other.pt" in told
    assert told.count("\n") == 1
    # Killed before its first checkpoint, it must not start from random weights.
    for folder in (run / "checkpoints").iterdir():
        folder.rename(tmp_path / folder.name)
    assert run_it(lake, run, steps=4) == 1
    assert "starts from DiT.pt and has no checkpoint yet: give --init-from again" in capsys.readouterr().err


def test_a_file_that_does_not_fit_leaves_no_run(lake: Lake, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, given = tmp_path / "run", official(tmp_path / "DiT.pt")
    for changes, message in (
        ({"width": 32}, "DiT.pt has width 16, not 32: --set width=16"),
        ({"architecture": "vlfm"}, "DiT.pt fits the published architecture alone: --set architecture=dit"),
    ):
        assert run_it(lake, run, "--init-from", str(given), **changes) == 1
        assert capsys.readouterr().err == f"error: {message}\n"
        assert not (run / "run.json").exists()
    assert run_it(lake, run, "--init-from", str(tmp_path / "nowhere.pt")) == 1
    assert "nowhere.pt: there is no such file" in capsys.readouterr().err
    assert run_it(lake, run) == 0
    assert run_it(lake, run, "--init-from", str(given), steps=2) == 1
    assert "was started without --init-from; leave it out, or give another --run" in capsys.readouterr().err


VLFM = {"architecture": "vlfm"}


def test_a_run_starts_from_another_run(lake: Lake, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, run = tmp_path / "before", tmp_path / "run"
    assert run_it(lake, before, learning_rate=1e-2, steps=2, ema_decay=0.5, **VLFM) == 0
    assert run_it(lake, run, "--init-from", str(before), **VLFM) == 0
    kept = json.loads((run / "run.json").read_text())["initialised_from"]
    assert kept["name"] == "before/step-00000002"
    averaged = load_file(Run(before).checkpoint() / "average.safetensors")
    weights = load_file(Run(run).checkpoint() / "backbone.safetensors")
    assert averaged.keys() == weights.keys()
    for name, value in averaged.items():
        torch.testing.assert_close(weights[name], value, atol=1e-6, rtol=0)
    # A relative path is the same run; one that trained on since is another start.
    assert run_it(lake, run, "--init-from", str(before.parent / "." / "before"), steps=2, **VLFM) == 0
    assert run_it(lake, before, learning_rate=1e-2, steps=3, ema_decay=0.5, **VLFM) == 0
    capsys.readouterr()
    assert run_it(lake, run, "--init-from", str(before), steps=3, **VLFM) == 1
    assert "was started from before/step-00000002" in capsys.readouterr().err
    assert run_it(lake, tmp_path / "wide", "--init-from", str(before), width=32, **VLFM) == 1
    assert "its backbone has width=16, not 32; set the same with --set" in capsys.readouterr().err
    assert not (tmp_path / "wide" / "run.json").exists()
    (tmp_path / "empty").mkdir()
    assert run_it(lake, tmp_path / "new", "--init-from", str(tmp_path / "empty"), **VLFM) == 1
    assert "is no training run" in capsys.readouterr().err


def test_what_a_run_lacks_starts_without_effect(lake: Lake, tmp_path: Path) -> None:
    """Fine-tuning under a method with other heads, frame times and rates."""
    assert run_it(lake, tmp_path / "run", learning_rate=1e-2, steps=2, **VLFM) == 0
    config = RunRecord.read(Run(tmp_path / "run")).backbone
    new = Backbone(dataclasses.replace(config, outputs=("velocity",), temporal=True, rates=True, frame_count=True))
    FromRun(tmp_path / "run").load(new)
    averaged = load_file(Run(tmp_path / "run").checkpoint() / "average.safetensors")
    state = new.state_dict()
    shared = averaged.keys() & state.keys()
    assert averaged.keys() - shared == {f"{head}_head.{part}" for head in config.outputs for part in ("weight", "bias")}
    assert all(torch.equal(averaged[name], state[name]) for name in shared)
    assert not state["velocity_head.weight"].any()
    assert not state["rate_head.last.weight"].any()
    assert not state["frame_time.second.weight"].any()
    assert not state["frame_time.second.bias"].any()
    assert not state["frame_count.second.weight"].any()
    assert new.frame_time is not None
    assert new.frame_time.second.weight.requires_grad


def test_methods_of_latents_need_them_in_the_shards(lake: Lake) -> None:
    found = version.load(lake)
    without = dataclasses.replace(found, recipe={**found.recipe, "store_latents": False})
    check_members("flowception", ("latents",), found)
    check_members("vlfm", ("coefficients",), without)
    with pytest.raises(ValueError, match="the shards of version 1 do not hold; ingest with --set store_latents=true"):
        check_members("flowception", ("latents",), without)
