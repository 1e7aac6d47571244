"""Options of `vlfm sample`: every method's, and what a method has no use for."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

import pytest

from model.methods.base import SampleSettings
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
    assert chosen_sampling(method(name), parsed()) == METHODS[name].Sampling()
    assert chosen_sampling(method(name), parsed("--seed", "3")) == METHODS[name].Sampling(seed=3)


def test_settings_of_a_curve() -> None:
    chosen = chosen_sampling(method("vlfm"), parsed("--steps", "4", "--warmup-steps", "2", "--duration", "3"))
    assert chosen == SampleSettings(steps=4, warmup_steps=2)
    with pytest.raises(ValueError, match="steps is 0"):
        chosen_sampling(method("vlfm"), parsed("--steps", "0"))


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
        chosen_sampling(method("vlfm"), parsed(*words))
    assert "\n" not in str(told.value)
    assert "It takes --duration, --guidance, --seed, --solver, --start, --steps, --warmup-steps" in str(told.value)
