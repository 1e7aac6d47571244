"""Refreshes of a source that changes: renames, deletions, touches, captions and recipes, in one run and over many.

Each of these was wrong once: what a refresh leaves is what the source holds, and what did not change is not read again.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import numpy as np
import pytest

import pipeline.ingest.plan
from model.codecs.linear import LinearCodec
from model.codecs.text import inverts_with_text
from pipeline.ingest import IngestReport, ingest
from storage.arrays import read_clips
from storage.layout import Lake
from storage.verify import verify
from storage.version import load
from tests.pipeline.ingest.in_process import InProcess, NoWork, rows
from tests.pipeline.ingest.test_identity import RECIPE, held, library, put

__all__ = ["library"]

OTHER = dataclasses.replace(RECIPE, size=(8, 8))


class Refresh:
    """Ingests into one lake, and how many films the last one read and how many clips it made."""

    def __init__(self, lake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.lake = lake
        self.read: list[str] = []
        self.encoded = 0
        whole = pipeline.ingest.plan.probe

        def counting(path: Path, *how: object) -> object:
            self.read.append(Path(path).name)
            return whole(path, *how)

        monkeypatch.setattr(pipeline.ingest.plan, "probe", counting)

    def __call__(self, *sources: Path, recipe: object = RECIPE, **how: object) -> IngestReport:
        self.read.clear()
        runner = InProcess()
        report = ingest(list(sources), self.lake, recipe=recipe, runner=runner, **how)
        self.encoded = runner.clips
        lake = Lake.open(self.lake)
        assert verify(lake, load(lake)) == []
        return report

    def settled(self, *sources: Path, recipe: object = RECIPE) -> IngestReport:
        """A run that has nothing to do: no film is read, nothing is published."""
        self.read.clear()
        report = ingest(list(sources), self.lake, recipe=recipe, runner=NoWork())
        assert (self.read, report.published) == ([], False)
        return report

    def films(self) -> dict[str, tuple[str, int]]:
        """Status or reason, and clips, by film."""
        return {row["film"]: (row["reason"] or row["status"], row["clips"]) for row in rows(self.lake, table="films")}

    def captions(self) -> set[tuple[str, str]]:
        return {(row["film"], row["caption"]) for row in rows(self.lake)}


@pytest.fixture
def refresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Refresh:
    return Refresh(tmp_path / "lake", monkeypatch)


def test_a_rename_is_a_rename(library: Path, tmp_path: Path, refresh: Refresh) -> None:
    films = tmp_path / "films"
    put(library, "red", films / "a.mp4")
    put(library, "green", films / "b.mp4")
    refresh(films)
    (films / "a.mp4").rename(films / "z.mp4")
    (films / "a.txt").rename(films / "z.txt")
    report = refresh(films)
    assert (refresh.encoded, report.clips.done, report.clips.unchanged) == (0, 0, 4)
    assert refresh.films() == {"b.mp4": ("unchanged", 2), "z.mp4": ("unchanged", 2)}
    assert refresh.settled(films).clips.unchanged == 4


def test_a_rename_with_another_caption(library: Path, tmp_path: Path, refresh: Refresh) -> None:
    films = tmp_path / "films"
    put(library, "red", films / "a.mp4", "a walk")
    put(library, "green", films / "b.mp4")
    refresh(films)
    (films / "a.mp4").rename(films / "z.mp4")
    (films / "a.txt").unlink()
    (films / "z.txt").write_text("a run")
    refresh(films)
    assert refresh.captions() == {("z.mp4", "a run"), ("b.mp4", "a walk")}
    assert set(refresh.films()) == {"b.mp4", "z.mp4"}
    refresh.settled(films)


def test_a_rename_of_a_film_in_parts(library: Path, tmp_path: Path, refresh: Refresh) -> None:
    films = tmp_path / "films"
    film = put(library, "long", films / "a.mp4")
    (films / "captions.csv").write_text("file,caption,start,end\na.mp4,one,0,2\na.mp4,two,3,6\n")
    refresh(films)
    film.rename(films / "z.mp4")
    (films / "captions.csv").write_text("file,caption,start,end\nz.mp4,one,0,2\nz.mp4,three,3,6\n")
    refresh(films)
    assert held(refresh.lake) == {"z.mp4#0-2": 2, "z.mp4#3-6": 3}
    assert refresh.captions() == {("z.mp4#0-2", "one"), ("z.mp4#3-6", "three")}
    refresh.settled(films)


def test_a_deleted_film_is_said_and_leaves_with_prune(library: Path, tmp_path: Path, refresh: Refresh) -> None:
    films = tmp_path / "films"
    put(library, "red", films / "a.mp4")
    put(library, "green", films / "b.mp4")
    (films / "captions.csv").write_text("file,caption\na.mp4,a walk\nb.mp4,a walk\n")
    refresh(films)
    (films / "a.mp4").unlink()
    report = refresh.settled(films)
    assert report.films.line() == "films: 1 discovered = 0 done + 1 unchanged + 0 filtered + 0 failed"
    told = "1 film of the dataset is not in the source (a.mp4); its clips stay, --prune takes them out"
    assert told in report.lines()
    assert held(refresh.lake) == {"a.mp4": 2, "b.mp4": 2}
    report = refresh(films, prune=True)
    assert (report.published, report.superseded) == (True, 2)
    assert held(refresh.lake) == {"b.mp4": 2}
    assert set(refresh.films()) == {"b.mp4"}
    report = refresh.settled(films)
    assert report.films.failed == {"film_missing": 1}, "the table still names it, and the dataset has it no longer"


def test_prune_takes_films_of_this_source_only(library: Path, tmp_path: Path, refresh: Refresh) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    put(library, "red", a / "1.mp4")
    put(library, "green", a / "2.mp4")
    put(library, "blue", b / "3.mp4")
    put(library, "long", b / "4.mp4")
    refresh(a, b)
    (a / "2.mp4").unlink()
    (b / "4.mp4").unlink()
    refresh(a, prune=True)
    assert held(refresh.lake) == {"1.mp4": 2, "3.mp4": 2, "4.mp4": 6}
    refresh(a, b, prune=True)
    assert held(refresh.lake) == {"1.mp4": 2, "3.mp4": 2}


def test_going_back_to_a_recipe_does_not_bring_back_what_was_removed(
    library: Path, tmp_path: Path, refresh: Refresh
) -> None:
    films = tmp_path / "films"
    for name, content in (("a", "red"), ("b", "green"), ("c", "blue")):
        put(library, content, films / f"{name}.mp4")
    refresh(films)
    refresh(films, recipe=OTHER)
    (films / "a.mp4").unlink()
    put(library, "long", films / "b.mp4")
    refresh(films, recipe=OTHER, prune=True)
    assert held(refresh.lake) == {"b.mp4": 6, "c.mp4": 2}
    refresh(films, recipe=RECIPE)
    assert held(refresh.lake) == {"b.mp4": 6, "c.mp4": 2}
    refresh.settled(films)


def test_films_of_other_sources_are_not_forgotten_by_another_recipe(
    library: Path, tmp_path: Path, refresh: Refresh
) -> None:
    """Recipe A holds two sources, recipe B one of them; back to A: both are there."""
    a, b = tmp_path / "a", tmp_path / "b"
    put(library, "red", a / "1.mp4")
    put(library, "green", b / "2.mp4")
    refresh(a, b)
    refresh(a, recipe=OTHER)
    assert held(refresh.lake) == {"1.mp4": 2}
    refresh(a)
    assert held(refresh.lake) == {"1.mp4": 2, "2.mp4": 2}


def test_a_touch_is_recorded(library: Path, tmp_path: Path, refresh: Refresh) -> None:
    films = tmp_path / "films"
    put(library, "red", films / "a.mp4")
    refresh(films)
    os.utime(films / "a.mp4", ns=(1, 1))
    refresh(films)
    assert (refresh.read, refresh.encoded) == (["a.mp4"], 0)
    assert refresh.settled(films).clips.unchanged == 2


def test_a_new_bad_film_is_recorded(library: Path, tmp_path: Path, refresh: Refresh) -> None:
    """A run that brings nothing but a film that cannot be used: the next one does not open it again."""
    films = tmp_path / "films"
    put(library, "red", films / "a.mp4")
    refresh(films)
    put(library, "green", films / "b.mp4").write_bytes(b"no film at all")
    refresh(films)
    assert refresh.settled(films).films.failed == {"not_a_video": 1}


def test_a_new_caption_recomputes_the_text_only(library: Path, tmp_path: Path, refresh: Refresh) -> None:
    films = tmp_path / "films"
    put(library, "red", films / "a.mp4", "a walk")
    refresh(films)
    before = rows(refresh.lake)
    (films / "a.txt").write_text("a run")
    report = refresh(films)
    assert refresh.encoded == 0
    assert (report.clips.done, report.superseded) == (2, 2)
    assert refresh.captions() == {("a.mp4", "a run")}
    after = rows(refresh.lake)
    assert [row["psnr_codec"] for row in after] == [row["psnr_codec"] for row in before]
    assert {row["clip_id"] for row in after}.isdisjoint(row["clip_id"] for row in before)
    refresh.settled(films)


def test_a_new_projection_takes_stored_latents(
    library: Path, tmp_path: Path, refresh: Refresh, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another order, or other observed frames: nothing is encoded, and the latents are the old ones bit for bit."""
    films = tmp_path / "films"
    put(library, "red", films / "a.mp4", "a walk")
    refresh(films)
    fresh = tmp_path / "fresh"
    other = dataclasses.replace(RECIPE, order=6, method="linear")
    ingest(films, fresh, recipe=other, runner=InProcess())
    before = latents(refresh.lake)

    def encode(*_: object) -> None:
        raise AssertionError("it is encoded again")

    with monkeypatch.context() as patch:
        patch.setattr(LinearCodec, "encode", encode)
        report = refresh(films, recipe=other)
        assert (report.clips.done, refresh.encoded) == (2, 2), "projected in a worker"
        assert np.array_equal(latents(refresh.lake), before)
        refresh(films, recipe=dataclasses.replace(RECIPE, observe="all"))
        assert {row["frames_observed"] for row in rows(refresh.lake)} == {8}
        (films / "a.txt").write_text("a run")
        refresh(films, recipe=dataclasses.replace(RECIPE, observe="all"))
        assert refresh.encoded == 0
    refresh(films, recipe=other)
    (films / "a.txt").write_text("a walk")
    refresh(films, recipe=other)
    same = ("clip_id", "order_used", "method_used", "psnr_codec", "psnr_projection", "projection_error", "end_ratio")
    found, expected = (sorted([row[name] for name in same] for row in rows(lake)) for lake in (refresh.lake, fresh))
    assert found == expected


def latents(lake: Path) -> np.ndarray:
    opened = Lake.open(lake)
    version = load(opened)
    chosen = [row["array_row"] for row in sorted(rows(lake), key=lambda row: row["clip_start"])]
    return np.asarray(read_clips(opened, version.snapshot, version.group, chosen, ["latents"])["latents"])


@pytest.mark.parametrize(
    ("codec", "by_caption"),
    [
        ({"kind": "linear", "factor": 4, "channels": 12, "scale": 1.0}, False),
        ({"kind": "diffusers", "source": "vlfm-small-2", "inversion_depth": 0}, False),
        ({"kind": "diffusers", "source": "vlfm-small-2", "inversion_depth": 2}, True),
        ({"kind": "diffusers", "source": "vlfm-small-2"}, True),
    ],
)
def test_latents_depend_on_the_caption_where_the_codec_inverts(codec: dict[str, object], by_caption: bool) -> None:
    assert inverts_with_text(codec) is by_caption
