"""Pictures to train a codec on: crops of the frames that lakes keep, at many scales, and dead leaves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from model.training.data import Clip, Clips, lake_and_version

LEAVES = 160
"""Leaves of one picture, drawn from the back to the front."""


@dataclass(frozen=True)
class Footage:
    """The kept frames of one clip."""

    film: str
    """Path relative to the lake's source."""
    caption: str
    """The film's caption."""
    frames: NDArray[np.uint8]
    """(N, H, W, 3)."""


def footage(lakes: Sequence[str | Path], hold_out: Sequence[str] = ()) -> list[list[Footage]]:
    """The clips of each lake's newest version that keep their frames, without the films that are held out.

    Args:
        lakes: made with `vlfm ingest ... --set preview_clips=100000`, so that all clips keep their frames.
        hold_out: film names without suffix and folder; none of their frames is returned.

    Raises:
        ValueError: a lake has nothing left to train on; the message names it and the remedy.
    """
    found: dict[str, list[Footage]] = {}
    for lake in dict.fromkeys(map(str, lakes)):  # one that is named twice, for a double share, is read once
        clips = Clips(*lake_and_version(lake, None))
        kept = [
            Footage(clip.about["film"], clip.about["caption"], _kept_frames(clip))
            for clip in clips.every()
            if "preview" in clip.members and Path(clip.about["film"]).stem not in hold_out
        ]
        if not kept:
            raise ValueError(
                f"lake {lake} has no clip with frames besides the held-out films; ingest films with "
                "`--set preview_clips=100000`"
            )
        found[lake] = kept
    return [found[str(lake)] for lake in lakes]


def _kept_frames(clip: Clip) -> NDArray[np.uint8]:
    frames: NDArray[np.uint8] = clip.members["preview"][np.isfinite(clip.members["frame_time"])]
    return frames


def drawn(lakes: Sequence[Sequence[Footage]], random: np.random.Generator) -> Footage:
    """A random clip; each lake has an equal share."""
    clips = lakes[int(random.integers(len(lakes)))]
    return clips[int(random.integers(len(clips)))]


def random_crop(clip: Footage, side: int, least: float, random: np.random.Generator) -> Tensor:
    """A square of a random frame at a random scale: float32 (3, side, side) in [0, 1].

    least: the square's smallest size as a share of the frame's short side, in (0, 1]; it is drawn log-uniformly up to
    the whole short side, and is not below `side` unless the frame is.
    """
    frame = clip.frames[random.integers(len(clip.frames))]
    short = min(frame.shape[:2])
    smallest = min(max(side, round(least * short)), short)
    size = round(math.exp(random.uniform(math.log(smallest), math.log(short))))
    top, left = (int(random.integers(length - size + 1)) for length in frame.shape[:2])
    square = torch.from_numpy(np.ascontiguousarray(frame[top : top + size, left : left + size]))
    picture = square.permute(2, 0, 1).unsqueeze(0).float() / 255
    if size != side:
        picture = F.interpolate(picture, (side, side), mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
    return picture[0]


def recoloured(picture: Tensor, random: np.random.Generator) -> Tensor:
    """The picture, mirrored half of the time, with other gains and gammas of its colours half of the time."""
    if random.random() < 0.5:
        picture = picture.flip(-1)
    if random.random() < 0.5:
        gain = torch.tensor(random.uniform(0.7, 1.3, (3, 1, 1)), dtype=torch.float32)
        picture = (picture.clamp_min(1e-4) ** math.exp(random.uniform(-0.4, 0.4)) * gain).clamp(0, 1)
    return picture


def contrasted(picture: Tensor, most: float, random: np.random.Generator) -> Tensor:
    """The picture with its contrast around its mean colour times 1/most to most, log-uniformly, in [0, 1]."""
    mean = picture.mean((1, 2), keepdim=True)
    return (mean + (picture - mean) * most ** random.uniform(-1, 1)).clamp(0, 1)


def dead_leaves(side: int, random: np.random.Generator) -> Tensor:
    """A picture of overlapping leaves, float32 (3, side, side) in [0, 1].

    Discs, bars and ellipses whose sizes follow a power law occlude one another, which gives edges and spectra like
    those of natural pictures (Lee, Mumford, Huang 2001, "Occlusion models for natural images"); each leaf has a slope
    of colour and some grain.
    """
    scale = 2  # drawn larger, so that edges are smooth after the reduction
    extent = scale * side
    picture = np.empty((extent, extent, 3), np.float32)
    picture[:] = random.random()
    # Mostly grey, as outdoors: a brightness each, and a little colour.
    palette = random.random((6, 1)) ** random.uniform(0.6, 2.0) + random.normal(0, random.uniform(0.02, 0.25), (6, 3))
    smallest, largest = 2.0 * scale, extent / 2
    # The inverse of the cumulative distribution of a density ~ size^-3.
    share = random.random(LEAVES)
    sizes = (smallest**-2 - share * (smallest**-2 - largest**-2)) ** -0.5
    for size in np.where(np.arange(LEAVES) < 6, largest * random.uniform(0.4, 1.0, LEAVES), sizes):
        y, x = random.uniform(0, extent, 2)
        reach = math.ceil(size)
        top, bottom = max(int(y) - reach, 0), min(int(y) + reach + 1, extent)
        left, right = max(int(x) - reach, 0), min(int(x) + reach + 1, extent)
        down, across = np.ogrid[top:bottom, left:right]
        angle, flatness = random.uniform(0, math.pi), random.uniform(1, 4)
        along = ((across - x) * math.cos(angle) + (down - y) * math.sin(angle)) / size
        beside = ((down - y) * math.cos(angle) - (across - x) * math.sin(angle)) / size * flatness
        inside = np.maximum(abs(along), abs(beside)) < 0.7 if random.random() < 0.4 else along**2 + beside**2 < 1
        colour = palette[random.integers(len(palette))] + random.normal(0, 0.08, 3)
        shade = along * random.normal(0, 0.15) + beside * random.normal(0, 0.1)
        if random.random() < 0.3:
            shade = shade + random.normal(0, random.uniform(0, 0.12), shade.shape)
        picture[top:bottom, left:right][inside] = (colour + shade[..., None])[inside]
    tensor = torch.from_numpy(picture.clip(0, 1)).permute(2, 0, 1).unsqueeze(0)
    return F.avg_pool2d(tensor, scale)[0]
