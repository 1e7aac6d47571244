"""The films that most tests of the ingest have."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

Film = Callable[..., Path]


@pytest.fixture
def films(scene: Film, tmp_path: Path) -> Path:
    folder = tmp_path / "films"
    scene(folder / "a.mp4", rate="24", seconds=4)
    scene(folder / "b.mkv", rate="10", seconds=2.5)
    scene(folder / "c.webm", "-c:v", "libvpx", "-deadline", "realtime", rate="30", seconds=3)
    (folder / "captions.csv").write_text("file,caption\na.mp4,a picture\nb.mkv,another picture\nc.webm,a picture\n")
    return folder
