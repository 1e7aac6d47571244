# ruff: noqa: E402  (the number of threads is read from the environment when numpy and torch are imported)
"""`python -m tests.bench.overlap`: whether decoding and encoding overlap in a worker, and what the certificate costs.

A block of clips is made by the real stages, in one thread and with decoding ahead, by turns. First with a codec that
sleeps, as a GPU's does as far as this process is concerned, for as long as decoding takes: the wall time should be near
the longer of the two and not their sum. Then with the real linear codec, which shares the cores with ffmpeg and must
not become slower. "cpu" is this process and ffmpeg.
"""

from __future__ import annotations

import os

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_name] = "1"

import argparse
import dataclasses
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from model.codecs.base import Encoded
from pipeline.ingest.block import BlockWorker, stage_block, staged_arrays
from pipeline.ingest.plan import plan_ingest
from pipeline.items import ClipPlan, ClipWork, Resources
from pipeline.media.decode import ffmpeg_binary
from pipeline.recipes import DataRecipe, linear
from pipeline.sources.folders import discover
from pipeline.stage import run_stages
from pipeline.stages.invert import SharedCodec
from storage.layout import Lake


class SleepingCodec(SharedCodec):
    """Encodes by sleeping: it takes time, and no CPU."""

    def __init__(self, seconds_a_frame: float, shape: tuple[int, ...]) -> None:
        super().__init__({"kind": "linear"})
        self.seconds_a_frame, self.shape = seconds_a_frame, shape

    def encode(self, frames: torch.Tensor, captions: Sequence[str]) -> Encoded:
        time.sleep(self.seconds_a_frame * len(frames))
        return Encoded(torch.ones(len(frames), *self.shape))

    def decode(self, latents: np.ndarray, captions: str | Sequence[str]) -> torch.Tensor:
        return torch.zeros(len(latents), 3, self.shape[1] * 4, self.shape[2] * 4)


class SleepingDecoder:
    """Decodes by sleeping."""

    name, resources = "decode", Resources()

    def __init__(self, seconds_a_clip: float, size: tuple[int, int]) -> None:
        self.seconds_a_clip, self.size = seconds_a_clip, size

    def setup(self) -> None:
        """Nothing to do."""

    def process(self, works: Iterable[ClipWork]) -> Iterator[ClipWork]:
        for work in works:
            time.sleep(self.seconds_a_clip)
            work.frames = np.zeros((len(work.plan.observed), *self.size, 3), dtype=np.uint8)
            yield work

    def teardown(self) -> None:
        """Nothing is held."""


def planned(folder: Path, recipe: DataRecipe, clips: int) -> tuple[Lake, list[ClipPlan]]:
    """Clips of one film, 640x360 at 24 frames a second."""
    (folder / "films").mkdir()
    film = folder / "films" / "a.mp4"
    source = f"testsrc2=size=640x360:rate=24:duration={clips * recipe.duration}"
    drawn = [ffmpeg_binary(), "-v", "error", "-f", "lavfi", "-i", source, "-c:v", "libx264", "-preset", "veryfast"]
    subprocess.run([*drawn, str(film)], check=True)
    film.with_suffix(".txt").write_text("a test picture")
    plan = plan_ingest(Lake.create(folder / "lake"), discover(folder / "films"), recipe)
    return plan.lake, plan.clips


def timed(call: Callable[[], object]) -> tuple[float, float]:
    """Wall and CPU seconds of a call; the processes it started count."""
    wall, before = time.perf_counter(), os.times()
    call()
    after = os.times()
    return time.perf_counter() - wall, sum(after[:4]) - sum(before[:4])


def compare(worker: BlockWorker, clips: Sequence[ClipPlan], rounds: int) -> dict[str, float]:
    """Prints wall and CPU milliseconds a clip of the ways to make a block; the wall times, least over the rounds.

    The least, because other work on the machine only adds to them.
    """
    frames = [work.frames for work in worker.stages[0].process(ClipWork(clip) for clip in clips)]

    def encode_alone() -> None:
        stream: Iterable[ClipWork] = [ClipWork(clip, frames=own) for clip, own in zip(clips, frames, strict=True)]
        for stage in worker.stages[1:]:
            stream = stage.process(stream)
        assert all(work.failure is None for work in stream)

    ways: dict[str, Callable[[], object]] = {
        "decoding alone": lambda: run_stages(worker.stages[:1], clips, 0),
        "encoding alone": encode_alone,
        "one after the other, in one thread": lambda: run_stages(worker.stages, clips, 0),
        "decoding ahead": lambda: run_stages(worker.stages, clips, worker.ahead),
    }
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, call in ways.items():
            samples[name].append(timed(call))
    least = {name: min(wall for wall, _ in values) for name, values in samples.items()}
    for name, values in samples.items():
        cpu = min(cpu for _, cpu in values)
        print(f"  {name:<36} wall {1000 * least[name] / len(clips):7.1f}  cpu {1000 * cpu / len(clips):7.1f}")
    decode, encode, alone, ahead = least.values()
    print(
        f"  ahead / longer of the two {ahead / max(decode, encode):.2f}, / their sum {ahead / (decode + encode):.2f}, "
        f"/ one after the other {ahead / alone:.2f}"
    )
    return least


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the figures; exit status 1 where decoding and a sleeping codec do not overlap."""
    parser = argparse.ArgumentParser(prog="tests.bench.overlap", description="Overlap of decoding and encoding.")
    parser.add_argument("--clips", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        recipe = dataclasses.replace(linear(), preview_clips=0, validation_fraction=0.0)
        lake, clips = planned(Path(folder), recipe, options.clips)
        worker = BlockWorker(lake, recipe, "0" * 64)
        worker.setup()
        print(
            f"{len(clips)} clips of {recipe.frames_max} frames at {recipe.size[0]} pixels, at most {worker.ahead} "
            "decoded ahead; milliseconds a clip"
        )
        print("the linear codec")
        real = compare(worker, clips, options.rounds)
        print("a codec that sleeps as long as decoding takes")
        pause = real["decoding alone"] / len(clips) / recipe.frames_max
        codec = SleepingCodec(pause, worker.codec.load().latent_shape(*recipe.size))
        sleeping = BlockWorker(lake, dataclasses.replace(recipe, certify_frames=1), "0" * 64)  # a GPU measures, too
        for stage in sleeping.stages[1:]:
            stage.codec = codec  # type: ignore[attr-defined]
        compare(sleeping, clips, options.rounds)
        print("the same, and decoding sleeps too: what the machine's other work cannot disturb")
        codec.seconds_a_frame = 0.05 / recipe.frames_max
        sleeping.stages[0] = SleepingDecoder(0.05, recipe.size)
        slept = compare(sleeping, clips, 2)
        result = worker.process("b", clips)
        works, _ = run_stages(worker.stages, clips, worker.ahead)
        arrays = staged_arrays(works, recipe.frames_max)
        write = min(timed(lambda: stage_block(lake, result, arrays, "0" * 64))[0] for _ in range(options.rounds))
        print(f"writing a block {1000 * write / len(clips):.1f}, {write / real['decoding ahead']:.1%} of making it")
    return 0 if slept["decoding ahead"] < 0.8 * (slept["decoding alone"] + slept["encoding alone"]) else 1


if __name__ == "__main__":
    sys.exit(main())
