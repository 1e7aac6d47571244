"""Options of `vlfm sample`: every method's, and what a method has no use for."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

import pytest
import torch

from model import legs
from model.flow.path import WarmupPath
from model.flow.solver import Trajectory
from model.methods.base import SampleSettings
from model.methods.curves import curve
from model.methods.registry import METHODS
from model.sampling_options import FIELDS, NOT_OPTIONS, add_sampling_options, chosen_sampling


def parsed(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_sampling_options(parser)
    return parser.parse_args(words)


def method(name: str) -> Any:
    """As much of a method as options need."""
    return METHODS[name]


def test_every_field_of_every_method_is_an_option_and_no_other() -> None:
    fields = {field.name for kind in METHODS.values() for field in dataclasses.fields(kind.Sampling)}
    assert fields - set(NOT_OPTIONS) == set(FIELDS) & fields
    for kind in METHODS.values():
        for field in dataclasses.fields(kind.Sampling):
            if field.name in FIELDS:
                assert isinstance(field.default, FIELDS[field.name].kind), f"{kind.name}: {field.name}"


@pytest.mark.parametrize("name", list(METHODS))
def test_what_is_not_given_is_the_methods_own(name: str) -> None:
    assert chosen_sampling(method(name), {}, parsed()) == METHODS[name].Sampling()
    assert chosen_sampling(method(name), {}, parsed("--seed", "3")) == METHODS[name].Sampling(seed=3)


@pytest.mark.parametrize(("observed", "steps"), [(8, 16), (16, 16), (32, 32)])
def test_a_curve_is_sampled_with_a_step_to_each_observed_frame(observed: int, steps: int) -> None:
    form = {"frames_observed_max": observed}
    assert chosen_sampling(method("vlfm"), form, parsed("--seed", "3")) == SampleSettings(steps=steps, seed=3)
    assert chosen_sampling(method("vlfm"), form, parsed("--steps", "4")).steps == 4
    for name in ("flowception", "full", "autoregressive"):
        assert chosen_sampling(method(name), form, parsed()) == METHODS[name].Sampling(), "its steps are of one frame"


def test_a_true_curve_is_lost_between_fewer_points_than_frames() -> None:
    """32 frames that differ, projected and read at their times off the cubics between the true values at the points."""
    frames = torch.randn(32, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    times = torch.arange(32, dtype=torch.float64) / 32
    curved = legs.project(frames, legs.projection_matrix(times.numpy(), 1.0, 64))
    lost = {}
    for steps in (16, 32):
        grid = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
        mean, slope = curve(curved[None], grid[None])
        points = mean[0][:, None], slope[0][:, None], mean[0][:, None]
        read = Trajectory(WarmupPath(), grid, *points, noise=frames[:1], network_calls=0).read(times)[:, 0]
        lost[steps] = float((read - legs.evaluate(curved, times.numpy(), 1.0)).square().mean() / frames.square().mean())
    assert lost[32] < 1e-3
    assert lost[16] > 0.1


def test_settings_of_a_curve() -> None:
    chosen = chosen_sampling(method("vlfm"), {}, parsed("--steps", "4", "--warmup-steps", "2", "--duration", "3"))
    assert chosen == SampleSettings(steps=4, warmup_steps=2)
    with pytest.raises(ValueError, match="steps is 0"):
        chosen_sampling(method("vlfm"), {}, parsed("--steps", "0"))


@pytest.mark.parametrize(
    ("words", "flag"),
    [
        (["--insertion", "poisson"], "--insertion"),
        (["--local-power", "2"], "--local-power"),
        (["--open-end"], "--open-end"),
        (["--no-open-end"], "--open-end"),
        (["--max-frames", "0"], "--max-frames"),
        (["--given", "a.png", "b.png"], "--given"),
    ],
)
def test_an_option_without_use_is_refused_in_one_line(words: list[str], flag: str) -> None:
    with pytest.raises(ValueError, match=f"^{flag} has no use for a run of the method vlfm; leave it out. ") as told:
        chosen_sampling(method("vlfm"), {}, parsed(*words))
    assert "\n" not in str(told.value)
    assert "It takes --duration, --guidance, --seed, --solver, --start, --steps, --warmup-steps" in str(told.value)
