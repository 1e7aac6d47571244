"""Lakes of older programs are read, and an ingest goes on from them: what they did not measure is unknown."""

from __future__ import annotations

import dataclasses
import math
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.ingest import ingest
from pipeline.recipes import DataRecipe, linear
from storage.layout import Lake
from storage.schema import CERTIFICATE, CLIP_SCHEMA
from storage.verify import verify
from storage.version import load, read_manifest
from tests.pipeline.ingest.in_process import InProcess, NoWork

Film = Callable[..., Path]
OLD = {"size": (16, 16), "duration": 1.0, "rate": 8.0, "method": "cubic", "block_clips": 3, "preview_clips": 1}
RECIPE = dataclasses.replace(linear(), **OLD)
NEW = ("ssim_codec", "psnr_vae", "ssim_vae", "residual", "latent_round_trip")


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """The folder with `lake` and `films` of tests/data/v1."""
    with tarfile.open(Path(__file__).parents[1] / "data" / "v1" / "lake.tar.xz") as archive:
        safely = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # from Python 3.11.4 on
        archive.extractall(tmp_path, **safely)
    return tmp_path


def test_the_first_lake_is_read(old: Path) -> None:
    lake = Lake.open(old / "lake")
    version = load(lake)
    assert verify(lake, version) == []
    rows = read_manifest(lake, version).to_pylist()
    assert len(rows) == 3
    assert all(set(row) == set(CLIP_SCHEMA.names) for row in rows)
    for row in rows:
        assert [name for name in NEW if not math.isnan(row[name])] == []
        assert (row["frames_certified"], row["flags"]) == (0, "")
        assert row["psnr_codec"] == pytest.approx(20.23, abs=0.2)
    assert read_manifest(lake, version, "rejected").num_rows == 0


@pytest.mark.parametrize("recipe", [RECIPE, dataclasses.replace(RECIPE, gates={"residual": 0.1, "psnr_codec": 15.0})])
def test_an_unchanged_film_stays_as_it_is(old: Path, recipe: DataRecipe) -> None:
    """The recipe's fields that came later do not change the clips' ids at their defaults; NaN passes every gate."""
    report = ingest(old / "films", old / "lake", recipe=recipe, runner=NoWork())
    assert (report.version, report.published, report.clips.unchanged) == (1, False, 3)


def test_new_clips_join_old_ones(old: Path, scene: Film) -> None:
    scene(old / "films" / "new.mp4", seconds=2).with_suffix(".txt").write_text("a new film")
    report = ingest(old / "films", old / "lake", recipe=RECIPE, runner=InProcess())
    assert (report.version, report.clips.done, report.clips.unchanged) == (2, 2, 3)
    lake = Lake.open(old / "lake")
    assert verify(lake, load(lake)) == []
    rows = read_manifest(lake, load(lake)).to_pylist()
    measured = {row["film"]: {m.name for m in CERTIFICATE if not math.isnan(row[m.name])} for row in rows}
    assert {"psnr_codec", "ssim_codec", "psnr_vae"} <= measured["new.mp4"]
    assert measured["old.mp4"].isdisjoint(NEW)
    assert {row["film"]: row["frames_certified"] for row in rows} == {"new.mp4": 8, "old.mp4": 0}


def test_a_tighter_gate_takes_old_clips_out(old: Path) -> None:
    lake = Lake.open(old / "lake")
    worst = min(row["psnr_codec"] for row in read_manifest(lake, load(lake)).to_pylist())
    recipe = dataclasses.replace(RECIPE, gates={"psnr_codec": worst + 1e-9})
    report = ingest(old / "films", old / "lake", recipe=recipe, runner=InProcess())
    assert (report.version, report.clips.unchanged, report.clips.filtered) == (2, 2, {"below_gate": 1})
    assert verify(lake, load(lake)) == []
