"""A film at another frame rate, without any model: frames to latents, latents to paths, paths read at other times.

The film streams through in chunks of a few frames. Every two neighbouring chunks of a shot have a path of their own, a
HiPPO-LegS projection; where two paths overlap, one passes into the other smoothly, and each has no weight at its own
ends. So there is no seam, and no more than three chunks are held, however long the film. Across a cut nothing is
blended: the last frame before it stays until the first one after it, as in the film itself.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from model.legs.product import product
from model.legs.select import AUTO, clip_method
from model.progress import Progress
from model.video import Frames, check_output, to_frames, write_video
from model.weights import is_shipped
from pipeline.interpolate.blend import readout_matrix, window
from pipeline.media.decode import Probe, decode, probe, shown_size, window_of
from pipeline.media.faults import DecodeError, MediaLimits
from pipeline.media.shots import shot_starts
from pipeline.stages.invert import SharedCodec, to_signed

METHODS = (AUTO, "cubic", "linear", "hold")
MOST_FPS = 1000.0
MOST_FRAMES = 1_000_000
"""Most frames that are written."""
PIXELS: dict[str, Any] = {"kind": "linear", "factor": 1, "channels": 3}
"""The codec that loses nothing: its latents are the pixels."""
CHUNK = (4, 16)
"""Fewest and most frames of a chunk."""
HELD = 2**28
"""Bytes that the latents of three chunks may take before chunks are made smaller."""
DECODED = 1500
"""Frames that one ffmpeg process is asked for: it is told each by name, and a command has a longest length."""
READ_OUT = 4096
"""Frames whose readout is held at once; between two frames of a film with a gap any number may be due."""
NEIGHBOURS = 16
"""Frames outside the part that is asked for that its paths know of."""
SAMPLED = 2**16
"""Values of a frame from which `auto` chooses a method."""


@dataclass(frozen=True)
class Interpolated:
    """What was written, and from what."""

    out: str
    frames: int
    """Frames written."""
    fps: float
    size: tuple[int, int]
    """Height and width in pixels."""
    film: str
    film_frames: int
    """Frames in the film."""
    film_fps: float
    """Its mean frame rate."""
    cuts: tuple[float, ...]
    """Seconds from the film's first frame at which a shot begins, the first one excepted."""
    methods: dict[str, int]
    """How many paths were made by each method."""
    codec: str
    """Its id."""


def interpolate(
    reader: FilmReader,
    out: str | Path,
    fps: float,
    start: float = 0.0,
    duration: float | None = None,
    on_frames: Callable[[int, int], None] | None = None,
) -> Interpolated:
    """Write a film at `fps` frames per second: frame k shows it at `start + k / fps`.

    Args:
        reader: the film.
        out: .mp4 (streamed, without sound), .gif, .webp or .png.
        fps: any rate above 0, at most 1000.
        start: seconds from the film's first frame.
        duration: seconds; to the film's end by default, and never beyond it.
        on_frames: told of frames written and frames in all, now and then.

    Raises:
        ValueError: an argument out of its range; the message names it.
        DecodeError: the film cannot be used; OSError, NoFfmpeg: nothing can be written.
    """
    check_output(out)
    wanted = wanted_times(reader.probe, fps, start, duration)

    def batches() -> Iterator[Frames]:
        written = 0
        for frames in reader.frames_at(wanted):
            if on_frames is not None:
                on_frames(written, len(wanted))
            yield frames
            written += len(frames)
        if on_frames is not None:
            on_frames(written, len(wanted))

    write_video(out, batches(), fps)
    return Interpolated(
        out=str(out),
        frames=len(wanted),
        fps=fps,
        size=reader.size,
        film=str(reader.path),
        film_frames=len(reader.probe.ticks),
        film_fps=round(reader.probe.frame_rate, 3),
        cuts=tuple(reader.cuts),
        methods=dict(reader.methods),
        codec=reader.codec.load().id,
    )


def check_fps(fps: float) -> None:
    """Raises ValueError unless films can be written at this rate."""
    if not 0 < fps <= MOST_FPS:
        raise ValueError(f"fps is {fps:g}; it must be above 0 and at most {MOST_FPS:g}")


def wanted_times(film: Probe, fps: float, start: float = 0.0, duration: float | None = None) -> np.ndarray:
    """The times start + k / fps up to the end, float64, in seconds since the film's first frame.

    Raises:
        ValueError: an argument out of its range; the message names it.
    """
    check_fps(fps)
    if not 0 <= start < film.seconds:
        raise ValueError(f"start is {start:g} s; the film lasts from 0 to {film.seconds:g} s")
    if duration is not None and not duration > 0:
        raise ValueError(f"duration is {duration:g} s; it must be above 0")
    span = film.seconds - start if duration is None else min(duration, film.seconds - start)
    count = max(1, math.ceil(span * fps - 1e-6))
    if count > MOST_FRAMES:
        raise ValueError(f"{span:g} s at {fps:g} fps are {count} frames; at most {MOST_FRAMES} are written at once")
    return start + np.arange(count) / fps


def frame_size(size: str | None, shown: tuple[int, int]) -> tuple[int, int]:
    """Height and width in pixels from `HxW`, or from the short side, of a film that is shown with the size `shown`.

    Raises:
        ValueError: it is neither.
    """
    if size is None:
        return shown
    sides = size.lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() and 0 < int(side) <= 16384 for side in sides):
        raise ValueError(f"size is {size!r}; it must be HxW, as in 240x320, or the short side, as in 240, in pixels")
    if len(sides) == 2:
        return int(sides[0]), int(sides[1])
    scale = int(size) / min(shown)
    return max(1, round(shown[0] * scale)), max(1, round(shown[1] * scale))


@dataclass(frozen=True)
class _Chunk:
    """Neighbouring frames of one shot."""

    times: np.ndarray
    """(n,) seconds since the film's first frame."""
    latents: np.ndarray
    """(n, C, h, w) float32."""
    begins: bool
    """Whether it begins a shot."""


class FilmReader:
    """A film that can be read at any times.

    Args:
        film: a film that ffmpeg reads. Its real frame times are used.
        size: `HxW`, or the length of the short side, in pixels; as the film is shown by default.
        codec: spec of a codec; the pixels themselves by default.
        method: `auto` (chosen for every path by leave-one-out), cubic, linear or hold.
        blend_cuts: whether paths go on across cuts.
        limits: what the film may cost.

    Raises:
        ValueError: an argument out of its range; the message names it.
        DecodeError: the film cannot be used.
    """

    def __init__(
        self,
        film: str | Path,
        *,
        size: str | None = None,
        codec: dict[str, Any] | None = None,
        method: str = AUTO,
        blend_cuts: bool = False,
        limits: MediaLimits | None = None,
    ) -> None:
        if method not in METHODS:
            raise ValueError(f"method is {method!r}; it must be one of {', '.join(METHODS)}")
        self.path, self.limits = Path(film), limits or MediaLimits()
        self.probe = probe(self.path, self.limits)
        self.size = frame_size(size, shown_size(self.path, self.limits))
        self.codec = SharedCodec(codec or PIXELS)
        self.method, self.blend_cuts = method, blend_cuts
        self.cuts: list[float] = []
        """Seconds at which shots began in what was read last."""
        self.methods: Counter[str] = Counter()
        """Paths of what was read last, by their method."""

    def frames_at(self, wanted: np.ndarray, known: np.ndarray | None = None) -> Iterator[Frames]:
        """The film at the times `wanted`, a few frames at a time, uint8 (n, H, W, 3).

        Args:
            wanted: (L,) seconds since the first frame, increasing; beyond the film its first or last frame stays.
            known: indices of the frames to read it from, increasing; all of them by default.
        """
        self.cuts, self.methods = [], Counter()
        known = np.arange(len(self.probe.ticks)) if known is None else known
        first, last = np.searchsorted(self.probe.times[known], wanted[[0, -1]])
        known = known[max(0, first - NEIGHBOURS) : last + NEIGHBOURS]
        done = 0
        before: _Chunk | None = None
        left: str | None = None  # method of the path over `before` and `here`
        for here, following in _with_next(self._chunks(known)):
            if here.begins:
                before = left = None
                self.cuts += [round(float(here.times[0]), 6)] if done else []
            after = None if following is None or following.begins else following
            right = None if after is None and left is not None else self._method(here, after)
            until = math.inf if following is None else following.times[0]
            due = wanted[done : done + int(np.searchsorted(wanted[done:], until))]
            times = (before.times if before else None, here.times, after.times if after else None)
            parts = [part.latents for part in (before, here, after) if part is not None]
            together = max(CHUNK[0], len(here.times))
            for some in np.array_split(due, range(READ_OUT, len(due), READ_OUT)):
                readout = readout_matrix(*times, some, left, right)
                for first in range(0, len(some), together):
                    yield self._shown(readout[first : first + together], parts)
            done += len(due)
            before, left = here, right
            if done == len(wanted):
                return

    def _shown(self, readout: np.ndarray, parts: Sequence[np.ndarray]) -> Frames:
        """The frames that a readout matrix makes of the latents of neighbouring chunks."""
        shares = np.split(readout, np.cumsum([len(part) for part in parts])[:-1], axis=1)
        values = sum(product(share, part.reshape(len(part), -1)) for share, part in zip(shares, parts, strict=True))
        pictures = self.codec.decode(np.reshape(values, (-1, *parts[0].shape[1:])), "")
        return to_frames(pictures)[:, : self.size[0], : self.size[1]]

    def _method(self, here: _Chunk, after: _Chunk | None) -> str:
        """The method of the path over two chunks, or over one that is a whole shot."""
        parts = [here] if after is None else [here, after]
        step = here.latents[0].size // SAMPLED + 1
        sample = np.concatenate([part.latents.reshape(len(part.times), -1)[:, ::step] for part in parts])
        times, duration = window(np.concatenate([part.times for part in parts]))
        method = clip_method(sample, times, duration, 2 * len(times), self.method)
        self.methods[method] += 1
        return method

    def _chunks(self, known: np.ndarray) -> Iterator[_Chunk]:
        padding = self._padding()
        shape = self.codec.load().latent_shape(self.size[0] + padding[0], self.size[1] + padding[1])
        most = int(np.clip(HELD // (3 * 4 * math.prod(shape)), *CHUNK))
        group: list[np.ndarray] = []
        times: list[float] = []
        begins = True
        frames = shot_starts(self._decoded(known, most))
        for time, (frame, starts) in zip(self.probe.times[known], frames, strict=True):
            cut = starts and not self.blend_cuts
            if group and (cut or len(group) == most):
                yield _Chunk(np.array(times), self._encoded(np.stack(group), padding), begins)
                group, times, begins = [], [], cut
            group.append(frame)
            times.append(float(time))
        yield _Chunk(np.array(times), self._encoded(np.stack(group), padding), begins)

    def _decoded(self, known: np.ndarray, most: int) -> Iterator[np.ndarray]:
        """The known frames one by one, uint8 (H, W, 3)."""
        for first in range(0, len(known), DECODED):
            part = known[first : first + DECODED]
            windows = [window_of(self.probe, part[k : k + most]) for k in range(0, len(part), most)]
            for frames in decode(self.path, windows, self.size, self.limits):
                yield from frames

    def _encoded(self, frames: np.ndarray, padding: tuple[int, int]) -> np.ndarray:
        padded = np.pad(frames, ((0, 0), (0, padding[0]), (0, padding[1]), (0, 0)), mode="edge")
        latents = self.codec.encode(to_signed(padded, self.codec.device), [""] * len(padded)).latents
        return np.asarray(latents.float().cpu().numpy())

    def _padding(self) -> tuple[int, int]:
        """Rows and columns that the frames lack for the codec."""
        loaded = self.codec.load()
        for step in (loaded.factor * 2**k for k in range(8)):  # a network may want a multiple of its factor
            padding = (-self.size[0] % step, -self.size[1] % step)
            try:
                loaded.latent_shape(self.size[0] + padding[0], self.size[1] + padding[1])
            except ValueError:
                continue
            return padding
        raise ValueError(f"size is {self.size[0]}x{self.size[1]}; codec {loaded.id} takes no frames near it")


def _with_next(chunks: Iterable[_Chunk]) -> Iterator[tuple[_Chunk, _Chunk | None]]:
    before: _Chunk | None = None
    for chunk in chunks:
        if before is not None:
            yield before, chunk
        before = chunk
    if before is not None:
        yield before, None


# -- the command -------------------------------------------------------------------------------------------------------


def codec_named(name: str) -> dict[str, Any]:
    """The spec of a codec from one word: `pixels`, a data recipe, `vlfm-small`, or a diffusers folder or hub id.

    Raises:
        ValueError: it is none of these.
    """
    from pipeline.recipes import recipe_named

    if name == "pixels":
        return PIXELS
    if "/" in name or Path(name).is_dir() or is_shipped(name):
        return {"kind": "diffusers", "source": name, "inversion_depth": 0}
    try:
        return recipe_named(name).codec
    except ValueError as error:
        raise ValueError(
            f"codec {name!r} is neither 'pixels', a folder nor a hub id, and as a recipe: {error}"
        ) from None


def arguments(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], int]:
    """Add the options of `vlfm interpolate` to a parser; returns what runs them."""
    parser.add_argument("film", metavar="FILM", help="the film; its real frame times are used")
    parser.add_argument("--fps", type=float, required=True, metavar="F", help="frames per second, any up to 1000")
    parser.add_argument(
        "--out", required=True, metavar="FILE", help=".mp4 (without sound), .gif, .webp, or .png for a strip of frames"
    )
    parser.add_argument("--start", type=float, default=0.0, metavar="S", help="seconds into the film (default 0)")
    parser.add_argument("--duration", type=float, metavar="T", help="seconds (default: to the film's end)")
    parser.add_argument("--size", metavar="HxW", help="size in pixels, or the short side (default: the film's own)")
    parser.add_argument(
        "--codec",
        default="pixels",
        metavar="NAME",
        help="pixels (default, loses nothing), a data recipe, vlfm-small, or a folder or hub id in diffusers format",
    )
    parser.add_argument(
        "--method", default=AUTO, choices=METHODS, help="projection; auto (default) chooses cubic or linear by the film"
    )
    parser.add_argument("--blend-cuts", action="store_true", help="blend across cuts, too, as where a film fades")
    parser.add_argument("--json", action="store_true", help="print what was done as JSON")
    return run_arguments


def run_arguments(options: argparse.Namespace) -> int:
    """Interpolate as the options say."""
    lines: list[Progress] = []

    def progress(done: int, total: int) -> None:
        if not lines:
            lines.append(Progress("film", total, "frames"))
        lines[0].update(done)

    check_output(options.out)  # what cannot be written is not worth the wait
    check_fps(options.fps)
    codec = codec_named(options.codec)
    try:
        reader = FilmReader(
            options.film, size=options.size, codec=codec, method=options.method, blend_cuts=options.blend_cuts
        )
        made = interpolate(reader, options.out, options.fps, options.start, options.duration, progress)
    except DecodeError as error:  # an ingest's table names the film, here the message must
        name = Path(options.film).name
        raise DecodeError(error.reason, error.detail if name in error.detail else f"{name}: {error.detail}") from None
    if options.json:
        print(json.dumps(asdict(made)))
        return 0
    print(f"{made.out}  {made.frames} frames of {made.size[1]}x{made.size[0]} at {made.fps:g} fps")
    print(f"from {made.film_frames} frames at {made.film_fps:g} fps", end="")
    print(", methods " + " ".join(f"{name}:{count}" for name, count in sorted(made.methods.items())), end="")
    print(f", cuts at {' '.join(f'{cut:.3f}' for cut in made.cuts)} s" if made.cuts else ", no cuts")
    return 0
