"""`python -m tests.bench.gpu`: the goals H1, H2 and H6 of the visual codec, with Stable Diffusion v1.5's architecture.

    make bench-gpu                                      on a machine with a GPU
    python -m tests.bench.gpu --tiny                    the same code on a CPU in seconds; its figures mean nothing

The weights are random, which is enough for speed; the configs are written below. What is timed is the codec's own code,
`model.codecs.batches.Networks` and the loops of `model.codecs.ddim`, so that a figure here is a figure of an ingest. It
needs torch and diffusers (with transformers), and nothing else of the project's dependencies.

H1: frames a second from pixels to inverted latents (VAE and 50 levels without refinement, 41.3 TFLOP a frame).
H2: frames a second through the VAE's encoder.  H6: seconds for a video of 32 frames from noise to pixels.
Beside each stands the limit: the FLOP counted on the meta device over the bfloat16 matrix product measured in this run.
Each figure is the median of `--repeats` after a warm-up, wall time with the device waited for. Sizes that do not fit
are rows; compiling takes a minute or two a batch size, and what `--minutes` leaves no time for is a row as well.

docs/benchmarks.md says how to run it on a bare machine and keeps the dated results.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.codecs.batches import Compiler, Networks, gpu_compiler
from model.codecs.ddim import DDIMSchedule, invert, regenerate
from tests.bench.sd15 import TINY, Plan, build, copy_bandwidth, count_tflop, matrix_peak

LOWER = ("s", "of a step")
"""Units of which less is better."""


@dataclass(frozen=True)
class Row:
    """One figure, or the reason why there is none."""

    goal_id: str
    what: str
    mode: str
    batch: int
    value: float | None
    unit: str
    limit: float | None = None
    """The value at the matrix product's peak."""
    goal: float | None = None
    first: float | None = None
    """Seconds of the warm-up, compilation included."""
    memory: float | None = None
    """Peak of the allocated device memory, GiB."""
    note: str = ""

    @property
    def met(self) -> bool | None:
        if self.goal is None or self.value is None:
            return None
        return self.value <= self.goal if self.unit in LOWER else self.value >= self.goal

    @property
    def share(self) -> float | None:
        """Of the limit, 1 being as fast as it allows."""
        if self.limit is None or self.value is None:
            return None
        return self.limit / self.value if self.unit == "s" else self.value / self.limit


class Bench:
    """Rows in the order in which they were measured; each is printed, and kept in a file, as soon as it is there."""

    def __init__(self, plan: Plan, device: str, repeats: int, minutes: float, json_file: Path | None) -> None:
        self.plan, self.device, self.repeats, self.json_file = plan, torch.device(device), repeats, json_file
        self.end = time.monotonic() + 60 * minutes
        self.rows: list[Row] = []
        self.on_gpu = self.device.type == "cuda"
        kind = torch.bfloat16 if self.on_gpu else torch.float32
        self.about: dict[str, Any] = {
            "date": datetime.date.today().isoformat(),
            "device": torch.cuda.get_device_name(self.device) if self.on_gpu else platform.machine() + " CPU",
            "torch": torch.__version__,
            "type": str(kind).removeprefix("torch."),
            "pixels": plan.pixels,
            "peak_tflops": matrix_peak(plan.peak_side, self.device, kind),
            "copy_gbytes": copy_bandwidth(plan.copy_bytes, self.device),
            "tflop": count_tflop(plan),
        }
        print(header(self.about), flush=True)

    def add(self, row: Row) -> None:
        """Prints and keeps a row."""
        self.rows.append(row)
        print(line(row), flush=True)
        if self.json_file is not None:
            self.json_file.write_text(dump(self.about, self.rows))

    def measure(self, base: Row, warm_up: Callable[[], object], call: Callable[[], object], to: Callable) -> bool:
        """Adds `base` with `to(median seconds of a call)`, or with the reason; says whether it was measured."""
        reason, first = "", None
        if time.monotonic() > self.end:
            reason = "not run: the time was up"
        else:
            try:
                if self.on_gpu:
                    torch.cuda.reset_peak_memory_stats(self.device)
                first = self.seconds(warm_up)
                value = to(statistics.median(self.seconds(call) for _ in range(self.repeats)))
                memory = torch.cuda.max_memory_allocated(self.device) / 2**30 if self.on_gpu else None
                self.add(replace(base, value=value, first=first, memory=memory))
                return True
            except torch.OutOfMemoryError:
                reason = "out of memory"
        self.add(replace(base, first=first, note=reason))
        release(self.on_gpu)
        return False

    def seconds(self, call: Callable[[], object]) -> float:
        """Wall seconds of a call, the device's work included."""
        self.wait()
        start = time.perf_counter()
        call()
        self.wait()
        return time.perf_counter() - start

    def wait(self) -> None:
        """Until the device has done what was asked of it."""
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def limit(self, *parts: tuple[str, int]) -> float:
        """Seconds that a frame cannot take less than: FLOP of (part, times) over the measured peak."""
        return sum(self.about["tflop"][part] * times for part, times in parts) / self.about["peak_tflops"]


def codec_rows(bench: Bench, networks: Networks, mode: str, batch: int) -> None:
    """H2 and H1 with `batch` frames at once."""
    plan = bench.plan
    schedule = DDIMSchedule(plan.levels[0])
    frames = torch.rand(batch, 3, plan.pixels, plan.pixels, device=bench.device) * 2 - 1
    text = torch.randn(batch, *plan.text, device=bench.device)

    def to_latents(levels: int = plan.levels[0]) -> Tensor:
        clean = networks.encode(frames, batch)
        return invert(clean, networks.noise(text, batch), schedule, levels, refinements=0).latents

    def rate(seconds: float) -> float:
        return batch / seconds

    encode = Row(
        "H2", "VAE encode", mode, batch, None, "frames/s", limit=1 / bench.limit(("encode", 1)), goal=plan.goal(300),
    )  # fmt: skip
    if not bench.measure(encode, lambda: networks.encode(frames, batch), lambda: networks.encode(frames, batch), rate):
        return
    limit = 1 / bench.limit(("encode", 1), ("unet", plan.levels[0]))
    what = f"VAE encode and inversion, {plan.levels[0]} levels"
    # Two levels warm up what fifty need, the graph's capture included.
    bench.measure(
        Row("H1", what, mode, batch, None, "frames/s", limit=limit, goal=plan.goal(6.7)),
        lambda: to_latents(2),
        to_latents,
        rate,
    )


def video_rows(bench: Bench, networks: Networks, mode: str) -> None:
    """H6: a video from noise to pixels, all its frames in one batch."""
    plan, count = bench.plan, bench.plan.video
    noise = networks.noise(torch.randn(count, *plan.text, device=bench.device), count)
    noisy = torch.randn(count, *plan.latent_shape, device=bench.device)

    def to_frames(ddim_steps: int, depth: int | None = None) -> Tensor:
        clean = noisy if ddim_steps == 0 else regenerate(noisy, noise, DDIMSchedule(ddim_steps), depth)
        return networks.decode(clean, count)

    for levels, goal in zip((*plan.levels, 0), (5.0, 1.3, 0.35), strict=True):
        what = f"video of {count} frames, " + (f"DDIM-{levels}" if levels else "VAE only")
        limit = count * bench.limit(("unet", levels), ("decode", 1))
        base = Row("H6", what, mode, count, None, "s", limit=limit, goal=plan.goal(goal))
        warm_up = (lambda levels=levels: to_frames(levels, 2)) if levels else (lambda: to_frames(0))
        bench.measure(base, warm_up, lambda levels=levels: to_frames(levels), lambda seconds: seconds)


def waiting_row(bench: Bench, networks: Networks) -> None:
    """How often a level of the inversion waits for the device; needs a GPU, whose driver counts it."""

    def waits(levels: int) -> int:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                invert(latents, noise, DDIMSchedule(bench.plan.levels[0]), levels, refinements=1)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return sum("synchroniz" in str(warning.message) for warning in caught)

    latents = torch.randn(1, *bench.plan.latent_shape, device=bench.device)
    noise = networks.noise(torch.randn(1, *bench.plan.text, device=bench.device))
    bench.add(Row("", "waits for the device, eight more levels", "eager", 1, waits(10) - waits(2), "times"))


def release(on_gpu: bool) -> None:
    """Gives back what failed batches held."""
    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()


def run(bench: Bench, compiler: Compiler | None) -> None:
    """All rows: eager first, then compiled with the batches that matter most first."""
    vae, unet = build(bench.plan, bench.device)
    eager = Networks(vae, unet, bench.device)
    for batch in bench.plan.batches:
        codec_rows(bench, eager, "eager", batch)
    video_rows(bench, eager, "eager")
    if bench.on_gpu:
        waiting_row(bench, eager)
    if compiler is None:
        return
    for batch in sorted({*bench.plan.batches, bench.plan.video}, key=lambda batch: abs(batch - bench.plan.video)):
        networks = Networks(vae, unet, bench.device, compiler=compiler)
        if batch == bench.plan.video:
            video_rows(bench, networks, "compiled")
        if batch in bench.plan.batches:
            codec_rows(bench, networks, "compiled", batch)
        if not networks.compiled:
            bench.add(
                Row("", "the rows above this one ran eager", "compiled", batch, None, "", note="compiling failed")
            )
            return
        torch.compiler.reset()  # a CUDA graph keeps its memory
        release(bench.on_gpu)


def header(about: dict[str, Any]) -> str:
    """The machine, its two peaks and the work of a frame."""
    work = ", ".join(f"{name} {value:.4g}" for name, value in about["tflop"].items())
    return (
        f"{about['device']}, torch {about['torch']}, {about['type']}, {about['pixels']} pixels. Measured peaks: matrix "
        f"product {about['peak_tflops']:.4g} TFLOP/s, copy {about['copy_gbytes']:.4g} GB/s. TFLOP a frame: {work}."
    )


def cells(row: Row) -> list[str]:
    """A row of the table, as text."""
    measured = row.note if row.value is None else f"{row.value:.3g} {row.unit}"
    limit = "" if row.limit is None else f"{row.limit:.3g}"
    share = "" if row.share is None else f"{row.share:.0%}"
    goal = "" if row.goal is None else f"{'<=' if row.unit in LOWER else '>='} {row.goal:g}"
    verdict = "" if row.met is None else ("met" if row.met else "MISSED")
    memory, first = ("" if number is None else f"{number:.1f}" for number in (row.memory, row.first))
    return [row.goal_id, row.what, row.mode, str(row.batch), measured, limit, share, goal, verdict, memory, first]


COLUMNS = ("goal", "what", "mode", "batch", "measured", "limit", "share", "wanted", "", "GiB", "warm-up, s")
WIDTHS = (4, 42, 8, 5, 24, 8, 6, 7, 6, 6, 10)


def line(row: Row) -> str:
    """A row for the terminal."""
    return "  ".join(cell.ljust(width) for cell, width in zip(cells(row), WIDTHS, strict=True)).rstrip()


def markdown(about: dict[str, Any], rows: Sequence[Row]) -> str:
    """The dated section for docs/benchmarks.md."""
    table = [COLUMNS, ("---",) * len(COLUMNS), *(cells(row) for row in rows)]
    lines = [f"### {about['date']}, {about['device']}", "", header(about), ""]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in table])


def dump(about: dict[str, Any], rows: Sequence[Row]) -> str:
    """What `--json` writes and `--read` reads."""
    return json.dumps({"about": about, "rows": [asdict(row) for row in rows]}, indent=1) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table; the status is 1 where a goal was met by none of its rows, 2 without a GPU."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true", help="tiny networks on the CPU: whether the code runs")
    parser.add_argument("--batches", help="frames at once, as 1,8,32 (default: 1,2,4,8,16,32,64)")
    parser.add_argument("--no-compile", action="store_true", help="eager rows alone")
    parser.add_argument(
        "--compile-mode", default="reduce-overhead", help="mode of torch.compile (default: %(default)s)"
    )
    parser.add_argument(
        "--repeats", type=int, default=3, help="calls of which the median counts (default: %(default)s)"
    )
    parser.add_argument("--minutes", type=float, default=7, help="start no row after this time (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the rows here, after each one")
    parser.add_argument("--markdown", action="store_true", help="print the section for docs/benchmarks.md at the end")
    parser.add_argument("--read", type=Path, metavar="FILE", help="measure nothing: show what --json kept")
    options = parser.parse_args(arguments)
    if options.read is not None:
        kept = json.loads(options.read.read_text())
        about, rows = kept["about"], [Row(**row) for row in kept["rows"]]
        print(header(about), *map(line, rows), sep="\n")
    elif not options.tiny and not torch.cuda.is_available():
        print("error: there is no GPU here; --tiny runs the same code on the CPU", file=sys.stderr)
        return 2
    else:
        plan = TINY if options.tiny else Plan()
        if options.batches:
            plan = replace(plan, batches=tuple(int(batch) for batch in options.batches.split(",")))
        device = "cpu" if options.tiny else "cuda"
        # The CPU only shows that the code runs: the compiler's front end without its C++.
        compiler = (lambda call: torch.compile(call, backend="eager")) if options.tiny else None
        compiler = compiler or gpu_compiler(options.compile_mode)
        torch.manual_seed(0)
        bench = Bench(plan, device, options.repeats, options.minutes, options.json)
        run(bench, None if options.no_compile else compiler)
        about, rows = bench.about, bench.rows
    if options.markdown:
        print("\n" + markdown(about, rows))
    goals = {(row.goal_id, row.what) for row in rows if row.goal is not None}
    met = {(row.goal_id, row.what) for row in rows if row.met}
    return 0 if goals == met else 1


if __name__ == "__main__":
    sys.exit(main())
