"""Gates: clips outside the recipe's bounds stay out, are not made twice, and come back when a gate opens."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.gates import decide, flags, rejection
from pipeline.ingest import IngestReport, ingest
from pipeline.items import Rejected
from pipeline.recipes import DataRecipe, linear
from storage.failures import read_failures
from storage.layout import Lake
from storage.verify import verify
from storage.version import load, read_manifest
from tests.pipeline.ingest.in_process import RECIPE, InProcess, NoWork

Film = Callable[..., Path]


def test_a_gate_is_the_least_where_more_is_better_and_else_the_most() -> None:
    row = {"clip_id": "1", "film": "a.mp4", "clip_start": 2.0, "psnr_codec": 20.0, "end_ratio": 3.0}
    clip = Rejected.from_row({**row, "residual": math.nan, "ssim_codec": None})
    measured = clip.certificate
    assert flags(measured, {}) == []
    assert flags(measured, {"psnr_codec": 20.0, "end_ratio": 3.0}) == [], "the bound itself is good"
    assert flags(measured, {"psnr_codec": 20.1, "end_ratio": 2.9}) == ["psnr_codec", "end_ratio"]
    assert flags(measured, {"residual": 0.0, "ssim_codec": 1.0, "smoothness": 0.0}) == [], "not measured"
    assert flags(measured, {"psnr_codec": None}) == []
    failure = rejection(clip, {"psnr_codec": 25.0, "end_ratio": 2})
    assert (failure.film, failure.clip_id, failure.clip_start) == ("a.mp4", "1", 2.0)
    assert (failure.stage, failure.status, failure.reason) == ("gate", "filtered", "below_gate")
    assert failure.detail == (
        "psnr_codec 20 dB, the least is 25; end_ratio 3, the most is 2; use another codec or film, set "
        "gates.psnr_codec, gates.end_ratio otherwise, or keep it with below_gate=flag"
    )


def test_what_gates_make_of_a_version() -> None:
    clips = [{"clip_id": str(k), "film": f"{k}.mp4", "clip_start": 0.0, "psnr_codec": k, "flags": ""} for k in range(4)]
    found = decide(clips[2:], clips[:2], {"psnr_codec": 3}, "reject")
    assert (found.leaving, set(found.rejected), found.regained) == ({"2"}, {"0", "1", "2"}, set())
    found = decide(clips[2:], clips[:2], {"psnr_codec": 1}, "reject")
    assert (found.leaving, set(found.rejected), found.regained, found.changes) == (set(), {"0"}, {"1.mp4"}, False)
    found = decide(clips[2:], clips[:2], {"psnr_codec": 3}, "flag")
    assert (found.leaving, set(found.rejected), found.regained) == (set(), set(), {"0.mp4", "1.mp4"})
    assert found.changes, "clip 2 is to be flagged"


@pytest.fixture
def films(scene: Film, tmp_path: Path) -> Path:
    folder = tmp_path / "films"
    scene(folder / "plain.mp4", "-vf", "drawbox=c=gray:t=fill", "-c:v", "libx264", seconds=2)
    scene(folder / "busy.mp4", seconds=3)
    for name in ("plain", "busy"):
        (folder / f"{name}.txt").write_text(f"a {name} film")
    return folder


def gated(**gates: float) -> DataRecipe:
    return dataclasses.replace(RECIPE, gates=gates)


def table(lake: Path, name: str = "clips") -> list[dict[str, Any]]:
    opened = Lake.open(lake)
    return list(read_manifest(opened, load(opened), name).to_pylist())


def made(films: Path, lake: Path, recipe: DataRecipe, clips: int) -> IngestReport:
    """An ingest that makes this many clips, no more and no fewer; every version is whole after it."""
    counted: list[int] = []

    class Counting(InProcess):
        def run(self, worker: Any, tasks: Any, *rest: Any) -> None:
            counted.append(sum(len(items) for _, items in tasks))
            super().run(worker, tasks, *rest)

    report = ingest(films, lake, recipe=recipe, runner=Counting())
    assert sum(counted) == clips
    opened = Lake.open(lake)
    for path in sorted(opened.versions.glob("*.json")):
        assert verify(opened, load(opened, int(path.stem))) == []
    return report


def test_rejected_clips_stay_out_and_come_back(films: Path, tmp_path: Path) -> None:
    """The gate moves; each clip is made once, or twice where it was in no version."""
    lake = tmp_path / "lake"
    report = made(films, lake, gated(psnr_codec=60.0), clips=5)
    assert {row["film"] for row in table(lake)} == {"plain.mp4"}
    assert report.clips.line() == "clips: 5 discovered = 2 done + 0 unchanged + 3 filtered (below_gate 3) + 0 failed", (
        report.lines()
    )
    assert report.films.line() == "films: 2 discovered = 1 done + 0 unchanged + 1 filtered (below_gate 1) + 0 failed"
    assert report.exit_status == 0
    kept_out = [row for row in read_failures(Lake.open(lake), report.run_id) if row["reason"] == "below_gate"]
    assert [(row["film"], row["stage"], row["status"]) for row in kept_out] == [("busy.mp4", "gate", "filtered")] * 3
    assert "the least is 60; use another codec or film, set gates.psnr_codec" in kept_out[0]["detail"]
    assert [row["film"] for row in table(lake, "rejected")] == ["busy.mp4"] * 3
    assert all(row["psnr_codec"] < 60 for row in table(lake, "rejected"))

    told = next(line for line in report.lines() if line.startswith("certificate, median (worst clip): psnr_codec "))
    assert " dB, ssim_codec " in told
    assert "residual" not in told, "the linear codec has none"
    assert "gates: psnr_codec at least 60: 3 clips are kept out (psnr_codec 3)" in report.lines()
    assert report.to_json()["certificate"]["psnr_codec"]["clips"] == 2

    again = ingest(films, lake, recipe=gated(psnr_codec=60.0), runner=NoWork())
    assert (again.version, again.published, again.clips.unchanged) == (1, False, 2)

    opened = made(films, lake, gated(psnr_codec=1.0), clips=3)
    assert (opened.version, opened.clips.done, opened.clips.unchanged) == (2, 3, 2)
    assert table(lake, "rejected") == []
    assert all(row["flags"] == "" for row in table(lake))

    closed = made(films, lake, gated(psnr_codec=60.0), clips=0)
    assert (closed.version, closed.clips.unchanged, closed.clips.filtered) == (3, 2, {"below_gate": 3})
    assert closed.films.filtered == {"below_gate": 1}
    assert {row["film"] for row in table(lake)} == {"plain.mp4"}

    back = made(films, lake, RECIPE, clips=0)
    assert (back.version, back.clips.done, back.clips.unchanged) == (4, 3, 2)
    assert len(table(lake)) == 5


def test_some_clips_of_a_film(films: Path, tmp_path: Path) -> None:
    """A film keeps its good clips; a touched film is read again, and what was rejected is not made again."""
    lake = tmp_path / "lake"
    made(films, lake, RECIPE, clips=5)
    worst, second = sorted(row["psnr_codec"] for row in table(lake))[:2]
    between = (worst + second) / 2  # figures that are made again differ by rounding
    assert second - worst > 1e-3
    fresh = tmp_path / "fresh"
    report = made(films, fresh, gated(psnr_codec=between), clips=5)
    assert (report.clips.done, report.clips.filtered) == (4, {"below_gate": 1})
    assert report.films.done == 2
    assert sorted(shard.clips for shard in load(Lake.open(fresh)).shards) == [2, 2]
    (films / "busy.mp4").touch()
    touched = made(films, fresh, gated(psnr_codec=between), clips=0)
    assert (touched.clips.unchanged, touched.clips.filtered) == (4, {"below_gate": 1})


def test_flagged_clips_are_kept(films: Path, tmp_path: Path) -> None:
    lake = tmp_path / "lake"
    scored = dataclasses.replace(gated(psnr_codec=60.0), below_gate="flag")
    report = made(films, lake, scored, clips=5)
    assert report.clips.done == 5
    assert "gates: psnr_codec at least 60: 3 clips of this version are flagged" in report.lines()
    assert {(row["film"], row["flags"]) for row in table(lake)} == {("plain.mp4", ""), ("busy.mp4", "psnr_codec")}
    assert made(films, lake, scored, clips=0).version == 1
    other = dataclasses.replace(gated(end_ratio=1e-9), below_gate="flag")
    assert made(films, lake, other, clips=0).version == 2
    assert all(row["flags"] == "end_ratio" for row in table(lake) if row["film"] == "busy.mp4")


def test_staged_blocks_meet_the_gates_of_the_run_that_publishes(films: Path, tmp_path: Path) -> None:
    lake = tmp_path / "lake"
    with pytest.raises(KeyboardInterrupt):
        ingest(films, lake, recipe=gated(psnr_codec=1.0), runner=InProcess(KeyboardInterrupt(), after=1))
    assert len(list((lake / "staging").glob("*.npz"))) == 1
    report = made(films, lake, gated(psnr_codec=60.0), clips=2)
    assert (report.clips.done, report.clips.filtered) == (2, {"below_gate": 3})


def test_a_gate_holds_for_the_whole_dataset(films: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Clips of films that are not in this run leave too, are listed, and are shown; they wait for their film."""
    from flows.cli import main

    lake = tmp_path / "lake"
    made(films, lake, RECIPE, clips=5)
    one = tmp_path / "one"
    one.mkdir()
    for name in ("plain.mp4", "plain.txt"):
        os.link(films / name, one / name)
    report = made(one, lake, gated(psnr_codec=60.0), clips=0)
    assert (report.version, report.clips.discovered, report.clips.unchanged) == (2, 2, 2)
    assert [failure.film for failure in report.failures] == ["busy.mp4"] * 3
    assert {row["film"]: (row["status"], row["reason"]) for row in table(lake, "films")} == {
        "busy.mp4": ("filtered", "below_gate"),
        "plain.mp4": ("unchanged", ""),
        "one/plain.mp4": ("unchanged", ""),  # a second path of the same file shares its clips
    }
    assert main(["inspect", table(lake, "rejected")[0]["clip_id"], "--lake", str(lake)]) == 0
    shown = capsys.readouterr().out
    assert "kept out by the recipe's gates" in shown
    assert "psnr_codec" in shown
    assert made(one, lake, RECIPE, clips=0).clips.unchanged == 2
    back = made(films, lake, RECIPE, clips=0)
    assert (back.clips.done, back.clips.unchanged) == (3, 2)


def test_nothing_inside_the_gates_publishes_nothing(films: Path, tmp_path: Path) -> None:
    report = made(films, tmp_path / "lake", gated(psnr_codec=99.0, end_ratio=-1.0), clips=5)
    assert (report.version, report.exit_status) == (None, 1)
    assert report.clips.filtered == {"below_gate": 5}
    lake = tmp_path / "held"
    made(films, lake, RECIPE, clips=5)
    closed = made(films, lake, gated(end_ratio=-1.0), clips=0)
    assert (closed.version, closed.published, closed.exit_status) == (1, False, 1), "a version is never empty"


def test_the_default_gates_nothing() -> None:
    assert (linear().gates, linear().below_gate, linear().certify_frames) == ({}, "reject", 0)
