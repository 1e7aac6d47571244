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

from storage.local import TEMPORARY_SUFFIX, LocalStore, naming_full_disk, write_atomic
from storage.store import DiskFull, LakeBusy, LakeError, Store

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
    def create(path: str | Path) -> Lake:
        """The lake in the folder `path`, made if it is not there.

        Raises:
            LakeError: `path` is a file, or a folder that holds other things and is no lake.
            DiskFull: no room for the folders.
        """
        root = Path(path)
        if root.exists() and not (root / "versions").is_dir():
            if not root.is_dir():
                raise LakeError(f"{root} is a file, not a folder; name a new folder for the lake")
            if any(not entry.name.startswith(".") for entry in root.iterdir()):
                raise LakeError(f"{root} holds other files and is no lake; name a new or an empty folder")
        with naming_full_disk(root):
            # versions/ comes first: it is what makes a folder a lake.
            for folder in _FOLDERS:
                (root / folder).mkdir(parents=True, exist_ok=True)
        return Lake(LocalStore(root))

    @staticmethod
    def open(path: str | Path) -> Lake:
        """The lake that is in the folder `path`.

        Raises:
            LakeError: there is none; the message says how one is made.
        """
        root = Path(path)
        if not (root / "versions").is_dir():
            what = "is no lake (it has no versions/ folder)" if root.exists() else "does not exist"
            raise LakeError(f"{root} {what}; make a lake with: vlfm ingest SOURCE --lake {root}")
        return Lake(LocalStore(root))

    def writing(self) -> AbstractContextManager[None]:
        """Hold the lake for one run that writes: from its plan until its version is published.

        Raises:
            LakeBusy: another run holds it.
        """
        return self.store.lease("writing")

    def garbage(self) -> list[Path]:
        """Files that no version needs: temporary files of dead runs, and shards, indexes, tables and texts that no
        version names. Call it inside `writing()` only, or a run's fresh files look like garbage too.

        Blocks in staging/ and the Icechunk repository are not looked at.
        """
        texts = _version_texts(self).values()
        found = []
        for folder in _FOLDERS:
            files = self.store.local_path(folder)
            for file in sorted(files.iterdir()) if files.is_dir() else []:
                owner = file.name.replace(".index.json", ".tar")
                named = folder in ("versions", "staging", "failures") or any(owner in text for text in texts)
                if file.is_file() and (file.name.endswith(TEMPORARY_SUFFIX) or not named):
                    found.append(file)
        return found


def version_naming(lake: Lake, key: str) -> int | None:
    """The number of a version that names this key of a lake, or None: what a version names must never change."""
    name = key.rpartition("/")[2]
    for number, text in _version_texts(lake).items():
        if number.isdigit() and (f'"{name}"' in text or f'/{name}"' in text):
            return int(number)
    return None


def _version_texts(lake: Lake) -> dict[str, str]:
    """The text of every version file by its name's stem, that of a damaged one too."""
    keys = [key for key in lake.store.list_keys("versions/") if key.endswith(".json")]
    return {
        key.removeprefix("versions/").removesuffix(".json"): lake.store.read(key).decode("utf-8", errors="replace")
        for key in keys
    }
