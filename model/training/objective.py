"""What the trainer of backbones minimises: a method's loss of a batch, and of the validation split."""

from __future__ import annotations

import math
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
                found = self._losses(network, batch.every(parts, part) if parts > 1 else batch, draws)
                found = {name: value / parts for name, value in found.items()} if parts > 1 else found
                if not last:
                    found["loss"].backward()
                    found = {name: value.detach() for name, value in found.items()}
            sums = {name: sums[name] + value if sums else value for name, value in found.items()}
        return sums

    @torch.no_grad()
    def validate(self, state: TrainingState, clips: Clips, collate: Collate, stop: StopSignal) -> float | None:
        """Loss of the averaged weights on the first clips, with the same times and noise every time.

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
        # The last number says that a process was stopped.
        sums = torch.zeros(len(starts) + 1, dtype=torch.float64, device=processes.device)
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
            loss = self._losses(network, batch, draws)["loss"]
            if place == number:
                sums[number] = loss * len(part)
        network.train()
        for name, value in network.named_parameters():
            value.copy_(weights[name])
        sums[-1] = float(stop.seen)
        *found, stopped = processes.total(sums).tolist()
        return None if stopped else sum(found) / count

    def _losses(self, network: nn.Module, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        with torch.autocast(self.processes.device.type, torch.bfloat16, enabled=self.recipe.precision == "bfloat16"):
            return self.method.loss(network, batch, draws)
