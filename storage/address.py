"""Addresses: which store a word on the command line names: a folder, `file:///folder` or `s3://bucket/prefix`."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote, urlsplit

from storage.local import LocalStore
from storage.s3 import S3Store
from storage.store import LakeError, Store


def store_at(address: str | Path) -> Store:
    """The store at an address; nothing is opened yet.

    Raises:
        LakeError: an address of another kind; the message says which there are.
    """
    text = str(address)
    if isinstance(address, str) and is_bucket(address):
        return S3Store.at(address)
    if text.startswith("s3:/"):
        raise LakeError(f"{text!r} is no address of a bucket; give s3://BUCKET/PREFIX")
    if text.startswith("file://"):
        return LocalStore(_folder(text))
    if "://" in text:
        raise LakeError(f"{text!r}: use a folder, file:///FOLDER or s3://BUCKET/PREFIX")
    return LocalStore(Path(address))


def is_bucket(address: str) -> bool:
    """Whether an address is that of a bucket, or of a prefix in one."""
    return address.startswith("s3://")


def last_name(address: str | Path) -> str:
    """The last name of an address, for titles."""
    return Path(str(address).rstrip("/")).name


def _folder(url: str) -> Path:
    parts = urlsplit(url)
    if parts.netloc not in ("", "localhost") or not parts.path:
        raise LakeError(f"{url!r} names another machine; give file:///FOLDER, with three slashes")
    return Path(unquote(parts.path))
