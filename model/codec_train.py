"""`python -m model.codec_train`: trains a small codec in Stable Diffusion's layout on the frames that lakes keep.

Two stages, each resumed where it stands: the autoencoder on small crops (mean square error and a little KL), then
UNet and text encoder on its latents by predicting noise (Ho, Jain, Abbeel 2020) at the levels of `model.codecs.ddim`.
Films that are held out are never read.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from model.codecs.ddim import TRAIN_STEPS, noise_levels
from model.codecs.networks import (
    TEXT_LENGTH,
    new_autoencoder,
    new_text_model,
    new_unet,
    scale_latents,
    start_from,
    start_from_blocks,
    trained_denoiser,
    write_folder,
)
from model.program import add_settings_option, parse_settings, run_program
from model.progress import Progress
from model.settings import override
from model.stop import StopSignal
from model.text.encoder import bundled_tokenizer
from model.training.checkpoint import Run, load_average
from model.training.codec_data import Footage, contrasted, dead_leaves, drawn, footage, random_crop, recoloured
from model.training.ema import MovingAverage
from model.training.log import read_log
from model.training.loop import Schedule, Training, run_training
from model.training.optimizers import adamw, cosine
from model.training.processes import ALONE
from model.training.seeds import mixed_seed
from model.training.state import TrainingState
from storage.fingerprint import fingerprint

EMPTY = 0
"""Number of the empty caption among the captions of a run."""
LOSSES = {"vae": ("loss", "error", "size"), "unet": ("loss",)}
"""The stages, and the names of their losses."""


@dataclass(frozen=True)
class CodecRecipe:
    """How a codec is trained."""

    channels: int = 24
    """Channels of the latents: numbers kept of a block of 8 x 8 pixels."""
    vae_widths: tuple[int, int, int] = (48, 96, 192)
    """Channels of the autoencoder's levels at a half, a quarter and an eighth, each twice the one before."""
    unet_widths: tuple[int, ...] = (64, 112, 128)
    """Channels of the UNet's three levels, multiples of 16."""
    block_pictures: int = 512
    """Crops that the principal components of blocks are fitted on, with which the autoencoder begins."""
    vae_steps: int = 13_000
    """Steps of the autoencoder."""
    vae_batch: int = 8
    """Crops in a step of the autoencoder."""
    crop: int = 64
    """Side of a crop in pixels, a multiple of 8."""
    leaves: float = 0.15
    """Share of the pictures that are dead leaves."""
    uncaptioned: float = 0.4
    """Share of the UNet's pictures that are crops in other colours, mirrored or not, with the empty caption."""
    latent_noise: float = 0.02
    """Standard deviation of the noise on the autoencoder's latents in training, which keeps the decoder smooth."""
    latent_weight: float = 1e-4
    """Weight of the latents' mean square, which keeps them near unit variance, so that the noise counts."""
    vae_learning_rate: float = 1e-3
    """Peak of AdamW's learning rate for the autoencoder."""
    unet_steps: int = 8_500
    """Steps of UNet and text encoder."""
    unet_batch: int = 16
    """Latents in a step of the UNet."""
    unet_learning_rate: float = 1e-3
    """Peak of AdamW's learning rate for UNet and text encoder."""
    sides: tuple[int, ...] = (128, 128, 64)
    """Sides in pixels of the pictures whose latents the UNet sees; steps take turns."""
    latents: int = 10_240
    """Pictures whose latents are made once, for each side, and drawn from."""
    caption_dropout: float = 0.1
    """Share of the UNet's captions that are left out."""
    ema_decay: float = 0.998
    """Decay of the average of the weights, which is what is written."""
    contrast: float = 1.4
    """Largest factor, and 1 by it the smallest, on the contrast of the UNet's uncaptioned pictures; 1 leaves it."""
    mixed: bool = True
    """Whether convolutions and products compute in bfloat16: faster with AMX, four times slower on a CPU without."""
    seed: int = 0
    """Seed of weights, crops and noise."""
    save_every: int = 250
    """Steps between two checkpoints."""
    hold_out: tuple[str, ...] = ("carphone", "armwrestling")
    """Films, by name without suffix, that are never trained on."""


@dataclass
class Stage:
    """One of the two trainings: what it trains, how many steps, and the loss of a step."""

    name: str
    network: nn.Module
    steps: int
    learning_rate: float
    loss: Callable[[int], dict[str, Tensor]]
    batch: int = 1
    """Pictures of a step."""

    def train(self, folder: Path, recipe: CodecRecipe) -> None:
        """Goes on from the newest checkpoint to the last step.

        Raises:
            Stopped: SIGTERM or Ctrl-C; the same call goes on.
            FloatingPointError: too many steps in a row are not finite; the last good checkpoint stays.
        """
        run = Run(folder / self.name)
        optimizer = adamw(self.network.parameters(), self.learning_rate, weight_decay=1e-2, second_beta=0.99)
        state = TrainingState(self.network, MovingAverage(self.network, recipe.ema_decay), [optimizer])
        warm_up = min(200, 1 + self.steps // 10)
        training = Training(
            losses=lambda step, _: self.loss(step - 1),
            learning_rate=lambda step: min(1.0, step / warm_up) * cosine((step - 1) / self.steps),
            gradient_clip=1.0,
            samples=self.batch,
            name=self.name,
            part=f" of {self.name}",
        )
        schedule = Schedule(
            steps=self.steps,
            log_every=50,
            checkpoint_every=recipe.save_every,
            checkpoints_kept=1,
            mean_losses=True,
        )
        with StopSignal() as stop, run.lock():
            last = run_training(training, state, run, schedule, ALONE, stop)
        load_average(last, self.network)
        self.network.eval()


def pictures(lakes: Sequence[Sequence[Footage]], count: int, recipe: CodecRecipe, step: int) -> Tensor:
    """A step's crops for the autoencoder, (count, 3, crop, crop) in [-1, 1]; lakes have equal shares."""
    random = np.random.default_rng([recipe.seed, 1, step + 1])
    made = []
    for _ in range(count):
        if random.random() < recipe.leaves:
            made.append(dead_leaves(recipe.crop, random))
            continue
        made.append(recoloured(random_crop(drawn(lakes, random), recipe.crop, 0.35, random), random))
    return torch.stack(made) * 2 - 1


def autoencoder_stage(vae: nn.Module, lakes: Sequence[Sequence[Footage]], recipe: CodecRecipe) -> Stage:
    """Mean square error of the reconstruction from latents with a little noise, and the latents' mean square."""
    network: Any = vae

    def loss(step: int) -> dict[str, Tensor]:
        batch = pictures(lakes, recipe.vae_batch, recipe, step).contiguous(memory_format=torch.channels_last)
        generator = torch.Generator().manual_seed(mixed_seed(recipe.seed, 1, step))
        with torch.autocast("cpu", torch.bfloat16, enabled=recipe.mixed):
            latents = network.encode(batch).latent
            noise = torch.randn(latents.shape, generator=generator)
            made = network.decode(latents + recipe.latent_noise * noise).sample
        error, size = (made.float() - batch).square().mean(), latents.float().square().mean()
        return {"loss": error + recipe.latent_weight * size, "error": error, "size": size}

    return Stage("vae", vae, recipe.vae_steps, recipe.vae_learning_rate, loss, recipe.vae_batch)


def captioned(
    lakes: Sequence[Sequence[Footage]], side: int, recipe: CodecRecipe, random: np.random.Generator
) -> tuple[Tensor, str]:
    """A picture for the UNet, (3, side, side) in [0, 1], and its caption.

    Captions name colours and sides, so what is recoloured or mirrored has the empty one.
    """
    kind = random.random()
    if kind < recipe.leaves:
        return dead_leaves(side, random), ""
    clip = drawn(lakes, random)
    picture = random_crop(clip, side, 0.7, random)
    if kind < recipe.leaves + recipe.uncaptioned:
        return contrasted(recoloured(picture, random), recipe.contrast, random), ""
    return picture, clip.caption


@torch.no_grad()
def make_latents(
    vae: nn.Module, lakes: Sequence[Sequence[Footage]], recipe: CodecRecipe, folder: Path
) -> tuple[dict[int, tuple[Tensor, Tensor]], list[str]]:
    """Normalised latents (N, C, h, h) of each side with their captions' numbers (N,); the captions.

    Made once and kept in the run. Each channel has standard deviation 1, over all sides alike, and the autoencoder is
    left with latents that have (`scale_latents`).
    """
    network: Any = vae
    captions = ["", *sorted({clip.caption for clips in lakes for clip in clips})]
    numbers = {caption: number for number, caption in enumerate(captions)}
    file = folder / "latents.safetensors"
    if not file.is_file():
        tensors: dict[str, Tensor] = {}
        for side in sorted(set(recipe.sides)):
            progress = Progress(f"latents {side}", recipe.latents, "pictures", every=10)
            rows, which = [], []
            for first in range(0, recipe.latents, 32):
                random = np.random.default_rng([recipe.seed, 2, side, first])
                chosen = [captioned(lakes, side, recipe, random) for _ in range(min(32, recipe.latents - first))]
                batch = torch.stack([picture for picture, _ in chosen]) * 2 - 1
                rows.append(network.encode(batch).latent.contiguous())
                which += [numbers[caption] for _, caption in chosen]
                progress.update(len(which))
            tensors[f"latents{side}"], tensors[f"captions{side}"] = torch.cat(rows).contiguous(), torch.tensor(which)
        save_file(tensors, file)
    tensors = load_file(file)
    made = {side: (tensors[f"latents{side}"], tensors[f"captions{side}"]) for side in sorted(set(recipe.sides))}
    deviation = torch.stack([latents.var((0, 2, 3)) for latents, _ in made.values()]).mean(0).sqrt()
    scale_latents(vae, deviation)
    return {side: (latents / deviation.view(-1, 1, 1), which) for side, (latents, which) in made.items()}, captions


class Denoiser(nn.Module):
    """UNet and text encoder together: what predicts noise from a caption."""

    def __init__(self, unet: nn.Module, text_model: nn.Module) -> None:
        super().__init__()
        self.unet, self.text_model = unet, text_model

    def forward(self, latents: Tensor, ddim_step: Tensor, tokens: Tensor) -> Tensor:
        """Noise (B, C, h, w) in latents of that shape at ddim_step (B,), for captions as tokens (B, L)."""
        text = self.text_model(input_ids=tokens).last_hidden_state
        noise: Tensor = self.unet(latents, ddim_step, encoder_hidden_states=text).sample
        return noise.float()


def denoiser_stage(
    denoiser: Denoiser, sets: dict[int, tuple[Tensor, Tensor]], captions: Sequence[str], recipe: CodecRecipe
) -> Stage:
    """Mean square error of the predicted noise at levels drawn evenly."""
    levels = torch.from_numpy(noise_levels()).float()
    layout = torch.channels_last if recipe.mixed else torch.contiguous_format
    tokenizer = bundled_tokenizer(TEXT_LENGTH)
    tokens = tokenizer(list(captions), padding="max_length", truncation=True, return_tensors="pt")["input_ids"]

    def loss(step: int) -> dict[str, Tensor]:
        latents, which = sets[recipe.sides[step % len(recipe.sides)]]
        generator = torch.Generator().manual_seed(mixed_seed(recipe.seed, 2, step))
        chosen = torch.randint(len(latents), (recipe.unet_batch,), generator=generator)
        clean, number = latents[chosen], which[chosen]
        dropped = torch.rand(len(chosen), generator=generator) < recipe.caption_dropout
        number = torch.where(dropped, EMPTY, number)
        # Evenly spread over the levels within a batch, which quiets the loss.
        place = (torch.arange(len(chosen)) + torch.rand(len(chosen), generator=generator)) / len(chosen)
        ddim_step = (place * TRAIN_STEPS).long()
        noise = torch.randn(clean.shape, generator=generator)
        level = levels[ddim_step].view(-1, 1, 1, 1)
        noisy = level.sqrt() * clean + (1 - level).sqrt() * noise
        with torch.autocast("cpu", torch.bfloat16, enabled=recipe.mixed):
            predicted = denoiser(noisy.contiguous(memory_format=layout), ddim_step, tokens[number])
        return {"loss": (predicted - noise).square().mean()}

    return Stage("unet", denoiser, recipe.unet_steps, recipe.unet_learning_rate, loss, recipe.unet_batch)


def train_codec(
    lakes: Sequence[str | Path], folder: Path, out: Path, recipe: CodecRecipe, start: str | Path | None = None
) -> Path:
    """Trains, or goes on training, in `folder`, and writes the codec to `out`.

    start: a codec whose weights UNet and text encoder start from; it may have fewer channels, but no other widths.
        None for random weights.

    Raises:
        ValueError: a lake without frames, a run that was begun with another recipe or start, an unfit start.
        CodecUnavailable: `start` is not there, or not whole.
        Stopped: SIGTERM or Ctrl-C; the same call goes on.
    """
    about = json.loads(json.dumps(asdict(recipe)))
    began = None if start is None else trained_denoiser(start)
    if start is not None:
        about["start"] = Path(start).name
    run = Run(folder)
    if run.file.is_file() and run.read()["recipe"] != about:
        raise ValueError(f"the run {folder} was begun with another recipe; give another --run, or the same settings")
    run.write({"recipe": about})
    clips = footage(lakes, recipe.hold_out)
    torch.manual_seed(recipe.seed)
    vae, text_model = new_autoencoder(recipe.vae_widths, recipe.channels), new_text_model()
    unet = new_unet(recipe.unet_widths, recipe.channels)
    for network, trained in zip((unet, text_model), began or (), strict=False):
        start_from(network, trained)
    if not Run(folder / "vae").steps():
        start_from_blocks(vae, pictures(clips, recipe.block_pictures, recipe, -1))
    denoiser = Denoiser(unet, text_model)
    cast(Any, vae).to(memory_format=torch.channels_last)
    if recipe.mixed:  # in float32 the UNet's small maps are faster as they are
        cast(Any, denoiser).to(memory_format=torch.channels_last)
    autoencoder_stage(vae, clips, recipe).train(folder, recipe)
    sets, captions = make_latents(vae, clips, recipe, folder)
    denoiser_stage(denoiser, sets, captions, recipe).train(folder, recipe)
    films = sorted({clip.film for lake in clips for clip in lake})
    record = {
        "recipe": about,
        "films": films,
        "frames": sum(len(clip.frames) for lake in clips for clip in lake),
        "captions": len(captions),
        "footage": fingerprint(sorted([clip.film, clip.caption] for lake in clips for clip in lake)),
        "losses": {stage: _last_losses(Run(folder / stage).log, names) for stage, names in LOSSES.items()},
    }
    write_folder(out, vae, denoiser.unet, denoiser.text_model, record)
    return out


def _last_losses(log: Path, names: Sequence[str]) -> dict[str, float]:
    """The mean of the last ten lines of a log that have losses."""
    rows = [row for row in read_log(log) if names[0] in row][-10:]
    return {name: round(float(np.mean([row[name] for row in rows])), 5) for name in names if rows}


def arguments(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], int]:
    """Add the program's options to a parser; returns what runs them."""
    parser.add_argument(
        "--lake", action="append", required=True, metavar="DIR",
        help="a lake made with --set preview_clips=100000; several have equal shares",
    )  # fmt: skip
    parser.add_argument("--run", required=True, metavar="DIR", help="where the training is kept; it is resumed")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the codec, in Stable Diffusion's layout")
    parser.add_argument(
        "--from", dest="start", metavar="CODEC",
        help="start UNet and text encoder from this codec's weights, of the same widths and as many channels or fewer",
    )  # fmt: skip
    add_settings_option(parser, "vae_steps=2000", "a field of CodecRecipe")
    return run_arguments


def run_arguments(options: argparse.Namespace) -> int:
    """Train as the options say."""
    recipe = override(CodecRecipe(), parse_settings(options.settings))
    print(train_codec(options.lake, Path(options.run), Path(options.out), recipe, options.start))
    return 0


def main(given: Sequence[str] | None = None) -> int:
    """Entry of `python -m model.codec_train`."""
    return run_program("model.codec_train", (__doc__ or "").splitlines()[0], arguments, given)


if __name__ == "__main__":
    sys.exit(main())
