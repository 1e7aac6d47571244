"""What the content gates call black and still, on films whose truth is known and on films of your own.

    python -m tests.bench.thresholds [FILM_OR_FOLDER...] [--json]

Without films it draws some with ffmpeg, through four encoders: black, nearly black and faded out; dark or small things
on black; held pictures, slides, few pictures a second; slow and small motion. Each film's true shares of black frames
and of still steps follow from how it is drawn. Beside `black_frames` and `static_frames` (pipeline/stages/content.py)
stand the plain measures by means over the whole frame, mean luma below 8 and mean change below 0.04. The status is 1
where a share is off by more than TOLERANCE.

With films: how dark and how still they are, beside the thresholds. Frames are those that the recipe `demo` keeps.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.corpus import make_corpus
from pipeline.media.decode import decode, ffmpeg_binary, probe, select_frames
from pipeline.media.faults import DecodeError
from pipeline.recipes import demo
from pipeline.sources.folders import films_in
from pipeline.stages.content import BLACK, STILL, brightest, largest_change, luma_of

TOLERANCE = 0.15
"""Of the 31 steps of a film three or four may be misjudged: a keyframe changes a held picture a little."""
ENCODERS = {
    "x264": ("-c:v", "libx264", "-crf", "20", "-g", "12"),
    "x264 small": ("-c:v", "libx264", "-crf", "30", "-g", "12"),
    "mpeg4": ("-c:v", "mpeg4", "-q:v", "5", "-g", "12"),
    "vp9": ("-c:v", "libvpx-vp9", "-crf", "30", "-b:v", "0", "-g", "12", "-deadline", "realtime", "-cpu-used", "8"),
}
_SOURCE = "size=128x96:rate=16"
_BLACK, _PICTURE = f"color=black:{_SOURCE}", f"testsrc2={_SOURCE}"
_HOLD = "tpad=stop_mode=clone:stop_duration=3"
_HELD = f"{_PICTURE}:duration=0.05,{_HOLD}"
_TEXTURE = f"cellauto=rule=110:{_SOURCE},trim=start_frame=90:end_frame=91,setpts=PTS-STARTPTS,{_HOLD}"


@dataclass(frozen=True)
class Drawn:
    """A film of two seconds and 32 frames, as ffmpeg's filters, and what is true of it; None is not asked."""

    name: str
    graph: str
    black: float | None
    still: float | None


def _dim(factor: float) -> str:
    return "format=gbrp,lutrgb=" + ":".join(f"{colour}='val*{factor}'" for colour in "rgb")


def _over(ground: str, side: int, x: str, y: str, colour: str = "white") -> str:
    """A square on a ground, its place a formula of the time t."""
    return f"{ground}[g];color={colour}:{_SOURCE},crop={side}:{side}[s];[g][s]overlay=x='{x}':y='{y}':format=gbrp"


def _disc(ground: int, disc: int, radius: float, speed: float) -> str:
    """A disc with a soft edge that glides `speed` pixels a second."""
    inside = f"1/(1+exp(2*(hypot(X-40-{speed}*T,Y-48)-{radius})))"
    return f"color=gray:{_SOURCE},format=gray,geq=lum='{ground}+{disc - ground}*{inside}'"


DRAWN = (
    Drawn("black", _BLACK, 1, 1),
    Drawn("nearly black", f"color=0x080808:{_SOURCE}", 1, 1),
    Drawn("black with a sensor's noise", f"{_BLACK},noise=alls=12:allf=t", 1, None),
    Drawn("faded out after a second", f"{_PICTURE},fade=out:st=0.5:d=0.5", 0.5, 0.5),
    Drawn("a small white square crosses black", _over(_BLACK, 6, "20+32*t", "40"), 0, 0),
    Drawn("a dim square crosses black", _over(_BLACK, 24, "16+32*t", "40", "0x303030"), 0, 0),
    Drawn("sparse cells on black", f"life={_SOURCE}:ratio=0.06:seed=1", 0, 0),
    Drawn("few stars that twinkle", f"{_BLACK},format=gray,geq=lum='220*gt(random(1),0.995)'", 0, 0),
    Drawn("a picture in the dark", f"{_PICTURE},{_dim(0.12)}", 0, 0),
    Drawn("a fractal in the dark", f"mandelbrot={_SOURCE}:start_scale=1,{_dim(0.2)}", 0, 0),
    Drawn("a held picture", _HELD, 0, 1),
    Drawn("a held texture", _TEXTURE, 0, 1),
    Drawn("a held picture in the dark", f"{_HELD},{_dim(0.15)}", 0, 1),
    Drawn("two slides", f"{_HELD},trim=duration=1[a];{_TEXTURE},trim=duration=1[b];[a][b]concat", 0, 30 / 31),
    Drawn("four pictures a second", "testsrc2=size=128x96:rate=4,fps=16", 0, 24 / 31),
    Drawn("a picture turns slowly", f"{_HELD},rotate=a='0.1*t'", 0, 0),
    Drawn("a small square crosses a held picture", _over(_HELD, 6, "30+16*t", "40"), 0, 0),
    Drawn("a small disc glides slowly", _disc(90, 210, 5, 4), 0, 0),
    Drawn("a small dim disc glides on black", _disc(0, 60, 6, 8), 0, 0),
    Drawn("a fade", f"{_HELD},eq=brightness='0.1*t':eval=frame", 0, 0),
    Drawn("a fractal", f"mandelbrot={_SOURCE}:start_scale=1", 0, 0),
    Drawn("a gradient turns", f"gradients={_SOURCE}:speed=0.02:seed=1", 0, 0),
)


def draw(film: Drawn, encoder: str, path: Path) -> Path:
    """Makes the film."""
    command = [ffmpeg_binary(), "-v", "error", "-nostdin", "-y", "-f", "lavfi", "-i", f"{film.graph},trim=end_frame=32"]
    subprocess.run([*command, *ENCODERS[encoder], "-pix_fmt", "yuv420p", "-threads", "1", str(path)], check=True)
    return path


def frames_of(film: Path) -> np.ndarray:
    """All the frames that a recipe of the demo's rate and size keeps. Raises DecodeError."""
    recipe = demo()
    found = probe(film)
    window = select_frames(found, 0.0, found.seconds + 1.0, recipe.rate)
    return next(decode(film, [window], recipe.size))


def judge(film: Drawn, frames: np.ndarray) -> dict[str, float]:
    """The shares that were found, those by plain means, and how far the first are off (NaN where nothing is asked)."""
    luma = luma_of(frames)
    means, changes = luma.mean(axis=(1, 2)), np.abs(np.diff(luma, axis=0)).mean(axis=(1, 2))
    black, still = float((brightest(luma) < BLACK).mean()), float((largest_change(luma) < STILL).mean())
    return {
        "black": black,
        "black_by_mean": float((means < 8).mean()),
        "black_off": math.nan if film.black is None else abs(black - film.black),
        "still": still,
        "still_by_mean": float((changes < 0.04).mean()),
        "still_off": math.nan if film.still is None else abs(still - film.still),
    }


def of_drawn() -> Iterator[dict[str, object]]:
    """A row for each drawn film and encoder, and for each film of the demo's corpus, in which nothing is black."""
    with tempfile.TemporaryDirectory() as folder:
        for film in DRAWN:
            for encoder in ENCODERS:
                found = judge(film, frames_of(draw(film, encoder, Path(folder, "film.mkv"))))
                yield {
                    "film": film.name,
                    "encoder": encoder,
                    "true_black": film.black,
                    "true_still": film.still,
                    **found,
                }
        make_corpus(Path(folder, "corpus"))
        for path in films_in([Path(folder, "corpus")]):
            film = Drawn(path.name, "", 0, 0)
            yield {
                "film": film.name,
                "encoder": "corpus",
                "true_black": 0,
                "true_still": 0,
                **judge(film, frames_of(path)),
            }


def measure(film: Path) -> dict[str, float]:
    """Figures of one film. Raises DecodeError."""
    luma = luma_of(frames_of(film))
    bright, change = brightest(luma), largest_change(luma)
    return {
        "frames": len(luma),
        "darkest": float(bright.min()),
        "dark_1_percent": float(np.percentile(bright, 1)),
        "dark_10_percent": float(np.percentile(bright, 10)),
        "black_share": float((bright < BLACK).mean()),
        "stillest": float(change.min()),
        "still_1_percent": float(np.percentile(change, 1)),
        "still_10_percent": float(np.percentile(change, 10)),
        "change_median": float(np.median(change)),
        "static_share": float((change < STILL).mean()),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints a row for each film."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.thresholds", description=__doc__.partition("\n")[0])
    parser.add_argument("films", nargs="*", metavar="FILM_OR_FOLDER")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    rows: list[dict[str, object]] = []
    for film in films_in(options.films):
        try:
            rows.append({"film": film.name, **measure(film)})
        except DecodeError as error:
            print(f"{film.name}: {error}", file=sys.stderr)
    if not options.films:
        rows = list(of_drawn())
    if options.json:
        print(json.dumps(rows))
    elif rows:
        print(" | ".join(rows[0]))
        for row in rows:
            print(" | ".join(f"{value:.3g}" if isinstance(value, float) else str(value) for value in row.values()))
    if options.films:
        return 0
    status = 0
    for name, truth in (("black", "true_black"), ("still", "true_still")):
        asked = [row for row in rows if row[truth] is not None]
        off, plain = (
            sum(abs(float(str(row[which])) - float(str(row[truth]))) > TOLERANCE for row in asked)
            for which in (name, f"{name}_by_mean")
        )
        print(f"{name}: {off} of {len(asked)} films off by more than {TOLERANCE}; by means {plain}", file=sys.stderr)
        status |= off > 0
    return status


if __name__ == "__main__":
    sys.exit(main())
