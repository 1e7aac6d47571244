"""What a clip shows, and the gates on it: measured before any network, kept out or only flagged, and brought back."""

from __future__ import annotations

import dataclasses
import math
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flows.artifacts import lost_sheet, page
from model.codecs.linear import LinearCodec
from pipeline.ingest import IngestReport, ingest
from pipeline.media.decode import ffmpeg_binary
from pipeline.recipes import DataRecipe, linear
from pipeline.stages.content import frames_id, largest_change, luma_of, measure
from storage.layout import Lake
from storage.verify import verify
from storage.version import load
from tests.bench import thresholds
from tests.pipeline.ingest.in_process import InProcess, NoWork, rows

Film = Callable[..., Path]
RECIPE = dataclasses.replace(linear(), size=(16, 16), duration=1.0, rate=8.0, tolerate=0.9)


def noise(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 8, 8, 3)).astype(np.uint8)


def test_figures_by_hand() -> None:
    black, grey = np.zeros((2, 8, 8, 3), np.uint8), np.full((2, 8, 8, 3), 100, np.uint8)
    found = measure(np.concatenate([black, grey]))
    assert found == {
        "black_frames": 0.5,
        "static_frames": 2 / 3,
        "motion": pytest.approx(100 / 3, abs=1e-4),
        "cuts": 1.0,
    }
    one = measure(grey[:1])
    assert (one["black_frames"], one["cuts"]) == (0.0, 0.0)
    assert math.isnan(one["motion"])
    assert math.isnan(one["static_frames"])
    assert measure(np.repeat(noise(1), 4, axis=0))["static_frames"] == 1.0
    assert frames_id(grey) == frames_id(grey.copy()) != frames_id(black)
    assert frames_id(np.zeros((2, 4, 8, 3), np.uint8)) != frames_id(np.zeros((2, 8, 4, 3), np.uint8))


def test_small_bright_things_are_not_black_and_small_motion_is_not_still() -> None:
    """Figures by hand: nine pixels of 64x64 hardly change the means of a frame, and a hot pixel is nothing to see."""
    frames = np.zeros((4, 64, 64, 3), np.uint8)
    for number, frame in enumerate(frames):
        frame[10:13, 10 + number : 13 + number] = 200
    found = measure(frames)
    assert (found["black_frames"], found["static_frames"]) == (0.0, 0.0)
    assert found["motion"] == pytest.approx(200 * 6 / 4096, rel=1e-5)
    hot = np.full((2, 64, 64, 3), 15, np.uint8)
    hot[:, 5, 5] = 255
    assert measure(hot)["black_frames"] == 1.0
    assert measure(hot + np.uint8(1))["black_frames"] == 0.0
    uneven = np.zeros((2, 9, 20, 3), np.uint8)  # the last part of each row and column is smaller
    uneven[1, 8, 19] = 1
    assert largest_change(luma_of(uneven)).tolist() == pytest.approx([1 / 2])


CHOSEN = (
    "nearly black", "black with a sensor's noise", "faded out after a second", "a small white square crosses black",
    "few stars that twinkle", "a picture in the dark", "a held picture", "two slides", "a picture turns slowly",
    "a small disc glides slowly", "a gradient turns",
)  # fmt: skip


@pytest.mark.parametrize("film", [film for film in thresholds.DRAWN if film.name in CHOSEN], ids=lambda film: film.name)
def test_films_whose_truth_is_known(film: thresholds.Drawn, tmp_path: Path) -> None:
    """The thresholds come from real films; `python -m tests.bench.thresholds` has more of these, and other encoders."""
    found = thresholds.judge(film, thresholds.frames_of(thresholds.draw(film, "x264", tmp_path / "film.mkv")))
    assert film.black is None or found["black_off"] < thresholds.TOLERANCE
    assert film.still is None or found["still_off"] < 0.3, "a film of one kind is never taken for the other"


@pytest.fixture(scope="module")
def shows(scene: Film, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Films of 2 s: moving (in two containers), black, still, and one with cuts after 0.5 s and 1.5 s."""
    folder = tmp_path_factory.mktemp("shows")
    moving = scene(folder / "moving.mp4", rate="8", seconds=2, size="64x48")
    for name, source in (
        ("black", "color=black:size=64x48:rate=8:duration=2"),
        ("still", "color=gray:size=64x48:rate=8:duration=2,drawbox=x=8:y=8:w=20:h=20:color=red:t=fill"),
        (
            "cut",
            "color=red:size=64x48:rate=8:duration=2,format=rgb24,geq=r='255*gte(N,4)*lt(N,12)':g='80+X':b='255*lt(N,4)+128*gte(N,12)'",
        ),
    ):
        command = [
            ffmpeg_binary(),
            "-v",
            "error",
            "-y",
            "-f",
            "lavfi",
            "-i",
            source,
            "-c:v",
            "libx264",
            "-g",
            "1",
            "-qp",
            "20",
        ]
        subprocess.run([*command, str(folder / f"{name}.mp4")], check=True)
    copy = [ffmpeg_binary(), "-v", "error", "-y", "-i", str(moving), "-c", "copy", str(folder / "moving.mkv")]
    subprocess.run(copy, check=True)
    return folder


def films(shows: Path, folder: Path, *names: str) -> Path:
    folder.mkdir()
    for name in names:
        shutil.copy(shows / name, folder / name)
    return folder


def make(source: Path, lake: Path, recipe: DataRecipe = RECIPE, **how: Any) -> IngestReport:
    loose = dataclasses.replace(recipe, captions_required=False)
    report = ingest(source, lake, recipe=loose, runner=how.pop("runner", InProcess()), **how)
    opened = Lake.open(lake)
    assert verify(opened, load(opened)) == []
    return report


def test_gates_on_content_keep_clips_out_before_they_are_encoded(
    shows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, lake = films(shows, tmp_path / "f", "moving.mp4", "black.mp4", "still.mp4", "cut.mp4"), tmp_path / "lake"
    encoded: list[int] = []
    whole = LinearCodec.encode

    def counting(self: LinearCodec, frames: Any, text: Any = None) -> Any:
        encoded.append(len(frames))
        return whole(self, frames, text)

    monkeypatch.setattr(LinearCodec, "encode", counting)
    gates = {"black_frames": 0.5, "static_frames": 0.9, "cuts": 0}
    recipe = dataclasses.replace(RECIPE, gates=gates)
    report = make(source, lake, recipe)
    assert {row["film"] for row in rows(lake)} == {"moving.mp4"}
    assert sum(encoded) == 17, "two clips of eight frames, and the one after the first"
    assert report.clips.filtered == {"below_gate": 6}
    assert report.rejected == {"black_frames": 2, "static_frames": 4, "cuts": 2}, "a black film is still, too"
    picture = lost_sheet(report, recipe)
    assert picture is not None
    assert picture.startswith(b"\x89PNG")
    html = page(report, report.lines(), {"lost": picture, "none": None})
    assert "<td>static_frames</td><td>4</td>" in html
    assert html.count("<img ") == 1
    assert any(
        line.endswith("6 clips are kept out (black_frames 2, static_frames 4, cuts 2)") for line in report.lines()
    )
    kept_out = {row["film"]: row for row in rows(lake, table="rejected")}
    assert kept_out["cut.mp4"]["cuts"] == 1
    assert math.isnan(kept_out["cut.mp4"]["psnr_codec"])
    again = make(source, lake, recipe, runner=NoWork())
    assert (again.published, again.clips.unchanged) == (False, 2)
    moving = rows(lake)[0]
    assert (moving["short_side"], moving["film_seconds"], moving["cuts"]) == (48, pytest.approx(2), 0)
    assert moving["motion"] > 0.1
    opened = make(source, lake, dataclasses.replace(RECIPE, gates={**gates, "cuts": 1}))
    assert {row["film"] for row in rows(lake)} == {"moving.mp4", "cut.mp4"}
    assert (opened.clips.done, opened.clips.unchanged) == (2, 2)


def test_a_gate_may_only_score(shows: Path, tmp_path: Path) -> None:
    source, lake = films(shows, tmp_path / "f", "moving.mp4", "black.mp4", "cut.mp4"), tmp_path / "lake"
    recipe = dataclasses.replace(RECIPE, gates={"black_frames": 0.5, "cuts": 0}, score_only=["cuts"])
    report = make(source, lake, recipe)
    assert {row["film"]: row["flags"] for row in rows(lake)} == {"moving.mp4": "", "cut.mp4": "cuts"}
    assert (report.rejected, report.flagged) == ({"black_frames": 2}, 2)
    closed = make(source, lake, dataclasses.replace(recipe, score_only=[]), runner=NoWork())
    assert (closed.published, closed.clips.unchanged) == (True, 2)


@pytest.mark.parametrize(("gate", "bound"), [("short_side", 49), ("film_seconds", 2.5), ("motion", 200)])
def test_gates_on_the_film_itself(shows: Path, tmp_path: Path, gate: str, bound: float) -> None:
    source, lake = films(shows, tmp_path / "f", "moving.mp4"), tmp_path / "lake"
    report = make_nothing(source, lake, dataclasses.replace(RECIPE, gates={gate: bound}))
    assert report.rejected == {gate: 2}
    assert make(source, lake, dataclasses.replace(RECIPE, gates={gate: 0.1})).clips.done == 2


def make_nothing(source: Path, lake: Path, recipe: DataRecipe) -> IngestReport:
    loose = dataclasses.replace(recipe, captions_required=False)
    report = ingest(source, lake, recipe=loose, runner=InProcess())
    assert report.version is None
    return report


def test_the_same_frames_in_another_file_are_a_duplicate(shows: Path, tmp_path: Path) -> None:
    """The first by name stays; when it has left the dataset, the other one comes back."""
    source, lake = films(shows, tmp_path / "f", "moving.mp4", "moving.mkv", "still.mp4"), tmp_path / "lake"
    recipe = dataclasses.replace(RECIPE, gates={"duplicates": 0})
    report = make(source, lake, recipe)
    assert report.rejected == {"duplicates": 3}, "of the still film's two clips one is as the other"
    first = {row["film"] for row in rows(lake)} - {"still.mp4"}
    assert len(first) == 1
    assert make(source, lake, recipe, runner=NoWork()).published is False
    (source / first.pop()).unlink()
    make(source, lake, recipe, prune=True)
    make(source, lake, recipe)
    assert len({row["film"] for row in rows(lake)}) == 2
    assert make(source, lake, RECIPE).version is not None
    assert sorted(row["duplicates"] for row in rows(lake) if row["film"] == "still.mp4") == [0, 1]


def test_windows_that_begin_anew_at_cuts(shows: Path, tmp_path: Path) -> None:
    source, lake = films(shows, tmp_path / "f", "cut.mp4"), tmp_path / "lake"
    make(source, lake)
    assert sorted((row["clip_start"], row["cuts"]) for row in rows(lake)) == [(0, 1), (1, 1)]
    split = dataclasses.replace(RECIPE, split_at_cuts=True)
    make(source, lake, split)
    assert [(row["clip_start"], row["cuts"]) for row in rows(lake)] == [(0.5, 0)]
    assert make(source, lake, split, runner=NoWork()).published is False
    assert split.data_fields()["split_at_cuts"] is True
    assert "split_at_cuts" not in RECIPE.data_fields()
