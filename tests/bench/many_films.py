"""Thousands of tiny films: what a film, a clip and a refresh cost as there are more of them, and how much memory.

    python -m tests.bench.many_films [--films 2000] [--planned 10000] [--clips 100,1000,10000] [--json]

Films are real and tiny, each of its own content; decoding, codec and projection are those of an ingest, in this process
in place of Ray's workers, so that all processor time and memory is this process's and ffmpeg's. Each part is a process
of its own, so that its peak of memory is its own, and imports and loads what it needs before it is measured. Times are
of the processor, because machines are shared.

    ingest      `--films` films, each of five clips, into a new lake
    refresh     the same again, with nothing new (G9): no film opened, no worker started; the plan beside listing the
                folder and asking each film's size and time, which is the least that can be done; the whole command
    clips       as many clips as said, windows of four films (G10)
    plan        `--planned` films into an empty lake, up to the blocks of work
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pipeline.ingest.plan
from pipeline.ingest import ingest, plan_ingest
from pipeline.media.decode import ffmpeg_binary
from pipeline.recipes import DataRecipe, linear
from pipeline.sources.folders import discover
from storage.garbage import lake_bytes
from storage.layout import Lake
from tests.pipeline.ingest.in_process import InProcess, NoWork

WINDOW = 0.5
"""Seconds of a clip."""
SIDE = 32
"""Pixels of a film's side, and of a clip's."""
FEW = 4
"""Films of which many clips are windows."""


def recipe() -> DataRecipe:
    """Short windows through the linear codec."""
    return dataclasses.replace(linear(), size=(SIDE, SIDE), duration=WINDOW, rate=16.0, preview_clips=16)


def make_films(folder: Path, count: int, seconds: float) -> None:
    """`count` films of `seconds`, each of its own content: the last box of each has its number."""
    folder.mkdir(parents=True)
    seed = folder.parent / "seed.mp4"
    picture = f"testsrc2=size={SIDE}x{SIDE}:rate=16:duration={seconds}"
    command = [ffmpeg_binary(), "-v", "error", "-nostdin", "-y", "-f", "lavfi", "-i", picture]
    subprocess.run([*command, "-c:v", "libx264", "-preset", "ultrafast", "-g", "16", str(seed)], check=True)
    film = seed.read_bytes()
    for number in range(count):
        (folder / f"{number:06}.mp4").write_bytes(film + b"\0\0\0\x10free" + f"{number:08}".encode())
    lines = [f"{number:06}.mp4,film {number % 100}" for number in range(count)]
    (folder / "captions.csv").write_text("\n".join(["file,caption", *lines, ""]))


# --- what is measured ---


@dataclasses.dataclass
class Taken:
    """Processor seconds of a block of code, its children's among them."""

    own: float = 0.0
    children: float = 0.0

    @property
    def seconds(self) -> float:
        """Together."""
        return self.own + self.children


@contextlib.contextmanager
def taken() -> Iterator[Taken]:
    """Measures the block."""
    found = Taken()
    before = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    yield found
    after = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    found.own, found.children = (
        end.ru_utime + end.ru_stime - start.ru_utime - start.ru_stime for start, end in zip(before, after, strict=True)
    )


def peak() -> int:
    """Most resident bytes of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def warm(root: Path) -> None:
    """An ingest of one film, for all that is imported, loaded and started once."""
    with tempfile.TemporaryDirectory(dir=root) as folder:
        make_films(Path(folder) / "films", 1, seconds=5 * WINDOW)
        ingest(Path(folder) / "films", Path(folder) / "lake", recipe=recipe(), runner=InProcess())


def part_ingest(root: Path, count: int) -> dict[str, Any]:
    """`count` films into root/lake."""
    warm(root)
    make_films(root / "films", count, seconds=5 * WINDOW)
    held = peak()
    with taken() as all_of_it:
        report = ingest(root / "films", root / "lake", recipe=recipe(), runner=InProcess())
    assert (report.films.done, report.clips.done) == (count, 5 * count)
    return {
        "films": count,
        "clips": report.clips.done,
        "cpu_ms_a_film": 1e3 * all_of_it.seconds / count,
        "of_it_ffmpeg": all_of_it.children / all_of_it.seconds,
        "seconds": {name: round(value, 2) for name, value in report.seconds.items()},
        "peak_mb": peak() / 1e6,
        "above_start_mb": (peak() - held) / 1e6,
        "lake_kb_a_film": lake_bytes(Lake.open(root / "lake")) / 1e3 / count,
    }


def part_refresh(root: Path, count: int, command: bool = True) -> dict[str, Any]:
    """Nothing new in root/films: no film may be opened, no worker started. `command`: the whole `vlfm ingest`, too."""
    lake = Lake.open(root / "lake")
    opened = mock.Mock(side_effect=AssertionError("a film was opened"))
    rounds: dict[str, list[float]] = {"least": [], "discover": [], "plan": []}
    with mock.patch.multiple(pipeline.ingest.plan, probe=opened, digest_of=opened):
        for _ in range(5):
            with taken() as least:
                names = [
                    os.path.join(where, name) for where, _, files in os.walk(root / "films") for name in sorted(files)
                ]
                stats = [os.stat(name) for name in names]
            with taken() as discovering:
                found = discover(root / "films")
            with taken() as planning:
                plan = plan_ingest(lake, found, recipe())
            assert len(stats) == count + 1
            assert (len(plan.films), plan.blocks) == (count, [])
            for name, it in (("least", least), ("discover", discovering), ("plan", planning)):
                rounds[name].append(it.seconds)
        with taken() as whole:
            report = ingest(root / "films", root / "lake", recipe=recipe(), runner=NoWork())
    assert not report.published
    median = {name: sorted(values)[2] for name, values in rounds.items()}
    found_json = {
        "films": count,
        "list_and_stat_s": median["least"],
        "discover_s": median["discover"],
        "plan_s": median["plan"],
        "discover_and_plan_to_least": (median["discover"] + median["plan"]) / median["least"],
        "whole_s": whole.seconds,
        "peak_mb": peak() / 1e6,
    }
    if not command:
        return found_json
    settings = {name: getattr(recipe(), name) for name in ("duration", "rate", "preview_clips")}
    given = [f"--set={name}={value}" for name, value in settings.items()] + [f"--set=size=[{SIDE},{SIDE}]"]
    ingest_it = ["ingest", str(root / "films"), "--lake", str(root / "lake"), "--recipe", "linear", *given]
    begin = time.monotonic()
    with taken() as outside:
        done = subprocess.run([sys.executable, "-m", "flows.cli", *ingest_it], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"{count} unchanged" in done.stdout, done.stdout
    return {**found_json, "command_cpu_s": outside.children, "command_wall_s": time.monotonic() - begin}


def part_plan(root: Path, count: int) -> dict[str, Any]:
    """`count` new films, planned."""
    make_films(root / "planned", count, seconds=5 * WINDOW)
    held = peak()
    with taken() as all_of_it:
        found = discover(root / "planned")
        plan = plan_ingest(Lake.create(root / "empty"), found, recipe())
    assert (len(plan.films), len(plan.clips)) == (count, 5 * count)
    return {
        "films": count,
        "clips": len(plan.clips),
        "cpu_ms_a_film": 1e3 * all_of_it.seconds / count,
        "of_it_ffmpeg": all_of_it.children / all_of_it.seconds,
        "peak_mb": peak() / 1e6,
        "above_start_kb_a_film": (peak() - held) / 1e3 / count,
    }


def part_clips(root: Path, count: int) -> dict[str, Any]:
    """`count` clips of a few films."""
    warm(root)
    make_films(root / f"few-{count}", FEW, seconds=count * WINDOW / FEW)
    held = peak()
    with taken() as all_of_it:
        report = ingest(root / f"few-{count}", root / f"lake-{count}", recipe=recipe(), runner=InProcess())
    assert report.clips.done == count, report.lines()
    return {
        "clips": count,
        "cpu_ms_a_clip": 1e3 * all_of_it.seconds / count,
        "of_it_ffmpeg": all_of_it.children / all_of_it.seconds,
        "seconds": {name: round(value, 2) for name, value in report.seconds.items()},
        "peak_mb": peak() / 1e6,
        "above_start_mb": (peak() - held) / 1e6,
    }


PARTS = {"ingest": part_ingest, "refresh": part_refresh, "plan": part_plan, "clips": part_clips}


def apart(part: str, root: Path, count: int) -> dict[str, Any]:
    """A part in a process of its own."""
    command = [
        sys.executable,
        "-m",
        "tests.bench.many_films",
        "--part",
        part,
        "--root",
        str(root),
        "--count",
        str(count),
    ]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def judge(found: dict[str, Any]) -> list[tuple[str, float, float]]:
    """Figures with goals: what, value, the most that it may be."""
    rows = []
    if refresh := found.get("refresh"):
        rows.append(("G9 discover + plan / list + stat, nothing new", refresh["discover_and_plan_to_least"], 2.0))
        rows.append(("G9 the whole command, CPU s", refresh["command_cpu_s"], 30.0))
    clips = found.get("clips", [])
    if len(clips) > 1:
        first, last = clips[0], clips[-1]
        what = f"{last['clips']} clips / {first['clips']}"
        rows.append((f"G10 cost of a clip, {what}", last["cpu_ms_a_clip"] / first["cpu_ms_a_clip"], 1.1))
        rows.append((f"G10 peak of memory, {what}", last["peak_mb"] / first["peak_mb"], 1.1))
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the figures; the status is 1 where a goal is missed."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.many_films", description=__doc__.partition("\n")[0])
    parser.add_argument("--films", type=int, default=2000, metavar="N", help="0 leaves out ingest and refresh")
    parser.add_argument("--planned", type=int, default=10000, metavar="N", help="0 leaves it out")
    parser.add_argument("--clips", default="100,1000,10000", metavar="N,N", help="empty leaves it out")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--root", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--count", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.part:
        print(json.dumps(PARTS[options.part](options.root, options.count)))
        return 0
    found: dict[str, Any] = {}

    def tell(name: str, value: dict[str, Any]) -> None:
        if not options.json:
            said = ", ".join(
                f"{key} {each:.4g}" if isinstance(each, float) else f"{key} {each}" for key, each in value.items()
            )
            print(f"{name:8} {said}", flush=True)

    with tempfile.TemporaryDirectory(prefix="vlfm-many-") as folder:
        root = Path(folder)
        if options.films:
            for part in ("ingest", "refresh"):
                found[part] = apart(part, root, options.films)
                tell(part, found[part])
        for count in [int(each) for each in options.clips.split(",") if each]:
            found.setdefault("clips", []).append(apart("clips", root, count))
            tell("clips", found["clips"][-1])
        if options.planned:
            found["plan"] = apart("plan", root, options.planned)
            tell("plan", found["plan"])
    rows = judge(found)
    if options.json:
        print(
            json.dumps(
                {**found, "goals": [{"metric": what, "value": value, "most": most} for what, value, most in rows]}
            )
        )
    for what, value, most in rows if not options.json else ():
        print(f"{what:48} {value:8.4g}   <= {most:g} {'met' if value <= most else 'MISSED'}")
    return int(any(value > most for _, value, most in rows))


if __name__ == "__main__":
    sys.exit(main())
