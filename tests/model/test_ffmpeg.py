"""Which ffmpeg is used: tested before it is trusted, whatever its version prints, and what is wrong with others."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from model.ffmpeg import FRAME, TIME_BASE, Ffmpeg, NoFfmpeg, find_ffmpeg, killed_by, last_words, packet
from model.video import check_output, write_video
from tests.model.ffmpeg_shims import before_5_1, printing, refusing, saying, shim

SHOWINFO = {
    "4.4": "n:   0 pts:   2048 pts_time:0.125   pos:       48 fmt:yuv444p sar:1/1 s:64x48 i:P iskey:1 type:I ",
    "5.1": "n:   0 pts:   2048 pts_time:0.125   pos:       48 fmt:yuv444p sar:1/1 s:64x48 i:P iskey:1 type:I ",
    "6.0": "n:   0 pts:   2048 pts_time:0.125   duration:   1024 duration_time:0.0625  pos:       48 fmt:yuv444p "
    "cl:left sar:1/1 s:64x48 i:P iskey:1 type:I ",
    "7.0": "n:   0 pts:   2048 pts_time:0.125   duration:   1024 duration_time:0.0625  fmt:yuv444p cl:left sar:1/1 "
    "s:64x48 i:P iskey:1 type:I ",
    "9.0": "n:   0 pts:   2048 pts_time:0.125   duration:   1024 duration_time:0.0625  fmt:yuv444p cl:left sar:1/1 "
    "s:64x48 i:P iskey:1 type:I ",
}
LOADER = "error while loading shared libraries: libx264.so.164: cannot open shared object file: No such file"


@pytest.mark.parametrize("version", SHOWINFO)
def test_every_version_s_frames_are_read(version: str) -> None:
    frame = FRAME.search(f"[Parsed_showinfo_1 @ 0x5653bb988980] {SHOWINFO[version]}")
    assert frame is not None
    assert frame.groups() == ("2048", None if version < "6" else "1024")
    base = TIME_BASE.search("[Parsed_showinfo_1 @ 0x5653bb988980] config in time_base: 1/16384, frame_rate: 8/1")
    assert base is not None
    assert base[1] == "1/16384"


@pytest.mark.parametrize(
    "line", [f"    title           : {SHOWINFO['9.0']}", "[Parsed_showinfo_1 @ 0x5] n: 3 pts: NOPTS"]
)
def test_only_the_filter_itself_is_believed(line: str) -> None:
    assert FRAME.search(line) is None


def test_packets_are_read() -> None:
    assert packet(b"0,      -4096,          0,     2048,     1400, 0x9dcc4645") == (0, 2048, 1)
    assert packet(b"0,      -2048,       8192,     2048,      247, 0xaee57c37, F=0x0") == (8192, 2048, 0)
    assert packet(b"0, 0, 512, 0, 9, 0xaee57c37, F=0x5, S=1,        1, 0x00e000e0") == (512, 0, 5)
    with pytest.raises(ValueError, match="no packet"):
        packet(b"frame=1")


def test_the_end_of_a_process_has_words() -> None:
    assert [killed_by(status) for status in (0, 1, 8, 187, 228, 255)] == [None] * 6
    assert [killed_by(status) for status in (-9, 137, -11, 139)] == ["SIGKILL", "SIGKILL", "SIGSEGV", "SIGSEGV"]
    told = "Input #0, mov\n  Stream #0:0: Video\n[mov @ 0x1] Invalid data found\nConversion failed!\n"
    assert last_words(1, told) == "Invalid data found"
    assert last_words(1, "") == "it ended with status 1 and no message"


def system(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Makes the ffmpeg in `folder` the system's."""
    monkeypatch.delenv("VLFM_FFMPEG", raising=False)
    monkeypatch.setenv("PATH", f"{folder}:/bin")


def test_a_good_system_ffmpeg_is_taken_and_tested_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    path = shim(tmp_path / "ffmpeg", f'echo run >> {tmp_path}/runs\nexec "$REAL" "$@"')
    system(monkeypatch, tmp_path)
    found = find_ffmpeg()
    assert found.path == str(path)
    assert found.version
    assert "\n" not in found.version
    assert find_ffmpeg() is found
    assert len((tmp_path / "runs").read_text().split()) <= 4
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("script", "why"),
    [
        (saying(f"ffmpeg: {LOADER}", 127), LOADER),
        ("kill -9 $$", "cannot start: killed by SIGKILL"),
        ("exit 1", "cannot start: it ended with status 1 and no message; reinstall it"),
        (
            refusing("format_whitelist"),
            "failed its test: it cannot list packets (Unrecognized option 'format_whitelist'",
        ),
        (printing("sed -u '/showinfo.* n:/d'"), "showinfo prints no times that are understood"),
        ('"$REAL" "$@" | LC_ALL=C tr "\\214" x; exit "${PIPESTATUS[0]}"', "it decodes other pictures than it wrote"),
    ],
    ids=["loader", "killed", "silent", "option", "times", "pictures"],
)
def test_a_bad_system_ffmpeg_gives_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], script: str, why: str
) -> None:
    pytest.importorskip("imageio_ffmpeg")
    path = shim(tmp_path / "ffmpeg", script)
    system(monkeypatch, tmp_path)
    assert "imageio_ffmpeg" in find_ffmpeg().path
    find_ffmpeg()
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(str(path))
    assert why in line
    assert line.endswith("is used instead")
    monkeypatch.setenv("VLFM_FFMPEG", str(path))
    with pytest.raises(NoFfmpeg) as caught:
        find_ffmpeg()
    assert str(path) in str(caught.value)
    assert why in str(caught.value)
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith("unset it or name another ffmpeg")


def test_where_none_works_all_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("imageio_ffmpeg")
    (tmp_path / "ffmpeg").write_bytes(b"\x7fELF of another machine")
    (tmp_path / "ffmpeg").chmod(0o755)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(shim(tmp_path / "wheel", saying(LOADER, 127))))
    system(monkeypatch, tmp_path)
    with pytest.raises(NoFfmpeg) as caught:
        find_ffmpeg()
    assert f"{tmp_path}/ffmpeg cannot start: Exec format error; reinstall it" in str(caught.value)
    assert f"{tmp_path}/wheel cannot start: {LOADER}; reinstall it" in str(caught.value)


def test_what_may_not_be_run_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ffmpeg").write_text("#!/bin/sh\n")
    monkeypatch.setenv("VLFM_FFMPEG", str(tmp_path / "ffmpeg"))
    with pytest.raises(NoFfmpeg, match=r"is no program that may be run; chmod \+x it"):
        find_ffmpeg()


def test_an_old_option_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_ffmpeg().sync_option in ("fps_mode", "vsync")
    monkeypatch.setenv("VLFM_FFMPEG", str(shim(tmp_path / "ffmpeg", before_5_1())))
    assert find_ffmpeg().sync_option == "vsync"


def test_colours_in_messages_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AV_LOG_FORCE_COLOR", "1")
    monkeypatch.setenv("VLFM_FFMPEG", str(shim(tmp_path / "ffmpeg", 'exec "$REAL" "$@"')))
    assert isinstance(find_ffmpeg(), Ffmpeg)


def test_an_mp4_takes_the_encoder_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = """[ "$2" = -encoders ] && echo ' V....D mpeg4 MPEG-4' && exit\nexec "$REAL" "$@\""""
    monkeypatch.setenv("VLFM_FFMPEG", str(shim(tmp_path / "some" / "ffmpeg", listed)))
    frames = np.full((4, 32, 32, 3), 90, np.uint8)
    assert b"mp4v" in write_video(tmp_path / "a.mp4", frames, 8).read_bytes()
    monkeypatch.setenv("VLFM_FFMPEG", str(shim(tmp_path / "none" / "ffmpeg", listed.replace("mpeg4 ", "flv "))))
    assert find_ffmpeg().version, "decoding works"
    with pytest.raises(NoFfmpeg, match=r"has no encoder for an mp4 \(libx264, libopenh264, mpeg4\); write a .gif"):
        check_output(tmp_path / "b.mp4")
    check_output(tmp_path / "b.gif")
