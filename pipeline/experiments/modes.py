"""Do samples have the law of the data? Toys that are drawn, where the answer is known.

A soft blob moves through 8 by 8 pixels; all clips have the same, empty caption. What the clips differ in must come from
the noise alone, and a sample must stay with what it began. `continuous`: start and direction are any, the speed is 3
pixels a clip. `crossing`: two paths pass the same place at the same time. `rows`: four rows with 70, 10, 10 and 10 % of
the clips. `fork`: one first frame, two ways to go on. Real networks are trained, in a minute or two each.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from model.backbones.conditioning import Conditioning
from model.backbones.dit import Backbone, BackboneConfig
from model.legs import basis_torch
from model.methods.base import Batch, Request, SampleSettings
from model.methods.curves import curve_scales
from model.methods.draws import Draws
from model.methods.vlfm import VLFM, VLFMOptions
from model.program import run_program
from model.training.seeds import mixed_seed
from storage.layout import write_atomic

SIDE, RADIUS, ORDER = 8, 1.2, 16
"""Pixels of a picture's side, standard deviation of the blob in pixels, number of coefficients."""
CLIPS, SAMPLES = 512, 256
"""Clips that are trained on, and samples that are judged."""
SPEED = 3.0
"""Pixels a clip that `continuous` moves."""
SHARES = (0.7, 0.1, 0.1, 0.1)
"""Of the clips in each of `rows`."""
READ = torch.linspace(0, 1, 17, dtype=torch.float64)
"""Flow times at which samples are judged."""


# --- the toys: places (B, L) in pixels, down and to the right, at flow times (L,) ---


@dataclass(frozen=True)
class Toy:
    """Clips of a moving blob: at r in [0, 1] it is at `start + r * way`, both (B, 2) in pixels, down and right."""

    start: Tensor
    way: Tensor

    def coefficients(self) -> Tensor:
        """(B, ORDER, 1, SIDE, SIDE) float32: exact to quadrature of 64 nodes."""
        nodes, weights = np.polynomial.legendre.leggauss(64)
        at = torch.from_numpy((nodes + 1) / 2)
        frames = blob(self.start[:, None] + at[:, None] * self.way[:, None])  # (B, 64, SIDE, SIDE)
        weighted = torch.from_numpy(weights / 2)[:, None] * basis_torch(at, ORDER)
        return torch.einsum("rn,brhw->bnhw", weighted, frames)[:, :, None].float()


def blob(place: Tensor) -> Tensor:
    """(..., SIDE, SIDE) pictures of places (..., 2)."""
    pixels = torch.arange(SIDE, dtype=torch.float64)
    down, right = (torch.exp(-((pixels - place[..., k, None]) ** 2) / (2 * RADIUS**2)) for k in (0, 1))
    return down[..., :, None] * right[..., None, :]


def continuous(count: int, generator: torch.Generator) -> Toy:
    """Any direction through any place of the middle."""
    angle = 2 * math.pi * torch.rand(count, 1, generator=generator, dtype=torch.float64)
    way = SPEED * torch.cat([angle.sin(), angle.cos()], 1)
    middle = 2 + 3 * torch.rand(count, 2, generator=generator, dtype=torch.float64)
    return Toy(middle - way / 2, way)


def crossing(count: int, generator: torch.Generator) -> Toy:
    """From the upper or the lower corner at the left to the opposite one."""
    sign = 1.0 - 2.0 * torch.randint(2, (count, 1), generator=generator).double()
    return Toy(torch.cat([3.5 - 3 * sign, 0.5 + 0 * sign], 1), torch.cat([6 * sign, 6 + 0 * sign], 1))


def rows(count: int, generator: torch.Generator) -> Toy:
    """From left to right in one of four rows."""
    row = torch.multinomial(torch.tensor(SHARES), count, replacement=True, generator=generator).double()[:, None]
    return Toy(torch.cat([0.5 + 2 * row, 0.5 + 0 * row], 1), torch.cat([0 * row, 6 + 0 * row], 1))


def fork(count: int, generator: torch.Generator) -> Toy:
    """From the middle of the left border to one of two corners."""
    sign = 1.0 - 2.0 * torch.randint(2, (count, 1), generator=generator).double()
    return Toy(torch.cat([3.5 + 0 * sign, 0.5 + 0 * sign], 1), torch.cat([3 * sign, 6 + 0 * sign], 1))


# --- judging ---


def locate(frames: Tensor) -> tuple[Tensor, Tensor]:
    """Places (..., 2) of the blobs nearest to frames (..., SIDE, SIDE), to 0.1 pixel, and the rms differences."""
    axis = torch.arange(-1, SIDE + 0.01, 0.1, dtype=torch.float64)
    places = torch.cartesian_prod(axis, axis)
    distance, nearest = torch.cdist(frames.double().reshape(-1, SIDE * SIDE), blob(places).flatten(1)).min(1)
    return places[nearest].view(*frames.shape[:-2], 2), (distance / SIDE).view(frames.shape[:-2])


def judge(toy: str, frames: Tensor) -> dict[str, Any]:
    """Figures of samples (len(READ), B, SIDE, SIDE).

    `error_middle`, `error_end`: median rms difference from the nearest picture of a blob, of its peak. `speed`: median
    pixels a clip. `line`: median rms distance of the places from even motion between the first and the last, in pixels.
    `spread_start`, `spread_middle`: standard deviation of places over the data's. `one_mode`: share of samples that are
    on one of the data's paths all along. `shares`: of the samples on each.
    """
    places, errors = locate(frames)
    found: dict[str, Any] = {
        "error_middle": float(errors[len(errors) // 2].median()), "error_end": float(errors[-1].median()),
    }  # fmt: skip
    down = places[..., 0]
    if toy == "continuous":
        truth = continuous(4096, torch.Generator().manual_seed(1))
        way = places[-1] - places[0]
        off = places - places[0] - READ[:, None, None] * way
        middle, true_middle = places[0] + way / 2, truth.start + truth.way / 2
        return found | {
            "speed": float(way.norm(dim=1).median()),
            "line": float(off.square().sum(-1).mean(0).sqrt().median()),
            "spread_start": float((places[0].std(0) / truth.start.std(0)).mean()),
            "spread_middle": float((middle.std(0) / true_middle.std(0)).mean()),
        }
    paths = {
        "crossing": [3.5 - 3 * sign + 6 * sign * READ for sign in (1, -1)],
        "rows": [0.5 + 2 * row + 0 * READ for row in range(len(SHARES))],
        "fork": [3.5 + 3 * sign * READ for sign in (1, -1)],
    }[toy]
    off_path = torch.stack([(down - path[:, None]).abs().amax(0) for path in paths])  # (paths, B)
    on_one, nearest = off_path.amin(0) < 0.75, off_path.argmin(0)
    return found | {
        "one_mode": float(on_one.double().mean()),
        "shares": [float((nearest == k).double().mean()) for k in range(len(paths))],
    }


# --- the experiment ---


@dataclass(frozen=True)
class Trial:
    """A network to train and a way to sample it."""

    toy: str
    name: str
    options: VLFMOptions = field(default_factory=VLFMOptions)
    settings: SampleSettings = field(default_factory=SampleSettings)


TOYS: dict[str, Callable[[int, torch.Generator], Toy]] = {
    "continuous": continuous, "crossing": crossing, "rows": rows, "fork": fork,
}  # fmt: skip
ALONE = VLFMOptions(anchor="none", context_dropout=1.0)
STILL = VLFMOptions(anchor="none", context_dropout=1.0, state_jitter=0.0)
TRIALS = (
    *(Trial(toy, "first frame") for toy in TOYS),
    *(Trial(toy, "first and last frame", VLFMOptions(anchor="ends")) for toy in ("fork", "continuous")),
    *(Trial(toy, "no anchor", ALONE) for toy in TOYS),
    *(Trial(toy, "no anchor, no jitter", STILL) for toy in ("continuous", "crossing", "fork")),
    Trial("fork", "no anchor, no jitter, not re-anchored", STILL, SampleSettings(reanchor=False)),
    Trial("rows", "first frame, error_focus 1", VLFMOptions(error_focus=1.0)),
    Trial("continuous", "first frame, times even in r", VLFMOptions(warmup_focus=1.0)),
)


class Member:
    """A clip as `curve_scales` looks at it."""

    def __init__(self, coefficients: Tensor) -> None:
        self.members = {"coefficients": coefficients.numpy()}


def train(coefficients: Tensor, options: VLFMOptions, steps: int, seed: int) -> tuple[VLFM, nn.Module]:
    """The method and the averaged network after `steps` of 32 clips."""
    mean, derivative = curve_scales([Member(clip) for clip in coefficients], ORDER)
    method = VLFM.build(
        options, {"mean_scale": mean, "derivative_scale": derivative}, {"latent_shape": (1, SIDE, SIDE)}
    )
    torch.manual_seed(seed)
    network = Backbone(BackboneConfig(1, SIDE, SIDE, 8, 64, 3, 4, 2, temporal=method.temporal))
    average = copy.deepcopy(network)
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, betas=(0.9, 0.99), weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1, (step + 1) / 50) * min(1, (steps - step) / (0.5 * steps))
        chosen = torch.randint(len(coefficients), (32,), generator=generator)
        batch = Batch(
            ("",) * 32, torch.zeros(32, 1, 8), torch.ones(32, dtype=torch.long), torch.zeros(1, 8), torch.zeros(32),
            torch.ones(32), coefficients=coefficients[chosen],
        )  # fmt: skip
        loss = method.loss(network, batch, Draws(mixed_seed(seed, step), 32))["loss"]
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            for mean_value, value in zip(average.parameters(), network.parameters(), strict=True):
                mean_value.lerp_(value, max(0.01, 9 / (10 + step)))
    return method, average


def sample(method: VLFM, network: nn.Module, settings: SampleSettings, seed: int) -> Tensor:
    """(len(READ), SAMPLES, SIDE, SIDE)."""
    none = torch.zeros(SAMPLES)
    told = Conditioning(
        text=torch.zeros(SAMPLES, 1, 8), text_length=torch.ones(SAMPLES, dtype=torch.long), clip_start=none,
        start_given=none, log_duration=none, context=torch.zeros(SAMPLES, 1, 1, SIDE, SIDE),
        context_given=torch.zeros(SAMPLES, 1, dtype=torch.bool),
    )  # fmt: skip
    seeds = tuple(SAMPLES * (seed + 1) + k for k in range(SAMPLES))
    return method.sample(network, Request(told, seeds, (1, SIDE, SIDE), settings)).read(READ)[:, :, 0]


def modes(out: Path, steps: int = 1200, seeds: int = 2, toys: Sequence[str] = tuple(TOYS)) -> str:
    """Trains and samples `TRIALS`, each with `seeds` seeds; writes modes.json and returns the table."""
    lines = ["| toy | network | seed | figures |", "|---|---|---|---|"]
    results = []
    for trial in (trial for trial in TRIALS if trial.toy in toys):
        for seed in range(seeds):
            toy = TOYS[trial.toy](CLIPS, torch.Generator().manual_seed(0))
            coefficients = toy.coefficients()
            scale = float(coefficients.square().sum(1).mean().sqrt())  # to unit mean square, as codecs give latents
            method, network = train(coefficients / scale, trial.options, steps, seed)
            figures = judge(trial.toy, scale * sample(method, network, trial.settings, seed))
            results.append({"toy": trial.toy, "network": trial.name, "seed": seed, "steps": steps, **figures})
            told = ", ".join(f"{name} {_short(value)}" for name, value in figures.items())
            lines.append(f"| {trial.toy} | {trial.name} | {seed} | {told} |")
            print(lines[-1], file=sys.stderr, flush=True)
            write_atomic(out / "modes.json", json.dumps(results, indent=1).encode())
    return "\n".join(lines)


def _short(value: Any) -> str:
    return " / ".join(_short(one) for one in value) if isinstance(value, list) else f"{value:.3f}"


def arguments(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], int]:
    """Add the experiment's options to a parser; returns what runs it."""
    parser.add_argument("--out", required=True, metavar="DIR", help="where modes.json is written")
    parser.add_argument("--steps", type=int, default=1200, help="training steps of each network (default 1200)")
    parser.add_argument("--seeds", type=int, default=2, help="trainings of each network (default 2)")
    parser.add_argument("--toy", choices=list(TOYS), action="append", help="only this one; may be given several times")
    return run_arguments


def run_arguments(options: argparse.Namespace) -> int:
    """Run the experiment as the options say."""
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    print(modes(out, options.steps, options.seeds, options.toy or tuple(TOYS)))
    return 0


def main(given: Sequence[str] | None = None) -> int:
    """Entry of `python -m pipeline.experiments.modes`."""
    return run_program("vlfm experiment modes", str(__doc__).partition("\n")[0], arguments, given)


if __name__ == "__main__":
    sys.exit(main())
