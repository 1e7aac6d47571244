"""What an ingest is going to cost, from what earlier ones of the same recipe took.

Every version keeps what its run measured (`measured` in its file): clips made, seconds by stage, GPU seconds, bytes. No
rate is guessed: of a recipe that has made no clip in this lake, the answer is that it is not known yet.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.ingest.state import IngestPlan
from pipeline.items import BlockResult, Row
from storage.layout import Lake
from storage.version import Version, readable_versions

GPU = "gpu"
"""Beside the stages of a block's clock: seconds for which it held a GPU."""
STAGES = ("decode", "invert", "project")
RECENT = 5
"""So many runs of a recipe count, the newest: machines change."""
NOT_MEASURED = "cost: not measured yet for this recipe; ingest a part (--limit 1), then --plan can tell"


@dataclass(frozen=True)
class Cost:
    """An estimate."""

    clips: int
    """Clips to be made; those that are staged already, copied from what is stored, or only projected, cost next to
    nothing."""
    gpu_hours: float
    """0 where the runs that were measured had no GPU."""
    hours: float
    """By `workers`."""
    workers: int
    bytes: int
    """Of shards and arrays together."""
    seconds_per_clip: Mapping[str, float]
    """By stage."""
    measured_on: int
    """Clips that the rates are means of."""
    versions: tuple[int, ...]
    """Versions whose runs they are from."""

    def line(self) -> str:
        """For people."""
        rates = ", ".join(f"{stage} {seconds:.3g} s" for stage, seconds in self.seconds_per_clip.items())
        device = f"{self.gpu_hours:.3g} GPU hours" if self.gpu_hours else "no GPU"
        time = f"{self.hours:.2g} h" if self.hours >= 1 else f"{60 * self.hours:.2g} min"
        return (
            f"cost of {self.clips} clips: {device}, {self.bytes / 1e6:.3g} MB, about {time} by {self.workers} workers "
            f"(a clip: {rates}; measured on {self.measured_on} clips of version {', '.join(map(str, self.versions))})"
        )

    def to_json(self) -> dict[str, Any]:
        """As JSON."""
        return dataclasses.asdict(self)


def measured(results: Sequence[BlockResult], commit_seconds: float) -> Row:
    """What a version's file says that its run took; blocks that were only copied or imported are left out."""
    made = [result for result in results if not {"copy", "import"} & result.seconds.keys() and result.made]
    seconds: dict[str, float] = {}
    for result in made:
        for stage, taken in result.seconds.items():
            seconds[stage] = seconds.get(stage, 0.0) + taken
    return {"clips": sum(len(result.made) for result in made), "seconds": seconds, "commit": commit_seconds}


def estimate(plan: IngestPlan, workers: int | None = None) -> Cost | None:
    """What the plan's new clips will cost; None where this recipe was never measured in this lake.

    workers: how many work at a time; None takes this machine's cores, or one where a GPU was used.
    """
    runs = _runs(plan.lake, plan.recipe_fingerprint)
    count = sum(run["clips"] for _, run in runs)
    if not count:
        return None
    per_clip = {
        stage: sum(run["seconds"].get(stage, 0.0) for _, run in runs) / count
        for stage in (*STAGES, GPU)
        if any(stage in run["seconds"] for _, run in runs)
    }
    fresh = [
        clip
        for block in plan.blocks
        if block.block_id not in plan.staged
        for clip in block.clips
        if clip.stored is None and not clip.latents
    ]
    gpu_seconds = per_clip.pop(GPU, 0.0)
    used = workers or (1 if gpu_seconds else len(os.sched_getaffinity(0)))
    newest = runs[0][0]
    commit = sum(run["commit"] for _, run in runs) / count * len(plan.clips)
    of_clip = sum(info.bytes for info in newest.shards) / max(1, newest.manifest["clips"]["rows"])
    seconds = (gpu_seconds or sum(per_clip.values())) * len(fresh) / used + commit
    return Cost(
        clips=len(fresh),
        gpu_hours=gpu_seconds * len(fresh) / 3600,
        hours=seconds / 3600,
        workers=used,
        bytes=round(2 * of_clip * len(plan.clips)),
        seconds_per_clip=per_clip,
        measured_on=count,
        versions=tuple(sorted(version.number for version, _ in runs)),
    )


def _runs(lake: Lake, recipe_fingerprint: str) -> list[tuple[Version, Row]]:
    """The newest measured runs of a recipe, the newest first."""
    found = []
    for version in readable_versions(lake)[0]:
        run = version.extra.get("measured")
        if version.recipe_fingerprint == recipe_fingerprint and run and run["clips"]:
            found.append((version, run))
    return found[:RECENT]
