"""Training of a small codec: on frames of a lake, resumed bit by bit, written as a folder that the codec reads."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from model import codec_train
from model.codec_train import CodecRecipe, captioned, main, pictures, train_codec
from model.codecs.ddim import DDIMSchedule, noise_levels
from model.codecs.diffusers import DiffusersCodec, DiffusersSettings
from model.settings import override
from model.stop import Stopped
from model.text.encoder import pretrained_text_encoder
from model.training.codec_data import Footage, contrasted, dead_leaves, footage, random_crop, recoloured
from model.weights import CodecUnavailable
from storage.layout import Lake
from tests.model.tiny_lake import make_lake

TINY = CodecRecipe(
    vae_steps=3, vae_batch=2, crop=32, unet_steps=3, unet_batch=2, sides=(32,), latents=4, save_every=2,
    hold_out=(), channels=6, block_pictures=64, unet_widths=(16, 16, 16),
)  # fmt: skip


@pytest.fixture(scope="module")
def lake(tmp_path_factory: pytest.TempPathFactory) -> Lake:
    return make_lake(tmp_path_factory.mktemp("codec") / "lake")


@pytest.fixture(scope="module")
def trained(lake: Lake, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("codec")
    return train_codec([lake.root], folder / "run", folder / "small", TINY)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {
        f"{part}/{name}": value
        for part, file in (("vae", "diffusion_pytorch_model"), ("unet", "diffusion_pytorch_model"),
                           ("text_encoder", "model"))
        for name, value in load_file(folder / part / f"{file}.safetensors").items()
    }  # fmt: skip


def test_the_folder_is_a_codec_with_its_text_encoder(trained: Path) -> None:
    plain = DiffusersCodec.from_pretrained(trained, DiffusersSettings(inversion_depth=0))
    assert (plain.channels, plain.factor) == (6, 8)
    frames = torch.rand(2, 3, 64, 32) * 2 - 1
    latents = plain.encode(frames).latents
    assert latents.shape == (2, 6, 8, 4)
    assert plain.decode(latents).shape == frames.shape
    full = DiffusersCodec.from_pretrained(trained, DiffusersSettings(ddim_steps=10, inversion_depth=2, refinements=1))
    assert full.encode(frames, "a ball").latents.shape == (2, 6, 8, 4)
    embedding, _ = pretrained_text_encoder(trained).encode(["a red ball"])
    assert embedding.shape == (1, 77, 128)
    assert {value.dtype for value in weights(trained).values()} == {torch.float16}
    assert not [path for path in trained.rglob("*") if path.suffix in (".bin", ".pt", ".pkl", ".ckpt")]


def test_every_channel_of_the_latents_has_unit_variance(trained: Path, lake: Lake) -> None:
    # The pictures that the latents were made of, through the codec as it was written.
    random = np.random.default_rng([TINY.seed, 2, 32, 0])
    shown = torch.stack([captioned(footage([lake.root]), 32, TINY, random)[0] for _ in range(TINY.latents)]) * 2 - 1
    latents = DiffusersCodec.from_pretrained(trained, DiffusersSettings(inversion_depth=0)).encode(shown).latents
    assert latents.std((0, 2, 3)).tolist() == pytest.approx([1.0] * 6, abs=0.02)


def test_training_starts_from_a_codec_of_fewer_channels(trained: Path, lake: Lake, tmp_path: Path) -> None:
    wider = dataclasses.replace(TINY, channels=8, vae_steps=1, unet_steps=1, unet_learning_rate=0)
    made = train_codec([lake.root], tmp_path / "run", tmp_path / "wider", wider, trained)
    assert json.loads((made / "training.json").read_text())["recipe"]["start"] == "small"
    old, new = weights(trained), weights(made)
    assert (len(old["unet/conv_out.bias"]), len(new["unet/conv_out.bias"])) == (6, 8)
    for name in old:
        if not name.startswith("vae/"):
            assert torch.equal(new[name][tuple(map(slice, old[name].shape))], old[name]), name
    with pytest.raises(ValueError, match="at least its channels"):
        train_codec([lake.root], tmp_path / "other", tmp_path / "less", dataclasses.replace(TINY, channels=5), trained)
    with pytest.raises(ValueError, match="another recipe"):
        train_codec([lake.root], tmp_path / "run", made, wider)
    with pytest.raises(CodecUnavailable, match="neither an existing folder"):
        train_codec([lake.root], tmp_path / "none", made, wider, "nothing")


def test_the_record_names_films_recipe_and_losses(trained: Path, lake: Lake) -> None:
    record = json.loads((trained / "training.json").read_text())
    assert record["recipe"]["vae_steps"] == 3
    assert record["films"] == sorted({clip.film for clip in footage([lake.root])[0]})
    assert set(record["losses"]) == {"vae", "unet"}
    assert str(lake.root) not in json.dumps(record)


@pytest.mark.parametrize("stage", ["autoencoder_stage", "denoiser_stage"])
def test_a_stopped_training_goes_on_bit_by_bit(
    stage: str, trained: Path, lake: Lake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = getattr(codec_train, stage)

    def stopping(*arguments: Any) -> codec_train.Stage:
        made = make(*arguments)
        loss = made.loss

        def stopped(step: int) -> dict[str, torch.Tensor]:
            if step == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return dict(loss(step))

        return dataclasses.replace(made, loss=stopped)

    monkeypatch.setattr(codec_train, stage, stopping)
    with pytest.raises(Stopped, match="step 2"):
        train_codec([lake.root], tmp_path / "run", tmp_path / "small", TINY)
    assert not (tmp_path / "small").exists()
    monkeypatch.undo()
    train_codec([lake.root], tmp_path / "run", tmp_path / "small", TINY)
    mine, theirs = weights(tmp_path / "small"), weights(trained)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_another_recipe_is_refused(trained: Path, lake: Lake) -> None:
    with pytest.raises(ValueError, match="another recipe"):
        train_codec([lake.root], trained.parent / "run", trained, dataclasses.replace(TINY, seed=1))


def test_films_that_are_held_out_are_never_read(lake: Lake, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    names = sorted({Path(clip.film).stem for clip in footage([lake.root])[0]})
    left = footage([lake.root], names[:1])[0]
    assert {Path(clip.film).stem for clip in left} == set(names[1:])
    with pytest.raises(ValueError, match="besides the held-out films"):
        footage([lake.root], names)
    folders = ["--lake", str(lake.root), "--run", str(tmp_path / "run"), "--out", str(tmp_path / "out")]
    assert main([*folders, "--set", f"hold_out={json.dumps(names)}"]) == 1
    assert "besides the held-out films" in capsys.readouterr().err
    assert "carphone" in CodecRecipe().hold_out
    assert "armwrestling" in CodecRecipe().hold_out


def test_crops_keep_to_the_frame_and_the_range() -> None:
    ramp = np.broadcast_to(np.arange(0, 240, 4, dtype=np.uint8)[None, None, :, None], (2, 40, 60, 3))
    clip = Footage("film.mp4", "a ramp", np.array(ramp))
    random = np.random.default_rng(0)
    for _ in range(50):
        crop = random_crop(clip, 16, 0.5, random)
        assert crop.shape == (3, 16, 16)
        slope = float((crop[0, 8, -3] - crop[0, 8, 2]) * 255 / 11 / 4)  # frame columns for one of the crop's
        assert 20 / 16 - 0.15 <= slope <= 40 / 16 + 0.15
        changed = recoloured(crop, random)
        assert changed.shape == crop.shape
        assert 0 <= float(changed.min()) <= float(changed.max()) <= 1
    assert random_crop(clip, 40, 0.1, random).shape == (3, 40, 40)


def test_contrast_goes_around_the_mean_colour() -> None:
    random = np.random.default_rng(0)
    picture = torch.rand(3, 8, 8) * 0.3 + torch.tensor([0.3, 0.4, 0.5]).view(3, 1, 1) - 0.15
    around = picture - picture.mean((1, 2), keepdim=True)
    factors = []
    for _ in range(50):
        changed = contrasted(picture, 1.4, random)
        assert torch.allclose(changed.mean((1, 2)), picture.mean((1, 2)), atol=1e-4)
        factors.append(float((changed - changed.mean((1, 2), keepdim=True)).std() / around.std()))
    assert 1 / 1.4 - 1e-3 <= min(factors) < 0.8 < 1.25 < max(factors) <= 1.4 + 1e-3
    assert torch.allclose(contrasted(picture, 1.0, random), picture, atol=1e-6)


def test_leaves_are_pictures_with_edges() -> None:
    leaves = dead_leaves(32, np.random.default_rng(3))
    assert leaves.shape == (3, 32, 32)
    assert 0 <= float(leaves.min()) <= float(leaves.max()) <= 1
    assert float(leaves.std()) > 0.05
    assert torch.equal(leaves, dead_leaves(32, np.random.default_rng(3)))


def test_fields_change_the_crops(lake: Lake) -> None:
    lakes = footage([lake.root])
    first = pictures(lakes, 4, TINY, 0)
    assert torch.equal(first, pictures(lakes, 4, TINY, 0))
    for change in ({"seed": 1}, {"leaves": 1.0}):
        assert not torch.equal(first, pictures(lakes, 4, dataclasses.replace(TINY, **change), 0))
    assert pictures(lakes, 4, dataclasses.replace(TINY, crop=16), 0).shape == (4, 3, 16, 16)
    assert not torch.equal(first, pictures(lakes, 4, TINY, 1))


def test_noise_levels_are_those_of_the_inversion() -> None:
    levels = noise_levels()
    schedule = DDIMSchedule(10)
    for (a, b), here, below in zip(schedule.steps, schedule.timesteps, (0, *schedule.timesteps[:-1]), strict=True):
        assert a == pytest.approx(math.sqrt(levels[below] / levels[here]), rel=1e-5)
        assert b == pytest.approx(math.sqrt(1 - levels[below]) - a * math.sqrt(1 - levels[here]), rel=1e-4, abs=1e-6)


def test_sides_and_films_are_set_in_any_number() -> None:
    recipe = override(CodecRecipe(), {"sides": "[64]", "hold_out": '["a", "b", "c"]'})
    assert (recipe.sides, recipe.hold_out) == ((64,), ("a", "b", "c"))
    with pytest.raises(ValueError, match="any number of values"):
        override(CodecRecipe(), {"sides": "64"})
