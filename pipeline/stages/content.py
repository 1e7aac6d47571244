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
from pipeline.media.shots import follows_a_cut, shot_starts
from pipeline.stage import isolated

BLACK = 16.0
"""Luma below which all of a black frame is, but its brightest thousandth. The mean would not do: titles and stars on
black have means below 2 (docs/benchmarks.md)."""
STILL = 0.4
"""Mean change of luma below which each part of a frame is (GRID x GRID parts) where nothing moves. Measured: repeated
frames of a real film change by up to 0.35 somewhere, through compression, its moving ones by more than 5."""
GRID = 8
"""A small thing that moves changes its own part of the frame, and hardly the frame's mean."""
_LUMA = np.array([0.2126, 0.7152, 0.0722], dtype=np.float32)


class ContentStage:
    """Fills in the figures of storage.schema.CONTENT, but the duplicates, which only a whole version can tell.

    A frame after the window that begins another shot is let go. gates: those that keep clips out. A clip outside one of
    content is not encoded.
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
        after = work.next_frames
        if after is not None and len(after) and follows_a_cut([*work.frames], after[0]):
            work.next_frames = after[:0]
        if not flags(work.certificate, self.gates):
            return work
        outside = Rejected(plan.clip_id, plan.film, plan.window.start, work.certificate, work.frames_id)
        failure = replace(rejection(outside, self.gates), certificate=work.certificate, frames_id=work.frames_id)
        return replace(work, failure=failure, frames=None, next_frames=None)


def measure(frames: np.ndarray) -> dict[str, float]:
    """`black_frames`, `static_frames`, `motion` and `cuts` of frames uint8 (N, H, W, 3); NaN where N = 1 has none."""
    luma = luma_of(frames)
    steps = len(frames) > 1
    return {
        "black_frames": float((brightest(luma) < BLACK).mean()),
        "static_frames": float((largest_change(luma) < STILL).mean()) if steps else math.nan,
        "motion": float(np.abs(np.diff(luma, axis=0)).mean()) if steps else math.nan,
        "cuts": float(sum(begins for _, begins in shot_starts(frames)) - 1),
    }


def luma_of(frames: np.ndarray) -> np.ndarray:
    """Luma (N, H, W), float32 from 0 to 255, of frames uint8 (N, H, W, 3)."""
    return frames.astype(np.float32) @ _LUMA


def brightest(luma: np.ndarray) -> np.ndarray:
    """(N,): what all pixels of a frame but the brightest thousandth are below."""
    pixels = luma.reshape(len(luma), -1)
    place = math.ceil(0.999 * pixels.shape[1]) - 1
    found: np.ndarray = np.partition(pixels, place, axis=1)[:, place]
    return found


def largest_change(luma: np.ndarray) -> np.ndarray:
    """(N - 1,): mean absolute change from frame to frame of the part of the frame that changes most."""
    change = np.abs(np.diff(luma, axis=0))
    height, width = change.shape[1:]
    rows, columns = (np.arange(0, side, -(-side // GRID)) for side in (height, width))
    sums: np.ndarray = np.add.reduceat(np.add.reduceat(change, rows, axis=1), columns, axis=2)
    pixels = np.outer(np.diff([*rows, height]), np.diff([*columns, width]))
    largest: np.ndarray = (sums / pixels).max(axis=(1, 2))
    return largest


def frames_id(frames: np.ndarray) -> str:
    """16 digits that name exactly these frames."""
    return hashlib.sha256(repr(frames.shape).encode() + np.ascontiguousarray(frames).tobytes()).hexdigest()[:16]
