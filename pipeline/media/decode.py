"""Films to frames: the times of a film, the frames of its windows, and one clear word for everything that is wrong.

One ffmpeg binary does all of it (no ffprobe): `probe` reads packet times without decoding, `select_frames` chooses
which frames a window keeps, `decode` streams exactly those. Frames are never duplicated and keep their real
presentation times. A film is untrusted input: the options below close the traps that are known.
"""

from __future__ import annotations

import functools
import math
import re
import time
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import numpy as np

from model.ffmpeg import FRAME, SWITCHES, TIME_BASE, Ffmpeg, NoFfmpeg, find_ffmpeg, reading_options
from pipeline.items import Window
from pipeline.media.faults import (
    DecodeError,
    MediaLimits,
    check_readable,
    cut_short,
    diagnosis,
    ended_early,
    tool_failed,
)
from pipeline.media.process import FfmpegProcess, PacketTable, too_many_frames

# Containers whose packet times are the decoder's frame times, and whose seeks land at or before the time asked for.
EXACT_FORMATS = ("mov,", "matroska,")
DISCARDED = 4  # packet flag: decoded but outside the edit list, never shown
NO_TIME = -(2**63)
LAG = 5.0
"""Seconds that the time of a frame may come after the frame itself; ffmpeg prints it before, a wrapper may be slow."""


@dataclass(frozen=True)
class Probe:
    """The frames of a film in presentation order, read without looking at a pixel."""

    ticks: np.ndarray
    """(frames,) int64 presentation times in units of `time_base`, strictly increasing, as stored in the file."""
    time_base: Fraction
    """Seconds per tick."""
    last_duration: float
    """How long the last frame is shown, seconds."""
    keyframes: np.ndarray
    """(k,) int64 ticks where decoding can start; empty where seeking is not to be trusted."""
    codec: str
    width: int
    height: int

    @functools.cached_property
    def times(self) -> np.ndarray:
        """(frames,) float64 seconds since the film's first frame."""
        return np.asarray((self.ticks - self.ticks[0]) * float(self.time_base), dtype=np.float64)

    @property
    def seconds(self) -> float:
        """From the first frame until the last one disappears (the container's own figure may be longer)."""
        return float(self.times[-1]) + self.last_duration

    @property
    def frame_rate(self) -> float:
        """Mean frames per second."""
        return len(self.ticks) / self.seconds if self.seconds > 0 else 0.0

    @property
    def tolerance(self) -> float:
        """Seconds by which a stored time may be off, because containers round (Matroska to milliseconds)."""
        return min(2 * float(self.time_base), 0.002)


def ffmpeg_tool() -> Ffmpeg:
    """The ffmpeg to use, as `model.ffmpeg.find_ffmpeg` finds it.

    Raises:
        DecodeError: `no_ffmpeg`, there is none that works.
    """
    try:
        return find_ffmpeg()
    except NoFfmpeg as error:
        raise DecodeError("no_ffmpeg", str(error)) from None


def ffmpeg_binary() -> str:
    """Path of the ffmpeg to use. Raises as `ffmpeg_tool`."""
    return ffmpeg_tool().path


def _command(tool: Ffmpeg, stream: object) -> list[str]:
    import ffmpeg

    return list(ffmpeg.compile(ffmpeg.overwrite_output(stream).global_args(*SWITCHES), cmd=tool.path))


def _too_slow(path: Path, limits: MediaLimits) -> DecodeError:
    return DecodeError("timeout", f"reading {path.name} took over {limits.timeout:g} s; raise timeout")


def probe(path: Path, limits: MediaLimits | None = None) -> Probe:
    """All presentation times of the first video stream, from one pass over the packets (nothing is decoded).

    Formats whose packet times cannot be trusted (AVI, MPEG, FLV, Ogg) are decoded once instead.

    Raises:
        DecodeError: empty_file, not_a_video, no_video_stream, truncated, corrupt, too_large, timeout, unreadable,
            no_ffmpeg, decoder_failed.
    """
    import ffmpeg

    limits = limits or MediaLimits()
    check_readable(path, limits)
    tool = ffmpeg_tool()
    source = ffmpeg.input(f"file:{path}", **reading_options(limits.max_pixels))
    command = _command(tool, ffmpeg.output(source, "pipe:", map="0:V:0", c="copy", f="framecrc"))
    packets = PacketTable(tool, limits)
    with FfmpegProcess(command) as process:
        deadline = time.monotonic() + limits.timeout
        try:
            packets.read(process, deadline)
            status = process.finish(deadline)
        except TimeoutError:
            raise _too_slow(path, limits) from None
        errors = process.messages
    if status != 0 or not len(packets) or ended_early(errors) or cut_short(path, limits.timeout):
        raise diagnosis(path, errors, len(packets), limits, tool, status)
    header = packets.header
    if "tb 0" not in header:
        raise tool_failed(tool, "it lists packets without a time base")
    time_base = Fraction(header["tb 0"])
    width, height = (int(side) for side in header.get("dimensions 0", "0x0").split("x"))
    if width * height > limits.max_pixels:
        detail = f"frames of {width}x{height}; the recipe allows {limits.max_pixels} pixels; raise max_pixels if wanted"
        raise DecodeError("too_large", detail)
    shown, durations, flags = packets.columns[:, packets.columns[2] & DISCARDED == 0]
    order = np.argsort(shown, kind="stable")
    ticks = shown[order]
    container = re.search(r"^Input #0, (.*), from ", errors, re.MULTILINE)
    exact = container is not None and container.group(1).startswith(EXACT_FORMATS)
    if exact and len(ticks) and ticks[0] > NO_TIME and (ticks[1:] > ticks[:-1]).all():
        last = int(durations[order[-1]])
        keyframes = ticks[flags[order] & 1 == 1]
    else:
        ticks, time_base, last = _decoded_times(path, limits, tool)
        keyframes = np.array([], dtype=np.int64)
    if int(ticks[-1]) - int(ticks[0]) >= 2**62:
        raise DecodeError("corrupt", "its times differ by more than can be counted; re-encode it or remove it")
    usual = float(np.median(np.diff(ticks))) if len(ticks) > 1 else 0.0
    last_duration = float((last if last > 0 else usual) * time_base)
    return Probe(ticks, time_base, last_duration, keyframes, header.get("codec_id 0", "unknown"), width, height)


def _decoded_times(path: Path, limits: MediaLimits, tool: Ffmpeg) -> tuple[np.ndarray, Fraction, int]:
    """Presentation times from decoding the whole film: (ticks, time base, ticks of the last frame's duration).

    Versions before 6.0 do not print durations; theirs is 0.
    """
    import ffmpeg

    found = array("q")
    last = 0

    def listen(line: str) -> None:
        nonlocal last
        if frame := FRAME.search(line):
            found.append(int(frame[1]))
            last = int(frame[2] or 0)
            if len(found) > limits.max_frames:
                raise too_many_frames(limits)

    source = ffmpeg.input(f"file:{path}", **reading_options(limits.max_pixels))
    shown = source["V:0"].filter("showinfo", checksum=0)
    output = ffmpeg.output(shown, "pipe:", f="null", **{tool.sync_option: "passthrough"})
    with FfmpegProcess(_command(tool, output), listen) as process:
        try:
            status = process.finish(time.monotonic() + limits.timeout)
        except TimeoutError:
            raise _too_slow(path, limits) from None
        errors = process.messages
    base = re.search(TIME_BASE.pattern, errors, re.MULTILINE)
    if status == 0 and not found and re.search(r"^frame= *[1-9]", errors, re.MULTILINE):
        raise tool_failed(tool, "it prints no times of the frames that it decodes")
    if status != 0 or not found or base is None:
        raise diagnosis(path, errors, len(found), limits, tool, status)
    ticks = np.array(found, dtype=np.int64)
    if (ticks[1:] <= ticks[:-1]).any():
        raise DecodeError("corrupt", "presentation times do not increase; re-encode the film")
    return ticks, Fraction(base.group(1)), last


_SHOWN_SIZE = re.compile(r"^\[Parsed_showinfo_\d+ @ [^\]]*\] n: *0 .*? s:(\d+)x(\d+) ")


def shown_size(path: Path, limits: MediaLimits | None = None) -> tuple[int, int]:
    """Height and width at which the film is shown, from its first frame: upright, with square pixels.

    Raises:
        DecodeError: as `decode`.
    """
    import ffmpeg

    limits = limits or MediaLimits()
    check_readable(path, limits)
    tool = ffmpeg_tool()
    found: list[tuple[int, int]] = []

    def listen(line: str) -> None:
        if size := _SHOWN_SIZE.search(line):
            found.append((int(size[2]), int(size[1])))

    # A width that only the shape of the pixels gives is rounded to an even one, which every encoder takes.
    wide = "if(eq(sar,1)+eq(sar,0),iw,2*trunc(iw*sar/2+0.5))"
    source = ffmpeg.input(f"file:{path}", **reading_options(limits.max_pixels))
    frames = source["V:0"].filter("scale", wide, "ih").filter("showinfo")
    command = _command(tool, ffmpeg.output(frames, "pipe:", f="null", **{"frames:v": 1}))
    with FfmpegProcess(command, listen) as process:
        try:
            status = process.finish(time.monotonic() + limits.timeout)
        except TimeoutError:
            raise _too_slow(path, limits) from None
    if not found:
        raise diagnosis(path, process.messages, 0, limits, tool, status)
    return found[0]


def window_count(film: Probe, duration: float, start: float = 0.0, end: float | None = None) -> int:
    """How many full windows start, start + T, ... there are, those in gaps included; a tail is left out."""
    last = min(film.seconds, end) if end is not None else film.seconds
    return max(0, int(np.floor((last + film.tolerance - start) / duration)))


def window_starts(film: Probe, duration: float, start: float = 0.0, end: float | None = None) -> list[float]:
    """Starts (seconds since the first frame) of the full windows that hold frames.

    Those in a gap are left out: where the times jump there may be billions.
    """
    count = window_count(film, duration, start, end)
    near = np.floor((film.times + film.tolerance - start) / duration)
    held = []
    for number in (near - 1, near, near + 1):  # by a rounding a frame at an edge is in the window beside
        times = film.times - (start + number * duration)
        inside = (times >= -film.tolerance) & (times < duration - film.tolerance) & (number >= 0) & (number < count)
        held.append(number[inside])
    return [start + int(number) * duration for number in np.unique(np.concatenate(held))]


def select_frames(film: Probe, start: float, duration: float, rate: float) -> Window:
    """The frames of one window, thinned to at most `rate` a second by choosing, never by making.

    Every slot of the grid start + k / rate keeps the frame nearest to it, if one is nearer to it than to other slots;
    so a film of `rate` or less keeps all its frames.
    """
    # A part of the times that surely holds the window, so that a window costs its own frames and not all the film's.
    slack = 0.01 + 1e-9 * abs(start)
    first, last = np.searchsorted(film.times, [start - slack, start + duration + slack])
    times = film.times[first:last] - start
    inside = np.flatnonzero((times >= -film.tolerance) & (times < duration - film.tolerance))
    slots = np.floor(times[inside] * rate + 0.5).astype(np.int64)
    # Rounded, so that of two frames equally near the earlier one is kept and not the one that rounding prefers.
    distance = np.round(np.abs(times[inside] * rate - slots), 6)
    order = np.lexsort((distance, slots))
    _, begins = np.unique(slots[order], return_index=True)
    kept = inside[order[begins]]
    kept = kept[np.floor(times[kept] * rate + 0.5) < np.ceil(duration * rate - 1e-9)] if len(kept) else kept
    return window_of(film, first + kept, start)


def window_of(film: Probe, kept: Sequence[int] | np.ndarray, start: float = 0.0) -> Window:
    """The window that keeps the frames of these indices (increasing); `start` in seconds since the first frame."""
    ticks = film.ticks[kept]
    seek = None
    if len(ticks):
        before = int(np.searchsorted(film.keyframes, ticks[0], side="right"))
        # From the first keyframe there is nothing to gain, and a plain start is always right.
        seek = float(film.keyframes[before - 1] * film.time_base) if before > 1 else None
    frame_time = np.maximum(film.times[kept] - start, 0.0)
    return Window(start, tuple(int(tick) for tick in ticks), tuple(float(time) for time in frame_time), seek)


def with_next_frame(film: Probe, window: Window, duration: float, rate: float, end: float = math.inf) -> Window:
    """The window with the frame after it: the first one that the window which follows would keep.

    There is none where the film ends, from `end` (seconds since the film's first frame, such as its next cut) on, and
    where it is farther from the last kept frame than twice the widest gap between kept ones: there the times jump.
    """
    following = select_frames(film, window.start + duration, duration, rate).ticks[:1]
    if not following or len(window.ticks) < 2:
        return window
    seconds = float(film.times[np.searchsorted(film.ticks, following[0])])
    time = max(seconds - window.start, duration)
    farthest = 2 * max(np.diff(window.frame_time)) + film.tolerance
    if seconds >= end or following[0] <= window.ticks[-1] or time - window.frame_time[-1] > farthest:
        return window
    return replace(window, next_ticks=following, next_time=(time,))


def decode(
    path: Path, windows: Sequence[Window], size: tuple[int, int], limits: MediaLimits | None = None
) -> Iterator[np.ndarray]:
    """Frames of each window in turn, uint8 (N, H, W, 3) RGB; one ffmpeg process, one window in memory.

    Where a window names the frame after it, that comes last; it may be the first one of the next window.

    Frames are chosen first, then cropped at the centre to the shape of `size` (H, W) and scaled to it; a rotation that
    is stored in the film is applied. The times that the decoder reports are checked.

    Raises:
        DecodeError: truncated, corrupt, timeout, decoder_failed, ...; windows already given stay valid.
    """
    if not windows:
        return
    limits = limits or MediaLimits()
    seek = windows[0].seek
    given = 0
    try:
        for frames in _stream(path, windows, size, limits, seek):
            given += 1
            yield frames
    except DecodeError as error:
        if seek is None or error.reason not in ("corrupt", "truncated"):
            raise
        # A broken index sends the seek astray: what is missing is read again from the beginning.
        yield from _stream(path, windows[given:], size, limits, None)


def _stream(
    path: Path, windows: Sequence[Window], size: tuple[int, int], limits: MediaLimits, seek: float | None
) -> Iterator[np.ndarray]:
    import ffmpeg

    check_readable(path, limits)
    tool = ffmpeg_tool()
    height, width = size
    options = reading_options(limits.max_pixels)
    if seek is not None:
        options |= {"seek_timestamp": 1, "noaccurate_seek": None, "ss": f"{seek:.6f}"}
    source = ffmpeg.input(f"file:{path}", **options)
    fresh = _fresh(windows)
    frames = source["V:0"].filter("select", _selection(fresh)).filter("showinfo", checksum=0)
    # Cropped before it is scaled: what is cut off costs nothing. `sar` is the shape of the film's pixels.
    across, down = f"min(iw,ih*{width}/{height}/sar)", f"min(ih,iw*sar*{height}/{width})"
    frames = frames.filter("crop", across, down, exact=1).filter("scale", width, height, flags="bilinear")
    frames = frames.filter("format", "rgb24").filter("setsar", 1)
    total = sum(len(ticks) for ticks in fresh)
    wanted = {"f": "rawvideo", "pix_fmt": "rgb24", tool.sync_option: "passthrough", "frames:v": total}
    times: list[int] = []

    def listen(line: str) -> None:
        if frame := FRAME.search(line):
            times.append(int(frame[1]))

    with FfmpegProcess(_command(tool, ffmpeg.output(frames, "pipe:", **wanted)), listen) as process:
        last = np.empty((height, width, 3), dtype=np.uint8)
        for window, ticks in zip(windows, fresh, strict=True):
            pixels = np.empty((len(window.decoded), height, width, 3), dtype=np.uint8)
            new = pixels[len(window.decoded) - len(ticks) :]
            if len(new) < len(pixels):
                pixels[0] = last
            try:
                filled = process.read_into(new.reshape(-1).data, time.monotonic() + limits.timeout) if len(new) else 0
            except TimeoutError:
                detail = f"no frames for {limits.timeout:g} s at {window.start:g} s; raise timeout"
                raise DecodeError("timeout", detail) from None
            if filled < new.size:
                got = filled // (height * width * 3)
                status = _status(process)
                raise diagnosis(path, process.messages, got, limits, tool, status, window.start)
            _hear_times(process, times, len(ticks))
            heard, times[: len(ticks)] = times[: len(ticks)], []
            if len(heard) < len(ticks):
                what = f"{len(ticks)} frames came and {len(heard)} times in the window at {window.start:g} s"
                raise tool_failed(tool, what)
            if heard != list(ticks):
                status = _status(process)
                raise diagnosis(path, process.messages, len(heard), limits, tool, status, window.start)
            last = pixels[-1].copy()
            yield pixels


def _hear_times(process: FfmpegProcess, times: list[int], count: int) -> None:
    """Reads messages until `count` times are there; they are printed before the frames that have come."""
    try:
        process.listen(lambda: len(times) >= count, time.monotonic() + LAG)
    except TimeoutError:
        return


def _status(process: FfmpegProcess) -> int | None:
    """The exit status of an ffmpeg that gave wrong or too few frames; None where it goes on."""
    try:
        return process.finish(time.monotonic() + LAG)
    except TimeoutError:
        return None


def _fresh(windows: Sequence[Window]) -> list[tuple[int, ...]]:
    """The ticks of each window that the one before has not given: the frame after a window may be the next's first."""
    fresh = []
    last = None
    for window in windows:
        ticks = window.decoded
        fresh.append(ticks[1:] if ticks[0] == last else ticks)
        last = ticks[-1]
    return fresh


def _selection(windows: Iterable[Sequence[int]]) -> str:
    """An ffmpeg expression that is true for exactly the named frames; one comparison per window for the others."""
    parts = []
    for ticks in windows:
        if ticks:
            chosen = _sum([f"eq(pts,{tick})" for tick in ticks])
            parts.append(f"if(between(pts,{ticks[0]},{ticks[-1]}),{chosen})")
    return _sum(parts)


def _sum(terms: Sequence[str]) -> str:
    """A sum as a balanced tree: ffmpeg takes expressions of up to 100 levels, and a plain chain has one a term."""
    half = len(terms) // 2
    return terms[0] if len(terms) == 1 else f"({_sum(terms[:half])}+{_sum(terms[half:])})"
