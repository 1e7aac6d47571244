"""Training with weights, average and optimisers spread over the processes (FSDP2), or held whole by each (DDP).

A sharded tensor is a DTensor: each process holds a slice of its first dimension. Checkpoints hold whole tensors, so a
run may go on with another sharding and another number of processes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from model.backbones.dit import Backbone
from model.training.processes import Processes


def shard(backbone: Backbone, processes: Processes, precision: str) -> None:
    """Spread the weights of a backbone over the processes, in place; one process keeps them as they are.

    Averages and optimisers that are made from it afterwards are spread too. With `bfloat16` the blocks' weights travel
    as bfloat16, which autocast would make of them anyway; gradients are summed in float32.
    """
    if processes.world == 1:
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(processes.device.type, (processes.world,))
    narrow = torch.bfloat16 if precision == "bfloat16" else None
    # Inputs stay as they are: seconds of a film would lose their digits, and the sum over the blocks too.
    policy = MixedPrecisionPolicy(narrow, torch.float32 if narrow else None, cast_forward_inputs=False)
    for block in backbone.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    # By default the outermost stays whole after a forward pass: without a backward pass, as in a validation, its
    # parameters would not be those of the average and the optimisers.
    fully_shard(backbone, mesh=mesh, reshard_after_forward=True)


def replicate(backbone: Backbone, processes: Processes) -> nn.Module:
    """The backbone as several processes train it that each hold all of it; itself where there is one process."""
    return DistributedDataParallel(backbone) if processes.world > 1 else backbone


@contextmanager
def without_exchange(network: nn.Module) -> Iterator[None]:
    """Backward passes inside leave each process its own gradients, which the next one outside exchanges with its own.

    Forward passes must be inside too.
    """
    trained: Any = network
    if isinstance(network, DistributedDataParallel):
        with network.no_sync():
            yield
    elif is_sharded(network):
        trained.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            trained.set_requires_gradient_sync(True)
    else:
        yield


def is_sharded(value: Tensor | nn.Module) -> bool:
    """Whether a tensor, or any parameter of a network, is spread over processes."""
    if isinstance(value, nn.Module):
        return any(is_sharded(parameter) for parameter in value.parameters())
    return hasattr(value, "full_tensor")  # a DTensor; importing its class takes most of a second


def whole(value: Any) -> Tensor:
    """All of a tensor; of a sharded one every process must ask, and each gets it."""
    full: Tensor = value.full_tensor() if is_sharded(value) else value
    return full


def part(value: Any) -> Tensor:
    """The slice of a tensor that this process holds, in the same memory; all of it where it is not sharded."""
    local: Tensor = value.to_local() if is_sharded(value) else value
    return local


def sharded_like(value: Tensor, example: Any) -> Tensor:
    """A whole tensor, which every process has, spread as `example` is; nothing travels."""
    if not is_sharded(example) or is_sharded(value) or value.shape != example.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    spread: Tensor = distribute_tensor(
        value.to(example.device), example.device_mesh, example.placements, src_data_rank=None
    )
    return spread
