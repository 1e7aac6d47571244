"""Programs with methods that sample frames in order: train, sample and evaluate, on clips of several lengths."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from model.evaluate import evaluate, evaluate_runs
from model.evaluate import main as evaluate_main
from model.evaluation.headline import OF_SEQUENCES, headline, headline_of_runs
from model.evaluation.sequence_report import BORDER, GIVEN, LATE, START, bordered
from model.methods.flowception import FlowceptionOptions
from model.pipeline import VideoLatentFlowPipeline
from model.recipes import TrainRecipe
from model.sample import Sampler, main
from model.train import train
from storage.layout import Lake
from tests.model.evaluated import Page
from tests.model.metrics.test_sequences import scripted
from tests.model.tiny_lake import SIDE, make_lake

LENGTHS = (4, 6, 8, 5)
TINY = TrainRecipe(
    name="tiny", method="flowception", width=32, depth=1, heads=2, patch=2, options=FlowceptionOptions(start_frames=2),
    batch=4, steps=20, learning_rate=3e-3, learning_rate_warmup=2, ema_decay=0.8, checkpoint_every=20, log_every=5,
    validate_every=10,
)  # fmt: skip
CAPTION = "square 1 slides over grey"


@pytest.fixture(scope="module")
def lake(tmp_path_factory: pytest.TempPathFactory) -> Lake:
    return make_lake(tmp_path_factory.mktemp("sequences") / "lake", clips=8, validation=3, kept=LENGTHS)


@pytest.fixture(scope="module")
def run(lake: Lake) -> Path:
    train(lake.root, lake.root.parent / "run", TINY)
    return lake.root.parent / "run"


def sample(run: Path, out: Path, *more: str) -> int:
    return main(["--run", str(run), "--prompt", CAPTION, "--out", str(out), "--steps", "4", *more])


def strip(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture)


def picture(path: Path, grey: int) -> str:
    Image.fromarray(np.full((SIDE, SIDE, 3), grey, np.uint8)).save(path)
    return str(path)


def test_the_command_writes_as_many_frames_as_the_method_makes(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sample(run, tmp_path / "a.png", "--max-frames", "9", "--insertion", "poisson", "--local-power", "2") == 0
    told = capsys.readouterr().out
    count = strip(tmp_path / "a.png").shape[1] // SIDE
    assert 2 <= count <= 9
    assert f"{count} frames at 4 fps" in told, "as the films were read"
    assert sample(run, tmp_path / "b.png", "--order", "hierarchical", "--length", "7", "--fps", "24") == 0
    assert strip(tmp_path / "b.png").shape[1] == 7 * SIDE
    assert "7 frames at 24 fps" in capsys.readouterr().out, "fps is the file's alone"


def test_given_frames_are_the_first_and_the_last(run: Path, tmp_path: Path) -> None:
    black, white = picture(tmp_path / "black.png", 10), picture(tmp_path / "white.png", 240)
    assert sample(run, tmp_path / "one.png", "--image", black) == 0
    one = strip(tmp_path / "one.png")
    assert np.abs(one[:, :SIDE].astype(int) - 10).max() <= 2, "through the codec"
    assert sample(run, tmp_path / "two.png", "--image", black, "--given", white) == 0
    two = strip(tmp_path / "two.png")
    assert np.abs(two[:, :SIDE].astype(int) - 10).max() <= 2
    assert np.abs(two[:, -SIDE:].astype(int) - 240).max() <= 2


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--duration", "2"], "--duration has no use for a run of the method flowception; leave it out"),
        (["--start", "1"], "--start has no use for a run of the method flowception"),
        (["--solver", "rk4"], "--solver has no use for a run of the method flowception"),
        (["--insertion", "often"], "insertion is 'often'; it must be bernoulli or poisson"),
        (["--fps", "0"], "fps is 0.0; it must be a number above 0"),
        (["--given", "nothing.png"], "--given nothing.png: there is no such file"),
        (["--long", "chunks", "--max-frames", "20", "--chunk", "4", "--overlap", "4"], "give an --overlap below 4"),
    ],
)
def test_slips_are_one_line(
    run: Path, tmp_path: Path, more: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sample(run, tmp_path / "out.png", *more) == 1
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1
    assert not (tmp_path / "out.png").exists()


def test_more_given_frames_than_max_frames(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [picture(tmp_path / f"{k}.png", 40 * k) for k in range(4)]
    assert sample(run, tmp_path / "out.png", "--given", *files, "--max-frames", "3") == 1
    assert "4 frames are given, but max_frames is 3; give fewer, or --max-frames 4 or more" in capsys.readouterr().err


def test_reaching_max_frames_is_said(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sample(run, tmp_path / "out.png", "--max-frames", "2") == 0
    assert "note: the video would have grown beyond 2 frames: --max-frames 4" in capsys.readouterr().err


def test_the_pipeline_and_the_strips(run: Path) -> None:
    pipeline = VideoLatentFlowPipeline.from_pretrained(run)
    made = pipeline([CAPTION, CAPTION], num_inference_steps=4, generator=torch.Generator().manual_seed(3)).frames
    sampler = Sampler(run)
    expected = sampler.frame_videos([CAPTION] * 2, sampler.method.Sampling(steps=4), seeds=[3, 4])
    assert [len(video) for video in made] == [len(video.frames) for video in expected]
    np.testing.assert_array_equal(np.asarray(made[0][0]), expected[0].frames[0])
    arrays = pipeline(CAPTION, num_inference_steps=4, output_type="np").frames
    assert arrays[0].shape[1:] == (SIDE, SIDE, 3)
    with pytest.raises(ValueError, match="num_seconds has no use for a run of the method flowception"):
        pipeline(CAPTION, num_seconds=2.0)
    assert sampler.strip(CAPTION, 6, 0).shape == (6, SIDE, SIDE, 3)


def test_an_evaluation(lake: Lake, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sampling = Sampler(run).method.Sampling(steps=4)
    metrics = evaluate(run, lake.root, tmp_path / "report", sampling, most=5, shown=2)
    on_disk = json.loads((tmp_path / "report" / "metrics.json").read_text())
    assert on_disk == metrics
    assert metrics["kind"] == "sequences"
    assert metrics["metrics"].keys() == OF_SEQUENCES.keys()
    train_split = metrics["train"]
    assert train_split["clips"] == len(train_split["lengths"]) == 5
    assert train_split["true_lengths"] == {"4": 2, "5": 2, "6": 2, "8": 2}
    assert metrics["validation"]["true_lengths"] == {"4": 1, "6": 1, "8": 1}
    assert train_split["length_mean"] == pytest.approx(np.mean(train_split["lengths"]))
    assert train_split["length_true_mean"] == 5.75
    assert len(train_split["drift"]) == 8
    for name in ("frechet", "frechet_floor", "roughness", "step", "drift_first", "drift_last"):
        assert train_split[name] >= 0, name
    assert train_split["fvd"] is None if "fvd" in train_split else True
    assert len(metrics["clips"]) == 8
    page = Page((tmp_path / "report" / "report.html").read_text())
    assert not page.open
    assert len(page.images) == 2 * 2 * 2, "clip and sample of two clips of each split"
    text = " ".join(page.texts)
    assert CAPTION in text or "square" in text
    assert "lengths, total variation" in text
    lines = headline(metrics)
    assert any("mean length, samples" in line for line in lines)
    before = (tmp_path / "report" / "report.html").stat().st_mtime_ns
    assert evaluate(run, lake.root, tmp_path / "report", sampling, most=5, shown=2) == metrics
    assert (tmp_path / "report" / "report.html").stat().st_mtime_ns == before, "not made again"


def test_the_command_evaluates_with_an_fvd(
    lake: Lake, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scripted(tmp_path / "i3d.pt")
    words = ["--run", str(run), "--lake", str(lake.root), "--out", str(tmp_path / "report"), "--clips", "2"]
    assert evaluate_main([*words, "--shown", "0", "--fvd", str(tmp_path / "i3d.pt")]) == 0
    assert "FVD" in capsys.readouterr().out
    found: dict[str, Any] = json.loads((tmp_path / "report" / "metrics.json").read_text())
    assert found["train"]["fvd"] >= 0
    assert found["train"]["fvd_floor"] >= 0


def test_ranges_over_seeds(lake: Lake, run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    train(lake.root, other, dataclasses.replace(TINY, seed=1))
    sampling = Sampler(run).method.Sampling(steps=2)
    found = evaluate_runs([run, other], lake.root, tmp_path / "out", sampling, most=2, shown=0)
    assert found["kind"] == "sequences"
    assert found["train"]["length_mean"][1] <= found["train"]["length_mean"][2]
    assert any("mean length, samples" in line for line in headline_of_runs(found, 2))


def test_borders_say_when_a_frame_was_inserted() -> None:
    frames = np.full((4, 3, 3, 3), 7, np.uint8)
    shown = bordered(frames, np.array([0.0, 0.5, 1.0, np.nan]))
    scale = 24
    assert shown.shape == (4, 3 * scale + 2 * BORDER, 3 * scale + 2 * BORDER, 3)
    assert (shown[:, BORDER:-BORDER, BORDER:-BORDER] == 7).all()
    assert shown[[0, 2, 3], 0, 0].tolist() == [list(START), list(LATE), list(GIVEN)]
    middle = shown[1, 0, 0]
    assert all(min(a, b) <= m <= max(a, b) for a, b, m in zip(START, LATE, middle.tolist(), strict=True))
    assert bordered(frames, np.full(4, np.nan))[0, 0, 0].tolist() == list(GIVEN)
    assert bordered(frames, np.zeros(4))[0, 0, 0].tolist() == list(START)
