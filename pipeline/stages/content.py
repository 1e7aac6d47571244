"""What a clip shows, before any network sees it: black and still frames, motion, cuts. Gates may end a clip here.

The frames are those that the clip keeps, at the recipe's size; luma is BT.709's, 0 to 255.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

import numpy as np

from pipeline.gates import flags, rejection
from pipeline.items import ClipWork, Rejected, Resources
from pipeline.media.shots import shot_starts
from pipeline.stage import isolated

BLACK = 8.0
"""Mean luma below which a frame is black. Measured (docs/benchmarks.md): black frames of a real film are below 1, the
darkest scenes that show something above 14."""
STILL = 0.04
"""Mean change of luma between frames below which nothing moves. Measured: repeated frames change by up to 0.038 through
compression, the slowest of seven real films by more than 0.05 in nine of ten steps."""
_LUMA = np.array([0.2126, 0.7152, 0.0722], dtype=np.float32)


class ContentStage:
    """Fills in the figures of storage.schema.CONTENT, but the duplicates, which only a whole version can tell.

    gates: those that keep clips out. A clip outside one of content is not encoded.
    """

    name = "content"

    def __init__(self, gates: Mapping[str, float | None]) -> None:
        self.gates, self.resources = gates, Resources()

    def setup(self) -> None:
        """Nothing is needed."""

    def process(self, works: Iterable[ClipWork]) -> Iterator[ClipWork]:
        """The clips with their figures, or filtered as `below_gate`."""
        return isolated(works, self._measure, self.name, "decode_failed")

    def teardown(self) -> None:
        """Nothing is held."""

    def _measure(self, work: ClipWork) -> ClipWork:
        assert work.frames is not None
        plan = work.plan
        work.certify(**measure(work.frames), short_side=plan.short_side, film_seconds=plan.film_seconds)
        work.frames_id = frames_id(work.frames)
        if not flags(work.certificate, self.gates):
            return work
        outside = Rejected(plan.clip_id, plan.film, plan.window.start, work.certificate, work.frames_id)
        failure = replace(rejection(outside, self.gates), certificate=work.certificate, frames_id=work.frames_id)
        return replace(work, failure=failure, frames=None)


def measure(frames: np.ndarray) -> dict[str, float]:
    """`black_frames`, `static_frames`, `motion` and `cuts` of frames uint8 (N, H, W, 3); NaN where N = 1 has none."""
    luma, change = luma_and_change(frames)
    return {
        "black_frames": float((luma < BLACK).mean()),
        "static_frames": float((change < STILL).mean()) if len(change) else math.nan,
        "motion": float(change.mean()) if len(change) else math.nan,
        "cuts": float(sum(begins for _, begins in shot_starts(frames)) - 1),
    }


def luma_and_change(frames: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean luma of each frame (N,) and its mean absolute change from frame to frame (N - 1,), both from 0 to 255."""
    luma = frames.reshape(len(frames), -1, 3).astype(np.float32) @ _LUMA  # (N, H W)
    return luma.mean(axis=1), np.abs(np.diff(luma, axis=0)).mean(axis=1)


def frames_id(frames: np.ndarray) -> str:
    """16 digits that name exactly these frames."""
    return hashlib.sha256(repr(frames.shape).encode() + np.ascontiguousarray(frames).tobytes()).hexdigest()[:16]
