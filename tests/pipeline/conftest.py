"""Tiny films made by ffmpeg on the spot: every pixel of frame k has the grey level that says k."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.media.decode import ffmpeg_binary

LOSSLESS = ("-c:v", "libx264", "-qp", "0", "-preset", "ultrafast", "-pix_fmt", "yuv444p")

Film = Callable[..., Path]


def make_film(path: Path, *output: str, rate: str = "24", seconds: float = 2.0, size: str = "48x32") -> Path:
    """A film whose frame k is grey 1.3 k, so that a decoded frame says which one it was (up to 190 frames)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    source = f"color=black:size={size}:rate={rate}:duration={seconds},format=gray,geq=lum='trunc(1.3*N+0.5)'"
    command = [ffmpeg_binary(), "-v", "error", "-nostdin", "-y", "-f", "lavfi", "-i", source]
    # Full range keeps the grey levels as they are on their way through YUV and back.
    ranged = ["-vf", "scale=out_range=full", "-color_range", "pc"] if "-vf" not in output else []
    subprocess.run([*command, *ranged, *(output or LOSSLESS), str(path)], check=True)
    return path


def make_scene(path: Path, *output: str, rate: str = "24", seconds: float = 4.0, size: str = "96x64") -> Path:
    """A film of ffmpeg's moving test picture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    source = f"testsrc2=size={size}:rate={rate}:duration={seconds}"
    command = [ffmpeg_binary(), "-v", "error", "-nostdin", "-y", "-f", "lavfi", "-i", source]
    subprocess.run([*command, *(output or ("-c:v", "libx264", "-preset", "ultrafast")), str(path)], check=True)
    return path


def turn(film: Path, turned: Path) -> Path:
    """A copy of an mp4 that is shown turned by 90 degrees, by the matrix in its track header.

    (ffmpeg's options for it differ among versions.)
    """
    data = film.read_bytes()
    upright = b"".join(number.to_bytes(4, "big") for number in (1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30))
    left = b"".join((number % 2**32).to_bytes(4, "big") for number in (0, -1 << 16, 0, 1 << 16, 0, 0, 0, 0, 1 << 30))
    header = data.index(b"tkhd")
    place = data.index(upright, header)
    turned.write_bytes(data[:place] + left + data[place + len(left) :])
    return turned


@pytest.fixture(scope="session")
def film() -> Film:
    return make_film


@pytest.fixture(scope="session")
def scene() -> Film:
    return make_scene
