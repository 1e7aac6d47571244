"""`python -m tests.bench.gpu_training`: the goals H3 and H4, a training step of DiT-XL/2, and H5, its wait for data.

    make bench-gpu                                      on a machine with a GPU
    python -m tests.bench.gpu_training --tiny           the same code on a CPU in seconds; its figures mean nothing

What is timed is the trainer's own step: a method's loss (VLFM, four flow times a clip) under bfloat16 autocast,
backward, and model.training.updates with fused AdamW and the average; weights and optimiser in float32. A state of a
clip is what others call an image. Rows with and without cross-attention stand apart: the published DiT has none, and
the goals are its. With it there is a row for each `caption_padding`: the mask of `masked` rules out flash kernels.
Beside each the limit: forward and backward FLOP, counted on the meta device, over the bfloat16 matrix product measured
here; the share of it is the MFU. Sizes that do not fit are rows. At the end the kernels that take longest.

H5 reads a lake of clips of such latents (16 coefficients) through the trainer's loader beside
such steps, where the storage's libraries are installed.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from model.backbones.conditioning import Conditioning
from model.backbones.dit import Backbone, BackboneConfig
from model.methods.base import Batch
from model.methods.draws import Draws
from model.methods.vlfm import VLFM, VLFMOptions
from model.recipes import TrainRecipe
from model.training.ema import MovingAverage
from model.training.optimizers import make_optimizers
from model.training.processes import Processes
from model.training.state import TrainingState
from model.training.updates import Updates
from tests.bench import gpu
from tests.bench.gpu import Row, dump, markdown
from tests.bench.sd15 import copy_bandwidth, matrix_peak
from tests.bench.sizes import published_config

TIMES, WORDS, ORDER = 4, 77, 16
"""Flow times of a clip, rows of a caption, coefficients of a clip."""
CAPTIONS = ("none", "seen", "masked")
"""No cross-attention, or cross-attention with one `caption_padding` or the other."""
WAIT = 0.01
"""Share of a step that the trainer may wait for data."""
FORWARD_AND_BACKWARD = 3
"""Times the forward pass's FLOP."""


@dataclass(frozen=True)
class Plan:
    """What is measured."""

    configs: tuple[tuple[str, str, float, BackboneConfig], ...]
    """(goal, what, images a second that are wanted, backbone)."""
    clips: tuple[int, ...] = (16, 32, 64)
    """Clips of a step; four states each."""
    side: int = 8192
    """Of the matrices whose product is the peak."""
    copied: int = 2**30
    """Bytes that are copied for the bandwidth."""


def full_plan() -> Plan:
    """XL/2 on latents of 256 and 512 pixels."""
    return Plan((
        ("H3", "DiT-XL/2 training, 256 tokens", 444.0, published_config("XL/2", 256)),
        ("H4", "DiT-XL/2 training, 1024 tokens", 100.0, published_config("XL/2", 512)),
    ))  # fmt: skip


def tiny_plan() -> Plan:
    """The same on nothing to speak of."""
    config = BackboneConfig(4, 4, 4, 8, 32, 2, 2, 2, architecture="dit")
    return Plan((("H3", "tiny", 0.0, config),), clips=(2,), side=256, copied=2**20)


class WithoutCaption(nn.Module):
    """Stands in for the cross-attention that the published DiT does not have."""

    def forward(self, tokens: Tensor, text: Tensor, words: Tensor | None) -> Tensor:
        """Nothing to add to the tokens."""
        return tokens.new_zeros(())


class TrainingBench(gpu.Bench):
    """Rows of training steps."""

    def __init__(self, plan: Plan, device: str, repeats: int, minutes: float, json_file: Path | None) -> None:
        self.chosen, self.device, self.repeats, self.json_file = plan, torch.device(device), repeats, json_file
        self.end = time.monotonic() + 60 * minutes
        self.rows: list[Row] = []
        self.on_gpu = self.device.type == "cuda"
        kind = torch.bfloat16 if self.on_gpu else torch.float32
        self.about = {
            "date": datetime.date.today().isoformat(),
            "device": torch.cuda.get_device_name(self.device) if self.on_gpu else platform.machine() + " CPU",
            "torch": torch.__version__,
            "type": str(kind).removeprefix("torch."),
            "pixels": 8 * plan.configs[0][3].height,
            "peak_tflops": matrix_peak(plan.side, self.device, kind),
            "copy_gbytes": copy_bandwidth(plan.copied, self.device),
            "tflop": {
                named(what, captions): tflop(config, captions)
                for _, what, _, config in plan.configs
                for captions in CAPTIONS
            },
        }
        print(gpu.header(self.about), flush=True)


def named(what: str, captions: str) -> str:
    """What a row is called."""
    return what if captions == "none" else f"{what}, captions {captions}"


def network(config: BackboneConfig, captions: str, device: torch.device | str) -> Backbone:
    """A new backbone, with what CAPTIONS has."""
    with torch.device(device):
        backbone = Backbone(gpu.replace(config, caption_rows=WORDS if captions == "seen" else 0))
    if captions == "none":
        for block in backbone.blocks:
            block.cross = WithoutCaption()
    return backbone


def clips(config: BackboneConfig, count: int, device: torch.device | str) -> Batch:
    """Clips of random numbers, with captions of full length."""
    shape = (config.channels, config.height, config.width_latent)
    return Batch(
        clip_ids=("",) * count,
        text=torch.randn(count, WORDS, config.text_dim, device=device),
        text_length=torch.full((count,), WORDS, device=device),
        empty_text=torch.randn(2, config.text_dim, device=device),
        clip_start=torch.zeros(count, device=device),
        duration=torch.ones(count, device=device),
        coefficients=torch.randn(count, ORDER, *shape, device=device),
    )


def method_of(config: BackboneConfig) -> VLFM:
    """VLFM with its defaults."""
    form = {"latent_shape": [config.channels, config.height, config.width_latent]}
    return VLFM.build(VLFMOptions(times_per_clip=TIMES), {"mean_scale": 1.0, "derivative_scale": 1.0}, form)


def tflop(config: BackboneConfig, captions: str) -> float:
    """TFLOP of a training step of one state, forward and backward; a clip's states share the work on its caption."""
    backbone, counter = network(config, captions, "meta"), FlopCounterMode(display=False)
    latents = torch.zeros(TIMES, 1, config.channels, config.height, config.width_latent, device="meta")
    zeros = torch.zeros(TIMES, device="meta")
    given = Conditioning(
        text=torch.zeros(1, WORDS, config.text_dim, device="meta"),
        text_length=torch.zeros(1, dtype=torch.int64, device="meta"),
        clip_start=zeros,
        start_given=zeros,
        log_duration=zeros,
        context=latents,
        context_given=torch.zeros(TIMES, 1, dtype=torch.bool, device="meta"),
    )
    with counter, torch.no_grad():
        backbone(latents, zeros[:, None], given)
    return FORWARD_AND_BACKWARD * counter.get_total_flops() / TIMES / 1e12


def stepper(
    config: BackboneConfig, captions: str, device: torch.device, compiled: bool, backend: str
) -> Callable[[Batch], None]:
    """The trainer's step on a backbone of its own."""
    backbone = network(config, captions, device)
    recipe = TrainRecipe("bench", batch=1)
    # Matrices that no loss reaches have no gradient here; the optimiser leaves them alone.
    state = TrainingState(backbone, MovingAverage(backbone, 0.999), make_optimizers(backbone, recipe))
    updates = Updates(state, 1.0, 10**9, Path("bench"), Processes(0, 1, device), 20.0, late=2)
    method, number = method_of(config), 0
    if compiled:
        for block in backbone.blocks:
            block.compile(backend=backend)

    def step(batch: Batch) -> None:
        nonlocal number
        number += 1
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = method.loss(backbone, batch, Draws(number, len(batch.clip_ids), device=device))["loss"]
        loss.backward()
        updates.apply(number, loss)
        list(updates.outcomes())

    return step


def run(bench: TrainingBench, backend: str, compiled: Sequence[bool]) -> None:
    """All rows: the goals' networks without captions, then with them in either way, eager and compiled."""
    for goal_id, what, wanted, config in bench.chosen.configs:
        for captions in CAPTIONS:
            for compile_ in compiled:
                name = named(what, captions)
                step = stepper(config, captions, bench.device, compile_, backend)
                limit = bench.about["peak_tflops"] / bench.about["tflop"][name]
                for count in bench.chosen.clips:
                    batch = clips(config, count, bench.device)
                    base = Row(
                        goal_id, name, "compiled" if compile_ else "eager", count * TIMES, None, "images/s",
                        limit=limit, goal=wanted or None if captions == "none" else None,
                    )  # fmt: skip
                    bench.measure(
                        base,
                        lambda batch=batch, step=step: [step(batch) for _ in range(2)],
                        lambda batch=batch, step=step: step(batch),
                        lambda seconds, count=count: count * TIMES / seconds,
                    )
                del step
                gpu.release(bench.on_gpu)


def kernels(bench: TrainingBench, most: int = 10) -> list[str]:
    """The kernels that take longest in three eager steps of the first network, with their shares of the time."""
    from torch.profiler import ProfilerActivity, profile

    config = bench.chosen.configs[0][3]
    step, batch = stepper(config, "none", bench.device, False, ""), clips(config, bench.chosen.clips[0], bench.device)
    step(batch)
    kind = ProfilerActivity.CUDA if bench.on_gpu else ProfilerActivity.CPU
    with profile(activities=[kind]) as profiled:
        for _ in range(3):
            step(batch)
        bench.wait()
    field = "self_device_time_total" if bench.on_gpu else "self_cpu_time_total"
    events = sorted(profiled.key_averages(), key=lambda event: -getattr(event, field))
    total = sum(getattr(event, field) for event in events) or 1
    return [f"{getattr(e, field) / total:6.1%}  {e.count:5} x  {e.key[:90]}" for e in events[:most]]


def data_wait(bench: TrainingBench, steps: int = 12) -> None:
    """H5: the share of a step's time that the trainer waits for its batch, four workers reading."""
    _, what, _, config = bench.chosen.configs[0]
    count = bench.chosen.clips[0]
    base = Row(
        "H5",
        f"waiting for data, {what}",
        "eager",
        count * TIMES,
        None,
        "of a step",
        goal=WAIT if bench.on_gpu else None,
    )
    try:
        from model.training.data import Clips, Collate, Loader, Steps
        from storage import version
        from tests.bench.startup import noise_lake
    except ImportError as error:
        bench.add(gpu.replace(base, note=f"not run: {error.name} is not installed"))
        return
    step = stepper(config, "seen", bench.device, False, "")
    with tempfile.TemporaryDirectory() as folder:
        lake = noise_lake(
            Path(folder) / "lake", 2 * count, ORDER, (config.channels, config.height, config.width_latent)
        )
        made, captions = version.load(lake), clips(config, count, bench.device)
        collate = Collate(version.read_empty_text(lake, made), VLFM.members)
        found = Clips(lake, made, "train", collate.arrays)
        order = Steps(len(found), count, 0, 0, steps)
        loader = Loader(found, order, collate, 4 if bench.on_gpu else 0, bench.device)
        waited, began = 0.0, 0.0
        for number in range(steps):
            if number == steps // 3:  # by then the workers are there
                bench.wait()
                waited, began = 0.0, time.perf_counter()
            before = time.perf_counter()
            batch = next(loader)
            waited += time.perf_counter() - before
            step(
                gpu.replace(batch, text=captions.text, text_length=captions.text_length, empty_text=captions.empty_text)
            )
        bench.wait()
        share = waited / (time.perf_counter() - began)
        loader.close()
    bench.add(gpu.replace(base, value=share))


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table; the status is 1 where a goal was met by none of its rows, 2 without a GPU."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.gpu_training", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--tiny", action="store_true", help="a tiny network on the CPU: whether the code runs")
    parser.add_argument("--clips", help="clips of a step, as 16,32 (default: 16,32,64)")
    parser.add_argument("--no-compile", action="store_true", help="eager rows alone")
    parser.add_argument("--repeats", type=int, default=5, help="steps of which the median counts (default: 5)")
    parser.add_argument("--minutes", type=float, default=7, help="start no row after this time (default: 7)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the rows here, after each one")
    parser.add_argument("--markdown", action="store_true", help="print the section for docs/benchmarks.md at the end")
    options = parser.parse_args(arguments)
    if not options.tiny and not torch.cuda.is_available():
        print("error: there is no GPU here; --tiny runs the same code on the CPU", file=sys.stderr)
        return 2
    plan = tiny_plan() if options.tiny else full_plan()
    if options.clips:
        plan = gpu.replace(plan, clips=tuple(int(count) for count in options.clips.split(",")))
    bench = TrainingBench(plan, "cpu" if options.tiny else "cuda", options.repeats, options.minutes, options.json)
    torch.manual_seed(0)
    # The CPU only shows that the code runs: the compiler's front end without its C++.
    run(bench, "aot_eager" if options.tiny else "inductor", (False,) if options.no_compile else (False, True))
    data_wait(bench)
    top = kernels(bench)
    print("\n".join(top))
    if options.json:
        options.json.write_text(json.dumps({**json.loads(dump(bench.about, bench.rows)), "kernels": top}, indent=1))
    if options.markdown:
        print("\n" + markdown(bench.about, bench.rows))
        print("\nKernels that take longest, eager:\n\n" + "\n".join("    " + text for text in top))
    goals = {(row.goal_id, row.what) for row in bench.rows if row.goal is not None}
    return 0 if goals == {(row.goal_id, row.what) for row in bench.rows if row.met} else 1


if __name__ == "__main__":
    sys.exit(main())
