"""`python -m tests.bench.shards`: G5, reading samples of 1 MiB from a shard beside WebDataset and the bare bytes.

Samples a second of process time, one thread, rounds in which all take turns, medians; the file is in the page cache.
WebDataset goes through the tar in order and decodes by its own `.decode()`. Ours is an index and a seek: asked for all
members when they were compared with their checksums before, and when they are for the first time. Goal: 2.5 times.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from storage.layout import Lake
from storage.shards import ShardReader, shard_key, write_shard

GOAL = 2.5


def samples(count: int) -> list[dict[str, object]]:
    """Samples of 1 MiB: coefficients and latents of half of it each, a caption's embedding and a line of JSON."""
    random = np.random.default_rng(0)
    half = (16, 4, 64, 64)
    return [
        {
            "__key__": f"clip{number}",
            "coefficients.npy": random.standard_normal(half).astype(np.float16),
            "latents.npy": random.standard_normal(half).astype(np.float16),
            "text.npy": random.standard_normal((16, 64)).astype(np.float16),
            "clip.json": {"clip_start": 0.0, "duration": 2.0},
        }
        for number in range(count)
    ]


def contestants(lake: Lake, name: str) -> dict[str, Callable[[], int]]:
    """Ways to read all samples of a shard; each returns how many there were."""
    import webdataset

    path = lake.store.local_path(shard_key(name))
    known = ShardReader(lake, name)
    for _ in known:
        pass

    def through_webdataset() -> int:
        return sum(1 for _ in webdataset.WebDataset(str(path), shardshuffle=False, empty_check=False).decode())

    def bare() -> int:
        with open(path, "rb", buffering=0) as file:
            while file.read(1 << 20):
                pass
        return len(known)

    return {
        "webdataset .decode()": through_webdataset,
        "ours": lambda: sum(1 for _ in known),
        "ours, first read": lambda: sum(1 for _ in ShardReader(lake, name)),
        "bare bytes": bare,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the figures; 1 where the goal is missed."""
    parser = argparse.ArgumentParser(prog="tests.bench.shards", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        lake = Lake.create(Path(folder) / "lake")
        write_shard(lake, "g5.tar", samples(options.samples))
        taken: dict[str, list[float]] = {}
        ways = contestants(lake, "g5.tar")
        for number in range(options.rounds + 1):
            for name, way in ways.items():
                began = time.process_time()
                assert way() == options.samples
                if number:
                    taken.setdefault(name, []).append(time.process_time() - began)
    rates = {name: options.samples / float(np.median(values)) for name, values in taken.items()}
    peer = rates["webdataset .decode()"]
    for name, rate in rates.items():
        print(f"{name:22} {rate:8.0f} samples/s  {rate / peer:5.2f} x webdataset")
    met = rates["ours"] >= GOAL * peer
    print(f"G5: {rates['ours'] / peer:.2f} (goal {GOAL:g}): {'met' if met else 'MISSED'}")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
