"""`make multihost`: a training on two hosts, one of which dies and comes back. Needs root, and iproute2's `ip`.

The hosts are network namespaces of this machine, joined by a cable (a veth pair), with a torchrun in each, as on two
machines with a shared disk; each sees its own interface alone. Told:

1. both train together, in DDP and with sharded weights and distributed checkpoints, to a few steps;
2. the second host's processes are killed (SIGKILL): the first notices, and ends;
3. both are started again by the same commands: the run goes on from its newest checkpoint and finishes;
4. its losses are those of one process on one host that was never interrupted, to 1e-10 (float64).
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from model.settings import override
from model.train import train
from model.training.checkpoint import Run
from model.training.log import read_log
from tests.model.test_train import TINY
from tests.model.tiny_lake import make_lake

HOSTS = {"vlfm-a": "10.231.7.1", "vlfm-b": "10.231.7.2"}
"""Namespaces and their addresses; the first is where the processes meet."""
PORT = 29_417
STEPS = 60
CHANGES = {
    "steps": STEPS, "checkpoint_every": 5, "validate_every": STEPS, "precision": "float64", "learning_rate_decay": 0.0,
}  # fmt: skip
KINDS = {"ddp": {}, "fsdp": {"sharding": "fsdp", "checkpoints": "distributed"}}


def ip(*words: str, check: bool = True) -> None:
    """Run `ip`; what it says is shown where it fails and must not."""
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    if check and done.returncode:
        raise RuntimeError(f"ip {' '.join(words)}: {done.stderr.strip()}")


def lay_cable() -> None:
    """Two namespaces and a cable between them."""
    for name in HOSTS:
        ip("netns", "add", name)
    first, second = HOSTS
    ip("link", "add", "eth0", "netns", first, "type", "veth", "peer", "name", "eth0", "netns", second)
    for name, address in HOSTS.items():
        ip("-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            ip("-n", name, "link", "set", device, "up")
        # Ray takes the address that its machine would reach the outside by: without any route there is none.
        ip("-n", name, "route", "add", "default", "dev", "eth0")


def remove_cable() -> None:
    """Take the namespaces away, whatever there is of them."""
    for name in HOSTS:
        ip("netns", "delete", name, check=False)


def start(host: str, rank: int, lake: Path, run: Path, kind: str) -> subprocess.Popen[str]:
    """torchrun on a host, in a process group of its own, one training process in it."""
    settings = [f"--set={name}={value}" for name, value in {**SHAPE, **CHANGES, **KINDS[kind]}.items()]
    command = [
        "ip", "netns", "exec", host, sys.executable, "-m", "torch.distributed.run", "--nnodes=2", f"--node-rank={rank}",
        "--nproc-per-node=1", f"--master-addr={next(iter(HOSTS.values()))}", f"--master-port={PORT}",
        "-m", "model.train", "--lake", str(lake), "--run-dir", str(run), "--recipe", "demo", *settings,
    ]  # fmt: skip
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, env=environment, text=True, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )


SHAPE = {
    "width": 32, "depth": 2, "heads": 2, "patch": 2, "batch": 4, "times_per_clip": 2, "log_every": 1,
    "learning_rate_warmup": 2,
}  # fmt: skip
"""As TINY has it, for the command line."""


def losses(run: Path) -> dict[int, float]:
    """The loss of each step in a run's log."""
    return {line["step"]: line["loss"] for line in read_log(run / "log.jsonl") if "loss" in line}


def both(lake: Path, run: Path, kind: str) -> list[subprocess.Popen[str]]:
    """A torchrun on each host."""
    return [start(host, rank, lake, run, kind) for rank, host in enumerate(HOSTS)]


def kill(processes: Sequence[subprocess.Popen[str]]) -> None:
    """SIGKILL to whole process groups, and wait."""
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def interrupted(lake: Path, run: Path, kind: str, patience: float) -> None:
    """Train on both hosts; kill the second; start both again; tell what happened."""
    hosts = both(lake, run, kind)
    try:
        until = time.monotonic() + patience
        while len(Run(run).steps()) < 2:
            if any(process.poll() is not None for process in hosts) or time.monotonic() > until:
                raise RuntimeError(f"{kind}: the hosts did not train together: {ends(hosts)}")
            time.sleep(0.05)
        os.killpg(hosts[1].pid, signal.SIGKILL)
        began = time.monotonic()
        status = hosts[0].wait(timeout=patience)
        at, taken = max(losses(run)), time.monotonic() - began
        print(f"{kind}: host b killed at step {at}; host a ended {taken:.1f} s later, status {status}", flush=True)
        kill(hosts)
        kept = Run(run).checkpoint().name
        hosts = both(lake, run, kind)
        statuses = [process.wait(timeout=patience) for process in hosts]
        if statuses != [0, 0]:
            raise RuntimeError(f"{kind}: started again they ended with {statuses}: {ends(hosts)}")
        print(f"{kind}: both started again from {kept}, finished at {Run(run).checkpoint().name}")
    finally:
        kill(hosts)


def ends(processes: Sequence[subprocess.Popen[str]]) -> str:
    """The last lines that the processes wrote; they are ended."""
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return " / ".join(process.communicate()[1][-800:] for process in processes)


def main(arguments: Sequence[str] | None = None) -> int:
    """Tells what happened; 1 where the losses differ."""
    parser = argparse.ArgumentParser(prog="tests.bench.multihost", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--patience", type=float, default=300, help="seconds to wait for anything (default 300)")
    options = parser.parse_args(arguments)
    if os.geteuid():
        parser.error("network namespaces need root; say `sudo make multihost`")
    good = True
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lake = make_lake(folder / "lake").root
        train(lake, folder / "alone", override(TINY, CHANGES))
        expected = losses(folder / "alone")
        remove_cable()
        try:
            lay_cable()
            for kind in KINDS:
                interrupted(lake, folder / kind, kind, options.patience)
                found = losses(folder / kind)
                worst = max(abs(found[step] / expected[step] - 1) for step in expected)
                good &= found.keys() == expected.keys() and worst < 1e-10
                print(f"{kind}: {len(found)} losses, those of one undisturbed process to {worst:.1e} (goal 1e-10)")
        finally:
            remove_cable()
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
