"""Losses, gradients and samples of the methods as digests: for two checkouts whose methods must do the same.

    PYTHONPATH=CHECKOUT python -P tests/bench/method_identity.py

It makes a small lake and small networks with the modules of the checkout, and prints a line for each method and its
options. Run it on both; the lines must be equal.
"""

from __future__ import annotations

import hashlib
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from model.backbones.conditioning import Conditioning
from model.backbones.dit import Backbone, BackboneConfig
from model.methods.base import Request, SampleSettings
from model.methods.draws import Draws
from model.methods.registry import method_named
from model.training.data import Clips, Collate
from storage import version
from tests.model.tiny_lake import make_lake

KINDS = (("vlfm", {}), ("vlfm", {"anchor": "ends"}), ("vlfm", {"path": "paper", "anchor": "none"}), ("per_frame", {}))
CLIPS = 3


def digest(*tensors: Tensor) -> str:
    """One sha256 over the bytes of tensors."""
    whole = hashlib.sha256()
    for tensor in tensors:
        whole.update(tensor.detach().contiguous().numpy().tobytes())
    return whole.hexdigest()[:16]


def main() -> int:
    """Prints the digests."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        lake = make_lake(Path(folder) / "lake")
        made = version.load(lake)
        clips = Clips(lake, made, "train")
        channels, height, width = made.clip["latent_shape"]
        dim = made.text["dim"]
        for name, options in KINDS:
            kind = method_named(name)
            method = kind.build(kind.Options(**options), kind.prepare(clips, made.clip), made.clip)
            torch.manual_seed(0)
            backbone = Backbone(
                BackboneConfig(
                    channels=channels, height=height, width_latent=width, text_dim=dim, width=64, depth=2, heads=4,
                    patch=1, outputs=method.heads, temporal=method.temporal,
                )
            )  # fmt: skip
            for value in backbone.parameters():
                torch.nn.init.normal_(value, std=0.05)
            batch = Collate(torch.zeros(1, dim).half().numpy(), method.members)([clips[k] for k in range(CLIPS)])
            losses = method.loss(backbone, batch.to("cpu"), Draws(5, CLIPS))
            losses["loss"].backward()
            gradients = [value.grad for value in backbone.parameters() if value.grad is not None]
            told = Conditioning(
                torch.randn(2, 3, dim, generator=torch.Generator().manual_seed(1)), torch.full((2,), 3), torch.zeros(2),
                torch.zeros(2), torch.zeros(2), torch.zeros(2, 1, channels, height, width),
                torch.zeros(2, 1, dtype=torch.bool),
            )  # fmt: skip
            settings = SampleSettings(steps=4, warmup_steps=4)
            sample = method.sample(backbone.eval(), Request(told, (0, 1), (channels, height, width), settings))
            figures = digest(*losses.values()), digest(*gradients), digest(sample.read([0.0, 0.3, 1.0]))
            print(name, options, f"{losses['loss'].item():.9f}", "losses {} gradients {} samples {}".format(*figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
