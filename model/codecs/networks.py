"""The networks of a small codec in Stable Diffusion's layout, and the folder they are written to."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pixel_unshuffle

from model.codecs.ddim import SCHEDULER_VALUES
from model.text.encoder import bundled_tokenizer, new_clip_text_model
from model.text.words import vocabulary
from model.weights import find_weights, load_part

TEXT_WIDTH, TEXT_LENGTH = 128, 77


def new_autoencoder(widths: tuple[int, int, int], channels: int) -> nn.Module:
    """An untrained AutoencoderDC of factor 8 (Chen et al. 2024), which computes at a half, a quarter and an eighth.

    widths: channels of these levels, each at most twice the one before, from 48, 96 and 192 on if it is to begin with
    `start_from_blocks`.  channels: those of its latents. Its pixels are shuffled into channels and back, so it can
    tell the places in a block apart from the first step on; a decoder that repeats pixels has to learn that.
    """
    from diffusers import AutoencoderDC

    vae: Any = AutoencoderDC(
        latent_channels=channels, attention_head_dim=8,
        encoder_block_out_channels=(widths[0], *widths), decoder_block_out_channels=(widths[0], *widths),
        encoder_layers_per_block=(0, 1, 1, 1), decoder_layers_per_block=(0, 2, 2, 2),
        encoder_qkv_multiscales=((), (), (), ()), decoder_qkv_multiscales=((), (), (), ()),
        encoder_out_shortcut=False, decoder_in_shortcut=False,
    )  # fmt: skip
    network: nn.Module = vae
    return network


@torch.no_grad()
def start_from_blocks(vae: nn.Module, pictures: Tensor) -> None:
    """Makes a new autoencoder the best linear codec of blocks of 8 x 8 pixels: their principal components.

    pictures: (N, 3, H, W) in [-1, 1], what the components are fitted on. Latents have unit variance. The residual
    blocks begin as identities, so training only adds to what the components give.
    """
    network: Any = vae
    encoder, decoder = network.encoder, network.decoder
    for block in (*encoder.down_blocks.modules(), *decoder.up_blocks.modules()):
        if hasattr(block, "conv2"):
            block.norm.weight.zero_()
    for convolution, count in ((encoder.conv_in.conv, 3), (encoder.down_blocks[1][-1].conv, 12)):
        _copy_channels(convolution, count)
    _copy_channels(encoder.down_blocks[2][-1].conv, 48)
    blocks = _nested(pictures).flatten(2).transpose(1, 2).flatten(0, 1).double()
    mean = blocks.mean(0)
    values, vectors = torch.linalg.eigh((blocks - mean).T @ (blocks - mean) / len(blocks))
    channels = encoder.conv_out.out_channels
    spread, basis = values[-channels:].clamp_min(1e-6).sqrt().flip(0), vectors[:, -channels:].flip(1)
    wanted = (blocks - mean) @ basis / spread
    # The encoder's features are linear in the pixels as yet; its last convolution takes the components out of them.
    features = encoder.conv_in(pictures)
    for block in encoder.down_blocks:
        features = block(features)
    rows = features.flatten(2).transpose(1, 2).flatten(0, 1).double()
    rows = torch.cat((rows, rows.new_ones(len(rows), 1)), 1)
    square = rows.T @ rows
    square.diagonal().add_(1e-6 * square.diagonal().mean())
    solved = torch.linalg.solve(square, rows.T @ wanted)
    _set_centre(encoder.conv_out, solved[:-1].T, solved[-1])

    wide = decoder.conv_in.out_channels
    decoder.conv_in.weight[:channels] = 0
    decoder.conv_in.weight[:channels, :, 1, 1] = torch.eye(channels)
    decoder.conv_in.bias[:channels] = 0
    to_quarter = torch.zeros(192, wide, dtype=torch.float64)
    to_quarter[:, :channels] = basis * spread
    _set_up(decoder.up_blocks[2][0].conv, to_quarter, mean)
    to_half = torch.eye(48, decoder.up_blocks[1][0].conv.in_channels, dtype=torch.float64)
    _set_up(decoder.up_blocks[1][0].conv, to_half, torch.zeros(48))
    # The last norm divides by the channels' root mean square: a large constant on the last channel makes that nearly
    # constant. The activation is left on its straight side.
    width = decoder.norm_out.weight.numel()
    large, offset = 40.0, 2.0
    decoder.up_blocks[1][-1].norm.bias[-1] = large
    decoder.norm_out.weight[:12] = large / width**0.5
    decoder.norm_out.bias[:12] = offset
    _set_centre(decoder.conv_out.conv, torch.eye(12, width), torch.full((12,), -offset))


def _nested(pictures: Tensor) -> Tensor:
    """(N, 3, H, W) to (N, 192, H/8, W/8): each block's values, in the order of three unshufflings."""
    for _ in range(3):
        pictures = pixel_unshuffle(pictures, 2)
    return pictures


def _copy_channels(convolution: nn.Conv2d, count: int) -> None:
    """The first `count` channels pass unchanged, the others get smaller weights."""
    weight, bias = convolution.weight, convolution.bias
    assert bias is not None
    weight *= 0.3
    bias.zero_()
    weight[:count] = 0
    weight[:count, :count, 1, 1] = torch.eye(count)


def _set_centre(convolution: nn.Conv2d, matrix: Tensor, bias: Tensor) -> None:
    """A convolution that applies `matrix` to each pixel alone."""
    assert convolution.bias is not None
    convolution.weight.zero_()
    convolution.weight[:, :, 1, 1] = matrix.to(convolution.weight)
    convolution.bias.copy_(bias)


def _set_up(convolution: nn.Conv2d, matrix: Tensor, bias: Tensor) -> None:
    """An upsampling block, its shortcut included, that applies `matrix` to each pixel before the shuffling.

    The shortcut repeats every channel twice. What the matrix does not name gets smaller weights.
    """
    assert convolution.bias is not None
    rows = len(matrix)
    convolution.weight *= 0.1
    convolution.bias.zero_()
    shortcut = torch.eye(convolution.in_channels).repeat_interleave(2, 0).to(convolution.weight)
    convolution.weight[:rows] = 0
    convolution.weight[:, :, 1, 1] -= shortcut
    convolution.weight[:rows, :, 1, 1] += matrix.to(convolution.weight)
    convolution.bias[:rows] = bias.to(convolution.bias)


@torch.no_grad()
def scale_latents(vae: nn.Module, deviation: Tensor) -> None:
    """Divides an AutoencoderDC's latents by `deviation` (C,): its latents change so, its round trip does not."""
    network: Any = vae
    network.encoder.conv_out.weight /= deviation.view(-1, 1, 1, 1)
    network.encoder.conv_out.bias /= deviation
    network.decoder.conv_in.weight *= deviation.view(1, -1, 1, 1)


def new_unet(widths: tuple[int, ...], channels: int = 4) -> nn.Module:
    """An untrained UNet2DConditionModel of three levels that attends to captions on the middle one.

    widths: channels of its levels, multiples of 16, from fine to coarse.  channels: those of its latents.
    """
    from diffusers import UNet2DConditionModel

    unet: Any = UNet2DConditionModel(
        sample_size=16, in_channels=channels, out_channels=channels, layers_per_block=1, block_out_channels=widths,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=TEXT_WIDTH, attention_head_dim=4, norm_num_groups=16,
    )  # fmt: skip
    network: nn.Module = unet
    return network


def new_text_model() -> nn.Module:
    """An untrained CLIPTextModel over the bundled vocabulary."""
    return new_clip_text_model(vocabulary(), TEXT_WIDTH, layers=3, heads=4, length=TEXT_LENGTH)


@torch.no_grad()
def start_from(network: nn.Module, trained: nn.Module) -> None:
    """Copies a trained network's weights into one of the same layout whose latents have as many channels or more.

    Where a tensor is larger than the trained one, the trained values fill its first rows and columns and the others
    stay as they are.

    Raises:
        ValueError: other layers, or fewer channels.
    """
    own, given = dict(network.named_parameters()), dict(trained.named_parameters())
    if own.keys() != given.keys():
        odd = sorted(own.keys() ^ given.keys())[0]
        raise ValueError(f"the codec to start from has other layers ({odd}): give the recipe its widths")
    for name, value in given.items():
        target = own[name]
        if any(old > new for old, new in zip(value.shape, target.shape, strict=True)):
            raise ValueError(
                f"{name} of the codec to start from is {tuple(value.shape)}, here it is {tuple(target.shape)}: "
                "give the recipe at least its channels, and its widths"
            )
        target[tuple(slice(length) for length in value.shape)] = value


def autoencoder_type(folder: Path) -> Any:
    """The diffusers class of the autoencoder in a folder: AutoencoderDC where its config says so, or AutoencoderKL."""
    from diffusers import AutoencoderDC, AutoencoderKL

    file = folder / "config.json"
    named = json.loads(file.read_text()).get("_class_name") if file.is_file() else None
    return AutoencoderDC if named == "AutoencoderDC" else AutoencoderKL


def trained_denoiser(source: str | Path) -> tuple[nn.Module, nn.Module]:
    """UNet and text model of a codec's folder. Raises CodecUnavailable where one is missing."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel

    weights = find_weights(source)
    options = {"low_cpu_mem_usage": False}
    unet: nn.Module = load_part(UNet2DConditionModel.from_pretrained, weights, "unet", options=options)
    text_model: nn.Module = load_part(CLIPTextModel.from_pretrained, weights, "text_encoder")
    return unet, text_model


def write_folder(
    folder: Path, vae: nn.Module, unet: nn.Module | None, text_model: nn.Module | None, record: Mapping[str, Any]
) -> None:
    """Writes a Stable Diffusion folder with weights in 16 bits, and `training.json` with what made them.

    Without a UNet and a text model it holds the VAE alone, for `inversion_depth` 0. The networks are left in 16 bits.
    """
    folder.mkdir(parents=True, exist_ok=True)
    parts: dict[str, Any] = {"vae": vae, "unet": unet, "text_encoder": text_model}
    for name, network in parts.items():
        if network is not None:
            network.half().save_pretrained(folder / name, safe_serialization=True)
    index: dict[str, Any] = {"_class_name": "StableDiffusionPipeline", "vae": ["diffusers", type(vae).__name__]}
    if unet is not None:
        bundled_tokenizer(TEXT_LENGTH).save_pretrained(folder / "tokenizer")
        (folder / "scheduler").mkdir(exist_ok=True)
        scheduler = {"_class_name": "DDIMScheduler", **SCHEDULER_VALUES}
        (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler, indent=1) + "\n")
        index |= {
            "unet": ["diffusers", "UNet2DConditionModel"],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "scheduler": ["diffusers", "DDIMScheduler"],
        }
    (folder / "model_index.json").write_text(json.dumps(index, indent=1) + "\n")
    (folder / "training.json").write_text(json.dumps(record, indent=1) + "\n")
