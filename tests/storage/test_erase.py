"""Erasure: nothing of a film is left, by a search that is not the code's own, and everything else is as it was."""

from __future__ import annotations

import io
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from storage import staging
from storage.erase import Erasure, NoSuchFilm, erase
from storage.failures import read_failures
from storage.layout import Lake
from storage.search import Needles, search
from storage.shards import ShardReader
from storage.verify import verify
from storage.version import list_versions, load, read_manifest
from tests.storage.film_lake import RECIPE, Film, publish

SEA = Film("trips/sea.mp4", "sea", "waves roll onto a beach", 3)
COPY = Film("copies/the same sea.mp4", "sea", "a copy of it", 1)
OLD_SEA = Film("trips/sea.mp4", "old sea", "waves roll onto a beach", 2)
BALL = Film("ball.mp4", "ball", "a red ball", 2)
NEAR = Film("ball.mp4.mp4", "near", "a red ball bounces", 2)
PART = Film("long.mkv#0-4", "long", "a walk", 2)
OTHER_PART = Film("long.mkv#4-8", "long", "a run", 2)
FAILED = Film("broken/bad film.avi", "bad", "nobody sees it")
GATED = Film("gated.mp4", "gated film", "too dark", 1)


@pytest.fixture(scope="session")
def grown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A lake of four versions, two recipes, a twin, parts, a failed and a rejected film, and a staged block."""
    lake = Lake.create(tmp_path_factory.mktemp("grown") / "lake")
    publish(lake, [OLD_SEA, BALL], failed=[FAILED])
    publish(lake, [SEA, BALL, NEAR], rejected=[GATED])
    publish(lake, [SEA, BALL, COPY, PART], {**RECIPE, "rate": 8})
    publish(lake, [SEA, BALL, NEAR, COPY, PART, OTHER_PART], failed=[FAILED])
    for film in (SEA, BALL):
        clips = [
            {
                "film": film.name,
                "clip_id": film.clip_id(7, RECIPE),
                "caption": film.caption,
                "film_id": film.sha256[:16],
            }
        ]
        staging.write_block(lake, f"staged{film.content}", {"latents": np.zeros(3)}, {"clips": clips})
    return lake.root


@pytest.fixture
def lake(grown: Path, tmp_path: Path) -> Lake:
    return Lake.open(shutil.copytree(grown, tmp_path / "lake"))


def everything(lake: Lake) -> bytes:
    """All bytes of the lake, tables as text, archives opened: read without the code under test."""
    parts = []
    for path in sorted(lake.root.rglob("*")):
        if path.is_file():
            data = path.read_bytes()
            parts += [str(path.relative_to(lake.root)).encode(), data]
            if path.suffix == ".parquet":
                parts.append(repr(pq.read_table(path).to_pylist()).encode())
            elif path.suffix == ".npz":
                with zipfile.ZipFile(io.BytesIO(data)) as archive:
                    parts += [archive.read(name) for name in archive.namelist()]
    return b"\0".join(parts)


def clips_of(lake: Lake, *films: Film) -> set[str]:
    """Ids of the films' clips, of both recipes."""
    recipes = (RECIPE, {**RECIPE, "rate": 8})
    return {film.clip_id(k, recipe) for film in films for recipe in recipes for k in range(film.clips)}


def samples(lake: Lake, number: int) -> dict[str, dict[str, bytes]]:
    found = {}
    for info in load(lake, number).shards:
        for sample in ShardReader(lake, info.name):
            arrays = {name: value.tobytes() for name, value in sample.items() if name.endswith(".npy")}
            found[sample["__key__"]] = arrays | {"json": repr(sample["clip.json"]).encode()}
    return found


def erased(lake: Lake, film: str) -> Erasure:
    with lake.writing():
        return erase(lake, film)


@pytest.mark.parametrize(
    ("asked", "films"),
    [
        ("trips/sea.mp4", (SEA, OLD_SEA, COPY)),
        ("ball.mp4", (BALL,)),
        ("long.mkv", (PART, OTHER_PART)),
        ("gated.mp4", (GATED,)),
    ],
)
def test_nothing_of_an_erased_film_is_left(lake: Lake, asked: str, films: tuple[Film, ...]) -> None:
    before = {number: samples(lake, number) for number in list_versions(lake)}
    roots = {number: load(lake, number).merkle_root for number in before}
    done = erased(lake, asked)
    assert done.complete, done.lines()
    left = everything(lake)
    gone = clips_of(lake, *films)
    for needle in gone | {film.sha256[:16] for film in films}:
        assert needle.encode() not in left
    kept_names = {row["film"] for n in before for row in read_manifest(lake, load(lake, n), "films").to_pylist()}
    for film in films:
        if film.name not in kept_names:
            quoted = [f"{mark}{film.name}{mark}".encode() for mark in "'\""]
            assert not any(form in left for form in [*quoted, f"/films/{film.name}'".encode()])
            assert f"{film.caption}'".encode() not in left
    for number in before:
        version = load(lake, number)
        assert verify(lake, version) == []
        now = samples(lake, number)
        assert now == {clip: sample for clip, sample in before[number].items() if clip not in gone}
        told = next((it for it in done.versions if it.number == number), None)
        assert (version.merkle_root != roots[number]) == (now != before[number])
        if now != before[number]:
            assert told is not None
            assert (told.root_before, told.root) == (roots[number], version.merkle_root)
            assert version.extra["erasures"][0]["merkle_root"] == roots[number]
    assert lake.store.size("maintenance.json") is None


def test_what_other_films_share_stays_and_is_said(lake: Lake) -> None:
    done = erased(lake, COPY.sha256[:16])
    assert set(done.films) == {SEA.name, COPY.name}
    assert done.shared_names == (SEA.name,), "version 1 has another content by this name"
    assert done.shared_captions == (SEA.caption,)
    assert SEA.name in read_manifest(lake, load(lake, 1), "films").column("film").to_pylist()
    assert lake.store.list_keys("staging/") == ["staging/stagedball.npz"]


def test_failure_tables_keep_the_other_rows(lake: Lake) -> None:
    erased(lake, FAILED.name)
    assert read_failures(lake, "20260101T000000Z-abcdef") == []
    with pytest.raises(
        NoSuchFilm, match=r"has no film 'broken/bad film.avi' \(\d+ files were searched, the name occurs in none"
    ):
        erased(lake, FAILED.name)


def test_a_lake_goes_on_after_an_erasure(lake: Lake) -> None:
    erased(lake, "/films/ball.mp4")
    publish(lake, [SEA, BALL, NEAR])
    for number in list_versions(lake):
        assert verify(lake, load(lake, number)) == []
    assert len(read_manifest(lake, load(lake, 5))) == SEA.clips + BALL.clips + NEAR.clips


def test_a_version_may_become_empty(tmp_path: Path) -> None:
    lake = Lake.create(tmp_path / "lake")
    publish(lake, [BALL])
    assert erased(lake, "ball.mp4").complete
    assert verify(lake, load(lake)) == []
    publish(lake, [NEAR])
    assert verify(lake, load(lake)) == []


def test_the_search_finds_what_is_hidden(lake: Lake) -> None:
    """What no version names and no erasure knows of, at the seam of two pieces that are read, in any spelling."""
    needles = Needles(
        frozenset({"0123456789abcdef"}), frozenset({"a film über alles.mp4", "x.mp4"}), frozenset({"x.mp4 of others"})
    )
    hidden = {
        "id": b"\0" * ((4 << 20) - 9) + b"0123456789abcdef0000",
        "utf8": b"\0" * ((4 << 20) - 9) + "a film über alles.mp4".encode(),
        "json": b'{"film": "a film \\u00fcber alles.mp4"}',
        "short": b'{"film":"x.mp4"}',
    }
    innocent = {
        "part": b'{"film":"xx.mp4"}',
        "other": b"x.mp4 of others",
        "digits": b"0123456789abcde",
        "bytes": bytes(9 << 20),
    }
    for name, data in {**hidden, **innocent}.items():
        lake.store.write(f"hidden/{name}.bin", data)
    assert search(lake, needles).found == tuple(sorted(f"hidden/{name}.bin" for name in hidden))


def test_words_are_taken_out_of_sentences() -> None:
    needles = Needles(frozenset({"0123456789abcdef"}), frozenset({"x.mp4", "a long name.mp4"}), frozenset())
    told = "the same film as x.mp4; not y/x.mp4, a long name.mp4 is 0123456789abcdef99"
    assert needles.redacted(told) == "the same film as (erased); not y/x.mp4, (erased) is (erased)"
