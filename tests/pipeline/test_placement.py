"""Placement on paper: clusters of 1 to 1,000 GPUs, and odd ones."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.items import Resources
from pipeline.placement import Node, WorkerPlan, plan_workers, workers_that_fit, working_nodes

ON_A_GPU, ON_CPUS = Resources(1, 1), Resources(1, 0)


def nodes(*offers: tuple[float, float]) -> list[Node]:
    return [Node(str(number), cpus, gpus) for number, (cpus, gpus) in enumerate(offers)]


@pytest.mark.parametrize(
    ("offers", "wanted", "tasks", "plan"),
    [
        ([(2, 0)], ON_CPUS, 10, WorkerPlan(2, 1.0, 0.0)),
        ([(8, 0)], ON_CPUS, 3, WorkerPlan(3, 1.0, 0.0)),
        ([(2, 0)], ON_A_GPU, 10, WorkerPlan(2, 1.0, 0.0)),  # no GPU: none is waited for
        ([(16, 1)], ON_A_GPU, 10, WorkerPlan(1, 1.0, 1.0)),
        ([(4, 8)], ON_A_GPU, 20, WorkerPlan(8, 0.0, 1.0)),  # no GPU idles for want of CPUs
        ([(4, 8)], ON_A_GPU, 3, WorkerPlan(3, 1.0, 1.0)),
        ([(64, 8)], Resources(12, 1), 99, WorkerPlan(8, 8.0, 1.0)),
        ([(16, 1)], Resources(1, 0.25), 99, WorkerPlan(4, 1.0, 0.25)),
        ([(1, 0)], Resources(4, 0), 5, WorkerPlan(1, 1.0, 0.0)),
        ([(2, 0), (2, 0)], Resources(4, 0), 5, WorkerPlan(2, 2.0, 0.0)),  # four cores, and no node with four
        ([(1.5, 0), (1.5, 0)], ON_CPUS, 5, WorkerPlan(2, 1.0, 0.0)),
        ([(0.5, 0)], ON_CPUS, 5, WorkerPlan(1, 0.5, 0.0)),
        ([(32, 0), (8, 2)], ON_A_GPU, 50, WorkerPlan(2, 1.0, 1.0)),  # CPU nodes beside GPU nodes
        ([], ON_CPUS, 5, WorkerPlan(1, 1.0, 0.0)),  # an autoscaler adds a node for it
        ([(8, 0)], ON_CPUS, 0, WorkerPlan(1, 1.0, 0.0)),
    ],
)
def test_odd_clusters(offers: list[tuple[float, float]], wanted: Resources, tasks: int, plan: WorkerPlan) -> None:
    assert plan_workers(nodes(*offers), wanted, tasks) == plan


@pytest.mark.parametrize("gpus", [1, 2, 3, 4, 7, 8, 16, 64, 100, 256, 512, 1000])
def test_every_gpu_works_however_the_nodes_are_cut(gpus: int) -> None:
    for per_node, cores in itertools.product((1, 4, 8), (2, 12, 96)):
        whole, rest = divmod(gpus, per_node)
        cluster = nodes(*[(cores, per_node)] * whole, *[(cores, rest)] * (rest > 0), (4, 0))
        for tasks in (1, gpus, 10_000):
            plan = plan_workers(cluster, Resources(4, 1), tasks)
            assert plan.gpus == 1
            assert plan.count == min(gpus, tasks)
            assert workers_that_fit(cluster, plan.cpus, 1) >= plan.count, "all of them run at once"
            fewer = min(tasks, workers_that_fit(cluster, plan.cpus + 1, 1)) < plan.count
            assert plan.cpus == 4 or fewer, "none gets fewer cores than there are for it"


def test_a_cluster_that_grows_is_asked_for_what_is_wanted() -> None:
    assert plan_workers([], ON_A_GPU, 500, at_least=64) == WorkerPlan(64, 1.0, 1.0)
    assert plan_workers(nodes((8, 0)), ON_A_GPU, 500, at_least=64) == WorkerPlan(64, 1.0, 1.0)
    assert plan_workers(nodes((32, 8)), ON_A_GPU, 500, at_least=64) == WorkerPlan(64, 1.0, 1.0)
    assert plan_workers(nodes((32, 8)), ON_A_GPU, 5, at_least=64) == WorkerPlan(5, 1.0, 1.0)
    assert plan_workers(nodes((8, 0)), ON_CPUS, 500, at_least=3) == WorkerPlan(8, 1.0, 0.0)


OFFERS = st.lists(st.tuples(st.integers(0, 128), st.integers(0, 16)), max_size=20)


@given(OFFERS, st.integers(1, 32), st.sampled_from([0, 0.25, 1, 2]), st.integers(1, 2000))
def test_what_is_promised_is_there(offers: list[tuple[int, int]], cpus: int, gpus: float, tasks: int) -> None:
    cluster = nodes(*offers)
    plan = plan_workers(cluster, Resources(cpus, gpus), tasks)
    assert 1 <= plan.count <= tasks
    assert 0 <= plan.cpus <= cpus
    if any(offer != (0, 0) for offer in offers) and (plan.gpus or any(each for each, _ in offers)):
        assert workers_that_fit(cluster, plan.cpus, plan.gpus) >= plan.count
    if any(each >= gpus > 0 for _, each in offers):
        assert plan.gpus == gpus


def test_nodes_that_are_gone_or_only_direct_are_left_out() -> None:
    def node(name: str, alive: bool, **offer: float) -> dict[str, object]:
        return {
            "NodeID": name, "Alive": alive, "Resources": offer,
            "NodeManagerHostname": name, "NodeManagerAddress": "10.0.0.1",
        }  # fmt: skip

    report = [node("head", True, memory=9.0), node("gone", False, CPU=8.0), node("here", True, CPU=8.0, GPU=1.0)]
    assert working_nodes(report) == [Node("here", 8.0, 1.0, "here (10.0.0.1)")]
