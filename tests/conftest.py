"""What every test shares: one thread for torch, no network for the hub, and the real films where they are at hand."""

from __future__ import annotations

import faulthandler
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.s3_server import S3Server

# Before any test imports them: hubs are never asked, telemetry is off, shards cannot run code.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
os.environ.setdefault("DO_NOT_TRACK", "1")
os.environ.setdefault("WDS_SECURE", "1")
# Two threads of a matrix product that fight for a busy core are many times slower than one.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parent.parent

if PERTURBED := bool(os.environ.get("VLFM_TEST_PERTURB")):
    from tests.perturb import hook

    hook.install()
    # Ray's workers and other Pythons that tests start install it too.
    inherited = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT / "tests" / "perturb"), *([inherited] if inherited else [])])


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "bit_identical: compares two computations on one machine bit for bit")


def pytest_unconfigure(config: pytest.Config) -> None:
    """A thread or a process that a test left, which Python waits for at its end, is a failure that says where."""
    faulthandler.dump_traceback_later(120, exit=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """VLFM_TEST_PERTURB stands for machines that round otherwise from call to call: nothing computed is equal there."""
    for item in items:
        if PERTURBED and item.get_closest_marker("bit_identical"):
            item.add_marker(pytest.mark.skip(reason="bit-identical on one machine only, VLFM_TEST_PERTURB perturbs"))


@pytest.fixture(autouse=True, scope="session")
def one_torch_thread() -> None:
    """Tiny models are several times faster on one thread, and repeatable."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def s3() -> Iterator[S3Server]:
    """An S3 server on loopback, started when the first test asks for it."""
    server = S3Server()
    yield server
    server.close()


@pytest.fixture
def s3_environment(s3: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The variables by which this process and its children find the server, and a cache of their own."""
    for name, value in {**s3.environment(), "VLFM_CACHE": str(tmp_path / "cache")}.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="session")
def real_films() -> Path:
    """The folder of seven real films with captions.csv; a test that asks for it is skipped where it is not."""
    folder = Path(os.environ.get("VLFM_REAL_FILMS", ROOT.parent / "shared" / "videos"))
    if not (folder / "captions.csv").is_file():
        pytest.skip(f"no real films: {folder} is not there (set VLFM_REAL_FILMS to a folder with captions.csv)")
    return folder
