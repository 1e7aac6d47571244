"""Laws of training times: their quantiles against distribution functions, and the warm-up's times that follow them."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import optimize, stats

from model.flow.path import WarmupPath
from model.flow.times import TIME_LAWS, time_at
from model.methods.draws import Draws
from model.methods.vlfm import VLFM, VLFMOptions


def cdf(law: str, time: np.ndarray) -> np.ndarray:
    """The distribution function of a law, float64, by other means than its quantiles."""
    if law == "uniform":
        return time
    if law == "logit_normal":
        with np.errstate(divide="ignore"):
            return stats.norm.cdf(np.log(time / (1 - time)))
    if law == "beta":
        return 0.95 * stats.beta.cdf(time, 1.42, 2.64) + 0.05 * time

    def printed(u: float) -> float:
        """Equation 20 of arXiv 2403.03206, whose time 1 is noise."""
        return 1 - u - 1.29 * (math.cos(math.pi / 2 * u) ** 2 - 1 + u)

    # Theirs is of falling u, and its time runs the other way: both turned round leave the distribution function.
    return np.array([optimize.brentq(lambda u, t=t: printed(u) - (1 - t), 0, 1, xtol=1e-14) for t in time])


@pytest.mark.parametrize("law", TIME_LAWS)
def test_times_of_each_law_have_its_quantiles(law: str) -> None:
    share = torch.linspace(0, 1, 402, dtype=torch.float64)
    time = time_at(law, share)
    assert float(time[0]) == 0
    assert float(time[-1]) == pytest.approx(1, abs=1e-12)
    assert bool((time.diff() >= 0).all())
    np.testing.assert_allclose(cdf(law, time[1:-1].numpy()), share[1:-1].numpy(), atol=2e-5 if law == "beta" else 1e-10)
    assert time_at(law, share.float()).dtype == torch.float32


def test_a_law_that_there_is_not_is_refused() -> None:
    with pytest.raises(ValueError, match="time_law is 'cosmap'; it must be one of uniform, logit_normal, mode, beta"):
        time_at("cosmap", torch.zeros(1))
    with pytest.raises(ValueError, match="warmup_law is 'sigmoid'; it must be signal, uniform, logit_normal, mode or"):
        VLFMOptions(warmup_law="sigmoid")
    with pytest.raises(ValueError, match="warmup_law is 'mode', which draws the warm-up's times: --set warmup_focus=0"):
        VLFMOptions(warmup_law="mode", warmup_focus=1.0)
    with pytest.raises(ValueError, match="warmup_law is 'mode', which draws the warm-up's times: --set path=warmup"):
        VLFMOptions(warmup_law="mode", path="paper", anchor="none")


@pytest.mark.parametrize("law", TIME_LAWS)
def test_the_warm_ups_times_follow_the_law_on_the_straight_line_from_noise_to_the_frame(law: str) -> None:
    """A state is a m + (1 - (1 - sigma_end) a) z: its place a on the line has the law, to within one draw in 1,200."""
    method = VLFM(VLFMOptions(warmup_law=law, times_per_clip=3), WarmupPath(0.4, 0.2), 1.0, 1.0, 4)
    drawn = method.draw_times(Draws(1, 4000, dtype=torch.float64))
    early = drawn[drawn < 0]
    assert len(early) == pytest.approx(0.3 * drawn.numel(), abs=2)
    q = (early.sort().values + 0.4) / 0.4
    rise = (q**2 * (3 - 2 * q)).numpy()
    even = (np.arange(len(rise)) + 0.5) / len(rise)
    assert np.abs(cdf(law, rise.clip(1e-12, 1 - 1e-12)) - even).max() < 1.5 / len(rise) + 2e-5
    # The sampler's steps are as ever.
    usual = replace(method, options=VLFMOptions())
    assert torch.equal(method.warmup_grid(8), usual.warmup_grid(8))
    assert not torch.equal(usual.draw_times(Draws(1, 4000)), drawn.float())
