"""A thousand hostile films through a real ingest: what crashed, hung, was read or reached outside, and what it took.

    python -m tests.bench.fuzz [--films N] [--seed S] [--workers ray|here] [--keep DIR] [--json]

All films (tests/bench/hostile.py) lie in one folder beside good ones and are ingested once, by the pipeline as it is:
the driver probes and hashes, workers decode, ffmpeg alone looks into a film. Then it is counted:

    crashes     a worker that died or raised, an error that nobody expected, accounts that do not add up, a lake that
                verify finds fault with, a good film that is not there; crashes of ffmpeg itself are told apart, since
                they cost their film only
    hangs       an ffmpeg older than the recipe's limit allows
    outside     by strace, every file that an ffmpeg opened but its own film and the system's, and every connection; and
                without it, connections to a port that listens, and frames of the colour of a film that none may reach
    memory      most resident bytes of the driver, of a worker and of an ffmpeg

The status is 1 if anything was counted. Where strace is missing or forbidden, that is said and the rest is checked.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from model.ffmpeg import find_ffmpeg
from pipeline.ingest import ingest
from pipeline.ingest.identity import content
from pipeline.recipes import DataRecipe, linear
from pipeline.runner import Runner
from storage.failures import read_failures
from storage.layout import Lake
from storage.shards import ShardReader
from storage.verify import verify
from storage.version import load, read_manifest
from tests.bench.hostile import (
    BOMBS,
    FEW_BOMBS,
    FEW_SEEDS,
    KINDS,
    MAGENTA,
    SEEDS,
    Hostile,
    Outside,
    control,
    make_bombs,
    make_seeds,
)

TIMEOUT = 30.0
"""The recipe's, seconds: for all of a probe, and for the frames of each window."""
OLDEST = 3 * TIMEOUT + 10
"""Seconds that an ffmpeg may live. A film of the seeds has three windows; what was made of one hardly has more."""
MOST = {"driver": 1536 << 20, "worker": 1024 << 20, "ffmpeg": 2048 << 20}
"""Bounds of resident memory, bytes. That of ffmpeg follows from the recipe's largest frame, 35 million pixels, of which
a decoder holds several."""
UNEXPECTED = ("worker_died", "worker_failed", "decode_failed", "invert_failed", "project_failed")
"""Reasons that nobody foresaw."""
SYSTEM = ("/usr/", "/lib", "/etc/ld.so", "/etc/ssl/", "/etc/localtime", "/proc/", "/sys/", "/dev/null", "/dev/urandom")
"""Files that any program opens when it starts."""
_SELF_TEST = re.compile(r"/vlfm-ffmpeg-[^/]*/film\.mkv$")
"""The film on which each process tries its ffmpeg once (model/ffmpeg.py)."""
_OPENED = re.compile(r'(?:open|openat|openat2|creat)\((?:[A-Z_]+|\d+)?,? ?"((?:[^"\\]|\\.)*)".* = (-?\d+)')
_INPUT = re.compile(r'"file:((?:[^"\\]|\\.)*)"')


def recipe() -> DataRecipe:
    """Short windows of small pictures; every clip keeps its frames."""
    return dataclasses.replace(
        linear(),
        size=(16, 16),
        duration=0.5,
        rate=8.0,
        min_observed=2,
        max_frames=20_000,
        timeout=TIMEOUT,
        preview_clips=10**6,
        captions_required=False,
        tolerate=1.0,
    )


# --- what is watched ---


@dataclass
class Watch:
    """Most memory of this process and of those below it, and the oldest ffmpeg, looked at ten times a second."""

    tool: str
    memory: dict[str, int] = field(default_factory=lambda: dict.fromkeys(MOST, 0))
    oldest: float = 0.0
    """Seconds that an ffmpeg has lived."""
    _born: dict[int, float] = field(default_factory=dict)
    _over: threading.Event = field(default_factory=threading.Event)

    @contextlib.contextmanager
    def on(self) -> Iterator[Watch]:
        """Looks while the block lasts."""
        thread = threading.Thread(target=self._look_again, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._over.set()
            thread.join()

    def _look_again(self) -> None:
        while not self._over.wait(0.1):
            self._look()

    def _look(self) -> None:
        parents, commands = {}, {}
        for entry in os.listdir("/proc"):
            if entry.isdigit():
                with contextlib.suppress(OSError, IndexError, ValueError):
                    parents[int(entry)] = int(Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()[1])
                    commands[int(entry)] = Path(f"/proc/{entry}/cmdline").read_bytes()
        now, alive = time.monotonic(), set()
        for process, command in commands.items():
            role = self._role(process, command, parents)
            if role is None:
                continue
            with contextlib.suppress(OSError, IndexError):
                pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
                self.memory[role] = max(self.memory[role], pages * os.sysconf("SC_PAGE_SIZE"))
            if role == "ffmpeg":
                alive.add(process)
                self.oldest = max(self.oldest, now - self._born.setdefault(process, now))
        self._born = {process: born for process, born in self._born.items() if process in alive}

    def _role(self, process: int, command: bytes, parents: dict[int, int]) -> str | None:
        own = os.getpid()
        if process == own:
            return "driver"
        above = process
        while above not in (0, own):
            above = parents.get(above, 0)
        if above == 0:
            return None
        if command.startswith(self.tool.encode() + b"\0"):
            return "ffmpeg"
        return "worker" if command.startswith(b"ray::") else None


def tracing(folder: Path, tool: str) -> tuple[Path, str]:
    """A program that runs ffmpeg under strace with a log for each process in `folder`; and why it does not, if so.

    `-D` makes strace the child: the process that the pipeline knows, and kills, is ffmpeg itself.
    """
    path, strace = folder / "ffmpeg", shutil.which("strace")
    why = "strace is not installed (apt-get install strace)"
    if strace is not None:
        trial = subprocess.run(
            [strace, "-D", "-f", "-o", "/dev/null", tool, "-version"], capture_output=True, text=True
        )
        why = "" if trial.returncode == 0 else f"strace is forbidden here ({trial.stderr.strip()[:100]})"
    (folder / "logs").mkdir()
    traced = f"{strace} -D -ff --seccomp-bpf -qq -s 8192 -e trace=%file,%network -o '{folder}/logs/'$$ "
    path.write_text(f'#!/bin/sh\nexec {"" if why else traced}"{tool}" "$@"\n')
    path.chmod(0o755)
    return path, why


def read_logs(folder: Path) -> tuple[int, Counter[str]]:
    """How many ffmpegs were traced, and what they opened or reached that is neither their film nor the system's.

    A log is of one thread; its name begins with the number of the process that became ffmpeg.
    """
    found: Counter[str] = Counter()
    logs: dict[str, list[str]] = {}
    for log in folder.iterdir():
        logs.setdefault(log.name.partition(".")[0], []).extend(log.read_text(errors="surrogateescape").splitlines())
    for lines in logs.values():
        own = {name for line in lines if line.startswith("execve(") for name in _INPUT.findall(line)}
        for line in lines:
            opened = _OPENED.match(line)
            if opened and not opened[1].startswith(SYSTEM) and opened[1] not in own and int(opened[2]) >= 0:
                found[f"opened {opened[1]}"] += not _SELF_TEST.search(opened[1])
            elif line.startswith(("connect(", "sendto(", "sendmsg(", "bind(")):
                found[line[:120]] += 1
    return len(logs), +found


# --- the run ---


@dataclass
class Tally:
    """What became of the films."""

    films: int
    kinds: dict[str, int]
    done: int
    reasons: dict[str, int]
    crashes: list[str]
    ffmpeg_crashed: int
    """Films whose ffmpeg crashed."""
    timeouts: int
    """Films that were given up at the recipe's limit."""
    oldest: float
    outside: list[str]
    traced: int
    untraced: str
    """Why nothing was traced."""
    memory: dict[str, int]
    seconds: float

    @property
    def problems(self) -> list[str]:
        """What must not be, a line each."""
        over = [
            f"a {role} took {self.memory[role] >> 20} MiB, the bound is {bound >> 20}"
            for role, bound in MOST.items()
            if self.memory[role] > bound
        ]
        late = [f"an ffmpeg lived {self.oldest:.0f} s, the limit is {OLDEST:.0f}"] if self.oldest > OLDEST else []
        return [*self.crashes, *(f"outside: {line}" for line in self.outside), *late, *over]

    def lines(self) -> list[str]:
        """For people."""
        reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(self.reasons.items()))
        memory = ", ".join(f"{role} {self.memory[role] >> 20} of {MOST[role] >> 20} MiB" for role in MOST)
        traced = f"{self.traced} ffmpegs traced" if not self.untraced else f"NOT TRACED: {self.untraced}"
        return [
            f"films      {self.films} hostile: " + ", ".join(f"{kind} {count}" for kind, count in self.kinds.items()),
            f"became     {self.done} in the dataset; {reasons}",
            f"crashes    {len(self.crashes)}; of ffmpeg itself {self.ffmpeg_crashed}, each cost its film only",
            f"hangs      {int(self.oldest > OLDEST)}; the oldest ffmpeg lived {self.oldest:.1f} s of {OLDEST:.0f}; "
            f"{self.timeouts} films were stopped at the timeout",
            f"outside    {len(self.outside)} files or connections; {traced}",
            f"memory     {memory}",
            f"time       {self.seconds:.0f} s",
            *(f"PROBLEM    {line}" for line in self.problems),
        ]


def run(
    root: Path,
    films: int,
    seed: int = 0,
    runner: Runner | None = None,
    real: Path | None = None,
    few: bool = False,
) -> Tally:
    """Makes `films` hostile films below `root` and ingests them.

    Args:
        root: an empty folder.
        films: how many.
        seed: which.
        runner: None for a Ray session of its own.
        real: a folder of real films.
        few: make them of fewer seeds and bombs, which takes seconds less.
    """
    folder, lake = root / "films", root / "lake"
    folder.mkdir()
    outside = Outside(root / "outside")
    seeds = make_seeds(root / "seeds", FEW_SEEDS if few else SEEDS, real)
    hostile = Hostile(folder, seeds, make_bombs(root / "bombs", FEW_BOMBS if few else BOMBS), outside)
    kinds = Counter(hostile.make(number, seed) for number in range(films))
    good = set(control(folder, seeds))
    tool = find_ffmpeg().path
    wrapper, untraced = tracing(root, tool)
    crashes = []
    begin = time.monotonic()
    before = os.environ.get("VLFM_FFMPEG")
    os.environ["VLFM_FFMPEG"] = str(wrapper)
    watch = Watch(tool)
    try:
        with watch.on(), runner or Runner() as chosen:
            report = ingest(folder, lake, recipe=recipe(), runner=chosen)
    finally:
        os.environ.pop("VLFM_FFMPEG")
        if before is not None:
            os.environ["VLFM_FFMPEG"] = before
            outside.close()
    opened = Lake.open(lake)
    version = load(opened)
    rows = {row["film"]: row for row in read_manifest(opened, version, "films").to_pylist()}
    failures = read_failures(opened, report.run_id)
    crashes += [f"{row['film']!a}: {row['reason']}: {row['detail']}" for row in failures if row["reason"] in UNEXPECTED]
    # A hostile film may be a good one's copy under another name, which has the clips then.
    held = {content(row) for row in rows.values() if row["clips"]}
    crashes += [
        f"the good film {name} is {rows.get(name, {}).get('reason', 'not there')}"
        for name in good
        if name not in rows or content(rows[name]) not in held
    ]
    crashes += [f"verify: {problem}" for problem in verify(opened, version)]
    if report.films.discovered < films + len(good) - kinds["name"] - kinds["link"]:
        crashes.append(
            f"{report.films.discovered} films were discovered, of {films} hostile ones and {len(good)} good ones"
        )
    count, reached = read_logs(root / "logs")
    reached += Counter({"connections to the listening port": outside.connections} if outside.connections else {})
    reached += Counter({f"frames of the film outside, in {name!a}": 1 for name in _magenta(opened, version)})
    if not untraced and count < films / 2:
        crashes.append(f"only {count} ffmpegs were traced")
    hostile_rows = [row for name, row in rows.items() if name not in good]
    reasons = Counter(row["reason"] for row in hostile_rows if row["reason"])
    said = [row["detail"] for row in failures if row["reason"] == "decoder_failed"]
    return Tally(
        films=films,
        kinds={kind: kinds[kind] for kind in KINDS},
        done=sum(row["clips"] > 0 for row in hostile_rows),
        reasons=dict(reasons),
        crashes=crashes,
        ffmpeg_crashed=sum("killed" in detail or "crash" in detail for detail in said),
        timeouts=reasons["timeout"],
        oldest=watch.oldest,
        outside=[f"{what} ({times})" for what, times in reached.items()],
        traced=0 if untraced else count,
        untraced=untraced,
        memory=watch.memory,
        seconds=time.monotonic() - begin,
    )


def _magenta(lake: Lake, version: Any) -> list[str]:
    """Films of clips with a frame of that colour."""
    found = []
    for row in read_manifest(lake, version).to_pylist():
        frames = ShardReader(lake, row["shard"]).read(row["shard_row"], ["preview.npy"])["preview.npy"]
        if (np.abs(frames.mean(axis=(1, 2)) - MAGENTA).max(axis=1) < 40).any():
            found.append(row["film"])
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the tally; the status is 1 if anything went wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.fuzz", description=__doc__.partition("\n")[0])
    parser.add_argument("--films", type=int, default=1000, metavar="N")
    parser.add_argument("--seed", type=int, default=0, metavar="S")
    parser.add_argument("--workers", choices=("ray", "here"), default="ray", help="who makes the clips (default: ray)")
    parser.add_argument(
        "--real", type=Path, default=Path("../shared/videos"), metavar="DIR", help="real films, if there"
    )
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep films, lake and logs in this new folder")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    runner = None
    if options.workers == "here":
        from tests.pipeline.ingest.in_process import InProcess

        runner = InProcess()
    with contextlib.ExitStack() as stack:
        root = options.keep or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vlfm-fuzz-")))
        root.mkdir(parents=True, exist_ok=True)
        tally = run(root, options.films, options.seed, runner, options.real if options.real.is_dir() else None)
    told = {**dataclasses.asdict(tally), "problems": tally.problems}
    print(json.dumps(told) if options.json else "\n".join(tally.lines()))
    return 1 if tally.problems else 0


if __name__ == "__main__":
    sys.exit(main())
