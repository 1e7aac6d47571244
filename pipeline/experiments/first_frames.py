"""A quick look at what a network and its recipe learn of captions: first frames alone, judged by the probes.

The films of the compositional corpus are drawn, not ingested; the clips are still frames of them, so that only the way
from noise to a first frame is learned. The pairs that are left out here are others than those that the corpus holds
out: settings can be chosen by them, and the listed ones stay unseen.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from model.backbones.conditioning import Conditioning
from model.backbones.dit import Backbone, BackboneConfig
from model.codecs.base import Codec
from model.codecs.factory import codec_from_spec
from model.methods.base import Batch, Request, SampleSettings
from model.methods.vlfm import VLFM
from model.program import add_settings_option, parse_settings, run_program
from model.recipes import TrainRecipe, train_recipe
from model.settings import override
from model.spread import spread_evenly
from model.text.encoder import TextEncoder, text_encoder_from_spec
from model.training.ema import MovingAverage
from model.training.objective import Objective
from model.training.optimizers import learning_rate_factor, make_optimizers, set_learning_rate
from model.training.processes import ALONE
from model.video import from_frames, to_frames
from pipeline.corpus.combinations import plan_combinations
from pipeline.corpus.drawing import draw_frames
from pipeline.corpus.grammar import Attributes, combinations
from pipeline.corpus.probes import read_attributes
from pipeline.recipes import combinations as data_recipe

LEFT_OUT = (("green", "wide bar"), ("blue", "tall bar"))
"""Colours and objects that are not trained on together, of the combinations that the corpus trains on: of those objects
that it holds out no colour of, so that four of five colours of each are seen, as of those that it holds out."""
JUDGED = ("background", "colour", "object", "size")
"""What a still frame shows."""
WINDOW = 2.0
"""Seconds of a film that frames are taken from."""
WARMUP_SHARE = 0.99
"""Nearly all states: a still clip has nothing to teach along it."""
AT_ONCE = 32
"""Frames that are sampled together."""


def is_left_out(one: Attributes) -> bool:
    """Whether a combination is kept from this training."""
    return (one.colour, one.object) in LEFT_OUT


@dataclasses.dataclass(frozen=True)
class Stills:
    """Still frames of films as clips of order 1, and the captions to judge by."""

    latents: Tensor
    """(films, frames, C, h, w)."""
    shown: list[Attributes]
    """Of each film."""
    text: Tensor
    """(films, M, D)."""
    text_length: Tensor
    """(films,)."""
    empty_text: Tensor
    """(E, D)."""

    def batch(self, films: Tensor, frames: Tensor) -> Batch:
        """One frame (B,) of each of these films (B,)."""
        count = len(films)
        return Batch(
            clip_ids=("",) * count,
            text=self.text[films],
            text_length=self.text_length[films],
            empty_text=self.empty_text,
            clip_start=torch.zeros(count),
            duration=torch.full((count,), WINDOW),
            coefficients=self.latents[films, frames][:, None],
        )


def draw_stills(codec: Codec, encoder: TextEncoder, films: int, frames: int, seed: int) -> Stills:
    """Frames at random times of films of the corpus's training, without the pairs left out."""
    draw = np.random.default_rng(seed)
    chosen = [film for film in plan_combinations(seed, films) if not is_left_out(film.attributes)]
    if not chosen:
        raise ValueError(f"--films {films}: none is left without the pairs left out; ask for more")
    latents = [
        codec.encode(from_frames(draw_frames(film.attributes, film.path, draw.uniform(0, WINDOW, frames)))).latents
        for film in chosen
    ]
    text, length = encoder.encode([film.attributes.caption for film in chosen])
    empty, empty_length = encoder.encode([""])
    shown = [film.attributes for film in chosen]
    return Stills(torch.stack(latents), shown, text, length, empty[0, : int(empty_length[0])])


def train(stills: Stills, method: VLFM, recipe: TrainRecipe, tell: Callable[[str], None]) -> Backbone:
    """A backbone with the averaged weights of the recipe's steps."""
    channels, height, width = stills.latents.shape[2:]
    torch.manual_seed(recipe.seed)
    backbone = Backbone(
        BackboneConfig(
            channels, height, width, stills.text.shape[2], recipe.width, recipe.depth, recipe.heads, recipe.patch,
            outputs=method.heads, qk_norm=recipe.qk_norm, stem=recipe.stem, stem_depth=recipe.stem_depth,
        )
    )  # fmt: skip
    optimizers, average = make_optimizers(backbone, recipe), MovingAverage(backbone, recipe.ema_decay)
    objective, draw = Objective(method, recipe, ALONE), torch.Generator().manual_seed(recipe.seed)
    losses: list[float] = []
    for step in range(1, recipe.steps + 1):
        films = torch.randint(len(stills.latents), (recipe.batch,), generator=draw)
        frames = torch.randint(stills.latents.shape[1], (recipe.batch,), generator=draw)
        found = objective.losses(backbone, step, stills.batch(films, frames))
        found["loss"].backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(backbone.parameters(), recipe.gradient_clip)
        for optimizer in optimizers:
            set_learning_rate(optimizer, learning_rate_factor(step, recipe))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        average.update(backbone)
        losses.append(float(found["mean"]))
        if step % 50 == 0 or step == recipe.steps:
            tell(
                f"step {step}  mean {statistics.fmean(losses[-50:]):.4f}  {time.process_time():.0f} s of the processor"
            )
    average.copy_to(backbone)
    return backbone.eval()


def judge(
    backbone: Backbone, method: VLFM, codec: Codec, encoder: TextEncoder, wanted: Sequence[Attributes], guidance: float
) -> dict[str, float]:
    """Share of first frames of these captions, one each, with each attribute right, and `all` of them."""
    right: list[list[bool]] = []
    config = backbone.config
    for first in range(0, len(wanted), AT_ONCE):
        part = wanted[first : first + AT_ONCE]
        count = len(part)

        def told(captions: Sequence[str], count: int = count) -> Conditioning:
            text, length = encoder.encode(list(captions))
            shape = (config.channels, config.height, config.width_latent)
            return Conditioning(
                text, length, torch.zeros(count), torch.zeros(count), torch.full((count,), WINDOW).log(),
                torch.zeros(count, 1, *shape), torch.zeros(count, 1, dtype=torch.bool),
            )  # fmt: skip

        request = Request(
            told([one.caption for one in part]),
            tuple(range(first, first + count)),
            (config.channels, config.height, config.width_latent),
            SampleSettings(steps=1, guidance=guidance),
            told([""] * count) if guidance != 1 else None,
        )
        latents = method.sample(backbone, request).read([0.0])[0]
        for frame, one in zip(to_frames(codec.decode(latents)), part, strict=True):
            reading = read_attributes(np.repeat(frame[None], 4, axis=0), np.arange(4) / 8).right(one)
            right.append([reading[name] for name in JUDGED])
    shares = {name: statistics.fmean(column) for name, column in zip(JUDGED, zip(*right, strict=True), strict=True)}
    return {**shares, "all": statistics.fmean(all(row) for row in right)}


def experiment(
    recipe: TrainRecipe, films: int, frames: int, captions: int, guidances: Sequence[float], tell: Callable[[str], None]
) -> dict[str, dict[str, float]]:
    """Shares right, of pairs left out and of captions trained on, at each guidance."""
    data = data_recipe()
    codec, encoder = codec_from_spec(data.codec), text_encoder_from_spec(data.text)
    stills = draw_stills(codec, encoder, films, frames, recipe.seed)
    scale = float(stills.latents.square().mean().sqrt())
    options = dataclasses.replace(recipe.options, warmup_share=WARMUP_SHARE, anchor="first", derivative_weight=0.0)
    figures = {"mean_scale": scale, "derivative_scale": 1.0}
    method = VLFM.build(options, figures, {"latent_shape": list(stills.latents.shape[2:])})
    backbone = train(stills, method, dataclasses.replace(recipe, options=options), tell)
    out = spread_evenly([one for one in combinations(held_out=False) if is_left_out(one)], captions)
    known = spread_evenly(list(dict.fromkeys(stills.shown)), captions)
    return {
        f"{name}, guidance {guidance:g}": judge(backbone, method, codec, encoder, wanted, guidance)
        for name, wanted in (("left out", out), ("trained on", known))
        for guidance in guidances
    }


def table(found: Mapping[str, Mapping[str, float]]) -> str:
    """The figures as text."""
    lines = ["| first frames of captions | " + " | ".join((*JUDGED, "all")) + " |", "|---|" + "---|" * 5]
    lines += [f"| {name} | " + " | ".join(f"{100 * v:.0f}" for v in row.values()) + " |" for name, row in found.items()]
    return "\n".join(lines)


def arguments(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], int]:
    """Add the experiment's options to a parser; returns what runs them."""
    parser.add_argument("--recipe", default="combinations", metavar="NAME", help="training recipe, of method vlfm")
    parser.add_argument("--films", type=int, default=900, metavar="N", help="films that are drawn (default 900)")
    parser.add_argument("--frames", type=int, default=8, metavar="N", help="frames of each (default 8)")
    parser.add_argument("--captions", type=int, default=80, metavar="N", help="captions of each kind (default 80)")
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0, 2.0, 3.0], help="(default 1 2 3)")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    add_settings_option(parser, "steps=600")
    return run_arguments


def run_arguments(options: argparse.Namespace) -> int:
    """Train, judge, and print the table."""
    recipe: Any = override(train_recipe(options.recipe), parse_settings(options.settings))
    if recipe.method != "vlfm":
        raise ValueError(f"method is {recipe.method!r}; this experiment knows vlfm alone")
    if min(options.films, options.frames, options.captions) < 1:
        raise ValueError("--films, --frames and --captions must be at least 1")

    def tell(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    found = experiment(recipe, options.films, options.frames, options.captions, options.guidance, tell)
    print(json.dumps(found) if options.json else table(found))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry of `vlfm experiment first_frames`."""
    return run_program("vlfm experiment first_frames", str(__doc__).partition("\n")[0], arguments, argv)


if __name__ == "__main__":
    sys.exit(main())
