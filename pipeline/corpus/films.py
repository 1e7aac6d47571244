"""A corpus of captioned films drawn by ffmpeg alone, so that the first run needs no download.

`pipeline.corpus.scenes` says what the films show; here they get sizes, frame rates, containers and codecs, and are
drawn with ffmpeg's `geq` filter on a small picture that is then enlarged, which is fast and softens the edges further.
"""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from model.ffmpeg import Ffmpeg, encoders, find_ffmpeg
from pipeline.corpus.folder import Drawing, Progress, make_films, run_ffmpeg
from pipeline.corpus.scenes import BRIGHT, DARK, SCENES, Palette, Scene
from storage.fingerprint import fingerprint

DRAWING = 1  # raise when the pictures change, so that folders made by an older drawing are made anew
SHORT_SIDE = 60  # pixels of the small picture the formulas are evaluated on
RATES = (48, 25, 30, 24, 48, 30, 25)  # frames per second; lengths of these tables share no factor, so films mix them
SIZES = ((128, 96), (160, 120), (96, 96), (192, 108), (320, 240), (176, 144), (108, 192), (144, 96), (240, 240))
FORMATS = (  # container, encoder, its options
    ("mp4", "libx264", "-crf 12 -preset veryfast"),
    ("webm", "libvpx", "-crf 6 -b:v 3M -deadline realtime -cpu-used 8"),
    ("avi", "mpeg4", "-q:v 2"),
    ("mkv", "ffv1", ""),
    ("mov", "libx264", "-crf 14 -preset veryfast -g 12"),
    ("mkv", "libvpx-vp9", "-crf 16 -b:v 0 -deadline realtime -cpu-used 8"),
    ("avi", "mjpeg", "-q:v 2 -pix_fmt yuvj420p"),
    ("mp4", "mpeg4", "-q:v 2 -bf 2"),
    ("mkv", "libx264", "-crf 12 -preset veryfast"),
    ("mov", "mjpeg", "-q:v 2 -pix_fmt yuvj420p"),
    ("webm", "libvpx-vp9", "-crf 16 -b:v 0 -deadline realtime -cpu-used 8"),
)
COMMON = (("mpeg4", "-q:v 2"), ("mjpeg", "-q:v 2 -pix_fmt yuvj420p"), ("ffv1", ""))
"""Encoders that ffmpeg has of its own, for films whose encoder it lacks; the first that there is."""
IRREGULAR = 5  # the index of the film whose frames come at a variable rate


@dataclass(frozen=True)
class FilmPlan:
    """One film to be made: its scene and how it is stored. Times in seconds, sizes in pixels, rate in frames/s."""

    file: str
    scene: Scene
    width: int
    height: int
    rate: int
    seconds: float
    encoder: str
    options: tuple[str, ...]
    irregular: bool


def plan_films(seed: int = 0, films: int = 32, encoders: frozenset[str] | None = None) -> list[FilmPlan]:
    """The films a corpus will hold, in order; a pure function of its arguments.

    `encoders` are those the ffmpeg at hand has (None: all of FORMATS); a film whose encoder is missing
    takes the first of COMMON. Raises ValueError unless 1 <= films <= 128 (above, the captions would run out of
    colours to differ in).
    """
    if not 1 <= films <= 128:
        raise ValueError(f"films must be between 1 and 128, not {films}")
    plans: list[FilmPlan] = []
    captions: set[str] = set()
    for index in range(films):
        draw = random.Random(f"{seed}/{index}")
        long = index % 9 == 4  # 10 s without a cut: a window then depends on where it starts, not on its caption alone
        swing = 3.2 if long else 4.0
        scene: Scene | None = None
        while scene is None or scene.caption in captions:  # other colours until no film before has the caption
            bright, other = draw.sample(sorted(BRIGHT), 2)
            palette = Palette(bright, other, draw.choice(sorted(DARK)))
            scene = SCENES[index % 8](index // 8 % 4, palette, swing, long)
        captions.add(scene.caption)
        container, encoder, options = FORMATS[index % len(FORMATS)]
        irregular = index == IRREGULAR
        if irregular:
            container, encoder, options = FORMATS[8]
        if encoders is not None and encoder not in encoders:
            encoder, options = next(((name, words) for name, words in COMMON if name in encoders), COMMON[0])
            container = "avi" if container == "webm" else container
        width, height = SIZES[index % len(SIZES)]
        plans.append(
            FilmPlan(
                file=f"{index + 1:02d}-{scene.motion.replace(' ', '-')}.{container}",
                scene=scene,
                width=width,
                height=height,
                rate=48 if irregular else RATES[index % len(RATES)],
                seconds=10.15 if long else 3.1 if index % 7 == 6 else 2.15,
                encoder=encoder,
                options=tuple(options.split()),
                irregular=irregular,
            )
        )
    return plans


def film_command(ffmpeg: Ffmpeg, plan: FilmPlan, target: Path) -> list[str]:
    """The ffmpeg command that draws one film into `target` (its suffix chooses the container)."""
    half = SHORT_SIDE / 2
    scale = SHORT_SIDE / min(plan.width, plan.height)
    small_width, small_height = round(plan.width * scale), round(plan.height * scale)
    place = {"U": f"((X+0.5-{small_width / 2})/{half})", "V": f"((Y+0.5-{small_height / 2})/{half})"}
    formulas = [channel.replace("U", place["U"]).replace("V", place["V"]) for channel in plan.scene.channels]
    source = f"nullsrc=size={small_width}x{small_height}:rate={plan.rate}:duration={plan.seconds}"
    red, green, blue = formulas
    filters = f"format=gbrp,geq=r='{red}':g='{green}':b='{blue}',scale={plan.width}:{plan.height}:flags=bicubic"
    if plan.irregular:  # leaves gaps of 1 to 4 forty-eighths of a second
        filters += ",select='not(eq(mod(n,5),2)+eq(mod(n,7),3)+eq(mod(n,7),4))'"
    command = [ffmpeg.path, "-hide_banner", "-loglevel", "error", "-nostdin", "-y", "-filter_threads", "1"]
    command += ["-f", "lavfi", "-i", f"{source},{filters}", "-an", "-c:v", plan.encoder, "-threads", "1"]
    if "-pix_fmt" not in plan.options:
        command += ["-pix_fmt", "yuv420p"]
    command += [*plan.options, f"-{ffmpeg.sync_option}", "vfr" if plan.irregular else "cfr"]
    # Bit-exact muxing leaves out dates and random ids, so that equal seeds give equal bytes.
    return [*command, "-fflags", "+bitexact", "-flags:v", "+bitexact", str(target)]


def make_corpus(folder: Path, seed: int = 0, films: int = 32, progress: Progress | None = None) -> Path:
    """Draws the films and writes `captions.csv` (columns file, caption, motion) beside them; returns its path.

    Films that an earlier run with the same arguments made and nobody changed are kept, so an interrupted run goes on
    where it stopped; films of a run with other arguments are removed. `progress(done, total, file)` is called after
    each film.

    Raises:
        ValueError: unless 1 <= films <= 128.
        NoFfmpeg: there is no ffmpeg that works.
        OSError: ffmpeg could not make a film (a full disk too); its message is in it.
    """
    ffmpeg = find_ffmpeg()
    plans = plan_films(seed, films, encoders(ffmpeg.path))
    drawings = {
        plan.file: Drawing(
            fingerprint({"drawing": DRAWING, "plan": asdict(plan)}),
            partial(_draw, ffmpeg, plan),
        )
        for plan in plans
    }
    rows = [(plan.file, plan.scene.caption, plan.scene.motion) for plan in plans]
    return make_films(folder, drawings, ("file", "caption", "motion"), rows, progress)


def _draw(ffmpeg: Ffmpeg, plan: FilmPlan, target: Path) -> None:
    run_ffmpeg(ffmpeg, film_command(ffmpeg, plan, target))
