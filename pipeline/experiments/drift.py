"""What keeps a sample from drifting off its clip: small networks on a lake's own clips, sampled in several ways.

All networks are trained alike but for what `VARIANTS` says of each, and every one is sampled in each way of `READINGS`.
Figures are PSNR in dB against the codec's reconstruction of the kept frames, over all training pairs of the lake.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from model import legs
from model.methods.base import Request, SampleSettings
from model.methods.vlfm import VLFM, VLFMOptions
from model.metrics.pictures import decibels, psnr
from model.program import add_settings_option, parse_settings, run_program
from model.progress import Progress
from model.recipes import TrainRecipe
from model.sample import Sampler
from model.settings import override
from model.train import train
from model.training.checkpoint import Run
from model.training.data import Clip, Clips, lake_and_version
from pipeline.experiments.looks import Looks
from storage.fingerprint import fingerprint, short_id
from storage.layout import write_atomic

FORMAT = 1
"""Raise when figures change their meaning, so that those of an older program are made anew."""
CLIPS_AT_ONCE = 16
"""Clips that are sampled together."""
COLUMNS = ("first", "last", "observed", "held_out", "worst")
"""A clip's figures in dB: at the first and the last kept time, over the observed and the held-out times, the worst."""


@dataclass(frozen=True)
class Variant:
    """A network to train."""

    name: str
    """What the table calls it."""
    settings: Mapping[str, Any]
    """Fields of the recipe that set it apart."""


VARIANTS = (
    Variant("sigma 0.1", {"sigma_end": 0.1}),
    Variant("anchor", {"anchor": "first"}),
    Variant("anchor, no jitter", {"anchor": "first", "state_jitter": 0.0}),
    Variant("sigma 0.01", {"sigma_end": 0.01}),
    Variant("sigma 0.03", {"sigma_end": 0.03}),
    Variant("sigma 0.3", {"sigma_end": 0.3}),
    Variant("sigma 0.1, no jitter", {"sigma_end": 0.1, "state_jitter": 0.0}),
    Variant("per frame", {"method": "per_frame"}),
    Variant("paper path", {"path": "paper", "state_jitter": 0.0}),
    Variant("sigma 0.1, jitter 0.1", {"sigma_end": 0.1, "state_jitter": 0.1}),
    Variant("sigma 0.01, no jitter", {"sigma_end": 0.01, "state_jitter": 0.0}),
    Variant("sigma 0.3, no jitter", {"sigma_end": 0.3, "state_jitter": 0.0}),
    Variant("sigma 0.03, no jitter", {"sigma_end": 0.03, "state_jitter": 0.0}),
    Variant("sigma 0.1, jitter 1", {"sigma_end": 0.1, "state_jitter": 1.0}),
)
"""In the order of training. No anchor but where one is named; the jitter is the recipe's where none is said."""
VARIED = {"name", *(key for variant in VARIANTS for key in variant.settings)}
"""Fields that the experiment sets itself."""


@dataclass(frozen=True)
class Reading:
    """A way to sample a network and to read the frames off the trajectory."""

    name: str
    """What the table calls it."""
    source: str = "mean"
    """`mean` or `state`, as in `Trajectory.read`."""
    settings: SampleSettings = field(default_factory=SampleSettings)
    """How to integrate."""
    look: str = "solver"
    """Which states the network is shown on the clip: one of `LOOKS`."""


READINGS = (
    Reading("mean, re-anchored"),
    Reading("mean, not re-anchored", settings=SampleSettings(reanchor=False)),
    Reading("state, re-anchored", "state"),
    Reading("state, not re-anchored", "state", SampleSettings(reanchor=False)),
    Reading("mean, at the true states", look="truth"),
)
"""What every network but `per frame` is read by; at the true states nothing can drift: what the network has learned."""
MORE_READINGS = (
    Reading("8 steps", settings=SampleSettings(steps=8)),
    Reading("32 steps", settings=SampleSettings(steps=32)),
    Reading("64 steps", settings=SampleSettings(steps=64)),
    Reading("128 steps", settings=SampleSettings(steps=128)),
    Reading("midpoint, 16 steps", settings=SampleSettings(steps=16, solver="midpoint")),
    Reading("rk4, 8 steps", settings=SampleSettings(steps=8, solver="rk4")),
    Reading("looks twice, 16 steps", settings=SampleSettings(steps=16), look="twice"),
    Reading("looks twice, 32 steps", look="twice"),
    Reading("looks at the first frame", look="first"),
)
"""Further ones for the networks of MORE_FOR; all read the mean and re-anchor."""
MORE_FOR = ("sigma 0.1", "anchor", "sigma 0.1, no jitter", "sigma 0.1, jitter 1")
PAPER_READINGS = (
    *READINGS,
    Reading("state, not re-anchored, 256 steps", "state", SampleSettings(steps=256, reanchor=False)),
)
"""The printed path is stiff: it gets steps enough too."""
FRAME_READINGS = (
    Reading("mean"),
    Reading("state", "state"),
    Reading("mean, 32 steps", settings=SampleSettings(warmup_steps=32)),
)


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    network: str
    """A variant's name, or `-`."""
    reading: str
    """A reading's name, or what stands in for a sample."""
    calls: int
    """Network calls for a clip with all its kept frames."""
    clips: list[dict[str, float]]
    """Each clip's figures in dB, by COLUMNS."""

    def figure(self, column: str) -> float:
        """The mean over the clips; of `worst` the least."""
        values = [clip[column] for clip in self.clips]
        return min(values) if column == "worst" else statistics.fmean(values)


def drift_recipe() -> TrainRecipe:
    """The recipe of every network but for what sets it apart: small and short, and all states weighed alike."""
    return TrainRecipe(
        name="drift",
        width=192,
        depth=3,
        heads=4,
        patch=4,
        batch=16,
        options=VLFMOptions(
            anchor="none",
            times_per_clip=2,
            warmup_share=0.25,
            state_jitter=0.3,
            clip_start_dropout=0.0,
            context_dropout=0.9,
        ),
        steps=1200,
        learning_rate=2e-3,
        learning_rate_warmup=50,
        ema_decay=0.99,
        checkpoint_every=300,
        log_every=10,
        validate_every=1200,
    )


def experiment(lake: str | Path, out: str | Path, recipe: TrainRecipe) -> list[Row]:
    """Train what is not trained, sample what is not sampled, and write drift.md and drift.json into `out`.

    A network whose recipe or clips change gets a folder of its own; nothing that is there is made again.

    Args:
        lake: the lake; the newest version's training clips.
        out: where runs, figures and the table go.
        recipe: what all networks share.

    Returns:
        The table's rows.

    Raises:
        ValueError: no training clip kept its latents; the message says the remedy.
        model.stop.Stopped: a training was asked to stop; the same call goes on from there.
    """
    out = Path(out)
    opened, version = lake_and_version(lake, None)
    clips = [clip for clip in Clips(opened, version, "train").every() if "latents" in clip.members]
    if not clips:
        raise ValueError(
            f"no training clip of version {version.number} of {lake} kept its latents; "
            "ingest with --set store_latents=true"
        )
    rows: list[Row] = []
    for number, variant in enumerate(VARIANTS, 1):
        chosen = override(recipe, {**variant.settings, "name": f"{recipe.name}: {variant.name}"})
        made_of = fingerprint({"recipe": dataclasses.asdict(chosen), "clips": version.merkle_root})
        run = Run(out / "runs" / f"{variant.name.replace(' ', '-').replace(',', '')}-{short_id(made_of)}")
        if not run.steps() or run.steps()[-1] < chosen.steps:
            print(f"network {number} of {len(VARIANTS)}: {variant.name}", file=sys.stderr)
            train(lake, run.root, chosen, version.number)
        rows += sampled(variant, run, clips)
    rows = [*references(Sampler(run.root), clips), *rows]
    write_atomic(out / "drift.json", json.dumps(as_json(rows), indent=1).encode())
    write_atomic(out / "drift.md", table(rows).encode())
    return rows


def sampled(variant: Variant, run: Run, clips: Sequence[Clip]) -> list[Row]:
    """The rows of one network; what was sampled of this run before is read from its `figures.json`."""
    kept = run.root / "figures.json"
    known: dict[str, Any] = json.loads(kept.read_text()) if kept.is_file() else {}
    about = {"format": FORMAT, "run": run.read()}
    readings = {fingerprint({**about, "reading": dataclasses.asdict(r)}): r for r in readings_of(variant)}
    missing = {made_of: reading for made_of, reading in readings.items() if made_of not in known}
    if missing:
        sampler, progress = Sampler(run.root), Progress("sample", len(missing), "readings")
    for made_of, reading in missing.items():
        latents, calls = sample_clips(sampler, reading, clips)
        measured = [measure(sampler, clip, read) for clip, read in zip(clips, latents, strict=True)]
        row = Row(variant.name, reading.name, calls, measured)
        known[made_of] = dataclasses.asdict(row)
        write_atomic(kept, json.dumps(known).encode())
        progress.advance(note=f"{row.figure('observed'):.1f} dB")
    return [Row(**known[made_of]) for made_of in readings]


def readings_of(variant: Variant) -> tuple[Reading, ...]:
    """How a network is sampled."""
    if variant.settings.get("method") == "per_frame":
        return FRAME_READINGS
    if variant.settings.get("path") == "paper":
        return PAPER_READINGS
    return (*READINGS, *MORE_READINGS) if variant.name in MORE_FOR else READINGS


def sample_clips(sampler: Sampler, reading: Reading, clips: Sequence[Clip]) -> tuple[list[Tensor], int]:
    """Every clip's kept frames (k, C, h, w), each clip from noise of its own, and the network calls for one."""
    found: list[Tensor] = []
    calls = 0
    size = CLIPS_AT_ONCE if isinstance(sampler.method, VLFM) else 1
    for start in range(0, len(clips), size):
        part = clips[start : start + size]
        request = Request(
            conditioning=sampler.conditioning(
                [clip.about["caption"] for clip in part], [clip.about["clip_start"] for clip in part]
            ),
            seeds=tuple(range(start, start + len(part))),
            shape=tuple(sampler.clip["latent_shape"]),
            settings=reading.settings,
        )
        network: nn.Module = sampler.backbone
        if isinstance(sampler.method, VLFM):
            truth = torch.from_numpy(np.stack([clip.members["coefficients"] for clip in part])).float()
            path, scale = sampler.method.path, sampler.method.mean_scale
            network = Looks(sampler.backbone, reading.look, path, scale, request.noise(), truth.to(sampler.device))
        sample: Any = sampler.method.sample(network, request)
        for index, clip in enumerate(part):
            found.append(sample.read(times_of(clip, sampler), reading.source)[:, index])
        calls = network.calls if isinstance(network, Looks) else max(calls, sample.network_calls * len(found[-1]))
    return found, calls


def times_of(clip: Clip, sampler: Sampler) -> Tensor:
    """(k,) float64: the kept frames' places r in the clip."""
    return torch.from_numpy(clip.members["frame_time"] / sampler.window).clamp(0, 1)


def references(sampler: Sampler, clips: Sequence[Clip]) -> list[Row]:
    """What no network is needed for: the projection, a sample's ceiling, and two stills, which a sample must beat."""

    def projection(clip: Clip) -> Tensor:
        coefficients = torch.from_numpy(clip.members["coefficients"].astype("float32"))
        return legs.evaluate(coefficients, times_of(clip, sampler).numpy(), 1.0)

    def mean_frame(clip: Clip) -> Tensor:
        latents = kept_latents(clip)
        return latents.mean(0, keepdim=True).expand_as(latents)

    def first_frame(clip: Clip) -> Tensor:
        latents = kept_latents(clip)
        return latents[:1].expand_as(latents)

    makers: dict[str, Callable[[Clip], Tensor]] = {
        "the projection (ceiling)": projection,
        "the clip's mean frame, held": mean_frame,
        "the clip's first frame, held": first_frame,
    }
    return [Row("–", name, 0, [measure(sampler, clip, make(clip)) for clip in clips]) for name, make in makers.items()]


def kept_latents(clip: Clip) -> Tensor:
    """(k, C, h, w): what the codec made of the clip's kept frames."""
    return torch.from_numpy(clip.members["latents"].astype("float32"))


def measure(sampler: Sampler, clip: Clip, latents: Tensor) -> dict[str, float]:
    """A clip's figures, by COLUMNS, of what was made of its kept frames (k, C, h, w)."""

    def decoded(values: Tensor) -> Tensor:
        return sampler.codec.decode(values.to(sampler.device), text=clip.about["caption"]).cpu()

    # What has run away is a bad figure, not an error of the codec; 100 dB stand for equality, which has no figure.
    latents = latents.nan_to_num(0.0, 1e3, -1e3).clamp(-1e3, 1e3)
    value = psnr(decoded(latents), decoded(kept_latents(clip))).clamp(max=100.0)
    seen = torch.from_numpy(clip.members["observed"].copy())
    held_out = value[~seen] if bool((~seen).any()) else value
    return {
        "first": float(value[0]),
        "last": float(value[-1]),
        "observed": float(value[seen].mean()),
        "held_out": float(held_out.mean()),
        "worst": float(value.min()),
    }


def table(rows: Sequence[Row]) -> str:
    """The rows as a table in Markdown."""
    lines = ["| network | frames from | calls | " + " | ".join(c.replace("_", "-") for c in COLUMNS) + " |"]
    lines.append("|" + "---|" * (3 + len(COLUMNS)))
    for row in rows:
        cells = [row.network, row.reading, str(row.calls or "–"), *(decibels(row.figure(c)) for c in COLUMNS)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def as_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows with their figures, and each clip's."""
    return [{**dataclasses.asdict(row), **{column: row.figure(column) for column in COLUMNS}} for row in rows]


def arguments(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], int]:
    """Add the experiment's options to a parser; returns what runs them."""
    parser.add_argument("--lake", required=True, metavar="DIR", help="a lake that `vlfm ingest` wrote")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the networks, drift.md and drift.json")
    parser.add_argument("--steps", type=int, metavar="N", help="optimiser steps of each network (default 1200)")
    add_settings_option(parser, "width=192", "a field of the recipe that all networks share")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON, with every clip's figures")
    return run_arguments


def run_arguments(options: argparse.Namespace) -> int:
    """Run the experiment as the options say, and print its table."""
    settings: dict[str, Any] = dict(parse_settings(options.settings))
    for key in settings:
        if key in VARIED:
            raise ValueError(f"--set {key}: the experiment varies {key} itself; its networks are in drift.py, VARIANTS")
    if options.steps is not None:
        settings["steps"] = options.steps
    recipe = override(drift_recipe(), settings)
    rows = experiment(options.lake, options.out, recipe)
    print(json.dumps(as_json(rows)) if options.json else table(rows), end="")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry of `vlfm experiment drift`."""
    return run_program("vlfm experiment drift", str(__doc__).partition("\n")[0], arguments, argv)


if __name__ == "__main__":
    sys.exit(main())
