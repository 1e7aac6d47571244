"""A cluster of two nodes loses one in the middle of the work: its tasks are done again as they were."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
LOSE_ONE = """
import json, logging, os, sys, threading, time
from pathlib import Path
import ray
from ray.cluster_utils import Cluster
from pipeline.items import Resources
from pipeline.runner import Runner

notes, told = Path(sys.argv[1]), []

class Slow:
    resources = Resources()
    def setup(self): pass
    def process(self, task_id, items):
        node = ray.get_runtime_context().get_node_id()
        (notes / f"{node} {task_id}").touch()
        time.sleep(0.4)
        return [item**2 for item in items]
    def teardown(self): pass

class Telling(logging.Handler):
    def emit(self, record): told.append(record.getMessage())

logging.getLogger("pipeline.runner").addHandler(Telling())
soon = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 3}
small = {"num_cpus": 1, "object_store_memory": 80_000_000, "include_dashboard": False}
cluster = Cluster(initialize_head=True, head_node_args={**small, "_system_config": soon})
del small["include_dashboard"]
other = cluster.add_node(**small)
ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")

def lose():
    until = time.monotonic() + 120
    while len({note.name.split()[0] for note in notes.iterdir()}) < 2 and time.monotonic() < until:
        time.sleep(0.01)
    cluster.remove_node(other, allow_graceful=False)

thread = threading.Thread(target=lose)
thread.start()
results, whole, given_up = {}, [], []

def done(task, values):
    whole.append(task.task_id == task.parent)
    for item, value in zip(task.items, values, strict=True):
        assert item not in results, "no item is done twice"
        results[item] = value

tasks = [(f"t{first}", range(first, first + 3)) for first in range(0, 60, 3)]
Runner(attempts=1).run(Slow(), tasks, str, done, lambda task, reason, detail: given_up.append(task.items[0]))
thread.join()
print(json.dumps({"results": results, "whole": all(whole), "given up": given_up, "told": told}))
ray.shutdown()
cluster.shutdown()
"""


def test_a_lost_node_costs_time_alone(tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    notes.mkdir()
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment = {**kept, "PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0"}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    command = [sys.executable, "-c", LOSE_ONE, str(notes)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    (line,) = [line for line in run.stdout.splitlines() if line.startswith('{"results"')]  # Ray prints lines of its own
    found = json.loads(line)
    assert {int(item): value for item, value in found["results"].items()} == {item: item**2 for item in range(60)}
    assert found["given up"] == []
    assert found["whole"], "a task that went down with its node is no suspect: it is not taken apart"
    nodes = {note.name.split()[0] for note in notes.iterdir()}
    assert len(nodes) == 2
    assert any("is gone; what it was making is made by others" in line for line in found["told"])
