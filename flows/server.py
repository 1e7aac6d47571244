"""Prefect's temporary server: given time to start, told in one line where it does not, and gone when we are."""

from __future__ import annotations

import atexit
import os
import subprocess
import sys
import time
from typing import Any

import httpx
import prefect
from prefect.client.base import ServerType, determine_server_type
from prefect.server.api.server import SubprocessASGIServer
from prefect.settings import get_current_settings

from storage.errors import Kind, VlfmError

START_SECONDS = 180.0  # Prefect itself waits 20, which a crowded machine needs for its imports alone
SETTING = "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS"

# The server's standard input is a pipe that nobody writes to: it ends when we do, however that happens.
SERVE = """
import os, sys, threading, time
def follow():
    sys.stdin.buffer.read()
    os.kill(os.getpid(), 15)
    time.sleep(10)
    os._exit(1)
threading.Thread(target=follow, daemon=True).start()
from uvicorn.main import main
main()
"""


class ServerError(VlfmError, RuntimeError):
    """Prefect's server does not start; the message is one line that says the remedy."""

    kind = Kind.ENVIRONMENT


def start_server() -> None:
    """Starts Prefect's temporary server, which all of Prefect in this process uses then; nothing where one is set.

    Raises:
        ServerError: it was not up in time, or ended.
    """
    if determine_server_type() == ServerType.EPHEMERAL:
        # Prefect keeps one server for each process, under the key of the port asked for: ours takes that place.
        _Server().start()


class _Server(SubprocessASGIServer):
    """As Prefect's own, but it ends with its parent, and its time to start is measured by the clock."""

    def start(self, timeout: int | None = None) -> None:
        if self.running:
            return
        own = get_current_settings().server.ephemeral
        given = timeout or ("startup_timeout_seconds" in own.model_fields_set and own.startup_timeout_seconds)
        seconds = float(given or START_SECONDS)
        until = time.monotonic() + seconds
        atexit.register(self.stop)
        self.running = True
        try:
            while not self._answers():
                if self.server_process is None or self.server_process.poll() == 3:  # the port was taken meanwhile
                    self.port = self.find_available_port()
                    self.server_process = self._run_uvicorn_command()
                elif self.server_process.poll() is not None:
                    raise ServerError(
                        f"Prefect's temporary server ended with status {self.server_process.returncode}; its words are "
                        "above, or set PREFECT_API_URL to a server that runs"
                    )
                elif time.monotonic() > until:
                    raise ServerError(
                        f"Prefect's temporary server was not up within {seconds:g} s; run the command again when the "
                        f"machine is less busy, set {SETTING} to more, or PREFECT_API_URL to a server that runs"
                    )
                time.sleep(0.1)
        except BaseException:
            self.stop()
            raise

    def _answers(self) -> bool:
        if self.server_process is None:
            return False
        try:
            return httpx.get(f"{self.api_url}/health", timeout=5).status_code == 200
        except httpx.TransportError:
            return False

    def _run_uvicorn_command(self) -> subprocess.Popen[Any]:
        settings = get_current_settings().to_environment_variables(exclude_unset=True)
        ours = {"PREFECT_UI_ENABLED": "0", "PREFECT__SERVER_EPHEMERAL": "1", "PREFECT__SERVER_FINAL": "1"}
        program = [
            "--app-dir",
            str(prefect.__module_path__.parent),
            "--factory",
            "prefect.server.api.server:create_app",
        ]
        where = ["--host", "127.0.0.1", "--port", str(self.port), "--log-level", "error", "--lifespan", "on"]
        return subprocess.Popen(
            [sys.executable, "-c", SERVE, *program, *where],
            env={**os.environ, **ours, **settings},
            stdin=subprocess.PIPE,
            # A signal to our group must not end it before the run's last state is written.
            start_new_session=True,
        )

    def stop(self) -> None:
        if self.server_process and self.server_process.stdin:
            self.server_process.stdin.close()
        super().stop()
