"""What every store must do: subclass `StoreContract` and all of it is tested.

A backend's test module needs one class:

    class TestMyStore(StoreContract):
        @pytest.fixture
        def store(self, ...) -> Store: ...              an empty store of the backend
        def raw_read(self, store, key) -> bytes | None  what is stored under a key, None where nothing is,
        def raw_write(self, store, key, data) -> None   and a way to put it there,
        def raw_everything(self, store) -> set[str]     and all that the store holds, temporary things too:
                                                        all three without the code under test (pathlib, the bucket's
                                                        own client)
        @pytest.fixture
        def full_store(self, ...) -> Store: ...         an empty store with room for 2 MiB (a skip by default)
        lease_expiry: float = 0.0                       seconds after which the lease of a dead process ends
        race_rounds, kill_delays                        fewer where a request is slow
        local = True                                    whether `local_path` gives a path, or a refusal

Several tests run the store in other processes, which get it pickled on their standard input, as workers do.
"""

from __future__ import annotations

import contextlib
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import pytest

from storage.store import DiskFull, LakeBusy, LakeError, Store, read_tagged

ROOT = Path(__file__).resolve().parents[2]
WRONG_KEYS = [
    "", "/etc/passwd", "..", "../x", "a/../../x", "a/..", "./a", "a/./b", "a//b", "a/", "/", ".hidden", "a/.b.tmp",
    "a\\b", "a\0b", "a\nb",
]  # fmt: skip
MEBIBYTE = 1 << 20


class Child:
    """A process that has the store: it runs `program`, which finds `store`, `say(word)` and `hear()`."""

    def __init__(self, store: Store, program: str) -> None:
        head = (
            "import pickle, sys, time\n"
            "store = pickle.load(sys.stdin.buffer)\n"
            "def say(word): print(word, flush=True)\n"
            "def hear(): return sys.stdin.buffer.readline().decode().strip()\n"
        )
        command = [sys.executable, "-c", head + program]
        self.process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._to(pickle.dumps(store))

    def _pipe(self, pipe: IO[bytes] | None) -> IO[bytes]:
        assert pipe is not None
        return pipe

    def _to(self, data: bytes) -> None:
        self._pipe(self.process.stdin).write(data)
        self._pipe(self.process.stdin).flush()

    def tell(self, word: str) -> None:
        self._to(word.encode() + b"\n")

    def hear(self) -> str:
        """The next word it says; empty once it has ended."""
        return self._pipe(self.process.stdout).readline().decode().strip()

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        assert self.process.wait(60) == -signal.SIGKILL


def interrupted(store: Store, key: str) -> None:
    with store.open_write(key) as file:
        file.write(b"half")
        raise KeyboardInterrupt


class StoreContract:
    """The tests; see the module's head for what a subclass gives."""

    lease_expiry = 0.0
    race_rounds = 40
    kill_delays: tuple[float, ...] = (0.0, 0.003, 0.007, 0.016)
    local = True

    @pytest.fixture
    def store(self) -> Store:
        raise NotImplementedError("a subclass makes the store")

    @pytest.fixture
    def full_store(self) -> Store:
        pytest.skip("this store has no end")

    def raw_read(self, store: Any, key: str) -> bytes | None:
        raise NotImplementedError

    def raw_write(self, store: Any, key: str, data: bytes) -> None:
        raise NotImplementedError

    def raw_everything(self, store: Any) -> set[str]:
        raise NotImplementedError

    @pytest.fixture
    def child(self, store: Store) -> Iterator[Callable[[str], Child]]:
        """Starts processes that have the store; those that are left at the end are killed."""
        with contextlib.ExitStack() as stack:

            def start(program: str) -> Child:
                made = Child(store, program)
                stack.enter_context(made.process)
                stack.callback(made.process.kill)
                return made

            yield start

    # Reading and writing.

    @pytest.mark.parametrize("data", [b"", b"x", bytes(range(256)) * 5000], ids=["empty", "byte", "large"])
    @pytest.mark.parametrize("key", ["a", "folder/b.json", "deep/er/still/c-1_2.x.tar", "É 1/ü.npz"])
    def test_what_is_written_is_stored(self, store: Store, key: str, data: bytes) -> None:
        store.write(key, data)
        assert self.raw_read(store, key) == data
        store.write(key, data + b"again")
        assert self.raw_read(store, key) == data + b"again"
        assert self.raw_everything(store) == {key}

    def test_what_is_stored_is_read(self, store: Store) -> None:
        self.raw_write(store, "a/b", b"stored")
        assert store.read("a/b") == b"stored"
        assert store.size("a/b") == 6
        with store.open_read("a/b") as file:
            assert file.read(3) == b"sto"
            assert file.seek(-2, 2) == 4
            assert file.read() == b"ed"
            assert file.seek(1) == file.tell() == 1
            assert file.read(2) == b"to"

    @pytest.mark.parametrize(
        ("start", "stop", "expected"),
        [(0, None, b"0123456789"), (3, None, b"3456789"), (0, 4, b"0123"), (3, 4, b"3"), (5, 5, b""), (10, None, b"")],
    )
    def test_byte_ranges(self, store: Store, start: int, stop: int | None, expected: bytes) -> None:
        self.raw_write(store, "a", b"0123456789")
        assert store.read("a", start, stop) == expected

    def test_cleaning_takes_nothing_that_is_stored(self, store: Store) -> None:
        store.write("a/b", b"stored")
        store.create_exclusive("c", b"stored")
        assert store.clean(delete=True) == store.clean(delete=False) == []
        assert self.raw_everything(store) == {"a/b", "c"}

    def test_tags_tell_what_was_stored_anew(self, store: Store) -> None:
        for key in ("b/2", "b/1", "c"):
            store.write(key, b"stored")
        before = store.tags("b/")
        assert list(before) == store.list_keys("b/") == ["b/1", "b/2"]
        assert read_tagged(store, "b/1", before["b/1"]) == b"stored"
        self.raw_write(store, "b/1", b"anew")
        now = store.tags("b/")
        assert (now["b/1"] == before["b/1"], now["b/2"] == before["b/2"]) == (not now["b/1"], True)
        assert read_tagged(store, "b/1", now["b/1"]) == b"anew"

    @pytest.mark.parametrize(("start", "stop"), [(-1, None), (0, 11), (11, None), (4, 3), (0, -1)])
    def test_byte_ranges_that_are_none(self, store: Store, start: int, stop: int | None) -> None:
        self.raw_write(store, "a", b"0123456789")
        with pytest.raises(ValueError, match="has 10 bytes") as caught:
            store.read("a", start, stop)
        assert store.address("a") in str(caught.value)

    def test_what_is_absent(self, store: Store) -> None:
        self.raw_write(store, "folder/file", b"x")
        for key in ("none", "folder/none", "none/none", "folder", "folder/file/none"):
            assert store.size(key) is None
            for read in (store.read, store.open_read):
                with pytest.raises(FileNotFoundError) as caught:
                    read(key)
                assert caught.value.filename == store.address(key)
            store.delete(key)
        assert self.raw_everything(store) == {"folder/file"}

    def test_delete(self, store: Store) -> None:
        for key in ("a/1", "a/2"):
            self.raw_write(store, key, b"x")
        store.delete("a/1")
        assert self.raw_everything(store) == {"a/2"}
        assert store.list_keys() == ["a/2"]
        store.write("a/1", b"again")
        assert self.raw_read(store, "a/1") == b"again"

    @pytest.mark.parametrize("key", WRONG_KEYS, ids=repr)
    def test_names_that_could_escape_are_refused(self, store: Store, key: str) -> None:
        for work in (
            store.size,
            store.read,
            store.open_read,
            store.delete,
            lambda key: store.write(key, b"x"),
            lambda key: store.create_exclusive(key, b"x"),
            lambda key: store.open_write(key).__enter__(),
        ):
            with pytest.raises(ValueError, match="use names joined by '/'"):
                work(key)
        if key:
            with pytest.raises(ValueError, match="use names joined by '/'"):
                store.address(key)
            with pytest.raises((ValueError, LakeError)):
                store.local_path(key)
        if key not in ("", "a/"):
            with pytest.raises(ValueError, match="use names joined by '/'"):
                store.list_keys(key)
        with pytest.raises(ValueError, match="lease"), store.lease(key):
            pass
        assert self.raw_everything(store) == set()

    # Listing.

    def test_listing_is_by_prefix_and_in_order(self, store: Store) -> None:
        keys = ["b", "a/2", "a/10", "a/B/1", "a/b", "ab", "a-1", "a/ü", "é"]
        for key in keys:
            self.raw_write(store, key, b"")
        assert store.list_keys() == sorted(keys) == ["a-1", "a/10", "a/2", "a/B/1", "a/b", "a/ü", "ab", "b", "é"]
        assert store.list_keys("a/") == ["a/10", "a/2", "a/B/1", "a/b", "a/ü"]
        assert store.list_keys("a") == sorted(key for key in keys if key.startswith("a"))
        assert store.list_keys("a/1") == ["a/10"]
        assert store.list_keys("a/B/") == ["a/B/1"]
        assert store.list_keys("none/") == store.list_keys("b/") == store.list_keys("a/10/x") == []
        self.raw_write(store, "a/2", b"12")
        assert store.sizes("a/") == {"a/10": 0, "a/2": 2, "a/B/1": 0, "a/b": 0, "a/ü": 0}
        assert list(store.sizes()) == store.list_keys()

    def test_what_is_written_is_listed_at_once(self, store: Store) -> None:
        for number in range(20):
            store.write(f"keys/{number:02}", b"")
            assert store.list_keys("keys/") == [f"keys/{n:02}" for n in range(number + 1)]

    # Whole or not at all.

    def test_an_error_while_writing_changes_nothing(self, store: Store) -> None:
        self.raw_write(store, "a", b"old")
        for key in ("a", "new/b"):
            with pytest.raises(KeyboardInterrupt):
                interrupted(store, key)
        assert self.raw_everything(store) == {"a"}
        assert self.raw_read(store, "a") == b"old"

    def test_nothing_is_seen_before_the_writer_is_done(self, store: Store) -> None:
        store.write("a", b"old")
        with store.open_write("a") as file, store.open_write("b") as other:
            file.write(b"n" * MEBIBYTE)
            file.flush()
            other.write(b"x")
            assert store.read("a") == b"old"
            assert store.list_keys() == ["a"]
            assert store.size("b") is None
        assert self.raw_read(store, "a") == b"n" * MEBIBYTE
        assert store.list_keys() == ["a", "b"]

    def test_an_open_reader_keeps_what_it_opened(self, store: Store) -> None:
        store.write("a", b"1" * MEBIBYTE)
        with store.open_read("a") as file:
            assert file.read(1) == b"1"
            store.write("a", b"2" * MEBIBYTE)
            assert file.read() == b"1" * (MEBIBYTE - 1)

    def test_a_writer_that_is_killed_leaves_the_old_bytes(self, store: Store, child: Callable[[str], Child]) -> None:
        self.raw_write(store, "a", b"old")
        program = (
            "with store.open_write({!r}) as file:\n    file.write(b'n' * 3_000_000); file.flush(); say('half'); hear()"
        )
        for key in ("a", "new/b"):
            writer = child(program.format(key))
            assert writer.hear() == "half"
            writer.kill()
        assert self.raw_read(store, "a") == b"old"
        assert self.raw_read(store, "new/b") is None
        assert store.list_keys() == ["a"]

    def test_a_writer_that_is_killed_at_any_time_leaves_old_or_new(
        self, store: Store, child: Callable[[str], Child]
    ) -> None:
        program = (
            "store.write('a', b'0' * 2_000_000); say('begun')\n"
            "for number in range(1, 100_000): store.write('a', b'%d' % (number % 10) * 2_000_000)"
        )
        for delay in self.kill_delays:
            writer = child(program)
            assert writer.hear() == "begun"
            time.sleep(delay)
            writer.kill()
            data = self.raw_read(store, "a")
            assert data is not None
            assert len(data) == 2_000_000
            assert data == data[:1] * len(data)
            assert store.read("a") == data
            assert store.list_keys() == ["a"]

    def test_no_room(self, full_store: Store) -> None:
        """The error names the key's place, what was there is there still, and nothing else is."""
        full_store.write("a", b"old")
        large = bytes(4 * MEBIBYTE)
        for key, write in (
            ("a", lambda: full_store.write("a", large)),
            ("b", lambda: full_store.create_exclusive("b", large)),
            ("c/d", lambda: full_store.write("c/d", large)),
        ):
            with pytest.raises(DiskFull, match=r"bytes free\); make room and run the same command again") as caught:
                write()
            assert caught.value.filename == full_store.address(key)
        assert self.raw_everything(full_store) == {"a"}
        assert self.raw_read(full_store, "a") == b"old"
        full_store.write("a", b"new")

    # The commit point.

    def test_exclusive_creation_never_replaces(self, store: Store) -> None:
        assert store.create_exclusive("versions/1.json", b"first") is True
        assert store.create_exclusive("versions/1.json", b"second") is False
        assert self.raw_read(store, "versions/1.json") == b"first"
        self.raw_write(store, "versions/2.json", b"another program's")
        assert store.create_exclusive("versions/2.json", b"ours") is False
        assert self.raw_read(store, "versions/2.json") == b"another program's"
        assert self.raw_everything(store) == {"versions/1.json", "versions/2.json"}
        store.delete("versions/1.json")
        assert store.create_exclusive("versions/1.json", b"third") is True

    def test_of_two_processes_at_once_exactly_one_creates(self, store: Store, child: Callable[[str], Child]) -> None:
        program = (
            "name = hear(); say('ready')\n"
            "while key := hear():\n"
            "    say(store.create_exclusive(key, name.encode() * 1000))"
        )
        racers = {name: child(program) for name in ("one", "two", "six")}
        for name, racer in racers.items():
            racer.tell(name)
            assert racer.hear() == "ready"
        for number in range(self.race_rounds):
            key = f"race/{number}"
            for racer in racers.values():
                racer.tell(key)
            won = [name for name, racer in racers.items() if racer.hear() == "True"]
            assert len(won) == 1
            assert self.raw_read(store, key) == won[0].encode() * 1000
        assert len(self.raw_everything(store)) == self.race_rounds

    # Leases.

    def test_one_lease_at_a_time(self, store: Store, child: Callable[[str], Child]) -> None:
        holder = child("with store.lease('writing'): say('held'); hear()\nsay('done')")
        assert holder.hear() == "held"
        message = f"is in use by process {holder.process.pid}; wait until that run ends, or stop it"
        with pytest.raises(LakeBusy, match=message), store.lease("writing"):
            pass
        with store.lease("another"):
            pass
        holder.tell("end")
        assert holder.hear() == "done"
        with store.lease("writing"):
            pass
        assert store.list_keys() == []

    def test_a_lease_ends_with_an_error(self, store: Store) -> None:
        with pytest.raises(KeyError), store.lease("writing"):
            raise KeyError
        with store.lease("writing"):
            pass

    def test_a_lease_is_waited_for(self, store: Store, child: Callable[[str], Child]) -> None:
        program = "say('waits')\nwith store.lease('arrays', wait=True): say(store.read('order').decode())"
        with store.lease("arrays"):
            waiting = child(program)
            assert waiting.hear() == "waits"
            time.sleep(0.2)  # a store that does not wait would read what is not there yet, and say nothing
            store.write("order", b"after")
        assert waiting.hear() == "after"

    def test_the_lease_of_a_killed_process_ends(self, store: Store, child: Callable[[str], Child]) -> None:
        holder = child("with store.lease('writing'): say('held'); hear()")
        assert holder.hear() == "held"
        holder.kill()
        deadline = time.monotonic() + self.lease_expiry
        while True:
            late = time.monotonic() > deadline
            try:
                with store.lease("writing"):
                    return
            except LakeBusy:
                assert not late
                time.sleep(0.05)

    # Elsewhere.

    def test_addresses_and_local_paths(self, store: Store) -> None:
        assert store.address("a/b").startswith(store.address())
        assert store.address("a/b").endswith("a/b")
        if not self.local:
            with pytest.raises(LakeError):
                store.local_path("a/b")
            return
        self.raw_write(store, "a/b", b"x")
        assert store.local_path("a/b").read_bytes() == b"x"
        assert store.local_path("a/b").relative_to(store.local_path()) == Path("a/b")

    def test_a_pickled_store_is_the_same_place(self, store: Store, child: Callable[[str], Child]) -> None:
        other = child("import os\nos.chdir('/')\nstore.write('a', b'there'); say(store.read('b').decode())")
        self.raw_write(store, "b", b"here")
        assert other.hear() == "here"
        assert store.read("a") == b"there"
