"""Lakes for the storage tests: an empty one, a published one, and one on a disk that is nearly full."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from storage.layout import Lake


@pytest.fixture(scope="session")
def sample_lake() -> ModuleType:
    """The module that publishes made-up clips."""
    path = Path(__file__).with_name("sample_lake.py")
    spec = importlib.util.spec_from_file_location("sample_lake", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["sample_lake"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def lake(tmp_path: Path) -> Lake:
    """An empty lake."""
    return Lake.create(tmp_path / "lake")


@pytest.fixture
def published(lake: Lake, sample_lake: ModuleType) -> Lake:
    """A lake with one version of six clips in two shards."""
    sample_lake.publish_clips(lake, range(6))
    return lake


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 2 MiB of its own, or a skip where this user may not mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip(f"no small disk to fill: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
