"""Damage in older versions is named and stops no refresh; what killed runs left is gone after the next one."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from flows.cli import main
from model.codecs.base import Encoded
from model.codecs.linear import LinearCodec
from pipeline.ingest import IngestReport, ingest
from storage.arrays import read_clips
from storage.layout import Lake
from storage.repair import repair
from storage.staging import staged_blocks
from storage.verify import verify, verify_all
from storage.version import load
from tests.pipeline.ingest.in_process import InProcess, rows
from tests.pipeline.ingest.test_identity import RECIPE, library, put

__all__ = ["library"]


@pytest.fixture
def films(library: Path, tmp_path: Path) -> Path:
    put(library, "red", tmp_path / "films" / "a.mp4")
    return tmp_path / "films"


@pytest.fixture
def lake(library: Path, films: Path, tmp_path: Path) -> Path:
    """Three versions: a film, another one, and without the first."""
    make(films, tmp_path / "lake")
    put(library, "green", films / "b.mp4")
    make(films, tmp_path / "lake")
    (films / "a.mp4").rename(films.parent / "a.mp4")
    make(films, tmp_path / "lake", prune=True)
    return tmp_path / "lake"


def make(films: Path, lake: Path, runner: InProcess | None = None, **how: object) -> IngestReport:
    return ingest(films, lake, recipe=RECIPE, runner=runner or InProcess(), **how)


def flip(path: Path, place: int = 60) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def snapshot_of(lake: Path, number: int) -> Path:
    return lake / "arrays" / "snapshots" / load(Lake.open(lake), number).snapshot


DAMAGE: dict[str, tuple[Callable[[Path], object], str, bool]] = {
    "version file": (lambda lake: flip(lake / "versions" / "1.json"), "1.json is damaged", True),
    "torn version file": (lambda lake: os.truncate(lake / "versions" / "2.json", 100), "2.json is damaged", True),
    "table": (lambda lake: flip(lake / "manifests" / "2-clips.parquet"), "2-clips.parquet: wrong checksum", False),
    "missing snapshot": (lambda lake: snapshot_of(lake, 1).unlink(), "arrays", False),
    "damaged snapshot": (lambda lake: snapshot_of(lake, 1).write_bytes(b"damage"), "arrays", False),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_of_an_older_version_is_one_problem_and_stops_no_refresh(
    library: Path, films: Path, lake: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    damage, message, told = DAMAGE[kind]
    assert set(map(len, verify_all(Lake.open(lake)).values())) == {0}
    assert main(["verify", "--lake", str(lake), "--all"]) == 0
    damage(lake)
    put(library, "blue", films / "c.mp4")
    (films.parent / "a.mp4").rename(films / "a.mp4")
    report = make(films, lake)
    assert (report.version, report.clips.unchanged) == (4, 2)
    assert {row["film"] for row in rows(lake)} == {"a.mp4", "b.mp4", "c.mp4"}
    opened = Lake.open(lake)
    assert verify(opened, load(opened)) == []
    found = verify_all(opened)
    wrong = [problem for problems in found.values() for problem in problems]
    assert len(wrong) == 1
    assert message in wrong[0]
    assert ";" in wrong[0], "the remedy"
    assert told == any("an older version is damaged, which stops nothing" in line for line in report.lines())
    capsys.readouterr()
    assert main(["verify", "--lake", str(lake), "--all"]) == 1
    assert "version 4 of" in capsys.readouterr().out


def test_a_clip_of_a_damaged_older_shard_is_made_again(films: Path, lake: Path) -> None:
    shard = lake / "shards" / load(Lake.open(lake), 1).shards[0].name
    flip(shard, 800)
    (films.parent / "a.mp4").rename(films / "a.mp4")
    runner = InProcess()
    report = make(films, lake, runner)
    assert (runner.clips, report.clips.done) == (1, 2), "one of its two clips is damaged, the other is copied"
    opened = Lake.open(lake)
    assert verify(opened, load(opened)) == []


def test_a_damaged_older_shard_that_another_machine_makes_again(
    films: Path, lake: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = lake / "shards" / load(Lake.open(lake), 1).shards[0].name
    flip(shard, 800)
    (films.parent / "a.mp4").rename(films / "a.mp4")
    whole = LinearCodec.encode

    def otherwise(self: LinearCodec, *how: object) -> Encoded:
        found = whole(self, *how)
        return dataclasses.replace(found, latents=found.latents * 1.001)

    monkeypatch.setattr(LinearCodec, "encode", otherwise)
    make(films, lake)
    opened = Lake.open(lake)
    assert verify(opened, load(opened)) == []
    assert any(shard.name in problem for problem in verify(opened, load(opened, 1)))
    # The clip is in the arrays twice, with other last bits: each version gets its own back.
    for damage in (lambda: None, lambda: snapshot_of(lake, 3).unlink()):
        damage()
        with opened.writing():
            assert repair(opened).problems == []
        assert set(map(len, verify_all(opened).values())) == {0}


def test_latents_that_a_repair_could_not_bring_back_are_made_again(films: Path, tmp_path: Path) -> None:
    lake = tmp_path / "lake"
    spare = dataclasses.replace(RECIPE, store_latents=False)
    ingest(films, lake, recipe=spare, runner=InProcess())
    shutil.rmtree(lake / "arrays")
    opened = Lake.open(lake)
    with opened.writing():
        assert all("its latents are lost" in line for line in repair(opened).problems)
    for recipe, caption in ((dataclasses.replace(spare, order=6), "a walk"), (spare, "a run")):
        (films / "a.txt").write_text(caption)
        runner = InProcess()
        report = ingest(films, lake, recipe=recipe, runner=runner)
        assert (report.exit_status, report.clips.done, runner.clips) == (0, 2, 2)
        version = load(opened)
        stored = read_clips(opened, version.snapshot, version.group, names=["latents"])["latents"]
        assert np.isfinite(stored[[row["array_row"] for row in rows(lake)]]).all()
    assert verify(opened, load(opened)) == []


def test_temporary_files_of_a_killed_run_are_removed_by_the_next(films: Path, lake: Path) -> None:
    left = [
        lake / "shards" / ".0123.tar.0123456789ab.tmp",
        lake / "staging" / ".x.npz.0123456789ab.tmp",
        lake / "versions" / ".4.json.0123456789ab.tmp",
        lake / "arrays" / "chunks" / "QQQQ#1",
    ]
    for path in left:
        path.write_bytes(b"left")
    make(films, lake)
    assert [path for path in left if path.exists()] == []
    opened = Lake.open(lake)
    assert verify(opened, load(opened)) == []


def test_staged_blocks_of_films_that_were_deleted_since_are_removed(library: Path, films: Path, lake: Path) -> None:
    """Of new films, which no version knows, whatever the next run's recipe, if it reads their source."""
    for name in ("long", "blue"):
        put(library, name, films / f"{name}.mp4")
    recipe = dataclasses.replace(RECIPE, block_clips=2)
    with pytest.raises(KeyboardInterrupt):
        ingest(films, lake, recipe=recipe, runner=InProcess(KeyboardInterrupt(), after=3))
    opened = Lake.open(lake)
    assert len(staged_blocks(opened)) == 3
    for name in ("long", "blue"):
        for path in films.glob(f"{name}.*"):
            path.unlink()
    put(library, "green", films.parent / "other" / "e.mp4")
    ingest(films.parent / "other", lake, recipe=recipe, runner=InProcess())
    assert len(staged_blocks(opened)) == 3
    ingest(films, lake, recipe=dataclasses.replace(recipe, order=6), runner=InProcess())
    assert staged_blocks(opened) == []


def test_staged_blocks_that_no_run_could_take_are_removed(library: Path, films: Path, lake: Path) -> None:
    """A run is killed after three blocks; then its films change, and another source is ingested meanwhile."""
    put(library, "long", films / "c.mp4")
    put(library, "blue", films / "d.mp4")
    recipe = dataclasses.replace(RECIPE, block_clips=2)
    with pytest.raises(KeyboardInterrupt):
        ingest(films, lake, recipe=recipe, runner=InProcess(KeyboardInterrupt(), after=3))
    opened = Lake.open(lake)
    assert len(staged_blocks(opened)) == 3
    (lake / "staging" / "0123-4567.npz").write_bytes(b"a part")
    (lake / "staging" / "89ab.npz").write_bytes(b"damaged")
    other = films.parent / "other"
    put(library, "red", other / "e.mp4")
    ingest(other, lake, recipe=recipe, runner=InProcess())
    assert len(staged_blocks(opened)) == 3, "another source's run keeps them, but for what is of no use to anybody"
    put(library, "red", films / "c.mp4", "another film")
    put(library, "red", films / "d.mp4", "and another")
    ingest(films, lake, recipe=recipe, runner=InProcess())
    assert staged_blocks(opened) == []
