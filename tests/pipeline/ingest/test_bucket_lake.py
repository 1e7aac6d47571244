"""Lakes in a bucket: the same dataset as in a folder, whatever the bucket's server answers on the way."""

from __future__ import annotations

import itertools
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from flows.cli import main
from model.training.data import Clips, lake_and_version
from storage.layout import Lake, LakeBusy, LakeError
from storage.repository import collect_garbage
from storage.s3_client import BucketError
from storage.shards import ShardReader
from storage.verify import verify
from storage.version import list_versions, load
from tests.pipeline.conftest import Film, make_scene
from tests.pipeline.ingest.in_process import NoWork, make
from tests.s3_server import S3Server

_NUMBERS = itertools.count()


@pytest.fixture
def address(s3: S3Server, s3_environment: None) -> Iterator[str]:
    """Where a lake can be made in a bucket."""
    name = f"lakes-{os.getpid()}-{next(_NUMBERS)}"
    s3.client.create_bucket(Bucket=name)
    yield f"s3://{name}/a lake"
    s3.heal()


@pytest.fixture(scope="module")
def one_film(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder with one film, and the Merkle root of a run without errors."""
    folder = tmp_path_factory.mktemp("one")
    make_scene(folder / "films" / "a.mp4", rate="10", seconds=2)
    (folder / "films" / "a.txt").write_text("a picture")
    make(folder / "films", folder / "lake")
    return folder / "films", root(folder / "lake")


def root(address: str | Path) -> str:
    lake = Lake.open(address)
    version = load(lake)
    assert verify(lake, version) == []
    return version.merkle_root


def test_a_lake_in_a_bucket_is_made_refreshed_and_read(
    s3: S3Server, address: str, scene: Film, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "films"
    for name in ("a", "b"):
        scene(folder / f"{name}.mp4", rate="10", seconds=2 if name == "a" else 3)
        (folder / f"{name}.txt").write_text("a picture")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first = make(folder, address)
    assert first.published, first.lines()
    make(folder, tmp_path / "lake")
    assert load(Lake.open(address)).merkle_root == load(Lake.open(tmp_path / "lake")).merkle_root
    scene(folder / "d.mp4", rate="12", seconds=2)
    (folder / "d.txt").write_text("a fourth picture")
    second, other = make(folder, address), make(folder, tmp_path / "lake")
    assert (second.version, second.clips) == (other.version, other.clips)
    assert make(folder, address, runner=NoWork()).version == 2, "nothing is new"
    lake = Lake.open(address)
    assert lake.address == address
    assert lake.store.list_keys("staging/") == []
    with lake.writing():
        collect_garbage(lake)
    assert load(lake).merkle_root == root(tmp_path / "lake")
    for words, expected in (
        (["inspect", "--lake", address], f"version 2 of {address}"),
        (["verify", "--lake", address], f"version 2 of {address} is whole"),
        (["ingest", str(folder), "--lake", address, "--recipe", "linear", "--plan"], "films"),
    ):
        assert main(words) == 0
        assert expected in capsys.readouterr().out


def test_clips_come_through_the_cache(
    s3: S3Server, address: str, one_film: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(one_film[0], address)
    clips = Clips(*lake_and_version(address, None))
    found = [clip.clip_id for clip in clips.every()]
    s3.requests()
    again = Clips(*lake_and_version(address, None))
    assert [clip.clip_id for clip in again.every()] == found
    asked = [line for line in s3.requests() if "/shards/" in line]
    assert asked
    assert not [line for line in asked if line.startswith("GET") and line.endswith(".tar")], "no shard is read again"
    monkeypatch.setenv("VLFM_CACHE", str(tmp_path / "another"))
    s3.requests()
    assert len(list(Clips(*lake_and_version(address, None)).every())) == len(found)
    reads = [line for line in s3.requests() if line.startswith("GET") and line.endswith(".tar")]
    assert len(reads) == len(found), "one request a sample"


def test_damage_in_the_bucket_is_found_behind_the_cache(s3: S3Server, address: str, one_film: tuple[Path, str]) -> None:
    make(one_film[0], address)
    lake, version = lake_and_version(address, None)
    list(Clips(lake, version).every())
    name = version.shards[0].name
    data = bytearray(lake.store.read(f"shards/{name}"))
    data[ShardReader(lake, name)._entries[0]["members"]["coefficients.npy"][0] + 130] ^= 1
    bucket = address.split("/")[2]
    s3.client.put_object(Bucket=bucket, Key=f"a lake/shards/{name}", Body=bytes(data))
    problems = verify(lake, version)
    assert any("are damaged (wrong checksum)" in line for line in problems), problems


def test_two_ingests_at_once_are_one(address: str, one_film: tuple[Path, str]) -> None:
    with Lake.create(address).writing(), pytest.raises(LakeBusy, match=r"is in use by process \d+; wait until"):
        make(one_film[0], address)
    assert list_versions(Lake.open(address)) == []


@pytest.mark.parametrize(
    ("step", "after"),
    [
        ("/staging/", False), ("/shards/.*json$", True), ("lake/manifests/", False), ("/versions/", True),
    ],
)  # fmt: skip
def test_a_server_that_fails_at_any_step_costs_a_second_run(
    s3: S3Server, address: str, one_film: tuple[Path, str], step: str, after: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every put of the step is refused, or done and its answer lost: the next run is whole."""
    films, straight = one_film
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    Lake.create(address)
    s3.fault(f"PUT .*{step}", 500, times=1000, after=after)
    with pytest.raises(LakeError, match=r"^[^\n]+$"):
        make(films, address)
    s3.heal()
    monkeypatch.delenv("AWS_MAX_ATTEMPTS")
    s3.fault("PUT .*/(arrays|texts)/", 503, times=2)
    make(films, address)
    assert root(address) == straight
    # A version file that was put although its answer was lost is a version: the first run published it.
    assert len(list_versions(Lake.open(address))) == 1


def test_where_no_lake_can_be(s3: S3Server, address: str) -> None:
    bucket = address.split("/")[2]
    with pytest.raises(LakeError, match=r"is no lake .*make a lake with: vlfm ingest SOURCE --lake s3:"):
        Lake.open(address)
    assert not Lake.exists(address)
    s3.client.put_object(Bucket=bucket, Key="a lake/film.mp4", Body=b"x")
    with pytest.raises(LakeError, match="holds other objects and is no lake; name a new or an empty prefix"):
        Lake.create(address)
    for work in (Lake.open, Lake.create, Lake.exists):
        with pytest.raises(BucketError, match="does not exist; create it, or correct its name"):
            work(address.replace(bucket, f"no-{bucket}"))
