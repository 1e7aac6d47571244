"""`python -m model.text_train`: trains a small text encoder by contrast between captions and clips of lakes.

A tower of convolutions reads each clip's latents at a few times, the text encoder its caption, and both learn to find
each other (`model.text.contrast`). The tower is thrown away; the text encoder is written as a folder that a data recipe
names: `--set 'text={"kind":"pretrained","source":"FOLDER"}'`. The clips are held in memory.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model.legs import evaluate
from model.program import add_settings_option, parse_settings, run_program
from model.settings import override
from model.stop import StopSignal
from model.text.contrast import ClipTower, Contrast, new_text_model
from model.text.encoder import bundled_tokenizer
from model.text.words import vocabulary
from model.training.checkpoint import Run
from model.training.data import Clips, lake_and_version
from model.training.ema import MovingAverage
from model.training.log import read_log
from model.training.loop import Schedule, Training, run_training
from model.training.optimizers import adamw, cosine
from model.training.processes import ALONE
from model.training.seeds import mixed_seed
from model.training.state import TrainingState
from storage.fingerprint import fingerprint

MARKS = 2
"""The vocabulary's last tokens are the marks of start and end."""


@dataclass(frozen=True)
class TextRecipe:
    """How a text encoder is trained."""

    width: int = 128
    """Width of an embedding, a multiple of the heads."""
    layers: int = 2
    """Transformer blocks."""
    heads: int = 4
    """Attention heads."""
    length: int = 77
    """Most tokens of a caption, start and end marks included."""
    times: int = 6
    """Points of a clip's path that are looked at, spread evenly over the window."""
    grid: int = 16
    """Side that latents are averaged or repeated to before they are looked at, a multiple of 4."""
    tower: int = 64
    """Channels of the clip tower's first convolution, a multiple of 4."""
    steps: int = 500
    """Steps of the run."""
    batch: int = 64
    """Clips in a step."""
    learning_rate: float = 1e-3
    """Peak of AdamW's learning rate."""
    latent_noise: float = 0.5
    """Standard deviation of the noise on the clips' standardised latents."""
    word_loss: float = 0.5
    """Weight of the loss that keeps words apart."""
    word_batch: int = 32
    """Captions in a step of that loss."""
    words_replaced: float = 0.5
    """Share of those captions' tokens that any others of the vocabulary take the place of."""
    ema_decay: float = 0.998
    """Decay of the average of the weights, which is what is written."""
    seed: int = 0
    """Seed of weights, batches and noise."""
    save_every: int = 100
    """Steps between two checkpoints."""
    hold_out: tuple[str, ...] = ("carphone", "armwrestling")
    """Films, by name without suffix, that are never trained on."""


@dataclass(frozen=True)
class Paths:
    """The clips of one lake, as the tower sees them."""

    films: list[str]
    """Films' paths relative to the lake's source, one for each clip."""
    captions: list[str]
    """One for each clip."""
    paths: Tensor
    """(N, T, C, g, g) float16, each channel with mean 0 and variance 1 over the lake."""


def read_paths(
    lake: str | Path, times: int, grid: int, hold_out: Sequence[str] = (), split: str | None = "train"
) -> Paths:
    """The clips of a split of a lake's newest version, without the films that are held out.

    Raises:
        ValueError: the lake has no such clip; the message says the remedy.
    """
    clips = Clips(*lake_and_version(lake, None), split, ["coefficients"])
    films, captions, paths = [], [], []
    for clip in clips.every():
        if Path(clip.about["film"]).stem in hold_out:
            continue
        coefficients = torch.from_numpy(clip.members["coefficients"].astype(np.float32))
        duration = float(clips.version.clip["duration"])
        path = evaluate(coefficients, (np.arange(times) + 0.5) / times * duration, duration)
        films.append(clip.about["film"])
        captions.append(clip.about["caption"])
        paths.append(torch.nn.functional.adaptive_avg_pool2d(path, grid).half())
    if not films:
        raise ValueError(f"lake {lake} has no clip to train on besides the held-out films; ingest films with captions")
    together = torch.stack(paths)
    plain = together.float()
    deviation, mean = torch.std_mean(plain, (0, 1, 3, 4), keepdim=True)
    return Paths(films, captions, ((plain - mean) / deviation.clamp_min(1e-6)).half())


@dataclass(frozen=True)
class Words:
    """The captions of a run as tokens."""

    more: str
    """Words of the captions that the bundled vocabulary lacks, see `model.text.words.merges`."""
    captions: list[str]
    """Different captions, sorted."""
    tokens: Tensor
    """(M, L) int64, padded to the longest."""
    lengths: Tensor
    """(M,) valid tokens."""

    @property
    def vocabulary(self) -> dict[str, int]:
        """Token to number."""
        return vocabulary(self.more)


def words_of(captions: Sequence[str], length: int) -> Words:
    """The different captions as tokens; each of their words of letters is one token."""
    distinct = sorted(set(captions))
    more = " ".join(sorted({word for caption in distinct for word in re.findall("[a-z]+", caption.lower())}))
    tokens = bundled_tokenizer(length, more)(distinct, padding=True, truncation=True, return_tensors="pt")
    return Words(more, distinct, tokens["input_ids"], tokens["attention_mask"].sum(1))


def training_of(contrast: Contrast, lakes: Sequence[Paths], words: Words, recipe: TextRecipe) -> Training:
    """The losses of a step: its clips, noise and replaced words are functions of seed and step."""
    numbers = {caption: number for number, caption in enumerate(words.captions)}
    which = [torch.tensor([numbers[caption] for caption in lake.captions]) for lake in lakes]

    def losses(step: int, _: None) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(mixed_seed(recipe.seed, step))
        shares = torch.randint(len(lakes), (recipe.batch,), generator=generator)
        chosen, paths = [], []
        for number, lake in enumerate(lakes):
            rows = torch.randint(len(lake.films), (int((shares == number).sum()),), generator=generator)
            chosen.append(which[number][rows])
            paths.append(lake.paths[rows].float())
        seen = torch.cat(paths)
        seen = seen + recipe.latent_noise * torch.randn(seen.shape, generator=generator)
        distinct, place = torch.cat(chosen).unique(return_inverse=True)
        contrast_value = contrast.losses(seen, words.tokens[distinct], words.lengths[distinct], place)
        told = torch.randint(len(words.captions), (recipe.word_batch,), generator=generator)
        tokens, lengths = replaced(words, told, recipe.words_replaced, generator)
        word_value = contrast.word_loss(tokens, lengths)
        return {
            "loss": contrast_value + recipe.word_loss * word_value,
            "contrast": contrast_value,
            "words": word_value,
        }

    return Training(
        losses=losses,
        learning_rate=lambda step: min(1.0, step / 100) * cosine((step - 1) / recipe.steps),
        gradient_clip=1.0,
        samples=recipe.batch,
        name="text",
    )


def replaced(words: Words, chosen: Tensor, share: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Captions by number as tokens (B, L) and lengths (B,), a share of their tokens replaced by any; the marks stay."""
    tokens, lengths = words.tokens[chosen], words.lengths[chosen]
    place = torch.arange(tokens.shape[1])
    inner = (place > 0) & (place < lengths[:, None] - 1)
    other = torch.randint(len(words.vocabulary) - MARKS, tokens.shape, generator=generator)
    taken = inner & (torch.rand(tokens.shape, generator=generator) < share)
    return torch.where(taken, other, tokens), lengths


def train_text(lakes: Sequence[str | Path], folder: Path, out: Path, recipe: TextRecipe) -> Path:
    """Trains, or goes on training, in `folder`, and writes the text encoder to `out`.

    Raises:
        ValueError: lakes whose latents differ in channels, one without clips, or a run begun with another recipe.
        LakeBusy: another trainer holds the run; the message has its process id.
        Stopped: SIGTERM or Ctrl-C; the same call goes on.
        FloatingPointError: too many steps in a row are not finite; the last good checkpoint stays.
    """
    read = {str(lake): read_paths(lake, recipe.times, recipe.grid, recipe.hold_out) for lake in lakes}
    clips = [read[str(lake)] for lake in lakes]
    if len(channels := {lake.paths.shape[2] for lake in clips}) > 1:
        raise ValueError(f"the lakes' latents have {sorted(channels)} channels: make all lakes with one codec")
    words = words_of([caption for lake in clips for caption in lake.captions], recipe.length)
    footage = fingerprint([sorted([*pair] for pair in zip(lake.films, lake.captions, strict=True)) for lake in clips])
    about = {"recipe": json.loads(json.dumps(dataclasses.asdict(recipe))), "footage": footage}
    run = Run(folder)
    if run.file.is_file() and run.read() != about:
        raise ValueError(
            f"the run {folder} was begun with another recipe or other clips; give another --run, or the same settings"
        )
    run.write(about)
    torch.manual_seed(recipe.seed)
    contrast = Contrast(
        new_text_model(words.vocabulary, recipe.width, recipe.layers, recipe.heads, recipe.length),
        ClipTower(recipe.times, channels.pop(), recipe.grid, recipe.tower, recipe.width),
    )
    optimizer = adamw(
        [parameter for parameter in contrast.parameters() if parameter.requires_grad],
        recipe.learning_rate, weight_decay=1e-2, second_beta=0.99,
    )  # fmt: skip
    state = TrainingState(contrast, MovingAverage(contrast, recipe.ema_decay), [optimizer])
    schedule = Schedule(
        steps=recipe.steps, log_every=50, checkpoint_every=recipe.save_every, checkpoints_kept=1, mean_losses=True
    )
    with StopSignal() as stop, run.lock():
        run_training(training_of(contrast, clips, words, recipe), state, run, schedule, ALONE, stop)
    state.average.copy_to(contrast)
    rows = [row for row in read_log(run.log) if "contrast" in row][-10:]
    record = {
        **about,
        "films": sorted({film for lake in clips for film in lake.films}),
        "clips": [len(lake.films) for lake in clips],
        "captions": words.captions,
        "losses": {name: round(float(np.mean([row[name] for row in rows])), 4) for name in ("contrast", "words")},
    }
    write_text_folder(out, contrast.text, words, recipe.length, record)
    return out


def write_text_folder(folder: Path, text: Any, words: Words, length: int, record: dict[str, Any]) -> None:
    """Writes text encoder (in 16 bits) and tokenizer in Stable Diffusion's layout, and the record `training.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    text.half().save_pretrained(folder / "text_encoder", safe_serialization=True)
    bundled_tokenizer(length, words.more).save_pretrained(folder / "tokenizer")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=1) + "\n")
    (folder / "training.json").write_text(json.dumps(record, indent=1) + "\n")


def arguments(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], int]:
    """Add the program's options to a parser; returns what runs them."""
    parser.add_argument(
        "--lake", action="append", required=True, metavar="DIR", help="a lake; several have equal shares"
    )
    parser.add_argument("--run", required=True, metavar="DIR", help="where the training is kept; it is resumed")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the text encoder and its tokenizer")
    add_settings_option(parser, "steps=500", "a field of TextRecipe")
    return run_arguments


def run_arguments(options: argparse.Namespace) -> int:
    """Train as the options say."""
    recipe = override(TextRecipe(), parse_settings(options.settings))
    print(train_text(options.lake, Path(options.run), Path(options.out), recipe))
    return 0


def main(given: Sequence[str] | None = None) -> int:
    """Entry of `python -m model.text_train`."""
    return run_program("model.text_train", (__doc__ or "").splitlines()[0], arguments, given)


if __name__ == "__main__":
    sys.exit(main())
