"""Random histories of a folder hold what a plain model says; `python -m tests.bench.refresh` runs 500 of them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest

from tests.pipeline.ingest.refresh_model import Model, Shown, run_history, without_ffmpeg

TWINS = 130
"""One twin is gone and the other's place has another film: of the first 200 histories one has this."""


@pytest.mark.parametrize("seeds", [range(10), [*range(10, 20), TWINS]], ids=["0-9", "10-19"])
def test_histories_are_as_the_model(tmp_path: Path, seeds: Iterable[int]) -> None:
    with without_ffmpeg():
        faults = [fault for seed in seeds for fault in run_history(seed, tmp_path / str(seed))]
    assert faults == []


def test_the_model_itself() -> None:
    """By hand: a film moves with another caption, its twin leaves, and a recipe comes back."""
    model = Model(source={"a": Shown(0, "walks"), "b": Shown(2, "runs")})
    model.ingest("a", prune=False)
    assert model.held["a"] == {(0, "walks", 0.0), (2, "runs", 0.0)}
    model.source = {"c": Shown(0, "jumps")}
    model.ingest("a", prune=False)
    assert model.held["a"] == {(0, "jumps", 0.0), (2, "runs", 0.0)}
    assert set(model.films) == {"b", "c"}
    model.ingest("b", prune=False)
    assert model.held["b"] == {(0, "jumps", 0.0)}
    assert set(model.films) == {"b", "c"}
    model.ingest("b", prune=True)
    model.ingest("a", prune=False)
    assert model.held["a"] == {(0, "jumps", 0.0)}
