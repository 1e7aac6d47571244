"""A film is never blamed for its ffmpeg: what befalls the tool is tried again and not remembered of the film."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from model.ffmpeg import find_ffmpeg
from pipeline.ingest.environment import LASTING
from pipeline.media import faults
from pipeline.media.decode import decode, probe, select_frames, shown_size, window_starts
from pipeline.media.faults import DecodeError, MediaLimits, cut_short, digest_of
from storage.fingerprint import file_digest
from tests.model.ffmpeg_shims import OF_5_1, before_5_1, printing, refusing, saying, shim

Film = Callable[..., Path]
SHARP = ("-c:v", "libx264", "-qp", "0", "-preset", "ultrafast", "-bf", "2")
AV1 = "  Stream #0:0: Video: av1 (Main) (av01), 64x48, 24 fps"

TOOL = {
    "killed": ("kill -9 $$", "decoder_failed", "killed by SIGKILL"),
    "crashed": ("kill -SEGV $$", "decoder_failed", "killed by SIGSEGV"),
    "crashed_in_a_shell": (saying("Input #0, mov, from 'a'", 139), "decoder_failed", "killed by SIGSEGV"),
    "loader": (
        saying("ffmpeg: error while loading shared libraries: libx264.so.164: cannot open", 127),
        "decoder_failed",
        "libx264.so.164",
    ),
    "option": (refusing("copyts"), "decoder_failed", "Unrecognized option 'copyts'"),
    "filter": (saying("[AVFilterGraph @ 0x5] No such filter: 'showinfo'", 8), "decoder_failed", "No such filter"),
    "decoder_5": (
        saying(f"{AV1}\nDecoder (codec av1) not found for input stream #0:0", 1),
        "decoder_failed",
        "Decoder (codec av1) not found",
    ),
    "decoder_9": (
        saying(f"{AV1}\n[vist#0:0/av1 @ 0x5] Decoding requested, but no decoder found for: av1", 8),
        "decoder_failed",
        "no decoder found for: av1",
    ),
    "full_disk": (saying("Error writing trailer: No space left on device", 228), "decoder_failed", "No space left"),
    "memory": (saying(f"{AV1}\nError: Cannot allocate memory", 244), "decoder_failed", "Cannot allocate memory"),
    "silent": ("exit 1", "decoder_failed", "status 1 and no message"),
    "disk": (saying("file:a.mp4: Input/output error", 1), "unreadable", "Input/output error"),
    "descriptors": (saying("file:a.mp4: Too many open files", 1), "unreadable", "Too many open files"),
}


@pytest.mark.parametrize("fault", TOOL)
def test_what_befalls_the_tool_is_not_the_film_s(
    film: Film, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    path = film(tmp_path / "a.mp4", *SHARP)
    window = select_frames(probe(path), 0.0, 1.0, 8)
    script, reason, words = TOOL[fault]
    monkeypatch.setenv("VLFM_FFMPEG", str(shim(tmp_path / "ffmpeg", script, only_films=True)))
    for read in (lambda: probe(path), lambda: list(decode(path, [window], (8, 8))), lambda: shown_size(path)):
        with pytest.raises(DecodeError) as caught:
            read()
        assert (caught.value.reason, words in caught.value.detail) == (reason, True), caught.value.detail
        assert caught.value.reason not in LASTING
        assert "\n" not in caught.value.detail
        assert "; " in caught.value.detail, "the line says the remedy"
        if reason == "decoder_failed":
            assert f"ffmpeg {find_ffmpeg().version}: " in caught.value.detail


def test_an_ffmpeg_that_went_away(film: Film, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = film(tmp_path / "a.mp4", *SHARP)
    other = shim(tmp_path / "ffmpeg", 'exec "$REAL" "$@"')
    monkeypatch.setenv("VLFM_FFMPEG", str(other))
    probe(path)
    other.unlink()
    with pytest.raises(
        DecodeError, match=r"decoder_failed: .*ffmpeg cannot start: No such file or directory; run again"
    ):
        probe(path)


def test_frames_without_times_fail_soon(film: Film, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    avi, mp4 = film(tmp_path / "a.avi", *SHARP), film(tmp_path / "a.mp4", *SHARP)
    window = select_frames(probe(mp4), 0.0, 1.0, 8)
    silent = shim(tmp_path / "ffmpeg", printing("sed -u '/showinfo.* n:/d'"), only_films=True)
    monkeypatch.setenv("VLFM_FFMPEG", str(silent))
    begin = time.monotonic()
    with pytest.raises(DecodeError, match=r"decoder_failed: ffmpeg .*: 8 frames came and 0 times in the window at 0 s"):
        list(decode(mp4, [window], (8, 8)))
    assert time.monotonic() - begin < 20, "not the 30 seconds that it was waited for times"
    with pytest.raises(DecodeError, match=r"decoder_failed: ffmpeg .*: it prints no times"):
        probe(avi)


@pytest.mark.parametrize("version", ["4.4", "5.1"])
@pytest.mark.parametrize("suffix", ["mp4", "avi"])
def test_films_are_the_same_to_older_versions(
    film: Film, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str, suffix: str
) -> None:
    path = film(tmp_path / f"a.{suffix}", *SHARP, seconds=3)
    found = probe(path)
    windows = [select_frames(found, start, 1.0, 16) for start in window_starts(found, 1.0)]
    frames = list(decode(path, windows, (8, 12)))
    script = before_5_1() if version == "4.4" else printing(f"sed -u '{OF_5_1}'")
    monkeypatch.setenv("VLFM_FFMPEG", str(shim(tmp_path / "ffmpeg", script)))
    again = probe(path)
    np.testing.assert_array_equal(again.ticks, found.ticks)
    assert again.last_duration == pytest.approx(found.last_duration), "the median of the others where none is printed"
    for one, other in zip(decode(path, windows, (8, 12)), frames, strict=True):
        np.testing.assert_array_equal(one, other)


# --- bounds of reading the file itself ---


def test_boxes_are_counted_and_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "boxes.mp4"
    path.write_bytes(b"\0\0\0\x08ftyp" + b"\0\0\0\x08free" * 2000 + b"\0\0\xff\xffmdat")
    assert cut_short(path, 60)
    monkeypatch.setattr(faults, "MOST_BOXES", 1000)
    assert not cut_short(path, 60), "not known of so many boxes"
    with pytest.raises(DecodeError, match=r"timeout: reading boxes.mp4 took over 0 s; raise timeout"):
        cut_short(path, 0)


def test_the_digest_is_bounded_by_the_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(bytes(3 * 2**20))
    assert digest_of(path, MediaLimits(timeout=1e-9)) == file_digest(path), "what its bytes take at a slow disk is free"
    monkeypatch.setattr(faults, "SLOWEST", 2**60)
    with pytest.raises(DecodeError, match=r"timeout: reading all bytes of a.bin .*; copy it to a faster disk or raise"):
        digest_of(path, MediaLimits(timeout=1e-9))


def test_files_that_are_too_large_or_no_files(tmp_path: Path) -> None:
    sparse = tmp_path / "sparse.mp4"
    with sparse.open("wb") as file:
        file.truncate(2**39)
    with pytest.raises(DecodeError, match=r"too_large: 549755813888 bytes; .* or raise max_bytes"):
        probe(sparse)
    with pytest.raises(DecodeError, match=r"^(?!too_large)"):
        probe(sparse, MediaLimits(max_bytes=2**40))
    os.mkfifo(tmp_path / "pipe.mp4")
    with pytest.raises(DecodeError, match=r"unreadable: pipe.mp4 is no regular file"):
        probe(tmp_path / "pipe.mp4")
