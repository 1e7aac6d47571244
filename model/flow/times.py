"""Laws by which training draws its times on the way from noise (0) to data (1), on the straight path between them.

Each is given by its quantiles, so that evenly spread shares of a batch (`Draws.even`) make evenly spread times.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

TIME_LAWS = ("uniform", "logit_normal", "mode", "beta")
"""`uniform`; `logit_normal` and `mode`, of Esser et al. 2024 (arXiv 2403.03206, section 3.1), more of the middle than
of the ends, of which `mode` leaves something; `beta`, of Flowception, early ones."""
MODE_SCALE = 1.29
"""s of `mode` (equation 20), the one that they found best."""
BETA, BETA_SHARE = (1.42, 2.64), 0.95
"""Parameters of `beta`, and the share of its times; the others are uniform."""


def time_at(law: str, share: Tensor) -> Tensor:
    """Quantiles in [0, 1] of a law of TIME_LAWS, of the shape of `share` in [0, 1].

    Raises:
        ValueError: there is no such law.
    """
    if law == "uniform":
        return share
    if law == "logit_normal":
        return torch.special.ndtri(share.double()).sigmoid().to(share.dtype)
    if law == "mode":
        even = share.double()
        return (even - MODE_SCALE * ((math.pi / 2 * even).sin().square() - even)).clamp(0, 1).to(share.dtype)
    if law != "beta":
        raise ValueError(f"time_law is {law!r}; it must be one of {', '.join(TIME_LAWS)}")
    grid = torch.linspace(0, 1, 4097, dtype=torch.float64, device=share.device)
    # x^0.42 is steep at 0: the quantile is read off exact values of the distribution function's trapezoids.
    density = grid ** (BETA[0] - 1) * (1 - grid) ** (BETA[1] - 1)
    beta = torch.cumulative_trapezoid(density, grid)
    total = torch.cat([beta.new_zeros(1), BETA_SHARE * beta / beta[-1]]) + (1 - BETA_SHARE) * grid
    right = torch.searchsorted(total, share.double().contiguous()).clamp(1, len(grid) - 1)
    low, high = total[right - 1], total[right]
    return (grid[right - 1] + (share.double() - low) / (high - low) * (grid[right] - grid[right - 1])).to(share.dtype)
