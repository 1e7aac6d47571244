"""Films in buckets and in tars: found, fetched once in bounded space, and known again."""

from __future__ import annotations

import dataclasses
import io
import itertools
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from flows.cli import main
from pipeline.sources.fetch import FilmChanged, as_file, stamp_of
from pipeline.sources.folders import SourceError, discover
from storage.s3_client import BucketError
from tests.pipeline.ingest.in_process import NoWork, make, rows, sound
from tests.s3_server import ROOT, S3Server

_NUMBERS = itertools.count()


@pytest.fixture
def bucket(s3: S3Server, s3_environment: None) -> str:
    name = f"films-{os.getpid()}-{next(_NUMBERS)}"
    s3.client.create_bucket(Bucket=name)
    return name


def put(s3: S3Server, bucket: str, **objects: bytes) -> None:
    for name, data in objects.items():
        s3.client.put_object(Bucket=bucket, Key=name, Body=data)


def tar_of(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            about = tarfile.TarInfo(name)
            about.size = len(data)
            tar.addfile(about, io.BytesIO(data))
    return path


def test_a_bucket_is_looked_through(s3: S3Server, bucket: str) -> None:
    """Captions from its table, from beside the films, and odd names; films are not fetched."""
    put(s3, bucket, **{
        "in/a.mp4": b"film a", "in/deep/b [x] #1 %20.mkv": b"film b", "in/c//d.mp4": b"film d", "in/none.webm": b"film",
        "in/.hidden.mp4": b"x", "in/folder/": b"", "in/notes.pdf": b"x", "in/a.txt": b"not this one",
        "in/deep/b [x] #1 %20.txt": b"Caption\n of b.", "in/c//d.txt": b"D",
        "in/captions.csv": b"file,caption\na.mp4,Caption of a\nabsent.mp4,N\n../out.mp4,N\n", "input.mp4": b"another",
    })  # fmt: skip
    url = f"s3://{bucket}/in"
    s3.requests()
    found = discover(f"{url}/")
    assert [(entry.film, entry.caption) for entry in found.entries] == [
        ("a.mp4", "Caption of a"), ("c//d.mp4", "D"), ("deep/b [x] #1 %20.mkv", "Caption of b."),
    ]  # fmt: skip
    assert {(failure.film, failure.reason) for failure in found.failures} == {
        ("absent.mp4", "film_missing"), ("none.webm", "no_caption"), ("../out.mp4", "film_missing"),
    }  # fmt: skip
    assert found.notes == [
        f"left out of {url}, no films by their names: .pdf 1",
        f"captions: {url}/captions.csv",
    ]
    assert not [line for line in s3.requests() if line.startswith("GET") and line.endswith((".mp4", ".mkv", ".webm"))]
    entry = found.entries[0]
    assert (entry.path, entry.bytes, entry.source, entry.origin) == (f"{url}/a.mp4", 6, "in", url)
    put(s3, bucket, **{"in/a.mp4": b"film a"})
    again = discover(url)
    assert again.entries == found.entries, "put again, nothing has changed"
    texts = [line for line in s3.requests() if line.startswith("GET") and line.endswith((".txt", ".csv"))]
    assert texts == [], "what has not changed is not fetched again"


def test_tables_in_buckets_and_of_buckets(s3: S3Server, bucket: str, tmp_path: Path) -> None:
    table = b"file,caption,start,end\na.mp4,First,0,2\na.mp4,Second,2,\n"
    put(s3, bucket, **{"in/a.mp4": b"film a", "in/b.mp4": b"film b", "in/t.csv": table})
    found = discover(f"s3://{bucket}/in/t.csv")
    assert [(entry.film, entry.caption) for entry in found.entries] == [("a.mp4#0-2", "First"), ("a.mp4#2-", "Second")]
    assert [entry.path for entry in found.entries] == [f"s3://{bucket}/in/a.mp4"] * 2
    (tmp_path / "t.csv").write_bytes(table)
    for captions in (tmp_path / "t.csv", f"s3://{bucket}/in/t.csv"):
        both = discover(f"s3://{bucket}/in", captions)
        assert both.entries == [dataclasses.replace(entry, origin=f"s3://{bucket}/in") for entry in found.entries]
        assert [failure.reason for failure in both.failures] == ["no_caption"]
    put(s3, bucket, **{"k/x_000001_000002.mp4": b"f", "k/k.csv": b"label,youtube_id,time_start,time_end\nrun,x,1,2\n"})
    (entry,) = discover(f"s3://{bucket}/k/k.csv", table_format="kinetics").entries
    assert (entry.film, entry.caption) == ("x_000001_000002.mp4", "run")


def test_mistakes(s3: S3Server, bucket: str) -> None:
    put(s3, bucket, **{"in/a.mp4": b"film"})
    url = f"s3://{bucket}/in"
    for source, error, message in (
        (f"s3://{bucket}/none", SourceError, "no films in s3:.*put films there"),
        (f"s3://{bucket}/in/a.mp4", SourceError, "is a film by its name; name the prefix that it is in"),
        (f"s3://{bucket}/in/absent.csv", SourceError, "does not exist; name a prefix with films"),
        (
            url.replace(bucket, f"no-{bucket}"),
            BucketError,
            rf"bucket 'no-{bucket}' \(127.0.0.1:\d+\) does not exist; create it",
        ),
        ("s3:" + f"//KEY:hunter2@{bucket}/in", SourceError, "a source holds no credentials"),
    ):
        with pytest.raises(error, match=message) as caught:
            discover(source)
        assert "\n" not in str(caught.value)
        assert "hunter2" not in str(caught.value)


def test_a_film_is_fetched_once_and_within_the_limit(
    s3: S3Server, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLFM_CACHE_SIZE", "25kB")
    put(s3, bucket, **{f"in/{name}.mp4": name.encode() * 10_000 for name in "abcd"})
    entries = {entry.film[0]: entry for entry in discover(f"s3://{bucket}/in", captions_required=False).entries}

    def read(name: str) -> bytes:
        entry = entries[name]
        with as_file(entry.path, entry.bytes, entry.modified_ns) as path:
            assert sum(file.stat().st_size for file in path.parent.iterdir()) <= 25_000
            return path.read_bytes()

    def fetched() -> int:
        return sum(line.endswith(".mp4") for line in s3.requests() if line.startswith("GET"))

    s3.requests()
    assert [read(name) for name in "aab"] == [b"a" * 10_000, b"a" * 10_000, b"b" * 10_000]
    assert fetched() == 2
    entry = entries["a"]
    with as_file(entry.path, entry.bytes, entry.modified_ns) as held:
        for name in "bcd":
            read(name)
        assert held.read_bytes() == b"a" * 10_000, "a film in use stays"
    assert fetched() == 2
    assert read("a") == b"a" * 10_000
    put(s3, bucket, **{"in/a.mp4": b"z" * 10_000})
    read("b"), read("c")
    with pytest.raises(FilmChanged, match="changed during the run; run the command again"):
        read("a")
    s3.client.delete_object(Bucket=bucket, Key="in/d.mp4")
    read("b"), read("c")
    with pytest.raises(FilmChanged, match="run the command again"):
        read("d")
    assert not list((tmp_path / "cache" / "films").glob("..*")), "nothing half done stays"


def test_processes_share_what_they_fetch(s3: S3Server, bucket: str) -> None:
    put(s3, bucket, **{"in/a.mp4": b"a" * 300_000})
    (entry,) = discover(f"s3://{bucket}/in", captions_required=False).entries
    s3.fault("GET .*a.mp4", 0, delay=0.5)
    s3.requests()
    program = (
        "import sys; from pipeline.sources.fetch import as_file\n"
        "with as_file(sys.argv[1], 300_000, int(sys.argv[2])) as path: assert path.read_bytes() == b'a' * 300_000"
    )
    command = [sys.executable, "-c", program, entry.path, str(entry.modified_ns)]
    assert [process.wait(60) for process in [subprocess.Popen(command, cwd=ROOT) for _ in range(3)]] == [0, 0, 0]
    assert sum(line.endswith("a.mp4") for line in s3.requests() if line.startswith("GET")) == 1


def test_tars(tmp_path: Path) -> None:
    """WebDataset's keys: captions in `key.txt` or `key.json`; a tar in a folder, and one as the source."""
    tar = tar_of(tmp_path / "films" / "shard-000.tar", {
        "000.mp4": b"film 0", "000.txt": b"Zero.", "000.json": b'{"caption": "not this"}',
        "sub/001.mp4": b"film 1", "sub/001.json": b'{"video": "x", "caption": "One, \\n really."}',
        "002.mp4": b"film 2", "002.json": b"not json", "003.mkv": b"film 3",
        "003.json": b'{"text": "T"}', "004.jpg": b"x",
    })  # fmt: skip
    (tmp_path / "films" / "a.mp4").write_bytes(b"film a")
    (tmp_path / "films" / "a.txt").write_text("A")
    found = discover(tmp_path / "films")
    assert [(entry.film, entry.caption) for entry in found.entries] == [
        ("a.mp4", "A"), ("shard-000.tar/000.mp4", "Zero."), ("shard-000.tar/003.mkv", "T"),
        ("shard-000.tar/sub/001.mp4", "One, really."),
    ]  # fmt: skip
    assert [(failure.film, failure.reason) for failure in found.failures] == [("shard-000.tar/002.mp4", "no_caption")]
    assert found.notes == ["left out of shard-000.tar, no films by their names: 1 members"]
    alone = discover(tar)
    assert [(entry.path, entry.bytes) for entry in alone.entries] == [
        (f"{tar}!/000.mp4", 6), (f"{tar}!/003.mkv", 6), (f"{tar}!/sub/001.mp4", 6)
    ]  # fmt: skip
    torn = tmp_path / "torn.tar"
    torn.write_bytes(tar.read_bytes()[:3000])
    assert [entry.film for entry in discover(torn, captions_required=False).entries] == ["torn.tar/000.mp4"]
    (tmp_path / "no.tar").write_bytes(b"no tar at all")
    with pytest.raises(SourceError, match="is no plain tar"):
        discover(tmp_path / "no.tar")


def test_films_of_a_tar_are_files_while_they_are_used(
    s3: S3Server, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tar = tar_of(tmp_path / "x.tar", {"a.mp4": b"film a", "b.mp4": b"film b"})
    put(s3, bucket, **{"in/x.tar": tar.read_bytes()})
    for source in (tar, f"s3://{bucket}/in/x.tar", f"s3://{bucket}/in"):
        for entry in discover(source, captions_required=False).entries:
            with as_file(entry.path, entry.bytes, entry.modified_ns) as path:
                assert path.read_bytes() == f"film {entry.film[-5]}".encode()
    entry = discover(tar, captions_required=False).entries[0]
    monkeypatch.setenv("VLFM_CACHE", str(tmp_path / "another"))
    os.utime(tar)
    with pytest.raises(FilmChanged), as_file(entry.path, entry.bytes, entry.modified_ns):
        pass


def test_a_bucket_and_a_tar_are_ingested_and_known_again(
    s3: S3Server, bucket: str, scene: object, tmp_path: Path
) -> None:
    """The same clips as from a folder; a film put again is not new, a renamed one is renamed, a changed one is made."""
    folder = tmp_path / "films"
    for name, rate in (("a", "10"), ("b", "12")):
        scene(folder / f"{name}.mp4", rate=rate, seconds=2)
        (folder / f"{name}.txt").write_text(f"picture {name}")
    objects = {f"in/{file.name}": file.read_bytes() for file in folder.iterdir()}
    put(s3, bucket, **objects)
    lake, url = tmp_path / "lake", f"s3://{bucket}/in"
    first = make(url, lake)
    assert (first.version, first.films.done) == (1, 2), first.lines()
    make(folder, tmp_path / "local")
    ids = sorted(row["clip_id"] for row in rows(lake))
    assert ids == sorted(row["clip_id"] for row in rows(tmp_path / "local"))
    sound(lake)
    put(s3, bucket, **objects)
    s3.requests()
    assert make(url, lake, runner=NoWork()).films.unchanged == 2
    assert not [line for line in s3.requests() if line.startswith("GET") and line.endswith(".mp4")]
    for suffix in ("mp4", "txt"):
        s3.client.delete_object(Bucket=bucket, Key=f"in/b.{suffix}")
    put(s3, bucket, **{"in/c.mp4": objects["in/b.mp4"], "in/c.txt": objects["in/b.txt"]})
    moved = make(url, lake, runner=NoWork())
    assert sorted(row["film"] for row in rows(lake, table="films")) == ["a.mp4", "c.mp4"], moved.lines()
    fetched = list((tmp_path / "cache" / "films").glob("*.mp4"))
    assert main(["erase", "a.mp4", "--lake", str(lake)]) == 0
    left = list((tmp_path / "cache" / "films").glob("*.mp4"))
    assert {path.name[25:] for path in set(fetched) - set(left)} == {"a.mp4"}, "it leaves this machine, too"
    assert left
    tar = tar_of(tmp_path / "shard.tar", {name.removeprefix("in/"): data for name, data in objects.items()})
    packed = make(tar, tmp_path / "of-tar")
    assert packed.films.done == 2, packed.lines()
    assert sorted(row["clip_id"] for row in rows(tmp_path / "of-tar")) == ids
    assert make(tar, tmp_path / "of-tar", runner=NoWork()).films.unchanged == 2
    assert stamp_of('"etag"') == stamp_of('"etag"') != stamp_of('"other"')
