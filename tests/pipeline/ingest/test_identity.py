"""Films of several sources, twins, and parts that overlap: each clip once, and none lost, in whatever order they come.

Real films through the whole ingest, with blocks made in this process.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.ingest import IngestReport, ingest
from pipeline.recipes import DataRecipe, linear
from storage.failures import read_failures
from storage.layout import Lake
from storage.verify import verify
from storage.version import load
from tests.pipeline.ingest.in_process import InProcess, NoWork, rows

Film = Callable[..., Path]
RECIPE = dataclasses.replace(linear(), size=(16, 16), duration=1.0, rate=8.0, tolerate=0.9)


@pytest.fixture(scope="module")
def library(scene: Film, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Films of different contents: red, green, blue of 2 s, and long of 6 s."""
    folder = tmp_path_factory.mktemp("library")
    for name, rate in (("red", "8"), ("green", "9"), ("blue", "10")):
        scene(folder / f"{name}.mp4", rate=rate, seconds=2, size="32x32")
    return scene(folder / "long.mp4", rate="8", seconds=6, size="32x32").parent


def put(library: Path, content: str, path: Path, caption: str = "a walk") -> Path:
    """A film of that content at that path, with its caption beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(library / f"{content}.mp4", path)
    path.with_suffix(".txt").write_text(caption)
    return path


def make(lake: Path, *sources: Path | str, recipe: DataRecipe = RECIPE) -> IngestReport:
    report = ingest(list(sources), lake, recipe=recipe, runner=InProcess())
    opened = Lake.open(lake)
    assert verify(opened, load(opened)) == []
    return report


def nothing_new(lake: Path, *sources: Path | str, recipe: DataRecipe = RECIPE) -> IngestReport:
    """An ingest that makes no clip and no version, and counts no clip less than the dataset has of these films."""
    before = load(Lake.open(lake)).number
    report = ingest(list(sources), lake, recipe=recipe, runner=NoWork())
    assert (report.version, report.published, report.clips.done) == (before, False, 0)
    return report


def held(lake: Path) -> dict[str, int]:
    """Clips by film, the same by the table of clips and by that of films; a clip is a content, caption and start."""
    clips = rows(lake)
    identities = {(row["film_id"], row["caption"], row["clip_start"]) for row in clips}
    assert len(identities) == len(clips)
    films = {row["film"]: row["clips"] for row in rows(lake, table="films") if row["clips"]}
    counted: dict[str, int] = {}
    for row in clips:
        counted[row["film"]] = counted.get(row["film"], 0) + 1
    assert counted == films
    return counted


def contents(lake: Path) -> set[tuple[str, str]]:
    return {(row["film_id"], row["caption"]) for row in rows(lake)}


# --- parts that overlap ---


def test_shared_windows_of_parts_are_kept_once(library: Path, tmp_path: Path) -> None:
    table = tmp_path / "parts.csv"
    shutil.copyfile(library / "long.mp4", tmp_path / "f.mp4")
    table.write_text("file,caption,start,end\nf.mp4,walks,0,3\nf.mp4,walks,2,5\nf.mp4,walks,1,2\nf.mp4,runs,1,3\n")
    report = make(tmp_path / "lake", table)
    assert report.clips.line() == (
        "clips: 8 discovered = 7 done + 0 unchanged + 1 filtered (duplicate_window 1) + 0 failed"
    )
    assert report.films.line() == "films: 4 discovered = 3 done + 0 unchanged + 1 filtered (duplicate 1) + 0 failed"
    assert held(tmp_path / "lake") == {"f.mp4#0-3": 3, "f.mp4#1-3": 2, "f.mp4#2-5": 2}
    told = read_failures(Lake.open(tmp_path / "lake"), report.run_id)
    assert [(row["film"], row["clip_start"], row["reason"]) for row in told if row["clip_id"]] == [
        ("f.mp4#2-5", 2.0, "duplicate_window")
    ]
    again = nothing_new(tmp_path / "lake", table)
    assert (again.clips.unchanged, again.films.filtered) == (7, {"duplicate": 1})


def test_parts_whose_windows_meet_in_the_middle(library: Path, tmp_path: Path) -> None:
    """Windows of 2 s: the second part begins within the first one, and its name comes before the first one's."""
    shutil.copyfile(library / "long.mp4", tmp_path / "f.mp4")
    table = tmp_path / "parts.csv"
    table.write_text("file,caption,start,end\nf.mp4,walks,2,6\nf.mp4,walks,0,4\n")
    two = dataclasses.replace(RECIPE, duration=2.0)
    report = make(tmp_path / "lake", table, recipe=two)
    assert (report.clips.done, report.clips.filtered) == (3, {"duplicate_window": 1})
    nothing_new(tmp_path / "lake", table, recipe=two)


Parts = list[tuple[str, str, int, int | None]]
part = st.tuples(
    st.sampled_from(["f.mp4", "copy.mp4"]),
    st.sampled_from(["walks", "runs"]),
    st.integers(0, 4),
    st.one_of(st.none(), st.integers(5, 6)),
)
parts = st.lists(part, min_size=1, max_size=4, unique_by=lambda part: (part[0], *part[2:]))


@settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(first=parts, second=parts, late=st.booleans())
def test_every_window_once(
    library: Path, tmp_path_factory: pytest.TempPathFactory, first: Parts, second: Parts, late: bool
) -> None:
    """Random parts of two identical files, then other parts, with and without a change of one file's time."""
    folder = tmp_path_factory.mktemp("random")
    shutil.copyfile(library / "long.mp4", folder / "f.mp4")
    shutil.copyfile(library / "long.mp4", folder / "copy.mp4")
    lake, table = folder / "lake", folder / "parts.csv"
    half = dataclasses.replace(RECIPE, duration=2.0, rate=4.0)

    def write(chosen: Parts) -> set[tuple[str, float]]:
        lines = [f"{file},{said},{start},{'' if end is None else end}" for file, said, start, end in chosen]
        table.write_text("\n".join(["file,caption,start,end", *lines]))
        return {
            (said, float(start + 2 * number))
            for _, said, start, end in chosen
            for number in range(((6 if end is None else end) - start) // 2)
        }

    def found() -> set[tuple[str, float]]:
        held(lake)
        return {(row["caption"], row["clip_start"]) for row in rows(lake)}

    wanted = write(first)
    make(lake, table, recipe=half)
    assert found() == wanted
    nothing_new(lake, table, recipe=half)
    wanted = write(second)
    if late:
        os.utime(folder / "f.mp4")
    make(lake, table, recipe=half)
    assert wanted <= found(), "all that the table asks for"
    nothing_new(lake, table, recipe=half)


# --- films of one name in several sources ---


def test_films_of_one_name_in_two_folders(library: Path, tmp_path: Path) -> None:
    lake, a, b = tmp_path / "lake", tmp_path / "walks", tmp_path / "runs"
    put(library, "red", a / "clip1.mp4")
    put(library, "green", b / "clip1.mp4")
    make(lake, a)
    report = make(lake, b)
    assert (report.clips.done, report.superseded) == (2, 0)
    assert held(lake) == {"clip1.mp4": 2, "runs/clip1.mp4": 2}
    nothing_new(lake, b)
    nothing_new(lake, b, a)
    put(library, "blue", b / "clip1.mp4")
    report = make(lake, b)
    assert (report.clips.done, report.superseded) == (2, 2)
    assert held(lake) == {"clip1.mp4": 2, "runs/clip1.mp4": 2}
    # In one run, also with folders of one name.
    c = tmp_path / "other" / "walks"
    put(library, "green", c / "clip1.mp4")
    together = tmp_path / "together"
    make(together, a, b, c)
    assert held(together) == {"clip1.mp4": 2, "runs/clip1.mp4": 2, "walks/clip1.mp4": 2}
    nothing_new(together, c, b)
    d = tmp_path / "third" / "walks"
    put(library, "long", d / "clip1.mp4")
    assert make(together, d).clips.done == 6
    assert held(together)["walks-2/clip1.mp4"] == 6


def test_failures_of_one_name_are_told_apart(library: Path, tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    put(library, "red", a / "clip1.mp4")
    put(library, "red", b / "clip1.mp4").write_bytes(b"")
    for lake, order in ((tmp_path / "one", (a, b)), (tmp_path / "other", (b, a))):
        report = make(lake, *order)
        assert (report.films.done, report.films.failed) == (1, {"empty_file": 1})
        nothing_new(lake, *order)
        nothing_new(lake, a)
        assert set(held(lake).values()) == {2}


def test_one_folder_by_many_paths(library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lake, films = tmp_path / "lake", tmp_path / "films"
    put(library, "red", films / "a.mp4")
    put(library, "green", films / "sub" / "b.mp4")
    (tmp_path / "link").symlink_to(films)
    monkeypatch.chdir(tmp_path)
    make(lake, films)
    for sources in (["films"], ["films/"], ["link"], ["films", "link/"], ["films", "films/sub"], ["films/sub"]):
        nothing_new(lake, *sources)
    assert held(lake) == {"a.mp4": 2, "sub/b.mp4": 2}
    put(library, "blue", films / "sub" / "b.mp4")
    assert make(lake, "films/sub").superseded == 2
    assert held(lake) == {"a.mp4": 2, "sub/b.mp4": 2}


def test_a_folder_that_moved_is_the_same(library: Path, tmp_path: Path) -> None:
    lake, films = tmp_path / "lake", tmp_path / "films"
    put(library, "red", films / "a.mp4")
    put(library, "green", films / "b.mp4").write_bytes(b"")
    make(lake, films)
    moved = films.rename(tmp_path / "moved")
    report = make(lake, moved)
    assert (report.published, report.clips.done, report.clips.unchanged) == (True, 0, 2), "its new place is recorded"
    assert nothing_new(lake, moved).clips.unchanged == 2
    put(library, "blue", moved / "b.mp4")
    assert make(lake, moved).superseded == 0
    assert held(lake) == {"a.mp4": 2, "b.mp4": 2}
    assert {row["path"] for row in rows(lake, table="films")} == {str(moved / "a.mp4"), str(moved / "b.mp4")}
    put(library, "green", moved / "a.mp4")
    assert make(lake, moved).superseded == 2
    assert held(lake) == {"a.mp4": 2, "b.mp4": 2}


def test_a_moved_film_still_inherits(library: Path, tmp_path: Path) -> None:
    """A folder moves and nothing in it is new; then its twin in another source changes: the content stays with it."""
    lake, a, b = tmp_path / "lake", tmp_path / "a", tmp_path / "b"
    put(library, "red", a / "one.mp4", "a walk")
    put(library, "red", b / "two.mp4", "a walk")
    make(lake, a)
    make(lake, b)
    moved = b.rename(tmp_path / "c")
    make(lake, moved)
    put(library, "green", a / "one.mp4", "a walk")
    make(lake, a)
    assert held(lake) == {"one.mp4": 2, "two.mp4": 2}


def test_a_copy_is_no_move(library: Path, tmp_path: Path) -> None:
    """The copied folder is still there, and its film keeps its caption's clips."""
    lake, a, b = tmp_path / "lake", tmp_path / "a", tmp_path / "b"
    put(library, "red", a / "1.mp4", "a walk")
    put(library, "red", b / "1.mp4", "a run")
    make(lake, a)
    assert make(lake, b).superseded == 0
    assert held(lake) == {"1.mp4": 2, "b/1.mp4": 2}


def test_a_renamed_film_keeps_its_clips(library: Path, tmp_path: Path) -> None:
    lake, films = tmp_path / "lake", tmp_path / "films"
    put(library, "red", films / "a.mp4")
    make(lake, films)
    (films / "a.mp4").unlink()
    put(library, "red", films / "z.mp4")
    report = make(lake, films)
    assert (report.clips.done, report.clips.unchanged) == (0, 2)
    assert held(lake) == {"z.mp4": 2}
    put(library, "blue", films / "c.mp4")
    make(lake, films)
    assert held(lake) == {"z.mp4": 2, "c.mp4": 2}
    assert nothing_new(lake, films).clips.unchanged == 4


def test_a_lake_without_paths_knows_its_films_by_name(library: Path, tmp_path: Path) -> None:
    """As a lake of an earlier program: its films are found in whatever folder, and get their paths."""
    import pipeline.ingest.plan

    lake, films = tmp_path / "lake", tmp_path / "films"
    put(library, "red", films / "a.mp4")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline.ingest.plan, "printable", lambda text: "")
        make(lake, films)
    assert [row["path"] for row in rows(lake, table="films")] == [""]
    nothing_new(lake, films)
    put(library, "green", tmp_path / "more" / "a.mp4")
    make(lake, films, tmp_path / "more")
    assert {row["film"]: row["path"] for row in rows(lake, table="films")} == {
        "a.mp4": str(films / "a.mp4"),
        "more/a.mp4": str(tmp_path / "more" / "a.mp4"),
    }


# --- twins ---


def test_a_twin_takes_over(library: Path, tmp_path: Path) -> None:
    """a and b are the same; a changes, b keeps the content; then it changes to what c is."""
    lake, films = tmp_path / "lake", tmp_path / "films"
    for name in "ab":
        put(library, "red", films / f"{name}.mp4")
    assert make(lake, films).films.filtered == {"duplicate": 1}
    before = contents(lake)
    put(library, "green", films / "a.mp4")
    report = make(lake, films)
    assert (report.clips.done, report.clips.unchanged, report.superseded) == (2, 2, 0)
    assert held(lake) == {"a.mp4": 2, "b.mp4": 2}
    assert before < contents(lake)
    assert nothing_new(lake, films).clips.unchanged == 4
    put(library, "red", films / "a.mp4")
    report = make(lake, films)
    assert (report.published, report.superseded, report.films.filtered) == (True, 2, {"duplicate": 1})
    assert contents(lake) == before
    assert sum(held(lake).values()) == 2
    nothing_new(lake, films)


def test_a_twin_with_another_caption_keeps_its_part(library: Path, tmp_path: Path) -> None:
    """The caption of one of two overlapping parts changes: the windows that they shared stay, with the other's."""
    shutil.copyfile(library / "long.mp4", tmp_path / "f.mp4")
    lake, table = tmp_path / "lake", tmp_path / "parts.csv"
    table.write_text("file,caption,start,end\nf.mp4,walks,0,3\nf.mp4,walks,2,5\n")
    make(lake, table)
    table.write_text("file,caption,start,end\nf.mp4,runs,0,3\nf.mp4,walks,2,5\n")
    report = make(lake, table)
    assert (report.clips.done, report.clips.unchanged, report.superseded) == (3, 3, 2)
    assert held(lake) == {"f.mp4#0-3": 3, "f.mp4#2-5": 3}


@pytest.mark.parametrize("name", ["clip1.mp4", "other.mp4"])
def test_a_twin_in_another_source_keeps_the_content(library: Path, tmp_path: Path, name: str) -> None:
    """The twin's folder is not in the run that takes the content from the first one."""
    lake, a, b = tmp_path / "lake", tmp_path / "a", tmp_path / "b"
    put(library, "red", a / "clip1.mp4")
    put(library, "red", b / name)
    make(lake, a, b)
    before = contents(lake)
    put(library, "green", a / "clip1.mp4")
    report = make(lake, a)
    assert (report.clips.done, report.superseded) == (2, 0)
    assert before < contents(lake)
    assert sorted(held(lake).values()) == [2, 2]
    assert nothing_new(lake, b).clips.unchanged == 2
    assert nothing_new(lake, a, b).clips.unchanged == 4
    put(library, "blue", b / name)
    assert make(lake, b).superseded == 2
    assert sorted(held(lake).values()) == [2, 2]


def test_a_twin_that_comes_alone_and_later_keeps_the_content(library: Path, tmp_path: Path) -> None:
    lake, a, b = tmp_path / "lake", tmp_path / "a", tmp_path / "b"
    put(library, "red", a / "1.mp4")
    put(library, "red", b / "2.mp4")
    make(lake, a)
    report = make(lake, b)
    assert (report.published, report.clips.done, report.clips.unchanged) == (True, 0, 2)
    nothing_new(lake, b)
    put(library, "green", a / "1.mp4")
    assert make(lake, a).superseded == 0
    assert held(lake) == {"1.mp4": 2, "2.mp4": 2}


def test_a_twin_that_fails_leaves_the_content_to_the_other(library: Path, tmp_path: Path) -> None:
    lake, films = tmp_path / "lake", tmp_path / "films"
    for name in "ab":
        put(library, "red", films / f"{name}.mp4")
    make(lake, films)
    (films / "a.mp4").write_bytes((films / "a.mp4").read_bytes()[:2000])
    report = make(lake, films)
    assert (report.clips.done, report.clips.unchanged, report.films.failed) == (0, 2, {"truncated": 1})
    assert nothing_new(lake, films).clips.unchanged == 2, "that it is truncated is recorded"


# --- names and tables through the whole ingest ---


def test_bad_names_and_rows_cost_nothing_else(
    library: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from flows.cli import main

    lake, films = tmp_path / "lake", tmp_path / "films"
    put(library, "red", films / "good.mp4")
    put(library, "green", films / os.fsdecode(b"caf\xe9.mp4"))
    put(library, "blue", films / "nul.mp4")
    (films / "captions.csv").write_bytes(b"file,caption\ngood.mp4,a walk\nnul.mp4,a\0walk\nx.mp4,a,b\n\xff.mp4,y\n")
    how = [f"--set={name}={value}" for name, value in (("duration", 1.0), ("rate", 8.0), ("size", "[16, 16]"))]
    assert main(["ingest", str(films), "--lake", str(lake), "--recipe", "linear", "--plan", *how]) == 0
    planned = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    report = make(lake, films)
    assert [line for line in report.lines() if line.startswith("  ")] == planned
    assert report.clips.done == 2
    assert report.films.failed == {"bad_caption": 1, "bad_name": 1, "bad_row": 2}
    told = {row["film"]: row["reason"] for row in read_failures(Lake.open(lake), report.run_id)}
    assert told == {
        r"caf\xe9.mp4": "bad_name",
        "captions.csv, line 4": "bad_row",
        "captions.csv, line 5": "bad_row",
        "nul.mp4": "bad_caption",
    }
    assert {row["film"] for row in rows(lake, table="films")} == {"good.mp4", "nul.mp4", r"caf\xe9.mp4"}
    nothing_new(lake, films)
