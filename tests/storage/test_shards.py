from __future__ import annotations

import io
import json
import os
import pickle
import re
import subprocess
import sys
import tarfile
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from storage.change import orphans
from storage.fingerprint import file_digest
from storage.layout import DiskFull, Lake, LakeError
from storage.shards import DamagedShard, ShardInfo, ShardReader, rebuild_index, write_shard


@pytest.fixture
def samples(sample_lake: ModuleType) -> list[dict[str, Any]]:
    return [sample_lake.sample(sample_lake.clip(number)) for number in range(3)]


@pytest.fixture
def shard(lake: Lake, samples: list[dict[str, Any]]) -> Path:
    write_shard(lake, "block.tar", samples)
    return lake.shards / "block.tar"


def opened(shard: Path) -> ShardReader:
    return ShardReader(Lake.open(shard.parent.parent), shard.name)


def rebuild(shard: Path) -> ShardInfo:
    return rebuild_index(Lake.open(shard.parent.parent), shard.name)


def index_path(shard: Path) -> Path:
    return shard.with_suffix(".index.json")


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, np.ndarray):
            np.testing.assert_array_equal(found[name], value)
            assert found[name].dtype == value.dtype
    assert found["clip.json"] == {**expected["clip.json"], "heldout_error": None}


def test_samples_come_back(shard: Path, samples: list[dict[str, Any]]) -> None:
    reader = opened(shard)
    assert len(reader) == 3
    assert reader.keys == [sample["__key__"] for sample in samples]
    for found, sample in zip(reader, samples, strict=True):
        assert_same(found, sample)
    assert_same(reader[-1], samples[-1])
    assert reader.read(1, ["text.npy"]).keys() == {"__key__", "text.npy"}
    assert reader.verify() == []
    with pytest.raises(IndexError):
        reader[3]
    with pytest.raises(KeyError, match=r"no member 'pooled\.npy', there are \['clip\.json'"):
        reader.read(0, ["pooled.npy"])


def test_arrays_are_read_only_and_outlive_the_file(shard: Path, samples: list[dict[str, Any]]) -> None:
    array = opened(shard)[0]["coefficients.npy"]
    assert not array.flags.writeable
    os.truncate(shard, 0)
    np.testing.assert_array_equal(array, samples[0]["coefficients.npy"])


def test_every_shape_and_order(lake: Lake) -> None:
    arrays = {
        "scalar.npy": np.float64(3.5),
        "empty.npy": np.zeros((0, 4), np.float16),
        "fortran.npy": np.asfortranarray(np.arange(6).reshape(2, 3)),
        "strided.npy": np.arange(10)[::2],
        "big_endian.npy": np.arange(3, dtype=">f4"),
    }
    write_shard(lake, "a.tar", [{"__key__": "x", **arrays}])
    found = ShardReader(lake, "a.tar")[0]
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array)
        assert found[name].dtype == array.dtype
        assert found[name].shape == np.shape(array)


def test_the_same_samples_give_the_same_bytes(
    tmp_path: Path, shard: Path, samples: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.time", lambda: 1e9)  # another time, another order of members
    turned = [dict(reversed(sample.items())) for sample in samples]
    again = Lake.create(tmp_path / "again")
    info = write_shard(again, "block.tar", turned)
    assert (again.shards / "block.tar").read_bytes() == shard.read_bytes()
    assert index_path(again.shards / "block.tar").read_bytes() == index_path(shard).read_bytes()
    assert info == opened(shard).info == ShardInfo("block.tar", shard.stat().st_size, file_digest(shard), 3)
    with tarfile.open(shard) as tar:
        heads = {(member.mtime, member.uid, member.gid, member.uname, member.mode) for member in tar}
    assert heads == {(0, 0, 0, "vlfm", 0o444)}


def test_a_name_too_long_for_a_plain_tar_header(lake: Lake) -> None:
    samples = [{"__key__": letter * 150, "a.npy": np.arange(3) + n} for n, letter in enumerate("xy")]
    write_shard(lake, "a.tar", samples)
    reader = ShardReader(lake, "a.tar")
    assert reader.verify() == []
    assert reader[1]["a.npy"].tolist() == [1, 2, 3]


def test_a_golden_digest(lake: Lake) -> None:
    """Bytes must not depend on versions of Python, numpy or webdataset either: shards are named by them."""
    sample = {"__key__": "0123456789abcdef", "a.npy": np.arange(4, dtype="<f2"), "clip.json": {"b": 1.5, "a": "é"}}
    info = write_shard(lake, "a.tar", [sample])
    assert (info.bytes, info.sha256) == (GOLDEN_BYTES, GOLDEN)


GOLDEN_BYTES = 10240
GOLDEN = "b94ee327eb9f215b5ab7da79efefca4f687495b0b6bc85261df016a0b90c207b"


# WebDataset leaves the file for the collector to close.
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_webdataset_reads_the_same_tar(shard: Path, samples: list[dict[str, Any]]) -> None:
    import webdataset

    def decode(sample: dict[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in sample.items():
            if name.endswith("npy"):
                found[name] = np.load(io.BytesIO(value), allow_pickle=False)
            elif name.endswith("json"):
                found[name] = json.loads(value)
            elif name == "__key__":
                found[name] = value
        return found

    read = [decode(sample) for sample in webdataset.WebDataset(str(shard), shardshuffle=False)]
    assert len(read) == 3
    for found, sample in zip(read, samples, strict=True):
        assert_same(found, sample)


def test_a_reader_goes_to_another_process(shard: Path) -> None:
    # torch's DataLoader hands its dataset to its workers.
    copy = pickle.loads(pickle.dumps(opened(shard)))  # noqa: S301
    np.testing.assert_array_equal(copy[1]["text.npy"], opened(shard)[1]["text.npy"])


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        ({"__key__": "x", "a.npy": np.array([{}], dtype=object)}, "Python objects, which only pickle can store"),
        ({"__key__": "x", "a.pyd": b""}, "neither <name>.npy nor <name>.json"),
        ({"__key__": "x", "a.b.npy": np.zeros(1)}, "neither <name>.npy nor <name>.json"),
        ({"__key__": "x.y", "a.npy": np.zeros(1)}, "sample key 'x.y'"),
        ({"__key__": "../x", "a.npy": np.zeros(1)}, "sample key"),
        ({"a.npy": np.zeros(1)}, "sample key ''"),
        ({"__key__": "x"}, "has no members"),
        ({"__key__": "first", "a.npy": np.zeros(1)}, "two samples have the key 'first'"),
    ],
)
def test_what_cannot_be_stored_is_refused_and_leaves_nothing(lake: Lake, sample: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write_shard(lake, "a.tar", [{"__key__": "first", "a.npy": np.zeros(9000)}, sample])
    with pytest.raises(ValueError, match="at least one sample"):
        write_shard(lake, "a.tar", [])
    with pytest.raises(ValueError, match="shard name"):
        write_shard(lake, "a.zip", [{"__key__": "x", "a.npy": np.zeros(1)}])
    assert os.listdir(lake.shards) == []


def test_a_pickle_in_a_tar_is_refused(lake: Lake) -> None:
    path = lake.shards / "a.tar"
    buffer = io.BytesIO()
    np.save(buffer, np.array([{"run": "anything"}], dtype=object), allow_pickle=True)
    with tarfile.open(path, "w") as tar:
        member = tarfile.TarInfo("x.coefficients.npy")
        member.size = len(buffer.getvalue())
        tar.addfile(member, io.BytesIO(buffer.getvalue()))
    rebuild(path)
    with pytest.raises(
        DamagedShard, match=r"clip x, coefficients\.npy: .*needs pickle, which can run any code: refused"
    ):
        opened(path)[0]


def test_a_shard_with_foreign_members_is_refused(lake: Lake) -> None:
    with tarfile.open(lake.shards / "a.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("x.pyd"), io.BytesIO(b""))
    with pytest.raises(DamagedShard, match=r"holds 'x\.pyd', which we do not write"):
        rebuild_index(lake, "a.tar")


def test_missing_files_are_named(shard: Path) -> None:
    index = index_path(shard)
    text = index.read_bytes()
    index.unlink()
    with pytest.raises(DamagedShard, match=r"block\.index\.json is missing; make it anew: vlfm repair"):
        opened(shard)
    index.write_bytes(text)
    shard.unlink()
    with pytest.raises(DamagedShard, match=r"block\.tar is missing; restore it from a copy"):
        opened(shard)
    index.unlink()
    with pytest.raises(DamagedShard, match=r"block\.tar is missing, and its index too"):
        opened(shard)


def test_a_truncated_shard_is_named(shard: Path) -> None:
    size = shard.stat().st_size
    os.truncate(shard, size - 1024)
    with pytest.raises(DamagedShard, match=rf"block\.tar is truncated \({size - 1024} of {size} bytes\); restore it"):
        opened(shard)
    os.truncate(shard, 0)
    with pytest.raises(DamagedShard, match=r"truncated \(0 of"):
        opened(shard)
    with pytest.raises(DamagedShard, match="is no whole tar"):
        rebuild(shard)


def test_a_flipped_byte_names_the_clip(shard: Path, samples: list[dict[str, Any]]) -> None:
    offset, _ = json.loads(index_path(shard).read_bytes())["samples"][1]["members"]["coefficients.npy"]
    data = bytearray(shard.read_bytes())
    data[offset + 150] ^= 1
    shard.write_bytes(data)
    problems = opened(shard).verify()
    assert len(problems) == 2
    assert f"block.tar: clips {samples[1]['__key__']} are damaged (wrong checksum); restore it" in problems[0]
    assert "block.tar: wrong checksum" in problems[1]


@pytest.mark.parametrize("older", [False, True], ids=["by member", "an older index, by sample"])
def test_a_checksum_is_compared_when_it_is_first_read(shard: Path, samples: list[dict[str, Any]], older: bool) -> None:
    """Of the members that are asked for; an older index has checksums of whole samples, and all of it is read once."""
    index = json.loads(index_path(shard).read_bytes())
    if older:
        for entry in index["samples"]:
            del entry["checksums"]
        index_path(shard).write_text(json.dumps(index))
        assert opened(shard).verify() == []
    offset, _ = index["samples"][1]["members"]["latents.npy"]
    before = opened(shard)
    assert before.read(1, ["latents.npy"])
    data = bytearray(shard.read_bytes())
    data[offset + 150] ^= 1
    shard.write_bytes(data)
    told = rf"block\.tar, clip {samples[1]['__key__']}, .*wrong checksum; `vlfm verify --lake .*` lists all damage; "
    reader = opened(shard)
    for _ in range(2):
        with pytest.raises(DamagedShard, match=told):
            reader.read(1, ["text.npy"] if older else ["text.npy", "latents.npy"])
    if not older:
        assert reader.read(1, ["text.npy"]), "what is not asked for is not read"
    assert reader.read(0, ["text.npy"])
    assert before.read(1, ["latents.npy"]), "compared already"


def test_checksums_of_members_that_are_not_the_tars_are_found(shard: Path, samples: list[dict[str, Any]]) -> None:
    index = json.loads(index_path(shard).read_bytes())
    index["samples"][1]["checksums"]["text.npy"] = "0" * 16
    index_path(shard).write_text(json.dumps(index))
    reader = opened(shard)
    with pytest.raises(DamagedShard, match=rf"clip {samples[1]['__key__']}, text\.npy: wrong checksum"):
        reader[1]
    assert [problem for problem in reader.verify() if "does not match the tar; make it anew" in problem]
    rebuild(shard)
    assert opened(shard).verify() == []
    assert opened(shard)[1]


SHRINKING = """
import os, sys
from pathlib import Path
from storage.errors import VlfmError
from storage.layout import Lake
from storage.shards import ShardReader
shard = Path(sys.argv[1])
reader = ShardReader(Lake.open(shard.parent.parent), shard.name)
first = reader[0]
os.truncate(shard, 1024)
try:
    total = sum(value.sum() for name, value in reader[1].items() if name.endswith(".npy"))
except VlfmError as error:
    print(error)
"""


def test_a_shard_that_shrinks_while_it_is_read_is_one_line(shard: Path, samples: list[dict[str, Any]]) -> None:
    """In a process of its own: one that reads a mapped file past its end is killed (SIGBUS)."""
    done = subprocess.run([sys.executable, "-c", SHRINKING, str(shard)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told = (
        rf".*block\.tar, clip {samples[1]['__key__']}, .* lies beyond the shard's end, it was truncated; `vlfm verify.*"
    )
    assert re.fullmatch(told, done.stdout.strip())


def test_a_damaged_header_inside_the_tar(shard: Path) -> None:
    data = bytearray(shard.read_bytes())
    data[10] ^= 1
    shard.write_bytes(data)
    problems = opened(shard).verify()
    assert len(problems) == 2
    assert "wrong checksum" in problems[0]
    assert "is no whole tar" in problems[1]


@pytest.mark.parametrize(
    "text", [b"", b"{}", b"[]", b'{"format":1,"shard":"other.tar","samples":[],"bytes":1,"sha256":""}']
)
def test_a_damaged_index_is_named_and_made_anew(shard: Path, text: bytes) -> None:
    index = index_path(shard)
    before = index.read_bytes()
    index.write_bytes(text)
    with pytest.raises(DamagedShard, match=r"block\.index\.json is .*; make it anew: vlfm repair"):
        opened(shard)
    rebuild(shard)
    assert index.read_bytes() == before


def test_an_index_that_points_elsewhere_is_found(shard: Path) -> None:
    index = json.loads(index_path(shard).read_bytes())
    members = index["samples"][0]["members"]
    members["coefficients.npy"][0], members["text.npy"][0] = members["text.npy"][0], 10**9
    index_path(shard).write_text(json.dumps(index))
    reader = opened(shard)
    assert any("block.index.json does not match the tar; make it anew" in problem for problem in reader.verify())
    with pytest.raises(DamagedShard, match=r"block\.tar, clip"):
        reader[0]


def test_a_published_shard_never_changes(published: Lake, sample_lake: ModuleType) -> None:
    reader = opened(next(published.shards.glob("*.tar")))
    same = list(reader)
    before = Path(reader.path).read_bytes()
    assert write_shard(published, reader.name, same) == reader.info
    with pytest.raises(LakeError, match="belongs to version 1 and never changes"):
        write_shard(published, reader.name, [sample_lake.sample(sample_lake.clip(99))])
    assert Path(reader.path).read_bytes() == before
    assert reader.verify() == []
    assert orphans(published) == []


def test_a_full_disk(small_disk: Path) -> None:
    lake = Lake.create(small_disk / "lake")
    with pytest.raises(DiskFull, match="bytes free") as caught:
        write_shard(lake, "a.tar", [{"__key__": "x", "a.npy": np.zeros(4 << 20, np.uint8)}])
    assert caught.value.filename == str(lake.shards / "a.tar")
    assert os.listdir(lake.shards) == []


def test_names_of_shards_stay_in_their_folder() -> None:
    for wrong in ("../a.tar", "a", "a.tar.gz", "a b.tar"):
        with pytest.raises(ValueError, match="shard name"):
            ShardInfo(wrong, 1, "", 1)
