"""Sampling from a run of a few steps: seeds, rates, windows that roll on, first frames, and slips of the pen."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from model.methods.base import SampleSettings
from model.recipes import train_recipe
from model.sample import Sampler, main, read_image
from model.settings import override
from model.train import train
from model.training.checkpoint import Run
from model.training.data import Clips
from model.video import from_frames
from storage import version
from storage.layout import Lake
from storage.rounding import ROUNDING
from tests.model.tiny_lake import DURATION, SIDE, frames, make_lake

QUICK = SampleSettings(steps=4, warmup_steps=2)
CAPTIONS = ["square 1 slides over grey", "square 4 slides over grey"]
TINY = {
    "width": 32, "depth": 2, "heads": 2, "batch": 4, "steps": 30, "log_every": 10, "checkpoint_every": 20,
    "learning_rate_warmup": 2, "ema_decay": 0.8,
}  # fmt: skip


@pytest.fixture(scope="module")
def lake(tmp_path_factory: pytest.TempPathFactory) -> Lake:
    return make_lake(tmp_path_factory.mktemp("sample") / "lake")


@pytest.fixture(scope="module")
def run(lake: Lake) -> Path:
    train(lake.root, lake.root.parent / "run", override(train_recipe("demo"), TINY))
    return lake.root.parent / "run"


@pytest.fixture(scope="module")
def sampler(run: Path) -> Sampler:
    return Sampler(run, device="cpu")


def noise(sampler: Sampler, seed: int) -> torch.Tensor:
    """(1, C, h, w): what a clip of this seed starts from."""
    return torch.randn(1, *sampler.clip["latent_shape"], generator=torch.Generator().manual_seed(seed))


def videos(sampler: Sampler, rate: float = 8, duration: float = DURATION, seed: int = 0, **more: object) -> np.ndarray:
    settings = SampleSettings(steps=4, warmup_steps=2, seed=seed)
    return sampler.videos(CAPTIONS[:1], rate, duration, settings, **more)[0]  # type: ignore[arg-type]


@pytest.mark.bit_identical
def test_a_seed_is_a_video(sampler: Sampler) -> None:
    film = videos(sampler)
    assert film.shape == (16, SIDE, SIDE, 3)
    assert film.dtype == np.uint8
    np.testing.assert_array_equal(film, videos(sampler))
    assert not np.array_equal(film, videos(sampler, seed=1))


def test_caption_and_start_are_heard(sampler: Sampler) -> None:
    film = videos(sampler)
    other = sampler.videos(CAPTIONS[1:], 8, DURATION, QUICK)[0]
    assert np.abs(film.astype(int) - other).mean() > 0.1
    assert np.abs(film.astype(int) - videos(sampler, start=4.0)).mean() > 0.01


def test_prompts_of_one_call_are_like_prompts_alone(sampler: Sampler) -> None:
    both = sampler.videos(CAPTIONS, 8, DURATION, QUICK)
    assert np.abs(both[0].astype(int) - videos(sampler)).max() <= 1
    # The second has the next seed: nearer to that than to the first one's.
    settings = [SampleSettings(steps=4, warmup_steps=2, seed=seed) for seed in (0, 1)]
    wrong, right = (sampler.videos(CAPTIONS[1:], 8, DURATION, chosen)[0] for chosen in settings)
    assert np.abs(both[1].astype(int) - right).max() <= 1
    assert np.abs(both[1].astype(int) - right).mean() < np.abs(both[1].astype(int) - wrong).mean()


@pytest.mark.parametrize(
    ("rate", "duration", "count"),
    [(23.976, 2.0, 47), (7.5, 2.0, 15), (8, 5.0, 40), (0.3, 2.0, 1), (1000, 0.01, 10), (12, 4.0, 48), (3, 1 / 3, 1)],
)
def test_any_rate_and_any_duration(sampler: Sampler, rate: float, duration: float, count: int) -> None:
    assert len(videos(sampler, rate, duration)) == count


def test_the_same_moment_looks_the_same_at_any_rate(sampler: Sampler) -> None:
    slow, fast = videos(sampler, 6), videos(sampler, 24)
    assert np.abs(slow.astype(int) - fast[::4]).max() <= 1


def test_past_the_window_the_last_frame_starts_the_next(sampler: Sampler) -> None:
    film, long = videos(sampler, 8, DURATION), videos(sampler, 8, 2.5 * DURATION)
    assert len(long) == 40
    assert np.abs(long[:16].astype(int) - film).max() <= 1
    first = sampler.sample(CAPTIONS[:1], None, [0], QUICK)
    second = sampler.sample(CAPTIONS[:1], None, [0], QUICK, first.read([1.0])[0])
    expected = sampler.codec.decode(second.read(torch.arange(16) / 16)[:, 0])
    assert np.abs((from_frames(long[16:32]) - expected).numpy()).max() < 2 / 255


def test_a_state_may_be_left_where_it_drifts(sampler: Sampler) -> None:
    """Without re-anchoring Euler's steps on the clip add up from the first frame's state; with it they do not."""
    gaps = {}
    for reanchor in (True, False):
        path = sampler.sample(CAPTIONS[:1], [0.0], [0], dataclasses.replace(QUICK, reanchor=reanchor))
        states, slopes = path.states[2:], path.derivatives[2:]  # the warm-up has two points
        summed = states[:1] + slopes[:-1].cumsum(0) / QUICK.steps
        gaps[reanchor] = float((states[1:] - summed).abs().max())
    assert gaps[False] < 1e-5
    assert gaps[True] > 1e-2


@pytest.mark.bit_identical
def test_an_image_starts_the_clip(sampler: Sampler, tmp_path: Path) -> None:
    paths = []
    for number in (1, 4):
        paths.append(tmp_path / f"{number}.png")
        Image.fromarray(frames(number)[0]).resize((40, 30)).save(paths[-1])
    one, other = (read_image(path, (SIDE, SIDE)) for path in paths)
    assert one.shape == (3, SIDE, SIDE)
    film = videos(sampler, image=one)
    assert film.shape == (16, SIDE, SIDE, 3)
    np.testing.assert_array_equal(film, videos(sampler, image=one))
    assert np.abs(film.astype(int) - videos(sampler, image=other)).mean() > 0.1
    latents = sampler.codec.encode(one[None]).latents
    start = sampler.sample(CAPTIONS[:1], [0.0], [3], QUICK, latents)
    assert float(start.grid[0]) == 0
    torch.testing.assert_close(start.states[0], latents + sampler.method.path.sigma_end * noise(sampler, 3))


def test_every_prompt_has_its_own_inversion_of_an_image(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A codec that inverts with the caption decodes with the same one."""
    sampler = Sampler(run, device="cpu")
    told: dict[str, list[object]] = {"encode": [], "decode": []}
    for name, calls in told.items():
        inner = getattr(sampler.codec, name)

        def noted(values: torch.Tensor, text: object = None, inner: Any = inner, calls: list[object] = calls) -> Any:
            calls.append(text)
            return inner(values, text)

        monkeypatch.setattr(sampler.codec, name, noted)
    made = sampler.videos(CAPTIONS, 4, DURATION, QUICK, image=torch.zeros(3, SIDE, SIDE))
    assert len(made) == 2
    assert told == {"encode": CAPTIONS, "decode": CAPTIONS}


def test_images_are_cropped_at_the_centre_and_turned_upright(tmp_path: Path) -> None:
    wide = np.zeros((10, 40, 3), np.uint8)
    wide[:, 15:25] = 255  # the middle, which is all that stays
    wide[:5, 15:25] = [255, 0, 0]
    Image.fromarray(wide).save(tmp_path / "wide.png")
    read = read_image(tmp_path / "wide.png", (10, 10))
    assert read[:, 1, 4].tolist() == [1, -1, -1]
    assert read[:, 8, 4].tolist() == [1, 1, 1]
    turned = Image.Exif()
    turned[0x0112] = 3  # held upside down
    Image.fromarray(wide).save(tmp_path / "turned.png", exif=turned)
    torch.testing.assert_close(read_image(tmp_path / "turned.png", (10, 10)), read.flip(1, 2))


def test_a_training_caption_is_told_exactly_as_in_training(sampler: Sampler, lake: Lake) -> None:
    for clip in Clips(lake, version.load(lake), "train").every():
        given = sampler.conditioning([clip.about["caption"]], [clip.about["clip_start"]])
        assert int(given.text_length[0]) == len(clip.members["text"])
        np.testing.assert_allclose(given.text[0].numpy(), clip.members["text"], rtol=ROUNDING, atol=ROUNDING)
        assert float(given.log_duration[0]) == pytest.approx(math.log(DURATION))


@pytest.mark.bit_identical  # a guidance of 101 makes rounding visible
def test_guidance_leads_away_from_the_empty_caption(sampler: Sampler) -> None:
    plain = sampler.sample(CAPTIONS[:1], [2.0], [0], QUICK).means[0]
    strong = SampleSettings(steps=4, warmup_steps=2, guidance=101.0)
    guided = sampler.sample(CAPTIONS[:1], [2.0], [0], strong).means[0]
    empty = sampler.conditioning([""], [0.0], start_given=False)
    with torch.no_grad():
        time = torch.full((1, 1), sampler.method.path.start)
        free = sampler.backbone(noise(sampler, 0)[:, None], time, empty)["mean"][:, 0] * sampler.method.mean_scale
    assert float((plain - free).abs().max()) > 1e-6
    torch.testing.assert_close(guided, free + 101 * (plain - free), atol=1e-3, rtol=1e-3)


def test_the_sampler_uses_the_average_of_the_asked_checkpoint(run: Path, sampler: Sampler) -> None:
    assert (sampler.step, Sampler(run, 20).step) == (30, 20)
    assert np.abs(videos(Sampler(run, 20, "cpu")).astype(int) - videos(sampler)).max() > 0
    with pytest.raises(FileNotFoundError, match=r"no checkpoint of step 5, only of \[20, 30\]"):
        Sampler(run, 5)


# --- the command ---


def sample(run: Path, out: Path, *more: str) -> int:
    return main(["--run", str(run), "--prompt", CAPTIONS[0], "--out", str(out), "--steps", "4", *more])


def test_the_command_writes_films(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sample(run, tmp_path / "film.webp", "--fps", "5", "--prompt", CAPTIONS[1]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["film-1.webp", "film-2.webp"]
    assert capsys.readouterr().out.splitlines()[1] == f"{tmp_path / 'film-2.webp'}  10 frames at 5 fps"
    assert sample(run, tmp_path / "strip.png", "--fps", "2.5", "--duration", "4") == 0
    with Image.open(tmp_path / "strip.png") as strip:
        assert strip.size == (10 * SIDE, SIDE)


def test_a_long_prompt_is_noted(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sample(run, tmp_path / "film.gif", "--prompt", "a square " * 200) == 0
    assert "note: the prompt is longer than the text encoder reads" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--fps", "0"], "fps is 0.0; it must be a number above 0"),
        (["--fps", "-3"], "fps is -3.0; it must be a number above 0"),
        (["--fps", "nan"], "fps is nan; it must be a number above 0"),
        (["--duration", "0"], "duration is 0.0; it must be a number of seconds above 0"),
        (["--duration", "inf"], "duration is inf;"),
        (["--start", "nan"], "start is nan; it must be a number of seconds"),
        (["--steps", "0"], "steps is 0; it must be at least 1"),
        (["--steps", "-2"], "steps is -2; it must be at least 1"),
        (["--solver", "magic"], "solver is 'magic'; it must be one of ddim, euler, midpoint, heun, rk4, adaptive"),
        (["--guidance", "inf"], "guidance is inf; it must be a number"),
        (["--seed", "-1"], "seed is -1; it must lie between 0 and 2^62"),
        (["--step", "7"], "no checkpoint of step 7, only of [20, 30]"),
        (["--image", "nowhere.png"], "--image nowhere.png: there is no such file"),
        (["--out", "film.avi"], "film.avi: cannot write .avi; use .mp4, .gif, .webp, .png"),
        (["--run", "nowhere"], "nowhere is no training run; make one with `vlfm train"),
    ],
)
def test_slips_are_one_line(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert sample(run, tmp_path / "film.gif", *options) == 1
    told = capsys.readouterr().err
    assert told.startswith("error: ")
    assert message in told
    assert told.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_picture_is_said(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "words.png").write_text("these are words")
    assert sample(run, tmp_path / "film.gif", "--image", str(tmp_path / "words.png")) == 1
    assert "words.png is no picture that can be read; use a png or jpeg" in capsys.readouterr().err
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(tmp_path / "half.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "half.png").read_bytes()[:3000])
    assert sample(run, tmp_path / "film.gif", "--image", str(tmp_path / "half.png")) == 1
    told = capsys.readouterr().err
    assert "half.png cannot be read (" in told
    assert told.count("\n") == 1
    assert not (tmp_path / "film.gif").exists()


def test_a_run_of_another_program_is_refused(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    about = Run(tmp_path / "run").read()
    about["recipe"]["magic"] = 1
    (tmp_path / "run" / "run.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match=r"run.json is of another version of vlfm \(.*magic.*\); train a new run"):
        Sampler(tmp_path / "run")
