"""Finished blocks that wait for publication: one file per block, complete or absent, so that a run can be resumed.

A block is a plain uncompressed `.npz` (zip of `.npy`, with checksums) and one member of JSON. It holds no pickle.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np

from storage.errors import Kind, VlfmError
from storage.fingerprint import canonical_json, finite_json
from storage.layout import Lake

_META = "meta.json"


class DamagedBlock(VlfmError, ValueError):
    """A staged block is damaged, or is another one than its name says; it has to be made again."""

    kind = Kind.DAMAGE


def write_block(lake: Lake, block_id: str, arrays: Mapping[str, np.ndarray[Any, Any]], meta: Mapping[str, Any]) -> str:
    """Keep a finished block: its key. NaN and infinity in `meta` become None.

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
    key = block_key(block_id)
    with lake.store.open_write(key) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(zipfile.ZipInfo(_META), text)
        for name, array in arrays.items():
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.asarray(array), allow_pickle=False)
    return key


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


def remove_block(lake: Lake, block_id: str) -> None:
    """Forget a block, once a version has what it holds. Nothing happens if it is not there."""
    lake.store.delete(block_key(block_id))


def staged_blocks(lake: Lake, prefix: str = "") -> list[str]:
    """Ids of the blocks in staging that start with `prefix`, ordered. Some may be damaged."""
    keys = [key for key in lake.store.list_keys(f"staging/{prefix}") if key.endswith(".npz")]
    return sorted(key.removeprefix("staging/").removesuffix(".npz") for key in keys)


def block_key(block_id: str) -> str:
    """The key of a block. Raises ValueError where the id could not be a file's name."""
    _check_name("block", block_id)
    return f"staging/{block_id}.npz"


def _check_name(what: str, name: str) -> None:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
        raise ValueError(f"{what} {name!r}: use letters, digits, '-' and '_' only")


def _read(lake: Lake, block_id: str, arrays: bool) -> tuple[dict[str, np.ndarray[Any, Any]], dict[str, Any]]:
    key = block_key(block_id)
    path = lake.store.address(key)
    found = {}
    try:
        with lake.store.open_read(key) as file, zipfile.ZipFile(file) as archive:
            head = json.loads(archive.read(_META))
            for name in archive.namelist() if arrays else ():
                if name != _META:
                    with archive.open(name) as member:
                        found[name.removesuffix(".npy")] = np.lib.format.read_array(member, allow_pickle=False)
                        # The checksum is compared at the member's end only.
                        member.read()
    except FileNotFoundError:
        raise FileNotFoundError(
            f"no staged block {block_id} in {lake.store.address('staging')}; run the ingest again to make it"
        ) from None
    except (zipfile.BadZipFile, ValueError, KeyError, EOFError) as error:
        raise DamagedBlock(f"{path} is damaged ({error}); delete it and run the ingest again") from error
    if head.get("block_id") != block_id:
        raise DamagedBlock(f"{path} holds block {head.get('block_id')!r}; delete it and run the ingest again")
    return found, head["meta"]
