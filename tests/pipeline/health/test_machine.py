"""The checks of one machine, each on a machine that is broken in its way."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import time
from pathlib import Path

import pytest

from pipeline.health import ERROR, OK, SKIPPED, WARNING, Finding, check_machine, run_checks
from pipeline.health.gpus import Cuda, judge_cuda
from pipeline.health.places import check_clock, check_lake, check_store, judge_room, try_store
from pipeline.health.programs import check_ffmpeg, check_packages, check_weights, code_digest
from pipeline.recipes import demo, linear, stable_diffusion
from storage.layout import Lake
from storage.local import LocalStore
from tests.model.ffmpeg_shims import shim
from tests.storage.sample_lake import publish_clips


def test_this_machine_is_whole(tmp_path: Path) -> None:
    found = check_machine(demo(), str(tmp_path / "lake"))
    assert [finding for finding in found if finding.status == ERROR] == []
    looked_at = {finding.check for finding in found}
    assert looked_at == {"python", "packages", "torch", "ffmpeg", "weights", "disk", "memory", "store", "clock"}
    assert list(tmp_path.iterdir()) == [], "nothing stays behind"


def test_a_check_that_breaks_is_a_finding_and_stops_no_other() -> None:
    def breaks() -> Finding:
        raise ImportError("libfoo.so.1: cannot open shared object file")

    def expected() -> Finding:
        raise OSError("the disk is on fire; put it out")

    found = run_checks({"torch": breaks, "disk": expected, "clock": check_clock})
    assert [(each.check, each.status) for each in found] == [("torch", ERROR), ("disk", ERROR), ("clock", OK)]
    assert found[0].message == "ImportError: libfoo.so.1: cannot open shared object file"
    assert found[1].line() == "disk: the disk is on fire; put it out"


# --- torch and the driver, on paper: no machine has them all ---

H200 = ("NVIDIA H200 with 139 GiB",)


@pytest.mark.parametrize(
    ("cuda", "status", "words"),
    [
        (Cuda("2.13.0+cpu", None, None, 0), OK, "built for CPUs; no GPU here"),
        (Cuda("2.13.0+cpu", None, "13.0", 2), WARNING, "the 2 GPUs of this machine are not used"),
        (Cuda("2.13.0", "13.0", None, 0), OK, "no GPU here, so the CPU computes"),
        (Cuda("2.13.0", "13.0", None, 1), ERROR, "the driver of the 1 GPU does not load"),
        (Cuda("2.13.0", "13.0", "12.4", 8), ERROR, "the driver knows CUDA up to 12.4"),
        (Cuda("2.13.0", "13.2", "13.0", 1, H200), OK, "driver for CUDA 13.0: NVIDIA H200"),
        (Cuda("2.13.0", "12.8", "13.0", 1, H200), OK, "driver for CUDA 13.0: NVIDIA H200"),
        (Cuda("2.13.0", "13.0", "13.0", 1), ERROR, "torch sees no GPU (CUDA_VISIBLE_DEVICES"),
        (Cuda("2.13.0", "13.0", "13.0", 1, (), "CUDA error: ECC"), ERROR, "but CUDA error: ECC"),
    ],
)
def test_torch_against_the_driver(cuda: Cuda, status: str, words: str) -> None:
    found = judge_cuda(cuda)
    assert found.status == status
    assert words in found.message
    assert bool(found.remedy) == (status != OK)


# --- packages ---


@pytest.fixture
def versions(monkeypatch: pytest.MonkeyPatch) -> dict[str, str | None]:
    """Versions that importlib.metadata tells in place of the true ones; None for what is not there."""
    changed: dict[str, str | None] = {}
    true = importlib.metadata.version

    def told(name: str) -> str:
        if name in changed:
            version = changed[name]
            if version is None:
                raise importlib.metadata.PackageNotFoundError(name)
            return version
        return true(name)

    monkeypatch.setattr(importlib.metadata, "version", told)
    return changed


def test_versions_that_break_prefect_are_named(versions: dict[str, str | None]) -> None:
    versions["fastapi"] = "0.155.0"
    versions["sqlalchemy"] = None
    *others, flows = check_packages()
    assert [each.status for each in others] == [OK, OK]
    assert flows.status == ERROR
    assert flows.message == "[flows] fastapi is 0.155.0, not <0.151,>=0.139; sqlalchemy missing"
    assert flows.remedy == "pip install --constraint constraints.txt '.[flows]'"


def test_a_trainer_needs_neither_ray_nor_prefect(versions: dict[str, str | None]) -> None:
    versions.update(ray=None, prefect=None)
    assert [each.status for each in check_packages()] == [OK, SKIPPED, SKIPPED]


# --- ffmpeg and weights ---


def test_an_ffmpeg_without_the_protocols_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lacking = 'case "$*" in *-protocols*) printf "Input:\\n  pipe\\nOutput:\\n  file\\n";; *) exec "$REAL" "$@";; esac'
    monkeypatch.setenv("VLFM_FFMPEG", str(shim(tmp_path / "ffmpeg", lacking)))
    found = check_ffmpeg()
    assert (found.status, "lacks the protocol file" in found.message) == (ERROR, True)


def test_weights_are_here_and_whole(tmp_path: Path) -> None:
    assert [each.status for each in check_weights(demo())] == [OK, OK]
    (tmp_path / "unet").mkdir()
    whole = next((Path(__file__).parents[3] / "model/shipped/vlfm-small-2").rglob("*.safetensors")).read_bytes()
    (tmp_path / "unet" / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    broken = dataclasses.replace(demo(), codec={"kind": "diffusers", "source": str(tmp_path)})
    codec, _ = check_weights(broken)
    assert codec.status == ERROR
    assert "model.safetensors is damaged" in codec.message
    (missing,) = run_checks({"weights": lambda: check_weights(stable_diffusion())})
    assert (missing.status, "hf download" in missing.message) == (ERROR, True)


# --- disks, the store, the clock ---


def test_room_is_told_in_the_units_of_the_trouble() -> None:
    assert judge_room("here", 0).message == "0.0 MiB free at here"
    assert [judge_room("here", gib * 2**30).status for gib in (0, 1, 10)] == [ERROR, WARNING, OK]


def test_a_lake_is_tried_and_left_as_it_was(tmp_path: Path) -> None:
    lake = Lake.create(tmp_path / "lake")
    assert check_store(None).status == SKIPPED
    assert check_store(str(lake.root)).status == OK
    (told,) = check_lake(str(lake.root))
    assert told.message == f"{lake.root} has no version yet"
    publish_clips(lake, range(2))
    before = lake.store.list_keys()
    assert check_store(str(lake.root)).status == OK
    assert lake.store.list_keys() == before
    assert check_lake(str(lake.root))[0].status == OK


def test_a_lake_of_the_future_tells_of_the_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lake = Lake.create(tmp_path / "lake")
    publish_clips(lake, range(2))
    made = time.time()
    monkeypatch.setattr(time, "time", lambda: made - 10 * 365 * 86400)
    (told,) = check_lake(str(lake.root))
    assert (told.check, told.status) == ("clock", WARNING)
    assert check_clock().status == ERROR


def test_a_store_that_creates_twice_is_no_store(tmp_path: Path) -> None:
    class Careless(LocalStore):
        def create_exclusive(self, key: str, data: bytes) -> bool:
            self.write(key, data)
            return True

    found = try_store(Careless(tmp_path))
    assert found.status == ERROR
    assert "does not create exclusively" in found.message
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        (found,) = run_checks({"store": lambda: check_store("/proc/1/lake")})
    else:
        tmp_path.chmod(0o500)
        (found,) = run_checks({"store": lambda: check_store(str(tmp_path / "lake"))})
    assert found.status == ERROR


def test_the_code_has_one_digest() -> None:
    assert code_digest() == code_digest()
    assert len(code_digest()) == 64
    assert check_weights(linear())[0].message == "codec linear of recipe linear needs none"
