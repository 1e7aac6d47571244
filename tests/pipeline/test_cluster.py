"""Who may use a Ray session: our own processes and those that have its token. Real second processes try."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipeline.cluster import RunnerError
from pipeline.runner import Runner

ROOT = Path(__file__).parents[2]
# Ray asks a cluster that refuses it 20 times, a second apart.
JOIN = """
import os, sys
os.environ["RAY_NUM_REDIS_GET_RETRIES"] = "2"
from pipeline.runner import Runner
import ray
try:
    with Runner(sys.argv[1]) as runner:
        runner.start()
        print("joined", ray.get(ray.remote(lambda: 7).remote()))
except RuntimeError as error:
    print(error)
"""
OUTSIDE = """
import sys
import pipeline.cluster
import ray
from pipeline.runner import Runner
from pipeline.sessions import sessions_folder
address = sys.argv[1]
host, _, port = address.rpartition(":")
print(pipeline.cluster._node_here(address), pipeline.cluster._node_here(f"localhost:{port}"), end=" ")
print(pipeline.cluster._node_here(f"{host}:{int(port) + 1}"))
pipeline.cluster._node_here = lambda address: False  # as in a pod that is no node of the cluster
with Runner(address) as runner:
    runner.start()
    nodes = [node for node in ray.nodes() if node["Alive"]]
    print(sorted(node["Resources"].get("CPU", 0) for node in nodes), ray.get(ray.remote(lambda: 7).remote()))
    folder = sessions_folder()
    print(len(list(folder.iterdir())), "session")
print(len(list(folder.iterdir())), "sessions")
"""
INTRUDE = """
import os, sys
os.environ["RAY_NUM_REDIS_GET_RETRIES"] = "2"
import ray
try:
    ray.init(address=sys.argv[1], logging_level="ERROR")
    print("joined", ray.get(ray.remote(lambda: 7).remote()))
except Exception as error:
    print("refused", type(error).__name__)
"""
NAMES = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS")


def begin(code: str, address: str, **variables: str) -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if name not in NAMES}
    environment |= {"PYTHONPATH": str(ROOT), **variables}
    command = [sys.executable, "-c", code, address]
    return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def end(process: subprocess.Popen[str]) -> tuple[str, str]:
    """What it printed to stdout and stderr."""
    out, err = process.communicate(timeout=120)
    return out.strip(), err


def test_our_session_refuses_everybody_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    monkeypatch.setenv("HOME", str(tmp_path))  # where Ray itself would keep a token for every program of this user
    before = {name: os.environ.get(name) for name in NAMES}
    with Runner() as runner:
        runner.start()
        outside = str(ray.get_runtime_context().gcs_address)
        token = os.environ["RAY_AUTH_TOKEN"]
        inside = f"127.0.0.1:{outside.rpartition(':')[2]}"
        assert not outside.startswith("127."), "this machine has no outside address to try"
        intruders = [
            begin(INTRUDE, outside),
            begin(INTRUDE, inside),
            begin(INTRUDE, outside, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32)),
            begin(INTRUDE, inside, RAY_AUTH_MODE="token"),  # with a token that Ray may have left in the home folder
        ]
        told = [end(intruder)[0].splitlines()[-1] for intruder in intruders]
        assert [words.split()[0] for words in told] == ["refused"] * 4, told
        assert end(begin(INTRUDE, outside, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=token))[0].endswith("joined 7")
        lines = subprocess.run(["ps", "axww", "-o", "args"], capture_output=True, text=True).stdout
        assert token not in lines, "the token is on a command line"
        logs = Path(ray._private.worker._global_node.get_logs_dir_path())
        assert not [path for path in logs.rglob("*") if path.is_file() and token.encode() in path.read_bytes()]
    assert {name: os.environ.get(name) for name in NAMES} == before
    assert not (tmp_path / ".ray").exists()


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """A cluster of another process, started by hand with a token: (address, token)."""
    token, port = secrets.token_hex(32), free_port()
    environment = {name: value for name, value in os.environ.items() if name not in NAMES}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
    options = ["--head", "--block", f"--port={port}", "--num-cpus=1", "--include-dashboard=false"]
    options += ["--object-store-memory=100000000", "--disable-usage-stats"]
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", *options]
    told = tmp_path_factory.mktemp("ray") / "log"
    with told.open("w") as log:
        folder = tmp_path_factory.mktemp("elsewhere")
        head = subprocess.Popen(command, env=environment, cwd=folder, stdout=log, stderr=log, start_new_session=True)
        try:
            until = time.monotonic() + 90
            while "Ray runtime started" not in told.read_text() and time.monotonic() < until:
                time.sleep(0.2)
            yield f"127.0.0.1:{port}", token
        finally:
            head.send_signal(signal.SIGTERM)
            head.wait(timeout=60)


def test_a_cluster_with_a_token_is_joined_with_it_alone(cluster: tuple[str, str]) -> None:
    address, token = cluster
    given, missing, wrong = begin(JOIN, address, RAY_AUTH_TOKEN=token), begin(JOIN, address), None
    wrong = begin(JOIN, address, RAY_AUTH_TOKEN=secrets.token_hex(32))
    assert end(given)[0] == "joined 7"
    remedy = "set RAY_AUTH_TOKEN (or RAY_AUTH_TOKEN_PATH) to the token that the cluster was started with"
    for process, what in ((missing, "this process: it has no token"), (wrong, "the token of RAY_AUTH_TOKEN")):
        out, err = end(process)
        assert out == f"the cluster at {address} refused {what}; {remedy}"
        assert "Unauthenticated" not in err, "Ray's own words come twenty times"


def test_a_machine_outside_the_cluster_is_a_node_for_the_time_of_its_session(
    cluster: tuple[str, str], tmp_path: Path
) -> None:
    address, token = cluster
    told, err = end(begin(OUTSIDE, address, RAY_AUTH_TOKEN=token, TMPDIR=str(tmp_path)))
    assert told.splitlines() == ["True True False", "[0, 1.0] 7", "1 session", "0 sessions"], err
    _, err = end(begin(OUTSIDE, address, RAY_AUTH_TOKEN=secrets.token_hex(32), TMPDIR=str(tmp_path)))
    assert f"the cluster at {address} refused the token of RAY_AUTH_TOKEN" in err


def test_a_cluster_that_does_not_answer_is_told_at_once() -> None:
    address = f"127.0.0.1:{free_port()}"
    begun = time.monotonic()
    with pytest.raises(RunnerError, match=rf"^no Ray cluster answers at {address} \(.*\); start it .* or correct"):
        Runner(address).start()
    assert time.monotonic() - begun < 60


INGEST = """
import dataclasses, sys
from pipeline.ingest import ingest
from pipeline.recipes import linear
from pipeline.runner import Runner
recipe = dataclasses.replace(linear(), size=(16, 16), duration=1.0, rate=8.0)
with Runner(sys.argv[1]) as runner:
    print(ingest("films", "lake", recipe=recipe, runner=runner).clips.line())
"""


def test_relative_paths_reach_workers_that_were_started_elsewhere(
    cluster: tuple[str, str], scene: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene(tmp_path / "films" / "a.mp4", rate="8", seconds=2).with_suffix(".txt").write_text("a test picture")
    monkeypatch.chdir(tmp_path)
    address, token = cluster
    out, err = end(begin(INGEST, address, RAY_AUTH_TOKEN=token))
    assert out == "clips: 2 discovered = 2 done + 0 unchanged + 0 filtered + 0 failed", err
