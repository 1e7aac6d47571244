"""The trainer's data: the clips of one version, read from its manifest and shards, in an order that resumes exactly."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, Sampler
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from model.methods.base import Batch
from model.stop import end_with_trainer
from storage.errors import is_expected
from storage.layout import Lake
from storage.shards import ShardReader, shard_key
from storage.version import Version, load, read_manifest


@dataclass(frozen=True)
class Clip:
    """One clip as a shard holds it."""

    clip_id: str
    """Name of the clip."""
    about: dict[str, Any]
    """The clip's row of the manifest, with its certificate."""
    members: dict[str, Any]
    """Arrays by name: coefficients, text, frame_time, observed, and latents and preview where they were kept."""


class Clips(Dataset[Clip]):
    """The clips of one split of a version, opened from the version's shards.

    Args:
        lake: the lake.
        version: the version; nothing that it does not name is read.
        split: `train`, `validation`, or None for both.
        arrays: what is read of a clip, such as `text` and `coefficients`; all there is by default.

    Which clip is in which split the version's manifest says; a clip's own JSON is parsed when the clip is read. On its
    first read in a process a clip is compared with its checksum, and its arrays must be finite.

    Raises:
        ValueError: a shard is missing or its size is not the version's; the message says the remedy.
        DamagedShard: (when a clip is read) it is not what was written, or not finite.
    """

    def __init__(
        self, lake: Lake, version: Version, split: str | None = None, arrays: Sequence[str] | None = None
    ) -> None:
        self.lake, self.version, self.split, self.arrays = lake, version, split, arrays
        self._readers: dict[int, ShardReader] = {}
        self._finite: set[int] = set()
        sizes = lake.store.sizes("shards/")
        for shard in version.shards:
            size = sizes.get(shard_key(shard.name))
            if size != shard.bytes:
                state = "is missing" if size is None else f"has {size} bytes instead of {shard.bytes}"
                raise ValueError(
                    f"shard {shard.name} of version {version.number} {state}; "
                    f"`vlfm verify --lake {lake.address}` lists all damage, ingesting again into a new lake repairs it"
                )

    @cached_property
    def places(self) -> NDArray[np.int32]:
        """(clips, 2): shard and row of every clip of the split, in the version's order.

        Raises:
            ValueError: the manifest names a shard that the version does not.
        """
        numbers = {shard.name: number for number, shard in enumerate(self.version.shards)}
        table = read_manifest(self.lake, self.version, columns=["split", "shard", "shard_row"])
        if self.split is not None:
            table = table.filter([split == self.split for split in table["split"].to_pylist()])
        rows = zip(table["shard"].to_pylist(), table["shard_row"].to_pylist(), strict=True)
        try:
            found = sorted((numbers[shard], row) for shard, row in rows)
        except KeyError as error:
            raise ValueError(
                f"the manifest of version {self.version.number} names shard {error}, which the version does not; "
                f"`vlfm verify --lake {self.lake.address}` lists all damage"
            ) from None
        return np.array(found, np.int32).reshape(-1, 2)

    def reader(self, shard: int) -> ShardReader:
        """A shard, opened on first use in each process, which compares each sample's checksum once."""
        if shard not in self._readers:
            self._readers[shard] = ShardReader(self.lake, self.version.shards[shard].name)
        return self._readers[shard]

    def __getstate__(self) -> dict[str, Any]:
        self.places  # noqa: B018  (read here, once, and not by each worker)
        return {**vars(self), "_readers": {}, "_finite": set()}

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Clip:
        shard, row = self.places[index].tolist()
        names = None if self.arrays is None else ["clip.json", *(f"{name}.npy" for name in self.arrays)]
        reader = self.reader(shard)
        sample = reader.read(row, names)
        members = {name.removesuffix(".npy"): value for name, value in sample.items() if name.endswith(".npy")}
        if index not in self._finite:
            for name, value in members.items():
                if value.dtype.kind == "f" and not np.isfinite(value).all():
                    raise reader.damaged(sample["__key__"], f"{name} has values that are not finite")
            self._finite.add(index)
        return Clip(sample["__key__"], sample["clip.json"], members)

    def every(self) -> Iterator[Clip]:
        """All clips of the split, in the version's order."""
        return (self[index] for index in range(len(self)))


class Steps(Sampler[list[int]]):
    """Indices of each step's clips: an endless chain of shuffled epochs, cut into steps.

    The order depends on the seed and the step alone: neither on the number of processes, which take turns within a
    step, nor on where a run was interrupted.

    Args:
        clips: number of clips.
        batch: clips of a step over all processes.
        seed: seed of the order.
        first, last: steps to go through, `last` excluded.
        rank, world: this process and how many there are; `world` divides `batch`. It gets the positions rank,
            rank + world, ... of each step's batch, as `model.methods.draws.Draws` takes it.
    """

    def __init__(self, clips: int, batch: int, seed: int, first: int, last: int, rank: int = 0, world: int = 1) -> None:
        if clips < 1:
            raise ValueError("there are no clips to train on: the version's train split is empty")
        if batch % world:
            raise ValueError(f"batch {batch} is no multiple of the {world} processes; set it with --set batch=...")
        self.clips, self.batch, self.seed = clips, batch, seed
        self.first, self.last, self.rank, self.world = first, last, rank, world

    def __len__(self) -> int:
        return max(self.last - self.first, 0)

    def __iter__(self) -> Iterator[list[int]]:
        epoch, order = -1, np.empty(0, dtype=np.int64)
        for step in range(self.first, self.last):
            chosen = []
            for position in range(step * self.batch + self.rank, (step + 1) * self.batch, self.world):
                if position // self.clips != epoch:
                    epoch = position // self.clips
                    order = np.random.default_rng([self.seed, epoch]).permutation(self.clips)
                chosen.append(int(order[position % self.clips]))
            yield chosen


class Collate:
    """Joins clips into a batch; the empty caption's embedding goes with every batch.

    Numbers stay in the type that they are stored in, float16 for the most part: `Batch.to` widens them on the device.

    Args:
        empty_text: (E, D) embedding of the empty caption.
        members: what the method reads: of `coefficients, latents, frame_time, observed`.
    """

    def __init__(self, empty_text: NDArray[np.float16], members: Sequence[str]) -> None:
        self.empty_text = torch.from_numpy(np.array(empty_text))
        self.members = tuple(members)

    @property
    def arrays(self) -> tuple[str, ...]:
        """The arrays of a clip that a batch is made of."""
        return ("text", *self.members)

    def __call__(self, clips: Sequence[Clip]) -> Batch:
        texts = [torch.from_numpy(np.array(clip.members["text"])) for clip in clips]
        asked: dict[str, torch.Tensor] = {}
        if "coefficients" in self.members:
            asked["coefficients"] = torch.from_numpy(np.stack([clip.members["coefficients"] for clip in clips]))
        by_frame = [name for name in ("latents", "frame_time", "observed") if name in self.members]
        for name in by_frame:
            rows = [torch.from_numpy(np.array(clip.members[name])) for clip in clips]
            asked[name] = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        if by_frame:
            kept = torch.tensor([len(clip.members[by_frame[0]]) for clip in clips])
            asked["valid"] = torch.arange(int(kept.max())) < kept[:, None]
        return Batch(
            clip_ids=tuple(clip.clip_id for clip in clips),
            text=torch.nn.utils.rnn.pad_sequence(texts, batch_first=True),
            text_length=torch.tensor([len(text) for text in texts]),
            empty_text=self.empty_text,
            clip_start=torch.tensor([clip.about["clip_start"] for clip in clips], dtype=torch.float32),
            duration=torch.tensor([clip.about["duration"] for clip in clips], dtype=torch.float32),
            **asked,
        )


class _Batches(Dataset[Any]):
    """The batches of `Collate`; an error in one comes as its value, since a worker's exceptions lose their message."""

    def __init__(self, clips: Clips, collate: Collate) -> None:
        self.clips, self.collate = clips, collate

    def __getitems__(self, indices: list[int]) -> Batch | Exception:
        try:
            return self.collate([self.clips[index] for index in indices])
        except Exception as error:
            if not is_expected(error):
                raise
            return error


def _as_it_is(batch: Any) -> Any:
    return batch


class Loader(Iterator[Batch]):
    """The batches of the steps on a device, in order, read ahead: by worker processes, or one batch by a thread.

    Numbers come to the device in the type that they are stored in, and are `dtype` there.
    """

    def __init__(
        self,
        clips: Clips,
        steps: Steps,
        collate: Collate,
        workers: int,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._device, self._dtype = device, dtype
        self._batches = iter(
            DataLoader(
                _Batches(clips, collate),
                batch_sampler=steps,
                collate_fn=_as_it_is,
                num_workers=workers,
                persistent_workers=False,
                pin_memory=torch.cuda.is_available(),
                multiprocessing_context="spawn" if workers else None,
                worker_init_fn=end_with_trainer if workers else None,
            )
        )
        # A pinned batch belongs to the thread's current GPU, which is the first one until it is told.
        told = (torch.cuda.set_device, (device,)) if device.type == "cuda" else (None, ())
        self._thread = None if workers else ThreadPoolExecutor(1, "loader", *told)
        self._ahead = self._thread.submit(next, self._batches, None) if self._thread else None

    def __next__(self) -> Batch:
        """Raises DamagedShard where a clip cannot be read."""
        if self._thread is None or self._ahead is None:
            batch = next(self._batches)
        else:
            batch, self._ahead = self._ahead.result(), self._thread.submit(next, self._batches, None)
        if batch is None:
            raise StopIteration
        if isinstance(batch, Exception):
            raise batch
        return batch.to(self._device, self._dtype)

    def close(self) -> None:
        """End the workers, or the thread.

        Left to garbage collection they could stay as long as a traceback holds this object, and Python waits for them
        at its end: its SIGTERM does not end a worker that holds signals (model.stop.signals_held).
        """
        if isinstance(self._batches, _MultiProcessingDataLoaderIter):
            self._batches._shutdown_workers()
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)


def lake_and_version(lake: str | Path, number: int | None) -> tuple[Lake, Version]:
    """Open a lake and one of its versions, the newest unless a number is given."""
    opened = Lake.open(lake)
    return opened, load(opened, number)
