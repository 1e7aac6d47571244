"""The pipeline in diffusers' style: the frames of `vlfm sample`, in the kinds and by the arguments of diffusers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from model.methods.base import SampleSettings
from model.pipeline import VideoLatentFlowPipeline
from model.recipes import train_recipe
from model.sample import Sampler, main, read_image
from model.settings import override
from model.train import train
from tests.model.tiny_lake import SIDE, make_lake

PROMPTS = ["square 1 slides over grey", "square 4 slides over grey"]
QUICK: dict[str, Any] = {"fps": 4, "num_inference_steps": 2, "num_warmup_steps": 2}
SETTINGS = SampleSettings(steps=2, warmup_steps=2)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    lake = make_lake(tmp_path_factory.mktemp("pipeline") / "lake")
    settings = {
        "width": 32,
        "depth": 1,
        "heads": 2,
        "batch": 4,
        "steps": 8,
        "learning_rate_warmup": 2,
        "ema_decay": 0.5,
    }
    train(lake.root, lake.root.parent / "run", override(train_recipe("demo"), settings))
    return lake.root.parent / "run"


@pytest.fixture(scope="module")
def pipe(run: Path) -> VideoLatentFlowPipeline:
    return VideoLatentFlowPipeline.from_pretrained(run, device="cpu")


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def made(pipe: VideoLatentFlowPipeline, *args: Any, **more: Any) -> Any:
    """Frames (B, F, H, W, 3), uint8."""
    found = pipe(*args, **{**QUICK, "output_type": "np", **more}).frames  # type: ignore[union-attr]
    return (found * 255).round().astype(np.uint8)


@pytest.mark.bit_identical
def test_the_frames_are_those_of_the_command(run: Path, pipe: VideoLatentFlowPipeline, tmp_path: Path) -> None:
    asked = ["--run", str(run), "--prompt", PROMPTS[0], "--fps", "4", "--steps", "2", "--warmup-steps", "2"]
    assert main([*asked, "--seed", "7", "--out", str(tmp_path / "strip.png")]) == 0
    (frames,) = pipe(PROMPTS[0], generator=seeded(7), **QUICK).frames  # type: ignore[union-attr]
    assert [frame.size for frame in frames] == [(SIDE, SIDE)] * 8
    with Image.open(tmp_path / "strip.png") as strip:
        np.testing.assert_array_equal(np.concatenate([np.asarray(frame) for frame in frames], 1), np.asarray(strip))


@pytest.mark.bit_identical
def test_kinds_of_frames(pipe: VideoLatentFlowPipeline) -> None:
    pictures = pipe(PROMPTS, generator=seeded(0), **QUICK).frames  # type: ignore[union-attr]
    array = pipe(PROMPTS, generator=seeded(0), output_type="np", **QUICK).frames  # type: ignore[union-attr]
    (tensor,) = pipe(PROMPTS, generator=seeded(0), output_type="pt", return_dict=False, **QUICK)  # type: ignore[misc]
    assert array.shape == (2, 8, SIDE, SIDE, 3)
    assert 0 <= array.min() < array.max() <= 1
    assert tensor.shape == (2, 8, 3, SIDE, SIDE)
    np.testing.assert_array_equal(tensor.permute(0, 1, 3, 4, 2).numpy(), array)
    np.testing.assert_allclose(
        np.stack([np.stack([np.asarray(p) for p in v]) for v in pictures]) / 255, array, atol=1e-6
    )


@pytest.mark.bit_identical
def test_generators_and_videos_per_prompt(pipe: VideoLatentFlowPipeline) -> None:
    two = made(pipe, PROMPTS, num_videos_per_prompt=2, generator=seeded(3))
    assert two.shape[0] == 4
    assert not np.array_equal(two[0], two[1])
    listed = made(pipe, PROMPTS, num_videos_per_prompt=2, generator=[seeded(3 + index) for index in range(4)])
    np.testing.assert_array_equal(two, listed)
    used = seeded(3)
    torch.rand(5, generator=used)
    np.testing.assert_array_equal(made(pipe, PROMPTS, num_videos_per_prompt=2, generator=used), two)
    torch.manual_seed(0)
    free = made(pipe, PROMPTS[0])
    assert not np.array_equal(free, made(pipe, PROMPTS[0])), "without a generator every call is another"
    torch.manual_seed(0)
    np.testing.assert_array_equal(free, made(pipe, PROMPTS[0]))


@pytest.mark.bit_identical
def test_image_length_and_negative_prompt_are_the_samplers(
    run: Path, pipe: VideoLatentFlowPipeline, tmp_path: Path
) -> None:
    sampler = Sampler(run, device="cpu")
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 30, 3), np.uint8))
    picture.save(tmp_path / "it.png")
    expected = sampler.videos(
        PROMPTS[:1], 4, 1.5, SETTINGS, image=read_image(tmp_path / "it.png", (SIDE, SIDE)), seeds=[5]
    )
    for image in (picture, tmp_path / "it.png", str(tmp_path / "it.png")):
        found = made(pipe, PROMPTS[0], image, num_seconds=1.5, generator=seeded(5))
        assert found.shape[1] == 6
        assert np.abs(found[0].astype(int) - expected[0]).max() <= 1
    plain, away, empty = (
        made(pipe, PROMPTS[0], negative_prompt=words, guidance_scale=3.0, generator=seeded(5))
        for words in (None, PROMPTS[1], "")
    )
    np.testing.assert_array_equal(plain, empty)
    assert not np.array_equal(plain, away)
    none = made(pipe, PROMPTS[0], negative_prompt=PROMPTS[1], generator=seeded(5))
    np.testing.assert_array_equal(none, made(pipe, PROMPTS[0], generator=seeded(5)))


def test_it_moves_and_reads_another_checkpoint(run: Path) -> None:
    pipe = VideoLatentFlowPipeline.from_pretrained(run, step=8, device="cpu")
    assert pipe.to("cpu") is pipe
    assert (pipe.device.type, pipe.sampler.step) == ("cpu", 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": []}, "prompt is empty; give a caption, or a list of them"),
        ({"output_type": "gif"}, "output_type is 'gif'; it must be one of pil, np, pt"),
        ({"num_videos_per_prompt": 0}, "num_videos_per_prompt is 0; it must be at least 1"),
        ({"generator": [seeded(0), seeded(1)]}, "generator has 2 generators for 1 videos; give as many, or one"),
        ({"negative_prompt": ["a", "b"]}, "negative_prompt has 2 texts for 1 prompts; give as many, or one"),
        ({"image": 3}, "image is a int; give a PIL picture or the path of one"),
        ({"fps": 0}, "fps is 0; it must be a number above 0"),
        ({"num_seconds": -1.0}, "duration is -1.0; it must be a number of seconds above 0"),
        ({"num_inference_steps": 0}, "steps is 0; it must be at least 1"),
        ({"guidance_scale": float("inf")}, "guidance is inf; it must be a number, 1 for none"),
    ],
)
def test_slips_are_one_line(pipe: VideoLatentFlowPipeline, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as told:
        pipe(**{"prompt": PROMPTS[0], **arguments})
    assert "\n" not in str(told.value)


def test_what_is_no_run_is_said(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is no training run; make one with `vlfm train"):
        VideoLatentFlowPipeline.from_pretrained(tmp_path)
