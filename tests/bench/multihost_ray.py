"""`make multihost`: an ingest on a Ray cluster of two hosts, one of which dies in the middle. Needs root, and `ip`.

The hosts are network namespaces of this machine, joined by a cable (tests.bench.multihost), each with a Ray node of one
CPU; what a host does not see is hidden by a mount of its own. The cluster has a token. Told:

1. host b without the token does not join;
2. host b does not see the lake: the ingest says so, names it, and starts nothing;
3. host b has not got this project: the same; with `send_code` the ingest is done by both hosts;
4. host b loses all its processes (SIGKILL) while it makes a block: the ingest ends with every clip and the Merkle root
   of an ingest on this machine alone; no clip is given up, and what b had in hand is made again as it was;
5. it is started again, and given work again by the ingest that runs.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from pipeline.corpus import make_corpus
from storage.layout import Lake
from storage.version import load
from tests.bench.multihost import HOSTS, lay_cable, remove_cable

ROOT = Path(__file__).resolve().parents[2]
PORT = 6379
FILMS = 24
HEAD, OTHER = HOSTS
PACKAGES = ("storage", "model", "pipeline")
INGEST = """
import dataclasses, logging, sys
logging.basicConfig(format="%(message)s", level=logging.WARNING)
from pipeline.ingest import ingest
from pipeline.recipes import linear
films, lake, address, send_code = sys.argv[1:5]
recipe = dataclasses.replace(linear(), size=(64, 64), block_clips=1)
try:
    report = ingest(films, lake, recipe=recipe, ray_address=address or None, send_code=bool(send_code))
except (OSError, RuntimeError) as error:
    sys.exit(f"error: {error}")
print(*report.lines(), sep="\\n")
"""


class Cluster:
    """A Ray node on each host."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.token = folder, secrets.token_hex(32)
        self.address = f"{HOSTS[HEAD]}:{PORT}"
        kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        self.environment = kept | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token, "PYTHONPATH": str(ROOT)}

    def start(self, host: str, hidden: Sequence[Path] = (), token: str | None = None) -> subprocess.Popen[bytes]:
        """A node that does not see the hidden folders."""
        (self.folder / host).mkdir(exist_ok=True)
        words = ["--head", f"--port={PORT}", "--include-dashboard=false"] if host == HEAD else []
        words += [] if host == HEAD else [f"--address={self.address}"]
        words += [f"--node-ip-address={HOSTS[host]}", "--num-cpus=1", "--object-store-memory=80000000"]
        ray = [sys.executable, "-m", "ray.scripts.scripts", "start", *words, "--block", "--disable-usage-stats"]
        environment = self.environment | ({} if token is None else {"RAY_AUTH_TOKEN": token})
        with open(self.folder / f"{host}.log", "ab") as log:
            return subprocess.Popen(
                self.on(host, ray, hidden),
                env=environment, cwd=self.folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip

    def on(self, host: str, command: Sequence[str], hidden: Sequence[Path] = ()) -> list[str]:
        """The command on a host: with that host's Ray sessions, and without the hidden folders."""
        sessions = Path(tempfile.gettempdir(), "ray")  # Ray's own choice, which both hosts must have for themselves
        mounts = [f"mount --bind {self.folder / host} {sessions}", *(f"mount -t tmpfs none {path}" for path in hidden)]
        script = "; ".join([f"mkdir -p {sessions}", "set -e", *mounts, 'exec "$@"'])
        return ["ip", "netns", "exec", host, "sh", "-c", script, "sh", *command]

    def nodes(self) -> int:
        """How many nodes live."""
        code = (
            "import ray, sys; ray.init(address=sys.argv[1], logging_level='ERROR', log_to_driver=False); "
            "print('nodes', sum(node['Alive'] for node in ray.nodes()))"
        )
        done = self.driver(code, self.address).communicate()
        found = [line.split()[1] for line in done[0].splitlines() if line.startswith("nodes ")]  # Ray prints lines too
        return int(found[0]) if found else 0

    def wait(self, count: int, seconds: float) -> None:
        """Until so many nodes live."""
        until = time.monotonic() + seconds
        while (found := self.nodes()) != count:
            if time.monotonic() > until:
                raise RuntimeError(f"{found} nodes instead of {count}; see {self.folder}: {self.logs()}")
            time.sleep(1)

    def driver(self, code: str, *words: str) -> subprocess.Popen[str]:
        """A program on the first host, which sees that host's Ray session."""
        return subprocess.Popen(
            self.on(HEAD, [sys.executable, "-c", code, *words]),
            env=self.environment, cwd=self.folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            start_new_session=True,
        )  # fmt: skip

    def logs(self) -> str:
        """The ends of what the nodes said."""
        return "\n".join(path.read_text(errors="replace")[-1500:] for path in self.folder.glob("*.log"))


def lose(host: str) -> None:
    """SIGKILL to all processes on a host."""
    for _ in range(3):
        listed = subprocess.run(["ip", "netns", "pids", host], capture_output=True, text=True).stdout.split()
        for process in listed:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(process), signal.SIGKILL)
        time.sleep(0.1)


def staged(lake: Path) -> int:
    """How many blocks wait for their publication."""
    return len(list((lake / "staging").glob("*.npz")))


def works(host: str) -> bool:
    """Whether an ffmpeg runs on the host: it makes a block."""
    listed = subprocess.run(["ip", "netns", "pids", host], capture_output=True, text=True).stdout.split()
    for process in listed:
        with contextlib.suppress(OSError):
            if b"ffmpeg" in Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")[0]:
                return True
    return False


def installed_from() -> Path:
    """The folder whose code this environment runs where nothing else is said (an editable installation)."""
    command = [sys.executable, "-I", "-c", "import pipeline; print(pipeline.__file__)"]
    return Path(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()).parents[1]


def tell(words: str) -> None:
    """Print at once."""
    print(words, flush=True)


def check(folder: Path, patience: float) -> bool:
    """Does all that the docstring above lists, and tells it; whether all was as it should be."""
    films, alone = make_corpus(folder / "films", films=FILMS).parent, folder / "alone"
    subprocess.run([sys.executable, "-c", INGEST, str(films), str(alone), "", ""], check=True, capture_output=True)
    root = load(Lake.open(alone)).merkle_root
    cluster, good = Cluster(folder), True
    cluster.start(HEAD)
    until = time.monotonic() + patience
    while True:
        reach = ["ip", "netns", "exec", HEAD, "bash", "-c", f"echo > /dev/tcp/{HOSTS[HEAD]}/{PORT}"]
        if subprocess.run(reach, capture_output=True).returncode == 0:
            break
        if time.monotonic() > until:
            raise RuntimeError(cluster.logs())
        time.sleep(0.5)

    other = cluster.start(OTHER, token=secrets.token_hex(32))
    with contextlib.suppress(subprocess.TimeoutExpired):
        other.wait(timeout=60)
    good &= cluster.nodes() == 1
    tell(f"b with a wrong token: {cluster.nodes()} node in the cluster; ray start ended with {other.poll()}")
    lose(OTHER)

    def ingest(lake: Path, send_code: str = "") -> subprocess.Popen[str]:
        return cluster.driver(INGEST, str(films), str(lake), cluster.address, send_code)

    lake = folder / "lake"
    Lake.create(lake)
    cluster.start(OTHER, hidden=[lake])
    cluster.wait(2, patience)
    tell(f"b without the lake: {(said := ingest(lake).communicate()[1].strip().splitlines()[-1])}")
    good &= f"({HOSTS[OTHER]}): lake: it does not see the lake {lake}" in said
    lose(OTHER)
    cluster.wait(1, patience)

    cluster.start(OTHER, hidden=[place / name for place in {ROOT, installed_from()} for name in PACKAGES])
    cluster.wait(2, patience)
    tell(f"b without this project: {(said := ingest(lake).communicate()[1].strip().splitlines()[-1])}")
    good &= f"({HOSTS[OTHER]}): code: " in said
    sent = folder / "sent"
    begun, process, helped = time.monotonic(), ingest(sent, "yes"), False
    while process.poll() is None and time.monotonic() < begun + patience:
        helped |= works(OTHER)
        time.sleep(0.02)
    out, err = process.communicate(timeout=10)
    same = load(Lake.open(sent)).merkle_root == root if Lake.exists(sent) else False
    tell(
        f"with --send-code: {time.monotonic() - begun:.0f} s, b worked: {helped}, same Merkle root: {same} {err[-300:]}"
    )
    good &= helped and same
    lose(OTHER)
    cluster.wait(1, patience)

    cluster.start(OTHER)
    cluster.wait(2, patience)
    begun, process = time.monotonic(), ingest(lake)
    until = time.monotonic() + patience
    while not (staged(lake) >= 4 and works(OTHER)):
        if process.poll() is not None or time.monotonic() > until:
            raise RuntimeError(f"b never worked: {process.communicate()}")
        time.sleep(0.005)
    at, lost = staged(lake), time.monotonic()
    lose(OTHER)
    again = cluster.start(OTHER)
    helped = False
    while process.poll() is None and time.monotonic() < until + patience:
        helped |= works(OTHER)
        time.sleep(0.02)
    out, err = process.communicate(timeout=10)
    tell(f"b lost with {at} blocks staged; the ingest ended {time.monotonic() - lost:.0f} s later")
    tell("\n".join(["    " + line for line in (err + out).strip().splitlines()]))
    same = load(Lake.open(lake)).merkle_root == root if Lake.exists(lake) else False
    tell(f"same Merkle root as on one machine: {same}; b, started again, was given work again: {helped}")
    again.poll()
    return good and same and process.returncode == 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Tells what happened; 1 where something was not as it should be."""
    words = "An ingest on two hosts, one of which dies"
    parser = argparse.ArgumentParser(prog="python -m tests.bench.multihost_ray", description=words)
    parser.add_argument("--patience", type=float, default=180, help="seconds to wait for anything (default 180)")
    options = parser.parse_args(arguments)
    if os.geteuid():
        parser.error("network namespaces need root; say `sudo make multihost`")
    socket.setdefaulttimeout(10)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        remove_cable()
        try:
            lay_cable()
            return 0 if check(Path(name), options.patience) else 1
        finally:
            for host in HOSTS:
                lose(host)
            remove_cable()


if __name__ == "__main__":
    sys.exit(main())
