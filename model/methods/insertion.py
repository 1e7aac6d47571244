"""The mathematics of frame insertion: when frames appear, which are seen, and how many are still to come.

Flowception (arXiv 2512.11438, appendices A and B) lets a video grow: visible frames are denoised while frames of pure
noise are inserted between them. Frame i appears at the insertion time kappa^-1(u_i), u_i uniform, and its extended time
is `tau_i = tau_g - kappa^-1(u_i)` (equation 26), with the clock tau_g from 0 to 2: below 0 the frame is deleted, in
[0, 1) it is active, at its local time t_i = tau_i, and from 1 on it is finished. Nothing here knows of networks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from model.settings import ABOVE_0, SHARE_BELOW_1, check_settings


class Scheduler(Protocol):
    """The distribution function kappa of a frame's insertion time: from 0 at 0 to 1 at 1, never falling."""

    def kappa(self, time: Tensor) -> Tensor:
        """Share of the frames that has appeared at times in [0, 1]."""
        ...

    def inverse(self, share: Tensor) -> Tensor:
        """The earliest time at which kappa reaches a share in (0, 1]; 0 is at 0."""
        ...

    def derivative(self, time: Tensor) -> Tensor:
        """kappa' at times in [0, 1]; at a kink the value on its right."""
        ...


@dataclass(frozen=True)
class Linear:
    """kappa(t) = t: insertions are spread evenly."""

    def kappa(self, time: Tensor) -> Tensor:
        """As `Scheduler.kappa`."""
        return time

    def inverse(self, share: Tensor) -> Tensor:
        """As `Scheduler.inverse`."""
        return share

    def derivative(self, time: Tensor) -> Tensor:
        """As `Scheduler.derivative`."""
        return torch.ones_like(time)


@dataclass(frozen=True)
class Power:
    """kappa(t) = t^exponent: above 1 most frames come late, below 1 early."""

    exponent: float = 2.0

    def __post_init__(self) -> None:
        """Raises ValueError for an exponent that is not above 0."""
        check_settings(self, {"exponent": ABOVE_0})

    def kappa(self, time: Tensor) -> Tensor:
        """As `Scheduler.kappa`."""
        return time**self.exponent

    def inverse(self, share: Tensor) -> Tensor:
        """As `Scheduler.inverse`."""
        return share ** (1 / self.exponent)

    def derivative(self, time: Tensor) -> Tensor:
        """As `Scheduler.derivative`; infinite at 0 for exponents below 1."""
        return self.exponent * time ** (self.exponent - 1)


@dataclass(frozen=True)
class Delayed:
    """kappa(t) = max(0, (t - delay) / (1 - delay)): the starting frames are first denoised alone."""

    delay: float = 0.2

    def __post_init__(self) -> None:
        """Raises ValueError for a delay outside [0, 1)."""
        check_settings(self, {"delay": SHARE_BELOW_1})

    def kappa(self, time: Tensor) -> Tensor:
        """As `Scheduler.kappa`."""
        return ((time - self.delay) / (1 - self.delay)).clamp(min=0)

    def inverse(self, share: Tensor) -> Tensor:
        """As `Scheduler.inverse`."""
        return torch.where(share > 0, self.delay + (1 - self.delay) * share, 0.0)

    def derivative(self, time: Tensor) -> Tensor:
        """As `Scheduler.derivative`."""
        return (time >= self.delay).to(time.dtype) / (1 - self.delay)


def hazard(scheduler: Scheduler, time: Tensor) -> Tensor:
    """rho(t) = kappa'(t) / (1 - kappa(t)): rate of a frame that is still to come; 0 from t = 1 on (Lemma B.1)."""
    left = 1 - scheduler.kappa(time.clamp(0, 1))
    open_ = left > 0
    return torch.where(open_, scheduler.derivative(time.clamp(0, 1)) / torch.where(open_, left, 1), 0)


def step_probability(scheduler: Scheduler, time: float, step: float) -> float:
    """Probability that a frame which is still to come at `time` appears until `time + step`, both in [0, 1].

    It is (kappa(t + h) - kappa(t)) / (1 - kappa(t)) (equation 28): exact for any h, where h rho(t) is its limit, and
    exactly 1 for a step that ends at 1, so that nothing is left out.
    """
    if time + step > 1 - 1e-9:
        return 1.0
    now, later = scheduler.kappa(torch.tensor([time, time + step], dtype=torch.float64)).tolist()
    return float((later - now) / (1 - now)) if now < 1 else 1.0


@dataclass(frozen=True)
class Growth:
    """Clips of up to N frames in the middle of their growth; every tensor is (B, N)."""

    tau: Tensor
    """Extended times tau_i; frames that are no part of the clip are below 0 too."""
    valid: Tensor
    """bool: which frames are no padding."""

    @property
    def visible(self) -> Tensor:
        """bool: frames that have appeared."""
        return self.valid & (self.tau >= 0)

    @property
    def active(self) -> Tensor:
        """bool: frames that are being denoised, 0 <= tau_i < 1."""
        return self.visible & (self.tau < 1)

    @property
    def finished(self) -> Tensor:
        """bool: frames that are clean, tau_i >= 1."""
        return self.visible & (self.tau >= 1)

    @property
    def deleted(self) -> Tensor:
        """bool: frames that are still to come."""
        return self.valid & (self.tau < 0)

    @property
    def time(self) -> Tensor:
        """Local times t_i in [0, 1]."""
        return self.tau.clamp(0, 1)

    @property
    def pending(self) -> Tensor:
        """For each visible frame how many deleted ones lie between it and the next visible one; 0 elsewhere."""
        return pending_counts(self.visible, self.deleted)


def grown(inserted: Tensor, clock: Tensor, valid: Tensor) -> Growth:
    """Clips whose frames appear at times `inserted` (B, N), at the clocks tau_g (B,)."""
    return Growth((clock[:, None] - inserted).masked_fill(~valid, -1.0), valid)


def clock_end(inserted: Tensor, counted: Tensor) -> Tensor:
    """tau_max (B,) = 1 + the latest insertion time of the `counted` frames (B, N): all are clean then.

    The printed law of tau_g, `lognorm(0, 1) tau_max`, exceeds it in half of its draws; it must be the logit-normal's.
    """
    return 1 + inserted.masked_fill(~counted, 0).amax(1)


def pending_counts(visible: Tensor, deleted: Tensor) -> Tensor:
    """(B, N) long: of each visible frame the deleted ones between it and the next visible one; 0 elsewhere."""
    slot = visible.long().cumsum(1)  # the frames of a slot, visible one first, share a number; 0 is before them all
    counts = torch.zeros(slot.shape[0], slot.shape[1] + 1, dtype=torch.long, device=slot.device)
    counts.scatter_add_(1, slot, deleted.long())
    return torch.where(visible, counts.gather(1, slot), 0)


@dataclass(frozen=True)
class Alignment:
    """Where the kept frames of clips go when the others are stripped and the rest is aligned to the left."""

    source: Tensor
    """(B, M) long: the frame that stands in each place, M the most kept frames of a clip; arbitrary for padding."""
    valid: Tensor
    """(B, M) bool: which places are no padding."""

    def of(self, values: Tensor) -> Tensor:
        """Values (B, N, ...) of all frames as (B, M, ...) of the kept ones, zero for padding."""
        place = self.source.view(*self.source.shape, *[1] * (values.ndim - 2)).expand(-1, -1, *values.shape[2:])
        mask = self.valid.view(*self.valid.shape, *[1] * (values.ndim - 2))
        found = values.gather(1, place)
        return torch.where(mask, found, torch.zeros((), dtype=found.dtype, device=found.device))


def strip(kept: Tensor, places: int | None = None) -> Alignment:
    """The alignment that strips all frames but `kept` (B, N) bool.

    places: M, at least as many as are kept of any clip; None for just as many, at least 1, which waits for the device.
    """
    counts = kept.sum(1)
    most = max(int(counts.max()) if counts.numel() else 0, 1) if places is None else places
    order = torch.sort((~kept).to(torch.uint8), dim=1, stable=True).indices[:, :most]
    return Alignment(order, torch.arange(most, device=kept.device) < counts[:, None])


def places_after(counts: Tensor, valid: Tensor) -> Tensor:
    """(B, L) long: where each frame stands once `counts` (B, L) new ones have been inserted to the right of each.

    valid: (B, L) bool, frames first; padding gets the places behind them.
    """
    counts = counts.masked_fill(~valid, 0)
    return torch.arange(counts.shape[1], device=counts.device) + counts.cumsum(1) - counts


def shifted(time: Tensor, shift: float) -> Tensor:
    """Local times with more noise: t / (1 + (shift - 1)(1 - t)), which divides the signal-to-noise ratio by `shift`."""
    return time if shift == 1 else time / (1 + (shift - 1) * (1 - time))
