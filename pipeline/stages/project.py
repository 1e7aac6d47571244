"""Latents to HiPPO-LegS coefficients: one matrix product per clip, and the certificate of how well it went."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator

import numpy as np

from pipeline.items import ClipWork, Resources
from pipeline.stage import fail, isolated
from pipeline.stages.invert import SharedCodec, evenly, to_signed


class ProjectStage:
    """Coefficients (order, C, h, w) in 16 bits, zero-padded, measured as they are stored.

    The frame after the window bends the path's end; the certificate is of the clip's own frames.
    codec: None where the clips have no frames, whose readout would be compared with them.
    certify_frames: how many of a clip's observed frames are decoded for the PSNR; 0 for all of them.
    """

    name = "project"

    def __init__(self, codec: SharedCodec | None, order: int, method: str, certify_frames: int = 0) -> None:
        self.codec, self.order, self.method, self.certify_frames = codec, order, method, certify_frames
        self.resources = Resources()

    def setup(self) -> None:
        """Loads the codec, which decodes the readout for the certificate."""
        if self.codec is not None:
            self.codec.load()

    def process(self, works: Iterable[ClipWork]) -> Iterator[ClipWork]:
        """Fills in `coefficients` and the certificate; reasons: not_finite, project_failed."""
        return isolated(works, self._project, self.name, "project_failed")

    def teardown(self) -> None:
        """Frees the codec and the matrices."""
        if self.codec is not None:
            self.codec.free()
        _matrix.cache_clear()

    def _project(self, work: ClipWork) -> ClipWork:
        from model.legs import derivative, evaluate, project
        from model.legs.select import clip_method

        assert work.latents is not None
        plan = work.plan
        times = np.asarray(plan.window.frame_time, dtype=np.float64)
        observed = np.asarray(plan.observed, dtype=bool)
        latents = work.latents.astype(np.float32)
        order = min(self.order, 2 * int(observed.sum()))
        seen, seen_at, outside = latents[observed], times[observed], bool(work.next_time)
        if work.next_latents is not None and outside:
            seen = np.concatenate([seen, work.next_latents.astype(np.float32)])
            seen_at = np.concatenate([seen_at, work.next_time])
        method = clip_method(seen, seen_at, plan.duration, order, self.method, outside)
        weights = _matrix(tuple(seen_at), plan.duration, order, method, outside)
        with np.errstate(over="ignore"):
            coefficients = np.asarray(project(seen, weights)).astype(np.float16)
        if not np.isfinite(coefficients).all():
            detail = f"coefficients of order {order} by {method} do not fit 16 bits; use a lower order or method=linear"
            return fail(work, self.name, "not_finite", detail)
        used = coefficients.astype(np.float32)
        readout = np.asarray(evaluate(used, times, plan.duration), dtype=np.float32)
        start_slope = np.asarray(derivative(used, times[:1], plan.duration), dtype=np.float32)[0]
        steps = np.diff(latents[observed], axis=0)
        work.coefficients = np.zeros((self.order, *coefficients.shape[1:]), dtype=np.float16)
        work.coefficients[:order] = coefficients
        work.certify(
            order_used=order,
            method_used=method,
            psnr_projection=self._psnr(work, readout, observed),
            projection_error=_ratio(readout[observed] - latents[observed], latents[observed]),
            heldout_error=_ratio(readout[~observed] - latents[~observed], latents[~observed]),
            smoothness=_ratio(np.diff(latents, axis=0), latents, squared=True),
            end_ratio=_ratio(start_slope * float(np.diff(times[observed]).mean()), steps) * math.sqrt(len(steps)),
        )
        return work

    def _psnr(self, work: ClipWork, readout: np.ndarray, observed: np.ndarray) -> float:
        """PSNR (dB) of the decoded readout at observed times; NaN where there are no frames to compare it with."""
        from model.metrics.pictures import pooled_psnr

        if work.frames is None or self.codec is None:
            return math.nan
        chosen = np.flatnonzero(observed)[evenly(int(observed.sum()), self.certify_frames)]
        shown = self.codec.decode(readout[chosen].astype(np.float16), work.plan.caption)
        return pooled_psnr(shown, to_signed(work.frames[chosen], self.codec.device))


@functools.lru_cache(maxsize=256)
def _matrix(times: tuple[float, ...], duration: float, order: int, method: str, outside: bool) -> np.ndarray:
    """W (N, order) of one time grid; most clips of a film share it."""
    from model.legs import projection_matrix

    matrix = projection_matrix(np.asarray(times), duration, order, method, outside=outside)
    return np.asarray(matrix, dtype=np.float32)


def _ratio(part: np.ndarray, whole: np.ndarray, squared: bool = False) -> float:
    """Root (or plain ratio, with `squared`) of sum |part|^2 / sum |whole|^2; NaN where there is no part or no whole."""
    top, bottom = float(np.square(part, dtype=np.float64).sum()), float(np.square(whole, dtype=np.float64).sum())
    if part.size == 0:
        return math.nan
    if bottom == 0:
        return 0.0 if top == 0 else math.nan
    return top / bottom if squared else math.sqrt(top / bottom)
