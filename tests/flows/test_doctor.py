"""`vlfm doctor` on machines that are broken in one way each: it says the right line, the remedy, and status 1."""

from __future__ import annotations

import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from flows.cli import main
from storage.layout import Lake

ROOT = Path(__file__).parents[2]
Doctor = Callable[..., tuple[int, list[dict[str, str]]]]


@pytest.fixture
def doctor(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Doctor:
    """Runs `vlfm doctor --quick --json` in this process: the exit status, and the findings that are not ok."""
    for name in ("PREFECT_SERVER_ANALYTICS_ENABLED", "DO_NOT_TRACK", "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL"):
        monkeypatch.setenv(name, "CRITICAL" if name.endswith("LEVEL") else "false")
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> tuple[int, list[dict[str, str]]]:
        status = main(["doctor", "--quick", "--json", *map(str, arguments)])
        answer = json.loads(capsys.readouterr().out)
        assert answer["ok"] == (status == 0)
        return status, [finding for finding in answer["findings"] if finding["status"] in ("warning", "error")]

    return run


def test_no_ffmpeg(doctor: Doctor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(tmp_path / "nowhere"))
    status, (found,) = doctor()
    assert (status, found["check"]) == (1, "ffmpeg")
    assert found["message"] == "no ffmpeg found; `pip install imageio-ffmpeg` brings one"


def test_a_full_disk(doctor: Doctor, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip(f"no small disk to fill: {mounted.stderr.decode().strip()}")
    try:
        lake = Lake.create(disk / "lake")
        with pytest.raises(OSError, match="No space"):
            (disk / "filled").write_bytes(b"\0" * 2**18)
        status, found = doctor("--lake", lake.root)
        assert status == 1
        told = {finding["check"]: finding for finding in found}
        assert told["disk"]["message"] == f"0.0 MiB free at {lake.root}"
        assert told["disk"]["remedy"].startswith("make room there")
        assert "the disk is full" in told["store"]["message"]
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_torch_that_does_not_load(tmp_path: Path) -> None:
    """A wheel for another CUDA: its version is out of range, and its library is not found."""
    torch, listed = tmp_path / "torch", tmp_path / "torch-2.5.1.dist-info"
    torch.mkdir()
    listed.mkdir()
    (torch / "__init__.py").write_text("raise ImportError('libcudart.so.12: cannot open shared object file')\n")
    (listed / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.5.1\n")
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    environment = {**kept, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    code = "import sys; from flows.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "doctor", "--quick"]
    run = subprocess.run(command, cwd=tmp_path, env=environment, text=True, capture_output=True, timeout=120)
    assert run.returncode == 1, run.stderr
    lines = [" ".join(line.split()) for line in run.stdout.splitlines()]
    assert "error packages [train] torch is 2.5.1, not >=2.11" in lines
    told = "error torch torch 2.5.1 does not load: libcudart.so.12: cannot open shared object file"
    assert lines[lines.index(told) + 1] == "-> pip install --constraint constraints.txt '.[train]'"
    assert lines[-1].endswith("errors, 0 warnings")


def test_an_unreachable_prefect(doctor: Doctor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    status, (found,) = doctor()
    assert (status, found["check"]) == (1, "prefect")
    assert found["message"].startswith("no Prefect server answers at http://127.0.0.1:9/api (")
    assert found["remedy"].startswith("start it (`prefect server start`)")


class OldServer(http.server.BaseHTTPRequestHandler):
    """A Prefect server of another version and another century, with a pool that nobody serves."""

    def answer(self, value: Any) -> None:
        body = json.dumps(value).encode()
        self.send_response_only(200)
        self.send_header("date", "Sat, 01 Jan 2000 00:00:00 GMT")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        self.answer("2.0.0" if self.path.endswith("version") else True)

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        pools = [{"name": "local", "type": "process", "is_paused": False}]
        self.answer([{"status": "OFFLINE"}] if "workers" in self.path else pools)

    def log_message(self, *words: Any) -> None:
        """Says nothing."""


@pytest.fixture
def old_server() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), OldServer)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/api"
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_server_of_another_version_and_time(doctor: Doctor, old_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_URL", old_server)
    status, found = doctor()
    assert status == 0, "warnings alone are no failure"
    version, clock, pool = found
    assert version["message"].startswith("the server is Prefect 2.0.0, this machine 3.")
    assert clock["check"] == "clock"
    assert pool["message"] == "work pool local (process): 0 workers online: its runs wait"
    assert pool["remedy"] == "start one: prefect worker start --pool local"


def test_an_unreachable_cluster(doctor: Doctor) -> None:
    status, (found,) = doctor("--ray-address", "127.0.0.1:9")
    assert (status, found["check"]) == (1, "ray")
    assert found["message"].startswith("no Ray cluster answers at 127.0.0.1:9")
