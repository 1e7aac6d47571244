"""The codecs that come with the package, judged on films it never saw; docs/experiments.md has the whole table."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from model.codecs.diffusers import DiffusersCodec, DiffusersSettings
from model.codecs.factory import codec_from_spec
from model.metrics.pictures import psnr
from model.video import from_frames
from model.weights import SHIPPED, find_weights
from pipeline.corpus import make_corpus
from pipeline.experiments.codec import BlockComponents, noise_statistics
from pipeline.media.decode import decode, probe, select_frames

SIDE = 128
CHANNELS = {"vlfm-small": 4, "vlfm-small-2": 24}
NAMES = tuple(CHANNELS)
GAIN = {"vlfm-small": 1.5, "vlfm-small-2": 0.5}
"""Decibels by which a codec must beat the components of blocks that have as many numbers."""
HELD_OUT = ("carphone.mp4", "armwrestling.mp4")

SPREAD = {"vlfm-small": (0.8, 1.2), "vlfm-small-2": (0.6, 1.45)}
"""Standard deviations of inverted channels; the second codec's UNet was trained too briefly for less."""


def frames_of(film: Path, count: int, side: int = SIDE, seconds: float = 2.0) -> torch.Tensor:
    """`count` frames spread over the film's first seconds, (count, 3, side, side) in [-1, 1]."""
    window = select_frames(probe(film), 0.0, seconds, 8.0)
    frames = next(iter(decode(film, [window], (side, side))))
    return from_frames(frames[np.linspace(0, len(frames) - 1, count).astype(int)])


@pytest.fixture(scope="module", params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def plain(name: str) -> DiffusersCodec:
    return DiffusersCodec.from_pretrained(name, DiffusersSettings(inversion_depth=0))


@pytest.fixture(scope="module")
def full(name: str) -> DiffusersCodec:
    return DiffusersCodec.from_pretrained(name, DiffusersSettings(ddim_steps=20, inversion_depth=20, refinements=3))


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, torch.Tensor]:
    """A caption and frames of a generated film whose seed was not trained on."""
    folder = tmp_path_factory.mktemp("drawn")
    caption = make_corpus(folder, seed=2, films=1).read_text().splitlines()[1].split(",")[1]
    return caption, frames_of(next(path for path in folder.iterdir() if path.name.startswith("01")), 4)


def test_the_folder_is_small_safe_and_recorded(name: str) -> None:
    folder = SHIPPED / name
    weights = sorted(folder.rglob("*.safetensors"))
    assert {path.parent.name for path in weights} == {"vae", "unet", "text_encoder"}
    assert sum(path.stat().st_size for path in weights) <= 20e6
    assert not [path for path in folder.rglob("*") if path.suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt")]
    record = json.loads((folder / "training.json").read_text())
    assert not set(HELD_OUT) & {Path(film).name for film in record["films"]}
    assert "licence" in (folder / "README.md").read_text().lower()
    for file in folder.rglob("*.json"):
        assert "/home" not in file.read_text(), file


def test_it_is_found_by_name_wherever_one_works(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = find_weights(name)
    assert (found.source, found.name, found.revision) == (name, name, None)
    codec = codec_from_spec({"kind": "diffusers", "source": name, "inversion_depth": 0})
    assert (codec.channels, codec.factor) == (CHANNELS[name], 8)
    assert codec.spec()["source"] == name
    assert str(SHIPPED) not in json.dumps(codec.spec()) + codec.id
    with pytest.raises(ValueError, match="leave the revision out"):
        find_weights(name, "main")


def test_generated_films_come_back(plain: DiffusersCodec, drawn: tuple[str, torch.Tensor]) -> None:
    _, frames = drawn
    latents = plain.encode(frames).latents
    assert 0.5 < float(latents.std()) < 2
    assert float(psnr(plain.decode(latents), frames).mean()) > 30


def test_inversion_gives_noise_and_comes_back(
    plain: DiffusersCodec, full: DiffusersCodec, drawn: tuple[str, torch.Tensor]
) -> None:
    caption, frames = drawn
    certificate = full.encode(frames, caption)
    alone = psnr(plain.decode(plain.encode(frames).latents), frames).mean()
    assert float(psnr(full.decode(certificate.latents, caption), frames).mean()) > min(float(alone) - 1.5, 40)
    assert float(certificate.round_trip.min()) > 30


@pytest.mark.parametrize("film", HELD_OUT)
def test_films_it_never_saw(
    film: str, name: str, plain: DiffusersCodec, full: DiffusersCodec, real_films: Path
) -> None:
    seen = [path for path in real_films.iterdir() if path.suffix in (".mp4", ".mkv") and path.name not in HELD_OUT]
    # The linear codec of blocks that knows natural films alone: a harder rival than one fitted on all that was trained
    # on, whose numbers go to the loud colours of generated films.
    blocks = BlockComponents(torch.cat([frames_of(film, 8) for film in seen]), plain.channels)
    frames = frames_of(real_films / film, 4)
    alone = float(psnr(plain.decode(plain.encode(frames).latents), frames).mean())
    assert alone > float(psnr(blocks.round_trip(frames), frames).mean()) + GAIN[name]
    inverted = full.encode(frames, "").latents
    assert float(psnr(full.decode(inverted, ""), frames).mean()) > alone - 1.5
    noise = noise_statistics(inverted)
    least, most = SPREAD[name]
    assert all(least < value < most for value in noise["noise_std"]), noise
    assert noise["noise_correlation"] < 0.2, noise


@pytest.mark.parametrize("film", HELD_OUT)
@pytest.mark.parametrize("side", [64, 128])
def test_films_that_nobody_trained_on_come_back_sharp(film: str, side: int, real_films: Path) -> None:
    codec = DiffusersCodec.from_pretrained("vlfm-small-2", DiffusersSettings(inversion_depth=0))
    frames = frames_of(real_films / film, 16, side, seconds=60.0)
    assert float(psnr(codec.decode(codec.encode(frames).latents), frames).mean()) > 28


def test_loading_says_nothing(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    DiffusersCodec.from_pretrained(name, DiffusersSettings(ddim_steps=20, inversion_depth=1)).encode(
        torch.zeros(1, 3, 64, 64), "a ball"
    )
    told = capfd.readouterr()
    assert told.out + told.err == ""
