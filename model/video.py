"""Writing frames as files a person can play: mp4 through ffmpeg, gif, webp and png without it."""

from __future__ import annotations

import contextlib
import itertools
import subprocess
import tempfile
from collections.abc import Iterable
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from model.ffmpeg import Ffmpeg, NoFfmpeg, encoders, environment, find_ffmpeg, killed_by, last_words

if TYPE_CHECKING:
    from torch import Tensor

Frames = NDArray[np.uint8]
"""(N, H, W, 3) RGB."""

SUFFIXES = (".mp4", ".gif", ".webp", ".png")


ENCODERS = {
    "libx264": ("-crf", "12"),
    "libopenh264": ("-b:v", "{bits}"),
    "mpeg4": ("-q:v", "2"),
}
"""Encoders of an mp4 and their options, the best first; `bits` a second that are plenty."""


def ffmpeg_binary() -> str:
    """Path of the ffmpeg to use. Raises as `model.ffmpeg.find_ffmpeg`."""
    return find_ffmpeg().path


def mp4_encoder(ffmpeg: Ffmpeg) -> str:
    """The first of `ENCODERS` that this ffmpeg has.

    Raises:
        NoFfmpeg: it has none; the message names them.
    """
    found = next((name for name in ENCODERS if name in encoders(ffmpeg.path)), None)
    if found is None:
        raise NoFfmpeg(
            f"{ffmpeg.path} ({ffmpeg.version}) has no encoder for an mp4 ({', '.join(ENCODERS)}); "
            "write a .gif or .webp, or name another ffmpeg with VLFM_FFMPEG"
        )
    return found


def to_frames(pictures: Tensor) -> Frames:
    """Pictures (N, 3, H, W) in [-1, 1] as frames."""
    scaled = (pictures.detach().float().clamp(-1, 1) + 1) * 127.5
    frames: Frames = scaled.round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return frames


def from_frames(frames: Frames) -> Tensor:
    """Frames as pictures (N, 3, H, W) in [-1, 1]."""
    import torch

    return torch.from_numpy(np.array(frames)).permute(0, 3, 1, 2).float() / 127.5 - 1


def check_output(path: str | Path) -> None:
    """Whether a video can be written to `path`: its suffix is known, and an mp4 has an ffmpeg.

    Raises:
        ValueError, NoFfmpeg: it cannot; the message says the remedy.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in SUFFIXES:
        what = suffix or "a file without suffix"
        raise ValueError(f"{Path(path).name}: cannot write {what}; use {', '.join(SUFFIXES)}")
    if suffix == ".mp4":
        mp4_encoder(find_ffmpeg())


def write_video(path: str | Path, frames: Frames | Iterable[Frames], rate: float) -> Path:
    """Write frames at `rate` frames per second; the suffix says how.

    `.mp4` is H.264 through ffmpeg (MPEG-4 where it has no encoder for that), `.gif` and `.webp` are animations, `.png`
    is a strip of all frames side by side.

    frames: all of them, or batches of them one after the other; an mp4 then needs the memory of one batch.

    Raises:
        ValueError: an unknown suffix, no frames, or a rate that is not positive.
        NoFfmpeg: an mp4 without an ffmpeg.
        OSError: ffmpeg or the disk failed; the message is ffmpeg's last line.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    check_output(path)
    if not 0 < rate < float("inf"):
        raise ValueError(f"fps is {rate}; it must be a number above 0")
    batches = iter([frames] if isinstance(frames, np.ndarray) else frames)
    first = next((batch for batch in batches if len(batch)), None)
    if first is None:
        raise ValueError(f"{path.name}: there are no frames to write; ask for a longer --duration")
    path.parent.mkdir(parents=True, exist_ok=True)
    if suffix == ".mp4":
        _write_mp4(path, first.shape[1:3], itertools.chain([first], batches), rate)
    else:
        path.write_bytes(picture_bytes(np.concatenate([first, *batches]), rate, suffix[1:]))
    return path


def picture_bytes(frames: Frames, rate: float, kind: str) -> bytes:
    """Frames as the bytes of a `gif` or `webp` animation, or of a `png` strip.

    A gif counts in hundredths of a second, and players slow down what is shown for less than two of them: of more than
    50 frames per second it holds 50.
    """
    from PIL import Image

    out = BytesIO()
    if kind == "png":
        Image.fromarray(np.concatenate(list(frames), axis=1)).save(out, "PNG", optimize=True)
        return out.getvalue()
    if kind == "gif" and rate > 50:
        frames, rate = frames[(np.arange(max(1, int(len(frames) * 50 / rate))) * rate / 50).astype(int)], 50.0
    pictures = [Image.fromarray(frame) for frame in frames]
    # Rounded ends of the frames, not rounded lengths: the film lasts as long as it should.
    tick = 10 if kind == "gif" else 1  # milliseconds
    ends = np.round(np.arange(len(frames) + 1) * 1000 / rate / tick).astype(int) * tick
    lengths = np.diff(ends).tolist()
    options: dict[str, object] = {"quality": 90, "method": 4} if kind == "webp" else {"optimize": True}
    pictures[0].save(out, kind.upper(), save_all=True, append_images=pictures[1:], duration=lengths, loop=0, **options)
    return out.getvalue()


def _write_mp4(path: Path, size: tuple[int, int], batches: Iterable[Frames], rate: float) -> None:
    height, width = (side + side % 2 for side in size)  # an odd size does not fit 4:2:0
    # A temporary name keeps a half-written file from looking whole.
    part = path.with_name(f".{path.stem}.part.mp4")
    ffmpeg = find_ffmpeg()
    encoder = mp4_encoder(ffmpeg)
    options = [option.format(bits=int(height * width * rate) // 2 + 100_000) for option in ENCODERS[encoder]]
    command = [
        *(ffmpeg.path, "-nostdin", "-v", "error", "-y"),
        *("-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", repr(float(rate)), "-i", "pipe:"),
        # Players guess the colours of a film that does not name them, and guess otherwise for large pictures.
        *("-vf", "scale=out_color_matrix=bt709:out_range=tv", "-colorspace", "bt709", "-color_primaries", "bt709"),
        *("-color_trc", "bt709", "-color_range", "tv", "-c:v", encoder, *options, "-pix_fmt", "yuv420p"),
        *("-movflags", "+faststart", str(part)),
    ]
    with tempfile.TemporaryFile() as told:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=told, env=environment())
        assert process.stdin is not None
        try:
            with contextlib.suppress(BrokenPipeError):  # ffmpeg has ended; its last line says why
                for batch in batches:
                    even = np.pad(batch, ((0, 0), (0, height - size[0]), (0, width - size[1]), (0, 0)), mode="edge")
                    process.stdin.write(even.tobytes())
                process.stdin.close()
            process.wait()
        except BaseException:
            process.kill()
            process.wait()
            part.unlink(missing_ok=True)
            raise
        finally:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
        told.seek(0)
        lines = told.read().decode(errors="replace").strip().splitlines()
    if process.returncode:
        part.unlink(missing_ok=True)
        why = lines[-1] if lines and not killed_by(process.returncode) else last_words(process.returncode, "")
        raise OSError(f"ffmpeg could not write {path}: {why}")
    part.replace(path)
