"""Fingerprints: one way to turn a value into text, and text, files and lists of digests into sha256 digests.

Everything that is stored is named by what it is made of. Digests are lower-case hexadecimal;
an id is the first 16 digits.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

ID_LENGTH = 16
"""Hexadecimal digits of an id: 64 bits, about 10^-7 odds of one clash among 2 million clips."""

_READ_BYTES = 1 << 20


def canonical_json(value: Any) -> str:
    """`value` as JSON with one spelling only: sorted keys, no spaces, plain ASCII.

    Dataclasses count as dictionaries, tuples as lists, numpy scalars as numbers. `2` and `2.0` are different values.

    Raises:
        TypeError: something JSON cannot say (the message names its type).
        ValueError: NaN or infinity, which JSON has no word for; use None.
    """
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, default=_plain)
    except ValueError as error:
        raise ValueError(f"{error}: JSON has no NaN and no infinity; write None instead") from error


def finite_json(value: Any) -> Any:
    """`value` with every NaN and infinity replaced by None, so that `canonical_json` takes it."""
    if isinstance(value, Mapping):
        return {key: finite_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite_json(item) for item in value]
    if isinstance(value, (float, np.floating)) and not np.isfinite(value):
        return None
    return value


def fingerprint(value: Any) -> str:
    """The sha256 of `canonical_json(value)`, 64 hexadecimal digits. Raises what that raises."""
    return hashlib.sha256(canonical_json(value).encode("ascii")).hexdigest()


def bytes_digest(data: bytes | memoryview) -> str:
    """The sha256 of `data`, 64 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def file_digest(path: str | Path, seconds: float = math.inf) -> str:
    """The sha256 of a file's bytes, read in pieces of 1 MiB.

    Raises:
        TimeoutError: it took longer than this many seconds.
        OSError: as `open` does.
    """
    deadline = time.monotonic() + seconds

    def pieces(file: BinaryIO) -> Iterator[bytes]:
        while piece := file.read(_READ_BYTES):
            yield piece
            if time.monotonic() > deadline:
                raise TimeoutError(f"reading {path} took over {seconds:g} s")

    with open(path, "rb") as file:
        return _digest_of(pieces(file))


def stream_digest(file: BinaryIO) -> str:
    """The sha256 of what is left to read in an open file, read in pieces of 1 MiB."""
    return _digest_of(iter(lambda: file.read(_READ_BYTES), b""))


def _digest_of(pieces: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()


def short_id(digest: str) -> str:
    """The first 16 digits of a hexadecimal digest: the id people and files use.

    Raises:
        ValueError: `digest` is no lower-case hexadecimal text of at least 16 digits.
    """
    if len(digest) < ID_LENGTH or not set(digest) <= set("0123456789abcdef"):
        raise ValueError(
            f"{digest!r} is no hexadecimal digest of {ID_LENGTH} digits or more; make it with fingerprint()"
        )
    return digest[:ID_LENGTH]


def merkle_root(leaves: Sequence[str]) -> str:
    """The root of the Merkle tree over `leaves`, in their order (the tree of RFC 6962, section 2.1).

    Leaves and inner nodes are hashed with different first bytes, so that no list of leaves can pass for another one.
    The root of no leaves is the sha256 of nothing.
    """
    level = [hashlib.sha256(b"\x00" + leaf.encode("utf-8")).digest() for leaf in leaves]
    if not level:
        return hashlib.sha256(b"").hexdigest()
    while len(level) > 1:
        pairs = [hashlib.sha256(b"\x01" + a + b).digest() for a, b in zip(level[::2], level[1::2], strict=False)]
        # A node without a neighbour rises as it is.
        level = pairs + ([level[-1]] if len(level) % 2 else [])
    return level[0].hex()


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    raise TypeError(
        f"a {type(value).__name__} cannot be written as JSON ({value!r}); give text, numbers, lists, mappings"
    )
