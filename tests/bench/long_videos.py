"""Videos four times as long as what a network learned: how much changes across seams, beside the changes elsewhere.

    python -m tests.bench.long_videos [--steps 1500] [--width 48]

It trains a small Flowception on points that run around a circle at a constant speed, in 8 to 16 frames, and samples 64
frames in blocks and in chunks. Printed: the change from frame to frame across seams over the median of the others
(goal: at most 1.5 in the mean over the videos), beside clips of the learned length, which have no seams.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time

import torch
from torch import Tensor

from model.backbones.conditioning import Conditioning
from model.backbones.dit import Backbone, BackboneConfig
from model.methods.base import Batch, Request
from model.methods.draws import Draws
from model.methods.flowception import Flowception, FlowceptionOptions
from model.methods.growing import GrowthSampling

LEAST, MOST, OVERLAP = 8, 16, 4
GOAL = 1.5


def circling(count: int, generator: torch.Generator) -> Batch:
    """Clips of LEAST to MOST frames, each a point on a circle of radius sqrt(2), at a speed of its own."""
    lengths = torch.randint(LEAST, MOST + 1, (count,), generator=generator)
    direction = torch.where(torch.rand(count, generator=generator) < 0.5, -1.0, 1.0)
    speed = (0.25 + 0.15 * torch.rand(count, generator=generator)) * direction
    angle = 2 * math.pi * torch.rand(count, generator=generator)[:, None] + speed[:, None] * torch.arange(MOST)
    points = math.sqrt(2) * torch.stack([angle.cos(), angle.sin()], -1)[..., None, None]
    valid = torch.arange(MOST) < lengths[:, None]
    nothing, one = torch.zeros(count), torch.ones(count, dtype=torch.long)
    return Batch(
        ("",) * count, torch.zeros(count, 1, 4), one, torch.zeros(1, 4), nothing, nothing + 1,
        latents=points * valid[..., None, None, None], valid=valid,
    )  # fmt: skip


def trained(steps: int, width: int, batch: int) -> tuple[Flowception, Backbone]:
    """The method, and a backbone that learned it in so many steps."""
    options = FlowceptionOptions(
        start_frames=2, context_first=0.0, context_start=0.3, context_ends=0.0, context_any=0.0
    )
    method = Flowception.build(options, {"latent_scale": 1.0, "shortest": float(LEAST), "longest": float(MOST)}, {})
    torch.manual_seed(0)
    backbone = Backbone(
        BackboneConfig(
            channels=2, height=1, width_latent=1, text_dim=4, width=width, depth=3, heads=2, patch=1,
            outputs=method.heads, temporal=True, rates=True, qk_norm="rms",
        )
    )  # fmt: skip
    optimizer = torch.optim.AdamW(backbone.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1, (step + 1) / 50) * min(1, (steps - step) / (0.4 * steps))
        losses = method.loss(backbone, circling(batch, generator), Draws(step, batch))
        optimizer.zero_grad()
        losses["loss"].backward()
        torch.nn.utils.clip_grad_norm_(backbone.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 100 == 0:
            print(
                f"step {step + 1}  velocity {losses['velocity']:.3f}  insertion {losses['insertion']:.3f}", flush=True
            )
    return method, backbone.eval()


def asked(settings: GrowthSampling, count: int) -> Request:
    """A request of clips without captions."""
    nothing, one = torch.zeros(count), torch.ones(count, dtype=torch.long)
    told = Conditioning(
        torch.zeros(count, 1, 4), one, nothing, nothing, nothing, torch.zeros(count, 1, 2, 1, 1),
        torch.zeros(count, 1, dtype=torch.bool),
    )  # fmt: skip
    return Request(told, tuple(range(count)), (2, 1, 1), settings)


def changes(clip: Tensor) -> Tensor:
    """(N - 1,) root mean squares of the differences of neighbouring frames of (N, C, h, w)."""
    return (clip[1:] - clip[:-1]).square().mean((1, 2, 3)).sqrt()


def seam_ratios(clips: list[Tensor], seams: list[list[int]]) -> list[float]:
    """Of each clip the mean change into the frames where a block or window begins, over the median of the others."""
    found = []
    for clip, at in zip(clips, seams, strict=True):
        steps, across = changes(clip), torch.zeros(len(clip) - 1, dtype=torch.bool)
        across[[place - 1 for place in at if 0 < place < len(clip)]] = True
        if across.any() and not across.all():
            found.append(float(steps[across].mean() / steps[~across].median()))
    return found


def main(given: list[str] | None = None) -> int:
    """Trains, samples and prints; 0 where the goal is kept."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--width", type=int, default=48)
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--videos", type=int, default=8)
    parser.add_argument("--sampling-steps", type=int, default=30)
    options = parser.parse_args(given)
    begun = time.process_time()
    method, backbone = trained(options.steps, options.width, options.batch)
    print(f"trained in {time.process_time() - begun:.0f} CPU s; true changes between 0.25 and 0.40")
    plain = method.sample(backbone, asked(GrowthSampling(steps=options.sampling_steps), options.videos))
    lengths = [len(clip) for clip in plain.clips]
    steps = torch.cat([changes(clip) for clip in plain.clips])
    print(f"plain   {statistics.fmean(lengths):5.1f} frames  median change {float(steps.median()):.3f}")
    kept = True
    for kind in ("blocks", "chunks"):
        settings = GrowthSampling(
            steps=options.sampling_steps, long=kind, max_frames=4 * MOST, chunk=MOST, overlap=OVERLAP
        )
        made = method.sample(backbone, asked(settings, options.videos))
        ratios, lengths = seam_ratios(made.clips, made.seams), [len(clip) for clip in made.clips]
        steps = torch.cat([changes(clip) for clip in made.clips])
        print(
            f"{kind}  {statistics.fmean(lengths):5.1f} frames  median change {float(steps.median()):.3f}  "
            f"seams / others: mean {statistics.fmean(ratios):.2f} (goal {GOAL}), worst video {max(ratios):.2f}"
        )
        kept = kept and statistics.fmean(ratios) <= GOAL
    return 0 if kept else 1


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
