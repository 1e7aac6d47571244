"""Films at other frame rates: what is shown when, at which size, and every slip as one line."""

from __future__ import annotations

import dataclasses
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from model.ffmpeg import NoFfmpeg, find_ffmpeg
from model.video import from_frames, to_frames
from pipeline.interpolate import film as module
from pipeline.interpolate.film import FilmReader, codec_named, frame_size, interpolate, wanted_times
from pipeline.media.decode import decode, ffmpeg_binary, probe, shown_size, window_of
from pipeline.media.faults import DecodeError, MediaLimits
from pipeline.recipes import recipe_named
from tests.model.tiny_diffusion import tiny_diffusion
from tests.pipeline.conftest import turn

Film = Callable[..., Path]
SHARP = ("-c:v", "libx264", "-qp", "0", "-preset", "ultrafast", "-pix_fmt", "yuv444p")


def psnr(made: np.ndarray, true: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.square(made.astype(np.float64) - true).mean()))


def whole(reader: FilmReader) -> np.ndarray:
    count = len(reader.probe.ticks)
    windows = [window_of(reader.probe, np.arange(k, min(k + 16, count))) for k in range(0, count, 16)]
    return np.concatenate(list(decode(reader.path, windows, reader.size)))


def read_at(reader: FilmReader, times: np.ndarray, known: np.ndarray | None = None) -> np.ndarray:
    return np.concatenate(list(reader.frames_at(times, known)))


def strip(path: Path, width: int) -> np.ndarray:
    """The frames of a .png that interpolate wrote."""
    picture = np.asarray(Image.open(path))
    return picture.reshape(picture.shape[0], -1, width, 3).swapaxes(0, 1)


@pytest.fixture(scope="module")
def smooth(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A film of 70 frames at 48 a second: brightness that swings gently, differently in every place. 31 x 45 pixels."""
    path = tmp_path_factory.mktemp("smooth") / "smooth.mkv"
    source = "nullsrc=size=31x45:rate=48:duration=1.4583,format=gray,geq=lum='128+90*sin(X/9+Y/13+N/7)'"
    command = [ffmpeg_binary(), "-v", "error", "-f", "lavfi", "-i", source, "-vf", "scale=out_range=full"]
    subprocess.run([*command, "-color_range", "pc", "-c:v", "ffv1", str(path)], check=True)
    return path


@pytest.fixture(scope="module")
def cut(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 dark frames, then 30 bright ones, at 24 a second, both with motion."""
    path = tmp_path_factory.mktemp("cut") / "cut.mkv"
    source = "nullsrc=size=32x32:rate=24:duration=2.5,format=gray,geq=lum='(20+150*gte(N,30))+40*sin(X/5+N/4)*gt(Y,9)'"
    subprocess.run([ffmpeg_binary(), "-v", "error", "-f", "lavfi", "-i", source, "-c:v", "ffv1", str(path)], check=True)
    return path


def test_hidden_frames_of_smooth_motion_are_found_again(smooth: Path) -> None:
    reader = FilmReader(smooth)
    every, times = whole(reader), reader.probe.times
    seen, hidden = np.arange(0, 70, 4), np.arange(2, 66, 4)
    made = psnr(read_at(reader, times[hidden], seen), every[hidden])
    held = psnr(every[seen[: len(hidden)]], every[hidden])
    straight = psnr((every[hidden - 2].astype(float) + every[hidden + 2]) / 2, every[hidden])
    assert reader.methods == {"cubic": 1}, "smooth motion is for the spline"
    assert made > straight + 3 > held + 10
    linear = FilmReader(smooth, method="linear")
    assert psnr(read_at(linear, times[hidden], seen), every[hidden]) == pytest.approx(straight, abs=0.5)


def test_the_films_own_frames_come_out_as_they_went_in(smooth: Path, tmp_path: Path) -> None:
    """An odd size, several chunks, and every second frame of a doubled rate."""
    reader = FilmReader(smooth)
    done = interpolate(reader, tmp_path / "a.png", 96)
    frames = strip(tmp_path / "a.png", 31)
    assert (done.frames, done.size, done.film_frames, done.cuts, done.codec) == (140, (45, 31), 70, (), "linear-f1-c3")
    assert len(frames) == 140
    assert np.abs(frames[::2].astype(int) - whole(reader)).max() <= 2
    np.testing.assert_array_equal(frames[139], frames[138], "after the last frame that one stays")
    between = (frames[0:138:2].astype(float) + frames[2::2]) / 2
    assert np.abs(frames[1:138:2] - between).max() < 6


def test_a_part_is_the_same_part_of_the_whole(smooth: Path, tmp_path: Path) -> None:
    times = wanted_times(probe(smooth), 60)
    reader = FilmReader(smooth)
    all_of_it = read_at(reader, times)
    done = interpolate(reader, tmp_path / "part.png", 60, start=0.5, duration=0.25)
    part = strip(tmp_path / "part.png", 31)
    assert done.frames == len(part) == 15
    assert np.abs(part.astype(int) - all_of_it[30:45]).max() <= 1
    assert interpolate(reader, tmp_path / "end.png", 60, start=1.4, duration=9).frames == 4


def test_chunks_are_made_smaller_where_pictures_are_large(smooth: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    times = wanted_times(probe(smooth), 100)
    large = read_at(FilmReader(smooth), times)
    monkeypatch.setattr(module, "HELD", 1)
    monkeypatch.setattr(module, "DECODED", 20)
    held = 0

    class Watched(FilmReader):
        def _chunks(self, known: np.ndarray):  # type: ignore[no-untyped-def]
            nonlocal held
            for chunk in super()._chunks(known):
                held = max(held, len(chunk.times))
                yield chunk

    small = read_at(Watched(smooth), times)
    assert held == 4
    assert np.abs(small.astype(int) - large).max() <= 2


def test_nothing_is_blended_across_a_cut(cut: Path) -> None:
    times = np.arange(28, 32, 0.25) / 24
    reader = FilmReader(cut)
    frames = read_at(reader, times)
    assert reader.cuts == [1.25]
    top = frames[:, :9].mean(axis=(1, 2, 3))
    assert np.ptp(top[:8]) < 2, "the first shot stays until the cut's own time"
    assert np.ptp(top[8:]) < 2
    assert top[8] - top[7] > 100
    np.testing.assert_array_equal(frames[4], frames[7], "its last frame is held")
    every = whole(reader)
    assert np.abs(frames[::4].astype(int) - every[28:32]).max() <= 4
    blended = FilmReader(cut, blend_cuts=True)
    mixed = read_at(blended, times)[:, :9].mean(axis=(1, 2, 3))
    assert blended.cuts == []
    assert top[7] + 20 < mixed[6] < top[8] - 20


def test_times_that_are_not_regular_are_real(film: Film, tmp_path: Path) -> None:
    kept = [0, 1, 2, 7, 9, 10, 19, 20, 33, 34, 40, 47]
    chosen = "+".join(f"eq(n,{k})" for k in kept)
    output = ("-vf", f"select='{chosen}',scale=out_range=full", f"-{find_ffmpeg().sync_option}", "vfr", *SHARP)
    path = film(tmp_path / "vfr.mp4", *output, "-color_range", "pc", rate="48", seconds=1)
    reader = FilmReader(path)
    frames = read_at(reader, np.arange(47) / 48)
    # Frame k of the film is grey 1.3 k, so the path is a straight line through real time.
    np.testing.assert_allclose(frames.mean(axis=(1, 2, 3)), 1.3 * np.arange(47), atol=1.5)
    assert reader.methods == {"linear": 1}


def test_a_single_frame_and_a_codec_that_wants_multiples(film: Film, tmp_path: Path) -> None:
    path = film(tmp_path / "one.mp4", *SHARP, "-vf", "scale=31:23,setsar=1", seconds=0.04)
    done = interpolate(FilmReader(path, codec=codec_named("linear")), tmp_path / "one.png", 100)
    assert (done.film_frames, done.size) == (1, (23, 31))
    assert strip(tmp_path / "one.png", 31).shape[1:] == (23, 31, 3)


def test_latents_of_a_network_are_interpolated(film: Film, tmp_path: Path) -> None:
    """Through a folder in Stable Diffusion format; its own decoder makes the pictures, at an odd size."""
    path = film(tmp_path / "a.mkv", *SHARP, "-vf", "scale=31:23,setsar=1", rate="12", seconds=0.5)
    folder = tiny_diffusion(tmp_path / "weights")
    reader = FilmReader(path, codec=codec_named(str(folder)), method="linear")
    codec = reader.codec.load()
    pictures = np.pad(whole(reader), ((0, 0), (0, -23 % codec.factor), (0, -31 % codec.factor), (0, 0)), mode="edge")
    with torch.no_grad():
        latents = codec.encode(from_frames(pictures)).latents
        wanted = to_frames(codec.decode((latents[2:3] + latents[3:4]) / 2))[:, :23, :31]
    made = read_at(reader, reader.probe.times[2:4].mean(keepdims=True))
    assert np.abs(made.astype(int) - wanted).max() <= 3
    assert np.abs(wanted.astype(int) - to_frames(codec.decode(latents[:1]))[:, :23, :31]).max() > 3, "frames differ"


def test_pixels_that_are_not_square_are_shown_square(scene: Film, tmp_path: Path) -> None:
    path = scene(tmp_path / "wide.mp4", "-vf", "setsar=4/3", *SHARP, size="60x40", seconds=0.5)
    assert shown_size(path) == (40, 80)
    assert FilmReader(path).size == (40, 80)
    turned = turn(path, tmp_path / "turned.mp4")
    height, width = shown_size(turned)
    assert height > width, "on its side, as a phone records"


@pytest.mark.parametrize(
    ("size", "wanted"), [(None, (90, 160)), ("45", (45, 80)), ("24x32", (24, 32)), ("24X32", (24, 32))]
)
def test_sizes(size: str | None, wanted: tuple[int, int]) -> None:
    assert frame_size(size, (90, 160)) == wanted


@pytest.mark.parametrize("size", ["0", "x", "24x", "-3", "2x3x4", "1e3", "99999", ""])
def test_bad_sizes(size: str) -> None:
    with pytest.raises(ValueError, match=r"size is '.*'; it must be HxW, as in 240x320"):
        frame_size(size, (90, 160))


def test_codecs_by_name() -> None:
    assert codec_named("pixels") == {"kind": "linear", "factor": 1, "channels": 3}
    assert codec_named("linear")["kind"] == "linear"
    assert codec_named("stable_diffusion") == recipe_named("stable_diffusion").codec
    assert codec_named("stabilityai/x") == {"kind": "diffusers", "source": "stabilityai/x", "inversion_depth": 0}
    with pytest.raises(
        ValueError,
        match=r"codec 'magic' is neither 'pixels', a folder nor a hub id, .* the recipes are: combinations, demo",
    ):
        codec_named("magic")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"fps": 0}, "fps is 0; it must be above 0 and at most 1000"),
        ({"fps": float("nan")}, "fps is nan"),
        ({"fps": 1000.5}, "fps is 1000.5"),
        ({"start": -1}, "start is -1 s; the film lasts from 0 to 1.458"),
        ({"start": 2}, "start is 2 s"),
        ({"start": float("nan")}, "start is nan s"),
        ({"duration": 0}, "duration is 0 s; it must be above 0"),
        ({"duration": float("nan")}, "duration is nan s"),
        ({"out": "a.avi"}, r"a.avi: cannot write .avi; use .mp4"),
    ],
)
def test_bad_arguments_name_themselves(
    smooth: Path, tmp_path: Path, arguments: dict[str, object], message: str
) -> None:
    given = {"out": "a.png", "fps": 24, **arguments}
    with pytest.raises(ValueError, match=message):
        interpolate(FilmReader(smooth), tmp_path / str(given.pop("out")), **given)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []
    long = dataclasses.replace(probe(smooth), last_duration=2000.0)
    with pytest.raises(ValueError, match=r"2001.* s at 1000 fps are 200\d{4} frames; at most 1000000"):
        wanted_times(long, 1000)


def test_bad_films_keep_their_words(smooth: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="method is 'lstsq'; it must be one of auto, cubic"):
        FilmReader(smooth, method="lstsq")
    (tmp_path / "text.mp4").write_text("no film")
    with pytest.raises(DecodeError, match="not_a_video"):
        FilmReader(tmp_path / "text.mp4")
    with pytest.raises(DecodeError, match="film_missing"):
        FilmReader(tmp_path / "nothing.mp4")
    with pytest.raises(DecodeError, match="too_large"):
        FilmReader(smooth, limits=MediaLimits(max_frames=10))
    data = smooth.read_bytes()
    (tmp_path / "short.mkv").write_bytes(data[: len(data) * 2 // 3])
    with pytest.raises(DecodeError, match="truncated"):
        interpolate(FilmReader(tmp_path / "short.mkv"), tmp_path / "short.mp4", 50)
    reader = FilmReader(smooth)
    (tmp_path / "away.mkv").write_bytes(data)
    gone = FilmReader(tmp_path / "away.mkv")
    (tmp_path / "away.mkv").unlink()
    with pytest.raises(DecodeError, match="film_missing"):
        interpolate(gone, tmp_path / "away.mp4", 50)
    assert not list(tmp_path.glob("*.mp4"))[1:], "only text.mp4: nothing half-written stays"
    monkeypatch.setenv("VLFM_FFMPEG", "nowhere")
    with pytest.raises(NoFfmpeg, match="VLFM_FFMPEG=nowhere is no program"):
        interpolate(reader, tmp_path / "a.mp4", 50)


def test_a_real_film_at_twice_its_rate(real_films: Path) -> None:
    """Every second frame hidden, carphone at 48 x 64: above the frame before it, and no worse than an even blend."""
    reader = FilmReader(real_films / "carphone.mp4", size="48x64")
    every, times = whole(reader), reader.probe.times
    seen, hidden = np.arange(0, 120, 2), np.arange(1, 118, 2)
    made = psnr(read_at(reader, times[hidden], seen), every[hidden])
    blend = psnr((every[hidden - 1].astype(float) + every[hidden + 1]) / 2, every[hidden])
    assert made > blend - 0.05
    assert made > psnr(every[hidden - 1], every[hidden]) + 2
