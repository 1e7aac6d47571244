"""Runs that end early: what was finished is kept and found again, also where it is damaged or of an older program.

Blocks are made in this process here, by the real worker on real films; tests/e2e and test_runner have the real Ray.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pipeline.ingest import plan_ingest
from pipeline.ingest.pack import PackError
from pipeline.sources.folders import discover
from storage.failures import read_failures
from storage.layout import DiskFull, Lake
from storage.staging import read_block, write_block
from storage.version import load
from tests.pipeline.ingest.in_process import RECIPE, InProcess, make, rows, sound

Film = Callable[..., Path]


@pytest.mark.bit_identical
def test_an_interrupted_run_goes_on(films: Path, tmp_path: Path) -> None:
    make(films, tmp_path / "straight")
    lake = tmp_path / "lake"
    with pytest.raises(KeyboardInterrupt):
        make(films, lake, runner=InProcess(KeyboardInterrupt(), after=2))
    assert len(list(Lake.open(lake).staging.iterdir())) == 2
    heard: list[str] = []
    runner = InProcess()
    report = make(films, lake, runner=runner, say=heard.append)
    assert len(runner.tasks) == 1
    assert "2 blocks are finished from an interrupted run and are kept" in heard
    assert report.clips.done == 9
    straight, resumed = load(Lake.open(tmp_path / "straight")), load(Lake.open(lake))
    assert resumed.shards == straight.shards, "an interruption changes no byte"
    assert resumed.merkle_root == straight.merkle_root
    sound(lake)


def test_an_interrupted_run_goes_on_with_other_films(films: Path, scene: Film, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        make(films, tmp_path / "lake", runner=InProcess(KeyboardInterrupt(), after=2))
    scene(films / "d.mp4", seconds=2, rate="9")
    (films / "captions.csv").write_text((films / "captions.csv").read_text() + "d.mp4,late\n")
    runner = InProcess()
    report = make(films, tmp_path / "lake", runner=runner)
    assert (report.clips.done, len(runner.tasks)) == (11, 2)
    sound(tmp_path / "lake")


def test_a_full_disk_keeps_what_is_done(films: Path, tmp_path: Path) -> None:
    lake = tmp_path / "lake"
    with pytest.raises(DiskFull, match="make room and run the same command again"):
        make(films, lake, runner=InProcess(DiskFull(lake / "staging", 0), after=2))
    runner = InProcess()
    assert make(films, lake, runner=runner).clips.done == 9
    assert len(runner.tasks) == 1


def test_a_clip_that_kills_its_worker_is_named_and_tried_again(films: Path, tmp_path: Path) -> None:
    lake = tmp_path / "lake"
    report = make(films, lake, runner=InProcess(die=[3.0]))
    assert report.clips.failed == {"worker_died": 1}
    assert report.clips.done == 8
    assert (report.exit_status, report.faulty_films) == (3, 1)
    (row,) = read_failures(Lake.open(lake), report.run_id)
    assert (row["film"], row["clip_start"], row["reason"]) == ("a.mp4", 3.0, "worker_died")
    assert {film["film"]: film["reason"] for film in rows(lake, table="films")}["a.mp4"] == "clips_failed"
    sound(lake)
    runner = InProcess()
    report = make(films, lake, runner=runner)
    assert report.clips.line() == "clips: 9 discovered = 1 done + 8 unchanged + 0 filtered + 0 failed"
    assert (report.version, report.exit_status) == (2, 0)
    sound(lake)


def test_planning_reads_no_array_of_a_staged_block(
    films: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lake = tmp_path / "lake"
    with pytest.raises(KeyboardInterrupt):
        make(films, lake, runner=InProcess(KeyboardInterrupt(), after=2))

    def refuse(*values: object, **more: object) -> None:
        raise AssertionError(f"read {values}")

    with monkeypatch.context() as patch:
        patch.setattr(np.lib.format, "read_array", refuse)
        plan = plan_ingest(Lake.open(lake), discover(films), RECIPE)
    assert len(plan.staged) == 2
    assert sorted(clip for block in plan.staged.values() for clip in block.done) == sorted(
        clip.clip_id for block in plan.blocks if block.block_id in plan.staged for clip in block.clips
    )


def test_a_staged_block_that_is_damaged_is_named_and_made_again(films: Path, tmp_path: Path) -> None:
    """Its facts are good, an array is not: the run says so before anything is published, the next one makes it anew."""
    lake = tmp_path / "lake"
    with pytest.raises(KeyboardInterrupt):
        make(films, lake, runner=InProcess(KeyboardInterrupt(), after=2))
    damaged, whole = sorted((lake / "staging").iterdir())
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 255
    damaged.write_bytes(data)
    with pytest.raises(PackError, match=rf"^staged block {damaged.stem} is damaged .* and was removed; run the same"):
        make(films, lake)
    assert not damaged.exists()
    assert whole.exists(), "what is finished is kept"
    assert not list((lake / "versions").iterdir())
    runner = InProcess()
    assert make(films, lake, runner=runner).clips.done == 9
    assert runner.tasks == [damaged.stem]
    sound(lake)


def test_blocks_that_older_programs_staged_are_taken(films: Path, tmp_path: Path) -> None:
    """Their rows lack figures, and have others that this program does not know."""
    lake = tmp_path / "lake"
    with pytest.raises(KeyboardInterrupt):
        make(films, lake, runner=InProcess(KeyboardInterrupt(), after=2))
    opened = Lake.open(lake)
    for path in opened.staging.iterdir():
        arrays, meta = read_block(opened, path.stem)
        for row in meta["clips"]:
            del row["ssim_vae"], row["frames_certified"]
            row["sharpness"] = 3.0
        write_block(opened, path.stem, arrays, {**meta, "failures": [{"clip_id": "gone"}]})
    runner = InProcess()
    report = make(films, lake, runner=runner)
    assert (report.clips.done, len(runner.tasks)) == (9, 1)
    table = rows(lake)
    assert sorted(row["frames_certified"] for row in table)[:6] == [0] * 6
    assert sum(np.isnan(row["ssim_vae"]) for row in table) == 6
    sound(lake)
