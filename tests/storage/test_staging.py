from __future__ import annotations

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest

from storage.layout import DiskFull, Lake
from storage.staging import DamagedBlock, read_block, read_block_meta, remove_block, staged_blocks, write_block

ARRAYS = {
    "coefficients": np.arange(24, dtype=np.float16).reshape(2, 3, 4),
    "observed": np.array([True, False]),
    "clip_ids": np.array(["a" * 16, "b" * 16]),
    "nothing": np.zeros((0, 3)),
}


def test_a_block_comes_back_as_it_was(lake: Lake) -> None:
    write_block(lake, "block", ARRAYS, {"clips": [{"film": "é.mp4", "psnr": float("nan")}]})
    arrays, meta = read_block(lake, "block")
    assert meta == {"clips": [{"film": "é.mp4", "psnr": None}]}
    assert arrays.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(arrays[name], array)
        assert arrays[name].dtype == array.dtype


def test_the_same_block_has_the_same_bytes_and_numpy_reads_it(lake: Lake) -> None:
    path = lake.root / write_block(lake, "block", ARRAYS, {})
    first = path.read_bytes()
    write_block(lake, "block", ARRAYS, {})
    assert path.read_bytes() == first
    with np.load(path, allow_pickle=False) as loaded:
        np.testing.assert_array_equal(loaded["coefficients"], ARRAYS["coefficients"])


def test_absent_until_written_and_after_removal(lake: Lake) -> None:
    assert staged_blocks(lake) == []
    with pytest.raises(FileNotFoundError, match=r"no staged block block in .*staging; run the ingest again"):
        read_block(lake, "block")
    for block in ("block", "block-1", "another"):
        write_block(lake, block, ARRAYS, {})
    (lake.staging / ".block-2.npz.abc.tmp").write_bytes(b"left by a crash")
    assert staged_blocks(lake) == ["another", "block", "block-1"]
    assert staged_blocks(lake, "block") == ["block", "block-1"]
    remove_block(lake, "block")
    remove_block(lake, "block")
    assert staged_blocks(lake, "block") == ["block-1"]


def test_any_damage_is_named(lake: Lake) -> None:
    path = lake.root / write_block(lake, "block", ARRAYS, {"a": 1})
    whole = path.read_bytes()
    place = whole.index(ARRAYS["coefficients"].tobytes())
    for damaged in (whole[:-10], whole[: len(whole) // 2], b"", whole[: place + 5] + b"\xff" + whole[place + 6 :]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"block\.npz is damaged .*; delete it and run the ingest again"):
            read_block(lake, "block")
    path.write_bytes(whole)
    assert read_block(lake, "block")[1] == {"a": 1}


def test_a_block_under_another_name_does_not_count(lake: Lake) -> None:
    (lake.root / write_block(lake, "block", ARRAYS, {})).rename(lake.staging / "other.npz")
    with pytest.raises(ValueError, match="holds block 'block'"):
        read_block(lake, "other")


def test_no_pickle_goes_in_or_out(lake: Lake) -> None:
    with pytest.raises(ValueError, match="'x' holds Python objects"):
        write_block(lake, "block", {"x": np.array([{}], dtype=object)}, {})
    path = lake.staging / "block.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("meta.json", json.dumps({"block_id": "block", "meta": {}}))
        with archive.open("x.npy", "w") as member:
            np.lib.format.write_array(member, np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"Object arrays cannot be loaded"):
        read_block(lake, "block")


def test_names_stay_in_their_folder(lake: Lake) -> None:
    for wrong in ("../x", "a/b", "", "a.npz"):
        with pytest.raises(ValueError, match="use letters, digits"):
            write_block(lake, wrong, ARRAYS, {})


def test_a_full_disk(small_disk: Path) -> None:
    lake = Lake.create(small_disk / "lake")
    with pytest.raises(DiskFull, match="bytes free") as caught:
        write_block(lake, "block", {"x": np.zeros(4 << 20, np.uint8)}, {})
    assert caught.value.filename == str(lake.staging / "block.npz")
    assert list(lake.staging.iterdir()) == []


def test_the_meta_alone(lake: Lake) -> None:
    """A fault in an array does not show, one in the meta does; the arrays are not read."""
    write_block(lake, "block", {"x": np.arange(1 << 16)}, {"a": 1})
    path = lake.staging / "block.npz"
    assert read_block_meta(lake, "block") == {"a": 1}
    whole = path.read_bytes()
    path.write_bytes(whole.replace(np.arange(99, 103).tobytes(), np.arange(4).tobytes()))
    assert path.read_bytes() != whole
    assert read_block_meta(lake, "block") == {"a": 1}
    with pytest.raises(DamagedBlock, match="delete it and run the ingest again"):
        read_block(lake, "block")
    path.write_bytes(whole.replace(b'"a":1', b'"a":2'))
    for broken in (path.read_bytes(), whole[:-40]):
        path.write_bytes(broken)
        with pytest.raises(DamagedBlock, match="is damaged"):
            read_block_meta(lake, "block")
    with pytest.raises(FileNotFoundError, match="no staged block other"):
        read_block_meta(lake, "other")
