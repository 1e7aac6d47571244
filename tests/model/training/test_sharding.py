"""Gradients of the parts of a batch: only the last part's backward pass exchanges them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from model.training.sharding import is_sharded, part, sharded_like, whole, without_exchange


@pytest.fixture
def group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_ddp_exchanges_the_sum_of_all_parts_once(group: None) -> None:
    exchanged = []

    def seen(state, bucket):  # DDP compares annotations with classes, and here they are strings
        exchanged.append(bucket.buffer().clone())
        future: torch.futures.Future[torch.Tensor] = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    network = DistributedDataParallel(nn.Linear(2, 1, bias=False))
    network.register_comm_hook(None, seen)
    with without_exchange(network):
        network(torch.ones(1, 2)).sum().backward()
    assert exchanged == []
    network(torch.ones(1, 2)).sum().backward()
    assert [values.tolist() for values in exchanged] == [[2.0, 2.0]]


def test_fsdp_exchanges_the_sum_of_all_parts_once(group: None) -> None:
    network = nn.Linear(2, 1, bias=False)
    assert not is_sharded(network)
    fully_shard(network, mesh=init_device_mesh("cpu", (1,)))
    assert is_sharded(network)
    with without_exchange(network):
        network(torch.ones(1, 2)).sum().backward()
    assert network.weight.grad is None
    network(torch.ones(1, 2)).sum().backward()
    assert network.weight.grad is not None
    assert whole(network.weight.grad).tolist() == [[2.0, 2.0]]


def test_a_whole_tensor_is_spread_and_gathered_again(group: None) -> None:
    network = nn.Linear(3, 2)
    fully_shard(network, mesh=init_device_mesh("cpu", (1,)))
    value = torch.arange(6.0).view(2, 3)
    spread = sharded_like(value, network.weight)
    assert is_sharded(spread)
    assert torch.equal(whole(spread), value)
    part(spread).mul_(2)
    assert torch.equal(whole(spread), value * 2), "the slice is the tensor's own memory"
    assert sharded_like(torch.ones(()), network.weight).shape == (), "a count of steps stays as it is"
