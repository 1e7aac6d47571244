"""Speed of the two stores: python tests/storage/bench_stores.py [CLIPS] (not a test; numbers depend on the machine)."""

from __future__ import annotations

import io
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from storage.arrays import Texts, append_clips, read_clips
from storage.fingerprint import fingerprint, short_id
from storage.layout import Lake
from storage.shards import ShardReader, write_shard

SHAPE = (32, 12, 16, 16)  # order, C, h, w: 196 608 bytes in float16


def best(work: Callable[[], Any], times: int = 3) -> float:
    """The shortest of some runs, in seconds."""
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def through_webdataset(path: Path) -> int:
    """Read every sample with WebDataset, decode it ourselves."""
    import webdataset

    count = 0
    for sample in webdataset.WebDataset(str(path), shardshuffle=False):
        np.load(io.BytesIO(sample["coefficients.npy"]), allow_pickle=False).copy()
        np.load(io.BytesIO(sample["text.npy"]), allow_pickle=False)
        json.loads(sample["clip.json"])
        count += 1
    return count


def through_index(lake: Lake, name: str, order: np.ndarray) -> int:
    """Read every sample in some order by the index; every byte of the coefficients is touched."""
    reader = ShardReader(lake, name)
    for row in order:
        reader[row]["coefficients.npy"].copy()
    return len(order)


def main(clips: int) -> None:
    random = np.random.default_rng(0)
    coefficients = random.normal(size=(clips, *SHAPE)).astype(np.float16)
    ids = [short_id(fingerprint(number)) for number in range(clips)]
    text = random.normal(size=(16, 32)).astype(np.float16)
    columns: dict[str, Any] = {
        "clip_id": ids,
        "caption_id": ["0" * 16] * clips,
        "coefficients": coefficients,
        "frame_time": np.zeros((clips, 32)),
        "observed": np.ones((clips, 32), np.bool_),
        "clip_start": np.zeros(clips),
        "duration": np.full(clips, 2.0),
        "order_used": np.full(clips, 32, np.int32),
    }
    texts = Texts(["0" * 16], text[None], np.array([16]))
    size = coefficients.nbytes / 1e6
    with tempfile.TemporaryDirectory() as folder:
        lake = Lake.create(Path(folder) / "lake")
        made = []
        append = best(lambda: made.append(append_clips(lake, "group", columns, texts)))
        snapshot = made[-1][0]
        read = best(lambda: read_clips(lake, snapshot, "group", None, ["coefficients"]))
        shuffled = random.permutation(clips)
        pick = best(lambda: read_clips(lake, snapshot, "group", shuffled, ["coefficients"]))
        few = np.sort(shuffled[: clips // 4])
        sparse = best(lambda: read_clips(lake, snapshot, "group", few, ["coefficients"]))
        print(f"zarr: read a random quarter {size / 4 / sparse:.0f} MB/s")
        print(f"zarr: {clips} clips, {size:.0f} MB; append (forced to disk) {size / append:.0f} MB/s, "
              f"read {size / read:.0f} MB/s, read in random order {size / pick:.0f} MB/s")  # fmt: skip
        path = lake.shards / "block.tar"
        samples = [
            {
                "__key__": ids[n],
                "coefficients.npy": coefficients[n],
                "text.npy": text,
                "clip.json": {"caption": "a ball"},
            }
            for n in range(clips)
        ]
        write = best(lambda: write_shard(lake, path.name, samples))
        whole = best(lambda: through_webdataset(path))
        indexed = best(lambda: through_index(lake, path.name, np.arange(clips)))
        mixed = best(lambda: through_index(lake, path.name, shuffled))
        print(f"shard: write (forced to disk) {size / write:.0f} MB/s; samples/s: webdataset {clips / whole:.0f}, "
              f"index {clips / indexed:.0f}, index in random order {clips / mixed:.0f}")  # fmt: skip
        untouched = best(lambda: [reader[n] for reader in [ShardReader(lake, path.name)] for n in shuffled])
        print(f"shard: samples/s opened as views, not touched: {clips / untouched:.0f}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 200)
