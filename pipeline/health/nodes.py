"""The nodes of a Ray cluster: each one shows that it can do an ingest's work, before any work is given to it.

A node without the shared folder, the weights, a decoder or the same code would lose every clip that it is given, and
say so clip by clip. Here it says so once, with its name.
"""

from __future__ import annotations

import errno
import os
import secrets
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from pipeline.cluster import RunnerError
from pipeline.health.finding import ERROR, OK, WARNING, Finding, run_checks
from pipeline.health.gpus import check_torch
from pipeline.health.places import CLOCK_SECONDS, check_disks, check_shared_memory
from pipeline.health.programs import check_ffmpeg, check_packages, check_python, check_weights, program_versions
from pipeline.placement import working_nodes
from pipeline.recipes import DataRecipe
from pipeline.sources.fetch import INSIDE, bucket_and_key
from pipeline.stage import one_line
from storage.address import is_bucket
from storage.store import Store

ANSWER_SECONDS = 120.0  # longest wait for a node's findings: its first Python process imports this code from its disk


@dataclass(frozen=True)
class NodeRequest:
    """What a node is to show."""

    recipe: DataRecipe
    """Whose weights it must have."""
    store: Store | None
    """The lake's store, in which it reads a probe of ours and leaves one of its own."""
    film: str | None = None
    """A film that it must be able to read."""
    film_bytes: int = 0
    """That film's size here."""
    thorough: bool = False
    """Whether packages, torch, GPUs, disks and shared memory are looked at too."""
    versions: dict[str, str | None] | None = None
    """Versions here, with which the node's are compared; filled in by examine_nodes."""
    probe: str = ""
    """Name of the probe; filled in by examine_nodes."""


@dataclass(frozen=True)
class _Answer:
    """What a node sends back."""

    findings: list[Finding]
    clock: float
    """Seconds since 1970 on the node, when it looked."""


def examine_nodes(request: NodeRequest) -> list[Finding]:
    """The findings of every node that can do work, each with its node's name; Ray has to be joined already.

    Nodes without CPUs and GPUs, as a head that only directs, are left out.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    listed: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    nodes = {node.node_id: node.name for node in working_nodes(listed)}
    if not nodes:
        return [Finding("ray", WARNING, "no node has CPUs or GPUs yet", "an autoscaler may add some when work comes")]
    request = replace(request, versions=program_versions(), probe=f"staging/preflight-{secrets.token_hex(8)}")
    store = request.store
    if store is not None:
        store.write(f"{request.probe}.probe", request.probe.encode())
    sent = time.time()
    try:
        remote = ray.remote(examine_node)
        calls = {}
        for node, name in nodes.items():
            here = NodeAffinitySchedulingStrategy(node, soft=False)
            options = {"num_cpus": 0, "max_retries": 0, "scheduling_strategy": here}
            calls[remote.options(**options).remote(request, node)] = (node, name)
        ready, late = ray.wait(list(calls), num_returns=len(calls), timeout=ANSWER_SECONDS)
        found = []
        for call in ready:
            found += _judge(ray, call, *calls[call], request, sent)
        for call in late:
            ray.cancel(call, force=True)
            remedy = "see that the node is up (`ray status`), or take it out of the cluster"
            found.append(Finding("node", ERROR, f"no answer within {ANSWER_SECONDS:g} s", remedy, calls[call][1]))
    finally:
        if store is not None:
            for key in store.list_keys(request.probe):
                store.delete(key)
    return sorted(found, key=lambda finding: finding.node)


def check_nodes(request: NodeRequest) -> None:
    """Makes sure that every node can do the work.

    Raises:
        RunnerError: a node cannot; the line names each such node, what it lacks, and the remedy.
    """
    wrong = [finding for finding in examine_nodes(request) if finding.status == ERROR]
    if wrong:
        raise RunnerError(f"nothing was started: {'; '.join(finding.line() for finding in wrong)}")


def examine_node(request: NodeRequest, node: str) -> _Answer:
    """Looks at the machine it runs on: the work of examine_nodes on the node with this id."""
    clock = time.time()
    checks: dict[str, Any] = {
        "versions": lambda: _compare(request.versions or {}),
        "lake": lambda: _probe(request, node),
        "film": lambda: _read_film(request),
        "ffmpeg": check_ffmpeg,
        "weights": lambda: check_weights(request.recipe),
    }
    if request.thorough:
        checks |= {"python": check_python, "packages": check_packages, "torch": check_torch}
        checks |= {"disk": lambda: check_disks([tempfile.gettempdir()]), "memory": check_shared_memory}
    return _Answer(run_checks(checks), clock)


def _judge(ray: Any, call: Any, node: str, name: str, request: NodeRequest, sent: float) -> list[Finding]:
    """The findings of one node that has answered, or has failed to."""
    try:
        answer: _Answer = ray.get(call)
    except Exception as error:  # whatever keeps the node from running this function
        words = one_line(error)
        if "No module named" in words or "ModuleNotFoundError" in words:
            remedy = "install this project there, or send its code along (--send-code)"
            return [Finding("code", ERROR, f"this project's code is not there ({words})", remedy, name)]
        return [Finding("node", ERROR, words, "see Ray's logs on that node", name)]
    findings = [replace(finding, node=name) for finding in answer.findings]
    store, wrote = request.store, not any(each.check == "lake" and each.status == ERROR for each in findings)
    if store is not None and wrote and store.size(f"{request.probe}-{node}.probe") is None:
        told = f"what it writes into {store.address()} does not arrive here"
        findings.append(Finding("lake", ERROR, told, "mount the same shared folder on all nodes", name))
    apart = max(sent - answer.clock, answer.clock - time.time(), 0.0)
    if apart > CLOCK_SECONDS:
        told = f"its clock and this machine's are {apart:.0f} s apart"
        findings.append(Finding("clock", WARNING, told, "set both (NTP)", name))
    return findings


def _compare(ours: dict[str, str | None]) -> list[Finding]:
    """The node's versions against those of the machine that asks."""
    theirs = program_versions()
    if theirs["code"] != ours["code"]:
        remedy = "install the same commit on all nodes, or send the code along (--send-code)"
        return [Finding("code", ERROR, "it has another version of this project's code", remedy)]
    other = [f"{name} {theirs[name]}, here {ours[name]}" for name in ours if theirs[name] != ours[name]]
    if other:
        told = f"other versions than on the machine that asks: {'; '.join(other)}"
        return [Finding("versions", WARNING, told, "install with the same constraints.txt on all nodes")]
    return [Finding("versions", OK, "the same code and versions as here")]


def _probe(request: NodeRequest, node: str) -> list[Finding]:
    """Reads our probe in the lake, and leaves one."""
    if request.store is None:
        return []
    store, text = request.store, request.probe.encode()
    remedy = "mount the same shared folder there under the same path, writable for Ray's user, or use a bucket"
    try:
        seen = store.read(f"{request.probe}.probe")
        if seen != text:
            raise OSError(f"{store.address()} holds other bytes than were written")
        store.write(f"{request.probe}-{node}.probe", text)
    except FileNotFoundError:
        return [Finding("lake", ERROR, f"it does not see the lake {store.address()}", remedy)]
    except OSError as error:
        return [Finding("lake", ERROR, f"it cannot use the lake {store.address()} ({error})", remedy)]
    return [Finding("lake", OK, f"reads and writes {store.address()}")]


def film_bytes(film: str) -> int:
    """Bytes of a film, or of the tar it is in, in a folder or a bucket, of which the first is read.

    Raises:
        OSError: it is not there, or cannot be read.
        BucketError: its bucket cannot be used.
    """
    container = film.partition(INSIDE)[0]
    if is_bucket(container):
        store, key = bucket_and_key(container)
        size = store.size(key)
        if size is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), film)
        return size
    with open(container, "rb") as file:
        file.read(1)
        return os.fstat(file.fileno()).st_size


def _read_film(request: NodeRequest) -> list[Finding]:
    if request.film is None:
        return []
    remedy = "mount the films there under the same path, readable for Ray's user"
    try:
        size = film_bytes(request.film)
    except OSError as error:
        return [Finding("film", ERROR, f"it cannot read {request.film} ({error.strerror or error})", remedy)]
    if size != request.film_bytes:
        told = f"{request.film} has {size} bytes there and {request.film_bytes} here"
        return [Finding("film", ERROR, told, remedy)]
    return [Finding("film", OK, f"reads {request.film}")]


def _name(node: dict[str, Any]) -> str:
    """A node as people know it: its host's name and address."""
    return f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})"


def node_names(nodes: Sequence[dict[str, Any]]) -> list[str]:
    """The nodes of Ray's list that are alive, in words with what they offer."""
    told = []
    for node in nodes:
        if node["Alive"]:
            resources = node["Resources"]
            told.append(f"{_name(node)} with {resources.get('CPU', 0):g} CPUs and {resources.get('GPU', 0):g} GPUs")
    return told
