"""Films to frames: the times of a film, the frames of its windows, and one clear word for everything that is wrong.

One ffmpeg binary does all of it (no ffprobe): `probe` reads packet times without decoding, `select_frames` chooses
which frames a window keeps, `decode` streams exactly those. Frames are never duplicated and keep their real
presentation times. A film is untrusted input: the options below close the traps that are known.
"""

from __future__ import annotations

import functools
import re
import subprocess
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np

from model import video
from pipeline.faults import DecodeError, MediaLimits, check_readable, cut_short, diagnosis, ended_early

# A playlist renamed .mp4 is refused by its demuxer's name; containers that can point to other files are not listed.
FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,flv,ogg,asf"
# Containers whose packet times are the decoder's frame times, and whose seeks land at or before the time asked for.
EXACT_FORMATS = ("mov,", "matroska,")
DISCARDED = 4  # packet flag: decoded but outside the edit list, never shown
NO_TIME = -(2**63)


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

    @property
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


@dataclass(frozen=True)
class Window:
    """The frames that one clip keeps."""

    start: float
    """Seconds since the film's first frame."""
    ticks: tuple[int, ...]
    """Stored times of the kept frames, increasing; they name the frames."""
    frame_time: tuple[float, ...]
    """Seconds since `start`, in [0, duration)."""
    seek: float | None = None
    """Stored time (seconds) of a keyframe at or before the first kept frame; None decodes from the beginning."""


@functools.cache
def ffmpeg_binary() -> str:
    """The ffmpeg to use, as `model.video.ffmpeg_binary` finds it.

    Raises:
        DecodeError: `no_ffmpeg`, there is none.
    """
    try:
        return video.ffmpeg_binary()
    except video.NoFfmpeg as error:
        raise DecodeError("no_ffmpeg", str(error)) from None


def _input_options(limits: MediaLimits) -> dict[str, object]:
    return {
        "threads": 1,
        "protocol_whitelist": "file,pipe",
        "format_whitelist": FORMATS,
        "max_pixels": limits.max_pixels,
        "err_detect": "explode",
    }


def _command(stream: object) -> list[str]:
    import ffmpeg

    switches = ("-hide_banner", "-nostdin", "-nostats", "-loglevel", "info", "-xerror", "-copyts")
    return list(ffmpeg.compile(ffmpeg.overwrite_output(stream).global_args(*switches), cmd=ffmpeg_binary()))


def probe(path: Path, limits: MediaLimits | None = None) -> Probe:
    """All presentation times of the first video stream, from one pass over the packets (nothing is decoded).

    Formats whose packet times cannot be trusted (AVI, MPEG, FLV, Ogg) are decoded once instead.

    Raises:
        DecodeError: empty_file, not_a_video, no_video_stream, truncated, corrupt, too_large, timeout, unreadable.
    """
    import ffmpeg

    limits = limits or MediaLimits()
    check_readable(path)
    source = ffmpeg.input(f"file:{path}", **_input_options(limits))
    packets = _command(ffmpeg.output(source, "pipe:", map="0:V:0", c="copy", f="framecrc"))
    status, output, errors = _run(packets, path, limits)
    table = [line.split(",") for line in output.splitlines() if line and not line.startswith("#")]
    if status != 0 or not table or ended_early(errors) or cut_short(path):
        raise diagnosis(path, errors, frames=len(table), limits=limits)
    if len(table) > limits.max_frames:
        raise DecodeError("too_large", f"{len(table)} frames; the recipe allows {limits.max_frames} (max_frames)")
    header = dict(line[1:].split(": ", 1) for line in output.splitlines() if line.startswith("#") and ": " in line)
    time_base = Fraction(header["tb 0"])
    width, height = (int(side) for side in header.get("dimensions 0", "0x0").split("x"))
    if width * height > limits.max_pixels:
        raise DecodeError("too_large", f"frames of {width}x{height}; the recipe allows {limits.max_pixels} pixels")
    shown = [(int(row[2]), int(row[3]), _flags(row)) for row in table if not _flags(row) & DISCARDED]
    ticks = np.array(sorted(tick for tick, _, _ in shown), dtype=np.int64)
    container = re.search(r"^Input #0, (.*), from ", errors, re.MULTILINE)
    exact = container is not None and container.group(1).startswith(EXACT_FORMATS)
    if exact and len(ticks) and ticks[0] > NO_TIME and (len(ticks) == 1 or np.diff(ticks).min() > 0):
        last = max(shown)[1]
        keyframes = np.array(sorted(tick for tick, _, flags in shown if flags & 1), dtype=np.int64)
    else:
        ticks, time_base, last = _decoded_times(path, limits)
        keyframes = np.array([], dtype=np.int64)
    usual = float(np.median(np.diff(ticks))) if len(ticks) > 1 else 0.0
    last_duration = float((last if last > 0 else usual) * time_base)
    return Probe(ticks, time_base, last_duration, keyframes, header.get("codec_id 0", "unknown"), width, height)


def _flags(row: list[str]) -> int:
    """Packet flags of a framecrc line, which leaves out those of a plain keyframe."""
    for field in row[6:]:
        if field.strip().startswith("F="):
            return int(field.strip()[2:], 16)
    return 1


_FRAME = re.compile(r"showinfo.* n: *\d+ pts: *(-?\d+) .*?duration: *(-?\d+)")
_TIME_BASE = re.compile(r"showinfo.* config in time_base: (\d+/\d+)")


def _decoded_times(path: Path, limits: MediaLimits) -> tuple[np.ndarray, Fraction, int]:
    """Presentation times from decoding the whole film: (ticks, time base, ticks of the last frame's duration)."""
    import ffmpeg

    source = ffmpeg.input(f"file:{path}", **_input_options(limits))
    shown = source["V:0"].filter("showinfo", checksum=0)
    status, _, errors = _run(_command(ffmpeg.output(shown, "pipe:", f="null", fps_mode="passthrough")), path, limits)
    found = [(int(tick), int(length)) for tick, length in _FRAME.findall(errors)]
    base = _TIME_BASE.search(errors)
    if status != 0 or not found or base is None:
        raise diagnosis(path, errors, frames=len(found), limits=limits)
    ticks = np.array([tick for tick, _ in found], dtype=np.int64)
    if len(ticks) > 1 and np.diff(ticks).min() <= 0:
        raise DecodeError("corrupt", "presentation times do not increase; re-encode the film")
    return ticks, Fraction(base.group(1)), found[-1][1]


_SHOWN_SIZE = re.compile(r"showinfo.* n: *0 .*? s:(\d+)x(\d+) ")


def shown_size(path: Path, limits: MediaLimits | None = None) -> tuple[int, int]:
    """Height and width at which the film is shown, from its first frame: upright, with square pixels.

    Raises:
        DecodeError: as `decode`.
    """
    import ffmpeg

    check_readable(path)
    limits = limits or MediaLimits()
    # A width that only the shape of the pixels gives is rounded to an even one, which every encoder takes.
    wide = "if(eq(sar,1)+eq(sar,0),iw,2*trunc(iw*sar/2+0.5))"
    source = ffmpeg.input(f"file:{path}", **_input_options(limits))
    frames = source["V:0"].filter("scale", wide, "ih").filter("showinfo")
    _, _, errors = _run(_command(ffmpeg.output(frames, "pipe:", f="null", **{"frames:v": 1})), path, limits)
    found = _SHOWN_SIZE.search(errors)
    if found is None:
        raise diagnosis(path, errors, frames=0, limits=limits)
    return int(found[2]), int(found[1])


def window_starts(film: Probe, duration: float, start: float = 0.0, end: float | None = None) -> list[float]:
    """Starts (seconds since the first frame) of the full windows: start, start + T, ...; a tail is left out."""
    last = min(film.seconds, end) if end is not None else film.seconds
    count = max(0, int(np.floor((last + film.tolerance - start) / duration)))
    return [start + index * duration for index in range(count)]


def select_frames(film: Probe, start: float, duration: float, rate: float) -> Window:
    """The frames of one window, thinned to at most `rate` a second by choosing, never by making.

    Every slot of the grid start + k / rate keeps the frame nearest to it, if one is nearer to it than to other slots;
    so a film of `rate` or less keeps all its frames.
    """
    times = film.times - start
    inside = np.flatnonzero((times >= -film.tolerance) & (times < duration - film.tolerance))
    slots = np.floor(times[inside] * rate + 0.5).astype(np.int64)
    # Rounded, so that of two frames equally near the earlier one is kept and not the one that rounding prefers.
    distance = np.round(np.abs(times[inside] * rate - slots), 6)
    order = np.lexsort((distance, slots))
    _, first = np.unique(slots[order], return_index=True)
    kept = inside[order[first]]
    kept = kept[np.floor(times[kept] * rate + 0.5) < np.ceil(duration * rate - 1e-9)] if len(kept) else kept
    return window_of(film, kept, start)


def window_of(film: Probe, kept: Sequence[int] | np.ndarray, start: float = 0.0) -> Window:
    """The window that keeps the frames of these indices (increasing); `start` in seconds since the first frame."""
    ticks = film.ticks[kept]
    seek = None
    if len(ticks):
        before = film.keyframes[film.keyframes <= ticks[0]]
        # From the first keyframe there is nothing to gain, and a plain start is always right.
        seek = float(before[-1] * film.time_base) if len(before) > 1 else None
    frame_time = np.maximum(film.times[kept] - start, 0.0)
    return Window(start, tuple(int(tick) for tick in ticks), tuple(float(time) for time in frame_time), seek)


def decode(
    path: Path, windows: Sequence[Window], size: tuple[int, int], limits: MediaLimits | None = None
) -> Iterator[np.ndarray]:
    """Frames of each window in turn, uint8 (N, H, W, 3) RGB; one ffmpeg process, one window in memory.

    Frames are chosen first, then cropped at the centre to the shape of `size` (H, W) and scaled to it; a rotation that
    is stored in the film is applied. The times that the decoder reports are checked.

    Raises:
        DecodeError: truncated, corrupt, timeout, ...; windows already given stay valid.
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
        if seek is None or error.reason == "timeout":
            raise
        # A broken index sends the seek astray: what is missing is read again from the beginning.
        yield from _stream(path, windows[given:], size, limits, None)


def _stream(
    path: Path, windows: Sequence[Window], size: tuple[int, int], limits: MediaLimits, seek: float | None
) -> Iterator[np.ndarray]:
    import ffmpeg

    check_readable(path)
    height, width = size
    options = _input_options(limits)
    if seek is not None:
        options |= {"seek_timestamp": 1, "noaccurate_seek": None, "ss": f"{seek:.6f}"}
    source = ffmpeg.input(f"file:{path}", **options)
    frames = source["V:0"].filter("select", _selection(windows)).filter("showinfo", checksum=0)
    # Cropped before it is scaled: what is cut off costs nothing. `sar` is the shape of the film's pixels.
    across, down = f"min(iw,ih*{width}/{height}/sar)", f"min(ih,iw*sar*{height}/{width})"
    frames = frames.filter("crop", across, down, exact=1).filter("scale", width, height, flags="bilinear")
    frames = frames.filter("format", "rgb24").filter("setsar", 1)
    total = sum(len(window.ticks) for window in windows)
    wanted = {"f": "rawvideo", "pix_fmt": "rgb24", "fps_mode": "passthrough", "frames:v": total}
    command = _command(ffmpeg.output(frames, "pipe:", **wanted))
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    times = _Times(process)
    try:
        for window in windows:
            expected = len(window.ticks) * height * width * 3
            pixels = _read(process, expected, limits.timeout)
            if pixels is None:
                raise DecodeError("timeout", f"no frames for {limits.timeout:g} s at {window.start:g} s; raise timeout")
            if times.take(len(window.ticks)) != list(window.ticks) or pixels.size < expected:
                process.kill()
                times.join()
                got = pixels.size // (height * width * 3)
                raise diagnosis(path, times.text(), frames=got, limits=limits, where=window.start)
            yield pixels.reshape(-1, height, width, 3)
    finally:
        process.kill()
        process.wait()
        times.join()
        for pipe in (process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()


def _selection(windows: Sequence[Window]) -> str:
    """An ffmpeg expression that is true for exactly the named frames; one comparison per window for the others."""
    parts = []
    for window in windows:
        chosen = _sum([f"eq(pts,{tick})" for tick in window.ticks])
        parts.append(f"if(between(pts,{window.ticks[0]},{window.ticks[-1]}),{chosen})")
    return _sum(parts)


def _sum(terms: Sequence[str]) -> str:
    """A sum as a balanced tree: ffmpeg takes expressions of up to 100 levels, and a plain chain has one a term."""
    half = len(terms) // 2
    return terms[0] if len(terms) == 1 else f"({_sum(terms[:half])}+{_sum(terms[half:])})"


def _read(process: subprocess.Popen[bytes], count: int, timeout: float) -> np.ndarray | None:
    """Up to `count` bytes, fewer at the end of the stream; None where the time ran out (only waiting counts)."""
    assert process.stdout is not None
    late = threading.Event()

    def stop() -> None:
        late.set()
        process.kill()

    timer = threading.Timer(timeout, stop)
    timer.daemon = True
    timer.start()
    try:
        pixels = np.empty(count, dtype=np.uint8)
        view = memoryview(pixels.data)
        filled = 0
        while filled < count:
            got = process.stdout.readinto(view[filled:])  # type: ignore[attr-defined]
            if not got:
                break
            filled += got
    finally:
        timer.cancel()
    return None if late.is_set() else pixels[:filled]


class _Times:
    """Reads ffmpeg's messages in a thread: frame times into a queue, the last lines kept for a diagnosis."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._found: list[int] = []
        self._lines: list[str] = []
        self._ended = False
        self._news = threading.Condition()
        self._thread = threading.Thread(target=self._read, args=(process.stderr,), daemon=True)
        self._thread.start()

    def _read(self, stream: Iterator[bytes]) -> None:
        for line in stream:
            text = line.decode("utf-8", "replace").rstrip()
            frame = _FRAME.search(text)
            with self._news:
                if frame:
                    self._found.append(int(frame.group(1)))
                elif "showinfo" not in text:
                    self._lines = [*self._lines[-199:], text]
                self._news.notify()
        with self._news:
            self._ended = True
            self._news.notify()

    def take(self, count: int) -> list[int]:
        """The next `count` times (ticks), fewer where the stream ended."""
        with self._news:
            self._news.wait_for(lambda: len(self._found) >= count or self._ended, timeout=30)
            taken, self._found = self._found[:count], self._found[count:]
            return taken

    def text(self) -> str:
        return "\n".join(self._lines)

    def join(self) -> None:
        self._thread.join(timeout=5)


def _run(command: list[str], path: Path, limits: MediaLimits) -> tuple[int, str, str]:
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=limits.timeout)
    except subprocess.TimeoutExpired:
        raise DecodeError("timeout", f"reading {path.name} took over {limits.timeout:g} s; raise timeout") from None
    return done.returncode, done.stdout.decode("utf-8", "replace"), done.stderr.decode("utf-8", "replace")
