"""The cost of an ingest is told from what earlier ones took, and is unknown before."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from flows.cli import main
from pipeline.ingest import plan_ingest
from pipeline.ingest.cost import NOT_MEASURED, estimate, measured
from pipeline.items import BlockResult
from pipeline.sources.folders import discover
from storage.layout import Lake
from storage.version import load
from tests.pipeline.ingest.in_process import RECIPE, make

Film = Callable[..., Path]


def test_the_cost_of_new_clips_is_that_of_those_before(scene: Film, tmp_path: Path) -> None:
    films, place = tmp_path / "films", tmp_path / "lake"
    recipe = dataclasses.replace(RECIPE, captions_required=False)
    scene(films / "a.mp4", seconds=3)
    lake = Lake.create(place)
    assert estimate(plan_ingest(lake, discover(films, None, False), recipe)) is None
    make(films, place, recipe)
    scene(films / "b.mp4", rate="25", seconds=5)
    plan = plan_ingest(lake, discover(films, None, False), recipe)
    cost = estimate(plan, workers=2)
    assert cost is not None
    run = load(lake).extra["measured"]
    assert (cost.clips, cost.measured_on, cost.versions, cost.gpu_hours) == (5, 3, (1,), 0.0)
    assert run["clips"] == 3
    assert cost.seconds_per_clip == pytest.approx({name: run["seconds"][name] / 3 for name in cost.seconds_per_clip})
    assert set(cost.seconds_per_clip) == {"decode", "invert", "project"}
    per_clip = sum(cost.seconds_per_clip.values())
    assert 3600 * cost.hours == pytest.approx(5 * per_clip / 2 + run["commit"] / 3 * 5)
    make(films, place, recipe)
    before, after = (sum(shard.bytes for shard in load(lake, n).shards) for n in (1, 2))
    assert cost.bytes == pytest.approx(2 * (after - before), rel=0.2), "shards, and arrays of the same size"
    assert estimate(plan_ingest(lake, discover(films, None, False), recipe)).clips == 0  # type: ignore[union-attr]
    assert estimate(plan_ingest(lake, discover(films, None, False), dataclasses.replace(recipe, rate=4.0))) is None


def test_a_block_on_a_gpu_holds_it_from_its_begin_to_its_end() -> None:
    made = BlockResult("a", (object(), object()), (), {"decode": 1.0, "invert": 3.0, "gpu": 3.5}, None)  # type: ignore[arg-type]
    copied = BlockResult("b", (object(),), (), {"copy": 9.0}, None)  # type: ignore[arg-type]
    took = measured([made, copied], 2.0)
    assert took == {"clips": 2, "seconds": {"decode": 1.0, "invert": 3.0, "gpu": 3.5}, "commit": 2.0}


def test_the_command_tells_it(scene: Film, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    films, place = tmp_path / "films", tmp_path / "lake"
    recipe = dataclasses.replace(RECIPE, captions_required=False)
    scene(films / "a.mp4", seconds=2)
    words = ["ingest", str(films), "--lake", str(place), "--recipe", "linear", "--plan"]
    for name in ("size=[16,16]", "duration=1", "rate=8", "block_clips=3", "captions_required=false"):
        words += ["--set", name]
    assert main(words) == 0
    assert capsys.readouterr().out.endswith(f"{NOT_MEASURED}\n")
    assert not place.exists()
    make(films, place, recipe)
    scene(films / "b.mp4", seconds=3, rate="25")
    assert main(words) == 0
    assert "cost of 3 clips: no GPU, " in capsys.readouterr().out
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["cost"]["measured_on"] == 2
