"""`python -m tests.bench.ingest [--json]`: the goals G4, G6 and G7 of the ingest, beside their peers and limits.

Ratios inside one run, of processor time where that can be told apart; where contestants take turns, medians. ffmpeg's
time is the time of this process's children.

    G4  decode, choose 16 frames a second, crop and scale to 512, rgb24 into numpy; over `ffmpeg -f null`, which decodes
        and throws everything away. Peers: ffmpeg's pipe of every frame at its own size, thinned and scaled by Pillow,
        and PyAV and decord where they are installed
    G6  the clock that Ray takes for a block whose worker does nothing, over the processor time of a block of 16 clips.
        (Prefect has one task for eight blocks or more.)
    G7  processor time of a whole ingest over that of its stages, in one run in this process; and the clock of an ingest
        on Ray over the stages' seconds by the number of cores, which says something on an idle machine only
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

import pipeline.ingest.block
from pipeline.ingest import ingest
from pipeline.ingest.block import BlockWorker
from pipeline.items import Resources
from pipeline.media.decode import decode, ffmpeg_binary, probe, select_frames, window_starts
from pipeline.recipes import DataRecipe, linear
from pipeline.runner import Runner
from pipeline.stage import run_stages
from storage.layout import Lake
from tests.pipeline.ingest.in_process import InProcess

SIDE = 512
RATE = 16.0
WINDOW = 2.0
SECONDS = 8
FILMS = {"720p": ("1280x720", 1.6), "360p": ("640x360", 2.7)}
"""Sizes, and G4's goals."""
BLOCK = 16


def cpu() -> float:
    """Processor seconds of this process and of its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def medians(contestants: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median processor seconds of one call, in turns."""
    samples: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, call in contestants.items():
            begin = cpu()
            call()
            samples[name].append(cpu() - begin)
    return {name: statistics.median(values) for name, values in samples.items()}


def make_film(path: Path, size: str, seconds: float = SECONDS) -> Path:
    """A film of moving, noisy pictures at 30 frames a second, as a camera's."""
    picture = f"testsrc2=size={size}:rate=30:duration={seconds},noise=alls=8:allf=t"
    command = [ffmpeg_binary(), "-v", "error", "-nostdin", "-y", "-f", "lavfi", "-i", picture]
    subprocess.run([*command, "-c:v", "libx264", "-preset", "veryfast", "-pix_fmt", "yuv420p", str(path)], check=True)
    return path


# --- G4 ---


def ours(film: Path) -> int:
    """Frames through the pipeline's own decoder."""
    found = probe(film)
    windows = [select_frames(found, start, WINDOW, RATE) for start in window_starts(found, WINDOW)]
    return sum(len(frames) for frames in decode(film, windows, (SIDE, SIDE)))


def null(film: Path) -> None:
    """Everything decoded and nothing kept: the least that decoding takes."""
    command = [ffmpeg_binary(), "-v", "error", "-nostdin", "-threads", "1", "-i", str(film), "-f", "null", "-"]
    subprocess.run(command, check=True)


def _thinned(frames: Iterator[np.ndarray], rate: float) -> int:
    """Frames of `rate` a second thinned to RATE, cropped to a square and scaled by Pillow."""
    from PIL import Image

    kept, slot = 0, -1
    for number, frame in enumerate(frames):
        now = round(number / rate * RATE)
        if now == slot:
            continue
        slot, side = now, min(frame.shape[:2])
        top, left = (frame.shape[0] - side) // 2, (frame.shape[1] - side) // 2
        square = Image.fromarray(frame[top : top + side, left : left + side])
        np.asarray(square.resize((SIDE, SIDE), Image.Resampling.BILINEAR))
        kept += 1
    return kept


def pipe(film: Path, size: str) -> int:
    """Every frame as rgb24 through a pipe: the plain way."""
    width, height = map(int, size.split("x"))
    command = [ffmpeg_binary(), "-v", "error", "-nostdin", "-threads", "1", "-i", str(film)]
    command += ["-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None

        def frames() -> Iterator[np.ndarray]:
            while data := process.stdout.read(width * height * 3):  # type: ignore[union-attr]
                yield np.frombuffer(data, np.uint8).reshape(height, width, 3)

        return _thinned(frames(), 30.0)


def peers(film: Path) -> dict[str, Callable[[], object]]:
    """PyAV and decord, where they are installed; they are no dependencies."""
    found: dict[str, Callable[[], object]] = {}
    with contextlib.suppress(ImportError):
        import av

        def by_av() -> int:
            with av.open(str(film)) as container:
                container.streams.video[0].thread_count = 1
                return _thinned((frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)), 30.0)

        found["PyAV"] = by_av
    with contextlib.suppress(ImportError):
        import decord

        def by_decord() -> int:
            reader = decord.VideoReader(str(film), num_threads=1)
            return _thinned((reader[number].asnumpy() for number in range(len(reader))), 30.0)

        found["decord"] = by_decord
    return found


def g4_decode(root: Path, rounds: int) -> list[dict[str, object]]:
    """Ours, ffmpeg's pipe, and the peers that are there, over decoding alone."""
    rows = []
    for name, (size, goal) in FILMS.items():
        film = make_film(root / f"{name}.mp4", size)
        contestants = {"ours": lambda film=film: ours(film), "null": lambda film=film: null(film)}
        contestants["ffmpeg pipe"] = lambda film=film, size=size: pipe(film, size)
        taken = medians({**contestants, **peers(film)}, rounds)
        least = taken.pop("null")
        rows.append(
            _row("G4", f"{name}: decode and choose and scale / ffmpeg -f null", taken.pop("ours") / least, goal)
        )
        rows += [
            _row("G4", f"{name}: {peer}, thinned and scaled by Pillow", each / least) for peer, each in taken.items()
        ]
    return rows


# --- G6 and G7 ---


def recipe() -> DataRecipe:
    """The linear codec: the cheapest clips there are, so that what is around them weighs most."""
    return dataclasses.replace(linear(), block_clips=BLOCK)


@dataclasses.dataclass
class Nothing:
    """A worker that does nothing."""

    @property
    def resources(self) -> Resources:
        return Resources()

    def setup(self) -> None:
        """Nothing is needed."""

    def process(self, task_id: str, items: Sequence[Any]) -> str:
        """The task's name."""
        return task_id

    def teardown(self) -> None:
        """Nothing is held."""


def block_overhead(runner: Runner, blocks: int = 200) -> float:
    """Seconds of the clock that a block takes on Ray when its worker does nothing."""
    tasks = [(f"block-{number}", (number,)) for number in range(blocks)]
    runner.run(Nothing(), tasks[:2], str, lambda task, result: None, lambda task, reason, detail: None)
    begin = time.perf_counter()
    runner.run(Nothing(), tasks, str, lambda task, result: None, lambda task, reason, detail: None)
    return (time.perf_counter() - begin) / blocks


def g6_g7(root: Path, films: int) -> list[dict[str, object]]:
    """What is around the stages of an ingest of more than a hundred clips."""
    folder = root / "films"
    folder.mkdir()
    for number in range(films):
        path = make_film(folder / f"{number}.mp4", "320x240", 2 * WINDOW * (2 + number % 2))
        path.with_suffix(".txt").write_text(f"film {number}")
    ingest(folder, root / "warm", recipe=recipe(), limit=1, runner=InProcess())
    spent: list[float] = []

    def counted(*how: Any) -> Any:
        begin = cpu()
        made = run_stages(*how)
        spent.append(cpu() - begin)
        return made

    # Both in one run: what shares the machine slows them alike.
    with mock.patch.object(pipeline.ingest.block, "run_stages", counted):
        begin = cpu()
        report = ingest(folder, root / "here", recipe=recipe(), runner=InProcess())
        whole = cpu() - begin
    stages = sum(spent)
    clips = report.clips.done
    rows = [_row("G7", f"{clips} clips: processor time of the whole ingest / of its stages", whole / stages, 1.15)]
    clock = sum(report.seconds.values())
    rows += [
        _row("G7", f"of its clock the {name}", report.seconds[name] / clock) for name in ("plan", "embed", "commit")
    ]
    block_seconds = BLOCK * stages / clips
    with Runner() as runner:
        runner.start()
        overhead = block_overhead(runner)
        mark = time.perf_counter()
        again = ingest(folder, root / "ray", recipe=recipe(), runner=runner)
        clock = time.perf_counter() - mark
    cores = len(os.sched_getaffinity(0))
    worker = BlockWorker(Lake.open(root / "here"), recipe(), "")
    worked = sum(again.seconds[stage.name] for stage in worker.stages)
    rows.append(
        _row(
            "G7",
            "on Ray: the clock / (sum of the stages' seconds / cores), idle machines only",
            clock / (worked / cores),
        )
    )
    rows.append(_row("G6", "ms of Ray around a block", 1e3 * overhead))
    rows.append(_row("G6", f"Ray / a block of {BLOCK} clips, linear codec", overhead / block_seconds, 0.01))
    rows.append(_row("G6", "the same with a task for each clip, the plain way", BLOCK * overhead / block_seconds))
    return rows


def _row(goal_id: str, metric: str, value: float, goal: float | None = None) -> dict[str, object]:
    met = None if goal is None else bool(value <= goal)
    return {"id": goal_id, "metric": metric, "value": float(value), "sense": "<=", "goal": goal, "met": met}


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table, or JSON; the status is 1 when a goal is missed."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.ingest", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds of G4 (default: %(default)s)")
    parser.add_argument("--films", type=int, default=24, help="films of G7, five clips each (default: %(default)s)")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="vlfm-bench-") as folder:
        rows = [
            *g4_decode(Path(folder), options.rounds),
            *(g6_g7(Path(folder), options.films) if options.films else []),
        ]
    if options.json:
        print(json.dumps(rows))
    for row in rows if not options.json else ():
        goal = "" if row["goal"] is None else f"<= {row['goal']:.4g} {'met' if row['met'] else 'MISSED'}"
        print(f"{row['id']:3} {row['metric']:76} {row['value']:10.4g}   {goal}")
    return 0 if all(row["met"] is not False for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
