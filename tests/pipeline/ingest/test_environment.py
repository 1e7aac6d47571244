"""A broken environment is no film's fault: one line, nothing kept, and with a good one the same command does it all."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import model.ffmpeg
import pipeline.ingest.plan
from pipeline.ingest import ingest, plan_ingest
from pipeline.ingest.environment import STOP_FILMS, check_environment, decoder_version
from pipeline.items import Outcome
from pipeline.media.decode import ffmpeg_binary
from pipeline.media.faults import DecodeError
from pipeline.recipes import linear
from pipeline.runner import Runner, RunnerError
from pipeline.sources.folders import discover
from storage.layout import Lake
from storage.staging import read_block, write_block
from storage.verify import verify
from storage.version import list_versions, load, read_manifest
from tests.pipeline.ingest.in_process import InProcess, NoWork

Film = Callable[..., Path]
Use = Callable[[str], None]
RECIPE = dataclasses.replace(linear(), size=(16, 16), duration=1.0, rate=8.0, block_clips=2, tolerate=0.3)

BROKEN = {
    "does not start": 'echo "ffmpeg: error while loading shared libraries: libavdevice.so.59" >&2; exit 127',
    "gives no times": 'case "$*" in *showinfo*) {real} "$@" 2>/dev/null; exit 0;; esac',
    "gives no times of films": 'case "$*" in *films*showinfo*) {real} "$@" 2>/dev/null; exit 0;; esac',
    "has no such filter": 'case "$*" in *films*rawvideo*) echo "No such filter: \'select\'" >&2; exit 1;; esac',
    "fails in workers": 'if [ -e {folder}/broken ] && grep -q "^ray::" /proc/$PPID/cmdline; then exit 1; fi',
}


@pytest.fixture
def use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Use]:
    """Chooses an ffmpeg by name: one of BROKEN, or `good`. Each call of it leaves a line in `calls`."""
    real = ffmpeg_binary()

    def choose(name: str) -> None:
        shim = tmp_path / "bin" / name.replace(" ", "-")
        shim.parent.mkdir(exist_ok=True)
        body = BROKEN.get(name, "").replace("{real}", real).replace("{folder}", str(tmp_path))
        shim.write_text(f'#!/bin/sh\necho "$*" >> {tmp_path}/calls\n{body}\nexec {real} "$@"\n')
        shim.chmod(0o755)
        monkeypatch.setenv("VLFM_FFMPEG", str(shim))
        model.ffmpeg._chosen.cache_clear()

    yield choose
    model.ffmpeg._chosen.cache_clear()


@pytest.fixture
def films(scene: Film, tmp_path: Path) -> Path:
    folder = tmp_path / "films"
    for number, seconds in enumerate((2, 3, 1)):
        scene(folder / f"{number}.mp4", rate="12", seconds=seconds).with_suffix(".txt").write_text(f"film {number}")
    return folder


def copies(scene: Film, folder: Path, count: int) -> Path:
    """Films that differ in their last bytes."""
    first = scene(folder / "0.mp4", rate="12", seconds=1).read_bytes()
    for number in range(count):
        (folder / f"{number}.mp4").write_bytes(first + b"\0\0\0\x0cfree" + f"{number:04d}".encode())
        (folder / f"{number}.txt").write_text("a copy")
    return folder


def nothing_kept(lake: Path) -> None:
    opened = Lake.open(lake)
    assert list_versions(opened) == []
    assert list(opened.staging.iterdir()) == []
    assert list(opened.manifests.iterdir()) == []


def whole(lake: Path, clips: int) -> None:
    opened = Lake.open(lake)
    assert verify(opened, load(opened)) == []
    assert read_manifest(opened, load(opened)).num_rows == clips


@pytest.mark.parametrize("name", ["does not start", "gives no times", "gives no times of films", "has no such filter"])
def test_a_broken_ffmpeg_leaves_no_trace(films: Path, tmp_path: Path, use: Use, name: str) -> None:
    lake = tmp_path / "lake"
    use(name)
    for _ in range(2):
        with pytest.raises((RunnerError, DecodeError)) as caught:
            ingest(films, lake, recipe=RECIPE, runner=InProcess())
        assert "\n" not in str(caught.value)
        assert str(tmp_path / "bin") in str(caught.value), "the likely cause is named"
        nothing_kept(lake)
    use("good")
    assert plan_ingest(Lake.create(lake), discover(films), RECIPE).staged == {}
    report = ingest(films, lake, recipe=RECIPE, runner=InProcess())
    assert (report.exit_status, report.clips.done) == (0, 6)
    whole(lake, 6)


def test_an_ffmpeg_that_is_broken_in_the_workers_only(films: Path, tmp_path: Path, use: Use) -> None:
    lake = tmp_path / "lake"
    use("fails in workers")
    (tmp_path / "broken").touch()
    with Runner() as runner:
        with pytest.raises((RunnerError, DecodeError), match="ffmpeg"):
            ingest(films, lake, recipe=RECIPE, runner=runner)
        nothing_kept(lake)
        (tmp_path / "broken").unlink()
        report = ingest(films, lake, recipe=RECIPE, runner=runner)
    assert (report.exit_status, report.clips.done) == (0, 6)
    whole(lake, 6)


def test_a_thousand_films_do_not_all_run_into_the_same_wall(scene: Film, tmp_path: Path, use: Use) -> None:
    count = STOP_FILMS + 4
    films = copies(scene, tmp_path / "films", count)
    one = dataclasses.replace(RECIPE, block_clips=1)
    words = rf"(all {STOP_FILMS} films that were tried failed for one reason|decoder_failed|no_ffmpeg)"
    use("does not start")
    with pytest.raises((RunnerError, DecodeError), match=words):
        ingest(films, tmp_path / "lake", recipe=one, runner=InProcess())
    assert len((tmp_path / "calls").read_text().splitlines()) <= STOP_FILMS + 3
    use("has no such filter")
    runner = InProcess()
    with pytest.raises((RunnerError, DecodeError), match=words):
        ingest(films, tmp_path / "lake", recipe=one, runner=runner)
    assert len(runner.tasks) <= STOP_FILMS
    nothing_kept(tmp_path / "lake")


def test_what_failed_is_not_kept_from_an_interrupted_run(films: Path, tmp_path: Path) -> None:
    lake = tmp_path / "lake"
    with pytest.raises(KeyboardInterrupt):
        ingest(films, lake, recipe=RECIPE, runner=InProcess(KeyboardInterrupt(), after=2, die=[0.0]))
    plan = plan_ingest(Lake.create(lake), discover(films), RECIPE)
    kept = [clip for block in plan.staged.values() for clip in block.done]
    assert len(kept) + len([clip for clip in plan.clips if clip.clip_id not in kept]) == 6
    assert all(clip.window.start > 0 for clip in plan.clips if clip.clip_id in kept)
    report = ingest(films, lake, recipe=RECIPE, runner=InProcess())
    assert report.clips.line() == "clips: 6 discovered = 6 done + 0 unchanged + 0 filtered + 0 failed"
    whole(lake, 6)


def test_failures_that_older_programs_staged_are_tried_again(films: Path, tmp_path: Path) -> None:
    lake = tmp_path / "lake"
    with pytest.raises(KeyboardInterrupt):
        ingest(films, lake, recipe=RECIPE, runner=InProcess(KeyboardInterrupt(), after=2))
    opened = Lake.open(lake)
    first, second = sorted(path.stem for path in opened.staging.iterdir())
    for block, left in ((first, 1), (second, 0)):
        arrays, meta = read_block(opened, block)
        lost = [
            {"clip_id": row["clip_id"], "film": row["film"], "clip_start": row["clip_start"]}
            | {"stage": "decode", "reason": "corrupt", "detail": "no such filter"}
            for row in meta["clips"][left:]
        ]
        meta |= {"block": [row["clip_id"] for row in meta["clips"]], "failures": lost, "clips": meta["clips"][:left]}
        write_block(opened, block, {name: array[:left] for name, array in arrays.items()} if left else {}, meta)
    plan = plan_ingest(Lake.create(lake), discover(films), RECIPE)
    assert "1 blocks are finished from an interrupted run and are kept" in plan.lines()
    assert len([clip for block in plan.blocks if block.block_id not in plan.staged for clip in block.clips]) == 5
    assert ingest(films, lake, recipe=RECIPE, runner=InProcess()).clips.done == 6
    whole(lake, 6)
    assert list(opened.staging.iterdir()) == []


def test_another_decoder_tries_what_failed_again(films: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lake = tmp_path / "lake"
    bad = films / "0.mp4"
    bad.write_bytes(bad.read_bytes()[:3000])
    ingest(films, lake, recipe=dataclasses.replace(RECIPE, tolerate=1.0), runner=InProcess())
    rows = read_manifest(Lake.open(lake), load(Lake.open(lake)), "films").to_pylist()
    assert {row["decoder"] for row in rows} == {decoder_version()} != {""}
    looked: list[str] = []
    real = pipeline.ingest.plan.probe

    def watched(path: Path, *limits: Any) -> Any:
        looked.append(path.name)
        return real(path, *limits)

    monkeypatch.setattr(pipeline.ingest.plan, "probe", watched)
    ingest(films, lake, recipe=RECIPE, runner=NoWork())
    assert looked == []
    monkeypatch.setattr(pipeline.ingest.plan, "decoder_version", lambda: "99")
    ingest(films, lake, recipe=RECIPE, runner=NoWork())
    assert looked == ["0.mp4"], "good films are left alone"
    monkeypatch.setattr(pipeline.ingest.plan, "decoder_version", lambda: "")
    ingest(films, lake, recipe=RECIPE, runner=NoWork())
    assert looked == ["0.mp4"], "a decoder that does not run changes nothing"


def film(name: str, reason: str, status: str = "failed") -> Outcome:
    return Outcome(name, status, reason, f"its {reason}")


@pytest.mark.parametrize(
    ("outcomes", "tolerated", "blamed"),
    [
        ([film("a", "decoder_failed")], 0, True),
        ([film("a", "decoder_failed")], 5, True),
        ([film("a", "corrupt")], 0, False),
        ([film("a", "corrupt"), film("a", "corrupt")], 0, False),
        ([film("a", "corrupt"), film("b", "corrupt")], 0, True),
        ([film("a", "corrupt"), film("b", "corrupt")], 2, False),
        ([film("a", "corrupt"), film("b", "timeout")], 0, False),
        ([film("a", "worker_died"), film("b", "worker_died"), film("c", "", "done")], 0, False),
        ([film("a", "worker_died"), film("b", "worker_died"), film("c", "", "")], 0, False),
        ([film("a", "worker_died"), film("b", "worker_died"), film("c", "duplicate", "filtered")], 0, True),
        ([film("a", "worker_died"), film("b", "worker_died"), film("c", "no_caption")], 0, True),
        ([film("a", "empty_file"), film("b", "empty_file")], 0, False),
        ([film("a", "no_caption"), film("b", "no_caption")], 0, False),
        ([film("a", "not_finite"), film("b", "not_finite")], 0, False),
        ([], 0, False),
    ],
)
def test_when_the_environment_is_blamed(outcomes: list[Outcome], tolerated: int, blamed: bool) -> None:
    if not blamed:
        check_environment(outcomes, tolerated)
        return
    with pytest.raises(RunnerError, match=rf"failed for one reason, {outcomes[0].reason}: .*; likely cause: .*; then"):
        check_environment(outcomes, tolerated)


def test_films_that_are_hidden_from_everybody(films: Path, tmp_path: Path) -> None:
    """The real files go away between plan and work, as with a folder that the workers do not see."""
    plan = plan_ingest(Lake.create(tmp_path / "lake"), discover(films), RECIPE)
    from pipeline.ingest import commit, embed_captions, run_blocks

    os.rename(films, tmp_path / "elsewhere")
    results = run_blocks(plan, plan.blocks, InProcess())
    with pytest.raises(RunnerError, match="all 3 films that were tried failed for one reason, film_missing"):
        commit(plan, embed_captions(plan), results)
    nothing_kept(tmp_path / "lake")
