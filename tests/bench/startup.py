"""`python -m tests.bench.startup`: how long a trainer takes to its first step, and how long its steps wait for data.

First on a lake of 100,000 clips: time and memory beyond those of the bare imports, when a run begins and when it goes
on. The lake is as a trainer finds it, a version, a manifest and 1000 shards of 100 clips with their indices; only the
bytes are shared: every shard is a hard link to the same tar. Goals: under 5 s and 300 MB.

Then the data-wait share of a step at the demo's sizes, without workers. Goal: at most 1 %.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from storage import version
from storage.layout import Lake
from storage.shards import ShardInfo, index_key, shard_key, write_shard
from tests.model.tiny_lake import make_lake, manifest_rows, sample

SECONDS, MEGABYTES, WAIT = 5.0, 300.0, 0.01
"""The goals."""
CHILD = """
import json, sys, time
began = time.perf_counter()
import model.train, pyarrow.parquet, torch.utils.tensorboard
from model.recipes import train_recipe
from model.settings import override
from model.training import loop

def used():
    # Not ru_maxrss: it is at least the resident set of the process that started this one.
    with open("/proc/self/status") as status:
        most = next(line for line in status if line.startswith("VmHWM"))
    return time.perf_counter(), int(most.split()[1]) / 1024, time.process_time()

imported = used()
firsts = []
add = loop.Recent.add

def noted(self, *given):
    firsts.append(used())
    add(self, *given)

loop.Recent.add = noted
lake, run, settings = sys.argv[1:]
model.train.train(lake, run, override(train_recipe("demo"), json.loads(settings)))
print(json.dumps({"imports": imported[0] - began, "seconds": firsts[0][0] - imported[0],
                  "cpu": firsts[0][2] - imported[2], "imports_megabytes": imported[1],
                  "megabytes": firsts[0][1] - imported[1]}))
"""
"""A trainer that tells what it took from its imports to the end of its first step."""


def wide_lake(folder: Path, shards: int, clips: int) -> Lake:
    """A lake of so many shards of so many clips each, whose bytes are those of one shard."""
    lake = make_lake(folder, clips=2, validation=0)
    template = version.load(lake, 1)
    samples = [sample(number, "train") for number in range(clips)]
    first = write_shard(lake, "wide0.tar", samples)
    tar, index = (lake.store.local_path(key(first.name)) for key in (shard_key, index_key))
    about = json.loads(index.read_bytes())
    infos = [first]
    for number in range(1, shards):
        info = dataclasses.replace(first, name=f"wide{number}.tar")
        os.link(tar, lake.store.local_path(shard_key(info.name)))
        lake.store.write(index_key(info.name), json.dumps({**about, "shard": info.name}).encode())
        infos.append(info)
    version.publish(lake, dataclasses.replace(
        template, number=2, parent=1, shards=tuple(infos),
        manifest=version.write_manifest(lake, 2, _rows(samples, infos), []),
    ))  # fmt: skip
    return lake


def noise_lake(folder: Path, clips: int = 56, order: int = 32, latents: Sequence[int] = (24, 8, 8)) -> Lake:
    """A lake of noise in shards of 16 clips, by default of the demo's sizes: 32 coefficients of (24, 8, 8) latents."""
    lake = make_lake(folder, clips=2, validation=0)
    template, random = version.load(lake, 1), np.random.default_rng(0)
    noise = dict.fromkeys(("coefficients.npy", "latents.npy"), (order, *latents))
    samples = [
        {
            **sample(number, "train"),
            **{name: random.standard_normal(shape).astype(np.float16) for name, shape in noise.items()},
            "preview.npy": np.zeros((32, 64, 64, 3), np.uint8),
        }
        for number in range(clips)
    ]
    parts = [samples[first : first + 16] for first in range(0, clips, 16)]
    infos = [write_shard(lake, f"demo{number}.tar", part) for number, part in enumerate(parts)]
    form = {**template.clip, "order": order, "latent_shape": list(latents), "frame_shape": [64, 64, 3]}
    version.publish(lake, dataclasses.replace(
        template, number=2, parent=1, shards=tuple(infos), clip=form,
        manifest=version.write_manifest(lake, 2, manifest_rows(parts, infos), []),
    ))  # fmt: skip
    return lake


def _rows(samples: list[dict[str, object]], infos: Sequence[ShardInfo]) -> list[dict[str, object]]:
    """The manifest's rows, each with an id of its own."""
    of_one = manifest_rows([samples], [infos[0]])
    return [
        {**row, "clip_id": f"{row['clip_id']}{number}", "shard": info.name}
        for number, info in enumerate(infos)
        for row in of_one
    ]


def measured(lake: Lake, run: Path, **settings: object) -> dict[str, float]:
    """What a trainer of its own process took to its first step."""
    command = [sys.executable, "-c", CHILD, str(lake.root), str(run), json.dumps(settings)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the figures; 1 where a goal is missed."""
    parser = argparse.ArgumentParser(prog="tests.bench.startup", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--shards", type=int, default=1000, help="shards of the wide lake (default 1000)")
    parser.add_argument("--clips", type=int, default=100, help="clips of each (default 100)")
    parser.add_argument("--steps", type=int, default=40, help="steps of which data wait is measured (default 40)")
    options = parser.parse_args(arguments)
    good = True
    with tempfile.TemporaryDirectory() as folder:
        lake, run = wide_lake(Path(folder) / "lake", options.shards, options.clips), Path(folder) / "run"
        entries = options.shards * options.clips
        for what, steps in (("begins", 1), ("goes on", 2)):
            found = measured(lake, run, steps=steps, checkpoint_every=1)
            good &= found["seconds"] < SECONDS and found["megabytes"] < MEGABYTES
            print(
                f"a run on {entries} clips {what}: {found['seconds']:.2f} s ({found['cpu']:.2f} s of CPU) and "
                f"{found['megabytes']:.0f} MB to the end of a step (goals {SECONDS:g} s, {MEGABYTES:g} MB), after "
                f"imports of {found['imports']:.1f} s and {found['imports_megabytes']:.0f} MB"
            )
        lake = noise_lake(Path(folder) / "demo")
        measured(lake, Path(folder) / "steps", steps=options.steps, log_every=1)
        lines = [json.loads(line) for line in (Path(folder) / "steps" / "log.jsonl").read_text().splitlines()]
        waits = [line["data_wait"] for line in lines if "data_wait" in line]
        warm = waits[len(waits) // 4 :] or waits
        good &= float(np.median(warm)) <= WAIT
        print(
            f"data wait at the demo's sizes: {np.median(warm):.2%} of a step in the middle, {max(warm):.2%} at most "
            f"(goal {WAIT:.0%}), {waits[0]:.2%} of the first"
        )
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
