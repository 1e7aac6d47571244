"""The networks of a small codec in Stable Diffusion's layout, and the folder they are written to."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from model.codecs.ddim import SCHEDULER_VALUES
from model.text.encoder import END, START, bundled_tokenizer
from model.text.words import vocabulary
from model.weights import find_weights, load_part

TEXT_WIDTH, TEXT_LENGTH = 128, 77


def new_autoencoder(widths: tuple[int, ...], channels: int = 4) -> nn.Module:
    """An untrained AutoencoderKL; widths: channels of its levels, multiples of 8, from fine to coarse.

    channels: those of its latents. Four levels give the factor 8.
    """
    from diffusers import AutoencoderKL

    levels = len(widths)
    vae: Any = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels, up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=widths, layers_per_block=1, latent_channels=channels, norm_num_groups=8, sample_size=128,
        mid_block_add_attention=False,
    )  # fmt: skip
    # Latents begin with little noise. With the usual standard deviation of 1 the decoder learns to ignore them.
    vae.quant_conv.bias.data[channels:] = -6
    network: nn.Module = vae
    return network


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
    from transformers import CLIPTextConfig, CLIPTextModel

    numbers = vocabulary()
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(numbers), hidden_size=TEXT_WIDTH, intermediate_size=2 * TEXT_WIDTH, num_hidden_layers=3,
            num_attention_heads=4, max_position_embeddings=TEXT_LENGTH,
            bos_token_id=numbers[START], eos_token_id=numbers[END], pad_token_id=numbers[END],
        )
    )  # fmt: skip


@torch.no_grad()
def start_from(network: nn.Module, trained: nn.Module) -> None:
    """Copies a trained network's weights into one of the same layout whose latents have as many channels or more.

    Where a tensor is larger than the trained one, the trained values fill its first rows and columns and the others
    stay as they are. An autoencoder's two halves of moments, means and logarithms of variances, are each widened.

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
        halves = 2 if name.startswith("quant_conv.") else 1
        for part, old in zip(target.chunk(halves), value.chunk(halves), strict=True):
            part[tuple(slice(length) for length in old.shape)] = old


def trained_networks(source: str | Path) -> tuple[nn.Module, nn.Module, nn.Module]:
    """Autoencoder, UNet and text model of a codec's folder. Raises CodecUnavailable where one is missing."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel

    weights, plain = find_weights(source), {"low_cpu_mem_usage": False}
    vae: nn.Module = load_part(AutoencoderKL.from_pretrained, weights, "vae", options=plain)
    unet: nn.Module = load_part(UNet2DConditionModel.from_pretrained, weights, "unet", options=plain)
    text_model: nn.Module = load_part(CLIPTextModel.from_pretrained, weights, "text_encoder")
    return vae, unet, text_model


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
    index: dict[str, Any] = {"_class_name": "StableDiffusionPipeline", "vae": ["diffusers", "AutoencoderKL"]}
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
