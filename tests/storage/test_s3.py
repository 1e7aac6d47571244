"""The store in a bucket, against a real S3 server on loopback: the contract of every store, and what is its own."""

from __future__ import annotations

import gc
import itertools
import json
import os
import pickle
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from storage.address import store_at
from storage.s3 import DamagedObject, S3Store
from storage.s3_client import BucketError
from storage.store import LakeBusy, LakeError, Store
from tests.s3_server import S3Server
from tests.storage.store_contract import Child, StoreContract

_NUMBERS = itertools.count()


@pytest.fixture
def bucket(s3: S3Server, s3_environment: None) -> str:
    name = f"bucket-{os.getpid()}-{next(_NUMBERS)}"
    s3.client.create_bucket(Bucket=name)
    return name


@pytest.fixture
def store(s3: S3Server, bucket: str) -> S3Store:
    return S3Store(bucket, "a lake/of mine", s3.url, lease_seconds=1.5)


class TestS3Store(StoreContract):
    lease_expiry = 10.0
    race_rounds = 10
    kill_delays = (0.0, 0.03)
    local = False

    @pytest.fixture
    def store(self, s3: S3Server, bucket: str) -> Store:
        self.raw = s3.client
        return S3Store(bucket, "a lake/of mine", s3.url, lease_seconds=1.5)

    def raw_read(self, store: S3Store, key: str) -> bytes | None:
        if key not in self.raw_everything(store):
            return None
        data: bytes = self.raw.get_object(Bucket=store.bucket, Key=f"a lake/of mine/{key}")["Body"].read()
        return data

    def raw_write(self, store: S3Store, key: str, data: bytes) -> None:
        self.raw.put_object(Bucket=store.bucket, Key=f"a lake/of mine/{key}", Body=data)

    def raw_everything(self, store: S3Store) -> set[str]:
        pages = self.raw.get_paginator("list_objects_v2").paginate(Bucket=store.bucket)
        keys = {entry["Key"] for page in pages for entry in page.get("Contents", ())}
        assert all(key.startswith("a lake/of mine/") for key in keys)
        return {key for key in (key.removeprefix("a lake/of mine/") for key in keys) if not key.startswith(".vlfm/")}


# Errors on the way.


def test_a_busy_server_is_asked_again(s3: S3Server, store: S3Store) -> None:
    s3.fault("PUT .*/a$", 503, times=2)
    store.write("a", b"x")
    s3.fault("GET .*/a$", 500, times=2)
    assert store.read("a") == b"x"
    s3.fault("GET .*/a$", 503)
    s3.requests()
    assert store.read("a", 0, 1) == b"x"
    assert len(s3.requests()) == 2


def test_a_server_that_stays_busy_is_named(s3: S3Server, store: S3Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    s3.fault("PUT .*/a$", 503, times=2)
    with pytest.raises(BucketError, match=rf"^bucket '{store.bucket}' \(127.0.0.1:\d+\) answered 503 .*again later$"):
        store.write("a", b"x")
    assert store.list_keys() == []


@pytest.mark.parametrize("size", [1000, 9 << 20], ids=["in memory", "in a file"])
def test_bytes_that_break_on_the_way_are_read_again(s3: S3Server, store: S3Store, size: int) -> None:
    data = bytes(range(250)) * (size // 250)
    store.write("a", data)
    for fault in (1, 2):  # the connection breaks, a bit flips
        s3.fault("GET .*/a$", fault)
        assert store.read("a") == data
    s3.fault("GET .*/a$", 1)
    assert store.read("a", 100, 200) == data[100:200]


def test_bytes_that_are_not_what_was_written_are_no_answer(
    s3: S3Server, store: S3Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("storage.s3.time.sleep", lambda seconds: None)
    store.write("a", b"good")
    put = s3.client.get_object(Bucket=store.bucket, Key="a lake/of mine/a")
    s3.client.put_object(Bucket=store.bucket, Key="a lake/of mine/a", Body=b"evil", Metadata=put["Metadata"])
    with pytest.raises(DamagedObject, match=r"a lake/of mine/a could not be read whole in 8 tries \(wrong checksum\)"):
        store.read("a")


# botocore leaves the socket of a part that was refused to the garbage collector.
@pytest.mark.filterwarnings("ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning")
def test_a_large_file_goes_in_parts(s3: S3Server, store: S3Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("storage.s3._ONE_PUT", 6 << 20)
    monkeypatch.setattr("storage.s3._PART", 5 << 20)
    data = os.urandom(11 << 20)
    s3.fault("PUT .*/a$", 503)
    with store.open_write("a") as file:
        file.write(data)
    assert store.read("a") == data
    s3.requests()
    assert store.read("a", 7 << 20, (7 << 20) + 5) == data[7 << 20 : (7 << 20) + 5]
    assert len(s3.requests()) == 1, "only that part is read"
    gc.collect()


# One winner, whatever is lost.


@pytest.mark.parametrize("after", [False, True], ids=["not done", "done, its answer lost"])
def test_a_creation_that_is_tried_again_has_one_winner(s3: S3Server, store: S3Store, after: bool) -> None:
    s3.fault("PUT .*/versions/1.json$", 500, after=after)
    assert store.create_exclusive("versions/1.json", b"ours") is True
    s3.fault("PUT .*/versions/1.json$", 500, after=after)
    assert store.create_exclusive("versions/1.json", b"ours") is False
    s3.fault("PUT .*/versions/2.json$", 409)
    assert store.create_exclusive("versions/2.json", b"ours") is True


@pytest.mark.parametrize("after", [False, True], ids=["not done", "done, its answer lost"])
def test_a_lease_that_is_tried_again_is_held(s3: S3Server, store: S3Store, after: bool) -> None:
    for _ in range(2):
        s3.fault("PUT .*/writing.lease$", 500, after=after)
        with store.lease("writing"):
            s3.fault("PUT .*/writing.lease$", 500, after=after)
            assert store.create_exclusive(f"versions/{next(_NUMBERS)}.json", b"{}") is True
    with store.lease("writing"):
        pass


def test_a_server_that_ignores_conditions_is_refused(s3: S3Server, store: S3Store) -> None:
    s3.fault("PUT .*/exclusive$", 3, times=2)
    with (
        pytest.raises(LakeError, match=r"ignores If-None-Match.*use one with conditional writes"),
        store.lease("writing"),
    ):
        pass
    s3.fault("PUT .*/exclusive$", 501)
    with pytest.raises(LakeError, match="does not know conditional writes"):
        store.create_exclusive("a", b"")


# Leases.


def lease_of(s3: S3Server, store: S3Store) -> dict[str, Any]:
    found = s3.client.get_object(Bucket=store.bucket, Key="a lake/of mine/.vlfm/writing.lease")
    state: dict[str, Any] = json.loads(found["Body"].read())
    return state


@pytest.fixture
def child(store: S3Store) -> Iterator[Callable[[str], Child]]:
    made = []

    def start(program: str) -> Child:
        made.append(Child(store, program))
        return made[-1]

    yield start
    for each in made:
        with each.process:
            each.process.kill()


def test_a_lease_outlives_its_length_while_it_is_renewed(s3: S3Server, store: S3Store) -> None:
    with store.lease("writing"):
        first = lease_of(s3, store)
        time.sleep(4)
        with (
            pytest.raises(LakeBusy, match=r"is in use by process \d+; wait .*is free after 1.5 s"),
            store.lease("writing"),
        ):
            pass
        assert store.create_exclusive("versions/1.json", b"{}")
        assert lease_of(s3, store)["expires"] > first["expires"]
    assert lease_of(s3, store)["owner"] is None


def test_the_fencing_number_grows_with_every_holder(s3: S3Server, store: S3Store) -> None:
    found = []
    for _ in range(3):
        with store.lease("writing"):
            found.append(lease_of(s3, store)["fence"])
    assert found == [1, 2, 3]


def test_a_holder_that_stood_still_publishes_nothing(
    s3: S3Server, store: S3Store, child: Callable[[str], Child]
) -> None:
    """It is stopped, its lease expires, another takes it over, and it goes on as if nothing had been."""
    program = (
        "from storage.store import LakeBusy\n"
        "with store.lease('writing'):\n"
        "    say('held'); hear()\n"
        "    publish = lambda: store.create_exclusive('versions/1.json', b'late')\n"
        "    for work in (publish, lambda: store.write('b', b'late')):\n"
        "        try: say(work())\n"
        "        except LakeBusy as error: say(error)\n"
    )
    late = child(program)
    assert late.hear() == "held"
    late.process.send_signal(signal.SIGSTOP)
    deadline = time.monotonic() + 10
    while True:
        try:
            with store.lease("writing"):
                assert lease_of(s3, store)["fence"] == 2
                late.process.send_signal(signal.SIGCONT)
                late.tell("go on")
                told = [late.hear(), late.hear()]
                assert store.create_exclusive("versions/1.json", b"ours")
            break
        except LakeBusy:
            assert time.monotonic() < deadline
            time.sleep(0.2)
    for line in told:
        assert line.startswith(f"this run lost its hold on {store.address()} by process {os.getpid()} after 1.5 s")
        assert line.endswith("it publishes nothing, run the same command again")
    assert store.read("versions/1.json") == b"ours"
    assert store.size("b") is None


def test_a_damaged_lease_is_named(s3: S3Server, store: S3Store) -> None:
    s3.client.put_object(Bucket=store.bucket, Key="a lake/of mine/.vlfm/writing.lease", Body=b"?")
    with pytest.raises(LakeError, match=r"the lease 'writing' of s3:.* is damaged; delete"), store.lease("writing"):
        pass


# What is wrong with an address, a bucket, a machine.


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("s3://", "give s3://BUCKET/PREFIX"),
        ("s3:/bucket/x", "give s3://BUCKET/PREFIX"),
        ("s3://bucket/a//b", "without leading dots, backslashes or empty names"),
        ("s3://bucket/.a", "without leading dots"),
        ("s3://bucket/a?x=1", "is no address of a bucket"),
        ("gs://bucket/a", "use a folder, file:///FOLDER or s3://BUCKET/PREFIX"),
        ("file://host/a", "names another machine"),
        ("s3:" + "//KEY:hunter2@bucket/a", "an s3:// address holds no credentials"),
    ],
)
def test_addresses_that_are_none(address: str, message: str) -> None:
    with pytest.raises(LakeError, match=message) as caught:
        store_at(address)
    assert "hunter2" not in str(caught.value)


def test_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://server:9000")
    assert store_at("s3://bucket/a/b/") == S3Store("bucket", "a/b", "http://server:9000")
    assert store_at("s3://bucket").address() == "s3://bucket"
    assert store_at("file:///a%20b/c").address() == "/a b/c"
    assert store_at("a/b").address() == "a/b"


def test_what_is_wrong_with_a_bucket_is_one_line_with_the_remedy(
    s3: S3Server, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def told(store: S3Store) -> str:
        with pytest.raises(BucketError) as caught:
            store.check(["versions"])
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            assert os.environ.get(name, "-" * 99) not in f"{caught.value} {caught.value!r} {store!r}"
        assert "\n" not in str(caught.value)
        return str(caught.value)

    host = s3.url.removeprefix("http://")
    no_such = S3Store(f"no-{bucket}", endpoint=s3.url)
    remedy = "does not exist; create it, or correct its name or AWS_ENDPOINT_URL"
    assert told(no_such) == f"bucket 'no-{bucket}' ({host}) {remedy}"
    assert "correct the name of the bucket" in told(S3Store("a b", endpoint=s3.url))
    down = S3Store(bucket, endpoint="http://127.0.0.1:9")
    assert told(down) == f"bucket '{bucket}' (127.0.0.1:9) cannot be reached; check AWS_ENDPOINT_URL and the network"
    there = S3Store(bucket, endpoint=s3.url)
    s3.fault("HEAD", 403)
    assert f"bucket '{bucket}' ({host}) refuses these credentials (403); check AWS_ACCESS_KEY_ID" in told(there)
    s3.fault("HEAD", 400)
    assert told(there).endswith("refuses the request (400); check AWS_REGION and the credentials")
    s3.fault("GET", 400, times=99, code="AuthorizationHeaderMalformed")
    assert told(there).endswith("is in another region; set AWS_REGION to the bucket's region")
    s3.heal()
    assert "is no URL; give http(s)://HOST[:PORT]" in told(S3Store(bucket, endpoint="nonsense"))
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    assert told(there).startswith(f"no credentials for bucket '{bucket}' ({host}); set AWS_ACCESS_KEY_ID and")
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    assert "correct AWS_PROFILE" in told(there)


def test_a_bucket_that_goes_away_is_no_missing_key(s3: S3Server, store: S3Store) -> None:
    s3.client.delete_bucket(Bucket=store.bucket)
    for work in (lambda: store.read("a"), lambda: store.write("a", b""), store.list_keys):
        with pytest.raises(BucketError, match="does not exist; create it"):
            work()


def test_without_the_client_the_extra_is_named(store: S3Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "boto3", None)
    monkeypatch.setenv("AWS_EXTRA", "no client was made for these settings")
    with pytest.raises(
        BucketError, match=r"needs the extra `s3`, which is not installed; run: pip install 'vlfm\[s3\]'"
    ):
        store.read("a")


def test_neither_a_store_nor_its_pickle_holds_a_secret(store: S3Store) -> None:
    store.list_keys()
    assert b"test-secret-7Q" not in pickle.dumps(store)
    assert "test-" not in repr(store)


def test_objects_of_others_that_no_key_can_name(s3: S3Server, store: S3Store) -> None:
    """They are neither listed nor in the way; a listing of everything, as sources need it, has them."""
    names = ["a//b", "dir/", "x/../y", "back\\slash", "#[1] %20~.mp4", ".hidden"]
    for name in names:
        s3.client.put_object(Bucket=store.bucket, Key=f"a lake/of mine/{name}", Body=b"x")
    assert store.list_keys() == ["#[1] %20~.mp4"]
    assert store.read("#[1] %20~.mp4") == b"x"
    assert sorted(store.objects()) == sorted(names)
