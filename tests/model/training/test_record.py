"""The record of a run: whole in JSON, of format 1 still read, and what it keeps a resumed run from."""

from __future__ import annotations

import dataclasses
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from model import evaluate, sample
from model.methods.base import Batch, Request, SampleSettings
from model.methods.registry import METHODS
from model.methods.vlfm import VLFMOptions
from model.recipes import train_recipe
from model.settings import override
from model.train import train
from model.training.checkpoint import Run
from model.training.record import RESUMABLE, RunRecord
from storage.layout import Lake
from tests.model.tiny_lake import make_lake

OF_THEN = {
    "anchor": "none", "warmup_focus": 2.0, "error_focus": 1.0, "clip_start_dropout": 0.0, "context_dropout": 0.9,
}  # fmt: skip
"""Options whose defaults were others, or which there were none of, when the run of tests/data/v1 was made."""
DATA = Path(__file__).parents[2] / "data" / "v1"


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """The folder with `lake`, `run` and `sample.png` of tests/data/v1."""
    for name in ("lake", "run"):
        with tarfile.open(DATA / f"{name}.tar.xz") as archive:
            safely = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # from Python 3.11.4 on
            archive.extractall(tmp_path, **safely)
    return tmp_path


def test_a_run_of_format_1_is_read(old: Path) -> None:
    record = RunRecord.read(Run(old / "run"))
    assert json.loads((old / "run" / "run.json").read_text())["format"] == 1
    assert (record.recipe.method, record.recipe.width, record.recipe.steps) == ("vlfm", 16, 200)
    expected: dict[str, Any] = {"times_per_clip": 2, "warmup_share": 0.25, **OF_THEN}
    assert record.recipe.options == VLFMOptions(**expected)
    assert set(record.figures) == {"mean_scale", "derivative_scale"}
    assert record.backbone.outputs == ("mean", "derivative")
    again = json.loads(json.dumps(record.to_json()))
    assert again["format"] == 2
    assert RunRecord.from_json(again) == record


def test_a_run_of_format_1_is_sampled_as_it_was(old: Path) -> None:
    """Within two grey levels: another processor rounds differently."""
    out = old / "again.png"
    asked = ["--run", str(old / "run"), "--prompt", "an old film", "--fps", "8", "--steps", "4", "--out", str(out)]
    asked += ["--solver", "euler", "--warmup-steps", "8"]  # the defaults of then
    assert sample.main(asked) == 0
    before, after = (np.asarray(Image.open(path)).astype(int) for path in (old / "sample.png", out))
    assert before.std() > 30
    assert np.abs(before - after).max() <= 2


def test_a_run_of_format_1_goes_on(old: Path) -> None:
    settings = {"width": 16, "depth": 1, "heads": 1, "batch": 3, "learning_rate": 0.01, "steps": 202, "log_every": 1}
    recipe = override(train_recipe("demo"), {**settings, **OF_THEN})
    folder = train(old / "lake", old / "run", recipe)
    assert folder.name == "step-00000202"
    log = Run(old / "run").log.read_text().splitlines()
    losses = {row["step"]: row["loss"] for row in map(json.loads, log) if "loss" in row}
    assert losses[201] < 2 * losses[200], "it goes on from what it had learned"
    with pytest.raises(ValueError, match=r"was started with sigma_end=0.1, not 0.3; .* the same: --set sigma_end=0.1"):
        train(old / "lake", old / "run", override(recipe, {"sigma_end": 0.3}))


def test_what_cannot_be_read_is_named(old: Path) -> None:
    values = Run(old / "run").read()
    for change, told in (
        ({"format": 3}, "its format is 3"),
        ({"method": "vae"}, "method is 'vae'"),
        ({"recipe": {**values["recipe"], "magic": 1}}, "magic"),
        ({"figures": None, "mean_scale": None, "backbone": {}}, "missing"),
    ):
        with pytest.raises(ValueError, match=rf"run.json is of another version of vlfm \(.*{told}.*; train a new run"):
            RunRecord.from_json({**values, **change})
    del values["codec"]
    with pytest.raises(ValueError, match="it lacks 'codec'"):
        RunRecord.from_json(values)


def test_what_a_resumed_run_may_change(old: Path) -> None:
    record = RunRecord.read(Run(old / "run"))
    unfocused = dataclasses.replace(record.recipe.options, error_focus=0.0)  # with it there is no `accumulate`
    record = dataclasses.replace(record, recipe=dataclasses.replace(record.recipe, options=unfocused))
    for field in dataclasses.fields(record.recipe):
        value = getattr(record.recipe, field.name)
        if isinstance(value, int | float | str) and field.name != "method":
            other = value + "1" if isinstance(value, str) else value / 2 if isinstance(value, float) else value + 1
            known = {"precision": "bfloat16", "matrix_learning_rate": 0.1, "weight_decay": 0.1}
            known |= {
                "qk_norm": "rms",
                "architecture": "dit",
                "optimizer": "grams",
                "sharding": "fsdp",
                "accumulate": 3,
                "checkpoints": "distributed",
                "learning_rate_fall": "cosine",
                "caption_padding": "seen",
            }
            other = known.get(field.name, other)
            changed = dataclasses.replace(record.recipe, **{field.name: other})
            differs = [name for name, _, _ in record.differences(changed)]
            assert differs == ([] if field.name in RESUMABLE else [field.name])


# --- a method that nothing but the registry knows ---


@dataclasses.dataclass(frozen=True)
class HoldOptions:
    level: float = 0.5


@dataclasses.dataclass(frozen=True)
class Hold:
    """Learns each clip's mean frame, and holds it."""

    name = "hold"
    members = ("latents", "frame_time", "observed")
    heads = ("mean",)
    temporal = False
    takes_first_frame = False
    rates = False
    frame_count = False
    sequences = False
    Sampling = SampleSettings
    Options = HoldOptions
    options: HoldOptions
    scale: float
    states_per_clip = 1
    clip_start_dropout = 0.0

    @classmethod
    def prepare(cls, clips: Any, clip_format: Any) -> dict[str, float]:
        return {
            "scale": float(np.std(np.concatenate([clips[i].members["latents"].ravel() for i in range(len(clips))])))
        }

    @classmethod
    def build(cls, options: HoldOptions, figures: Any, clip_format: Any) -> Hold:
        return cls(options, figures["scale"])

    def loss(self, backbone: nn.Module, batch: Batch, generator: torch.Generator) -> dict[str, torch.Tensor]:
        latents, valid = batch.part("latents"), batch.part("valid")[:, :, None, None, None]
        assert batch.part("observed").any()
        assert batch.part("frame_time").shape == latents.shape[:2]
        mean = (latents * valid).sum(1) / valid.sum(1)
        told = self._told(batch.text, batch.text_length, batch.clip_start, batch.duration.log(), mean.shape)
        level = torch.full((len(mean), 1), self.options.level)
        found = backbone(torch.zeros_like(mean)[:, None], level, told)["mean"][:, 0] * self.scale
        return {"loss": (found - mean).square().mean(), "level": torch.tensor(self.options.level)}

    @torch.no_grad()
    def sample(self, backbone: nn.Module, request: Request) -> Held:
        state = torch.zeros((len(request.seeds), 1, *request.shape))
        level = torch.full((len(state), 1), self.options.level)
        return Held(backbone(state, level, request.conditioning)["mean"][:, 0] * self.scale)

    def _told(self, text: Any, length: Any, start: Any, log_duration: Any, shape: Any) -> Any:
        from model.backbones.conditioning import Conditioning

        nothing = torch.zeros(len(start), 1, *shape[1:])
        return Conditioning(
            text, length, start, torch.ones(len(start)), log_duration, nothing, nothing[:, :, 0, 0, 0] > 0
        )


@dataclasses.dataclass(frozen=True)
class Held:
    frame: torch.Tensor
    network_calls: int = 1

    def read(self, times: Any) -> torch.Tensor:
        return self.frame[None].expand(len(times), *self.frame.shape)


def test_a_new_method_needs_no_change_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One class trains, resumes bit by bit, samples and is evaluated by the programs as they are."""
    monkeypatch.setitem(METHODS, "hold", Hold)  # type: ignore[arg-type]
    lake: Lake = make_lake(tmp_path / "lake")
    settings = {"width": 32, "depth": 1, "heads": 2, "batch": 4, "learning_rate": 0.01, "learning_rate_warmup": 2}
    settings |= {"ema_decay": 0.5, "log_every": 1, "learning_rate_decay": 0.0, "level": 0.25, "method": "hold"}
    recipe = override(train_recipe("demo"), {**settings, "steps": 60})
    train(lake.root, tmp_path / "whole", recipe)
    train(lake.root, tmp_path / "run", override(recipe, {"steps": 25}))
    train(lake.root, tmp_path / "run", recipe)
    rows = [json.loads(line) for line in Run(tmp_path / "run").log.read_text().splitlines()]
    losses = {row["step"]: row["loss"] for row in rows if "loss" in row}
    whole = [json.loads(line) for line in Run(tmp_path / "whole").log.read_text().splitlines()]
    assert losses == {row["step"]: row["loss"] for row in whole if "loss" in row}
    assert losses[60] < 0.5 * losses[1]
    assert {row["level"] for row in rows if "level" in row} == {0.25}
    record = RunRecord.read(Run(tmp_path / "run"))
    assert (record.recipe.options, record.backbone.outputs, set(record.figures)) == (
        HoldOptions(0.25),
        ("mean",),
        {"scale"},
    )
    with pytest.raises(ValueError, match=r"was started with level=0.25, not 0.5"):
        train(lake.root, tmp_path / "run", override(recipe, {"level": 0.5}))
    asked = ["--run", str(tmp_path / "run"), "--prompt", "square 1 slides over grey", "--fps", "4"]
    assert sample.main([*asked, "--out", str(tmp_path / "held.png")]) == 0
    metrics = evaluate.evaluate(tmp_path / "run", lake.root, tmp_path / "report", SampleSettings(), most=2)
    assert metrics["train"]["mean"]["recall"] > 20
    assert metrics["network_calls_per_window"] == 1
