"""Data recipes: functions that return a frozen dataclass, which owns window, rate, size, observation, order, codec.

What a training recipe needs to know of these it reads from the dataset's version.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.gates import FLAG, REJECT, check_gates
from pipeline.media.faults import MediaLimits

OBSERVATIONS = ("every_second", "all", "random")
METHODS = ("auto", "hold", "linear", "cubic", "lstsq", "bilinear", "paper")
"""`auto`, and those of model.legs, which recipes do not import: it loads torch."""
TAKE_NEXT_FRAME = ("auto", "hold", "linear", "cubic")
"""Methods that take frames outside the window."""
AS_BEFORE, YES, NO = "auto", "yes", "no"
NEXT_FRAME = (AS_BEFORE, YES, NO)


@dataclasses.dataclass(frozen=True)
class Shots:
    """Clips that are whole shots, or the parts of films that a table of captions names."""

    min_frames: int = 8
    """Fewest kept frames of a clip; shorter ones are filtered as `too_few_frames`."""
    max_frames: int = 128
    """Most kept frames of a clip; longer ones are filtered as `too_many_frames`."""
    detect: bool = True
    """Whether a film is searched for cuts; else each film, or part of one, is one clip."""


@dataclasses.dataclass(frozen=True)
class DataRecipe:
    """Everything that turns films and captions into a dataset."""

    name: str
    """Name of the recipe function that made it."""
    duration: float = 2.0
    """T, length of a clip's window in seconds; with `shots` each clip has its own."""
    rate: float = 16.0
    """Most frames kept in a second; films are thinned to it and never filled up."""
    shots: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Fields of `Shots`, as in `shots.max_frames=64`: clips are whole shots or caption spans of any length in between.
    Empty: clips are windows of `duration`."""
    size: tuple[int, int] = (64, 64)
    """Height and width of the frames in pixels; films are scaled to cover it and cropped at the centre."""
    observe: str = "every_second"
    """Which kept frames enter the coefficients: `every_second`, `all`, or `random` (half, drawn by the
    clip's id); the first and the last always do."""
    order: int = 0
    """s, number of coefficients; 0 means twice the observed frames of a full window."""
    method: str = "auto"
    """Projection method of model.legs. `auto` chooses `cubic` or `linear` for each clip, by leave-one-out over its
    observed frames; on clips with very uneven times it is `linear`, and so is `cubic`."""
    next_frame: str = AS_BEFORE
    """Whether the film's next frame after a window, the first of the window that follows, enters the coefficients too:
    `yes`, `no`, or `auto`: as the lake's newest version that agrees in everything else, and `yes` where there is none.
    Where the film ends, or is cut, there is no such frame. With `shots`, and methods that take no frames outside the
    window, it is not used."""
    codec: dict[str, Any] = dataclasses.field(
        default_factory=lambda: {"kind": "linear", "factor": 4, "channels": 12, "scale": 1.0}
    )
    """Spec of the codec, as in model.codecs.factory.codec_from_spec."""
    text: dict[str, Any] = dataclasses.field(default_factory=lambda: {"kind": "builtin"})
    """Spec of the text encoder, as in model.text.encoder.text_encoder_from_spec."""
    store_latents: bool = True
    """Whether a shard's samples hold the latents of all kept frames beside the coefficients (Zarr always does)."""
    validation_fraction: float = 0.1
    """Share of the films in the validation split, chosen by a hash of the film."""
    min_observed: int = 4
    """Fewest observed frames of a clip; fewer are filtered as `too_few_frames`."""
    preview_clips: int = 64
    """How many training clips keep their frames for evaluation, beside the whole validation split."""
    block_clips: int = 16
    """Clips in a block: the unit of work, of resume, and of a shard."""
    captions_required: bool = True
    """Whether a film without a caption fails; else it gets the empty caption."""
    certify_frames: int = 0
    """How many of a clip's frames are decoded again to measure PSNR and SSIM, spread evenly; 0 takes all of them."""
    gates: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Bounds on the figures of a clip's certificate (storage.schema.CERTIFICATE): the least where more is better, else
    the most, as in `gates.psnr_codec=25` or `gates.end_ratio=20`. null is no gate; what was not measured passes."""
    below_gate: str = REJECT
    """What becomes of clips outside a gate: `reject` filters them, `flag` keeps them with their `flags` set."""
    score_only: list[str] = dataclasses.field(default_factory=list)
    """Figures whose gates set `flags` only, whatever `below_gate` says, as in `score_only=["cuts", "motion"]`."""
    split_at_cuts: bool = False
    """Whether windows begin anew at each cut of a film, so that none holds one; each new film is decoded once, small,
    to find its cuts."""
    tolerate: float = 0.05
    """Share of the films that may fail before the command's exit status is 3."""
    max_pixels: int = 8192 * 4320
    """Largest frame of a film, in pixels."""
    max_frames: int = 1_000_000
    """Most frames in a film."""
    timeout: float = 120.0
    """Longest wait in seconds for ffmpeg to read a film's times, or the frames of one clip."""
    max_bytes: int = 2**38
    """Largest file of a film, in bytes."""

    def __post_init__(self) -> None:
        """Raises ValueError for values that no run could work with; the message names the field."""
        checks = {
            "duration": self.duration > 0,
            "rate": self.rate > 0,
            "size": len(self.size) == 2 and min(self.size) >= 1,
            "observe": self.observe in OBSERVATIONS,
            "order": self.order >= 0,
            "method": self.method in METHODS,
            "next_frame": self.next_frame in NEXT_FRAME,
            "validation_fraction": 0 <= self.validation_fraction < 1,
            "min_observed": self.min_observed >= 1,
            "preview_clips": self.preview_clips >= 0,
            "block_clips": self.block_clips >= 1,
            "tolerate": 0 <= self.tolerate <= 1,
            "timeout": self.timeout > 0,
            "certify_frames": self.certify_frames >= 0,
            "below_gate": self.below_gate in (REJECT, FLAG),
            "max_pixels": self.max_pixels >= 1,
            "max_frames": self.max_frames >= 1,
            "max_bytes": self.max_bytes >= 1,
        }
        for field, good in checks.items():
            if not good:
                choices = {"observe": OBSERVATIONS, "method": METHODS, "next_frame": NEXT_FRAME}
                words = {**choices, "below_gate": (REJECT, FLAG)}.get(field)
                hint = f"; choose one of {', '.join(words)}" if words else ""
                raise ValueError(f"recipe {self.name}: {field} = {getattr(self, field)!r} cannot be{hint}")
        if wrong := check_gates(self.gates) or check_gates(dict.fromkeys(self.score_only)) or self._wrong_shots():
            raise ValueError(f"recipe {self.name}: {wrong}")

    def _wrong_shots(self) -> str:
        """What is wrong with `shots`, in words; empty where nothing is."""
        defaults = dataclasses.asdict(Shots())
        for name, value in self.shots.items():
            if name not in defaults:
                return f"shots.{name} is unknown; the settings are: {', '.join(f'shots.{each}' for each in defaults)}"
            if type(value) is not type(defaults[name]):
                return f"shots.{name} is {value!r}; it must be {type(defaults[name]).__name__}"
        shots = self.whole_shots
        if shots is not None and not 2 <= shots.min_frames <= shots.max_frames:
            return (
                f"shots.min_frames is {shots.min_frames}, shots.max_frames {shots.max_frames}; the first must be at "
                "least 2, and at most the second"
            )
        return ""

    @property
    def rejecting_gates(self) -> dict[str, Any]:
        """The gates that keep clips out."""
        kept = self.gates if self.below_gate == REJECT else {}
        return {name: bound for name, bound in kept.items() if name not in self.score_only}

    @property
    def in_step(self) -> bool:
        """Whether a film's clips are windows that follow each other from its start."""
        return self.whole_shots is None and not self.split_at_cuts

    @property
    def whole_shots(self) -> Shots | None:
        """`shots`, with its defaults; None where clips are windows."""
        return Shots(**self.shots) if self.shots else None

    @property
    def uses_next_frame(self) -> bool:
        """Whether the frame after a window enters the coefficients; with `auto`, in a lake that decides nothing."""
        return self.next_frame != NO and self.whole_shots is None and self.method in TAKE_NEXT_FRAME

    @property
    def longest(self) -> float:
        """Seconds of the longest clip that can be."""
        return self.duration if self.whole_shots is None else self.whole_shots.max_frames / self.rate

    @property
    def frames_max(self) -> int:
        """Most frames a clip can keep."""
        if self.whole_shots is not None:
            return self.whole_shots.max_frames
        return math.ceil(self.duration * self.rate - 1e-9)

    @property
    def observed_max(self) -> int:
        """Most frames a clip can have observed."""
        return self.frames_max // 2 + 1 if self.observe == "every_second" else self.frames_max

    @property
    def coefficients(self) -> int:
        """s, the order that every clip is padded to."""
        return self.order or 2 * self.observed_max

    @property
    def limits(self) -> MediaLimits:
        """What a film may cost."""
        return MediaLimits(self.max_pixels, self.max_frames, self.timeout, self.max_bytes)

    def data_fields(self) -> dict[str, Any]:
        """The fields that change data. Two recipes that agree here give the same clips and share their latents."""
        fields = dataclasses.asdict(self)
        for field in _HOUSEKEEPING:
            del fields[field]
        # What is not used changes no clip: recipes of windows have the fingerprint of before there were shots.
        if self.whole_shots is None:
            del fields["shots"]
        else:
            fields["shots"] = dataclasses.asdict(self.whole_shots)
            del fields["duration"]
        if not self.split_at_cuts:
            del fields["split_at_cuts"]
        fields = self._with_next_frame(fields)
        # Whether the codec's networks are compiled is the machine's affair and changes no data.
        fields["codec"] = {key: value for key, value in self.codec.items() if key != "compiled"}
        # A folder may move; weights are named by the codec's and encoder's own ids once they are loaded.
        return {**fields, "order": self.coefficients, "size": list(self.size)}

    def to_json(self) -> dict[str, Any]:
        """The recipe as JSON, for the version that it makes."""
        fields = self._with_next_frame(dataclasses.asdict(self))
        return {**fields, "size": list(self.size), "order": self.coefficients}

    def _with_next_frame(self, fields: dict[str, Any]) -> dict[str, Any]:
        """The fields; one that is not used is left out, as in the recipes of before there was a next frame."""
        rest = {name: value for name, value in fields.items() if name != "next_frame"}
        return {**rest, "next_frame": YES} if self.uses_next_frame else rest


_HOUSEKEEPING = (
    "name",
    "preview_clips",
    "block_clips",
    "captions_required",
    "certify_frames",
    "gates",
    "below_gate",
    "score_only",
    "tolerate",
    "max_pixels",
    "max_frames",
    "timeout",
    "max_bytes",
)


def demo() -> DataRecipe:
    """Small pictures through the codec that comes with this package; a CPU is enough."""
    return DataRecipe(
        name="demo",
        codec={"kind": "diffusers", "source": "vlfm-small-2", "ddim_steps": 20, "inversion_depth": 2, "refinements": 3},
        certify_frames=8,
    )


def combinations() -> DataRecipe:
    """The corpus of pipeline.corpus.make_combinations: flat shapes that move evenly, captions by grammar."""
    return DataRecipe(
        name="combinations",
        rate=8.0,
        observe="all",
        # Large blocks: 64 pixels are twelve numbers, all that the probes read. In latents of mean 0 and size 1 a flow
        # from noise spends its steps on what differs; the films are dark, so their mean is no mid-grey.
        codec={"kind": "linear", "factor": 8, "channels": 12, "scale": 0.64, "grey": -0.65},
        text={"kind": "pretrained", "source": "vlfm-text"},
        validation_fraction=0.05,
        preview_clips=16,
        certify_frames=2,
    )


def shots() -> DataRecipe:
    """Clips that are whole shots or caption spans, of 8 to 128 frames: what methods that choose a length learn from.

    The codec is that of `demo` without inversion; coefficients are few, since such methods read the latents.
    """
    return DataRecipe(
        name="shots",
        rate=8.0,
        shots=dataclasses.asdict(Shots()),
        observe="all",
        order=16,
        codec={"kind": "diffusers", "source": "vlfm-small-2", "ddim_steps": 20, "inversion_depth": 0},
        certify_frames=8,
    )


def turning() -> DataRecipe:
    """The corpus of pipeline.corpus.make_turning: films of 3x3 pixels and 15 to 30 frames, whose latents they are."""
    return DataRecipe(
        name="turning",
        rate=8.0,
        shots={"min_frames": 2, "max_frames": 30, "detect": False},
        size=(3, 3),
        observe="all",
        order=32,
        codec={"kind": "linear", "factor": 1, "channels": 3, "scale": 1.0},
        block_clips=128,
        certify_frames=2,
    )


def linear() -> DataRecipe:
    """Small pictures through a fixed block transform: no network, nearly nothing is lost, larger latents."""
    return DataRecipe(name="linear")


def stable_diffusion(folder: str | Path = "stable-diffusion-v1-5/stable-diffusion-v1-5") -> DataRecipe:
    """Latents of a Stable-Diffusion-format model (a local folder or a hub id), inverted by 50 steps of DDIM."""
    return DataRecipe(
        name="stable_diffusion",
        size=(256, 256),
        codec={"kind": "diffusers", "source": str(folder), "ddim_steps": 50, "inversion_depth": 50, "refinements": 3},
        text={"kind": "pretrained", "source": str(folder)},
        preview_clips=16,
        certify_frames=8,  # all 32 would take a quarter of the UNet's work, 8 take a tenth
    )


def recipe_named(name: str) -> DataRecipe:
    """The data recipe called `name`: any public function of this module that makes one from its defaults.

    Single fields are replaced with model.recipes.override.

    Raises:
        ValueError: there is no such recipe; the message lists those there are.
    """
    makers: dict[str, Callable[[], DataRecipe]] = {
        key: value
        for key, value in vars(sys.modules[__name__]).items()
        if getattr(value, "__annotations__", {}).get("return") == "DataRecipe" and value is not recipe_named
    }
    if name not in makers:
        raise ValueError(f"data recipe {name!r} is unknown; the recipes are: {', '.join(sorted(makers))}")
    return makers[name]()
