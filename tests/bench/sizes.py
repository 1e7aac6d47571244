"""`python -m tests.bench.sizes`: parameters and work of the published DiT's sizes, ours beside it. Needs no memory.

A GMAC is 10^9 multiplications with their additions, of one forward pass of one state: latents of 4 channels, an eighth
of the pixels a side, as Stable Diffusion's, and a caption of 77 rows of 768 values. Counted on the meta device.

`DiT` is the part of the backbone that the published network has too, without caption, clip and given frames.
"""

from __future__ import annotations

import sys
from typing import NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from model.backbones.conditioning import Conditioning
from model.backbones.dit import Backbone, BackboneConfig
from model.backbones.published import PATCHES, SIZES, published_names

PIXELS = (256, 512)
TEXT = (77, 768)


class Work(NamedTuple):
    """Of a backbone, and of its part that the published DiT has too."""

    parameters: int
    published_parameters: int
    gmac: float
    published_gmac: float


def published_config(name: str, pixels: int = 256) -> BackboneConfig:
    """The backbone of a size and a patch, as `XL/2`, on Stable Diffusion's latents of so many pixels a side."""
    size, patch = name.split("/")
    width, depth, heads = SIZES[size]
    side = pixels // 8
    return BackboneConfig(
        channels=4, height=side, width_latent=side, text_dim=TEXT[1], width=width, depth=depth, heads=heads,
        patch=int(patch), architecture="dit",
    )  # fmt: skip


def work_of(config: BackboneConfig) -> Work:
    """Parameters, and GMAC of one state."""
    counter = FlopCounterMode(display=False, depth=4)
    with torch.device("meta"), torch.no_grad():
        backbone = Backbone(config)
        latents = torch.zeros(1, 1, config.channels, config.height, config.width_latent)
        given = Conditioning(
            text=torch.zeros(1, *TEXT),
            text_length=torch.zeros(1, dtype=torch.int64),
            clip_start=torch.zeros(1),
            start_given=torch.zeros(1),
            log_duration=torch.zeros(1),
            context=latents,
            context_given=torch.zeros(1, 1, dtype=torch.bool),
        )
        with counter:
            backbone(latents, torch.zeros(1, 1), given)
    of_module = {name: sum(counts.values()) / 2e9 for name, counts in counter.get_flop_counts().items()}
    extra = ("text", "pooled_text", "duration", "clip_start", "embed_context")
    ours = [f"Backbone.{name}" for name in extra]
    ours += [f"Backbone.blocks.{number}.cross" for number in range(config.depth)]
    sizes = {name: value.numel() for name, value in backbone.named_parameters()}
    return Work(
        sum(sizes.values()),
        sum(sizes[name] for name in published_names(config, sizes)),
        of_module["Global"],
        of_module["Global"] - sum(of_module[name] for name in ours),
    )


def main() -> int:
    """Prints the table."""
    print(
        f"{'':6}{'DiT, million':>14}{'with all':>10}" + "".join(f"{f'GMAC {p} px':>14}{'with all':>10}" for p in PIXELS)
    )
    for size in SIZES:
        for patch in PATCHES:
            name = f"{size}/{patch}"
            works = [work_of(published_config(name, pixels)) for pixels in PIXELS]
            row = f"{name:6}{works[0].published_parameters / 1e6:14.1f}{works[0].parameters / 1e6:10.1f}"
            print(row + "".join(f"{work.published_gmac:14.2f}{work.gmac:10.2f}" for work in works))
    return 0


if __name__ == "__main__":
    sys.exit(main())
