"""Copies of a run's checkpoints in a store, such as a bucket: a run goes on where its machine and its disk are gone.

Below the store's address lie `checkpoints/run.json` and `checkpoints/step-<n>/<file>`; the checksums of a checkpoint
come last, and one that lacks them is not whole.
"""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from model.training.checkpoint import Run
from model.training.integrity import CHECKSUMS, damage, publish
from storage.layout import write_atomic
from storage.local import naming_full_disk
from storage.store import Store

FOLDER = "checkpoints"
_CHECKSUMS_KEY = re.compile(rf"{FOLDER}/step-(\d{{8,}})/{CHECKSUMS}")


class Copies:
    """The copies of a run's checkpoints in a store.

    keep: newest checkpoints that stay there.
    """

    def __init__(self, run: Run, store: Store, keep: int) -> None:
        self.run, self.store, self.keep = run, store, keep
        store.create([FOLDER])

    def steps(self) -> list[int]:
        """Steps of the whole checkpoints in the store, rising."""
        found = (_CHECKSUMS_KEY.fullmatch(key) for key in self.store.list_keys(f"{FOLDER}/step-"))
        return sorted(int(match[1]) for match in found if match)

    def push(self, folder: Path) -> None:
        """Copy a checkpoint and the run's description, and remove older copies.

        Raises what the store raises; the copies that there were stay.
        """
        self.store.write(f"{FOLDER}/run.json", self.run.file.read_bytes())
        names = sorted(path.name for path in folder.iterdir() if path.name != CHECKSUMS)
        for name in [*names, CHECKSUMS]:
            with open(folder / name, "rb") as file, self.store.open_write(f"{FOLDER}/{folder.name}/{name}") as copy:
                shutil.copyfileobj(file, copy, 1 << 20)
        for old in self.steps()[: -self.keep]:
            self._remove(old)

    def meet(self) -> None:
        """Before a training: fetch what the store has newer than the run's folder, or copy what is newer there.

        A copy that is damaged is named in one line and passed over.

        Raises:
            DiskFull: no room for it here.
        """
        here, _ = self.run.newest()
        there = [step for step in self.steps() if here is None or step > here]
        for step in reversed(there):
            if self._fetch(step):
                return
        if here is not None and here not in self.steps():
            self.push(self.run.folder(here))

    def _fetch(self, step: int) -> bool:
        final = self.run.folder(step)
        unfinished = final.with_name(f".part-{step:08d}") / final.name
        shutil.rmtree(unfinished.parent, ignore_errors=True)
        with naming_full_disk(unfinished.parent):
            unfinished.mkdir(parents=True)
            for key in self._keys(step):
                with self.store.open_read(key) as copy, open(unfinished / key.rpartition("/")[2], "wb") as file:
                    shutil.copyfileobj(copy, file, 1 << 20)
        if found := damage(unfinished):
            where = self.store.address(f"{FOLDER}/{final.name}")
            print(f"warning: the copy {where} is damaged ({found})", file=sys.stderr)
            shutil.rmtree(unfinished.parent)
            return False
        if not self.run.file.is_file():
            write_atomic(self.run.file, self.store.read(f"{FOLDER}/run.json"))
        publish(unfinished, final)
        shutil.rmtree(unfinished.parent)
        print(f"fetched {final.name} from {self.store.address()}", file=sys.stderr)
        return True

    def _keys(self, step: int) -> Iterator[str]:
        return iter(self.store.list_keys(f"{FOLDER}/step-{step:08d}/"))

    def _remove(self, step: int) -> None:
        """The checksums first: without them it is no checkpoint."""
        self.store.delete(f"{FOLDER}/step-{step:08d}/{CHECKSUMS}")
        for key in self._keys(step):
            self.store.delete(key)
