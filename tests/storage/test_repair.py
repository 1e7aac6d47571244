"""Repair: each kind of damage, alone and together, made good bit for bit, or named with what can be done."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from storage.arrays import read_clips
from storage.layout import Lake, LakeError
from storage.repair import Repair, repair
from storage.shards import ShardReader
from storage.verify import verify
from storage.version import list_versions, load
from tests.storage.film_lake import RECIPE, Film, publish

FILMS = [Film(f"film-{number}.mp4", f"content {number}", f"caption {number % 3}", 3) for number in range(4)]
MOVED = Film("moved/film-0.mp4", "content 0", "caption 0", 3)


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A lake of three versions: a film was renamed in the second and left in the third, so a shard was copied."""
    lake = Lake.create(tmp_path_factory.mktemp("whole") / "lake")
    publish(lake, FILMS[:2])
    publish(lake, [MOVED, *FILMS[1:]])
    publish(lake, [MOVED, *FILMS[2:]])
    return lake.root


@pytest.fixture
def lake(whole: Path, tmp_path: Path) -> Lake:
    return Lake.open(shutil.copytree(whole, tmp_path / "lake"))


def repaired(lake: Lake, *give_up: int) -> Repair:
    with lake.writing():
        return repair(lake, give_up)


def shard_bytes(lake: Lake) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(lake.shards.iterdir())}


def missing(path: Path) -> None:
    path.unlink()


def torn(path: Path) -> None:
    os.truncate(path, path.stat().st_size * 2 // 3)


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    for place in range(600, len(data), 5000):
        data[place] ^= 0x41
    path.write_bytes(data)


DAMAGE = {"missing": missing, "torn": torn, "flipped": flipped}


@pytest.mark.parametrize(("damage", "index_too"), [("missing", True), ("torn", False), ("flipped", False)])
def test_shards_come_back_bit_for_bit(lake: Lake, damage: str, index_too: bool) -> None:
    before = shard_bytes(lake)
    for path in sorted(lake.shards.glob("*.tar")):
        DAMAGE[damage](path)
        if index_too:
            path.with_suffix("").with_suffix(".index.json").unlink()
    done = repaired(lake)
    assert (done.problems, len(done.repaired)) == ([], len(list(lake.shards.glob("*.tar"))))
    assert shard_bytes(lake) == before


def test_indexes_come_back_from_their_tars(lake: Lake) -> None:
    before = shard_bytes(lake)
    for path, damage in zip(sorted(lake.shards.glob("*.index.json")), DAMAGE.values(), strict=False):
        damage(path)
    assert repaired(lake).problems == []
    assert shard_bytes(lake) == before
    assert repaired(lake).lines() == ["nothing is damaged"]


def arrays_gone(lake: Lake) -> None:
    shutil.rmtree(lake.arrays)


def some(folder: str, damage: Callable[[Path], None]) -> Callable[[Lake], None]:
    def work(lake: Lake) -> None:
        for path in sorted((lake.arrays / folder).iterdir())[::2]:
            damage(path)

    return work


def newest_snapshot(lake: Lake) -> None:
    (lake.arrays / "snapshots" / load(lake).snapshot).unlink()


def old_snapshot(lake: Lake) -> None:
    (lake.arrays / "snapshots" / load(lake, 1).snapshot).write_bytes(b"nothing")


ARRAYS = {
    "gone": arrays_gone,
    "chunks missing": some("chunks", missing),
    "chunks flipped": some("chunks", flipped),
    "newest snapshot": newest_snapshot,
    "old snapshot": old_snapshot,
}


@pytest.mark.parametrize("damage", ARRAYS.values(), ids=ARRAYS)
def test_arrays_come_back_from_the_shards(lake: Lake, damage: Callable[[Lake], None]) -> None:
    roots = [load(lake, number).merkle_root for number in list_versions(lake)]
    clips = {}
    for number in list_versions(lake):
        version = load(lake, number)
        stored = read_clips(lake, version.snapshot, version.group)
        clips[number] = {clip: stored["latents"][row].tobytes() for row, clip in enumerate(stored["clip_id"])}
    damage(lake)
    done = repaired(lake)
    assert (done.problems, len(done.repaired)) == ([], 1), done.lines()
    for number in list_versions(lake):
        version = load(lake, number)
        assert verify(lake, version) == []
        stored = read_clips(lake, version.snapshot, version.group)
        now = {clip: stored["latents"][row].tobytes() for row, clip in enumerate(stored["clip_id"])}
        assert clips[number].items() <= now.items()
    assert [load(lake, number).merkle_root for number in list_versions(lake)] == roots


def test_both_stores_damaged_in_different_places(lake: Lake) -> None:
    """A torn shard is filled from the arrays, whose damaged chunks are filled from the other shards."""
    before = shard_bytes(lake)
    torn(sorted(lake.shards.glob("*.tar"))[0])
    (lake.texts / "builtin-clip-empty.npy").unlink()
    assert repaired(lake).problems == []
    assert shard_bytes(lake) == before


def test_what_neither_store_has_is_named(lake: Lake) -> None:
    for path in lake.shards.glob("*.tar"):
        path.unlink()
    arrays_gone(lake)
    done = repaired(lake)
    assert done.repaired == []
    told = "\n".join(done.problems)
    assert told.count("cannot be made again") == len(list(lake.shards.glob("*.index.json"))) + 1
    assert "\n" not in done.problems[0]


def test_latents_that_no_shard_has_are_named(tmp_path: Path) -> None:
    lake = Lake.create(tmp_path / "lake")
    publish(lake, FILMS[:2], {**RECIPE, "store_latents": False})
    arrays_gone(lake)
    done = repaired(lake)
    assert len(done.problems) == 6
    assert all("its latents are lost" in line for line in done.problems)
    publish(lake, FILMS, {**RECIPE, "store_latents": False})
    assert verify(lake, load(lake)) == []


def test_a_version_file_and_a_table_are_named(lake: Lake) -> None:
    (lake.versions / "1.json").write_text("{}")
    table = lake.root / load(lake).manifest["films"]["path"]
    data = table.read_bytes()
    table.write_bytes(b"none")
    done = repaired(lake)
    assert len(done.problems) == 2
    assert "--give-up 1" in done.problems[0]
    assert "3-films.parquet: wrong checksum" in done.problems[1]
    table.write_bytes(data)
    with pytest.raises(LakeError, match="version 2 is not damaged"):
        repaired(lake, 2)
    done = repaired(lake, 1)
    assert (done.problems, list_versions(lake)) == ([], [2, 3])


def test_a_sample_altered_on_both_sides_of_nothing(lake: Lake) -> None:
    """An altered sample whose index was made to fit is not what the version published: it is made again."""
    shard = sorted(lake.shards.glob("*.tar"))[0]
    before = shard.read_bytes()
    flipped(shard)
    reader = ShardReader(lake, shard.name)
    assert reader.verify() != []
    repaired(lake)
    assert shard.read_bytes() == before
