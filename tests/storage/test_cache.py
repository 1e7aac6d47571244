"""The cache: bounded, least recently used first, shared by processes, and never wrong."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from storage.cache import DEFAULT_LIMIT, ByteCache, parse_size
from storage.errors import VlfmError
from tests.storage.store_contract import ROOT

CHECK = 32


def fetched(data: bytes) -> list[bytes]:
    """What `fetch` gives, once: a second call fails."""
    return [data]


def held(cache: ByteCache) -> int:
    return sum(path.stat().st_size for path in cache.folder.rglob("*") if path.is_file() and path.name != ".bytes")


def test_what_was_read_is_kept(tmp_path: Path) -> None:
    cache = ByteCache(tmp_path / "cache", 1000)
    once = fetched(b"data")
    for _ in range(3):
        assert cache.get("abc", once.pop) == b"data"
    cache.forget("abc")
    assert cache.get("abc", lambda: b"again") == b"again"
    with pytest.raises(KeyError):
        cache.get("absent", {}.popitem)


def test_the_least_recently_read_goes_first_and_the_limit_holds(tmp_path: Path) -> None:
    cache = ByteCache(tmp_path, 10 * (100 + CHECK))
    for number in range(10):
        cache.get(f"e{number}", lambda: bytes(100))
        os.utime(tmp_path / f"e{number}"[:2] / f"e{number}", (number, number))
    cache.get("e0", lambda: pytest.fail("it is here"))
    cache.get("new", lambda: bytes(100))
    assert held(cache) <= cache.limit
    kept = {path.name for path in tmp_path.glob("*/*")}
    assert {"e0", "new", "e9"} <= kept
    assert not {"e1", "e2"} & kept
    for number in range(200):
        cache.get(f"f{number}", lambda: bytes(100))
        assert held(cache) <= cache.limit
    assert cache.get("large", lambda: bytes(5000)) == bytes(5000)
    assert held(cache) <= cache.limit


@pytest.mark.parametrize("damage", [b"", b"short", b"x" * 36], ids=["empty", "torn", "altered"])
def test_a_damaged_entry_is_fetched_again(tmp_path: Path, damage: bytes) -> None:
    cache = ByteCache(tmp_path, 1000)
    cache.get("abc", lambda: b"data")
    (tmp_path / "ab" / "abc").write_bytes(damage)
    assert cache.get("abc", lambda: b"data") == b"data"
    assert cache.get("abc", lambda: pytest.fail("it was repaired")) == b"data"


def test_a_lost_or_damaged_count_is_made_anew(tmp_path: Path) -> None:
    cache = ByteCache(tmp_path, 500)
    for number in range(3):
        cache.get(f"e{number}", lambda: bytes(100))
    (tmp_path / ".bytes").write_text("?")
    cache.get("e4", lambda: bytes(100))
    assert held(cache) <= cache.limit
    assert int((tmp_path / ".bytes").read_text()) >= held(cache)


def test_processes_share_one_folder_within_the_limit(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from storage.cache import ByteCache\n"
        "cache = ByteCache(Path(sys.argv[1]), 40_000)\n"
        "for number in range(400):\n"
        "    name = f'e{(number * int(sys.argv[2])) % 97}'\n"
        "    assert cache.get(name, lambda: name.encode() * 300) == name.encode() * 300\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    with_cache = [subprocess.Popen([*command, str(step)], cwd=ROOT) for step in (1, 3, 7)]
    assert [process.wait(60) for process in with_cache] == [0, 0, 0]
    assert 0 < held(ByteCache(tmp_path, 0)) <= 40_000


def test_a_cache_that_cannot_be_written_keeps_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cache = ByteCache(tmp_path / "file" / "cache", 1000)
    for _ in range(2):
        with pytest.warns(UserWarning, match="cannot be written .* set VLFM_CACHE to a folder with room"):
            assert cache.get("abc", lambda: b"data") == b"data"


def test_where_and_how_large_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("VLFM_CACHE", "VLFM_CACHE_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert ByteCache.of_environment() == ByteCache(tmp_path / "vlfm" / "samples", DEFAULT_LIMIT)
    monkeypatch.setenv("VLFM_CACHE", str(tmp_path / "mine"))
    monkeypatch.setenv("VLFM_CACHE_SIZE", "1.5GiB")
    assert ByteCache.of_environment() == ByteCache(tmp_path / "mine" / "samples", 3 << 29)
    monkeypatch.setenv("VLFM_CACHE_SIZE", "much")
    with pytest.raises(VlfmError, match="VLFM_CACHE_SIZE 'much' is no size; give one such as 500MB or 16GiB"):
        ByteCache.of_environment()
    assert [parse_size(text, "x") for text in ("12", "2 kB", "3MiB", "1g", "0")] == [12, 2000, 3 << 20, 10**9, 0]
    with pytest.raises(ValueError, match="use letters"):
        ByteCache(tmp_path, 1).get("../x", bytes)
