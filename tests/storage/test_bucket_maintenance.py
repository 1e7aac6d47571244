"""gc, erase and repair of a lake in a bucket end as those of one in a folder, whatever the server does on the way."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flows.cli import main
from storage.erase import NoSuchFilm, erase
from storage.garbage import collect, find_garbage
from storage.layout import Lake, LakeError
from storage.repair import repair
from storage.shards import ShardReader
from storage.store import read_tagged
from storage.verify import verify_all
from storage.version import list_versions, load, readable_versions
from tests.s3_server import S3Server
from tests.storage.film_lake import Film, publish

_NUMBERS = itertools.count()
FILMS = [Film("a.mp4", "first", "the first of all"), Film("b.mp4", "second", "another film"), Film("c.mp4", "3", "it")]


def make(address: str | Path) -> Lake:
    """Two versions: a film comes, and one goes."""
    lake = Lake.create(address)
    publish(lake, FILMS[:2])
    publish(lake, FILMS[1:])
    return lake


@pytest.fixture(scope="module")
def folder_lake(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("maintained") / "lake").root


@pytest.fixture(scope="module")
def bucket(s3: S3Server) -> str:
    """A bucket with the same lake under `base`."""
    name = f"maintained-{os.getpid()}"
    s3.client.create_bucket(Bucket=name)
    with pytest.MonkeyPatch.context() as patch:
        for variable, value in s3.environment().items():
            patch.setenv(variable, value)
        make(f"s3://{name}/base")
    return name


@pytest.fixture
def lakes(
    s3: S3Server, s3_environment: None, bucket: str, folder_lake: Path, tmp_path: Path
) -> Iterator[tuple[Lake, Lake]]:
    """The same lake in a bucket and in a folder."""
    name = f"lake-{next(_NUMBERS)}"
    for entry in s3.client.list_objects_v2(Bucket=bucket, Prefix="base/")["Contents"]:
        key = name + entry["Key"].removeprefix("base")
        s3.client.copy_object(Bucket=bucket, Key=key, CopySource={"Bucket": bucket, "Key": entry["Key"]})
    yield Lake.open(f"s3://{bucket}/{name}"), Lake.open(shutil.copytree(folder_lake, tmp_path / "lake"))
    s3.heal()


def state(lake: Lake) -> dict[str, Any]:
    keys = [key for key in lake.store.list_keys() if not key.startswith("arrays/")]
    shards = {key: lake.store.read(key) for key in keys if key.startswith("shards/")}
    roots = [load(lake, number).merkle_root for number in list_versions(lake)]
    return {"keys": keys, "shards": shards, "roots": roots, "problems": verify_all(lake)}


def read_all(lake: Lake) -> set[str]:
    """Read every sample of the newest version, as a trainer does: their digests, by which they are cached."""
    readers = [ShardReader(lake, info.name) for info in load(lake).shards]
    return {digest for reader in readers for _, digest in zip(reader, reader.digests, strict=True)}


def test_garbage_goes_and_a_film_is_erased(
    s3: S3Server, lakes: tuple[Lake, Lake], capsys: pytest.CaptureFixture[str]
) -> None:
    bucket, folder = lakes
    for lake in lakes:
        lake.store.write("shards/0123456789abcdef.tar", b"of a run that died")
    assert main(["gc", "--lake", bucket.address, "--keep", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["expired"] == [1], "it only says so"
    assert list_versions(bucket) == [1, 2]
    assert main(["gc", "--lake", bucket.address, "--keep", "1", "--yes"]) == 0
    with folder.writing():
        collect(folder, keep=1)
    assert state(bucket) == state(folder)
    with bucket.writing():
        assert find_garbage(bucket, keep=1).empty
    cached = read_all(bucket)
    assert main(["erase", "b.mp4", "--lake", bucket.address]) == 0
    told = capsys.readouterr().out
    assert "nothing of the film is left in this lake" in told
    gone = cached - read_all(bucket)
    assert gone
    assert f"{len(gone)} samples were taken out of this machine's cache" in told
    cache = bucket.store.cache()
    assert cache is not None
    assert {path.name for path in cache.folder.glob("*/*")} == cached - gone
    with folder.writing():
        assert erase(folder, "b.mp4").complete
    assert state(bucket) == state(folder)
    for lake in lakes:
        with lake.writing(), pytest.raises(NoSuchFilm, match="the name occurs in none"):
            erase(lake, "b.mp4")


def test_an_erasure_that_the_server_stops_is_finished_by_the_next(s3: S3Server, lakes: tuple[Lake, Lake]) -> None:
    bucket, folder = lakes
    s3.fault("PUT .*/versions/", 403, times=1000, skip=1, code="AccessDenied")
    with bucket.writing(), pytest.raises(LakeError, match=r"^[^\n]+$"):
        erase(bucket, "a.mp4")
    s3.heal()
    assert s3.faulted()
    for lake in lakes:
        with lake.writing():
            assert erase(lake, "a.mp4").complete
    assert state(bucket) == state(folder)


def test_damage_is_repaired(lakes: tuple[Lake, Lake]) -> None:
    """A shard with its index, half a shard, and the arrays' newest snapshot."""
    bucket, folder = lakes
    gone, half = sorted({info.name for info in (*load(bucket, 1).shards, *load(bucket).shards)})[:2]
    bucket.store.delete(f"shards/{gone}")
    bucket.store.delete(f"shards/{gone.replace('.tar', '.index.json')}")
    bucket.store.write(f"shards/{half}", bucket.store.read(f"shards/{half}")[:3000])
    for count, damage in ((2, None), (1, f"arrays/snapshots/{load(bucket).snapshot}")):
        if damage:
            bucket.store.delete(damage)
        with bucket.writing():
            done = repair(bucket)
        assert (done.problems, len(done.repaired)) == ([], count), done.lines()
    found, expected = state(bucket), state(folder)
    assert [found[name] for name in ("shards", "roots")] == [expected[name] for name in ("shards", "roots")]
    assert set(map(len, found["problems"].values())) == {0}


def test_version_files_are_read_once(s3: S3Server, lakes: tuple[Lake, Lake]) -> None:
    bucket, _ = lakes
    cache_clear = read_tagged.__globals__["_remembered"].cache_clear
    cache_clear()
    s3.requests()
    for _ in range(3):
        versions, problems = readable_versions(bucket)
    assert ([version.number for version in versions], problems) == ([2, 1], [])
    asked = s3.requests()
    assert [sum(f"/versions/{number}.json" in line for line in asked) for number in (1, 2)] == [1, 1]
    assert len(asked) == 5, "and three listings"
    bucket.store.write("versions/1.json", b"{}")
    assert "1.json is damaged" in readable_versions(bucket)[1][0], "what is put anew is read anew"
