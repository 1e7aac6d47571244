"""The corpus of 3x3 pixels: what is drawn, what arrives in a lake, and what is read back."""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from pipeline.corpus.turning import LENGTHS, make_turning, plan_turning, read_turning
from pipeline.recipes import turning
from storage.layout import Lake
from storage.shards import ShardReader
from tests.pipeline.ingest.in_process import make, rows


def test_a_plan_is_a_function_of_its_arguments() -> None:
    films = plan_turning(films=64)
    assert films == plan_turning(films=64)
    assert films != plan_turning(seed=1, films=64)
    assert Counter(film.frames for film in films) == dict.fromkeys(LENGTHS, 16)
    told = [film for film in films if film.caption.startswith(f"{film.frames} frames, a ")]
    assert told == [film for film in films if film.told]
    assert 16 < len(told) < 48
    assert not any(film.told for film in plan_turning(films=8, told=0))


@pytest.mark.parametrize(("films", "told"), [(0, 0.5), (3, 1.5)])
def test_what_cannot_be_is_refused(films: int, told: float) -> None:
    with pytest.raises(ValueError, match="the first must be at least 1, the second in"):
        plan_turning(films=films, told=told)


def test_the_border_turns_evenly_and_whole_times_and_the_centre_jumps_once() -> None:
    for film in plan_turning(films=40):
        frames = film.draw()
        assert frames.shape == (film.frames, 3, 3, 3)
        found = read_turning(frames)
        assert found.frames == film.frames
        assert found.turns == pytest.approx(film.turns, abs=0.02)
        assert found.unevenness < 0.1
        assert found.jumps == 1
    still = read_turning(np.repeat(frames[:1], 20, axis=0))
    assert abs(still.turns) < 1e-6
    assert still.jumps == 0
    assert np.isnan(read_turning(frames[:1]).turns)
    backwards = read_turning(frames[::-1])
    assert backwards.turns == pytest.approx(-film.turns, abs=0.02)


def test_the_lake_has_the_drawn_films(tmp_path: Path) -> None:
    """ffmpeg, the recipe's size and the codec leave every value as it was drawn, and the latents are these values."""
    captions = make_turning(tmp_path / "films", films=6)
    with open(captions, encoding="utf-8", newline="") as table:
        listed = list(csv.DictReader(table))
    films = plan_turning(films=6)
    assert [(row["file"], row["caption"], int(row["frames"])) for row in listed] == [
        (film.file, film.caption, film.frames) for film in films
    ]
    report = make(tmp_path / "films", tmp_path / "lake", recipe=turning())
    assert report.clips.line() == "clips: 6 discovered = 6 done + 0 unchanged + 0 filtered + 0 failed"
    lake = Lake.open(tmp_path / "lake")
    by_file = {film.file: film for film in films}
    for row in rows(lake.root):
        film, sample = by_file[row["film"]], ShardReader(lake, row["shard"])[row["shard_row"]]
        drawn = film.draw()
        np.testing.assert_array_equal(sample["preview.npy"], drawn)
        assert row["frames"] == film.frames
        assert row["duration"] == pytest.approx(film.frames / 8)
        np.testing.assert_array_equal(
            sample["latents.npy"], (drawn.astype(np.float32) / 127.5 - 1).transpose(0, 3, 1, 2).astype(np.float16)
        )
        back = np.rint((sample["latents.npy"].astype(np.float32) + 1) * 127.5)
        assert np.abs(back - drawn.transpose(0, 3, 1, 2)).max() == 0, "16 bits hold all 256 levels"
