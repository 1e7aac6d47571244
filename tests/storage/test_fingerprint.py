from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
import pytest

from storage.fingerprint import canonical_json, file_digest, fingerprint, finite_json, merkle_root, short_id


def test_canonical_json_has_one_spelling() -> None:
    assert canonical_json({"b": [1, 2.5, None], "a": "é"}) == '{"a":"\\u00e9","b":[1,2.5,null]}'
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
    assert fingerprint({}) == hashlib.sha256(b"{}").hexdigest()


def test_dataclasses_tuples_and_numpy_scalars_count_as_plain_values() -> None:
    @dataclass(frozen=True)
    class Recipe:
        size: tuple[int, int]
        rate: float

    assert fingerprint(Recipe((64, 48), 16.0)) == fingerprint({"size": [64, 48], "rate": 16.0})
    assert fingerprint([np.int64(3), np.float64(0.5), np.bool_(True)]) == fingerprint([3, 0.5, True])


def test_what_json_cannot_say_is_refused() -> None:
    with pytest.raises(ValueError, match="write None instead"):
        fingerprint({"x": float("nan")})
    with pytest.raises(TypeError, match="a set cannot be written as JSON"):
        fingerprint({"x": {1, 2}})


def test_finite_json_replaces_what_is_not_finite() -> None:
    value = {"a": float("nan"), "b": [np.float32("inf"), 1.5], "c": ({"d": -float("inf")},)}
    assert finite_json(value) == {"a": None, "b": [None, 1.5], "c": [{"d": None}]}


@pytest.mark.parametrize("seed", range(20))
def test_the_order_of_keys_never_matters(seed: int) -> None:
    random = Random(seed)

    def value(depth: int) -> object:
        if depth == 0:
            return random.choice([random.randrange(10**12), str(random.random()), random.random(), True, None, "é"])
        return {str(random.random()): value(depth - 1) for _ in range(random.randrange(4))}

    def turned(item: object) -> object:
        return {key: turned(item[key]) for key in reversed(item)} if isinstance(item, dict) else item

    made = {"a": value(3), "b": value(2)}
    assert fingerprint(made) == fingerprint(turned(made))
    assert json.loads(canonical_json(made)) == made


def test_file_digest_reads_in_pieces(tmp_path: Path) -> None:
    data = np.random.default_rng(0).bytes((1 << 20) + 17)
    (tmp_path / "file").write_bytes(data)
    assert file_digest(tmp_path / "file") == hashlib.sha256(data).hexdigest()


def test_short_id() -> None:
    assert short_id("0123456789abcdef" * 4) == "0123456789abcdef"
    for wrong in ("0123", "G" * 64, "A" * 64):
        with pytest.raises(ValueError, match="no hexadecimal digest"):
            short_id(wrong)


def test_merkle_root_of_three_leaves_by_hand() -> None:
    def leaf(text: str) -> bytes:
        return hashlib.sha256(b"\x00" + text.encode()).digest()

    def node(a: bytes, b: bytes) -> bytes:
        return hashlib.sha256(b"\x01" + a + b).digest()

    assert merkle_root(["a", "b", "c"]) == node(node(leaf("a"), leaf("b")), leaf("c")).hex()
    assert merkle_root([]) == hashlib.sha256(b"").hexdigest()
    assert merkle_root(["a"]) != hashlib.sha256(b"a").hexdigest()


@pytest.mark.parametrize("count", range(1, 10))
def test_merkle_root_sees_every_leaf_and_the_order(count: int) -> None:
    leaves = [f"leaf {number}" for number in range(count)]
    root = merkle_root(leaves)
    others = [merkle_root([*leaves[:n], leaves[n] + "x", *leaves[n + 1 :]]) for n in range(count)]
    others += [merkle_root([*leaves[:n], *leaves[n + 1 :]]) for n in range(count)]
    others += [merkle_root([*leaves, leaves[-1]])]
    others += [merkle_root([*leaves[:n], leaves[n + 1], leaves[n], *leaves[n + 2 :]]) for n in range(count - 1)]
    assert root not in others
    assert len(set(others)) == len(others)
