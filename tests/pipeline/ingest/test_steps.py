"""Plan, blocks and commit: what is new is made, what is known is left alone, what is good is kept.

Blocks are made in this process here, by the real worker on real films; tests/e2e and test_runner have the real Ray.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pipeline.ingest.plan
import pipeline.sources.folders
from pipeline.ingest import commit, embed_captions, plan_ingest, run_blocks
from pipeline.ingest.report import Account, AccountError
from pipeline.sources.folders import discover
from storage.arrays import read_clips
from storage.layout import Lake
from storage.shards import ShardReader
from storage.version import load
from tests.pipeline.ingest.in_process import RECIPE, InProcess, NoWork, make, rows, sound

Film = Callable[..., Path]


def test_a_dataset(films: Path, tmp_path: Path) -> None:
    heard: list[str] = []
    progress: list[tuple[str, int, int]] = []
    report = make(films, tmp_path / "lake", say=heard.append, on_progress=lambda *news: progress.append(news))
    assert (report.version, report.published, report.exit_status) == (1, True, 0)
    assert report.films.line() == "films: 3 discovered = 3 done + 0 unchanged + 0 filtered + 0 failed"
    assert report.clips.line() == "clips: 9 discovered = 9 done + 0 unchanged + 0 filtered + 0 failed"
    assert heard == [f"captions: {films / 'captions.csv'}", "3 films: 9 new clips in 3 blocks, 0 clips unchanged"]
    assert progress[-1] == ("clips", 9, 9)
    sound(tmp_path / "lake")
    lake = Lake.open(tmp_path / "lake")
    version = load(lake)
    assert [shard.clips for shard in version.shards] == [3, 3, 3]
    assert version.clip == {
        **{"duration": 1.0, "rate": 8.0, "frames_max": 8, "frames_observed_max": 5, "order": 10, "method": "auto"},
        **{"latent_shape": [12, 4, 4], "frame_shape": [16, 16, 3], "next_frame": True},
    }
    table = rows(tmp_path / "lake")
    assert sorted((row["film"], row["clip_start"]) for row in table) == [
        *[("a.mp4", start) for start in (0.0, 1.0, 2.0, 3.0)],
        *[("b.mkv", start) for start in (0.0, 1.0)],
        *[("c.webm", start) for start in (0.0, 1.0, 2.0)],
    ]
    assert all(row["preview"] for row in table)
    for row in table:
        sample = ShardReader(lake, row["shard"])[row["shard_row"]]
        assert sample["__key__"] == row["clip_id"] == sample["clip.json"]["clip_id"]
        assert sample["clip.json"]["caption"] == row["caption"]
        assert sample["frame_time.npy"].shape == (row["frames"],)
        assert sample["latents.npy"].shape == (row["frames"], 12, 4, 4)
        assert sample["preview.npy"].shape == (row["frames"], 16, 16, 3)
        assert sample["text.npy"].ndim == 2
        stored = read_clips(lake, version.snapshot, version.group, [row["array_row"]], ["latents", "clip_start"])
        np.testing.assert_array_equal(stored["latents"][0, : row["frames"]], sample["latents.npy"])
        assert stored["clip_start"][0] == row["clip_start"]
    same_caption = {row["text_row"] for row in table if row["caption"] == "a picture"}
    assert len(same_caption) == 1
    assert 0 not in {row["text_row"] for row in table}
    facts = {
        row["film"]: (row["clips"], row["width"], row["height"], row["codec"]) for row in rows(lake.root, table="films")
    }
    assert facts == {"a.mp4": (4, 96, 64, "h264"), "b.mkv": (2, 96, 64, "h264"), "c.webm": (3, 96, 64, "vp8")}
    assert not list(lake.staging.iterdir())


def test_clips_and_failures_are_logged_with_their_ids(
    films: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (films / "notes.mp4").write_text("no film at all")
    with (films / "captions.csv").open("a") as table:
        table.write("notes.mp4,some notes\n")
    with caplog.at_level(logging.INFO, "pipeline.ingest.steps"):
        make(films, tmp_path / "lake", runner=InProcess(die=[2.0]))
    told = [vars(record) for record in caplog.records if record.name == "pipeline.ingest.steps"]
    assert len({each["run"] for each in told}) == 1
    made = {row["clip_id"]: row["film"] for row in rows(tmp_path / "lake")}
    assert {each["clip"]: each["film"] for each in told if each["msg"] == "done"} == made
    failed = [(each["film"], each["clip"] != "", each["reason"]) for each in told if each["msg"] != "done"]
    assert sorted(failed) == [
        ("a.mp4", True, "worker_died"), ("c.webm", True, "worker_died"), ("notes.mp4", False, "not_a_video"),
    ]  # fmt: skip


def test_nothing_new_touches_nothing(films: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (films / "bad.mp4").write_bytes(b"")
    (films / "bad.txt").write_text("nothing")
    make(films, tmp_path / "lake")

    def refuse(*values: object) -> None:
        raise AssertionError(f"opened {values}")

    monkeypatch.setattr(pipeline.ingest.plan, "probe", refuse)
    monkeypatch.setattr(pipeline.ingest.plan, "digest_of", refuse)
    before = sorted(path for path in (tmp_path / "lake").rglob("*") if "failures" not in path.parts)
    report = make(films, tmp_path / "lake", runner=NoWork())
    assert (report.version, report.published, report.exit_status) == (1, False, 0)
    assert report.clips.line() == "clips: 9 discovered = 0 done + 9 unchanged + 0 filtered + 0 failed"
    assert report.films.failed == {"empty_file": 1}, "a fault of the film is remembered too"
    assert report.lines()[-1] == f"nothing new: version 1 of {tmp_path / 'lake'} is up to date"
    assert sorted(path for path in (tmp_path / "lake").rglob("*") if "failures" not in path.parts) == before


def test_only_what_changed_is_made_again(films: Path, scene: Film, tmp_path: Path) -> None:
    lake = tmp_path / "lake"
    make(films, lake)
    first = {row["clip_id"]: row for row in rows(lake)}
    original = (films / "b.mkv").read_bytes()
    scene(films / "b.mkv", rate="12", seconds=3)
    scene(films / "new.mp4", rate="9", seconds=1).with_suffix(".txt").write_text("x")
    (films / "captions.csv").write_text((films / "captions.csv").read_text() + "new.mp4,a new one\n")
    runner = InProcess()
    report = make(films, lake, runner=runner)
    assert report.clips.line() == "clips: 11 discovered = 4 done + 7 unchanged + 0 filtered + 0 failed"
    assert report.superseded == 2
    second = {row["clip_id"]: row for row in rows(lake)}
    assert len(second) == 11
    assert {row["clip_id"] for row in first.values() if row["film"] != "b.mkv"} < set(second)
    assert not [clip for clip, row in first.items() if row["film"] == "b.mkv" and clip in second]
    names = [[shard.name for shard in load(Lake.open(lake), number).shards] for number in (1, 2)]
    assert set(names[0]) & set(names[1]), "whole shards go on as they are"
    sound(lake)
    # The film comes back as it was: its clips are copied from the first version, not made again.
    (films / "b.mkv").write_bytes(original)
    report = make(films, lake, runner=NoWork())
    assert (report.version, report.clips.done, report.superseded) == (3, 2, 3)
    third = {row["clip_id"]: row for row in rows(lake)}
    assert set(first) < set(third)
    assert all(third[clip]["array_row"] == row["array_row"] for clip, row in first.items())
    sound(lake)


def test_a_new_caption_is_a_new_clip(films: Path, tmp_path: Path) -> None:
    make(films, tmp_path / "lake")
    (films / "captions.csv").write_text("file,caption\na.mp4,said otherwise\nb.mkv,another picture\nc.webm,a picture\n")
    report = make(films, tmp_path / "lake")
    assert (report.clips.done, report.clips.unchanged, report.superseded) == (4, 5, 4)
    assert {row["caption"] for row in rows(tmp_path / "lake") if row["film"] == "a.mp4"} == {"said otherwise"}
    sound(tmp_path / "lake")


def test_films_of_other_sources_stay(films: Path, scene: Film, tmp_path: Path) -> None:
    make(films, tmp_path / "lake")
    scene(tmp_path / "more" / "d.mp4", seconds=1).with_suffix(".txt").write_text("more")
    report = make(tmp_path / "more", tmp_path / "lake")
    assert report.films.discovered == 1
    assert {row["film"] for row in rows(tmp_path / "lake")} == {"a.mp4", "b.mkv", "c.webm", "d.mp4"}
    assert len(rows(tmp_path / "lake", table="films")) == 4
    # A broken copy of a film does not take the good one's clips away.
    (films / "a.mp4").write_bytes((films / "a.mp4").read_bytes()[:4000])
    (films / "captions.csv").write_text((films / "captions.csv").read_text() + "e.mp4,e\n")
    scene(films / "e.mp4", seconds=1, rate="8")
    report = make(films, tmp_path / "lake")
    assert report.films.failed == {"truncated": 1}
    assert len([row for row in rows(tmp_path / "lake") if row["film"] == "a.mp4"]) == 4
    sound(tmp_path / "lake")


def test_nothing_good_is_nothing_published(films: Path, tmp_path: Path) -> None:
    broken = dataclasses.replace(RECIPE, codec={**RECIPE.codec, "scale": 1e8})
    report = make(films, tmp_path / "lake", broken)
    assert (report.version, report.exit_status) == (None, 1)
    assert report.clips.failed == {"not_finite": 9}
    assert report.films.failed == {"not_finite": 3}
    assert report.lines()[-1].startswith("nothing was published")
    assert not list(Lake.open(tmp_path / "lake").versions.iterdir())


def test_filtered_films_and_clips(films: Path, scene: Film, tmp_path: Path) -> None:
    scene(films / "short.mp4", seconds=0.9)
    scene(films / "slow.mp4", rate="3", seconds=3)
    os.link(films / "a.mp4", films / "copy of a.mp4")
    extra = "short.mp4,s\nslow.mp4,t\ncopy of a.mp4,a picture\n"
    (films / "captions.csv").write_text((films / "captions.csv").read_text() + extra)
    report = make(films, tmp_path / "lake")
    assert report.films.filtered == {"duplicate": 1, "shorter_than_window": 1, "too_few_frames": 1}
    assert report.clips.filtered == {"too_few_frames": 3}
    assert report.exit_status == 0, "what is filtered by rule is no failure"
    assert {failure.reason for failure in report.failures} == {"duplicate", "shorter_than_window", "too_few_frames"}
    assert make(films, tmp_path / "lake", runner=NoWork()).films.filtered == report.films.filtered


def test_another_recipe_starts_anew_and_says_so(films: Path, tmp_path: Path) -> None:
    make(films, tmp_path / "lake")
    heard: list[str] = []
    report = make(films, tmp_path / "lake", dataclasses.replace(RECIPE, observe="all"), say=heard.append)
    assert report.clips.done == 9
    assert "the recipe differs from version 1's: its clips are not carried on, all are new" in heard
    sound(tmp_path / "lake")
    # Back to the first recipe: its clips are all there, and are the newest version again.
    report = make(films, tmp_path / "lake", runner=NoWork())
    assert (report.version, report.published, report.clips.unchanged) == (3, True, 9)
    assert load(Lake.open(tmp_path / "lake")).shards == load(Lake.open(tmp_path / "lake"), 1).shards
    sound(tmp_path / "lake")


def test_limit_and_parts_of_films(films: Path, tmp_path: Path) -> None:
    report = make(films, tmp_path / "lake", limit=1)
    assert (report.films.discovered, report.clips.done) == (1, 4)
    table = films / "parts.csv"
    table.write_text("file,caption,start,end\na.mp4,early,0,1\na.mp4,late,1.5,3.9\n")
    make(table, tmp_path / "parts")
    found = {(row["caption"], row["clip_start"]) for row in rows(tmp_path / "parts")}
    assert found == {("early", 0.0), ("late", 1.5), ("late", 2.5)}
    assert make(table, tmp_path / "parts", runner=NoWork()).clips.unchanged == 3


def test_the_stages_by_hand(films: Path, tmp_path: Path) -> None:
    plan = plan_ingest(Lake.create(tmp_path / "lake"), discover(films), RECIPE, now=0.0)
    assert plan.created == "1970-01-01T00:00:00Z"
    texts = embed_captions(plan)
    results = [result for block in plan.blocks for result in run_blocks(plan, [block], InProcess())]
    report = commit(plan, texts, results)
    assert report.version == 1
    assert set(report.to_json()["seconds"]) == {
        "plan",
        "embed",
        "content",
        "decode",
        "stored",
        "invert",
        "project",
        "commit",
    }


def test_the_sources_are_looked_at_once(films: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[object] = []
    real = pipeline.sources.folders._scan

    def watched(folder: Any, found: Any) -> Any:
        looked.append(folder.path)
        return real(folder, found)

    monkeypatch.setattr(pipeline.sources.folders, "_scan", watched)
    make(films, tmp_path / "lake")
    assert looked == [films]
    found = discover(films)
    assert make(films, tmp_path / "lake", runner=NoWork(), found=found).clips.unchanged == 9
    assert looked == [films] * 2


def test_accounts_add_up_or_stop() -> None:
    account = Account.of("clips", 4, [("done", ""), ("done", ""), ("failed", "corrupt"), ("filtered", "duplicate")])
    assert (
        account.line() == "clips: 4 discovered = 2 done + 0 unchanged + 1 filtered (duplicate 1) + 1 failed (corrupt 1)"
    )
    with pytest.raises(AccountError, match="these are 4, not 5"):
        Account.of("clips", 5, [("done", "")] * 4)
