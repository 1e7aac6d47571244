"""What rounding may do to floats: other last bits on another processor, GPU, thread count or version of a library.

No two computations are ever asked for equal bits, ids are made of inputs only, and what a version stores is used again.
Where it matters that two computations are of the same network, this is how they are compared. Copies are compared bit
for bit: that is `storage.verify`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from storage.layout import LakeError

ROUNDING = 2.0**-8
"""How far two computations of an embedding may lie apart: the norm of the difference of two rows, over the row's norm.

Stored rows are float16, 11 bits: two machines that round every value to different neighbours are 2**-10 apart at most.
The built-in encoder's captions were 2**-13 apart between the instruction sets from SSE4.1 to AVX-512.
"""


def relative_difference(stored: np.ndarray[Any, Any], computed: np.ndarray[Any, Any]) -> float:
    """The largest relative difference of two (rows, D) arrays over their rows; infinite where the shapes differ."""
    if stored.shape != computed.shape:
        return float("inf")
    one, other = stored.astype(np.float64), computed.astype(np.float64)
    norms = np.linalg.norm(one, axis=-1)
    apart = np.linalg.norm(other - one, axis=-1)
    return float(np.max(apart / np.maximum(norms, np.finfo(np.float64).tiny), initial=0.0))


def check_rounding(what: str, stored: np.ndarray[Any, Any], computed: np.ndarray[Any, Any]) -> None:
    """Refuse (rows, D) floats that differ from those stored by more than rounding explains.

    Raises:
        LakeError: the line says `what` it is, by how much it differs and what to do.
    """
    difference = relative_difference(stored, computed)
    if not difference <= ROUNDING:  # NaN is refused too
        apart = (
            f"{difference:.2g} of its norm, where rounding explains {ROUNDING:.2g}"
            if np.isfinite(difference)
            else f"{computed.shape} finite values now, {stored.shape} stored"
        )
        raise LakeError(
            f"{what} differs from the stored one by more than rounding ({apart}): the same weights compute something "
            "else here; use the versions of the libraries that made the lake, or ingest into a new lake"
        )
