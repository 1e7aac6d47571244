"""A tiny Stable-Diffusion-format folder with random weights, built from configs: no network, under a second."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from model.text.words import merges, vocabulary

SCHEDULER_CONFIG: dict[str, Any] = {
    "_class_name": "PNDMScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "trained_betas": None,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "skip_prk_steps": True,
}
"""What Stable Diffusion v1.5 ships: another scheduler class, no timestep_spacing, the values this project uses."""


def tiny_diffusion(folder: Path, seed: int = 0, scheduler: dict[str, Any] | None = None, **vae: Any) -> Path:
    """Writes vae/, unet/, text_encoder/, tokenizer/, scheduler/ and model_index.json; returns the folder.

    scheduler: values that replace those of SCHEDULER_CONFIG.  vae: config values of the AutoencoderKL.
    The VAE halves a frame twice (factor 4, 4 channels, scaling factor 0.5); the UNet halves a latent once.
    """
    import diffusers
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    numbers = vocabulary()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tiny_vae(folder / "vae", **vae)
        unet: Any = diffusers.UNet2DConditionModel  # untyped in diffusers
        network = unet(
            sample_size=8, in_channels=4, out_channels=4, block_out_channels=(16, 32), layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=32, attention_head_dim=8, norm_num_groups=8,
        )  # fmt: skip
        # An untrained UNet is so steep that no inversion contracts; a gentle one comes back, as a trained one does.
        network.conv_out.weight.data *= 0.1
        network.save_pretrained(folder / "unet", safe_serialization=True)
        CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(numbers), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                num_attention_heads=4, max_position_embeddings=77, bos_token_id=len(numbers) - 2,
                eos_token_id=len(numbers) - 1, pad_token_id=len(numbers) - 1,
            )
        ).save_pretrained(folder / "text_encoder")  # fmt: skip
    pairs: Any = list(merges())
    CLIPTokenizer(vocab=numbers, merges=pairs, model_max_length=77).save_pretrained(folder / "tokenizer")
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps({**SCHEDULER_CONFIG, **(scheduler or {})}))
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    return folder


def tiny_vae(folder: Path, **config: Any) -> Path:
    """An AutoencoderKL folder alone; draws from the global generator."""
    import diffusers

    autoencoder: Any = diffusers.AutoencoderKL
    values: dict[str, Any] = {
        "block_out_channels": (8, 16, 16),
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "latent_channels": 4,
        "norm_num_groups": 4,
        "sample_size": 32,
        "scaling_factor": 0.5,
    }
    autoencoder(**{**values, **config}).save_pretrained(folder, safe_serialization=True)
    return folder
