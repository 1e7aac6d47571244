"""Codecs: the linear one's error is what it says, the diffusers one takes any folder and refuses what would poison."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from model.codecs import batches as codec_batches
from model.codecs.base import Codec
from model.codecs.diffusers import DiffusersCodec, DiffusersSettings, filled
from model.codecs.factory import codec_class, codec_from_spec
from model.codecs.linear import LinearCodec
from model.weights import CodecUnavailable
from tests.model.tiny_diffusion import tiny_diffusion, tiny_vae


def picture(count: int = 2, size: int = 32) -> Tensor:
    """Smooth coloured pictures (count, 3, size, size) in [-1, 1], each another."""
    y, x = torch.meshgrid(torch.linspace(0, 1, size), torch.linspace(0, 1, size), indexing="ij")
    phase = torch.arange(count).view(-1, 1, 1, 1) + torch.tensor([0.0, 0.7, 1.9]).view(1, 3, 1, 1)
    return 0.9 * torch.sin(5 * x + 3 * y * x + phase)


# --- what every codec refuses ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_diffusion(tmp_path_factory.mktemp("hub") / "tiny")


@pytest.fixture(scope="module")
def deep(folder: Path) -> DiffusersCodec:
    """Inverts two of ten levels: enough to need UNet and text, shallow enough for random weights to come back."""
    return DiffusersCodec.from_pretrained(folder, DiffusersSettings(ddim_steps=10, inversion_depth=2))


@pytest.fixture(params=["linear", "diffusers"])
def any_codec(request: pytest.FixtureRequest) -> Codec:
    return LinearCodec() if request.param == "linear" else request.getfixturevalue("deep")


def test_the_contract_says_what_a_codec_does(any_codec: Codec, folder: Path) -> None:
    """Whoever uses a codec asks it, and never for its class."""
    inverts = isinstance(any_codec, DiffusersCodec)
    found = any_codec.encode(picture(), "a ball")
    assert found.latents.shape == (2, *any_codec.latent_shape(32, 32))
    for figure in (found.residual, found.round_trip):
        assert figure is None if not inverts else figure is not None and figure.shape == (2,)
    assert (any_codec.without_inversion(picture()) is not None) == inverts
    assert codec_class(any_codec.spec()).wants_gpu == any_codec.wants_gpu == inverts
    flat = DiffusersCodec.from_pretrained(folder, DiffusersSettings(inversion_depth=0))
    assert flat.encode(picture()).residual is flat.without_inversion(picture()) is None


def test_unfit_frames_are_refused_with_the_mend(any_codec: Codec) -> None:
    frames = picture()
    poisoned = frames.clone()
    poisoned[1, 0, 3, 3] = math.nan
    with pytest.raises(ValueError, match=r"frames \[1\] hold NaN"):
        any_codec.encode(poisoned)
    with pytest.raises(ValueError, match=r"lie in \[.*\].*frames / 127\.5 - 1"):
        any_codec.encode((frames + 1) * 127.5)
    with pytest.raises(TypeError, match=r"uint8.*127.5"):
        any_codec.encode(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"\(N, 3, H, W\): permute"):
        any_codec.encode(frames.permute(0, 2, 3, 1))
    with pytest.raises(ValueError, match=r"30 x 32 pixels.*scale or crop them to 2. x 32"):
        any_codec.encode(frames[:, :, :30])
    with pytest.raises(ValueError, match="scale or crop"):
        any_codec.latent_shape(33, 32)


def test_unfit_latents_are_refused(any_codec: Codec) -> None:
    latents = torch.zeros(2, *any_codec.latent_shape(32, 32))
    with pytest.raises(ValueError, match=r"this codec decodes \(N,"):
        any_codec.decode(latents[:, :1])
    latents[0] = math.inf
    with pytest.raises(ValueError, match=r"latents \[0\] hold NaN or infinity"):
        any_codec.decode(latents)


# --- diffusers ------------------------------------------------------------------------------------------------------


def test_config_gives_channels_factor_and_scale(deep: DiffusersCodec) -> None:
    assert (deep.channels, deep.factor, deep.scale) == (4, 4, 0.5)
    assert deep.latent_shape(32, 48) == (4, 8, 12)
    assert deep.id == f"tiny@{deep.digest[:16]}-ddim2of10-r3"


def test_depth_zero_is_the_vaes_scaled_mode_and_needs_no_unet(folder: Path, tmp_path: Path) -> None:
    from diffusers import AutoencoderKL

    shutil.copytree(folder / "vae", tmp_path / "only")
    codec = DiffusersCodec.from_pretrained(tmp_path / "only", DiffusersSettings(inversion_depth=0))
    vae: Any = AutoencoderKL.from_pretrained(str(folder / "vae"), low_cpu_mem_usage=False)
    frames = picture()
    with torch.no_grad():
        expected = vae.encode(frames).latent_dist.mode() * 0.5
        torch.testing.assert_close(codec.encode(frames).latents, expected)
        torch.testing.assert_close(codec.decode(expected), vae.decode(expected / 0.5).sample.clamp(-1, 1))
    assert codec.id == f"only@{codec.digest[:16]}-vae"
    assert codec.encode(torch.zeros(0, 3, 32, 32)).latents.shape == (0, 4, 8, 8)


def test_sixteen_channels_with_shift_and_spread_are_normalised_and_undone(tmp_path: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tiny_vae(tmp_path / "vae16", latent_channels=16, scaling_factor=1.5, shift_factor=0.25)
        tiny_vae(tmp_path / "vae8", latent_channels=8, latents_mean=[0.5] * 8, latents_std=[2.0] * 8)
    frames = picture()
    for name, channels, shift, gain in (("vae16", 16, 0.25, 1.5), ("vae8", 8, 0.5, 0.25)):
        codec = DiffusersCodec.from_pretrained(tmp_path / name, DiffusersSettings(inversion_depth=0))
        raw = codec._networks.vae.encode(frames).latent_dist.mode()
        latents = codec.encode(frames).latents
        assert latents.shape == (2, channels, 8, 8)
        torch.testing.assert_close(latents, (raw - shift) * gain)
        torch.testing.assert_close(codec.decode(latents), codec._networks.vae.decode(raw).sample.clamp(-1, 1))


def test_inversion_comes_back_to_the_vaes_own_frames(folder: Path, deep: DiffusersCodec) -> None:
    frames = picture(3)
    flat = DiffusersCodec.from_pretrained(folder, DiffusersSettings(inversion_depth=0))
    found = deep.encode(frames, "a red ball")
    assert not torch.allclose(found.latents, flat.encode(frames).latents, atol=1e-2), "the UNet did something"
    assert (found.round_trip > 30).all()
    assert (found.residual < 0.05).all()
    back = deep.decode(found.latents, "a red ball")
    assert (back - flat.decode(flat.encode(frames).latents)).abs().max() < 0.1


def test_the_caption_matters_and_the_same_caption_brings_the_frames_back(deep: DiffusersCodec) -> None:
    frames = picture(1)
    latents = deep.encode(frames, "a red ball rises").latents
    assert (deep.encode(frames, "green stripes").latents - latents).abs().max() > 1e-4
    right = (deep.decode(latents, "a red ball rises") - deep.decode(latents, "a red ball rises")).abs().max()
    wrong = (deep.decode(latents, "a red ball rises") - deep.decode(latents, "green stripes")).abs().max()
    assert 10 * right < wrong


def test_an_embedding_cut_at_its_length_is_the_padded_one(deep: DiffusersCodec) -> None:
    frames = picture(2)
    embeddings, lengths = deep.text_encoder.encode(["a red ball"])
    padded = deep.encode(frames, embeddings[0]).latents
    torch.testing.assert_close(
        deep.encode(frames, embeddings[0, : lengths[0]].clone()).latents.isfinite(), padded.isfinite()
    )
    rows = filled(embeddings)
    assert torch.equal(rows[0, : lengths[0]], embeddings[0, : lengths[0]])
    assert (rows[0, lengths[0] :] == embeddings[0, lengths[0] - 1]).all()
    torch.testing.assert_close(deep.encode(frames, embeddings.expand(2, -1, -1)).latents, padded)


def test_frames_of_several_clips_in_one_batch_keep_to_themselves(deep: DiffusersCodec) -> None:
    frames, captions = picture(3), ["a ball", "a star rises", ""]
    together = deep.encode(frames, captions).latents
    for row, caption in enumerate(captions):
        alone = deep.encode(frames[row : row + 1], caption).latents
        torch.testing.assert_close(together[row : row + 1], alone, rtol=0, atol=1e-3)
    torch.testing.assert_close(deep.encode(frames[2:], None).latents, deep.encode(frames[2:], "").latents)


def test_text_that_does_not_fit_is_refused(deep: DiffusersCodec) -> None:
    with pytest.raises(ValueError, match=r"text has shape \(1, 5, 64\) for 2 frames.*\(L, 32\).*caption itself"):
        deep.encode(picture(2), torch.ones(5, 64))
    with pytest.raises(ValueError, match="for 2 frames"):
        deep.encode(picture(2), ["a", "b", "c"])


def test_settings_reach_the_inversion(folder: Path, deep: DiffusersCodec) -> None:
    frames = picture(1)
    found = deep.encode(frames, "a ball").latents
    changed: dict[str, dict[str, Any]] = {
        "ddim_steps": {"ddim_steps": 20},
        "inversion_depth": {"inversion_depth": 1},
        "refinements": {"refinements": 0},
        "guidance": {"guidance": 3.0},
    }
    for name, values in changed.items():
        codec = DiffusersCodec.from_pretrained(
            folder, DiffusersSettings(**{"ddim_steps": 10, "inversion_depth": 2, **values})
        )
        assert codec.id != deep.id, name
        assert not torch.equal(codec.encode(frames, "a ball").latents, found), name
    unchecked = DiffusersCodec.from_pretrained(
        folder, DiffusersSettings(ddim_steps=10, inversion_depth=2, check_round_trip=False)
    )
    assert unchecked.encode(frames, "a ball").round_trip.isnan().all()
    assert unchecked.id.endswith("-unchecked")


def test_a_diffusers_spec_rebuilds_the_codec(deep: DiffusersCodec, tmp_path: Path) -> None:
    spec = json.loads(json.dumps(deep.spec()))
    rebuilt = codec_from_spec(spec)
    assert rebuilt.id == deep.id
    torch.testing.assert_close(rebuilt.encode(picture(), "a ball").latents, deep.encode(picture(), "a ball").latents)
    other = tiny_diffusion(tmp_path / "tiny", seed=1)
    with pytest.raises(ValueError, match=r"has weights .* the latents were made with"):
        codec_from_spec({**spec, "source": str(other)})
    with pytest.raises(ValueError, match="names no source"):
        codec_from_spec({"kind": "diffusers"})
    with pytest.raises(ValueError, match="unknown codec setting trust_remote_code"):
        codec_from_spec({**spec, "trust_remote_code": True})


def test_another_vae_replaces_the_folders_own(folder: Path, tmp_path: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        tiny_vae(tmp_path / "finer")
    own = DiffusersCodec.from_pretrained(folder, DiffusersSettings(inversion_depth=0))
    other = DiffusersCodec.from_pretrained(folder, DiffusersSettings(inversion_depth=0), vae=tmp_path / "finer")
    assert "+finer" in other.id
    assert not torch.allclose(own.encode(picture()).latents, other.encode(picture()).latents)
    assert codec_from_spec(other.spec()).id == other.id


def test_a_scheduler_that_disagrees_is_loaded_with_a_warning_that_says_which_value_is_used(tmp_path: Path) -> None:
    odd = tiny_diffusion(tmp_path / "odd", scheduler={"beta_end": 0.02})
    with pytest.warns(UserWarning, match=r"odd/scheduler: beta_end is 0.02 in the folder, 0.012 is used"):
        codec = DiffusersCodec.from_pretrained(odd, DiffusersSettings(ddim_steps=10, inversion_depth=1))
    assert (
        codec.schedule.steps
        == DiffusersCodec.from_pretrained(odd, DiffusersSettings(inversion_depth=0, ddim_steps=10)).schedule.steps
    )
    (odd / "scheduler" / "scheduler_config.json").write_text('{"prediction_type": "v_prediction"}')
    with pytest.raises(ValueError, match=r"predicts 'v_prediction'.*inversion_depth to 0"):
        DiffusersCodec.from_pretrained(odd, DiffusersSettings(ddim_steps=10, inversion_depth=1))


def test_missing_weights_are_one_sentence_with_the_command(folder: Path, tmp_path: Path) -> None:
    hub = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    with pytest.raises(CodecUnavailable, match=f"not on this machine.*`hf download {hub} --include") as caught:
        codec_from_spec({"kind": "diffusers", "source": hub})
    assert "\n" not in str(caught.value)
    shutil.copytree(folder, tmp_path / "half")
    shutil.rmtree(tmp_path / "half" / "unet")
    with pytest.raises(CodecUnavailable, match=r"half/unet has no \*.safetensors"):
        DiffusersCodec.from_pretrained(tmp_path / "half")
    shutil.rmtree(tmp_path / "half" / "vae")
    with pytest.raises(CodecUnavailable, match="half has no vae/ folder"):
        DiffusersCodec.from_pretrained(tmp_path / "half")
    with pytest.raises(CodecUnavailable, match="holds a UNet2DConditionModel, a codec needs AutoencoderKL"):
        DiffusersCodec.from_pretrained(folder / "unet", DiffusersSettings(inversion_depth=0))


def test_a_hub_id_is_found_in_the_local_cache_and_its_commit_is_recorded(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants

    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--tiny--diffusion"
    shutil.copytree(folder, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    codec = DiffusersCodec.from_pretrained("tiny/diffusion", DiffusersSettings(ddim_steps=10, inversion_depth=2))
    assert codec.id == "tiny/diffusion@0123456789ab-ddim2of10-r3"
    assert codec.spec()["revision"] == commit
    assert codec_from_spec(codec.spec()).id == codec.id
    with pytest.raises(CodecUnavailable, match=r"at v9 are not on this machine.*--revision v9"):
        DiffusersCodec.from_pretrained("tiny/diffusion", revision="v9")


def test_a_unet_for_other_latents_is_refused(folder: Path, tmp_path: Path) -> None:
    tiny_vae(tmp_path / "eight", latent_channels=8)
    with pytest.raises(ValueError, match="the UNet takes 4 channels, the VAE makes 8"):
        DiffusersCodec.from_pretrained(folder, vae=tmp_path / "eight")


def test_a_unet_that_diverges_leaves_no_latents(folder: Path) -> None:
    codec = DiffusersCodec.from_pretrained(folder, DiffusersSettings(ddim_steps=10, inversion_depth=2))
    with torch.no_grad():
        codec._networks.unet.conv_out.bias.fill_(math.nan)
    with pytest.raises(ValueError, match="the noise predictor diverged"):
        codec.encode(picture(), "a ball")


def test_large_frames_go_through_the_vae_in_tiles(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    codec = DiffusersCodec.from_pretrained(folder, DiffusersSettings(inversion_depth=0))
    frames = picture(1, size=64)
    whole = codec.encode(frames).latents
    monkeypatch.setattr(codec_batches, "LARGE", 48)
    tiled = codec.encode(frames).latents
    assert tiled.shape == whole.shape == (1, 4, 16, 16)
    assert not torch.equal(tiled, whole)
    assert codec.decode(tiled).shape == frames.shape


def test_the_batch_does_not_change_the_latents(folder: Path) -> None:
    frames = picture(5)
    one = DiffusersCodec.from_pretrained(folder, DiffusersSettings(inversion_depth=0, batch=2)).encode(frames).latents
    torch.testing.assert_close(
        one, DiffusersCodec.from_pretrained(folder, DiffusersSettings(inversion_depth=0)).encode(frames).latents
    )
