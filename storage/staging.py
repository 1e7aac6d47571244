"""Finished blocks that wait for publication: one file per block, complete or absent, so that a run can be resumed.

A block is a plain uncompressed `.npz` (zip of `.npy`, with checksums) and one member of JSON. It holds no pickle.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from storage.errors import Kind, VlfmError
from storage.fingerprint import canonical_json, finite_json
from storage.layout import Lake, atomic_file

_META = "meta.json"


class DamagedBlock(VlfmError, ValueError):
    """A staged block is damaged, or is another one than its name says; it has to be made again."""

    kind = Kind.DAMAGE


def write_block(lake: Lake, block_id: str, arrays: Mapping[str, np.ndarray[Any, Any]], meta: Mapping[str, Any]) -> Path:
    """Keep a finished block. NaN and infinity in `meta` become None.

    Raises:
        ValueError: an array of objects, or a name that cannot be a file's.
        TypeError: `meta` holds something JSON cannot say.
        DiskFull: no room; nothing stays behind.
    """
    text = canonical_json({"block_id": block_id, "meta": finite_json(meta)})
    for name, array in arrays.items():
        _check_name("array", name)
        if np.asarray(array).dtype.hasobject:
            raise ValueError(
                f"block {block_id}: array {name!r} holds Python objects; store numbers or fixed-width text"
            )
    path = block_path(lake, block_id)
    with atomic_file(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(zipfile.ZipInfo(_META), text)
        for name, array in arrays.items():
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.asarray(array), allow_pickle=False)
    return path


def read_block(lake: Lake, block_id: str) -> tuple[dict[str, np.ndarray[Any, Any]], dict[str, Any]]:
    """The arrays and the meta of a block, every byte checked.

    Raises:
        FileNotFoundError: there is no such block.
        DamagedBlock: the file is damaged, or of another block; the message says the remedy.
    """
    return _read(lake, block_id, arrays=True)


def read_block_meta(lake: Lake, block_id: str) -> dict[str, Any]:
    """The meta of a block without its arrays: only that member is read, and its checksum compared.

    Raises as `read_block`; a fault in an array shows when that is read.
    """
    return _read(lake, block_id, arrays=False)[1]


def has_block(lake: Lake, block_id: str) -> bool:
    """Whether the block is there and whole (it is read to find out). A damaged one counts as absent."""
    try:
        read_block(lake, block_id)
    except (FileNotFoundError, ValueError):
        return False
    return True


def remove_block(lake: Lake, block_id: str) -> None:
    """Forget a block, once a version has what it holds. Nothing happens if it is not there."""
    block_path(lake, block_id).unlink(missing_ok=True)


def block_path(lake: Lake, block_id: str) -> Path:
    """Where a block is, or will be. Raises ValueError where the id could not be a file's name."""
    _check_name("block", block_id)
    return lake.staging / f"{block_id}.npz"


def _check_name(what: str, name: str) -> None:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
        raise ValueError(f"{what} {name!r}: use letters, digits, '-' and '_' only")


def _read(lake: Lake, block_id: str, arrays: bool) -> tuple[dict[str, np.ndarray[Any, Any]], dict[str, Any]]:
    path = block_path(lake, block_id)
    found = {}
    try:
        with zipfile.ZipFile(path) as archive:
            head = json.loads(archive.read(_META))
            for name in archive.namelist() if arrays else ():
                if name != _META:
                    with archive.open(name) as member:
                        found[name.removesuffix(".npy")] = np.lib.format.read_array(member, allow_pickle=False)
                        # The checksum is compared at the member's end only.
                        member.read()
    except FileNotFoundError:
        raise FileNotFoundError(
            f"no staged block {block_id} in {lake.staging}; run the ingest again to make it"
        ) from None
    except (zipfile.BadZipFile, ValueError, KeyError, EOFError) as error:
        raise DamagedBlock(f"{path} is damaged ({error}); delete it and run the ingest again") from error
    if head.get("block_id") != block_id:
        raise DamagedBlock(f"{path} holds block {head.get('block_id')!r}; delete it and run the ingest again")
    return found, head["meta"]
