"""Sampling: prompts to videos from a training run alone, at any frame rate or of as many frames as its method makes."""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.backbones.conditioning import Conditioning
from model.backbones.dit import Backbone
from model.codecs.base import Codec
from model.codecs.factory import codec_from_spec
from model.methods.base import Request, Sample, SampledSequences, default_sampling, is_guided
from model.program import run_program
from model.sampling_options import add_sampling_options, chosen_sampling
from model.text.encoder import TextEncoder, text_encoder_from_spec
from model.training.checkpoint import Run, load_average
from model.training.record import RunRecord
from model.video import Frames, check_output, from_frames, to_frames, write_video

if TYPE_CHECKING:
    import PIL.Image

READ_AT_ONCE = 64
"""Frames of a clip that are read and decoded together."""


@dataclass(frozen=True)
class FrameVideo:
    """A video that a method made as frames in order."""

    frames: Frames
    """(N, H, W, 3)."""
    inserted: NDArray[np.float64]
    """(N,): the clock when a frame was inserted, 0 for those that it began with, NaN for given ones."""
    full: bool
    """Whether it would have grown further, but for the most frames that were allowed."""


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
        settings: Any,
        first_frames: Tensor | None = None,
        negative: Sequence[str] | None = None,
        given: Tensor | None = None,
    ) -> Sample:
        """A clip of latents for each prompt, readable at any time.

        starts: seconds into their films that the clips are to be from; None leaves it open.
        settings: of the method's `Sampling`.
        first_frames: (B, C, h, w) latents, for the image-to-video task.
        negative: captions that guidance leads away from; None for the empty one.
        given: (B, G, C, h, w) latents of frames in order, the first of them the clip's first, in place of first_frames.
        """
        empty = None
        if is_guided(settings):
            empty = self.conditioning(negative or [""] * len(prompts), None, start_given=False)
        request = Request(
            conditioning=self.conditioning(prompts, starts),
            seeds=tuple(seeds),
            shape=tuple(self.clip["latent_shape"]),
            settings=settings,
            unconditional=empty,
        )
        if given is None and first_frames is not None:
            given = first_frames[:, None]
        if given is not None:
            request = dataclasses.replace(
                request,
                frames=given,
                frame_time=torch.zeros(1, dtype=torch.float64) if given.shape[1] == 1 else None,
                given=torch.ones(given.shape[:2], dtype=torch.bool),
            )
        return self.method.sample(self.backbone, request)

    def videos(
        self,
        prompts: Sequence[str],
        rate: float,
        duration: float,
        settings: Any = None,
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
            settings: how to integrate, of the method's `Sampling`; None for its defaults.
            start: seconds into the film that the clip is to be from; None leaves it open.
            image: (3, H, W) in [-1, 1], a first frame to start from.
            seeds: the seed of each video's noise; None for the settings' seed and those after it.
            negative: a caption for each video that guidance leads away from; None for the empty one.

        Raises:
            ValueError: a rate or duration that is not positive, or a start that is no number.
        """
        settings = settings or default_sampling(self.method, self.clip)
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

    def frame_videos(
        self,
        prompts: Sequence[str],
        settings: Any = None,
        given: Sequence[Tensor] = (),
        seeds: Sequence[int] | None = None,
        negative: Sequence[str] | None = None,
    ) -> list[FrameVideo]:
        """A video for each prompt, of a method that makes frames in order (`Method.sequences`).

        Args:
            prompts: captions.
            settings: of the method's `Sampling`; None for its defaults.
            given: pictures (3, H, W) in [-1, 1], frames of every video in order.
            seeds: the seed of each video's noise; None for the settings' seed and those after it.
            negative: a caption for each video that guidance leads away from; None for the empty one.

        Raises:
            ValueError: a task or settings that the method cannot do; the message says the remedy.
        """
        settings = settings or default_sampling(self.method, self.clip)
        seeds = [settings.seed + index for index in range(len(prompts))] if seeds is None else seeds
        frames = None
        if given:
            pictures = torch.stack(list(given)).to(self.device)
            frames = torch.stack([self.codec.encode(pictures, text=prompt).latents for prompt in prompts])
        sample = cast(SampledSequences, self.sample(prompts, None, seeds, settings, negative=negative, given=frames))
        parts = zip(prompts, sample.clips, sample.inserted, sample.full, strict=True)
        return [
            FrameVideo(self.decoded(latents, prompt), inserted.double().cpu().numpy(), full)
            for prompt, latents, inserted, full in parts
        ]

    def decoded(self, latents: Tensor, prompt: str) -> Frames:
        """Latents (N, C, h, w) as frames, a few at a time."""
        some = latents.split(READ_AT_ONCE)
        return np.concatenate([to_frames(self.codec.decode(part, text=prompt)) for part in some])

    def strip(self, prompt: str, frames: int, seed: int) -> Frames:
        """`frames` frames evenly over a video of a prompt, from its first frame on."""
        if not self.method.sequences:
            return self.videos([prompt], frames / self.window, self.window, seeds=[seed])[0]
        made = self.frame_videos([prompt], seeds=[seed])[0].frames
        return made[np.arange(frames) * len(made) // frames]


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


def read_image(path: str | Path, size: tuple[int, int], option: str = "--image") -> Tensor:
    """A picture file as (3, H, W) in [-1, 1], scaled to cover `size` (H, W) and cropped at the centre.

    option: what messages call it.

    Raises:
        ValueError: the file is no picture, or a damaged one.
        FileNotFoundError: there is no such file.
    """
    from PIL import Image, UnidentifiedImageError

    if not Path(path).is_file():
        raise FileNotFoundError(f"{option} {path}: there is no such file")
    try:
        with Image.open(path) as picture:
            return fit_picture(picture, size)
    except UnidentifiedImageError:
        raise ValueError(f"{option} {path} is no picture that can be read; use a png or jpeg") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{option} {path} cannot be read ({error}); use another picture") from None


def fit_picture(picture: PIL.Image.Image, size: tuple[int, int]) -> Tensor:
    """A picture as (3, H, W) in [-1, 1], upright, scaled to cover `size` (H, W) and cropped at the centre."""
    from PIL import Image, ImageOps

    upright = ImageOps.exif_transpose(picture)
    fitted = ImageOps.fit(upright.convert("RGB"), (size[1], size[0]), Image.Resampling.LANCZOS)
    return from_frames(np.asarray(fitted)[None])[0]


def arguments(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], int]:
    """Add the sampler's options to a parser; returns what runs them."""
    parser.add_argument("--run", required=True, metavar="DIR", help="folder of a training run")
    parser.add_argument(
        "--prompt", required=True, action="append", metavar="TEXT", help="what to show; may be given several times"
    )
    parser.add_argument("--image", metavar="FILE", help="start from this picture instead of noise")
    parser.add_argument(
        "--fps",
        type=float,
        metavar="F",
        help="frames per second (default 16); where a method makes frames in order it only says how fast the file is "
        "shown (default: as the films were read)",
    )
    parser.add_argument("--out", required=True, metavar="FILE", help=".mp4, .gif, .webp, or .png for a strip of frames")
    parser.add_argument("--step", type=int, metavar="N", help="checkpoint to use (default: the newest)")
    add_sampling_options(parser)
    return run_arguments


def run_arguments(options: argparse.Namespace) -> int:
    """Sample as the options say."""
    check_output(options.out)  # what cannot be written is not worth the wait
    record = RunRecord.read(Run(Path(options.run)))
    # Neither are weights for options that cannot be.
    settings = chosen_sampling(record.method(), record.clip, options)
    sampler = Sampler(options.run, options.step)
    size = (sampler.clip["frame_shape"][0], sampler.clip["frame_shape"][1])
    for prompt in options.prompt:
        if sampler.encoder.truncated(prompt):
            print(
                f"note: the prompt is longer than the text encoder reads, its end is ignored: {prompt}", file=sys.stderr
            )
    make = _frame_videos if sampler.method.sequences else _videos
    rate, videos = make(sampler, options, settings, size)
    for index, frames in enumerate(videos):
        out = Path(options.out)
        path = out if len(videos) == 1 else out.with_name(f"{out.stem}-{index + 1}{out.suffix}")
        write_video(path, frames, rate)
        print(f"{path}  {len(frames)} frames at {rate:g} fps")
    return 0


def _videos(
    sampler: Sampler, options: argparse.Namespace, settings: Any, size: tuple[int, int]
) -> tuple[float, list[Frames]]:
    """Frame rate and videos of a method whose clips are read at any time."""
    image = None if options.image is None else read_image(options.image, size)
    if options.start is not None and sampler.method.clip_start_dropout == 1:
        print("note: the run was trained without clip_start; --start is ignored", file=sys.stderr)
    duration = sampler.window if options.duration is None else options.duration
    rate = 16.0 if options.fps is None else options.fps
    return rate, sampler.videos(options.prompt, rate, duration, settings, options.start, image)


def _frame_videos(
    sampler: Sampler, options: argparse.Namespace, settings: Any, size: tuple[int, int]
) -> tuple[float, list[Frames]]:
    """Frame rate and videos of a method that makes frames in order."""
    rate = float(sampler.clip["rate"]) if options.fps is None else options.fps
    if not (rate > 0 and math.isfinite(rate)):
        raise ValueError(f"fps is {rate}; it must be a number above 0")
    files = {"--image": [] if options.image is None else [options.image], "--given": options.given or []}
    given = [read_image(path, size, name) for name, paths in files.items() for path in paths]
    videos = sampler.frame_videos(options.prompt, settings, given)
    for number, video in enumerate(videos, start=1):
        if video.full:
            which = f"video {number}" if len(videos) > 1 else "the video"
            most = f"--max-frames {2 * len(video.frames)}"
            print(f"note: {which} would have grown beyond {len(video.frames)} frames: {most}", file=sys.stderr)
    return rate, [video.frames for video in videos]


def main(arguments_given: Sequence[str] | None = None) -> int:
    """Entry of `python -m model.sample`."""
    return run_program("model.sample", "Sample videos from a training run.", arguments, arguments_given)


if __name__ == "__main__":
    sys.exit(main())
