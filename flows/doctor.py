"""`vlfm doctor`: what is wrong with this machine, or with a cluster, and how it is put right.

Everything is tried, not believed: ffmpeg decodes a film of its own, each GPU multiplies, the lake's store creates a key
once, Ray runs a task, Prefect's server answers. The last line says what is wrong first.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import time
import urllib.request
from collections.abc import Callable, Sequence
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

from flows.progress import stdout_kept_clean
from model.program import parse_settings
from model.settings import override
from pipeline.cluster import RaySession, RunnerError
from pipeline.health import ERROR, OK, SKIPPED, WARNING, Finding, check_machine, run_checks
from pipeline.health.nodes import NodeRequest, examine_nodes, node_names
from pipeline.health.places import CLOCK_SECONDS, check_disks
from pipeline.health.programs import installed
from pipeline.recipes import DataRecipe, recipe_named
from storage.layout import Lake

ANSWER_SECONDS = 10.0  # longest wait for Prefect's server


def arguments(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], int]:
    """Add the doctor's options to a parser; returns what runs it."""
    parser.add_argument("--lake", metavar="DIR", help="a lake to try, or where one is going to be")
    parser.add_argument("--film", metavar="FILE", help="with --ray-address: a film that every node must read")
    parser.add_argument("--recipe", default="demo", metavar="NAME", help="whose weights must be here (default: demo)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="settings", help="as for ingest"
    )
    parser.add_argument("--ray-address", metavar="A", help="look at every node of this Ray cluster too")
    parser.add_argument("--quick", action="store_true", help="do not start Ray, which takes some seconds")
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    parser.epilog = "Exit status: 0 nothing is wrong (warnings may be there), 1 something will fail."
    return run_doctor


def run_doctor(options: argparse.Namespace) -> int:
    """Look at everything and print the findings; exit status 1 where something will fail."""
    recipe = override(recipe_named(options.recipe), parse_settings(options.settings))
    with stdout_kept_clean():
        findings = check_machine(recipe, options.lake)
        findings += run_checks({"ray": lambda: check_ray(recipe, options), "prefect": check_prefect})
    wrong = sum(finding.status == ERROR for finding in findings)
    warned = sum(finding.status == WARNING for finding in findings)
    if options.json:
        print(json.dumps({"ok": not wrong, "findings": [finding.to_json() for finding in findings]}))
    else:
        print("\n".join(lines(findings)))
        print(f"{wrong} errors, {warned} warnings" if wrong or warned else "all is well")
    return 1 if wrong else 0


def lines(findings: Sequence[Finding]) -> list[str]:
    """The findings for people, a remedy on a line of its own."""
    told = []
    for finding in findings:
        where = f"{finding.node}: " if finding.node else ""
        told.append(f"{finding.status:<8} {finding.check:<9} {where}{finding.message}")
        if finding.remedy:
            told.append(f"{'':<19}-> {finding.remedy}")
    return told


def check_ray(recipe: DataRecipe, options: argparse.Namespace) -> list[Finding]:
    """Starts Ray here, or joins the cluster and looks at its nodes."""
    version = installed("ray")
    if version is None:
        status = ERROR if options.ray_address else SKIPPED
        return [Finding("ray", status, "Ray is not installed (`vlfm ingest` needs it)", "pip install '.[pipeline]'")]
    if options.quick and not options.ray_address:
        return [Finding("ray", SKIPPED, f"Ray {version} was not started (--quick)")]
    session = RaySession(options.ray_address)
    begun = time.perf_counter()
    try:
        session.open()
    except RunnerError as error:
        return [Finding("ray", ERROR, str(error))]
    try:
        import ray

        nodes = node_names(ray.nodes())  # type: ignore[no-untyped-call]
        if not options.ray_address:
            if ray.get(ray.remote(num_cpus=0)(_seven).remote(), timeout=120) != 7:
                return [Finding("ray", ERROR, f"Ray {version} starts here, and its tasks answer wrongly")]
            took = time.perf_counter() - begun
            return [Finding("ray", OK, f"Ray {version} starts here and runs a task ({took:.1f} s)")]
        film = options.film
        size = Path(film).stat().st_size if film else 0
        store = Lake.open(options.lake).store if options.lake else None
        told = f"Ray {version} at {options.ray_address}: {len(nodes)} nodes: {'; '.join(nodes)}"
        absolute = os.path.abspath(film) if film else None
        return [Finding("ray", OK, told), *examine_nodes(NodeRequest(recipe, store, absolute, size, thorough=True))]
    finally:
        session.close()


def _seven() -> int:
    return 7


def check_prefect() -> list[Finding]:
    """Prefect's server, where one is set, with its work pool's workers, version and clock; the home's disk."""
    version = installed("prefect")
    if version is None:
        needs = "Prefect is not installed (`vlfm ingest` and the deployments need it)"
        return [Finding("prefect", SKIPPED, needs, "pip install '.[flows]'")]
    if importlib.util.find_spec("prefect") is None:
        return [Finding("prefect", ERROR, f"Prefect {version} is listed and not there", "install it again")]
    from prefect.settings import get_current_settings

    settings = get_current_settings()
    found = check_disks([settings.home])
    found = [finding for finding in found if finding.status == ERROR]
    address = os.environ.get("PREFECT_API_URL") or settings.api.url  # what was set when Prefect was imported
    if not address:
        told = f"Prefect {version}; no PREFECT_API_URL is set, so each command starts a server of its own"
        return [*found, Finding("prefect", OK, told)]
    return [*found, *_check_server(address, version)]


def _ask(address: str, query: dict[str, Any] | None = None) -> tuple[Any, str]:
    """What Prefect's server answers, and the date that it gives; a query is posted."""
    body = None if query is None else json.dumps(query).encode()
    request = urllib.request.Request(address, body, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=ANSWER_SECONDS) as answer:
        return json.load(answer), answer.headers.get("date", "")


def _check_server(address: str, version: str) -> list[Finding]:
    begun = time.time()
    try:
        _, date = _ask(f"{address}/health")
        theirs, _ = _ask(f"{address}/admin/version")
    except (OSError, ValueError) as error:  # urllib's own are OSErrors
        words = " ".join(str(error).split()) or type(error).__name__
        remedy = "start it (`prefect server start`), correct PREFECT_API_URL, or unset it"
        return [Finding("prefect", ERROR, f"no Prefect server answers at {address} ({words})", remedy)]
    found = []
    if theirs != version:
        remedy = "install the same version on both; client and server of different versions may fail in single calls"
        found.append(Finding("prefect", WARNING, f"the server is Prefect {theirs}, this machine {version}", remedy))
    if date:
        clock = parsedate_to_datetime(date).timestamp()
        apart = max(begun - 1 - clock, clock - time.time(), 0.0)
        if apart > CLOCK_SECONDS:
            told = f"the server's clock and this machine's are {apart:.0f} s apart; schedules go by the server's"
            found.append(Finding("clock", WARNING, told, "set both (NTP)"))
    found.append(Finding("prefect", OK, f"Prefect {theirs} at {address}"))
    return found + _check_pools(address)


def _check_pools(address: str) -> list[Finding]:
    """The work pools, and whether a worker polls each."""
    found = []
    for pool in _ask(f"{address}/work_pools/filter", {})[0]:
        if pool["name"].startswith("prefect-"):
            continue  # Prefect's own
        workers, _ = _ask(f"{address}/work_pools/{pool['name']}/workers/filter", {})
        online = [worker for worker in workers if worker.get("status") == "ONLINE"]
        told = f"work pool {pool['name']} ({pool['type']}): {len(online)} workers online"
        if pool.get("is_paused"):
            found.append(Finding("prefect", WARNING, f"{told}, paused", f"prefect work-pool resume {pool['name']}"))
        elif not online:
            remedy = f"start one: prefect worker start --pool {pool['name']}"
            found.append(Finding("prefect", WARNING, f"{told}: its runs wait", remedy))
        else:
            found.append(Finding("prefect", OK, told))
    return found
