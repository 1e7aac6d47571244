"""Every clip of a version: what it is of and the curve of its coefficients, to find which are near a sample."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model import legs
from model.metrics.paths import distances, path_rows, quadrature
from model.training.data import Clip, Clips

MOST = 20_000
"""Clips whose curves are kept, spread evenly over the version; those that kept their frames come on top."""
AT_ONCE = 256
"""Curves that are compared at once."""


@dataclass(frozen=True)
class Catalogue:
    """The clips of a version, training and validation. Distances are those of model/metrics/paths.py."""

    about: Sequence[Mapping[str, Any]]
    """(N) what each clip is: `clip_id, film, caption, clip_start, split`."""
    complete: NDArray[np.bool_]
    """(N,) which kept their frames and latents."""
    coefficients: NDArray[np.float16]
    """(N, order, C, h, w)."""
    read: Callable[[int], Clip]
    """A clip with all its arrays, by its number."""

    @classmethod
    def of(cls, clips: Clips) -> Catalogue:
        """Reads every clip once and keeps its coefficients."""
        places, about, complete, coefficients = [], [], [], []
        step = max(1, math.ceil(len(clips) / MOST))
        for place, clip in enumerate(clips.every()):
            whole = "preview" in clip.members and "latents" in clip.members
            if whole or place % step == 0:
                places.append(place)
                about.append(clip.about)
                complete.append(whole)
                coefficients.append(clip.members["coefficients"])
        return cls(about, np.array(complete, dtype=bool), np.array(coefficients), lambda number: clips[places[number]])

    def __len__(self) -> int:
        return len(self.about)

    @cached_property
    def training(self) -> NDArray[np.bool_]:
        """(N,) which are training clips."""
        return self.all_with("split", "train")

    def all_with(self, name: str, value: Any) -> NDArray[np.bool_]:
        """(N,) which clips have this value of `about`."""
        return np.array([about[name] == value for about in self.about], dtype=bool)

    def where(self, film: str, clip_start: float) -> int | None:
        """The number of a film's clip from about `clip_start` seconds; None where there is none."""
        for number, about in enumerate(self.about):
            if about["film"] == film and abs(about["clip_start"] - clip_start) < 1e-3:
                return number
        return None

    @property
    def order(self) -> int:
        """Coefficients of a curve."""
        return int(self.coefficients.shape[1])

    def curves(self, numbers: Sequence[int] | NDArray[np.intp], start: float = 0.0) -> Tensor:
        """Rows (n, D) of the clips' curves over [start, 1]."""
        times, weights = quadrature(self.order, start)
        basis = torch.from_numpy(legs.basis(times, 1.0, self.order)).float()
        chosen = torch.from_numpy(self.coefficients[np.asarray(numbers, dtype=int)].astype(np.float32))
        return path_rows(torch.einsum("ko,no...->kn...", basis, chosen), weights)

    def distances(self, rows: Tensor, start: float = 0.0) -> NDArray[np.float32]:
        """(S, N) distances over [start, 1] of `rows` (S, D), made by `path_rows` over the same times, to every clip."""
        parts = np.array_split(np.arange(len(self)), math.ceil(len(self) / AT_ONCE))
        found: NDArray[np.float32] = torch.cat([distances(rows, self.curves(p, start)) for p in parts], dim=1).numpy()
        return found

    @cached_property
    def spread(self) -> float:
        """RMS distance of two training clips drawn independently: sqrt(2 times the variance of their coefficients),
        summed over the order and averaged over a frame's latents. NaN for fewer than two."""
        numbers = np.flatnonzero(self.training)
        if len(numbers) < 2:
            return math.nan
        total, squares = 0.0, 0.0
        for part in np.array_split(numbers, math.ceil(len(numbers) / AT_ONCE)):
            values = self.coefficients[part].astype(np.float64)
            total, squares = total + values.sum(axis=0), squares + np.square(values).sum(axis=0)
        variance = squares / len(numbers) - np.square(total / len(numbers))
        return math.sqrt(2 * float(variance.mean(axis=(1, 2, 3)).sum()))
