"""Single frames as a method: its loss, its samples, and a run of it through the programs that know no method."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from model import evaluate, sample
from model.backbones.conditioning import Conditioning
from model.methods.base import Request, SampleSettings
from model.methods.curves import curve
from model.methods.draws import Draws
from model.methods.per_frame import PLACE_WAVES, PerFrame, PerFrameOptions
from model.sample import Sampler
from model.train import main as train_main
from model.training.checkpoint import Run
from model.training.data import Clips, Collate
from model.training.record import RunRecord
from storage import version
from storage.layout import Lake
from tests.model.tiny_lake import DURATION, ORDER, SIDE, make_lake
from tests.model.wrapped_method import Told

FIGURES = {"mean_scale": 2.0, "derivative_scale": 1.0}


@pytest.fixture(scope="module")
def lake(tmp_path_factory: pytest.TempPathFactory) -> Lake:
    return make_lake(tmp_path_factory.mktemp("per_frame") / "lake")


def test_single_frames_are_stills_at_the_times_they_are_told(lake: Lake) -> None:
    """The loss of a network that answers zero is the energy of the very frames that it was told the times of."""
    clips = Clips(lake, version.load(lake), "train")
    batch = Collate(torch.zeros(1, 64).half().numpy(), PerFrame.members)([clips[0]]).to("cpu")
    options = PerFrameOptions(times_per_clip=5, error_focus=0.0)
    method = PerFrame.build(options, FIGURES, clips.version.clip)
    network = Told(0.0)
    losses = method.loss(network, batch, Draws(3, 1))
    (given,), (flow_time,) = network.given, network.times
    assert flow_time.shape == (5, 1)
    assert bool((flow_time < 0).all()), "a frame is made on the warm-up"
    assert not given.context_given.any()
    times = given.log_duration / PLACE_WAVES
    assert bool(((times >= 0) & (times <= 1)).all())
    assert len(times.unique()) == 5
    coefficients = batch.part("coefficients")
    frames, _ = curve(coefficients, times[None])
    assert float(losses["mean"]) == pytest.approx(float(frames.square().mean()) / 4.0, rel=1e-4)
    assert coefficients.shape[1] == ORDER


def request(**changes: Any) -> Request:
    told = Conditioning(
        text=torch.zeros(2, 1, 4), text_length=torch.ones(2, dtype=torch.long), clip_start=torch.zeros(2),
        start_given=torch.ones(2), log_duration=torch.zeros(2), context=torch.zeros(2, 1, 3, 4, 4),
        context_given=torch.zeros(2, 1, dtype=torch.bool),
    )  # fmt: skip
    values = {"conditioning": told, "seeds": (0, 7), "shape": (3, 4, 4), "settings": SampleSettings(warmup_steps=4)}
    return Request(**{**values, **changes})


def test_frames_are_sampled_from_one_noise_a_clip_and_at_any_time() -> None:
    method = PerFrame.build(PerFrameOptions(), FIGURES, {"latent_shape": [3, 4, 4]})
    network, asked = Told(0.25), request()
    made = method.sample(network, asked)
    times = [0.0, 0.5, 1.0]
    read = made.read(times)
    assert read.shape == (3, 2, 3, 4, 4)
    torch.testing.assert_close(read, torch.full_like(read, 0.25 * 2.0))
    assert made.network_calls == len(network.states) == 5
    start = network.states[0][:, 0].unflatten(0, (3, 2))
    torch.testing.assert_close(start, asked.noise().expand(3, 2, 3, 4, 4))
    told = network.given[0].log_duration.unflatten(0, (3, 2))
    torch.testing.assert_close(told, PLACE_WAVES * torch.tensor(times)[:, None].expand(3, 2))


def test_what_it_cannot_do_is_refused() -> None:
    method = PerFrame.build(PerFrameOptions(), FIGURES, {"latent_shape": [3, 4, 4]})
    given = {"frames": torch.zeros(2, 1, 3, 4, 4), "frame_time": torch.zeros(1), "given": torch.ones(2, 1).bool()}
    with pytest.raises(ValueError, match="takes no given frame"):
        method.sample(Told(0.0), request(**given))
    with pytest.raises(ValueError, match=r"guidance is 2.0, so the empty caption must be given"):
        method.sample(Told(0.0), request(settings=SampleSettings(guidance=2.0)))


def test_every_option_changes_the_loss_or_the_path(lake: Lake) -> None:
    clips = Clips(lake, version.load(lake), "train")
    batch = Collate(torch.ones(1, 64).half().numpy(), PerFrame.members)([clips[0], clips[1]]).to("cpu")
    changes = {
        "warmup": 0.5, "sigma_end": 0.3, "times_per_clip": 2, "warmup_focus": 1.0, "error_focus": 1.0,
        "warmup_law": "mode", "signal_weight": 5.0,
        "caption_dropout": 1.0, "clip_start_dropout": 0.0,
    }  # fmt: skip
    assert set(changes) == {field.name for field in dataclasses.fields(PerFrameOptions)}

    class Reader(torch.nn.Module):
        def forward(self, latents: torch.Tensor, time: torch.Tensor, given: Conditioning) -> dict[str, torch.Tensor]:
            text = given.text.float().mean((1, 2))  # another one for the empty caption
            told = (given.start_given + text + time[:, 0])[:, None, None, None, None]
            return {"mean": 0.3 * latents + told, "derivative": 0.1 * latents}

    def outcome(options: PerFrameOptions) -> list[float]:
        method = PerFrame.build(options, FIGURES, clips.version.clip)
        losses = method.loss(Reader(), batch, Draws(0, 2))
        return [float(value) for value in losses.values() if value.ndim == 0]

    reference = outcome(PerFrameOptions())
    assert reference == outcome(PerFrameOptions())
    for name, value in changes.items():
        assert outcome(dataclasses.replace(PerFrameOptions(), **{name: value})) != reference, name


def test_a_run_through_the_same_commands(lake: Lake, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Trained, resumed, refused as VLFM, sampled beyond its window, and evaluated: by the programs as they are."""
    run = tmp_path / "run"
    tiny = ["width=32", "depth=1", "heads=2", "batch=4", "log_every=1", "learning_rate_warmup=2", "ema_decay=0.5"]
    command = ["--lake", str(lake.root), "--run", str(run), "--recipe", "demo"]
    command += [word for setting in tiny for word in ("--set", setting)]
    chosen = [*command, "--set", "method=per_frame"]
    assert train_main([*chosen, "--set", "steps=20"]) == 0
    assert train_main([*chosen, "--set", "steps=40"]) == 0
    assert Run(run).steps()[-1] == 40
    record = RunRecord.read(Run(run))
    assert (record.recipe.method, record.recipe.options.times_per_clip) == ("per_frame", 2)
    steps = [json.loads(line).get("step") for line in Run(run).log.read_text().splitlines()]
    assert [step for step in steps if step in (20, 21)][-1] == 21
    capsys.readouterr()
    assert train_main([*command, "--set", "steps=40"]) == 1
    assert "was started with method='per_frame', not 'vlfm'; give another --run" in capsys.readouterr().err
    assert train_main([*chosen, "--set", "steps=40", "--set", "warmup=0.5"]) == 1
    assert "was started with warmup=0.25, not 0.5" in capsys.readouterr().err

    out = tmp_path / "film.png"
    asked = ["--run", str(run), "--prompt", "square 1 slides over grey", "--fps", "4", "--out", str(out)]
    assert sample.main([*asked, "--duration", str(2 * DURATION)]) == 0
    with Image.open(out) as strip:
        assert strip.size == (int(8 * DURATION) * SIDE, SIDE)
    picture = tmp_path / "one.png"
    Image.fromarray(np.zeros((SIDE, SIDE, 3), np.uint8)).save(picture)
    assert sample.main([*asked, "--image", str(picture)]) == 1
    assert "takes no given frame" in capsys.readouterr().err
    metrics = evaluate.evaluate(run, lake.root, tmp_path / "report", SampleSettings(warmup_steps=2), most=2)
    assert metrics["run"]["recipe"]["method"] == "per_frame"
    assert metrics["train"]["clips"] == 2
    assert (tmp_path / "report" / "report.html").is_file()
    assert Sampler(run).method.name == "per_frame"
