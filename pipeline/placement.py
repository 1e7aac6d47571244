"""How many workers run where, and with what: a pure function of what a worker wants and of what the nodes offer.

Whole nodes are looked at, never their sum: two nodes of two cores hold no worker of four.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.items import Resources


@dataclass(frozen=True)
class Node:
    """A node of a Ray cluster that can do work."""

    node_id: str
    cpus: float
    gpus: float
    name: str = ""
    """Its host's name and address, as people know it."""


@dataclass(frozen=True)
class WorkerPlan:
    """How many workers, and what each is promised."""

    count: int
    cpus: float
    gpus: float


def working_nodes(report: Iterable[Mapping[str, Any]]) -> list[Node]:
    """The nodes of Ray's report (`ray.nodes()`) that live and offer CPUs or GPUs; a head may offer neither."""
    found = []
    for node in report:
        offer = node["Resources"]
        cpus, gpus = float(offer.get("CPU", 0)), float(offer.get("GPU", 0))
        if node["Alive"] and (cpus or gpus):
            name = f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})"
            found.append(Node(node["NodeID"], cpus, gpus, name))
    return found


def plan_workers(nodes: Sequence[Node], wanted: Resources, tasks: int, at_least: int = 0) -> WorkerPlan:
    """Workers for `tasks` tasks.

    A GPU is asked for only where there is one, so nothing ever waits for a GPU that will not come; and a GPU never
    idles for want of CPUs: workers get fewer of them, at the worst none promised. `at_least` so many are asked for even
    where there is no room yet, for a cluster that adds nodes when work waits; then GPUs are asked for as wanted.

    >>> plan_workers([Node("a", cpus=2, gpus=0)], Resources(cpus=1, gpus=1), tasks=10)
    WorkerPlan(count=2, cpus=1.0, gpus=0.0)
    """
    tasks, at_least = max(1, tasks), max(0, at_least)
    most_gpus, most_cpus = (max((getattr(node, kind) for node in nodes), default=0.0) for kind in ("gpus", "cpus"))
    cpus = float(wanted.cpus)
    gpus = float(wanted.gpus) if wanted.gpus > 0 and (at_least or most_gpus >= wanted.gpus) else 0.0
    if gpus and most_gpus >= gpus:
        most = min(tasks, workers_that_fit(nodes, 0.0, gpus))
        while cpus > 0 and min(tasks, workers_that_fit(nodes, cpus, gpus)) < most:
            cpus = max(0.0, math.ceil(cpus) - 1.0)
    elif not gpus and 0 < most_cpus < cpus:
        cpus = most_cpus
    count = max(1, workers_that_fit(nodes, cpus, gpus), at_least)
    return WorkerPlan(min(tasks, count), cpus, gpus)


def workers_that_fit(nodes: Iterable[Node], cpus: float, gpus: float) -> int:
    """How many workers of this size the nodes hold together."""
    total = 0
    for node in nodes:
        room = [offer / want for offer, want in ((node.cpus, cpus), (node.gpus, gpus)) if want > 0]
        total += math.floor(min(room) + 1e-9) if room else 0
    return total
