"""Films of many kinds: the right frames, at their real times, and one clear word for every bad one."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from model.ffmpeg import find_ffmpeg
from pipeline.media.decode import decode, ffmpeg_binary, probe, select_frames, window_of, window_starts
from pipeline.media.faults import DecodeError, MediaLimits
from tests.pipeline.conftest import turn

Film = Callable[..., Path]
GREY = ("-pix_fmt", "yuv420p", "-vf", "scale=out_range=full", "-color_range", "pc")
SHARP = ("-c:v", "libx264", "-qp", "0", "-preset", "ultrafast")


def numbers(frames: np.ndarray) -> list[int]:
    """Which frames these are, read from their grey level."""
    return [round(float(frame.mean()) / 1.3) for frame in frames]


def expected(count: int, rate: float, start: float, duration: float, kept_rate: float) -> list[int]:
    """Frames of a film of constant rate that a window keeps: for every slot the nearest frame, the slow way."""
    chosen = []
    for slot in range(int(duration * kept_rate)):
        near = [k for k in range(count) if int((k / rate - start) * kept_rate + 0.5 + 1e-6) == slot]
        near = [k for k in near if k / rate - start + 1e-6 >= 0 and k / rate - start < duration - 1e-6]
        if near:
            chosen.append(min(near, key=lambda k: (round(abs((k / rate - start) * kept_rate - slot), 6), k)))
    return chosen


FORMATS = [
    ("mp4", "24", (*SHARP, *GREY, "-bf", "2", "-g", "12")),
    ("mov", "48", (*SHARP, *GREY)),
    ("mkv", "30000/1001", (*SHARP, *GREY, "-pix_fmt", "yuv444p", "-bf", "3")),
    (
        "mkv",
        "60",
        (
            "-c:v",
            "ffv1",
        ),
    ),
    ("avi", "25", ("-c:v", "mjpeg", "-q:v", "1", "-pix_fmt", "yuvj444p", "-vf", "scale=out_range=full")),
    ("avi", "12", (*SHARP, *GREY, "-bf", "2")),
    ("webm", "30", ("-c:v", "libvpx-vp9", "-lossless", "1", "-deadline", "realtime", *GREY)),
    ("ts", "25", (*SHARP, *GREY, "-bf", "2")),
    ("mp4", "8", (*SHARP, *GREY)),
    ("mp4", "16", (*SHARP, *GREY)),
    ("gif", "20", ("-vf", "split[a][b];[a]palettegen=reserve_transparent=0[p];[b][p]paletteuse=dither=none")),
]


@pytest.mark.parametrize(("suffix", "rate", "output"), FORMATS, ids=lambda value: str(value).replace("/", "-")[:12])
def test_every_kept_frame_is_the_right_one(
    film: Film, tmp_path: Path, suffix: str, rate: str, output: tuple[str, ...]
) -> None:
    path = film(tmp_path / f"a.{suffix}", *output, rate=rate, seconds=3)
    true_rate = float(rate.split("/")[0]) / float((rate + "/1").split("/")[1])
    found = probe(path)
    count = len(found.ticks)
    assert count == round(3 * true_rate)
    assert found.seconds == pytest.approx(3, abs=0.04)
    np.testing.assert_allclose(found.times, np.arange(count) / true_rate, atol=0.0011)
    windows = [select_frames(found, start, 1.0, 16) for start in window_starts(found, 1.0)]
    assert len(windows) >= 2
    for window, frames in zip(windows, decode(path, windows, (8, 12)), strict=True):
        assert frames.dtype == np.uint8
        assert frames.shape[1:] == (8, 12, 3)
        assert len(frames) == len(window.ticks) == len(set(window.ticks))
        seen = numbers(frames)
        np.testing.assert_allclose(window.frame_time, np.array(seen) / true_rate - window.start, atol=0.0011)
        if "/" not in rate:
            assert seen == expected(count, true_rate, window.start, 1.0, 16)
        assert min(window.frame_time) >= 0
        assert max(window.frame_time) < 1.0


def test_variable_rate_keeps_real_times(film: Film, tmp_path: Path) -> None:
    kept = [0, 1, 2, 7, 9, 10, 19, 20, 33, 34, 40, 47]
    chosen = "+".join(f"eq(n,{k})" for k in kept)
    output = (
        "-vf",
        f"select='{chosen}',scale=out_range=full",
        f"-{find_ffmpeg().sync_option}",
        "vfr",
        *SHARP,
        "-pix_fmt",
        "yuv444p",
    )
    path = film(tmp_path / "vfr.mp4", *output, "-color_range", "pc", rate="48", seconds=1)
    found = probe(path)
    np.testing.assert_allclose(found.times, np.array(kept) / 48, atol=1e-4)
    window = select_frames(found, 0.0, 0.9, 48)
    (frames,) = decode(path, [window], (16, 16))
    assert numbers(frames) == [k for k in kept if k / 48 < 0.9]
    thinned = select_frames(found, 0.0, 0.9, 8)
    assert len(thinned.ticks) == len(set(thinned.ticks)) <= 8


def test_windows_of_hundreds_of_frames(film: Film, tmp_path: Path) -> None:
    """ffmpeg refuses a sum of more than a hundred terms written as a chain."""
    path = film(tmp_path / "long.mp4", *SHARP, *GREY, rate="60", seconds=3)
    found = probe(path)
    window = select_frames(found, 0.0, 3.0, 60)
    assert len(window.ticks) == 180
    (frames,) = decode(path, [window], (8, 8))
    assert numbers(frames) == list(range(180))
    singles = [window_of(found, [k]) for k in range(180)]
    assert [numbers(frames)[0] for frames in decode(path, singles, (8, 8))] == list(range(180))
    assert window_of(found, np.arange(60, 120), 1.0) == select_frames(found, 1.0, 1.0, 60)


def test_times_count_from_the_first_frame(film: Film, tmp_path: Path) -> None:
    path = film(tmp_path / "late.mkv", *SHARP, *GREY, "-output_ts_offset", "7.25", "-bf", "2", seconds=2)
    found = probe(path)
    assert found.ticks[0] * found.time_base > 7
    assert found.times[0] == 0
    windows = [select_frames(found, start, 1.0, 16) for start in window_starts(found, 1.0)]
    first, second = decode(path, windows, (8, 8))
    assert numbers(first)[0] == 0
    assert numbers(second)[0] == 24


def test_frames_outside_an_edit_list_are_not_there(film: Film, tmp_path: Path) -> None:
    path = film(tmp_path / "long.mp4", *SHARP, *GREY, "-bf", "2", "-g", "24", seconds=4)
    cut = tmp_path / "cut.mp4"
    subprocess.run([ffmpeg_binary(), "-v", "error", "-ss", "1.5", "-i", str(path), "-c", "copy", str(cut)], check=True)
    found = probe(cut)
    assert len(found.ticks) == 60
    (frames,) = decode(cut, [select_frames(found, 0.0, 2.0, 16)], (8, 8))
    assert numbers(frames)[0] == 36


def test_a_seek_changes_nothing(film: Film, tmp_path: Path) -> None:
    path = film(tmp_path / "long.mp4", *SHARP, *GREY, "-bf", "3", "-g", "10", seconds=5)
    found = probe(path)
    window = select_frames(found, 4.0, 1.0, 16)
    assert window.seek is not None
    (sought,) = decode(path, [window], (8, 8))
    everything = list(decode(path, [select_frames(found, start, 1.0, 16) for start in range(5)], (8, 8)))
    np.testing.assert_array_equal(sought, everything[4])
    assert numbers(sought)[0] == 96


def test_a_wrong_seek_is_read_again_from_the_start(film: Film, tmp_path: Path) -> None:
    from dataclasses import replace

    path = film(tmp_path / "long.mp4", *SHARP, *GREY, "-g", "10", seconds=3)
    window = select_frames(probe(path), 1.0, 1.0, 16)
    (frames,) = decode(path, [replace(window, seek=2.5)], (8, 8))
    assert numbers(frames)[0] == 24


@pytest.mark.parametrize("size", ["2x2", "17x33", "4x90", "640x16"])
def test_odd_and_tiny_sizes(film: Film, tmp_path: Path, size: str) -> None:
    path = film(tmp_path / "odd.mkv", "-c:v", "ffv1", size=size, seconds=1)
    (frames,) = decode(path, [select_frames(probe(path), 0.0, 1.0, 8)], (20, 24))
    assert frames.shape == (8, 20, 24, 3)
    assert numbers(frames) == [0, 3, 6, 9, 12, 15, 18, 21]


def test_rotation_and_pixel_shape(scene: Film, tmp_path: Path) -> None:
    """A stored rotation is applied, and pixels that are not square are made square before the crop."""
    path = tmp_path / "left.mp4"
    left = "color=black:size=64x32:rate=8:duration=1,drawbox=x=0:y=0:w=16:h=32:color=white:t=fill"
    base = [ffmpeg_binary(), "-v", "error", "-f", "lavfi", "-i", left, *SHARP]
    subprocess.run([*base, str(path)], check=True)
    turned = turn(path, tmp_path / "turned.mp4")
    (frames,) = decode(turned, [select_frames(probe(turned), 0.0, 1.0, 8)], (64, 32))
    rows = frames[0].mean(axis=(1, 2))
    assert max(rows[:16].mean(), rows[48:].mean()) > 200
    assert rows[20:44].mean() < 60
    wide = tmp_path / "wide.mp4"
    subprocess.run([*base, "-vf", "setsar=1/2", str(wide)], check=True)
    (square,) = decode(wide, [select_frames(probe(wide), 0.0, 1.0, 8)], (32, 32))
    # 64x32 pixels half as wide as high are a square picture: nothing is cropped, a quarter is white.
    assert square[0, :, :7].mean() > 200
    assert square[0, :, 9:].mean() < 60


def test_windows_are_full_ones(film: Film, tmp_path: Path) -> None:
    for suffix, seconds, count in (("mkv", 2.0, 2), ("mp4", 1.95, 1), ("mp4", 0.9, 0)):
        found = probe(film(tmp_path / f"{seconds}.{suffix}", *SHARP, *GREY, seconds=seconds))
        assert window_starts(found, 1.0) == [float(k) for k in range(count)]
    assert window_starts(found, 0.25, start=0.1, end=0.65) == [0.1, 0.35]


# --- bad films ---


def bad_film(kind: str, folder: Path, film: Film) -> Path:
    whole = film(folder / "whole.mp4", *SHARP, *GREY, "-movflags", "faststart", seconds=3)
    data = whole.read_bytes()
    path = folder / f"{kind}.mp4"
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("these are words, not pictures\n" * 20)
    elif kind == "truncated":
        path.write_bytes(data[: len(data) * 2 // 3])
    elif kind == "truncated_between_frames":
        # Cut where a packet ends, which no decoder can see.
        command = [
            ffmpeg_binary(),
            "-v",
            "error",
            "-i",
            str(whole),
            "-c",
            "copy",
            "-t",
            "1.5",
            "-movflags",
            "faststart",
        ]
        subprocess.run([*command, str(folder / "half.mp4")], check=True)
        tail = (folder / "half.mp4").read_bytes()[-64:]
        path.write_bytes(data[: data.index(tail) + 64])
    elif kind == "truncated_index":
        path.write_bytes(film(folder / "slow.mp4", *SHARP, *GREY, seconds=3).read_bytes()[: len(data) * 2 // 3])
    elif kind == "truncated_mkv":
        path = folder / "truncated.mkv"
        path.write_bytes(film(folder / "whole.mkv", *SHARP, *GREY, seconds=3).read_bytes()[: len(data) * 2 // 3])
    elif kind == "audio":
        sound = ["-f", "lavfi", "-i", "sine=duration=2", str(path)]
        subprocess.run([ffmpeg_binary(), "-v", "error", *sound], check=True)
    elif kind == "playlist":
        path.write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:3\n#EXTINF:3,\n{whole}\n#EXT-X-ENDLIST\n")
    elif kind == "concat":
        path.write_text(f"ffconcat version 1.0\nfile '{whole}'\n")
    elif kind == "missing":
        path = folder / "nobody.mp4"
    return path


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("empty", "empty_file"),
        ("text", "not_a_video"),
        ("truncated", "truncated"),
        ("truncated_between_frames", "truncated"),
        ("truncated_index", "truncated"),
        ("truncated_mkv", "truncated"),
        ("audio", "no_video_stream"),
        ("playlist", "not_a_video"),
        ("concat", "not_a_video"),
        ("missing", "film_missing"),
    ],
)
def test_bad_films_have_a_reason(film: Film, tmp_path: Path, kind: str, reason: str) -> None:
    with pytest.raises(DecodeError) as caught:
        probe(bad_film(kind, tmp_path, film))
    assert caught.value.reason == reason
    assert "\n" not in caught.value.detail
    assert ";" in caught.value.detail, "the line says the remedy"


def test_limits(film: Film, tmp_path: Path) -> None:
    path = film(tmp_path / "a.mp4", *SHARP, *GREY, size="64x64")
    for limits, reason in (
        (MediaLimits(max_pixels=64 * 64 - 1), "too_large"),
        (MediaLimits(max_frames=47), "too_large"),
        (MediaLimits(timeout=0.001), "timeout"),
    ):
        with pytest.raises(DecodeError) as caught:
            probe(path, limits)
        assert caught.value.reason == reason
    assert len(probe(path, MediaLimits(max_pixels=64 * 64, max_frames=48)).ticks) == 48
    with pytest.raises(DecodeError) as caught:
        list(decode(path, [select_frames(probe(path), 0, 1, 16)], (8, 8), MediaLimits(timeout=0.0005)))
    assert caught.value.reason == "timeout"


def test_damaged_pictures_are_noticed(film: Film, tmp_path: Path) -> None:
    path = film(tmp_path / "a.mp4", "-c:v", "libx264", "-g", "12", *GREY, "-bf", "0", seconds=3, size="320x240")
    found = probe(path)
    data = bytearray(path.read_bytes())
    middle = data.index(b"mdat") + len(data) // 2
    data[middle : middle + 400] = os.urandom(400)
    path.write_bytes(bytes(data))
    windows = [select_frames(found, start, 1.0, 24) for start in (0.0, 1.0, 2.0)]
    done: list[np.ndarray] = []
    with pytest.raises(DecodeError) as caught:
        done.extend(decode(path, windows, (16, 16)))
    assert caught.value.reason == "corrupt"
    assert len(done) >= 1, "the part before the damage is kept"


def test_no_process_is_left(film: Film, tmp_path: Path) -> None:
    path = film(tmp_path / "a.mp4", *SHARP, *GREY, seconds=3)
    found = probe(path)
    windows = [select_frames(found, start, 1.0, 16) for start in (0.0, 1.0, 2.0)]
    stream = decode(path, windows, (8, 8))
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
    names = [Path(f"/proc/{child}/comm").read_text() for child in children]
    assert not [name for name in names if "ffmpeg" in name]


def test_a_chosen_ffmpeg_must_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLFM_FFMPEG", "/nowhere/ffmpeg")
    with pytest.raises(DecodeError, match="no_ffmpeg: VLFM_FFMPEG=/nowhere/ffmpeg is no program"):
        ffmpeg_binary()
