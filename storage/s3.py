"""The store in a bucket of an S3 service: AWS, or whatever AWS_ENDPOINT_URL names (MinIO, Ceph, R2 ...).

An object is put whole and replaced whole, so a write is never seen half done. Exclusive creation is S3's conditional
put (If-None-Match); a server that ignores it is refused. A lease is a small object that its holder renews (see
`storage.lease`). What is put carries its sha256, which is compared when the whole object is read; the client compares a
CRC of its own on the wire. Answers 500, 503 and time-outs are retried with growing, random pauses.

Address and credentials come from where every AWS program finds them: AWS_* variables, profiles, the machine's role.
They are no fields of the store, so neither its representation nor a message can hold a secret.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import io
import os
import random
import secrets
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, BinaryIO, TypeVar, cast
from urllib.parse import urlsplit

from storage.cache import ByteCache
from storage.errors import Kind, VlfmError
from storage.lease import Held, Seen
from storage.local import naming_full_disk
from storage.s3_client import ATTEMPTS, Absent, BucketError, Condition, NoRange, client, host, path_style, told
from storage.store import LakeError, check_key, check_lease, check_prefix

T = TypeVar("T")

_ONE_PUT, _PART = 64 << 20, 32 << 20
_IN_MEMORY = 8 << 20
_DIGEST, _WRITER = "vlfm-sha256", "vlfm-writer"
_OWN = ".vlfm"  # the store's own objects lie under this name, which no key can have


class DamagedObject(LakeError):
    """An object's bytes are not those that were written, by their checksum, however often they are read."""

    kind = Kind.DAMAGE


@dataclass(frozen=True)
class S3Store:
    """A `Store` under a prefix of a bucket, which has to be there."""

    bucket: str
    prefix: str = ""
    """Start of all keys, without slashes at its ends; empty: the whole bucket."""
    endpoint: str | None = None
    """URL of the service; None: AWS, or as the environment and the profile say."""
    lease_seconds: float = 60.0
    """A lease that was not renewed for so long has ended."""

    @staticmethod
    def at(url: str) -> S3Store:
        """The store at `s3://bucket/prefix`.

        Raises:
            LakeError: no such URL, or one that holds credentials.
        """
        parts = urlsplit(url)
        if "@" in parts.netloc:
            raise LakeError(
                "an s3:// address holds no credentials; give s3://BUCKET/PREFIX, and set AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY"
            )
        if parts.scheme != "s3" or not parts.netloc or parts.query or parts.fragment:
            raise LakeError(f"{url!r} is no address of a bucket; give s3://BUCKET/PREFIX")
        prefix = parts.path.strip("/")
        try:
            check_prefix(prefix)
        except ValueError as error:
            raise LakeError(f"{url}: {error}") from None
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or None
        if endpoint is not None and "@" in urlsplit(endpoint).netloc:
            raise LakeError("AWS_ENDPOINT_URL holds credentials; leave them out and set AWS_ACCESS_KEY_ID instead")
        return S3Store(parts.netloc, prefix, endpoint)

    # The protocol.

    def address(self, key: str = "") -> str:
        root = f"s3://{self.bucket}/{self.prefix}".rstrip("/")
        return f"{root}/{check_key(key)}" if key else root

    def create(self, folders: Sequence[str]) -> None:
        self.check_bucket()
        marked = self._size(f"{_OWN}/store") is not None
        if not marked:
            foreign = next(iter(self._listed("", limit=1)), None)
            if foreign is not None and foreign.partition("/")[0] not in folders:
                raise LakeError(f"{self.address()} holds other objects and is no lake; name a new or an empty prefix")
            self._put(f"{_OWN}/store", b"{}")

    def check(self, folders: Sequence[str]) -> None:
        self.check_bucket()
        if self._size(f"{_OWN}/store") is None and not self.list_keys(f"{folders[0]}/"):
            raise LakeError(
                f"{self.address()} is no lake (nothing is stored there by vlfm); "
                f"make a lake with: vlfm ingest SOURCE --lake {self.address()}"
            )

    def size(self, key: str) -> int | None:
        return self._size(check_key(key))

    def sizes(self, prefix: str = "") -> dict[str, int]:
        listed = self._listed(check_prefix(prefix))
        return dict(sorted((key, entry["Size"]) for key, entry in listed.items() if _is_key(key)))

    def tags(self, prefix: str = "") -> dict[str, str]:
        """As the protocol has it: the ETags."""
        listed = self._listed(check_prefix(prefix))
        return dict(sorted((key, entry["ETag"]) for key, entry in listed.items() if _is_key(key)))

    def list_keys(self, prefix: str = "") -> list[str]:
        return list(self.sizes(prefix))

    def read(self, key: str, start: int = 0, stop: int | None = None) -> bytes:
        check_key(key)
        if start == 0 and stop is None:
            with self.open_read(key) as file:
                return file.read()
        if stop is None or not 0 <= start < stop:
            size = self.size(key)
            if size is None:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self.address(key))
            stop = size if stop is None else stop
            if not 0 <= start <= stop <= size:
                raise self._no_range(key, start, stop, size)
            if start == stop:
                return b""
        end = stop
        return self._again(key, lambda: self._ranged(key, start, end))

    def open_read(self, key: str) -> BinaryIO:
        """As the protocol has it: a copy of the object, in memory or, where it is large, in a temporary file."""
        return self._again(check_key(key), lambda: self._copied(key))

    def write(self, key: str, data: bytes) -> None:
        check_key(key)
        self._still_held()
        self._put(key, data)

    @contextlib.contextmanager
    def open_write(self, key: str) -> Iterator[BinaryIO]:
        """As the protocol has it. What is written waits in memory or in a temporary file, and is put at the end."""
        check_key(key)
        with naming_full_disk(tempfile.gettempdir()), tempfile.SpooledTemporaryFile(_IN_MEMORY) as file:
            yield cast(BinaryIO, file)
            self._still_held()
            self._put_file(key, file)

    def create_exclusive(self, key: str, data: bytes) -> bool:
        """As the protocol has it. While this process holds a lease of the store, the lease is renewed first.

        Raises:
            LakeBusy: another process has taken the lease over.
            LakeError: the server does not know conditional puts.
        """
        check_key(key)
        self._check_conditions()
        for held in self._held.values():
            held.renew()
        return self._create(key, data)

    def delete(self, key: str) -> None:
        check_key(key)
        self._still_held()
        self._call("delete_object", key)

    def clean(self, delete: bool) -> list[str]:
        """As the protocol has it: uploads in parts that came to no end, which cost as much as objects."""
        found = []
        start = f"{self.prefix}/" if self.prefix else ""
        with self._errors():
            pages = client(self.endpoint).get_paginator("list_multipart_uploads")
            for page in pages.paginate(Bucket=self.bucket, Prefix=start):
                for upload in page.get("Uploads", ()):
                    found.append(f"s3://{self.bucket}/{upload['Key']} (upload {upload['UploadId']})")
                    if delete:
                        own = {"Bucket": self.bucket, "Key": upload["Key"], "UploadId": upload["UploadId"]}
                        client(self.endpoint).abort_multipart_upload(**own)
        return sorted(found)

    @contextlib.contextmanager
    def lease(self, name: str, wait: bool = False) -> Iterator[None]:
        check_lease(name)
        self._check_conditions()
        held = Held(_Leases(self), name, self.address(), self.lease_seconds)
        held.acquire(wait)
        self._held[name] = held
        try:
            yield
        finally:
            del self._held[name]
            held.release()

    def local_path(self, key: str = "") -> Path:
        raise LakeError(f"{self.address(key)} is in a bucket, not on a local disk; copy it to one for this")

    def cache(self) -> ByteCache | None:
        return ByteCache.of_environment()

    # What sources and Icechunk use beside the protocol.

    @property
    def service(self) -> tuple[str, str, bool]:
        """URL of the service, region, and whether the bucket's name comes in the path (not in the host)."""
        about = client(self.endpoint).meta
        return about.endpoint_url, about.region_name, path_style(about.endpoint_url)

    def check_bucket(self) -> None:
        """Raises BucketError where the bucket is not there or cannot be used. Two tries only: it is asked first."""
        with self._errors():
            client(self.endpoint, attempts=2).head_bucket(Bucket=self.bucket)

    def objects(self, prefix: str = "") -> dict[str, Mapping[str, Any]]:
        """Everything under a prefix of the store, whatever its name: key to `Size`, `ETag` and `LastModified`."""
        return self._listed(prefix)

    def download(self, key: str, file: IO[bytes], etag: str | None = None) -> None:
        """Write an object (of any name) into `file`. Raises FileNotFoundError where it is not there any more, or is
        not the one with this ETag."""
        condition = {} if etag is None else {"IfMatch": etag}

        def copied() -> None:
            file.seek(0)
            file.truncate()
            self._stream(self._call("get_object", key, **condition), file)

        self._again(key, copied)

    def key_in_bucket(self, key: str) -> str:
        """The bucket's own name of a key of the store."""
        return f"{self.prefix}/{key}" if self.prefix else key

    # Objects.

    def _call(self, operation: str, key: str, **given: Any) -> Any:
        with self._errors(key):
            return getattr(client(self.endpoint), operation)(Bucket=self.bucket, Key=self.key_in_bucket(key), **given)

    def _size(self, key: str) -> int | None:
        try:
            return int(self._call("head_object", key)["ContentLength"])
        except FileNotFoundError:
            return None

    def _listed(self, prefix: str, limit: int = 0) -> dict[str, Mapping[str, Any]]:
        found: dict[str, Mapping[str, Any]] = {}
        start = f"{self.prefix}/" if self.prefix else ""
        with self._errors():
            pages = client(self.endpoint).get_paginator("list_objects_v2")
            size = {"PageSize": limit, "MaxItems": limit} if limit else {}
            for page in pages.paginate(Bucket=self.bucket, Prefix=start + prefix, PaginationConfig=size):
                found |= {entry["Key"][len(start) :]: entry for entry in page.get("Contents", ())}
        return found

    def _ranged(self, key: str, start: int, stop: int) -> bytes:
        try:
            answer = self._call("get_object", key, Range=f"bytes={start}-{stop - 1}")
        except NoRange:
            raise self._no_range(key, start, stop, self._size(key) or 0) from None
        with contextlib.closing(answer["Body"]) as body:
            data: bytes = body.read()
        total = int(answer["ContentRange"].rpartition("/")[2])
        if stop > total:
            raise self._no_range(key, start, stop, total)
        if len(data) != stop - start:
            raise _Torn(f"{len(data)} bytes came of {stop - start}")
        return data

    def _copied(self, key: str) -> BinaryIO:
        answer = self._call("get_object", key)
        large = answer["ContentLength"] > _IN_MEMORY
        file: Any = tempfile.TemporaryFile() if large else io.BytesIO()  # noqa: SIM115 (the caller closes it)
        try:
            with naming_full_disk(tempfile.gettempdir()):
                self._stream(answer, file)
        except BaseException:
            file.close()
            raise
        file.seek(0)
        return cast(BinaryIO, file)

    def _stream(self, answer: Mapping[str, Any], file: IO[bytes]) -> None:
        digest, size = hashlib.sha256(), 0
        with contextlib.closing(answer["Body"]) as body:
            for piece in body.iter_chunks(1 << 20):
                file.write(piece)
                digest.update(piece)
                size += len(piece)
        if size != answer["ContentLength"]:
            raise _Torn(f"{size} bytes came of {answer['ContentLength']}")
        # What another program has put (a film of a source) has no checksum of ours.
        expected = answer["Metadata"].get(_DIGEST)
        if expected is not None and digest.hexdigest() != expected:
            raise _Torn("wrong checksum")

    def _put(self, key: str, data: bytes, **given: Any) -> Any:
        metadata = {_DIGEST: hashlib.sha256(data).hexdigest(), **given.pop("Metadata", {})}
        return self._call("put_object", key, Body=data, Metadata=metadata, **given)

    def _put_file(self, key: str, file: IO[bytes]) -> None:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        if size <= _ONE_PUT:
            self._put(key, file.read())
            return
        from boto3.s3.transfer import TransferConfig

        digest = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
        file.seek(0)
        parts = TransferConfig(multipart_threshold=_ONE_PUT, multipart_chunksize=_PART, max_concurrency=4)
        with self._errors(key):
            client(self.endpoint).upload_fileobj(
                _Unclosed(file),
                self.bucket,
                self.key_in_bucket(key),
                ExtraArgs={"Metadata": {_DIGEST: digest}},
                Config=parts,
            )

    def _create(self, key: str, data: bytes) -> bool:
        writer = secrets.token_hex(8)
        for pause in _pauses():
            try:
                self._put(key, data, IfNoneMatch="*", Metadata={_WRITER: writer})
                return True
            except Condition as error:
                if error.raced:
                    time.sleep(pause)
                    continue
                # A try whose answer was lost may have been the one that created it.
                return bool(self._call("head_object", key)["Metadata"].get(_WRITER) == writer)
        raise BucketError(f"{self.address()}: others keep writing {key!r}; run the same command again")

    def _again(self, key: str, work: Callable[[], T]) -> T:
        """`work`, tried again where the connection breaks within an object's bytes: the client retries only before."""
        client(self.endpoint)  # says what is missing where the client is not installed
        from botocore.exceptions import BotoCoreError, FlexibleChecksumError

        last: Exception | None = None
        for pause in _pauses():
            try:
                return work()
            except (_Torn, BotoCoreError, ConnectionError) as error:
                last = error
                time.sleep(pause)
        told = f"s3://{self.bucket}/{self.key_in_bucket(key)} could not be read whole in {ATTEMPTS} tries"
        if isinstance(last, _Torn | FlexibleChecksumError):
            raise DamagedObject(f"{told} ({last}); restore it from a copy, or ingest the films into a new lake")
        raise BucketError(f"{told} ({type(last).__name__}); run the same command again later") from last

    # Promises.

    def _check_conditions(self) -> None:
        """Raises LakeError where the server puts an object that it was told not to put. It is tried once a process."""
        process = _process(self.bucket, self.prefix, self.endpoint, os.getpid())
        if process.conditions:
            return
        probe = f"{_OWN}/exclusive"
        self._create(probe, b"")
        if self._create(probe, b""):
            raise LakeError(
                f"the server of bucket {self.bucket!r} ({host(self.endpoint)}) ignores If-None-Match, so two runs "
                "could publish the same version; use one with conditional writes"
            )
        process.conditions = True

    @property
    def _held(self) -> dict[str, Held]:
        return _process(self.bucket, self.prefix, self.endpoint, os.getpid()).held

    def _still_held(self) -> None:
        for held in self._held.values():
            held.check()

    def _no_range(self, key: str, start: int, stop: int, size: int) -> ValueError:
        return ValueError(f"{self.address(key)} has {size} bytes; {start} to {stop} is no range of them")

    @contextlib.contextmanager
    def _errors(self, key: str | None = None) -> Iterator[None]:
        """Say in one line, with bucket, host and remedy, what the client says in its own words."""
        try:
            yield
        except (VlfmError, OSError):
            raise
        except Exception as error:
            meaning = told(error, self.bucket, self.endpoint, is_object=key is not None)
            if meaning is None:
                raise
            if isinstance(meaning, Absent):
                meaning = FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), f"{self.address()}/{key}")
            raise meaning from (None if isinstance(meaning, FileNotFoundError | Condition | NoRange) else error)


@dataclass(frozen=True)
class _Leases:
    """The objects of a store's leases, for `storage.lease`."""

    store: S3Store

    def read(self, name: str) -> Seen | None:
        try:
            answer = self.store._call("get_object", f"{_OWN}/{name}.lease")
        except FileNotFoundError:
            return None
        told = answer["ResponseMetadata"]["HTTPHeaders"].get("date")
        now = _http_date(told) if told else time.time()
        # The age by the server's own clock: those of the machines may differ.
        return Seen(answer["Body"].read(), answer["ETag"], now - answer["LastModified"].timestamp())

    def put(self, name: str, data: bytes, tag: str | None) -> str | None:
        """Store `data` where the object still has the tag (None: where there is none): its new tag, None otherwise."""
        condition = {"IfNoneMatch": "*"} if tag is None else {"IfMatch": tag}
        try:
            return str(self.store._put(f"{_OWN}/{name}.lease", data, **condition)["ETag"])
        except (Condition, FileNotFoundError):
            return None


class _Torn(Exception):
    """The bytes that came are not all, or not those that were put."""


class _Unclosed(io.RawIOBase):
    """A file that the transfer may close: the one behind it stays open."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def read(self, size: int = -1, /) -> bytes:
        return self.file.read(size)

    def seek(self, offset: int, whence: int = 0, /) -> int:
        return self.file.seek(offset, whence)

    def tell(self) -> int:
        return self.file.tell()


def _pauses() -> Iterator[float]:
    for attempt in range(ATTEMPTS):
        yield random.uniform(0, min(10.0, 0.1 * 2**attempt))


def _is_key(key: str) -> bool:
    try:
        return bool(check_key(key))
    except ValueError:
        return False


@dataclass
class _Process:
    """What this process knows of a store and holds there."""

    held: dict[str, Held] = field(default_factory=dict)
    """Its leases by name."""
    conditions: bool = False
    """Whether the server was seen to enforce conditions."""


@functools.lru_cache(maxsize=256)
def _process(bucket: str, prefix: str, endpoint: str | None, process: int) -> _Process:
    return _Process()


def _http_date(text: str) -> float:
    from email.utils import parsedate_to_datetime

    return parsedate_to_datetime(text).timestamp()
