"""Films and animations, written and read back."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from model.ffmpeg import NoFfmpeg, find_ffmpeg
from model.video import check_output, ffmpeg_binary, from_frames, picture_bytes, to_frames, write_video
from tests.model.ffmpeg_shims import shim


def frames(count: int = 12, height: int = 32, width: int = 48) -> np.ndarray:
    """A bright bar that moves to the right over a colour that fades."""
    pictures = np.zeros((count, height, width, 3), np.uint8)
    for k in range(count):
        pictures[k] = [40 + 10 * (k % 12), 60, 200 - 10 * (k % 12)]
        left = k * (width - 8) // max(count - 1, 1)
        pictures[k, :, left : left + 8] = 250
    return pictures


def read_back(path: Path) -> tuple[np.ndarray, float]:
    """Frames and frame rate as ffmpeg finds them in the file."""
    command = [ffmpeg_binary(), "-i", str(path), f"-{find_ffmpeg().sync_option}", "passthrough"]
    command += ["-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    run = subprocess.run(command, capture_output=True, check=True)
    told = re.search(r"Video: h264.*?yuv420p.*?, (\d+)x(\d+).*?, ([\d.]+) fps", run.stderr.decode())
    assert told is not None, run.stderr.decode()
    pictures = np.frombuffer(run.stdout, np.uint8).reshape(-1, int(told[2]), int(told[1]), 3)
    return pictures, float(told[3])


@pytest.mark.parametrize(("size", "rate"), [((32, 48), 24.0), ((31, 47), 12.0), ((64, 33), 29.97), ((18, 16), 7.5)])
def test_an_mp4_has_the_frames_the_size_and_the_rate(tmp_path: Path, size: tuple[int, int], rate: float) -> None:
    film = frames(12, *size)
    path = write_video(tmp_path / "deep" / "film.mp4", film, rate)
    found, found_rate = read_back(path)
    height, width = size
    assert found.shape == (12, height + height % 2, width + width % 2, 3)
    assert found_rate == pytest.approx(rate, abs=0.01)
    # Chroma is halved, so edges of colour differ; the pictures are the ones that were written, in their order.
    errors = [[np.abs(a.astype(int) - b).mean() for b in film] for a in found[:, :height, :width]]
    assert [int(np.argmin(row)) for row in errors] == list(range(12))
    assert max(row[k] for k, row in enumerate(errors)) < 12
    assert list(path.parent.iterdir()) == [path], "no unfinished file stays"


def length(data: bytes) -> tuple[int, int]:
    """Milliseconds an animation lasts, and its pictures."""
    with Image.open(BytesIO(data)) as film:
        total = 0
        for k in range(getattr(film, "n_frames", 1)):
            film.seek(k)
            film.load()
            total += film.info["duration"]
        return total, k + 1


@pytest.mark.parametrize("kind", ["gif", "webp"])
@pytest.mark.parametrize("rate", [8, 12, 24, 30, 48])
def test_animations_last_as_long_as_they_should(kind: str, rate: int) -> None:
    count = 2 * rate
    lasts, pictures = length(picture_bytes(frames(count), rate, kind))
    assert lasts == 2000
    assert pictures == count


def test_a_gif_of_many_frames_a_second_is_thinned_not_slowed() -> None:
    lasts, pictures = length(picture_bytes(frames(240, width=256), 120, "gif"))
    assert lasts == 2000
    assert pictures == 100


def test_webp_shows_the_frames() -> None:
    film = frames(5)
    with Image.open(BytesIO(picture_bytes(film, 10, "webp"))) as read:
        for k, frame in enumerate(film):
            read.seek(k)
            assert np.abs(np.asarray(read.convert("RGB")).astype(int) - frame).mean() < 8


def test_a_png_is_a_strip_of_the_very_frames(tmp_path: Path) -> None:
    film = frames(4, 6, 10)
    strip = np.asarray(Image.open(write_video(tmp_path / "strip.png", film, 8)))
    assert strip.shape == (6, 40, 3)
    np.testing.assert_array_equal(strip[:, 20:30], film[2])


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".png", ".GIF"])
def test_pictures_need_no_ffmpeg(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("VLFM_FFMPEG", str(tmp_path / "nowhere"))
    assert write_video(tmp_path / f"film{suffix}", frames(3), 8).stat().st_size > 100
    with pytest.raises(NoFfmpeg, match=r"^VLFM_FFMPEG=.*nowhere is no program; unset it or name an ffmpeg$"):
        write_video(tmp_path / "film.mp4", frames(3), 8)
    assert not (tmp_path / "film.mp4").exists()


def test_without_a_system_ffmpeg_the_bundled_one_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("imageio_ffmpeg")
    monkeypatch.delenv("VLFM_FFMPEG", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "imageio_ffmpeg" in ffmpeg_binary()


@pytest.mark.parametrize("suffix", [".mp4", ".webp", ".png"])
def test_batches_make_the_same_file(tmp_path: Path, suffix: str) -> None:
    film = frames(12, 31, 47)
    whole = write_video(tmp_path / f"whole{suffix}", film, 12)
    parts = write_video(tmp_path / f"parts{suffix}", iter([film[:0], film[:5], film[5:6], film[6:]]), 12)
    assert parts.read_bytes() == whole.read_bytes()


def test_what_fails_on_the_way_leaves_nothing(tmp_path: Path) -> None:
    def batches() -> Iterator[np.ndarray]:
        yield frames(3)
        raise RuntimeError("the film ends here")

    with pytest.raises(RuntimeError, match="the film ends here"):
        write_video(tmp_path / "film.mp4", batches(), 12)
    with pytest.raises(ValueError, match="there are no frames"):
        write_video(tmp_path / "film.mp4", iter([]), 12)
    assert list(tmp_path.iterdir()) == []


def test_a_film_names_its_colours(tmp_path: Path) -> None:
    """Red is red again, whichever matrix a player would have guessed; what an odd size lacks is no black line."""
    red = np.full((3, 33, 33, 3), (220, 30, 40), np.uint8)
    path = write_video(tmp_path / "red.mp4", red, 8)
    told = subprocess.run([ffmpeg_binary(), "-i", str(path)], capture_output=True).stderr.decode()
    assert "bt709" in told
    found, _ = read_back(path)
    assert found.shape[1:] == (34, 34, 3)
    assert np.abs(found.astype(int) - red[0, 0, 0]).max() <= 3


@pytest.mark.parametrize(
    ("fails", "why"),
    [
        ("cat > /dev/null; echo first >&2; echo the disk is full >&2; exit 1", "the disk is full"),
        ("cat > /dev/null; echo first >&2; kill -9 $$", r"killed by SIGKILL \(out of memory\?\)"),
        ("exit 7", "it ended with status 7 and no message"),
    ],
)
def test_a_failing_ffmpeg_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str, why: str) -> None:
    script = f'case "$*" in *film.part.mp4*) {fails};; esac\nexec "$REAL" "$@"'
    monkeypatch.setenv("VLFM_FFMPEG", str(shim(tmp_path / "ffmpeg", script)))
    with pytest.raises(OSError, match=rf"^ffmpeg could not write .*film.mp4: {why}$"):
        write_video(tmp_path / "film.mp4", frames(3), 8)
    assert not (tmp_path / "film.mp4").exists()


@pytest.mark.parametrize(
    ("name", "rate", "count", "message"),
    [
        ("film.avi", 8.0, 3, r"film.avi: cannot write .avi; use .mp4, .gif, .webp, .png"),
        ("film", 8.0, 3, r"film: cannot write a file without suffix"),
        ("film.gif", 0.0, 3, r"fps is 0.0; it must be a number above 0"),
        ("film.gif", float("nan"), 3, r"fps is nan"),
        ("film.mp4", float("inf"), 3, r"fps is inf"),
        ("film.gif", 8.0, 0, r"film.gif: there are no frames to write; ask for a longer --duration"),
    ],
)
def test_what_cannot_be_written_is_said(tmp_path: Path, name: str, rate: float, count: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write_video(tmp_path / name, frames(count), rate)
    assert list(tmp_path.iterdir()) == []


def test_outputs_can_be_checked_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_output(tmp_path / "film.webp")
    with pytest.raises(ValueError, match=r"cannot write .mov"):
        check_output(tmp_path / "film.mov")
    monkeypatch.setenv("VLFM_FFMPEG", "nowhere")
    check_output(tmp_path / "film.gif")
    with pytest.raises(NoFfmpeg):
        check_output(tmp_path / "film.mp4")


def test_frames_and_pictures_are_the_same_thing() -> None:
    every = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3)
    pictures = from_frames(every)
    assert pictures.shape == (1, 3, 16, 16)
    assert (pictures.min(), pictures.max()) == (-1, 1)
    np.testing.assert_array_equal(to_frames(pictures), every)
    assert to_frames(torch.tensor([[[[9.0]], [[-9.0]], [[0.0]]]])).ravel().tolist() == [255, 0, 128]
