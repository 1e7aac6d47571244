"""Frames of the real films, small, for tests of the mathematics: no pipeline, only ffmpeg."""

from __future__ import annotations

import subprocess
from functools import cache
from pathlib import Path

import imageio_ffmpeg
import numpy as np

# Ranges of at least 97 frames without a cut, two of them where a film has room.
CLIPS = (
    ("armwrestling.mp4", 0),
    ("armwrestling.mp4", 140),
    ("bigbuckbunny.mp4", 0),
    ("bikes.mp4", 32),
    ("bikes.mp4", 140),
    ("carphone.mp4", 0),
    ("nasa.mp4", 20),
    ("nasa.mp4", 120),
    ("pancake.mkv", 0),
    ("pancake.mkv", 180),
    ("sintel.mp4", 0),
    ("sintel.mp4", 130),
)


@cache
def frames(path: Path, width: int = 64, height: int = 48) -> np.ndarray:
    """All frames of a film, float32 (N, height, width, 3) in [0, 1]."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-threads", "1", "-i", str(path)]
    command += ["-fps_mode", "passthrough", "-vf", f"scale={width}:{height}:flags=area"]
    command += ["-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    raw = subprocess.run(command, capture_output=True, check=True).stdout
    return np.frombuffer(raw, np.uint8).reshape(-1, height, width, 3).astype(np.float32) / 255


def clip(folder: Path, name: str, first: int, count: int) -> np.ndarray:
    """`count` frames of a film from `first` on, (count, 48, 64, 3)."""
    found = frames(folder / name)[first : first + count]
    assert len(found) == count, f"{name} has no {count} frames from {first} on"
    return found


def decibel(values: np.ndarray, reference: np.ndarray) -> float:
    """PSNR over all frames together, peak 1."""
    return float(-10 * np.log10(np.mean(np.square(values.astype(np.float64) - reference))))
