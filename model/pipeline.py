"""A trained run called as diffusers' video pipelines are: `VideoLatentFlowPipeline.from_pretrained(run)(prompt)`.

The sampling is model/sample.py's; this translates arguments and frames. Neither diffusers nor a dataset is needed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from model.methods.base import default_sampling
from model.sample import Sampler, fit_picture, read_image
from model.video import Frames

if TYPE_CHECKING:
    import PIL.Image

OUTPUT_TYPES = ("pil", "np", "pt")
"""Kinds of frames that a pipeline returns."""


@dataclasses.dataclass(frozen=True)
class VideoLatentFlowPipelineOutput:
    """What a pipeline makes."""

    frames: Any
    """Of B videos with F frames: `pil`, B lists of F pictures; `np`, an array (B, F, H, W, 3) in [0, 1]; `pt`, a tensor
    (B, F, 3, H, W) in [0, 1]. Where the videos have different numbers of frames, a list of B such arrays or tensors."""


class VideoLatentFlowPipeline:
    """Prompts to videos at any frame rate, from the folder of a training run."""

    def __init__(self, sampler: Sampler) -> None:
        self.sampler = sampler

    @classmethod
    def from_pretrained(
        cls, run: str | Path, step: int | None = None, device: str | None = None
    ) -> VideoLatentFlowPipeline:
        """The pipeline of a run's folder.

        Args:
            run: the folder that `vlfm train --run` wrote.
            step: checkpoint, the newest by default.
            device: `cpu` or `cuda`; by default a GPU where there is one.

        Raises:
            FileNotFoundError, ValueError: no run, or no checkpoint in it; the message says the remedy.
        """
        return cls(Sampler(run, step, device))

    def to(self, device: str | torch.device) -> VideoLatentFlowPipeline:
        """The same pipeline on another device; its networks are read again."""
        self.sampler = Sampler(self.sampler.run.root, self.sampler.step, str(device))
        return self

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.sampler.device

    def __call__(
        self,
        prompt: str | Sequence[str],
        image: PIL.Image.Image | str | Path | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        *,
        fps: float = 16.0,
        num_seconds: float | None = None,
        num_inference_steps: int | None = None,
        num_warmup_steps: int | None = None,
        guidance_scale: float | None = None,
        num_videos_per_prompt: int = 1,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> VideoLatentFlowPipelineOutput | tuple[Any]:
        """Videos of `num_seconds` at `fps`, `num_videos_per_prompt` for each prompt, those of a prompt in a row.

        Args:
            prompt: a caption, or several.
            image: a picture to start from, PIL's or a file; it is scaled and cropped to the dataset's frames.
            negative_prompt: what guidance leads away from, one for all or one for each prompt; nothing by default.
            fps: frames per second, any.
            num_seconds: length in seconds, any above 0; by default the window that the run learned. Not where the run's
                method makes frames in order: it chooses their number itself, and fps is not used.
            num_inference_steps: solver steps on each window, or on a frame; by default the method's.
            num_warmup_steps: solver steps from noise to the first frame, where the method has them.
            guidance_scale: classifier-free guidance; 1, the default, is none.
            num_videos_per_prompt: videos of each prompt.
            generator: stands for its `initial_seed()`, whatever was drawn from it since: one for all, whose videos have
                that seed and those after it, as `vlfm sample --seed` has; or one for each video. None draws a seed from
                torch's own generator.
            output_type: `pil`, `np` or `pt`.
            return_dict: False for a tuple of the frames alone.

        Raises:
            ValueError, FileNotFoundError: an argument that cannot be; the message has it in one line.
        """
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type is {output_type!r}; it must be one of {', '.join(OUTPUT_TYPES)}")
        if num_videos_per_prompt < 1:
            raise ValueError(f"num_videos_per_prompt is {num_videos_per_prompt}; it must be at least 1")
        given = [prompt] if isinstance(prompt, str) else list(prompt)
        if not given:
            raise ValueError("prompt is empty; give a caption, or a list of them")
        prompts = [each for each in given for _ in range(num_videos_per_prompt)]
        negative = None
        if negative_prompt is not None:
            one_each = [negative_prompt] * len(given) if isinstance(negative_prompt, str) else list(negative_prompt)
            if len(one_each) != len(given):
                raise ValueError(
                    f"negative_prompt has {len(one_each)} texts for {len(given)} prompts; give as many, or one"
                )
            negative = [each for each in one_each for _ in range(num_videos_per_prompt)]
        method, picture, seeds = self.sampler.method, self._picture(image), _seeds(generator, len(prompts))
        chosen = {"steps": num_inference_steps, "warmup_steps": num_warmup_steps, "guidance": guidance_scale}
        known = {field.name for field in dataclasses.fields(method.Sampling)}
        unused = [name for name, value in chosen.items() if value is not None and name not in known]
        unused += ["num_seconds"] if method.sequences and num_seconds is not None else []
        if unused:
            name = unused[0] if unused[0] == "num_seconds" else f"num_{unused[0]}"
            raise ValueError(f"{name} has no use for a run of the method {method.name}; leave it out")
        asked = {name: value for name, value in chosen.items() if value is not None}
        settings = default_sampling(method, self.sampler.clip, **asked)
        if method.sequences:
            shown = () if picture is None else (picture,)
            made = self.sampler.frame_videos(prompts, settings, shown, seeds, negative)
            videos = [video.frames for video in made]
        else:
            seconds = self.sampler.window if num_seconds is None else num_seconds
            videos = self.sampler.videos(prompts, fps, seconds, settings, None, picture, seeds, negative)
        frames = _converted(videos, output_type)
        return VideoLatentFlowPipelineOutput(frames) if return_dict else (frames,)

    def _picture(self, image: PIL.Image.Image | str | Path | None) -> torch.Tensor | None:
        if image is None:
            return None
        height, width = self.sampler.clip["frame_shape"][:2]
        if isinstance(image, str | Path):
            return read_image(image, (height, width))
        if not hasattr(image, "convert"):
            raise ValueError(f"image is a {type(image).__name__}; give a PIL picture or the path of one")
        return fit_picture(image, (height, width))


def _seeds(generator: torch.Generator | Sequence[torch.Generator] | None, count: int) -> list[int]:
    """The seed of each of `count` videos."""
    if generator is None:
        first = int(torch.randint(2**62, ()))
    elif isinstance(generator, torch.Generator):
        first = generator.initial_seed()
    else:
        if len(generator) != count:
            raise ValueError(f"generator has {len(generator)} generators for {count} videos; give as many, or one")
        return [each.initial_seed() for each in generator]
    return [first + index for index in range(count)]


def _converted(videos: Sequence[Frames], output_type: str) -> Any:
    """Videos of uint8 frames (F, H, W, 3) as `VideoLatentFlowPipelineOutput.frames` has them."""
    if output_type == "pil":
        from PIL import Image

        return [[Image.fromarray(frame) for frame in frames] for frames in videos]
    if len({len(frames) for frames in videos}) > 1:  # of a method that makes as many frames as it likes
        return [_converted([frames], output_type)[0] for frames in videos]
    values = np.stack(videos).astype(np.float32) / 255
    return values if output_type == "np" else torch.from_numpy(values).movedim(-1, 2)
