"""Every way to name films and captions, and a line that says the remedy for every mistake."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.sources.folders import SourceError, discover


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b.mp4", "a.mkv", "deep/c.webm", "notes.txt", ".hidden.mp4"):
        path = tmp_path / "films" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"film " + name.encode())
    return tmp_path / "films"


def test_folder_with_its_own_captions(folder: Path) -> None:
    (folder / "captions.csv").write_text('file,caption\nb.mp4,"A bee, flying."\ndeep/c.webm,C\ngone.mp4,G\n')
    found = discover(folder)
    assert [(entry.film, entry.caption) for entry in found.entries] == [
        ("b.mp4", "A bee, flying."),
        ("deep/c.webm", "C"),
    ]
    assert {(failure.film, failure.reason) for failure in found.failures} == {
        ("a.mkv", "no_caption"),
        ("gone.mp4", "film_missing"),
    }
    assert found.notes == [f"captions: {folder / 'captions.csv'}"]
    entry = found.entries[0]
    stat = (folder / "b.mp4").stat()
    assert (entry.bytes, entry.modified_ns, entry.path) == (stat.st_size, stat.st_mtime_ns, str(folder / "b.mp4"))


def test_captions_beside_films(folder: Path) -> None:
    (folder / "b.txt").write_text("\ufeffA bee\n flying. \n", encoding="utf-8")
    found = discover(folder, captions_required=False)
    assert {entry.film: entry.caption for entry in found.entries} == {
        "a.mkv": "",
        "b.mp4": "A bee flying.",
        "deep/c.webm": "",
    }


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_tables_as_source(folder: Path, kind: str) -> None:
    rows = [
        {"file": "b.mp4", "caption": "first part", "start": 0.0, "end": 2.0},
        {"file": "b.mp4", "caption": "second part", "start": 2.0, "end": 4.5},
        {"file": "a.mkv", "caption": "all of it", "start": None, "end": None},
        {"file": "gone.mp4", "caption": "nobody", "start": None, "end": None},
        {"file": "deep/c.webm", "caption": "backwards", "start": 3.0, "end": 1.0},
    ]
    table = folder / f"table.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), table)
    elif kind == "jsonl":
        table.write_text("\n".join(json.dumps(row) for row in rows))
    else:
        lines = [",".join("" if value is None else str(value) for value in row.values()) for row in rows]
        table.write_text("\n".join(["file,caption,start,end", *lines]))
    found = discover(table)
    assert [(entry.film, entry.caption, entry.start, entry.end) for entry in found.entries] == [
        ("a.mkv", "all of it", 0.0, None),
        ("b.mp4#0-2", "first part", 0.0, 2.0),
        ("b.mp4#2-4.5", "second part", 2.0, 4.5),
    ]
    assert {failure.film: failure.reason for failure in found.failures} == {
        "gone.mp4": "film_missing",
        "deep/c.webm#3-1": "bad_times",
    }


def test_captions_file_for_several_folders(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "more"
    other.mkdir()
    (other / "d.mov").write_bytes(b"d")
    (other / "b.mp4").write_bytes(b"another b")
    captions = tmp_path / "all.csv"
    captions.write_text("path,words\nb.mp4,B\nd.mov,D\na.mkv,A\ndeep/c.webm,C\nnobody.mp4,N\n")
    found = discover([folder, other], captions, columns={"file": "path", "caption": "words"})
    assert [(entry.film, entry.source) for entry in found.entries] == [
        *[("a.mkv", "films"), ("b.mp4", "films"), ("b.mp4", "more"), ("d.mov", "more"), ("deep/c.webm", "films")]
    ]
    assert [(failure.film, failure.reason) for failure in found.failures] == [("nobody.mp4", "film_missing")]


def test_limit_counts_films_of_all_kinds(folder: Path) -> None:
    (folder / "b.txt").write_text("B")
    limited = discover(folder).limited(2)
    assert [entry.film for entry in limited.entries] == ["b.mp4"]
    assert [failure.film for failure in limited.failures] == ["a.mkv"]


def test_a_line_said_twice_is_one(folder: Path) -> None:
    (folder / "captions.csv").write_text("file,caption\nb.mp4,B\nb.mp4,B\na.mkv,one\na.mkv,two\n")
    found = discover(folder)
    assert [(entry.film, entry.caption) for entry in found.entries] == [("a.mkv", "one"), ("b.mp4", "B")]
    assert {failure.reason for failure in found.failures} == {"duplicate_name", "no_caption"}


@pytest.mark.parametrize(
    ("source", "captions", "message"),
    [
        ("empty", None, "no films in .*empty; put films there"),
        ("nowhere", None, "source .*nowhere does not exist; name a folder"),
        ("gs:" + "//films", None, "name a folder, s3://BUCKET/PREFIX, a table or a tar"),
        ("films/notes.txt", None, "neither a folder nor a table"),
        ("films", "nowhere.csv", "captions file .*nowhere.csv does not exist; give a"),
        ("films", "columns.csv", "needs the columns file,caption; it has: name, text"),
        ("films", "broken.jsonl", "cannot be read as .jsonl"),
        ("films", "latin.csv", "line 2: it is not UTF-8; save the table as UTF-8"),
        ("films", "words.txt", "words.txt is no table by its name; name it .csv or"),
        ("films", "broken.parquet", "is no Parquet file"),
        ("films", "hole.csv", "line 2: the column file is empty"),
        ("films\udcff", None, r"films\\xff has a name that is not UTF-8"),
    ],
)
def test_mistakes_have_one_line(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, captions: str | None, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("columns.csv").write_text("name,text\na,b\n")
    Path("broken.jsonl").write_text('{"file": ')
    Path("latin.csv").write_bytes("file,caption\nb.mp4,caf\xe9\n".encode("latin-1"))
    Path("broken.parquet").write_bytes(b"not parquet")
    Path("hole.csv").write_text("file,caption\n,C\n")
    Path("words.txt").write_text("file,caption\nb.mp4,B\n")
    with pytest.raises(SourceError, match=message) as caught:
        discover(source, captions)
    assert "\n" not in str(caught.value)


# --- one film once, two films twice ---


def test_a_source_given_twice_is_one(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "captions.csv").write_text("file,caption\nb.mp4,B\na.mkv,A\ndeep/c.webm,C\n")
    (tmp_path / "link").symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    once = discover(folder)
    assert len(once.entries) == 3
    for sources in (["films", folder], [f"{folder}/", "./films"], ["link", "films/"], ["films/../films/."]):
        found = discover(sources)
        assert (found.entries, found.failures) == (once.entries, once.failures)


def test_a_file_of_two_sources_is_one_film(folder: Path) -> None:
    """Nested folders: one of them may know the caption; two captions of one source are a mistake."""
    (folder / "captions.csv").write_text("file,caption\nb.mp4,B\na.mkv,A\n")
    (folder / "deep" / "captions.csv").write_text("file,caption\nc.webm,C\n")
    for sources in ([folder, folder / "deep"], [folder / "deep", folder]):
        found = discover(sources)
        assert {(Path(entry.path), entry.caption) for entry in found.entries} == {
            *[(folder / "a.mkv", "A"), (folder / "b.mp4", "B"), (folder / "deep" / "c.webm", "C")]
        }
        assert found.failures == []


def test_names_that_cannot_be_kept(folder: Path) -> None:
    """A film whose name is not UTF-8, or whose caption has a NUL, fails alone, shown with escapes."""
    (folder / os.fsdecode(b"caf\xe9.mp4")).write_bytes(b"film")
    (folder / "a.txt").write_text("nul\0 inside")
    (folder / "b.txt").write_text("B")
    (folder / "deep" / "c.txt").write_text("C")
    found = discover(folder)
    assert [entry.film for entry in found.entries] == ["b.mp4", "deep/c.webm"]
    assert [(failure.film, failure.reason) for failure in found.failures] == [
        ("a.mkv", "bad_caption"),
        (r"caf\xe9.mp4", "bad_name"),
    ]
    assert all("; " in failure.detail and failure.detail.isprintable() for failure in found.failures)


# --- what lies outside, and what is no film ---


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    (tmp_path / "elsewhere" / "more").mkdir(parents=True)
    (tmp_path / "elsewhere" / "secret.mp4").write_bytes(b"secret")
    (tmp_path / "elsewhere" / "secret.txt").write_text("a secret")
    (tmp_path / "elsewhere" / "more" / "m.mp4").write_bytes(b"more")
    return tmp_path / "elsewhere"


def test_links_out_of_a_folder_are_refused_unless_allowed(folder: Path, elsewhere: Path) -> None:
    (folder / "link.mp4").symlink_to(elsewhere / "secret.mp4")
    (folder / "inside.mp4").symlink_to(folder / "b.mp4")
    (folder / "linked").symlink_to(elsewhere / "more")
    (folder / "again").symlink_to(folder / "deep")
    (folder / "b.txt").symlink_to(elsewhere / "secret.txt")
    found = discover(folder, captions_required=False)
    assert [(failure.film, failure.reason) for failure in found.failures] == [("link.mp4", "outside_source")]
    assert found.failures[0].detail.endswith("give --allow-outside")
    assert [entry.film for entry in found.entries] == ["a.mkv", "b.mp4", "deep/c.webm", "inside.mp4"]
    assert {entry.caption for entry in found.entries} == {""}, "a caption is no way out either"
    assert "the linked folder linked leads out of its source; --allow-outside reads it" in found.notes
    allowed = discover(folder, captions_required=False, allow_outside=True)
    assert allowed.failures == []
    assert {entry.film for entry in allowed.entries} == {
        *(entry.film for entry in found.entries),
        "link.mp4",
        "linked/m.mp4",
    }


def test_linked_folders_that_lead_round_in_circles_end(folder: Path, elsewhere: Path) -> None:
    (folder / "out").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(folder)
    (elsewhere / "round").symlink_to(elsewhere)
    found = discover(folder, captions_required=False, allow_outside=True)
    assert [entry.film for entry in found.entries] == [
        *["a.mkv", "b.mp4", "deep/c.webm", "out/more/m.mp4", "out/secret.mp4"]
    ]


@pytest.mark.parametrize("name", ["../elsewhere/secret.mp4", "link.mp4", "{elsewhere}/secret.mp4"])
def test_a_table_names_nothing_outside_unless_allowed(folder: Path, elsewhere: Path, name: str) -> None:
    name = name.format(elsewhere=elsewhere)
    (folder / "link.mp4").symlink_to(elsewhere / "secret.mp4")
    (folder / "t.csv").write_text(f"file,caption\n{name},S\n../nothing.mp4,N\nb.mp4,B\n")
    found = discover(folder / "t.csv")
    assert [(entry.film, entry.path) for entry in found.entries] == [("b.mp4", str(folder / "b.mp4"))]
    assert {(failure.film, failure.reason) for failure in found.failures} == {
        (name, "outside_source"),
        ("../nothing.mp4", "outside_source"),  # not even whether it is there
    }
    allowed = discover(folder / "t.csv", allow_outside=True)
    assert {entry.film for entry in allowed.entries} == {"b.mp4", name}
    assert [(failure.film, failure.reason) for failure in allowed.failures] == [("../nothing.mp4", "film_missing")]


def test_a_table_of_captions_is_no_way_out(folder: Path, elsewhere: Path) -> None:
    (elsewhere / "captions.csv").write_text("file,caption\nb.mp4,B\n")
    (folder / "captions.csv").symlink_to(elsewhere / "captions.csv")
    with pytest.raises(
        SourceError, match=r"captions\.csv is a link that leads out of its source; name the table itself"
    ):
        discover(folder)
    assert discover(folder, folder / "captions.csv").entries


def test_a_caption_that_is_no_file_or_endless(folder: Path) -> None:
    os.mkfifo(folder / "a.txt")
    (folder / "b.txt").write_text("word " * 100_000)
    found = discover(folder)
    assert [(entry.film, len(entry.caption)) for entry in found.entries] == [("b.mp4", 2**16 - 2**16 % 5 - 1 + 2)]


def test_nothing_is_left_out_in_silence(folder: Path) -> None:
    (folder / "anim.GIF").write_bytes(b"GIF89a")
    (folder / "still.webp").write_bytes(b"RIFF")
    (folder / "more.webp").write_bytes(b"RIFF")
    (folder / "README").write_bytes(b"read me")
    (folder / "gone.mp4").symlink_to(folder / "nowhere.mp4")
    found = discover(folder, captions_required=False)
    assert "anim.GIF" in {entry.film for entry in found.entries}
    assert f"left out of {folder}, no films by their names: .webp 2, no suffix 1" in found.notes
    assert [(failure.film, failure.reason) for failure in found.failures] == [("gone.mp4", "film_missing")]
    assert "a link to nothing" in found.failures[0].detail


def test_a_folder_that_cannot_be_listed_is_said(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed = str(folder / "deep")
    scan = os.scandir

    def scandir(path: str) -> object:
        if str(path) == closed:
            raise PermissionError(13, "Permission denied", closed)
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)
    found = discover(folder, captions_required=False)
    assert [entry.film for entry in found.entries] == ["a.mkv", "b.mp4"]
    assert found.unread == [closed]
    assert any("deep cannot be listed (Permission denied)" in note for note in found.notes)
