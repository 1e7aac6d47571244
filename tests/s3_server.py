"""A real S3 over HTTP on loopback for tests: moto's server in a process of its own, which ends with the tests.

`python -m tests.s3_server` says its port and serves until its standard input ends. `S3Server` starts it. It can be told
to answer wrongly (`fault`), and it remembers what it was asked (`requests`).
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "test-key", "AWS_SECRET_ACCESS_KEY": "test-secret-7Q", "AWS_REGION": "us-east-1",
    "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true", "AWS_CONFIG_FILE": "/dev/null",
    "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
}  # fmt: skip


class S3Server:
    """The server, while the block lasts."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.s3_server"], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self._process.stdout is not None
        self.port = int(self._process.stdout.readline())
        self.url = f"http://127.0.0.1:{self.port}"

    def environment(self) -> dict[str, str]:
        """The variables by which programs find it."""
        return {**ENVIRONMENT, "AWS_ENDPOINT_URL": self.url}

    @functools.cached_property
    def client(self) -> Any:
        """A client of its own, without the code under test."""
        import boto3

        return boto3.client(
            "s3", endpoint_url=self.url, region_name="us-east-1", aws_access_key_id="raw", aws_secret_access_key="raw"
        )

    def fault(
        self,
        match: str,
        status: int = 503,
        times: int = 1,
        after: bool = False,
        delay: float = 0.0,
        code: str = "Fault",
        skip: int = 0,
        kill: int = 0,
    ) -> None:
        """Answer the next `times` requests whose "METHOD /path" matches a pattern with `status` and S3's word `code`.

        after: do the work first, and lose its answer. delay: wait first. skip: so many matching requests are answered
        before. kill: SIGKILL to this process, before any answer. The answer is the right one with status 0;
        with status 1 the second half of its body never comes, with 2 its last byte is another one, and with 3 the
        request's conditions are not looked at.
        """
        told = {
            "match": match, "status": status, "times": times, "after": after, "delay": delay, "code": code,
            "skip": skip, "kill": kill,
        }  # fmt: skip
        self._ask("/-/fault", json.dumps(told).encode())

    def heal(self) -> None:
        """Forget the faults that are left."""
        self._ask("/-/heal", b"")

    def requests(self) -> list[str]:
        """What was asked since the last call, as "METHOD /path"."""
        found: list[str] = json.loads(self._ask("/-/requests", b""))
        return found

    def faulted(self) -> list[str]:
        """The requests that met a fault since the last call, as "METHOD /path"."""
        found: list[str] = json.loads(self._ask("/-/faulted", b""))
        return found

    def close(self) -> None:
        self.client.close()
        self._process.stdin.close()  # type: ignore[union-attr]
        self._process.wait(30)
        self._process.stdout.close()  # type: ignore[union-attr]

    def _ask(self, path: str, data: bytes) -> bytes:
        with urllib.request.urlopen(urllib.request.Request(self.url + path, data)) as answer:
            return bytes(answer.read())


class _Faulty:
    """A WSGI application that answers some requests wrongly, and lets moto answer the others."""

    def __init__(self, application: Callable[..., Iterable[bytes]]) -> None:
        self.moto = application
        self.faults: list[dict[str, Any]] = []
        self.asked: list[str] = []
        self.faulted: list[str] = []
        self.lock, self.puts = threading.Lock(), threading.Lock()

    def application(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        """moto's answer; one put at a time, since moto compares a condition and stores in two steps, and S3 in one."""
        if environ["REQUEST_METHOD"] != "PUT":
            return self.moto(environ, start_response)
        with self.puts:
            return list(self.moto(environ, start_response))

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        path = environ["PATH_INFO"]
        if path.startswith("/-/"):
            body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            with self.lock:
                if path == "/-/fault":
                    self.faults.append(json.loads(body))
                if path == "/-/heal":
                    self.faults = []
                told: list[str] = []
                if path == "/-/requests":
                    told, self.asked = self.asked, []
                if path == "/-/faulted":
                    told, self.faulted = self.faulted, []
            start_response("200 OK", [("Content-Type", "application/json")])
            return [json.dumps(told).encode()]
        request = f"{environ['REQUEST_METHOD']} {path}"
        with self.lock:
            self.asked.append(request)
            fault = self._fault_of(request)
        if fault is None:
            return self.application(environ, start_response)
        time.sleep(fault["delay"])
        if fault["kill"]:
            if fault["after"]:
                list(self.application(environ, lambda *_: None))
            with contextlib.suppress(ProcessLookupError):
                os.kill(fault["kill"], signal.SIGKILL)
            fault = {**fault, "status": 503, "after": False}
        if fault["status"] == 3:
            for name in ("HTTP_IF_MATCH", "HTTP_IF_NONE_MATCH"):
                environ.pop(name, None)
        if fault["status"] in (0, 3):
            return self.application(environ, start_response)
        if fault["status"] in (1, 2):
            body = b"".join(self.application(environ, start_response))
            return [body[: len(body) // 2]] if fault["status"] == 1 else [body[:-1] + bytes([body[-1] ^ 1])]
        if fault["after"]:
            for _ in self.application(environ, lambda *_: None):
                pass
        else:
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        start_response(f"{fault['status']} Fault", [("Content-Type", "application/xml")])
        return [f"<Error><Code>{fault['code']}</Code><Message>A fault of the tests.</Message></Error>".encode()]

    def _fault_of(self, request: str) -> dict[str, Any] | None:
        """The first fault that this request meets; it counts for all that match it."""
        found = None
        for fault in [fault for fault in self.faults if re.search(fault["match"], request)]:
            if fault["skip"]:
                fault["skip"] -= 1
            elif found is None:
                found = fault
        if found is not None:
            self.faulted.append(request)
            found["times"] -= 1
            self.faults = [fault for fault in self.faults if fault["times"] > 0]
        return found


def serve() -> None:
    import logging

    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    application = _Faulty(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, application, threaded=True)
    print(server.port, flush=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    sys.stdin.read()


if __name__ == "__main__":
    serve()
