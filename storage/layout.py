"""The lake: which keys its store has.

    versions/<n>.json          one immutable file per version, written last: the only commit point
    manifests/                 <n>-clips.parquet, <n>-films.parquet, <n>-rejected.parquet
    shards/                    <block_id>.tar and <block_id>.index.json
    arrays/                    the Icechunk repository
    texts/                     <text_id>-empty.npy, the empty caption's embedding
    staging/<block_id>.npz     finished blocks that no version has yet
    failures/<run_id>.parquet  what each run could not do, and why

Everything but arrays/ is read and written by key (`storage.store`), so that a lake can be wherever a store can.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from storage.address import store_at
from storage.local import write_atomic
from storage.s3_client import BucketError
from storage.store import DiskFull, LakeBusy, LakeError, Store, read_tagged

__all__ = ["DiskFull", "Lake", "LakeBusy", "LakeError", "version_naming", "write_atomic"]

_FOLDERS = ("versions", "manifests", "shards", "texts", "staging", "failures")


@dataclass(frozen=True)
class Lake:
    """A lake: everything that the pipeline keeps.

    Code reads and writes through `store`. The paths below are for what needs a file on a local disk, and for people;
    each raises LakeError where the store is on none.
    """

    store: Store

    @property
    def root(self) -> Path:
        """The lake's folder."""
        return self.store.local_path()

    @property
    def versions(self) -> Path:
        """Folder of the version files."""
        return self.store.local_path("versions")

    @property
    def manifests(self) -> Path:
        """Folder of the Parquet tables of clips and films."""
        return self.store.local_path("manifests")

    @property
    def shards(self) -> Path:
        """Folder of the WebDataset shards and their indexes."""
        return self.store.local_path("shards")

    @property
    def arrays(self) -> Path:
        """Folder of the Icechunk repository with the Zarr arrays."""
        return self.store.local_path("arrays")

    @property
    def texts(self) -> Path:
        """Folder of the empty caption's embeddings."""
        return self.store.local_path("texts")

    @property
    def staging(self) -> Path:
        """Folder of finished blocks that are not published yet."""
        return self.store.local_path("staging")

    @property
    def failures(self) -> Path:
        """Folder of the failure tables."""
        return self.store.local_path("failures")

    @staticmethod
    def create(address: str | Path) -> Lake:
        """The lake at `address`, a folder or `s3://bucket/prefix`, made if it is not there.

        Raises:
            LakeError: what is there is no lake, or the bucket cannot be used.
            DiskFull: no room for the folders.
        """
        store = store_at(address)
        store.create(_FOLDERS)
        return Lake(store)

    @staticmethod
    def open(address: str | Path) -> Lake:
        """The lake that is at `address`, a folder or `s3://bucket/prefix`.

        Raises:
            LakeError: there is none; the message says how one is made.
        """
        store = store_at(address)
        store.check(_FOLDERS)
        return Lake(store)

    @staticmethod
    def exists(address: str | Path) -> bool:
        """Whether a lake is at `address`. Raises BucketError where its bucket cannot be used."""
        try:
            Lake.open(address)
        except BucketError:
            raise
        except LakeError:
            return False
        return True

    @property
    def address(self) -> str:
        """Where the lake is, for people and for other programs: a path or a URL."""
        return self.store.address()

    def writing(self, wait: bool = False) -> AbstractContextManager[None]:
        """Hold the lake for one run that writes: from its plan until its version is published.

        Raises:
            LakeBusy: another run holds it, and `wait` is False. With `wait`, it is waited for.
        """
        return self.store.lease("writing", wait)


def version_naming(lake: Lake, key: str) -> int | None:
    """The number of a version that names this key of a lake, or None: what a version names must never change."""
    name = key.rpartition("/")[2]
    for number, text in version_texts(lake).items():
        if number.isdigit() and (f'"{name}"' in text or f'/{name}"' in text):
            return int(number)
    return None


def version_texts(lake: Lake) -> dict[str, str]:
    """The text of every version file by its name's stem, that of a damaged one too."""
    return {
        key.removeprefix("versions/").removesuffix(".json"): read_tagged(lake.store, key, tag).decode(
            "utf-8", errors="replace"
        )
        for key, tag in lake.store.tags("versions/").items()
        if key.endswith(".json")
    }
