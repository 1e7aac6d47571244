"""The README's deployment, done for real: server, work pool, deploy, worker, `prefect deployment run ingest`."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pipeline.corpus import make_corpus
from storage.layout import Lake
from storage.version import list_versions

ROOT = Path(__file__).resolve().parents[2]
PREFECT = Path(sys.executable).with_name("prefect")


class Prefect:
    """The command `prefect` with a home of its own, and the server it talks to."""

    def __init__(self, home: Path) -> None:
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            self.port = found.getsockname()[1]
        self.home = home
        self.api = f"http://127.0.0.1:{self.port}/api"
        kept = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
        self.environment = kept | {
            "PREFECT_HOME": str(home),
            "PREFECT_API_URL": self.api,
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "DO_NOT_TRACK": "1",
            "PWD": str(ROOT),
            "PATH": f"{PREFECT.parent}{os.pathsep}{os.environ['PATH']}",
        }

    def __call__(self, *arguments: str, timeout: float = 400) -> str:
        """Runs a command to its end; its output."""
        run = subprocess.run(
            [PREFECT, "--no-prompt", *arguments],
            cwd=ROOT,
            env=self.environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=timeout,
        )
        assert run.returncode == 0, f"prefect {' '.join(arguments)}:\n{run.stdout}\n{self.logs()}"
        return run.stdout

    @contextmanager
    def running(self, name: str, *arguments: str) -> Iterator[None]:
        """A command that goes on while the block does; it and its children are gone afterwards."""
        with open(self.home / f"{name}.log", "w") as log:
            process = subprocess.Popen(
                [PREFECT, *arguments],
                cwd=ROOT,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                yield
            finally:
                for number in (signal.SIGINT, signal.SIGKILL):
                    try:
                        os.killpg(process.pid, number)
                        process.wait(timeout=10)
                    except (ProcessLookupError, subprocess.TimeoutExpired):
                        continue

    def logs(self) -> str:
        """The ends of the logs, for a failed test's message."""
        return "\n".join(f"{path.name}:\n{path.read_text()[-3000:]}" for path in self.home.glob("*.log"))

    def wait_until_healthy(self, seconds: float = 180) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            try:
                with urllib.request.urlopen(f"{self.api}/health", timeout=2):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(0.3)
        pytest.fail(f"the server did not answer in {seconds} s\n{self.logs()}")

    def read(self, what: str, query: dict[str, Any] | None = None) -> list[dict[str, Any]]:
        """Asks the server."""
        body = json.dumps(query or {}).encode()
        request = urllib.request.Request(f"{self.api}/{what}/filter", body, {"content-type": "application/json"})
        with urllib.request.urlopen(request, timeout=10) as answer:
            return list(json.load(answer))


def test_deployment_runs_as_the_readme_says(tmp_path: Path) -> None:
    films = make_corpus(tmp_path / "films", films=2).parent
    lake, home = tmp_path / "lake", tmp_path / "prefect"
    home.mkdir()
    prefect = Prefect(home)
    with prefect.running("server", "server", "start", "--host", "127.0.0.1", "--port", str(prefect.port)):
        prefect.wait_until_healthy()
        prefect("work-pool", "create", "local", "--type", "process")
        prefect("deploy", "--all")

        deployments = {deployment["name"]: deployment for deployment in prefect.read("deployments")}
        assert set(deployments) == {"ingest", "refresh", "train", "evaluate", "lake-to-model"}
        for deployment in deployments.values():
            assert deployment["pull_steps"] == [
                {"prefect.deployments.steps.set_working_directory": {"directory": str(ROOT)}}
            ]
            described = deployment["parameter_openapi_schema"]["properties"]
            assert all(shown.get("description") for shown in described.values())
        (schedule,) = deployments["refresh"]["schedules"]
        assert schedule["active"] is False
        assert schedule["schedule"]["cron"] == "30 3 * * *"
        (automation,) = prefect.read("automations")
        assert (automation["enabled"], automation["trigger"]["posture"]) == (True, "Proactive")
        assert automation["actions"][0]["state"] == "CRASHED"

        # The worker goes before its server: afterwards it does not listen to signals.
        with prefect.running("worker", "worker", "start", "--pool", "local", "--limit", "1"):
            arguments = ["--param", f"source={films}", "--param", f"lake={lake}"]
            watch = ["--watch", "--watch-interval", "1", "--watch-timeout", "300"]
            output = prefect("deployment", "run", "ingest", *arguments, *watch, timeout=330)

            (run,) = prefect.read("flow_runs")
            assert run["state_type"] == "COMPLETED", f"{run['state']}\n{output}\n{prefect.logs()}"
            assert run["name"] == "ingest-films-to-lake"
            assert list_versions(Lake.open(lake)) == [1]
            tasks = {task["name"] for task in prefect.read("task_runs")}
            assert {"plan the clips of films", "decode, invert, project block 1 of 1"} <= tasks
            kept = {artifact["key"].split("-", 3)[3]: artifact["type"] for artifact in prefect.read("artifacts")}
            assert kept == {"accounts": "table", "summary": "markdown", "contact-sheet": "image"}
