"""The processes of a training run: this one's place among them, and what they must agree on."""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from model.stop import end_with_parent

LAUNCHER = "VLFM_LAUNCHER"
"""Environment variable with the process id of the launcher (model.training.launch) that started a process."""

Result = TypeVar("Result")


class FirstFailed(Exception):
    """The first process failed at what it does for all of them, and says why itself."""


@dataclass(frozen=True)
class Processes:
    """This process among those of the run."""

    rank: int
    """Number of this process."""
    world: int
    """How many there are."""
    device: torch.device
    """Where this process computes."""

    @property
    def first(self) -> bool:
        """Whether this process writes what the run leaves behind."""
        return self.rank == 0

    def any(self, *flags: Tensor | bool) -> list[bool]:
        """For each flag (a scalar), whether it is set in any process: the same answer in all of them.

        All flags travel together, and the host waits for the device once.
        """
        return [value > 0 for value in self.highest(*flags).tolist()]

    def highest(self, *flags: Tensor | bool) -> Tensor:
        """For each flag (a scalar) 1 where it is set in any process, else 0: float32 on the device, not waited for."""
        here = [
            flag.float() if isinstance(flag, Tensor) else torch.full((), float(flag), device=self.device)
            for flag in flags
        ]
        joined = torch.stack(here)
        if self.world > 1:
            dist.all_reduce(joined, dist.ReduceOp.MAX)
        return joined

    def by_first(self, do: Callable[[], Result]) -> Result:
        """What `do` returns in the first process, given to all of them; `do` runs in the first alone.

        Raises:
            FirstFailed: `do` failed; in the first process its own error is raised.
        """
        outcome: list[Any] = [None, False]
        try:
            if self.first:
                outcome = [do(), True]
        finally:
            if self.world > 1:
                dist.broadcast_object_list(outcome)
        if not outcome[1]:
            raise FirstFailed("the first process failed")
        result: Result = outcome[0]
        return result

    def barrier(self) -> None:
        """Wait for the other processes."""
        if self.world > 1:
            dist.barrier()

    def total(self, values: Tensor) -> Tensor:
        """The sum of a tensor over the processes, a new tensor; no gradient passes, and the host does not wait."""
        total = values.detach().clone()
        if self.world > 1:
            dist.all_reduce(total)
        return total

    def mean(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The mean of named scalars over the processes."""
        if self.world == 1 or not values:
            return dict(values)
        joined = torch.stack([value.double() for value in values.values()])
        return dict(zip(values, self.total(joined) / self.world, strict=True))


ALONE = Processes(0, 1, torch.device("cpu"))
"""The only process of a training on the CPU."""


def given_rank() -> int:
    """This process's number in the environment of torchrun or model.training.launch; 0 where there is none."""
    return int(os.environ.get("RANK", "0"))


def join_processes() -> Processes:
    """This process's place, from the environment of torchrun or model.training.launch; alone where there is none."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    rank, local = given_rank(), int(os.environ.get("LOCAL_RANK", "0"))
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", local) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    if world > 1:
        launcher = os.environ.get(LAUNCHER)
        end_with_parent(int(launcher) if launcher else None)
        dist.init_process_group("nccl" if gpu else "gloo")
    return Processes(rank, world, device)


def end_program(status: int) -> NoReturn:
    """End this process with an exit status; one of several ends without taking the interpreter down.

    A thread of gloo may still hold the tensor of the last exchange. Freed while Python is taken down, that tensor
    aborts the process (SIGABRT, "terminate called without an active exception"; pytorch/pytorch#179291), also where
    the process group was destroyed: an exception on its way out holds the network that holds the group.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        sys.exit(status)
    atexit._run_exitfuncs()  # as at a usual end: what multiprocessing and logging still have to close
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
