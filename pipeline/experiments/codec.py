"""What a codec in Stable Diffusion's layout is worth: reconstruction, inversion, noise prediction and captions.

Every figure stands beside what it is to be compared with: the reconstruction beside a principal component analysis of
blocks with as many numbers, inversion beside the autoencoder alone, the predicted noise beside the best Gaussian that
knows each channel's mean and variance, the right caption beside another clip's.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model.codecs.ddim import TRAIN_STEPS, noise_levels
from model.codecs.diffusers import DiffusersCodec, DiffusersSettings
from model.legs import evaluate, project, projection_matrix
from model.metrics.pictures import psnr, ssim
from model.spread import spread_evenly
from model.text.encoder import TextEncoder, pretrained_text_encoder
from model.training.codec_data import Footage, footage, random_crop
from model.video import from_frames, to_frames, write_video

BLOCK = 8
"""Side of the blocks of the principal component analysis, in pixels: the codec's factor."""
SIDE = 128
"""Side of the pictures in pixels where none is given."""
DEPTHS = (0, 2, 5, 10, 20)
"""Inversion depths, of 20 steps, at which latents are compared in time."""


class BlockComponents:
    """The best linear codec of single blocks: their mean and leading principal components, fitted on pictures.

    pictures: (N, 3, H, W) in [-1, 1], sides multiples of 8.  count: numbers kept of a block of 8 x 8 x 3.
    """

    def __init__(self, pictures: Tensor, count: int) -> None:
        blocks = _blocks(pictures)
        self.mean = blocks.mean(0)
        _, vectors = torch.linalg.eigh((blocks - self.mean).T @ (blocks - self.mean))
        self.components = vectors[:, -count:]

    def round_trip(self, pictures: Tensor) -> Tensor:
        """The pictures as the kept numbers of each block give them, in [-1, 1]."""
        blocks = _blocks(pictures) - self.mean
        kept = self.mean + blocks @ self.components @ self.components.T
        count, _, height, width = pictures.shape
        grid = kept.view(count, height // BLOCK, width // BLOCK, 3, BLOCK, BLOCK).permute(0, 3, 1, 4, 2, 5)
        made: Tensor = grid.reshape(pictures.shape).clamp(-1, 1).float()
        return made


def _blocks(pictures: Tensor) -> Tensor:
    count, _, height, width = pictures.shape
    grid = pictures.double().view(count, 3, height // BLOCK, BLOCK, width // BLOCK, BLOCK)
    blocks: Tensor = grid.permute(0, 2, 4, 1, 3, 5).reshape(-1, 3 * BLOCK * BLOCK)
    return blocks


def by_film(clips: Sequence[Footage], most: int) -> dict[str, tuple[str, Tensor]]:
    """Film -> its caption and `most` of its frames, evenly spread."""
    found: dict[str, tuple[str, Tensor]] = {}
    for film in sorted({clip.film for clip in clips}):
        own = [clip for clip in clips if clip.film == film]
        frames = np.concatenate([clip.frames for clip in own])
        chosen = spread_evenly(range(len(frames)), most)
        found[film] = (own[0].caption, from_frames(frames[chosen]))
    return found


def reconstruction(
    plain: DiffusersCodec, full: DiffusersCodec, pca: BlockComponents, films: dict[str, tuple[str, Tensor]], out: Path
) -> list[dict[str, Any]]:
    """A row a film: PSNR and SSIM of the block analysis, the autoencoder alone, and with full inversion.

    Writes a picture a film into `out`: frames, block analysis, autoencoder, inversion, from above to below.
    """
    rows = []
    for film, (caption, frames) in films.items():
        inverted = full.encode(frames, caption).latents
        shown = {
            "blocks": pca.round_trip(frames),
            "autoencoder": plain.decode(plain.encode(frames).latents),
            "inversion": full.decode(inverted, caption),
        }
        row: dict[str, Any] = {"film": film, "frames": len(frames)}
        for name, pictures in shown.items():
            row[f"psnr_{name}"] = float(psnr(pictures, frames).mean())
            row[f"ssim_{name}"] = float(ssim(pictures, frames).mean())
        row |= noise_statistics(inverted)
        rows.append(row)
        columns = torch.cat((frames, *shown.values()), dim=2)[:: max(len(frames) // 5, 1)][:5]
        write_video(out / f"{Path(film).stem}.png", to_frames(columns), 1)
    return rows


def noise_statistics(latents: Tensor) -> dict[str, Any]:
    """Whether latents (N, C, h, w) are white: standard deviation of each channel, correlation of neighbours."""
    centred = latents - latents.mean(dim=(0, 2, 3), keepdim=True)
    power = centred.square().mean()
    across = (centred[..., 1:] * centred[..., :-1]).mean() / power
    down = (centred[..., 1:, :] * centred[..., :-1, :]).mean() / power
    return {
        "noise_std": [round(value, 3) for value in centred.square().mean(dim=(0, 2, 3)).sqrt().tolist()],
        "noise_correlation": float(torch.stack((across, down)).abs().max()),
    }


class NoiseLoss:
    """The loss of predicted noise, by the UNet and the text encoder of a folder."""

    def __init__(self, folder: Path, levels: int = 20) -> None:
        from diffusers import UNet2DConditionModel

        unet: Any = UNet2DConditionModel
        self.unet = unet.from_pretrained(folder / "unet", low_cpu_mem_usage=False).eval().requires_grad_(False)
        self.text: TextEncoder = pretrained_text_encoder(folder)
        self.steps = ((torch.arange(levels) + 0.5) * TRAIN_STEPS / levels).long()
        self.levels = torch.from_numpy(noise_levels()).float()[self.steps]

    @torch.no_grad()
    def of_clip(self, latents: Tensor, caption: str, seed: int) -> float:
        """Mean square error over `levels` evenly spread levels, of latents (N, C, h, w) in turn; the noise is the
        same for every caption."""
        generator = torch.Generator().manual_seed(seed)
        clean = latents[torch.arange(len(self.steps)) % len(latents)]
        noise = torch.randn(clean.shape, generator=generator)
        level = self.levels.view(-1, 1, 1, 1)
        embedding, _ = self.text.encode([caption], padded=True)
        noisy = level.sqrt() * clean + (1 - level).sqrt() * noise
        text = embedding.expand(len(clean), -1, -1)
        return float((self.unet(noisy, self.steps, encoder_hidden_states=text).sample - noise).square().mean())

    def of_gaussian(self, latents: Tensor) -> float:
        """The least that a Gaussian of each channel's own variance, fitted on these very latents, could reach."""
        variance = latents.var(dim=(0, 2, 3)).double().unsqueeze(1)
        signal = self.levels.double() * variance
        return float((signal / (signal + 1 - self.levels)).mean())


def prediction(loss: NoiseLoss, plain: DiffusersCodec, clips: dict[str, tuple[str, Tensor]]) -> dict[str, float]:
    """The loss over all clips, beside the Gaussian's."""
    latents = {film: plain.encode(frames).latents for film, (_, frames) in clips.items()}
    own = statistics.mean(
        loss.of_clip(latents[film], caption, seed) for seed, (film, (caption, _)) in enumerate(clips.items())
    )
    gaussian = loss.of_gaussian(torch.cat(list(latents.values())))
    return {"loss": own, "gaussian": gaussian, "below": 1 - own / gaussian}


def captions(loss: NoiseLoss, plain: DiffusersCodec, clips: dict[str, tuple[str, Tensor]]) -> dict[str, float]:
    """The share of the clips whose own caption predicts the noise better than the caption of another clip."""
    films = list(clips)
    order = np.random.default_rng(0).permutation(len(films))
    other = {films[order[i]]: films[order[(i + 1) % len(films)]] for i in range(len(films))}  # nobody keeps their own
    wins = 0
    for seed, film in enumerate(films):
        caption, frames = clips[film]
        latents = plain.encode(frames).latents
        wins += loss.of_clip(latents, caption, seed) < loss.of_clip(latents, clips[other[film]][0], seed)
    return {"clips": len(films), "share": wins / len(films)}


def depths(folder: Path, clips: Sequence[Footage]) -> list[dict[str, float]]:
    """A row an inversion depth: how smooth latents are in time, and what a projection of every second frame is worth.

    Means over the clips: `smoothness` is the latents' sum |u_{k+1} - u_k|^2 / sum |u_k|^2, `psnr_codec` the round trip,
    `psnr_held_out` the path through every second frame, read at the others and decoded.
    """
    rows = []
    for depth in DEPTHS:
        codec = DiffusersCodec.from_pretrained(
            folder, DiffusersSettings(ddim_steps=20, inversion_depth=depth, refinements=3)
        )
        found = []
        for clip in clips:
            frames = from_frames(clip.frames)
            latents = codec.encode(frames, clip.caption).latents
            times = np.arange(len(frames)) / len(frames)
            seen = np.arange(len(frames)) % 2 == 0
            hidden = ~seen & (times < times[seen][-1])
            matrix = projection_matrix(times[seen], 1.0, 2 * int(seen.sum()))
            path = evaluate(project(latents[torch.from_numpy(seen)], matrix), times[hidden], 1.0)
            found.append(
                {
                    "smoothness": float(latents.diff(dim=0).square().sum() / latents.square().sum()),
                    "psnr_codec": float(psnr(codec.decode(latents, clip.caption), frames).mean()),
                    "psnr_held_out": float(psnr(codec.decode(path, clip.caption), frames[hidden]).mean()),
                }
            )
        rows.append({"depth": depth, **{name: statistics.mean(row[name] for row in found) for name in found[0]}})
    return rows


def figures(
    folder: Path,
    trained: Sequence[Path],
    held_out: Path,
    generated: Path,
    out: Path,
    frames: int = 16,
    side: int = SIDE,
) -> dict[str, Any]:
    """All figures of the codec in `folder` on pictures of side x side; pictures go to `out`. Lakes as in the command's
    help.

    Raises:
        ValueError: a lake without frames, or of another size where it is compared by pixels.
    """
    clips = [clip for lake in footage(trained) for clip in lake]
    random = np.random.default_rng(0)
    squares = [random_crop(clips[random.integers(len(clips))], side, 0.5, random) for _ in range(1024)]
    plain = DiffusersCodec.from_pretrained(folder, DiffusersSettings(inversion_depth=0))
    pca = BlockComponents(torch.stack(squares) * 2 - 1, plain.channels)
    films = by_film(footage([held_out])[0], frames)
    for film, (_, shown) in films.items():
        if shown.shape[2:] != (side, side):
            raise ValueError(
                f"{film} of {held_out} has frames of {tuple(shown.shape[2:])}: ingest with size=[{side},{side}], or "
                "give --side"
            )
    out.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {}
    if (folder / "unet").is_dir():
        full = DiffusersCodec.from_pretrained(
            folder, DiffusersSettings(ddim_steps=20, inversion_depth=20, refinements=3)
        )
        found["films"] = reconstruction(plain, full, pca, films, out)
        loss = NoiseLoss(folder)
        new = _squares(by_film(footage([generated])[0], frames), side)
        found["generated"] = ceiling(plain, pca, new)
        found["noise_films"] = prediction(loss, plain, films)
        found["noise_generated"] = prediction(loss, plain, new)
        found["captions"] = captions(loss, plain, new)
        held = footage([held_out])[0]
        found["depths"] = depths(folder, [next(clip for clip in held if clip.film == film) for film in films])
    else:
        found["films"] = reconstruction(plain, plain, pca, films, out)
    return found


def ceiling(
    plain: DiffusersCodec, pca: BlockComponents, films: dict[str, tuple[str, Tensor]]
) -> dict[str, dict[str, float]]:
    """PSNR of the block analysis and of the autoencoder alone: mean over the films, and that of the worst film."""
    found: dict[str, list[float]] = {"blocks": [], "autoencoder": []}
    for _, frames in films.values():
        found["blocks"].append(float(psnr(pca.round_trip(frames), frames).mean()))
        found["autoencoder"].append(float(psnr(plain.decode(plain.encode(frames).latents), frames).mean()))
    return {name: {"mean": statistics.mean(values), "worst": min(values)} for name, values in found.items()}


def _squares(clips: dict[str, tuple[str, Tensor]], side: int) -> dict[str, tuple[str, Tensor]]:
    resize = torch.nn.functional.interpolate
    return {
        film: (caption, resize(frames, (side, side), mode="bicubic", antialias=True).clamp(-1, 1))
        for film, (caption, frames) in clips.items()
    }


def lines(found: dict[str, Any]) -> list[str]:
    """The figures as a table for people."""
    told = [f"{'film':<20}{'blocks':>16}{'autoencoder':>16}{'inversion':>16}   noise: std by channel, neighbours"]
    for row in found["films"]:
        pairs = [
            f"{row[f'psnr_{name}']:.2f} {row[f'ssim_{name}']:.3f}" for name in ("blocks", "autoencoder", "inversion")
        ]
        told.append(
            f"{row['film']:<20}" + "".join(f"{pair:>16}" for pair in pairs)
            + f"   {row['noise_std']} {row['noise_correlation']:.3f}"
        )  # fmt: skip
    told.append("(PSNR in dB and SSIM, means over the frames)")
    if "generated" in found:
        row = found["generated"]
        told.append(
            "held-out generated films, mean (worst film): "
            + ", ".join(f"{name} {row[name]['mean']:.2f} ({row[name]['worst']:.2f}) dB" for name in row)
        )
    for name, what in (("noise_films", "held-out films"), ("noise_generated", "held-out generated films")):
        if name in found:
            row = found[name]
            told.append(
                f"noise loss, {what}: {row['loss']:.4f}, {100 * row['below']:.1f} % below the Gaussian's "
                f"{row['gaussian']:.4f}"
            )
    if "captions" in found:
        told.append(
            f"the right caption beats a shuffled one in {100 * found['captions']['share']:.0f} % of "
            f"{found['captions']['clips']} clips"
        )
    for row in found.get("depths", ()):
        told.append(
            f"inversion depth {row['depth']:>2.0f} of 20: smoothness {row['smoothness']:.3f}, round trip "
            f"{row['psnr_codec']:.2f} dB, read at held-out times {row['psnr_held_out']:.2f} dB"
        )
    return told


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry of `vlfm experiment codec`."""
    parser = argparse.ArgumentParser(prog="vlfm experiment codec", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--codec", required=True, metavar="DIR", help="the folder to judge")
    parser.add_argument("--lake", action="append", required=True, metavar="DIR", help="a lake that it was trained on")
    parser.add_argument(
        "--held-out", required=True, metavar="DIR", help="a lake of other films, of --side pixels a side"
    )
    parser.add_argument("--generated", required=True, metavar="DIR", help="a lake of generated films with new captions")
    parser.add_argument("--out", required=True, metavar="DIR", help="where pictures and figures.json are written")
    parser.add_argument("--frames", type=int, default=16, metavar="N", help="frames of a film (default 16)")
    parser.add_argument("--side", type=int, default=SIDE, metavar="N", help=f"pixels a side (default {SIDE})")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    options = parser.parse_args(arguments)
    found = figures(
        Path(options.codec), [Path(lake) for lake in options.lake], Path(options.held_out), Path(options.generated),
        Path(options.out), options.frames, options.side,
    )  # fmt: skip
    (Path(options.out) / "figures.json").write_text(json.dumps(found, indent=1))
    print(json.dumps(found, indent=1) if options.json else "\n".join(lines(found)))
    return 0 if math.isfinite(found["films"][0]["psnr_autoencoder"]) else 1


if __name__ == "__main__":
    raise SystemExit(main())
