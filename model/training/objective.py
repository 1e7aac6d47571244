"""What the trainer of backbones minimises: a method's loss of a batch, and of the validation split."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from model.methods.base import Batch, Method
from model.recipes import TrainRecipe
from model.stop import StopSignal
from model.training.data import Clips, Collate
from model.training.processes import Processes
from model.training.seeds import mixed_seed
from model.training.state import TrainingState


@dataclass(frozen=True)
class Objective:
    """A method's losses under a recipe's seed and precision, in one process of a run."""

    method: Method
    recipe: TrainRecipe
    processes: Processes

    def losses(self, network: nn.Module, step: int, batch: Batch) -> dict[str, Tensor]:
        """A step's losses by name; noise and times depend on seed, step and process alone."""
        return self._losses(network, batch, mixed_seed(self.recipe.seed, step, self.processes.rank))

    @torch.no_grad()
    def validate(
        self, state: TrainingState, clips: Clips, collate: Collate, stop: StopSignal, most: int = 256
    ) -> float | None:
        """Loss of the averaged weights on the first clips, at most `most`, with the same times and noise every time.

        None where a signal came meanwhile: the checkpoint is more urgent.
        """
        network = state.network
        weights = {name: value.detach().clone() for name, value in network.named_parameters()}
        state.average.copy_to(network)
        network.eval()
        chosen = range(min(len(clips), most))
        total = 0.0
        for start in range(0, len(chosen), self.recipe.batch):
            if stop.seen:
                break
            part = [clips[i] for i in chosen[start : start + self.recipe.batch]]
            batch = collate(part).to(self.processes.device)
            total += float(self._losses(network, batch, mixed_seed(self.recipe.seed, start, -1))["loss"]) * len(part)
        network.train()
        for name, value in network.named_parameters():
            value.copy_(weights[name])
        return None if stop.seen else total / len(chosen)

    def _losses(self, network: nn.Module, batch: Batch, seed: int) -> dict[str, Tensor]:
        device = self.processes.device
        generator = torch.Generator(device).manual_seed(seed)
        with torch.autocast(device.type, torch.bfloat16, enabled=self.recipe.precision == "bfloat16"):
            return self.method.loss(network, batch, generator)
