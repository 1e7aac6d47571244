"""The ffmpeg that is used: which one, what it is told to read a film, what it prints, and a test that it does all that.

Versions from 4.2 to 9.0 are known to work. They print other columns and know other options, so the one that is chosen
is tested once in a process on a tiny film before it is trusted with a real one.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from storage.errors import Kind, VlfmError

# A playlist renamed .mp4 is refused by its demuxer's name; containers that can point to other files are not listed.
FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,flv,ogg,asf,gif"
SWITCHES = ("-hide_banner", "-nostdin", "-nostats", "-loglevel", "info", "-xerror", "-copyts")
"""Options of every command that reads a film."""
FRAME = re.compile(r"^\[Parsed_showinfo_\d+ @ [^\]]*\] n: *\d+ pts: *(-?\d+) .*?(?:duration: *(-?\d+) .*?)?fmt:")
"""A frame as the filter showinfo prints it: its time and, from 6.0 on, its duration, in ticks.

Up to 5.1 `pos:` stands where later versions have `duration:`; 6.0 has both.
"""
TIME_BASE = re.compile(r"^\[Parsed_showinfo_\d+ @ [^\]]*\] config in time_base: (\d+/\d+)")
SYNC_OPTIONS = ("fps_mode", "vsync")
"""Names of the option that keeps ffmpeg from making frames; `fps_mode` from 5.1 on, `vsync` before."""
PATIENCE = 60.0
"""Seconds after which a command of the self-test counts as hanging. It takes a twentieth of a second."""
WHEEL = "`pip install imageio-ffmpeg` brings one"


class NoFfmpeg(VlfmError, OSError):
    """There is no ffmpeg that works; the message says which were tried, what is wrong and how to get one."""

    kind = Kind.ENVIRONMENT


@dataclass(frozen=True)
class Ffmpeg:
    """An ffmpeg that has passed its test."""

    path: str
    version: str
    """As it names itself, as in `5.1.9-0+deb12u1`."""
    sync_option: str
    """`fps_mode` or `vsync`: the option that takes `passthrough`, `cfr` or `vfr`."""

    def __str__(self) -> str:
        return f"ffmpeg {self.version}"


class _Fault(Exception):
    """What is wrong with a candidate."""


def find_ffmpeg() -> Ffmpeg:
    """The ffmpeg to use: VLFM_FFMPEG, else the system's, else the static one of imageio-ffmpeg.

    Each is tested on a film of its own before it is taken, once in a process. Where the system's fails, one line on
    stderr says why, and imageio-ffmpeg's is taken.

    Raises:
        NoFfmpeg: there is none that works, or VLFM_FFMPEG names one that does not.
    """
    return _chosen(os.environ.get("VLFM_FFMPEG", ""), os.environ.get("PATH", ""))


@functools.cache
def _chosen(named: str, path: str) -> Ffmpeg:
    """`find_ffmpeg` for values of VLFM_FFMPEG and PATH."""
    if named:
        return _named(named)
    system = shutil.which("ffmpeg", path=path)
    faults = []
    for candidate in dict.fromkeys(filter(None, [system, _wheel()])):
        try:
            found = examine(candidate)
        except _Fault as fault:
            faults.append(str(fault))
            continue
        if faults:
            print(f"{'; '.join(faults)}; {found.path} ({found.version}) is used instead", file=sys.stderr)
        return found
    if faults:
        raise NoFfmpeg(f"no ffmpeg works: {'; '.join(faults)}; {WHEEL} or name one with VLFM_FFMPEG")
    raise NoFfmpeg(f"no ffmpeg found; {WHEEL}")


def _named(named: str) -> Ffmpeg:
    """The ffmpeg that VLFM_FFMPEG names. No other takes its place: the user chose it."""
    found = shutil.which(named)
    if found is None and Path(named).is_file():
        raise NoFfmpeg(f"VLFM_FFMPEG={named} is no program that may be run; chmod +x it, or name another ffmpeg")
    if found is None:
        raise NoFfmpeg(f"VLFM_FFMPEG={named} is no program; unset it or name an ffmpeg")
    try:
        return examine(found)
    except _Fault as fault:
        raise NoFfmpeg(f"VLFM_FFMPEG: {fault}; unset it or name another ffmpeg") from None


def _wheel() -> str | None:
    try:
        import imageio_ffmpeg

        return shutil.which(imageio_ffmpeg.get_ffmpeg_exe())
    except (ImportError, RuntimeError):
        return None


def environment() -> dict[str, str]:
    """The environment of an ffmpeg: messages without colours, in English."""
    kept = {name: value for name, value in os.environ.items() if name != "AV_LOG_FORCE_COLOR"}
    return {**kept, "AV_LOG_FORCE_NOCOLOR": "1", "LC_ALL": "C"}


def reading_options(max_pixels: int) -> dict[str, object]:
    """Options before the input: one thread, local files only, films only, and no frame larger than this."""
    return {
        "threads": 1,
        "protocol_whitelist": "file,pipe",
        "format_whitelist": FORMATS,
        "max_pixels": max_pixels,
        "err_detect": "explode",
    }


def packet(line: bytes) -> tuple[int, int, int]:
    """Presentation time, duration (both in ticks) and flags of a packet, from a line of the framecrc format.

    Raises:
        ValueError: it is no such line.
    """
    fields = line.split(b",")
    if len(fields) < 6:
        raise ValueError(f"{line!r} is no packet")
    flags = 1  # those of a plain keyframe are left out
    for field in fields[6:]:
        if field.lstrip().startswith(b"F="):
            flags = int(field.strip()[2:], 16)
    return int(fields[2]), int(fields[3]), flags


def killed_by(status: int) -> str | None:
    """The name of the signal that ended a process, from its exit status (or that of a shell around it)."""
    # Other statuses above 128 are ffmpeg's own: errors of the system and of its library, cut to a byte.
    number = -status if status < 0 else status - 128
    if status < 0 or number in (signal.SIGABRT, signal.SIGKILL, signal.SIGSEGV):
        try:
            return signal.Signals(number).name
        except ValueError:
            return f"signal {number}"
    return None


_ERROR = re.compile(
    "error|invalid|corrupt|broken|missing|unrecognized|unknown|unsupported|no such|not found|denied", re.I
)


def last_words(status: int, errors: str) -> str:
    """Why an ffmpeg ended, on one line: the signal that killed it, or what it said, which begins with the cause."""
    name = killed_by(status)
    if name is not None:
        return f"killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
    lines = [re.sub(r"\[.*?\] ?", "", line).strip() for line in errors.splitlines() if line[:1].strip()]
    causes = [line for line in lines if _ERROR.search(line)] or lines[-1:]
    return causes[0][:200] if causes else f"it ended with status {status} and no message"


@functools.cache
def encoders(path: str) -> frozenset[str]:
    """Names of the encoders that the ffmpeg at `path` has."""
    command = [path, "-hide_banner", "-encoders"]
    run = subprocess.run(command, capture_output=True, timeout=PATIENCE, env=environment())
    lines = run.stdout.decode("utf-8", "replace").splitlines()
    return frozenset(line.split()[1] for line in lines if len(line.split()) > 1)


# --- the self-test: a film of four even pictures, drawn, listed and decoded as pipeline.media.decode does ---

_LEVELS = (20, 80, 140, 200)
_SIDE = 16
_RATE = 8


def examine(path: str) -> Ffmpeg:
    """Tests the ffmpeg at `path`: it starts, writes a film, lists its packets and decodes two of its frames.

    Raises:
        _Fault: it does not; the message names it.
        NoFfmpeg: there is no room for the film.
    """
    try:
        with tempfile.TemporaryDirectory(prefix="vlfm-ffmpeg-") as folder:
            film = Path(folder) / "film.mkv"
            version = _draw(path, film)
            try:
                _list_packets(path, film)
                return Ffmpeg(path, version, _decode(path, film))
            except _Fault as fault:
                raise _Fault(f"{path} ({version}) failed its test: {fault}") from None
    except OSError as error:
        place = tempfile.gettempdir() if tempfile.tempdir else "the temporary folder"
        raise NoFfmpeg(f"ffmpeg cannot be tested: {error.strerror} in {place}; make room, or set TMPDIR") from None


def _run(command: list[str], given: bytes = b"") -> tuple[int, bytes, str]:
    try:
        run = subprocess.run(command, input=given, capture_output=True, timeout=PATIENCE, env=environment())
    except subprocess.TimeoutExpired:
        raise _Fault(f"it hangs ({PATIENCE:g} s without an end)") from None
    return run.returncode, run.stdout, run.stderr.decode("utf-8", "replace")


def _draw(path: str, film: Path) -> str:
    """Writes the film from frames through a pipe; returns ffmpeg's version."""
    pixels = b"".join(bytes([level]) * (_SIDE * _SIDE * 3) for level in _LEVELS)
    source = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{_SIDE}x{_SIDE}", "-r", str(_RATE), "-i", "pipe:"]
    try:
        status, _, errors = _run([path, *source, "-c:v", "ffv1", "-pix_fmt", "bgr0", str(film)], pixels)
    except OSError as error:
        raise _Fault(f"{path} cannot start: {error.strerror}; reinstall it") from None
    except _Fault as fault:
        raise _Fault(f"{path} cannot start: {fault}; reinstall it") from None
    banner = re.search(r"^ffmpeg version (\S+)", errors, re.MULTILINE)
    if banner is None or killed_by(status):
        words = last_words(status, errors).removeprefix(f"{path}: ")
        raise _Fault(f"{path} cannot start: {words}; reinstall it")
    if status != 0 or not film.is_file():
        raise _Fault(f"{path} ({banner[1]}) failed its test: it cannot write a film ({last_words(status, errors)})")
    return banner[1]


def _reading(path: str, film: Path) -> list[str]:
    options = [word for name, value in reading_options(2**16).items() for word in (f"-{name}", str(value))]
    return [path, *SWITCHES, *options, "-i", f"file:{film}"]


def _list_packets(path: str, film: Path) -> None:
    status, output, errors = _run([*_reading(path, film), "-map", "0:V:0", "-c", "copy", "-f", "framecrc", "pipe:"])
    if status != 0:
        raise _Fault(f"it cannot list packets ({last_words(status, errors)})")
    base = re.search(rb"^#tb 0: (\d+/\d+)", output, re.MULTILINE)
    try:
        found = [packet(line) for line in output.splitlines() if line and not line.startswith(b"#")]
    except ValueError as error:
        raise _Fault(f"it lists packets in an unknown form ({error})") from None
    times = [] if base is None else [float(tick * Fraction(base[1].decode())) for tick, _, _ in found]
    if times != [k / _RATE for k in range(len(_LEVELS))]:
        raise _Fault(f"it lists packets at {times} s, not every 1/{_RATE} s")


def _decode(path: str, film: Path) -> str:
    """Decodes the last two frames after a seek; returns the option that keeps frames as they are."""
    ticks = [250, 375]  # Matroska counts milliseconds
    select = f"select='if(between(pts,{ticks[0]},{ticks[1]}),(eq(pts,{ticks[0]})+eq(pts,{ticks[1]})))'"
    shape = "crop='min(iw,ih*1/1/sar)':'min(ih,iw*sar*1/1)':exact=1,scale=8:8:flags=bilinear,format=rgb24,setsar=1"
    before = ["-seek_timestamp", "1", "-noaccurate_seek", "-ss", "0.250000"]
    reading = _reading(path, film)
    command = [*reading[:-2], *before, *reading[-2:], "-filter_complex", f"[0:V:0]{select},showinfo=checksum=0,{shape}"]
    command += ["-f", "rawvideo", "-pix_fmt", "rgb24", "-frames:v", str(len(ticks))]
    for option in SYNC_OPTIONS:
        status, output, errors = _run([*command, f"-{option}", "passthrough", "pipe:"])
        if status != 0 and f"Unrecognized option '{option}'" in errors:
            continue
        if status != 0:
            raise _Fault(f"it cannot decode ({last_words(status, errors)})")
        frames = [output[first : first + 192] for first in range(0, len(output), 192)]
        if len(frames) != 2 or any(
            abs(value - level) > 2 for frame, level in zip(frames, _LEVELS[2:], strict=True) for value in frame
        ):
            raise _Fault("it decodes other pictures than it wrote")
        lines = [FRAME.search(line) for line in errors.splitlines()]
        if [int(line[1]) for line in lines if line] != ticks or not any(map(TIME_BASE.search, errors.splitlines())):
            raise _Fault("its filter showinfo prints no times that are understood")
        return option
    raise _Fault(f"it knows neither of the options {' and '.join(SYNC_OPTIONS)}")
