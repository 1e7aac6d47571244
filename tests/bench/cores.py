"""`python -m tests.bench.cores`: what two cores make of a training at the demo's sizes, on an idle machine.

One process with one thread, one with two, and two with one thread each, in turn, some rounds. The rate is that of the
steps after the first ones, by the log's own clock; the CPU time of a step is the difference between a long run and a
short one. Goal: the best of the two at least 1.5 times one thread's rate, and it is what `vlfm demo` does: one process
with as many threads as there are cores, torch's default.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from storage.layout import Lake
from tests.bench.startup import noise_lake

GOAL = 1.5
WAYS = {"one thread": (1, 1), "two threads": (1, 2), "two processes": (2, 1)}
"""(processes, threads of each)."""
FIRST = 5
"""Steps that a short run has, and that are left out of the rate."""


def run(lake: Lake, folder: Path, way: str, steps: int, sizes: Sequence[str]) -> tuple[float, float]:
    """Steps a second after the first ones, and the CPU seconds of the whole run."""
    processes, threads = WAYS[way]
    command = [sys.executable, "-m", "model.train", "--lake", str(lake.root), "--run", str(folder), "--recipe", "demo"]
    command += ["--processes", str(processes), "--set", f"steps={steps}", "--set", "log_every=1"]
    command += [word for pair in sizes for word in ("--set", pair)]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": str(threads)}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    times = {line["step"]: line["time"] for line in lines if "loss" in line}
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return (steps - FIRST) / max(times[steps] - times[FIRST], 1e-9) if steps > FIRST else 0.0, spent


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table; 1 where the goal is missed."""
    parser = argparse.ArgumentParser(prog="tests.bench.cores", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=60, help="steps of a long run (default 60)")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each, of which the median counts (default 3)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of the training recipe")
    options = parser.parse_args(arguments)
    rates: dict[str, list[float]] = {way: [] for way in WAYS}
    spent: dict[str, list[float]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as scratch:
        lake = noise_lake(Path(scratch) / "lake")
        for turn in range(options.rounds):
            for way in WAYS:
                rate, seconds = run(lake, Path(scratch) / f"{way}-{turn}", way, options.steps, options.set)
                rates[way].append(rate)
                spent[way].append(seconds)
        short = {way: run(lake, Path(scratch) / f"{way}-short", way, FIRST, options.set)[1] for way in WAYS}
    rate = {way: statistics.median(found) for way, found in rates.items()}
    for way, found in spent.items():
        print(
            f"{way:14} {rate[way]:6.2f} steps/s, {rate[way] / rate['one thread']:.2f} times one thread, "
            f"{1000 * (statistics.median(found) - short[way]) / (options.steps - FIRST):.0f} CPU ms a step"
        )
    print(f"load {os.getloadavg()[0]:.1f}: the rates mean something on an idle machine alone")
    best = max(("two threads", "two processes"), key=lambda way: rate[way])
    times = rate[best] / rate["one thread"]
    good = times >= GOAL and rate["two threads"] >= 0.95 * rate[best]
    print(
        f"best: {best}, {times:.2f} times one thread (goal {GOAL}); the default, two threads, has "
        f"{rate['two threads'] / rate[best]:.2f} of the best: {'met' if good else 'MISSED'}"
    )
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
