"""Paths that overlap, read as one matrix: from the frames of a few chunks of a film to the film at any times.

Every two neighbouring chunks of a shot have a path of their own, a HiPPO-LegS projection. Within a chunk the path over
it and the chunk before passes smoothly into the path over it and the chunk after. A path has no weight at its own ends,
where a projection is least exact, unless the shot begins or ends there.
"""

from __future__ import annotations

import numpy as np

from model.legs import basis, projection_matrix

ORDER = 8
"""Coefficients for each frame of a path. Twice the frames are enough between frames; with more, the film's own frames
come out as they went in (12 clips of seven films, least PSNR there by `linear`: 37 dB with 2, 44 with 4, 51 with 8)."""


def readout_matrix(
    before: np.ndarray | None,
    here: np.ndarray,
    after: np.ndarray | None,
    due: np.ndarray,
    left: str | None,
    right: str | None,
) -> np.ndarray:
    """The matrix (L, frames of the chunks) that turns the chunks' latents into those at the times `due`.

    Args:
        before, here, after: times of three neighbouring chunks in seconds, increasing; None at a shot's ends.
        due: (L,) seconds, in the middle chunk or up to the one after; beyond the shot its end values stay.
        left: method of the path over `before` and `here`; None where the shot begins here.
        right: method of the path over `here` and `after`; None where the shot ends here and did not begin here.
    """
    times = np.concatenate([part for part in (before, here, after) if part is not None])
    share = np.full(len(due), float(left is None))
    if left is not None and right is not None:
        fraction = np.clip((due - here[0]) / (here[-1] - here[0]), 0, 1)
        share = fraction**2 * (3 - 2 * fraction)
    matrix = np.zeros((len(due), len(times)))
    if left is not None:
        over = slice(0, (0 if before is None else len(before)) + len(here))
        matrix[:, over] += (1 - share)[:, None] * _path(times[over], due, left)
    if right is not None:
        over = slice(0 if before is None else len(before), len(times))
        matrix[:, over] += share[:, None] * _path(times[over], due, right)
    return matrix


def window(times: np.ndarray) -> tuple[np.ndarray, float]:
    """Times in a window that they span, and its duration; the same for all windows of a film of constant rate."""
    seconds = np.round(times - times[0], 9)
    return seconds, float(seconds[-1]) if len(seconds) > 1 else 1.0


def _path(times: np.ndarray, due: np.ndarray, method: str) -> np.ndarray:
    """The matrix (L, N) of one path; before its first frame and after its last one these stay."""
    seconds, duration = window(times)
    order = ORDER * len(times)
    at = np.clip(due - times[0], 0, duration)
    return basis(at, duration, order) @ projection_matrix(seconds, duration, order, method).T
