"""The figures of a codec beside what they are compared with, each against a slow or known answer."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model.codec_train import CodecRecipe, train_codec
from model.codecs.networks import new_autoencoder, scale_latents, start_from_blocks
from model.training.codec_data import Footage, dead_leaves, footage
from model.video import from_frames
from pipeline.experiments import codec as experiment
from pipeline.experiments.codec import BlockComponents, NoiseLoss, by_film, main, noise_statistics
from tests.model.tiny_lake import make_lake

TINY = CodecRecipe(
    vae_steps=2, vae_batch=2, crop=32, unet_steps=2, unet_batch=2, sides=(32,), latents=4, hold_out=(),
    channels=4, vae_learning_rate=0.1, unet_widths=(16, 16, 16),
)  # fmt: skip


@pytest.fixture(scope="module")
def lake(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_lake(tmp_path_factory.mktemp("figures") / "lake").root


@pytest.fixture(scope="module")
def folder(lake: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("figures")
    return train_codec([lake], made / "run", made / "small", TINY)


def test_blocks_are_kept_as_their_leading_components() -> None:
    random = np.random.default_rng(0)
    mixing = random.standard_normal((4, 192))
    hidden = random.standard_normal((6, 2, 2, 4)) @ mixing * 0.02  # blocks of exactly four components
    pictures = torch.from_numpy(
        hidden.reshape(6, 2, 2, 3, 8, 8).transpose(0, 3, 1, 4, 2, 5).reshape(6, 3, 16, 16)
    ).float()
    assert float((BlockComponents(pictures, 4).round_trip(pictures) - pictures).abs().max()) < 1e-5
    # With fewer numbers the error is the sum of the smaller eigenvalues of the blocks' covariance.
    blocks = hidden.reshape(-1, 192)
    spread = np.linalg.eigvalsh(np.cov(blocks.T, bias=True))
    error = (BlockComponents(pictures, 2).round_trip(pictures) - pictures).double().square().mean()
    assert float(error) == pytest.approx(spread[:-2].sum() / 192, rel=1e-3)


def test_an_autoencoder_begins_as_the_components_of_blocks() -> None:
    random = np.random.default_rng(0)
    shown = torch.stack([dead_leaves(32, random) for _ in range(32)]) * 2 - 1
    torch.manual_seed(0)
    for channels in (4, 24):
        vae = new_autoencoder((48, 96, 192), channels)
        start_from_blocks(vae, shown)
        network: Any = vae
        with torch.no_grad():
            latents = network.encode(shown).latent
            made = network.decode(latents).sample
        expected = BlockComponents(shown, channels).round_trip(shown)
        assert float((made.clamp(-1, 1) - expected).abs().mean()) < 0.01
        assert float((made - shown).square().mean()) < 1.05 * float((expected - shown).square().mean())
        assert latents.std((0, 2, 3)).tolist() == pytest.approx([1.0] * channels, abs=0.02)
        deviation = torch.rand(channels) + 0.5
        scale_latents(vae, deviation)
        with torch.no_grad():
            scaled = network.encode(shown).latent
            again = network.decode(scaled).sample
        assert torch.allclose(scaled * deviation.view(-1, 1, 1), latents, atol=1e-4)
        assert torch.allclose(again, made, atol=1e-3)


def test_white_noise_is_told_from_smooth_latents() -> None:
    generator = torch.Generator().manual_seed(0)
    white = torch.randn(16, 4, 16, 16, generator=generator) * torch.tensor([1.0, 0.5, 2.0, 1.0]).view(1, 4, 1, 1)
    told = noise_statistics(white)
    assert told["noise_std"] == pytest.approx([1.0, 0.5, 2.0, 1.0], rel=0.05)
    assert told["noise_correlation"] < 0.05
    smooth = torch.nn.functional.avg_pool2d(white, 3, 1, 1)
    assert noise_statistics(smooth)["noise_correlation"] > 0.5


def test_the_gaussian_is_the_best_of_its_kind(folder: Path) -> None:
    loss = NoiseLoss(folder)
    generator = torch.Generator().manual_seed(1)
    spreads = torch.tensor([0.5, 1.0, 2.0, 3.0])
    latents = torch.randn(64, 4, 8, 8, generator=generator) * spreads.view(1, 4, 1, 1)
    told = loss.of_gaussian(latents)
    # The slow way: the linear predictor of the noise, fitted by least squares at each level and channel.
    errors = []
    for level in loss.levels.tolist():
        for channel in range(4):
            clean = latents[:, channel].flatten().double()
            noise = torch.randn(clean.shape, generator=generator, dtype=torch.float64)
            noisy = level**0.5 * clean + (1 - level) ** 0.5 * noise
            errors.append(float((noise - noisy * (noise @ noisy) / (noisy @ noisy)).square().mean()))
    assert told == pytest.approx(float(np.mean(errors)), rel=0.05)


def test_the_noise_is_the_same_for_every_caption(folder: Path) -> None:
    loss = NoiseLoss(folder)
    latents = torch.randn(2, 4, 4, 4)
    assert loss.of_clip(latents, "a", 0) == pytest.approx(loss.of_clip(latents, "a", 0), rel=1e-4)
    assert loss.of_clip(latents, "a", 0) != loss.of_clip(latents, "a", 1)
    # What an untrained UNet makes of a caption is little beside what another noise does.
    assert abs(loss.of_clip(latents, "a", 0) - loss.of_clip(latents, "b", 0)) < 1e-2


def test_all_figures_of_a_folder(
    lake: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--codec", str(folder), "--lake", str(lake), "--held-out", str(lake), "--generated", str(lake)]
    options += ["--out", str(tmp_path / "out"), "--frames", "2"]
    with pytest.raises(ValueError, match=r"16, 16.*size=\[128,128\]"):
        main(options)

    def larger(lakes: list[Path]) -> list[list[Footage]]:
        return [
            [dataclasses.replace(clip, frames=clip.frames.repeat(4, 1).repeat(4, 2)) for clip in clips]
            for clips in footage(lakes)
        ]

    monkeypatch.setattr(experiment, "footage", larger)
    monkeypatch.setattr(experiment, "DEPTHS", (0, 2))
    assert main([*options, "--side", "64"]) == 0
    printed = capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "figures.json").read_text())
    clips = footage([lake])[0]
    assert len(found["films"]) == found["captions"]["clips"] == len({clip.film for clip in clips})
    # Two steps of training teach nothing: the block analysis, fitted on these very frames, is far better.
    assert all(row["psnr_blocks"] > row["psnr_autoencoder"] + 3 for row in found["films"])
    assert all(row["ssim_blocks"] > row["ssim_autoencoder"] for row in found["films"])
    generated = found["generated"]  # the very films, so the same figures
    for name in ("blocks", "autoencoder"):
        rows = [row[f"psnr_{name}"] for row in found["films"]]
        assert generated[name]["mean"] == pytest.approx(np.mean(rows), abs=1e-3)
        assert generated[name]["worst"] == pytest.approx(min(rows), abs=1e-3)
    assert found["noise_films"]["below"] < 0.15
    assert all(Path(row["film"]).with_suffix(".png").name in os.listdir(tmp_path / "out") for row in found["films"])
    assert all(row["film"] in printed for row in found["films"])
    assert "% of 7 clips" in printed
    assert [row["depth"] for row in found["depths"]] == [0, 2]
    assert all(row["smoothness"] > 0 for row in found["depths"])


def test_frames_of_a_film_are_spread(lake: Path) -> None:
    films = by_film(footage([lake])[0], 3)
    caption, frames = films["film-1.mp4"]
    clip = next(clip for clip in footage([lake])[0] if clip.film == "film-1.mp4")
    assert caption == clip.caption
    assert torch.equal(frames, from_frames(clip.frames[[0, 3, 7]]))
    assert json.dumps(noise_statistics(torch.randn(2, 4, 4, 4)))
