"""`python -m tests.bench.rounding FOLDER FILM`: what bfloat16 costs a codec, in dB, on real weights and frames.

The default of a codec on a GPU is bfloat16 for both networks; a CPU computes the same rounding, slowly.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from model.codecs.diffusers import DiffusersCodec, DiffusersSettings
from model.metrics.pictures import psnr

TYPES = ((torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16))


def read_frames(film: str, count: int, side: int) -> Tensor:
    """`count` frames of a film, one every half second, (count, 3, side, side) in [-1, 1]."""
    import imageio_ffmpeg

    crop = f"fps=2,scale={side}:{side}:force_original_aspect_ratio=increase:flags=area,crop={side}:{side}"
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-nostdin", "-i", film, "-frames:v", str(count)]
    command += ["-vf", crop, "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    raw = bytearray(subprocess.run(command, check=True, capture_output=True).stdout)
    return torch.frombuffer(raw, dtype=torch.uint8).view(-1, side, side, 3).permute(0, 3, 1, 2) / 127.5 - 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints a row for each depth and each pair of types."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.rounding", description=__doc__)
    parser.add_argument("folder", help="a codec in Stable Diffusion's layout")
    parser.add_argument("film", help="a film to take frames from")
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--side", type=int, default=128, help="pixels")
    parser.add_argument("--ddim-steps", type=int, default=20)
    parser.add_argument("--depths", type=int, nargs="+", default=[0, 20], help="levels inverted; 0 is the VAE alone")
    options = parser.parse_args(arguments)
    frames = read_frames(options.film, options.frames, options.side)
    print("VAE       UNet      depth  latents against float32  round trip  frames against float32's")
    for depth in options.depths:
        exact_latents = exact_frames = None
        for vae_type, unet_type in TYPES if depth else TYPES[:2]:
            settings = DiffusersSettings(
                ddim_steps=options.ddim_steps, inversion_depth=depth, vae_type=vae_type, unet_type=unet_type
            )
            codec = DiffusersCodec.from_pretrained(options.folder, settings)
            latents = codec.encode(frames).latents
            back = codec.decode(latents)
            if exact_latents is None or exact_frames is None:
                exact_latents, exact_frames = latents, back
            error = (latents - exact_latents).square().mean() / exact_latents.square().mean()
            names = [str(kind).removeprefix("torch.") for kind in (vae_type, unet_type)]
            print(
                f"{names[0]:9} {names[1]:9} {depth:5}  {-10 * torch.log10(error):20.1f} dB  "
                f"{mean_psnr(back, frames):7.2f} dB  {mean_psnr(back, exact_frames):21.1f} dB",
                flush=True,
            )
    return 0


def mean_psnr(made: Tensor, true: Tensor) -> float:
    """Mean over frames, peak to peak 2."""
    return float(psnr(made, true).mean())


if __name__ == "__main__":
    sys.exit(main())
