"""What a film may cost: memory and time do not grow with what it claims, and the line says which limit it met."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from model.ffmpeg import find_ffmpeg
from pipeline.interpolate.blend import readout_matrix
from pipeline.interpolate.film import FilmReader
from pipeline.media.decode import Probe, decode, probe, select_frames, window_count, window_starts
from pipeline.media.faults import DecodeError, MediaLimits
from pipeline.recipes import DataRecipe
from tests.model.ffmpeg_shims import shim

Film = Callable[..., Path]
SHARP = ("-c:v", "libx264", "-qp", "0", "-preset", "ultrafast")
PLAN = """
import json, resource, sys, time
resource.setrlimit(resource.RLIMIT_AS, (16 * 2**30,) * 2)
from pipeline.ingest.plan import plan_ingest
from pipeline.sources.folders import discover
from storage.layout import Lake
from pipeline.recipes import linear
before, begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
plan = plan_ingest(Lake.create(sys.argv[1] + "/lake"), discover(sys.argv[1] + "/films"), linear())
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
told = {"seconds": time.monotonic() - begin, "grown": grown, "starts": [clip.window.start for clip in plan.clips]}
print(json.dumps(told | {"failures": [(failure.reason, failure.detail) for failure in plan.failures]}))
"""


def jumping(film: Film, path: Path, jump: str) -> Path:
    """A film of 4 s and 96 frames whose times jump by `jump` seconds after 2 s."""
    later = f"scale=out_range=full,settb=1/1000,setpts='N*1000/24+gte(N,48)*{jump}*1000'"
    sync = (f"-{find_ffmpeg().sync_option}", "passthrough", "-enc_time_base", "1/1000", "-bf", "0")
    return film(path, "-vf", later, *sync, *SHARP, "-pix_fmt", "yuv444p", "-color_range", "pc", seconds=4)


@pytest.mark.parametrize("jump", ["1e6", "2e9"])
def test_a_jump_of_times_costs_nothing(film: Film, tmp_path: Path, jump: str) -> None:
    path = jumping(film, tmp_path / "films" / "a.mkv", jump)
    path.with_suffix(".txt").write_text("a jump")
    assert path.stat().st_size < 100_000
    run = subprocess.run(
        [sys.executable, "-c", PLAN, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=Path(__file__).parents[2],
    )
    assert run.returncode == 0, run.stderr[-500:]
    told = json.loads(run.stdout.splitlines()[-1])
    assert told["starts"] == [0.0, float(jump) + 2]
    assert told["seconds"] < 60
    assert told["grown"] < 200_000, "kilobytes"
    ((reason, detail),) = told["failures"]
    assert reason == "too_few_frames"
    assert detail.startswith(f"{int(float(jump)) // 2} of {int(float(jump)) // 2 + 2} windows hold no frame: its times")


def test_frames_on_both_sides_of_a_jump(film: Film, tmp_path: Path) -> None:
    path = jumping(film, tmp_path / "a.mkv", "2e9")
    found = probe(path)
    assert len(found.ticks) == 96
    windows = [select_frames(found, start, 1.0, 24) for start in window_starts(found, 1.0)]
    assert [window.start for window in windows] == [0, 1, 2e9 + 2, 2e9 + 3]
    seen = [[round(float(frame.mean()) / 1.3) for frame in frames] for frames in decode(path, windows, (8, 8))]
    assert seen == [list(range(first, first + 24)) for first in range(0, 96, 24)]


def slowly(film: Probe, start: float, duration: float, rate: float) -> tuple[int, ...]:
    """The ticks that a window keeps, from all the film's times."""
    times = film.times - start
    inside = np.flatnonzero((times >= -film.tolerance) & (times < duration - film.tolerance))
    slots = np.floor(times[inside] * rate + 0.5).astype(np.int64)
    order = np.lexsort((np.round(np.abs(times[inside] * rate - slots), 6), slots))
    _, first = np.unique(slots[order], return_index=True)
    kept = inside[order[first]]
    kept = kept[np.floor(times[kept] * rate + 0.5) < np.ceil(duration * rate - 1e-9)]
    return tuple(int(tick) for tick in film.ticks[kept])


def made_up(ticks: np.ndarray, base: Fraction = Fraction(1, 1000)) -> Probe:
    return Probe(ticks.astype(np.int64), base, float(base), ticks[::12].astype(np.int64), "made up", 8, 8)


@pytest.mark.parametrize("seed", range(4))
def test_windows_are_those_of_a_search_through_all(seed: int) -> None:
    draw = np.random.default_rng(seed)
    steps = draw.integers(1, 90, 400) + (draw.random(400) < 0.05) * draw.integers(1000, 20_000, 400)
    film = made_up(np.cumsum(steps) + 7)
    for duration, start, end in ((1.0, 0.0, None), (0.3, 0.7, None), (2.0, 0.1, 30.0), (1 / 3, 0.0, 9.7)):
        every = [start + k * duration for k in range(window_count(film, duration, start, end))]
        held = {begin: slowly(film, begin, duration, 16) for begin in every}
        found = window_starts(film, duration, start, end)
        windows = {begin: select_frames(film, begin, duration, 16).ticks for begin in found}
        assert windows == {begin: ticks for begin, ticks in held.items() if begin in windows}
        assert not any(ticks for begin, ticks in held.items() if begin not in windows)


def test_a_window_costs_its_own_frames() -> None:
    film = made_up(np.arange(1_000_000) * 40)
    begin = time.monotonic()
    starts = window_starts(film, 2.0)
    assert len(starts) == window_count(film, 2.0) == 19_999  # the last frame is shown for a millisecond
    assert all(len(select_frames(film, start, 2.0, 16).ticks) == 32 for start in starts[:5000])
    assert time.monotonic() - begin < 60, "through all frames it takes minutes"


@pytest.mark.parametrize(
    ("script", "limits", "reason"),
    [
        ("yes '0,       2048,       2048,     2048,       12, 0x0c7702d0, F=0x0'", {"max_frames": 50_000}, "too_large"),
        ("yes '#software: Lavf59.27.100'", {"timeout": 2.0}, "timeout"),
        ("yes 'Input #0, mov, from the start' >&2", {"timeout": 2.0}, "timeout"),
        ("tr '\\0' 'x' < /dev/zero >&2", {"timeout": 2.0}, "timeout"),
    ],
    ids=["packets", "header", "messages", "line"],
)
def test_what_ffmpeg_prints_is_bounded(
    film: Film,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    script: str,
    limits: dict[str, float],
    reason: str,
) -> None:
    path = film(tmp_path / "a.mp4")
    monkeypatch.setenv("VLFM_FFMPEG", str(shim(tmp_path / "ffmpeg", f"exec {script}", only_films=True)))
    probe_limits = MediaLimits(**{"timeout": 60.0, **limits})  # type: ignore[arg-type]
    find_ffmpeg()
    tracemalloc.start()
    try:
        with pytest.raises(DecodeError) as caught:
            probe(path, probe_limits)
        assert tracemalloc.get_traced_memory()[1] < 20 * 2**20
    finally:
        tracemalloc.stop()
    assert caught.value.reason == reason
    assert f"raise {'max_frames' if reason == 'too_large' else 'timeout'}" in caught.value.detail
    children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
    assert not [child for child in children if Path(f"/proc/{child}/comm").read_text().strip() in ("yes", "tr")]


def test_decoded_times_are_bounded(film: Film, tmp_path: Path) -> None:
    path = film(tmp_path / "a.avi", *SHARP, seconds=2)
    assert len(probe(path, MediaLimits(max_frames=48)).ticks) == 48
    with pytest.raises(DecodeError, match=r"too_large: over 47 frames; cut the film, or raise max_frames"):
        probe(path, MediaLimits(max_frames=47))


def test_times_that_cannot_be_counted(film: Film, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = f"#tb 0: 1/1000\\n0, 0, {-(2**62)}, 1, 9, 0x1\\n0, 0, {2**62}, 1, 9, 0x1\\n"
    script = f"echo \"Input #0, matroska,webm, from 'a'\" >&2; printf '{table}'"
    path = film(tmp_path / "a.mkv")
    monkeypatch.setenv("VLFM_FFMPEG", str(shim(tmp_path / "ffmpeg", script, only_films=True)))
    with pytest.raises(DecodeError, match=r"corrupt: its times differ by more than can be counted"):
        probe(path)


def test_the_size_of_a_file_has_a_field() -> None:
    assert DataRecipe("a", max_bytes=5).limits.max_bytes == 5
    assert DataRecipe("a", max_bytes=5).data_fields() == DataRecipe("a").data_fields()
    with pytest.raises(ValueError, match="max_bytes = 0 cannot be"):
        DataRecipe("a", max_bytes=0)


def test_a_gap_is_read_out_in_pieces(film: Film, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = jumping(film, tmp_path / "a.mkv", "100")
    due: list[int] = []

    def counted(*arguments: object) -> np.ndarray:
        due.append(len(arguments[3]))  # type: ignore[arg-type]
        return readout_matrix(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr("pipeline.interpolate.film.readout_matrix", counted)
    wanted = np.arange(0, 104, 0.01)
    assert sum(len(frames) for frames in FilmReader(path).frames_at(wanted)) == len(wanted)
    assert max(due) == 4096
