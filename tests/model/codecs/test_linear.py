"""The linear codec: an orthonormal transform whose error is known, and whose spec rebuilds it."""

from __future__ import annotations

import json
import math
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from model.codecs import linear as codec_linear
from model.codecs.base import Codec
from model.codecs.factory import codec_from_spec
from model.codecs.linear import LinearCodec, LinearSettings, basis_order, block_basis
from model.metrics.pictures import psnr
from tests.model.codecs.test_base import picture


def test_factor_one_with_three_channels_is_the_identity() -> None:
    frames = picture()
    codec = LinearCodec(LinearSettings(factor=1, channels=3))
    assert codec.scale == 1
    assert torch.equal(codec.encode(frames).latents, frames)
    assert torch.equal(codec.decode(frames), frames)
    assert torch.equal(LinearCodec(LinearSettings(1, 3, scale=2.0)).encode(frames).latents, 2 * frames)


@pytest.mark.parametrize("factor", [1, 2, 4, 8])
def test_the_basis_is_orthonormal_and_complete(factor: int) -> None:
    basis = block_basis(factor)
    np.testing.assert_allclose(basis @ basis.T, np.eye(3 * factor**2), atol=1e-12)
    assert len(set(basis_order(factor))) == 3 * factor**2


def test_means_and_low_frequencies_of_grey_come_first() -> None:
    assert basis_order(4)[:6] == [(0, 0, 0), (1, 0, 0), (0, 0, 1), (0, 1, 0), (0, 1, 1), (2, 0, 0)]
    grey = LinearCodec(LinearSettings(factor=4, channels=1))
    frames = torch.full((1, 3, 8, 8), 0.5)
    torch.testing.assert_close(grey.decode(grey.encode(frames).latents), frames)


def discarded_energy(frames: Tensor, factor: int, channels: int) -> Tensor:
    """Mean square of the coefficients that are not kept, a figure a frame: the transform is orthonormal (Parseval)."""
    blocks = functional.pixel_unshuffle(frames.double(), factor)
    discarded = torch.from_numpy((np.eye(3) if (factor, channels) == (1, 3) else block_basis(factor))[channels:])
    lost = torch.einsum("kc,nchw->nkhw", discarded, blocks)
    return lost.square().sum((1, 2, 3)) / frames[0].numel()


@pytest.mark.parametrize(("factor", "channels"), [(1, 1), (1, 2), (2, 5), (4, 6), (4, 12), (4, 48), (8, 20)])
def test_the_round_trips_error_is_the_discarded_energy(factor: int, channels: int) -> None:
    generator = torch.Generator().manual_seed(0)
    frames = torch.cat([picture(), torch.rand(2, 3, 32, 32, generator=generator) * 2 - 1])
    codec = LinearCodec(LinearSettings(factor, channels))
    error = (codec.decode(codec.encode(frames).latents, clamp=False) - frames).double().square().mean((1, 2, 3))
    torch.testing.assert_close(error, discarded_energy(frames, factor, channels), rtol=1e-4, atol=1e-10)


def test_the_default_scale_keeps_the_mean_square_of_the_pixels() -> None:
    frames = picture()
    for factor, channels in ((2, 12), (4, 48)):
        latents = LinearCodec(LinearSettings(factor, channels)).encode(frames).latents
        assert float(latents.square().mean()) == pytest.approx(float(frames.square().mean()), rel=1e-5)
    assert LinearCodec(LinearSettings(4, 12)).scale == math.sqrt(12 / 48)


def test_another_scale_multiplies_the_latents_and_is_undone() -> None:
    frames = picture()
    plain, scaled = LinearCodec(LinearSettings(4, 12)), LinearCodec(LinearSettings(4, 12, scale=1.5))
    torch.testing.assert_close(scaled.encode(frames).latents, plain.encode(frames).latents * 3.0)
    torch.testing.assert_close(scaled.decode(scaled.encode(frames).latents), plain.decode(plain.encode(frames).latents))
    assert scaled.id != plain.id


def test_decode_clamps_unless_told_otherwise() -> None:
    codec = LinearCodec(LinearSettings(4, 12))
    latents = codec.encode(picture()).latents * 5
    assert codec.decode(latents).abs().max() <= 1
    assert codec.decode(latents, clamp=False).abs().max() > 1


def test_shapes() -> None:
    codec: Codec = LinearCodec(LinearSettings(4, 12))
    assert codec.latent_shape(48, 64) == (12, 12, 16)
    assert codec.encode(picture(3)).latents.shape == (3, 12, 8, 8)
    assert codec.encode(torch.zeros(0, 3, 32, 32)).latents.shape == (0, 12, 8, 8)
    assert codec.decode(torch.zeros(0, 12, 8, 8)).shape == (0, 3, 32, 32)


def test_twelve_channels_keep_real_films_above_27_db(real_films: Path) -> None:
    imageio_ffmpeg = pytest.importorskip("imageio_ffmpeg")
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-nostdin", "-threads", "1"]
    command += ["-i", str(real_films / "carphone.mp4"), "-frames:v", "8", "-vf", "scale=64:64:flags=area"]
    raw = subprocess.run([*command, "-f", "rawvideo", "-pix_fmt", "rgb24", "-"], check=True, capture_output=True).stdout
    frames = torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(-1, 64, 64, 3).permute(0, 3, 1, 2) / 127.5 - 1
    codec = LinearCodec(LinearSettings(4, 12))
    assert psnr(codec.decode(codec.encode(frames).latents), frames).min() > 27


@pytest.mark.parametrize(
    "codec",
    [
        LinearCodec(),
        LinearCodec(LinearSettings(1, 3)),
        LinearCodec(LinearSettings(2, 5, scale=0.7)),
        LinearCodec(LinearSettings(4, 12, grey=-0.65)),
        LinearCodec(LinearSettings(1, 3, grey=0.25)),
    ],
)
def test_a_linear_spec_rebuilds_the_codec(codec: LinearCodec) -> None:
    rebuilt = codec_from_spec(json.loads(json.dumps(codec.spec())))
    assert rebuilt.id == codec.id
    frames = picture()
    torch.testing.assert_close(rebuilt.encode(frames).latents, codec.encode(frames).latents, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("factor", "channels"), [(1, 3), (4, 1), (8, 12)])
def test_latents_of_zero_are_the_grey_that_is_named(factor: int, channels: int) -> None:
    """Nothing else changes: what is lost, and all latents but by a constant; 0 is the codec of before."""
    plain, dark = (LinearCodec(LinearSettings(factor, channels, 0.5, grey)) for grey in (0.0, -0.65))
    frames = picture()
    torch.testing.assert_close(
        dark.decode(torch.zeros(1, channels, 2, 2)), torch.full((1, 3, 2 * factor, 2 * factor), -0.65)
    )
    moved = dark.encode(frames).latents - plain.encode(frames).latents
    torch.testing.assert_close(moved, plain.encode(torch.full_like(frames, 0.65)).latents, rtol=0, atol=1e-5)
    torch.testing.assert_close(
        dark.decode(dark.encode(frames).latents), plain.decode(plain.encode(frames).latents), rtol=0, atol=1e-5
    )
    assert "grey" not in plain.spec()
    assert dark.id == f"{plain.id}-grey-0.65"


def test_the_order_of_the_basis_hangs_on_no_last_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """It enters the spec's digest, and is sorted by powers that a machine's library may round otherwise."""
    for factor in (1, 2, 4, 8, 16):
        order = basis_order(factor)
        for towards in (-math.inf, math.inf):
            with monkeypatch.context() as patch:
                energy = tuple(math.nextafter(value, towards) for value in codec_linear.COLOUR_ENERGY)
                patch.setattr(codec_linear, "COLOUR_ENERGY", energy)
                assert basis_order(factor) == order


def test_wrong_specs_and_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="use 'linear' or 'diffusers'"):
        codec_from_spec({"kind": "jpeg"})
    with pytest.raises(ValueError, match="unknown codec setting chanels: the linear codec reads kind, factor"):
        codec_from_spec({"kind": "linear", "chanels": 12})
    with pytest.raises(ValueError, match="integers"):
        codec_from_spec({"kind": "linear", "channels": "12"})
    with pytest.raises(ValueError, match="grey a number"):
        codec_from_spec({"kind": "linear", "grey": "dark"})
    with pytest.raises(ValueError, match=r"grey is 2.0, a pixel lies in \[-1, 1\]"):
        codec_from_spec({"kind": "linear", "grey": 2.0})
    with pytest.raises(ValueError, match=r"made with basis 0000.*ingest again"):
        codec_from_spec({"kind": "linear", "basis": "0000"})
    with pytest.raises(ValueError, match="offers 1 to 48"):
        LinearCodec(LinearSettings(4, 49))
    with pytest.raises(ValueError, match="factor >= 1"):
        LinearCodec(LinearSettings(0, 3))
    with pytest.raises(ValueError, match="positive and finite"):
        LinearCodec(LinearSettings(4, 12, scale=0.0))
