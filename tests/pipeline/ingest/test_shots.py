"""Clips that are whole shots or caption spans: found, of their own lengths, and counted."""

from __future__ import annotations

import dataclasses
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model.methods.registry import method_named
from model.training.data import Clips, Collate
from pipeline.ingest.cut import find_cuts
from pipeline.media.decode import ffmpeg_binary, probe
from pipeline.recipes import DataRecipe, linear, recipe_named
from storage.fingerprint import fingerprint
from storage.layout import Lake
from storage.version import load, read_empty_text
from tests.pipeline.ingest.in_process import RECIPE, make, rows, sound

Film = Callable[..., Path]
SHOTS = dataclasses.replace(RECIPE, observe="all", order=8, shots={"min_frames": 4, "max_frames": 16})
LENGTHS = (6, 12, 9)


def cut_film(path: Path, lengths: tuple[int, ...] = LENGTHS) -> Path:
    """A film at 8 frames per second of shots of these lengths, each of another colour, in which a bar moves."""
    shots = []
    for number, (length, colour) in enumerate(
        zip(lengths, ((200, 40, 40), (40, 60, 200), (60, 190, 60)), strict=False)
    ):
        frames = np.empty((length, 32, 32, 3), dtype=np.uint8)
        frames[:] = colour
        for k in range(length):
            frames[k, :, (2 * k + number) % 28 : (2 * k + number) % 28 + 3] = 240
        shots.append(frames)
    path.parent.mkdir(parents=True, exist_ok=True)
    command = [ffmpeg_binary(), "-v", "error", "-y", "-f", "rawvideo", "-pix_fmt", "rgb24", "-s", "32x32", "-r", "8"]
    command += ["-i", "pipe:", "-c:v", "libx264", "-qp", "0", "-pix_fmt", "yuv444p", str(path)]
    subprocess.run(command, input=np.concatenate(shots).tobytes(), check=True)
    return path


@pytest.fixture
def films(tmp_path: Path) -> Path:
    folder = tmp_path / "films"
    cut_film(folder / "cuts.mp4")
    cut_film(folder / "one.mp4", (10,))
    (folder / "captions.csv").write_text("file,caption\ncuts.mp4,colours\none.mp4,a colour\n")
    return folder


def lengths(lake: Path) -> list[tuple[str, float, int]]:
    return sorted((row["film"], row["clip_start"], row["frames"]) for row in rows(lake))


def test_cuts_are_found(films: Path) -> None:
    film = films / "cuts.mp4"
    assert find_cuts(film, probe(film)) == [0, 6, 18]


def test_each_shot_is_a_clip_of_its_own_length(films: Path, tmp_path: Path) -> None:
    report = make(films, tmp_path / "lake", recipe=SHOTS)
    assert report.clips.line() == "clips: 4 discovered = 4 done + 0 unchanged + 0 filtered + 0 failed"
    expected = [("cuts.mp4", 0.0, 6), ("cuts.mp4", 0.75, 12), ("cuts.mp4", 2.25, 9), ("one.mp4", 0.0, 10)]
    assert lengths(tmp_path / "lake") == expected
    sound(tmp_path / "lake")
    lake = Lake.open(tmp_path / "lake")
    version = load(lake)
    about = version.clip
    assert (about["variable"], about["min_frames"], about["frames_max"], about["duration"]) == (True, 4, 16, 2.0)
    assert [row["duration"] for row in sorted(rows(lake.root), key=lambda row: row["frames"])] == pytest.approx(
        [0.75, 9 / 8, 1.25, 1.5]
    )
    again = make(films, tmp_path / "lake", recipe=SHOTS)
    assert again.clips.line() == "clips: 4 discovered = 0 done + 4 unchanged + 0 filtered + 0 failed"
    # As the trainer has them: padded to the longest of the batch, and what is padding is said.
    clips = Clips(lake, version)
    batch = Collate(read_empty_text(lake, version), ("latents",))(list(clips.every()))
    assert batch.valid is not None
    assert batch.latents is not None
    assert sorted(batch.valid.sum(1).tolist()) == [6, 9, 10, 12]
    assert batch.latents.shape[1] == 12
    assert not batch.latents[~batch.valid].any()
    assert method_named("vlfm").members == ("coefficients",)


def test_shots_of_other_lengths_are_filtered_and_named(films: Path, tmp_path: Path) -> None:
    recipe = dataclasses.replace(SHOTS, shots={"min_frames": 7, "max_frames": 10})
    report = make(films, tmp_path / "lake", recipe=recipe)
    assert (report.clips.discovered, report.clips.done) == (4, 2)
    assert report.clips.filtered == {"too_few_frames": 1, "too_many_frames": 1}
    details = {failure.reason: failure.detail for failure in report.failures}
    assert details == {
        "too_few_frames": "6 frames, fewer than 7 (shots.min_frames)",
        "too_many_frames": "12 frames, more than 10; raise shots.max_frames, lower rate, or name shorter parts",
    }
    none = dataclasses.replace(SHOTS, shots={"min_frames": 15, "max_frames": 16})
    report = make(films, tmp_path / "none", recipe=none)
    assert report.films.filtered == {"too_few_frames": 2}
    assert not report.published
    assert "none of 3 shots has 15 to 16 frames" in next(it.detail for it in report.failures if not it.clip_id)


def test_a_span_of_a_table_is_a_clip_cuts_or_not(films: Path, tmp_path: Path) -> None:
    (films / "captions.csv").write_text(
        "file,caption,start,end\ncuts.mp4,the first two,0,1.75\ncuts.mp4,the end,1.75,\none.mp4,late,9,\n"
    )
    report = make(films, tmp_path / "lake", recipe=SHOTS)
    assert lengths(tmp_path / "lake") == [("cuts.mp4#0-1.75", 0.0, 14), ("cuts.mp4#1.75-", 1.75, 13)]
    (late,) = report.failures
    assert late.reason == "too_few_frames"
    assert late.detail == "the part begins at 9 s, where the film (1.25 s) has ended"


def test_without_detection_a_film_is_one_clip(films: Path, tmp_path: Path) -> None:
    recipe = dataclasses.replace(SHOTS, shots={"min_frames": 4, "max_frames": 30, "detect": False})
    make(films, tmp_path / "lake", recipe=recipe)
    assert lengths(tmp_path / "lake") == [("cuts.mp4", 0.0, 27), ("one.mp4", 0.0, 10)]


@pytest.mark.parametrize(
    ("shots", "message"),
    [
        ({"min": 3}, "shots.min is unknown; the settings are: shots.min_frames, shots.max_frames, shots.detect"),
        ({"max_frames": 2.5}, "shots.max_frames is 2.5; it must be int"),
        ({"min_frames": 9, "max_frames": 8}, "shots.min_frames is 9, shots.max_frames 8; the first must be at least 2"),
        ({"min_frames": 1}, "shots.min_frames is 1, shots.max_frames 128; the first must be at least 2"),
    ],
)
def test_settings_that_cannot_be_are_refused(shots: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataRecipe(name="shots", shots=shots)


def test_recipes_of_windows_have_the_fingerprint_of_before() -> None:
    # That of the program before there were shots and frames after windows: a lake of then goes on.
    before = dataclasses.replace(linear(), next_frame="no")
    assert fingerprint(before.data_fields()) == ("587f6f4a8bb4ff9a0a6a525a2819a3870abe7c850c27592ac95f847a1ff4da73")
    shots = recipe_named("shots")
    assert shots.frames_max == 128
    assert shots.longest == 16.0
    assert shots.data_fields()["shots"] == {"min_frames": 8, "max_frames": 128, "detect": True}
    one = dataclasses.replace(shots, duration=5.0)
    assert fingerprint(one.data_fields()) == fingerprint(shots.data_fields()), "what is not used makes no clip anew"
