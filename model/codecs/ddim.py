"""DDIM, forwards and backwards, as functions of a noise predictor; the scheduler values are explicit.

Sampling goes from a noise level t to the next lower p (Song, Meng, Ermon 2020, equation 12, eta = 0):
`x_p = a x_t + b eps(x_t, t)` with `a = sqrt(A_p / A_t)`, `b = sqrt(1 - A_p) - a sqrt(1 - A_t)`, where `A` is the
cumulative product of `1 - beta`. Its exact inverse is implicit, `x_t = (x_p - b eps(x_t, t)) / a`. Plain inversion
evaluates eps at `x_p` instead; `invert` refines that guess by a fixed-point iteration that is damped per sample where
it does not contract (Pan et al. 2023, "AIDI", with step halving).

Every step is two scalars a level: no scheduler object, and nothing in the loops waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

PredictNoise = Callable[[Tensor, Tensor], Tensor]
"""eps of noisy latents (N, C, h, w) at a ddim_step (an int64 scalar tensor on their device); same shape."""

TRAIN_STEPS, BETA_START, BETA_END, STEPS_OFFSET = 1000, 0.00085, 0.012, 1

SCHEDULER_VALUES: Mapping[str, object] = MappingProxyType(
    {
        "num_train_timesteps": TRAIN_STEPS,
        "beta_start": BETA_START,
        "beta_end": BETA_END,
        "beta_schedule": "scaled_linear",
        "trained_betas": None,
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": STEPS_OFFSET,
        "timestep_spacing": "leading",
        "rescale_betas_zero_snr": False,
        "thresholding": False,
        "prediction_type": "epsilon",
    }
)
"""Stable Diffusion v1.5's scheduler in diffusers' words. The hub's files differ and libraries' defaults are others, and
each of them costs more than refinement gains (methods-reference.md, 4.3), so nothing is read from a folder."""

ENOUGH_DB = 75.0
"""A round trip this good needs no comparison: latents are stored in float16, whose rounding alone is about 73 dB."""


def noise_levels() -> NDArray[np.float64]:
    """(1000,) float64: at each ddim_step the share of the clean latents' power, the cumulative product of 1 - beta."""
    betas = np.linspace(math.sqrt(BETA_START), math.sqrt(BETA_END), TRAIN_STEPS) ** 2
    return np.asarray(np.cumprod(1 - betas), dtype=np.float64)


@dataclass(frozen=True)
class DDIMSchedule:
    """A grid of noise levels, lowest first.

    ddim_steps: number of levels; divides 1000 and is at most 500. Raises ValueError otherwise.
    """

    ddim_steps: int = 50

    def __post_init__(self) -> None:
        if not 1 <= self.ddim_steps <= TRAIN_STEPS // 2 or TRAIN_STEPS % self.ddim_steps:
            raise ValueError(
                f"ddim_steps is {self.ddim_steps}: the grid needs a divisor of {TRAIN_STEPS} of at most "
                f"{TRAIN_STEPS // 2}, such as 10, 20, 25, 50 or 100"
            )

    @cached_property
    def timesteps(self) -> tuple[int, ...]:
        """ddim_step of each level, ascending: 1, 21, ..., 981 for 50 levels ("leading" spacing, offset 1)."""
        stride = TRAIN_STEPS // self.ddim_steps
        return tuple(level * stride + STEPS_OFFSET for level in range(self.ddim_steps))

    @cached_property
    def steps(self) -> tuple[tuple[float, float], ...]:
        """(a, b) of each level: sampling from it to the one below is `a x + b eps`. Below the first lies step 0."""
        alphas = noise_levels()
        pairs = []
        for here, below in zip(self.timesteps, (0, *self.timesteps[:-1]), strict=True):
            a = math.sqrt(alphas[below] / alphas[here])
            pairs.append((a, math.sqrt(1 - alphas[below]) - a * math.sqrt(1 - alphas[here])))
        return tuple(pairs)

    def depth(self, inversion_depth: int | None) -> int:
        """The number of levels to go; None means all. Raises ValueError outside 0 to ddim_steps."""
        depth = self.ddim_steps if inversion_depth is None else inversion_depth
        if not 0 <= depth <= self.ddim_steps:
            raise ValueError(
                f"inversion_depth is {depth}: take 0 (latents as they are) to ddim_steps = {self.ddim_steps}"
            )
        return depth


def step(latents: Tensor, noise: Tensor, schedule: DDIMSchedule, level: int) -> Tensor:
    """One sampling step from `level` (0-based) to the one below it, given eps there. Shapes (N, C, h, w)."""
    a, b = schedule.steps[level]
    return torch.add(a * latents, noise, alpha=b)


def inverse_step(latents: Tensor, noise: Tensor, schedule: DDIMSchedule, level: int) -> Tensor:
    """The step up to `level` from the one below it, given eps; it inverts `step` if that is the eps of the result."""
    a, b = schedule.steps[level]
    return torch.add(latents / a, noise, alpha=-b / a)


@torch.no_grad()
def regenerate(
    latents: Tensor, predict_noise: PredictNoise, schedule: DDIMSchedule, inversion_depth: int | None = None
) -> Tensor:
    """Samples down from level `inversion_depth` (None: all levels) to clean latents. One call of eps a level.

    latents (N, C, h, w), float32 or float64; eps may compute in another type. Raises ValueError where it is not finite.
    """
    ddim_steps = torch.tensor(schedule.timesteps, device=latents.device)
    result = latents
    for level in reversed(range(schedule.depth(inversion_depth))):
        result = step(result, predict_noise(result, ddim_steps[level]).to(result.dtype), schedule, level)
    _refuse_not_finite(result, "regenerated")
    return result


@dataclass(frozen=True)
class Inversion:
    """Noisy latents and how well they were found, per sample."""

    latents: Tensor
    """(N, C, h, w), the type of the input."""
    residual: Tensor
    """(N,) rms of the fixed point's last measured residual at its worst level; NaN without refinements."""
    round_trip: Tensor
    """(N,) dB, rms of the clean latents over rms of the error after regeneration; NaN where it was not checked."""


@torch.no_grad()
def invert(
    latents: Tensor,
    predict_noise: PredictNoise,
    schedule: DDIMSchedule,
    inversion_depth: int | None = None,
    refinements: int = 3,
    damping: float = 1.0,
) -> Inversion:
    """The noisy latents from which `regenerate` comes back to `latents`.

    inversion_depth: steps to invert; 0 gives the latents back, None inverts all.
    refinements: fixed-point iterations a level, >= 0; 0 is plain inversion. Eps is called `1 + refinements` times
        a level.
    damping: first weight of an iteration, in (0, 1]; a sample's weight is halved where its residual does not fall by a
        tenth, and it goes on from its best guess.
    Raises ValueError for values out of range and where eps is not finite.
    """
    if refinements < 0 or not 0 < damping <= 1:
        raise ValueError(
            f"refinements is {refinements} and damping {damping}: take refinements >= 0, damping in (0, 1]"
        )
    ddim_steps = torch.tensor(schedule.timesteps, device=latents.device)
    count = len(latents)
    worst = latents.new_zeros(count) if refinements else latents.new_full((count,), math.nan)
    result = latents
    for level in range(schedule.depth(inversion_depth)):
        below, ddim_step = result, ddim_steps[level]

        def invert_step(
            guess: Tensor, below: Tensor = below, ddim_step: Tensor = ddim_step, level: int = level
        ) -> Tensor:
            return inverse_step(below, predict_noise(guess, ddim_step).to(below.dtype), schedule, level)

        best = guess = invert_step(below)
        direction = torch.zeros_like(guess)
        least = latents.new_full((count,), math.inf)
        weight = latents.new_full((count,), damping)
        for _ in range(refinements):
            correction = invert_step(guess) - guess
            residual = correction.square().flatten(1).mean(1).sqrt()
            weight = torch.where(residual < 0.9 * least, weight, weight / 2)
            improved = residual < least
            best = torch.where(_wide(improved), guess, best)
            direction = torch.where(_wide(improved), correction, direction)
            least = torch.where(improved, residual, least)
            guess = best + _wide(weight) * direction
        # A sample that contracted takes its last step unseen; one that did not keeps the best guess that was measured.
        result = torch.where(_wide(weight < damping), best, guess)
        worst = torch.maximum(worst, least) if refinements else worst
    _refuse_not_finite(result, "inverted")
    return Inversion(result, worst, torch.full_like(worst, math.nan))


@torch.no_grad()
def invert_checked(
    latents: Tensor,
    predict_noise: PredictNoise,
    schedule: DDIMSchedule,
    inversion_depth: int | None = None,
    refinements: int = 3,
    enough_db: float = ENOUGH_DB,
    for_samples: Callable[[Tensor], PredictNoise] | None = None,
) -> Inversion:
    """`invert`, then the round trip of each sample is looked at and bad samples are done again.

    A small residual does not prove a good round trip: a few samples leave the basin and come back elsewhere. A sample
    whose round trip is below `enough_db` is compared with its own plain inversion; where that is better it is redone
    with damping 1/2 and at least 10 refinements, and the best of the three is kept. So no sample ends below its plain
    inversion, unless it is above `enough_db`. Costs `2 + refinements` calls of eps a level, two more for samples below
    `enough_db`, and 12 more for those redone.

    for_samples: where eps depends on the sample (each has its own caption), the predictor for the samples of these
        indices. The other arguments and the errors are those of `invert`.
    """
    found = invert(latents, predict_noise, schedule, inversion_depth, refinements)
    quality = round_trip_db(latents, found.latents, predict_noise, schedule, inversion_depth)
    result, residual = found.latents.clone(), found.residual.clone()

    def attempt(rows: Tensor, count: int, damping: float) -> Tensor:
        """Inverts these samples once more, keeps what is better, says which that were."""
        predict = predict_noise if for_samples is None else for_samples(rows)
        again = invert(latents[rows], predict, schedule, inversion_depth, count, damping)
        decibels = round_trip_db(latents[rows], again.latents, predict, schedule, inversion_depth)
        better = decibels > quality[rows]
        chosen = rows[better]
        result[chosen], residual[chosen], quality[chosen] = (
            again.latents[better],
            again.residual[better],
            decibels[better],
        )
        return chosen

    if refinements and schedule.depth(inversion_depth):
        doubtful = (quality < enough_db).nonzero().flatten()
        lost = attempt(doubtful, 0, 1.0) if len(doubtful) else doubtful
        if len(lost):
            attempt(lost, max(10, refinements), 0.5)
    return Inversion(result, residual, quality)


def round_trip_db(
    clean: Tensor,
    noisy: Tensor,
    predict_noise: PredictNoise,
    schedule: DDIMSchedule,
    inversion_depth: int | None = None,
) -> Tensor:
    """(N,) dB: rms of the clean latents over rms of what `regenerate(noisy)` differs from them by."""
    error = regenerate(noisy, predict_noise, schedule, inversion_depth) - clean
    power = clean.square().flatten(1).mean(1)
    # An exact round trip counts as 300 dB rather than infinity.
    return 10 * torch.log10(power / error.square().flatten(1).mean(1).clamp_min(1e-30 * power).clamp_min(1e-37))


def guided(conditional: PredictNoise, unconditional: PredictNoise, guidance: float) -> PredictNoise:
    """Classifier-free guidance (Ho and Salimans 2022): `eps_u + guidance (eps_c - eps_u)`; 1 is eps_c alone."""
    if guidance == 1:
        return conditional

    def predict_noise(latents: Tensor, ddim_step: Tensor) -> Tensor:
        base = unconditional(latents, ddim_step)
        return base + guidance * (conditional(latents, ddim_step) - base)

    return predict_noise


def disagreements(config: Mapping[str, object]) -> list[str]:
    """What a folder's scheduler_config says otherwise than `SCHEDULER_VALUES`, a line each; absent keys say nothing."""
    return [
        f"{key} is {config[key]!r} in the folder, {value!r} is used"
        for key, value in SCHEDULER_VALUES.items()
        if key in config and config[key] != value
    ]


def _wide(per_sample: Tensor) -> Tensor:
    return per_sample.view(-1, 1, 1, 1)


def _refuse_not_finite(latents: Tensor, what: str) -> None:
    finite = torch.isfinite(latents).flatten(1).all(1)
    if not bool(finite.all()):
        bad = (~finite).nonzero().flatten().tolist()
        raise ValueError(
            f"{what} latents of samples {bad[:8]} hold NaN or infinity: the noise predictor diverged there; run it in "
            "float32, or set inversion_depth to 0"
        )
