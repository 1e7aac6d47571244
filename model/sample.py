"""Sampling: prompts to videos at any frame rate, from a training run alone."""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from model.backbones.conditioning import Conditioning
from model.backbones.dit import Backbone
from model.codecs.base import Codec
from model.codecs.factory import codec_from_spec
from model.methods.base import Request, Sample, SampleSettings
from model.program import run_program
from model.text.encoder import TextEncoder, text_encoder_from_spec
from model.training.checkpoint import Run, load_average
from model.training.record import RunRecord
from model.video import Frames, check_output, from_frames, to_frames, write_video

if TYPE_CHECKING:
    import PIL.Image

READ_AT_ONCE = 64
"""Frames of a clip that are read and decoded together."""


class LoadedSampler:
    """A backbone with its codec and its text encoder.

    Args:
        record: what the run that the backbone is from says of it.
        backbone: the weights, on the device where the sampler computes.
    """

    def __init__(self, record: RunRecord, backbone: Backbone) -> None:
        self.record, self.backbone = record, backbone.eval()
        self.device = next(backbone.parameters()).device
        self.clip = record.clip
        self.method = record.method()
        self._codec: Codec | None = None
        self._encoder: TextEncoder | None = None

    @property
    def codec(self) -> Codec:
        """The codec of the dataset's version, loaded on first use."""
        if self._codec is None:
            self._codec = codec_from_spec(self.record.codec["spec"], device=str(self.device))
        return self._codec

    @property
    def encoder(self) -> TextEncoder:
        """The text encoder of the dataset's version, loaded on first use."""
        if self._encoder is None:
            self._encoder = text_encoder_from_spec(self.record.text["spec"])
        return self._encoder

    @property
    def window(self) -> float:
        """Duration in seconds of the clips that the backbone learned."""
        return float(self.clip["duration"])

    def conditioning(
        self, prompts: Sequence[str], starts: Sequence[float] | None, start_given: bool = True
    ) -> Conditioning:
        """What the backbone is told of clips: prompts, and the clips' starts in seconds where they are given.

        A run that always saw clip_start is told 0 where there is none; one that never did is not told it.
        """
        count = len(prompts)
        rate = self.method.clip_start_dropout
        told = start_given and rate < 1 and (starts is not None or rate == 0)
        starts = [0.0] * count if starts is None else starts
        text, length = self.encoder.encode(list(prompts))
        rows = int(length.max())
        values = Conditioning(
            # Captions were stored in float16; the same rounding here keeps a training caption exactly itself.
            text=text[:, :rows].half().float(),
            text_length=length,
            clip_start=torch.tensor(list(starts), dtype=torch.float32),
            start_given=torch.full((count,), float(told)),
            log_duration=torch.full((count,), math.log(self.window)),
            context=torch.zeros((count, 1, *self.clip["latent_shape"])),
            context_given=torch.zeros((count, 1), dtype=torch.bool),
        )
        return Conditioning(**{name: value.to(self.device) for name, value in vars(values).items()})

    def sample(
        self,
        prompts: Sequence[str],
        starts: Sequence[float] | None,
        seeds: Sequence[int],
        settings: SampleSettings,
        first_frames: Tensor | None = None,
        negative: Sequence[str] | None = None,
    ) -> Sample:
        """One window of latents for each prompt, readable at any time.

        starts: seconds into their films that the clips are to be from; None leaves it open.
        first_frames: (B, C, h, w) latents, for the image-to-video task.
        negative: captions that guidance leads away from; None for the empty one.
        """
        empty = None
        if settings.guidance != 1.0:
            empty = self.conditioning(negative or [""] * len(prompts), None, start_given=False)
        request = Request(
            conditioning=self.conditioning(prompts, starts),
            seeds=tuple(seeds),
            shape=tuple(self.clip["latent_shape"]),
            settings=settings,
            unconditional=empty,
        )
        if first_frames is not None:
            request = dataclasses.replace(
                request,
                frames=first_frames[:, None],
                frame_time=torch.zeros(1, dtype=torch.float64),
                given=torch.ones((len(prompts), 1), dtype=torch.bool),
            )
        return self.method.sample(self.backbone, request)

    def videos(
        self,
        prompts: Sequence[str],
        rate: float,
        duration: float,
        settings: SampleSettings | None = None,
        start: float | None = None,
        image: Tensor | None = None,
        seeds: Sequence[int] | None = None,
        negative: Sequence[str] | None = None,
    ) -> list[Frames]:
        """A video for each prompt, `duration` seconds at `rate` frames per second, at least one frame.

        A video longer than the trained window rolls on: the predicted end of one window is the first frame of the next.

        Args:
            prompts: captions.
            rate: frames per second, any.
            duration: seconds, any above 0.
            settings: how to integrate.
            start: seconds into the film that the clip is to be from; None leaves it open.
            image: (3, H, W) in [-1, 1], a first frame to start from.
            seeds: the seed of each video's noise; None for the settings' seed and those after it.
            negative: a caption for each video that guidance leads away from; None for the empty one.

        Raises:
            ValueError: a rate or duration that is not positive, or a start that is no number.
        """
        settings = settings or SampleSettings()
        if not (rate > 0 and math.isfinite(rate)):
            raise ValueError(f"fps is {rate}; it must be a number above 0")
        if not (duration > 0 and math.isfinite(duration)):
            raise ValueError(f"duration is {duration}; it must be a number of seconds above 0")
        if start is not None and not math.isfinite(start):
            raise ValueError(f"start is {start}; it must be a number of seconds")
        times = np.arange(max(1, math.floor(duration * rate + 1e-6))) / rate
        first = None
        if image is not None:
            # A codec that inverts does so with the caption it will decode with: each prompt has its own.
            encoded = [self.codec.encode(image[None].to(self.device), text=prompt).latents for prompt in prompts]
            first = torch.cat(encoded)
        parts: list[list[Frames]] = [[] for _ in prompts]
        windows = math.floor(times[-1] / self.window + 1e-9) + 1
        seeds = [settings.seed + index for index in range(len(prompts))] if seeds is None else seeds
        for number in range(windows):
            starts = None if start is None else [start + number * self.window] * len(prompts)
            sample = self.sample(prompts, starts, seeds, settings, first, negative)
            inside = np.floor(times / self.window + 1e-9).astype(int) == number
            flow_times = torch.from_numpy((times[inside] / self.window - number).clip(0, 1))
            # A few frames at a time: at high rates a whole window of pictures would not fit the memory.
            for some in flow_times.split(READ_AT_ONCE):
                latents = sample.read(some)  # (L, B, C, h, w)
                for index, prompt in enumerate(prompts):
                    decoded = self.codec.decode(latents[:, index], text=prompt)
                    parts[index].append(to_frames(decoded))
            if number < windows - 1 and self.method.takes_first_frame:
                first = sample.read([1.0])[0]
        return [np.concatenate(part) for part in parts]


class Sampler(LoadedSampler):
    """The sampler of a training run's averaged weights.

    Args:
        run: folder of a training run.
        step: checkpoint, the newest by default.

    Raises:
        FileNotFoundError: no run, or no checkpoint in it; the message says the remedy.
        ValueError: the run was made by a program whose settings were others.
    """

    def __init__(self, run: str | Path, step: int | None = None, device: str | None = None) -> None:
        self.run = Run(Path(run))
        record = RunRecord.read(self.run)
        folder = self.run.checkpoint(step)
        self.step = int(folder.name.removeprefix("step-"))
        backbone = Backbone(record.backbone).to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        load_average(folder, backbone)
        super().__init__(record, backbone)


def read_image(path: str | Path, size: tuple[int, int]) -> Tensor:
    """A picture file as (3, H, W) in [-1, 1], scaled to cover `size` (H, W) and cropped at the centre.

    Raises:
        ValueError: the file is no picture, or a damaged one.
        FileNotFoundError: there is no such file.
    """
    from PIL import Image, UnidentifiedImageError

    if not Path(path).is_file():
        raise FileNotFoundError(f"--image {path}: there is no such file")
    try:
        with Image.open(path) as picture:
            return fit_picture(picture, size)
    except UnidentifiedImageError:
        raise ValueError(f"--image {path} is no picture that can be read; use a png or jpeg") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"--image {path} cannot be read ({error}); use another picture") from None


def fit_picture(picture: PIL.Image.Image, size: tuple[int, int]) -> Tensor:
    """A picture as (3, H, W) in [-1, 1], upright, scaled to cover `size` (H, W) and cropped at the centre."""
    from PIL import Image, ImageOps

    upright = ImageOps.exif_transpose(picture)
    fitted = ImageOps.fit(upright.convert("RGB"), (size[1], size[0]), Image.Resampling.LANCZOS)
    return from_frames(np.asarray(fitted)[None])[0]


def arguments(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], int]:
    """Add the sampler's options to a parser; returns what runs them."""
    defaults = SampleSettings()
    parser.add_argument("--run", required=True, metavar="DIR", help="folder of a training run")
    parser.add_argument(
        "--prompt", required=True, action="append", metavar="TEXT", help="what to show; may be given several times"
    )
    parser.add_argument(
        "--start",
        type=float,
        metavar="S",
        help="seconds into its film that the clip is to be from (default: left open)",
    )
    parser.add_argument("--image", metavar="FILE", help="start from this picture instead of noise")
    parser.add_argument("--fps", type=float, default=16.0, metavar="F", help="frames per second, any (default 16)")
    parser.add_argument(
        "--duration", type=float, metavar="T", help="seconds, any (default: the window the run was trained on)"
    )
    parser.add_argument("--out", required=True, metavar="FILE", help=".mp4, .gif, .webp, or .png for a strip of frames")
    parser.add_argument("--seed", type=int, default=defaults.seed, help="seed of the noise (default 0)")
    parser.add_argument("--steps", type=int, default=defaults.steps, help="solver steps on a window (default 16)")
    parser.add_argument(
        "--warmup-steps", type=int, default=defaults.warmup_steps, help="solver steps to the first frame (default 16)"
    )
    parser.add_argument(
        "--solver", default=defaults.solver, help="ddim (default), euler, midpoint, heun, rk4 or adaptive"
    )
    parser.add_argument(
        "--guidance", type=float, default=defaults.guidance, help="classifier-free guidance; 1 (default) is none"
    )
    parser.add_argument("--step", type=int, metavar="N", help="checkpoint to use (default: the newest)")
    return run_arguments


def run_arguments(options: argparse.Namespace) -> int:
    """Sample as the options say."""
    check_output(options.out)  # what cannot be written is not worth the wait
    settings = SampleSettings(options.steps, options.warmup_steps, options.solver, options.guidance, options.seed)
    sampler = Sampler(options.run, options.step)
    height, width = sampler.clip["frame_shape"][:2]
    image = None if options.image is None else read_image(options.image, (height, width))
    if options.start is not None and sampler.method.clip_start_dropout == 1:
        print("note: the run was trained without clip_start; --start is ignored", file=sys.stderr)
    duration = sampler.window if options.duration is None else options.duration
    for prompt in options.prompt:
        if sampler.encoder.truncated(prompt):
            print(
                f"note: the prompt is longer than the text encoder reads, its end is ignored: {prompt}", file=sys.stderr
            )
    videos = sampler.videos(options.prompt, options.fps, duration, settings, options.start, image)
    for index, frames in enumerate(videos):
        out = Path(options.out)
        path = out if len(videos) == 1 else out.with_name(f"{out.stem}-{index + 1}{out.suffix}")
        write_video(path, frames, options.fps)
        print(f"{path}  {len(frames)} frames at {options.fps:g} fps")
    return 0


def main(arguments_given: Sequence[str] | None = None) -> int:
    """Entry of `python -m model.sample`."""
    return run_program("model.sample", "Sample videos from a training run.", arguments, arguments_given)


if __name__ == "__main__":
    sys.exit(main())
