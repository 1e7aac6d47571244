"""Measures of videos whose lengths differ: how long they are, how they move, and how far two sets of them are apart."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from model.video import Frames, from_frames

FEATURE_FRAMES, FEATURE_SIDE = 8, 4
"""Frames of a video, spread evenly, and side of the grid that their latents are averaged to, in its features."""
FVD_FRAMES, FVD_SIDE = 16, 224
"""Frames and side of the videos that the network of an FVD looks at."""


def total_variation(first: Sequence[int], second: Sequence[int]) -> float:
    """Half the sum of absolute differences of two samples' relative frequencies: 0, the same, to 1, none in common."""
    if not first or not second:
        return math.nan
    one, two = Counter(first), Counter(second)
    return sum(abs(one[n] / len(first) - two[n] / len(second)) for n in one.keys() | two.keys()) / 2


def frechet(first: Tensor, second: Tensor) -> float:
    """The Frechet distance of Gaussians fitted to rows (n, D) and (m, D): |mean - mean|^2 + tr(S + T - 2 (S T)^1/2).

    (Dowson and Landau 1982.) The last trace is the nuclear norm of the rows' cross-Gram matrix, so no covariance is
    formed, and fewer rows than D will do; but the distance of few rows is too large, and only comparable with one of
    as many. NaN for fewer than 2 rows.
    """
    if len(first) < 2 or len(second) < 2:
        return math.nan
    first, second = first.double(), second.double()
    apart = (first.mean(0) - second.mean(0)).square().sum()
    one, two = ((rows - rows.mean(0)) / math.sqrt(len(rows) - 1) for rows in (first, second))
    both = torch.linalg.matrix_norm(one @ two.T, "nuc")
    return float((apart + one.square().sum() + two.square().sum() - 2 * both).clamp(min=0))


def spread_places(count: int, wanted: int) -> NDArray[np.int64]:
    """(wanted,) numbers of frames evenly from the first to the last of `count`, some twice where there are fewer."""
    return np.linspace(0, count - 1, wanted).round().astype(np.int64)


def frame_features(latents: Tensor) -> Tensor:
    """Latents (N, C, h, w) as rows (N, D), averaged to at most FEATURE_SIDE cells a side."""
    height, width = (min(FEATURE_SIDE, size) for size in latents.shape[2:])
    return functional.adaptive_avg_pool2d(latents.float(), (height, width)).flatten(1)


def video_features(latents: Tensor) -> Tensor:
    """Latents (N, C, h, w) of a video as a row (D,): FEATURE_FRAMES frames of it, whatever its length."""
    return frame_features(latents[torch.from_numpy(spread_places(len(latents), FEATURE_FRAMES))]).flatten()


def step_size(latents: Tensor) -> float:
    """Root mean square difference of neighbouring frames (N, C, h, w); NaN for fewer than 2."""
    return float(latents.diff(dim=0).square().mean().sqrt()) if len(latents) > 1 else math.nan


def roughness(latents: Tensor) -> float:
    """Root mean square of second differences of frames (N, C, h, w) over that of first ones: 0 for even motion, about
    1.7 for noise. NaN for fewer than 3 frames, 0 for a still."""
    if len(latents) < 3:
        return math.nan
    steps = latents.diff(dim=0)
    size = steps.square().mean()
    return float((steps.diff(dim=0).square().mean() / size).sqrt()) if size > 0 else 0.0


class FvdNetwork:
    """The network whose features an FVD compares, from a TorchScript file: the I3D that StyleGAN-V and others use.

    It is called with videos (B, 3, FVD_FRAMES, FVD_SIDE, FVD_SIDE) in [-1, 1] and `rescale=False, resize=False,
    return_features=True`, and answers with rows (B, D).
    """

    def __init__(self, path: str | Path) -> None:
        """Raises FileNotFoundError, or ValueError where it is no TorchScript file."""
        if not Path(path).is_file():
            raise FileNotFoundError(f"--fvd {path}: there is no such file")
        try:
            with warnings.catch_warnings():
                # torch would have everybody leave TorchScript, but the network that FVDs are measured with comes in it.
                warnings.simplefilter("ignore", DeprecationWarning)
                self.network = torch.jit.load(str(path), map_location="cpu").eval()
        except RuntimeError as error:
            told = str(error).strip().splitlines()[-1]
            raise ValueError(f"--fvd {path} is no TorchScript file ({told}); give i3d_torchscript.pt") from None

    @torch.no_grad()
    def features(self, videos: Sequence[Frames]) -> Tensor:
        """Rows (B, D) of videos (N_i, H, W, 3)."""
        rows = []
        for frames in videos:
            chosen = from_frames(frames[spread_places(len(frames), FVD_FRAMES)])
            large = functional.interpolate(chosen, (FVD_SIDE, FVD_SIDE), mode="bilinear", align_corners=False)
            video = large.movedim(1, 0)[None]  # (1, 3, T, H, W)
            rows.append(self.network(video, rescale=False, resize=False, return_features=True).flatten(1))
        return torch.cat(rows)
