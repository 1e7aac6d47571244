"""Files of latents in the place of films: somebody encoded these frames already, and only the projection is to be made.

A file is in safetensors format and holds what is known of one film:

    latents         (T, C, h, w) float16, bfloat16, float32 or float64, as the codec's `encode` gives them
    frame_time      (T) float64 or float32, seconds, increasing; or else `rate` in the metadata
    metadata        `codec`: the id of the codec that made them; `rate`: frames a second, the first one at 0;
                    `duration` (optional): seconds at which the last frame ends

It is untrusted input as any film: the header is checked when the clips are planned, the values when they are read.
The format is read here and not by its library, which maps the file: one that shrinks then ends the process (SIGBUS).
"""

from __future__ import annotations

import functools
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import IO, Any

import numpy as np

from pipeline.items import CodecFacts, Window
from pipeline.media.decode import Probe
from pipeline.media.faults import DecodeError, MediaLimits, check_readable
from pipeline.rows import printable

NOT_LATENTS, BAD_FRAME_TIMES = "not_latents", "bad_frame_times"
"""Reasons of files that are at fault."""
CODEC_MISMATCH, WRONG_SHAPE = "codec_mismatch", "wrong_shape"
"""Reasons of files that do not suit the recipe."""
HEADER_BYTES = 1 << 24
"""Most bytes of a header that is read."""
_STORED = {"F16": "<f2", "BF16": "<u2", "F32": "<f4", "F64": "<f8"}
"""The format's floats, as numpy reads their bytes; it has no bfloat16, which is the upper half of a float32."""
SHORTEST, LONGEST = 1e-9, 1e12
"""Numbers that times, durations and rates are within, so that none overflows in what is made of them."""
_ROUNDING = Fraction(1, 1_000_000)
"""Seconds to which times that somebody computed are taken to be right: a frame at 1.9999999 is one at 2."""


@dataclass(frozen=True)
class LatentFrames(Probe):
    """The frames of a file of latents. Their ticks are their numbers in the file."""

    frame_time: np.ndarray
    """(frames,) float64 seconds; unlike a film's they need not begin at 0."""

    @functools.cached_property
    def times(self) -> np.ndarray:
        """(frames,) float64 seconds, as stated."""
        return self.frame_time


@dataclass(frozen=True)
class _Tensor:
    kind: str
    shape: tuple[int, ...]
    offset: int
    """Of its first byte in the file."""

    def rows(self, file: IO[bytes], first: int, end: int) -> np.ndarray:
        """Its rows `first` to `end`, in float32 or its own type if that is wider."""
        row = math.prod(self.shape[1:]) * np.dtype(_STORED[self.kind]).itemsize
        file.seek(self.offset + first * row)
        data = file.read((end - first) * row)
        if len(data) < (end - first) * row:
            raise DecodeError("truncated", "the file ends before its tensors do; copy it again")
        values = np.frombuffer(data, _STORED[self.kind]).reshape(end - first, *self.shape[1:])
        if self.kind == "BF16":
            return (values.astype(np.uint32) << 16).view(np.float32)
        return values


def probe_latents(path: Path, codec: CodecFacts, limits: MediaLimits | None = None) -> LatentFrames:
    """The times of the frames of a file of latents, whose shape, type and codec are checked; no latent is read.

    Args:
        path: the file.
        codec: the dataset's, with the shape that its latents have.
        limits: what a film may cost.

    Raises:
        DecodeError: not_latents, bad_frame_times, codec_mismatch, wrong_shape, too_large, truncated, empty_file,
            film_missing, unreadable.
        OSError: it cannot be read.
    """
    limits = limits or MediaLimits()
    check_readable(path, limits)
    with path.open("rb") as file:
        tensors, about = _header(file)
        latents = _checked(tensors, about, codec, limits)
        times = _times(file, latents.shape[0], tensors.get("frame_time"), about)
    last = float(np.median(np.diff(times))) if len(times) > 1 else 0.0
    if "rate" in about:
        last = 1 / _number(about, "rate")
    if "duration" in about:
        last = _number(about, "duration") - float(times[-1])
        if last < 0:
            raise _times_fault(f"duration {about['duration'][:40]} is before its last frame at {times[-1]:g} s")
    return LatentFrames(
        ticks=np.arange(len(times), dtype=np.int64),
        time_base=_ROUNDING,
        last_duration=last,
        keyframes=np.array([], dtype=np.int64),
        codec="latents",
        width=0,
        height=0,
        frame_time=times,
    )


def read_latents(path: Path, window: Window) -> np.ndarray:
    """The latents (N, C, h, w) of a window's frames, the one after it last, as in the file (bfloat16 as float32).

    Raises:
        DecodeError: not_latents, truncated: it is not the file any more that was planned.
        OSError: it cannot be read.
    """
    first, last = window.decoded[0], window.decoded[-1]
    with path.open("rb") as file:
        tensors, _ = _header(file)
        latents = tensors.get("latents")
        if latents is None or latents.shape[0] <= last:
            raise DecodeError(NOT_LATENTS, "its latents are others than when the clips were planned; run again")
        rows = latents.rows(file, first, last + 1)
    return np.asarray(rows[np.asarray(window.decoded) - first])


def _header(file: IO[bytes]) -> tuple[dict[str, _Tensor], Mapping[str, str]]:
    """The tensors of a safetensors file that are floats, and its metadata."""
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if not 2 <= length <= min(size - 8, HEADER_BYTES):
        what = "truncated" if 2 <= length <= HEADER_BYTES and size > 8 else NOT_LATENTS
        raise DecodeError(what, f"no whole safetensors file: its header would have {length} bytes; write it again")
    try:
        header = json.loads(file.read(length))
        about = header.pop("__metadata__", {})
        if not all(isinstance(value, str) for value in about.values()):
            raise ValueError("its metadata is not text")
        found = {name: _tensor(each, 8 + length) for name, each in header.items() if each["dtype"] in _STORED}
        kinds = {name: str(each["dtype"])[:20] for name, each in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        told = f"{type(error).__name__}: {' '.join(str(error).split())}"[:100]
        raise DecodeError(NOT_LATENTS, f"no safetensors file ({told}); write it again") from None
    if "latents" not in found:
        held = ", ".join(f"{name} {kind}" for name, kind in sorted(kinds.items()))[:100] or "nothing"
        detail = f"it has no tensor `latents` of {', '.join(_STORED)} (it holds {held}); write one of (T, C, h, w)"
        raise DecodeError(NOT_LATENTS, detail)
    for tensor in found.values():
        bytes_ = math.prod(tensor.shape) * np.dtype(_STORED[tensor.kind]).itemsize
        if tensor.offset + bytes_ > size:
            raise DecodeError("truncated", f"the file has {size} bytes and ends before its tensors do; copy it again")
    return found, about


def _tensor(entry: Mapping[str, Any], begin: int) -> _Tensor:
    shape, (first, end) = tuple(entry["shape"]), entry["data_offsets"]
    if not all(type(number) is int and number >= 0 for number in (*shape, first, end)):
        raise ValueError("a tensor's shape or place is no number")
    if end - first != math.prod(shape) * np.dtype(_STORED[entry["dtype"]]).itemsize:
        raise ValueError("a tensor has not the bytes of its shape")
    return _Tensor(entry["dtype"], shape, begin + first)


def _checked(
    tensors: Mapping[str, _Tensor], about: Mapping[str, str], codec: CodecFacts, limits: MediaLimits
) -> _Tensor:
    """The latents, if they suit the dataset."""
    shape = tensors["latents"].shape
    if "codec" not in about:
        detail = f"its metadata does not say which codec made it; if that was this dataset's, write codec={codec.id}"
        raise DecodeError(NOT_LATENTS, detail)
    if about["codec"] != codec.id:
        made = printable(about["codec"][:100])
        raise DecodeError(CODEC_MISMATCH, f"made by codec {made}, the dataset's is {codec.id}; use that codec's recipe")
    if len(shape) != 4 or shape[1:] != codec.latent_shape:
        wanted = f"(T, {', '.join(map(str, codec.latent_shape))})"
        remedy = "set size to that of its frames" if len(shape) == 4 and shape[1] == codec.channels else "write it so"
        raise DecodeError(WRONG_SHAPE, f"its latents have shape {shape}, the dataset's are {wanted}; {remedy}")
    if shape[0] > limits.max_frames:
        raise DecodeError("too_large", f"{shape[0]} frames; the recipe allows {limits.max_frames}; raise max_frames")
    if shape[0] == 0:
        raise DecodeError(NOT_LATENTS, "it has no frame; remove it")
    return tensors["latents"]


def _times(file: IO[bytes], frames: int, stated: _Tensor | None, about: Mapping[str, str]) -> np.ndarray:
    """The times of the frames in float64, as stated."""
    if stated is None:
        if "rate" not in about:
            raise _times_fault("it has neither a tensor frame_time of floats nor a rate in its metadata")
        return np.arange(frames) / _number(about, "rate")
    if "rate" in about:
        raise _times_fault("it has both frame_time and a rate; keep the one that is right")
    if stated.kind not in ("F32", "F64") or stated.shape != (frames,):
        raise _times_fault(f"frame_time is {stated.kind} {stated.shape}, not F64 ({frames},)")
    times = stated.rows(file, 0, frames).astype(np.float64)
    if not (times <= LONGEST).all():  # NaN is not, either
        raise _times_fault(f"a frame's time is NaN or above {LONGEST:g}")
    if times[0] < 0 or (np.diff(times) <= 0).any():
        raise _times_fault("the frames' times are not increasing seconds from 0 on")
    return times


def _number(about: Mapping[str, str], name: str) -> float:
    """A positive number of the metadata, within SHORTEST and LONGEST."""
    try:
        value = float(about[name])
    except ValueError:
        value = math.nan
    if not SHORTEST <= value <= LONGEST:
        raise _times_fault(f"{name} is {printable(about[name][:40])}, not a number from {SHORTEST:g} to {LONGEST:g}")
    return value


def _times_fault(what: str) -> DecodeError:
    return DecodeError(BAD_FRAME_TIMES, f"{what}; write the file again")
