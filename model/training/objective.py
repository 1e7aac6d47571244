"""What the trainer of backbones minimises: a method's loss of a batch, and of the validation split."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from model.methods.base import Batch, Method
from model.methods.draws import Draws
from model.recipes import TrainRecipe
from model.stop import StopSignal
from model.training.data import Clips, Collate
from model.training.processes import Processes
from model.training.seeds import mixed_seed
from model.training.sharding import is_sharded, without_exchange
from model.training.state import TrainingState

RANGES = {
    "warmup_1": (-1.0, -0.5),
    "warmup_2": (-0.5, 0.0),
    "clip_1": (0.0, 0.25),
    "clip_2": (0.25, 0.5),
    "clip_3": (0.5, 0.75),
    "clip_4": (0.75, 1.0),
}
"""Parts of the flow whose errors a validation tells, by name: the two halves of the way from noise to the first frame
and the quarters of the clip, as a method's `place` has them; the beginning of each is excluded, -1 is not."""
VALIDATED, VALIDATED_AT_ONCE = 256, 16
"""Clips of a validation, at most, and how many of them make one batch: so few that several processes share them out."""


@dataclass(frozen=True)
class Objective:
    """A method's losses under a recipe's seed and precision, in one process of a run."""

    method: Method
    recipe: TrainRecipe
    processes: Processes

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of weights and batches."""
        return torch.float64 if self.recipe.precision == "float64" else torch.float32

    def losses(self, network: nn.Module, step: int, batch: Batch) -> dict[str, Tensor]:
        """A step's losses by name, each the mean over this process's clips.

        What is drawn for a clip depends on seed, step and the clip's position in the batch of all processes alone.

        With `accumulate` the batch is taken in parts: the gradients of all but the last are there on return, those of
        the last come from `loss`, as those of the whole batch else.
        """
        at, parts = self.processes, self.recipe.accumulate
        seed, sums = mixed_seed(self.recipe.seed, step), dict[str, Tensor]()
        for part in range(parts):
            place, places = at.rank + part * at.world, at.world * parts
            draws = Draws(seed, self.recipe.batch, place, places, at.device, self.dtype, at.total)
            last = part == parts - 1
            with nullcontext() if last else without_exchange(network):
                told = self._losses(network, batch.every(parts, part) if parts > 1 else batch, draws)
                found = {name: value / parts for name, value in told.items() if value.ndim == 0}
                if not last:
                    found["loss"].backward()
                    found = {name: value.detach() for name, value in found.items()}
            sums = {name: sums[name] + value if sums else value for name, value in found.items()}
        return sums

    @torch.no_grad()
    def validate(
        self, state: TrainingState, clips: Clips, collate: Collate, stop: StopSignal
    ) -> dict[str, float] | None:
        """Loss of the averaged weights on the first clips, with the same times and noise every time.

        `validation_loss`, and the mean `validation_error/...` of the states in each of RANGES that has any.

        Each process takes some of the batches and the sum is of all, in one order: the same figure in every process and
        for any number of them. None where a signal came to any of them: the checkpoint is more urgent. They wait for
        each other once, at the end, where one that is stopped goes at once.
        """
        network, processes = state.network, self.processes
        weights = {name: value.detach().clone() for name, value in network.named_parameters()}
        state.average.copy_to(network)
        network.eval()
        count = min(len(clips), VALIDATED)
        starts = range(0, count, VALIDATED_AT_ONCE)
        # Of each batch the loss, and of each range the sum of errors and the states. The last says whether to stop.
        sums = torch.zeros((len(starts) + 1, 1 + 2 * len(RANGES)), dtype=torch.float64, device=processes.device)
        sharded = is_sharded(network)  # then all must ask the network equally often, and stop together
        until = math.ceil(len(starts) / processes.world) * processes.world if sharded else len(starts)
        for place in range(processes.rank, until, processes.world):
            if processes.any(stop.seen)[0] if sharded else stop.seen:
                break
            number = min(place, len(starts) - 1)
            part = [clips[i] for i in range(starts[number], min(starts[number] + VALIDATED_AT_ONCE, count))]
            batch = collate(part).to(processes.device, self.dtype)
            draws = Draws(
                mixed_seed(self.recipe.seed, -1, number), len(part), device=processes.device, dtype=self.dtype
            )
            losses = self._losses(network, batch, draws)
            if place == number:
                sums[number] = torch.stack([losses["loss"].double() * len(part), *by_range(losses)])
        network.train()
        for name, value in network.named_parameters():
            value.copy_(weights[name])
        sums[-1] = float(stop.seen)
        *found, stopped = processes.total(sums).tolist()
        if stopped[0]:
            return None
        loss, *ranges = (sum(column) for column in zip(*found, strict=True))
        pairs = zip(RANGES, ranges[::2], ranges[1::2], strict=True)
        errors = {f"validation_error/{name}": error / states for name, error, states in pairs if states}
        return {"validation_loss": loss / count, **errors}

    def _losses(self, network: nn.Module, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        with torch.autocast(self.processes.device.type, torch.bfloat16, enabled=self.recipe.precision == "bfloat16"):
            return self.method.loss(network, batch, draws)


def by_range(losses: Mapping[str, Tensor]) -> list[Tensor]:
    """For each of RANGES the sum of a method's `errors` whose `place` is in it, and their number: float64 scalars.

    All are 0 where the method tells none.
    """
    if "errors" not in losses:
        return [losses["loss"].new_zeros((), dtype=torch.float64)] * (2 * len(RANGES))
    errors, place = losses["errors"].double(), losses["place"]
    found = []
    for first, last in RANGES.values():
        inside = (place > first) & (place <= last) if first > -1 else place <= last
        found += [(errors * inside).sum(), inside.double().sum()]
    return found
