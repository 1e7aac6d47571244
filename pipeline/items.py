"""What flows through the pipeline, one shape each: window, clip plan, clip work, failure, certificate, block result.

From the worker to the table to the terminal these objects stay what they are. They become JSON in a staged block and
rows in the tables of storage.schema, by the methods `to_json`, `to_row` and their counterparts, and nowhere else.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pipeline.rows import place
from storage.fingerprint import finite_json
from storage.schema import CERTIFICATE, FAILURE_SCHEMA

Row = Mapping[str, Any]
"""A row of a table of storage.schema, or a JSON object with the same keys."""


@dataclass(frozen=True)
class Resources:
    """What a stage, or a worker, occupies while it runs."""

    cpus: float = 1.0
    gpus: float = 0.0


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
    next_ticks: tuple[int, ...] = ()
    """Stored time of the frame after the window that the projection sees too; empty where there is none."""
    next_time: tuple[float, ...] = ()
    """Its seconds since `start`, duration or more."""

    @property
    def decoded(self) -> tuple[int, ...]:
        """Stored times of all its frames: the kept ones, then the one after the window."""
        return (*self.ticks, *self.next_ticks)

    @property
    def alone(self) -> Window:
        """The window without the frame after it."""
        return dataclasses.replace(self, next_ticks=(), next_time=())


@dataclass(frozen=True)
class ClipPlan:
    """A clip to be made: all that is known of it before its film is decoded."""

    clip_id: str
    film_id: str
    film: str
    path: str
    """Where the film is."""
    bytes: int
    """Size of the film when it was planned; a film that changed since is not used."""
    modified_ns: int
    """Time of its last change when it was planned."""
    caption: str
    caption_id: str
    window: Window
    duration: float
    """T, seconds."""
    observed: tuple[bool, ...]
    """Which of the window's frames enter the coefficients."""
    split: str
    preview: bool
    """Whether its frames are kept."""
    short_side: float = math.nan
    """Shorter side of the film's frames, pixels."""
    film_seconds: float = math.nan
    """Length of the film."""
    origin: str = ""
    """Address of the film's source."""
    stored: StoredClip | None = None
    """A clip that the lake has, whose latents (or all but the text) are this one's."""
    latents: bool = False
    """Whether its film is a file of latents, which are only projected."""

    @property
    def copied(self) -> bool:
        """Whether nothing of it has to be made but its text."""
        return self.stored is not None and self.stored.whole and (self.stored.preview or not self.preview)


@dataclass(frozen=True)
class StoredClip:
    """A clip of the lake that saves work, see pipeline.ingest.reuse."""

    snapshot: str
    group: str
    row: int
    """Its row in the group's arrays."""
    whole: bool
    """Whether its coefficients are right too; else only its latents."""
    preview: bool
    """Whether its frames are stored."""
    certificate: Certificate
    codec: CodecFacts
    frames_id: str = ""
    next_frame: bool = False
    """Whether the group's arrays have the frame after the window."""


@dataclass(frozen=True)
class Outcome:
    """What became of a film, or of one of its clips."""

    film: str
    status: str
    """`done`, `unchanged`, `filtered` or `failed`; empty where it is good so far."""
    reason: str = ""
    """A fixed snake_case word for `filtered` and `failed`."""
    detail: str = ""


@dataclass(frozen=True)
class Failure:
    """Why a film, or one of its clips, is not in the dataset."""

    film: str
    """The film's name, or a table and its row; printable."""
    stage: str
    """Where it was found."""
    reason: str
    """A fixed snake_case word."""
    detail: str
    """One line for people, with the remedy."""
    status: str = "failed"
    """`failed`, or `filtered` where a rule of the recipe keeps it out."""
    clip_id: str = ""
    """Empty where the whole film is meant."""
    clip_start: float = math.nan
    """Seconds; NaN where the whole film is meant."""
    path: str = ""
    """Where the file is or would be, printable; empty where that does not matter."""
    source: str = ""
    """Name of the folder that is the film's source."""
    origin: str = ""
    """Address of that source."""
    certificate: Certificate | None = None
    """Where a gate keeps the clip out before it is encoded: what was measured until then."""
    frames_id: str = ""
    """16 digits of its frames then."""

    @property
    def place(self) -> str:
        """The identity of the film, as FilmEntry's."""
        return place(self.path, self.film)

    @property
    def outcome(self) -> Outcome:
        """What became of the film or clip."""
        return Outcome(self.film, self.status, self.reason, self.detail)

    def to_row(self) -> dict[str, Any]:
        """A row of storage.schema.FAILURE_SCHEMA."""
        return {name: getattr(self, name) for name in FAILURE_SCHEMA.names}


@dataclass(frozen=True)
class Certificate:
    """How a clip went through codec and projection, and how well.

    storage.schema.CERTIFICATE says what each figure is; one that was not measured is NaN, in JSON null.
    """

    psnr_codec: float = math.nan
    ssim_codec: float = math.nan
    psnr_vae: float = math.nan
    ssim_vae: float = math.nan
    residual: float = math.nan
    latent_round_trip: float = math.nan
    psnr_projection: float = math.nan
    projection_error: float = math.nan
    heldout_error: float = math.nan
    smoothness: float = math.nan
    end_ratio: float = math.nan
    short_side: float = math.nan
    film_seconds: float = math.nan
    black_frames: float = math.nan
    static_frames: float = math.nan
    motion: float = math.nan
    cuts: float = math.nan
    duplicates: float = math.nan
    frames_certified: int = 0
    """Frames that the codec's PSNR and SSIM are means of; 0 where unknown."""
    order_used: int = 0
    """Coefficients that are not padding."""
    method_used: str = ""
    """Projection method."""

    @staticmethod
    def from_row(row: Row) -> Certificate:
        """The certificate of a row of any program's tables or staged blocks; what it lacks is unknown."""
        names = [field.name for field in dataclasses.fields(Certificate)]
        return Certificate(**{name: row[name] for name in names if row.get(name) is not None})

    def to_row(self) -> dict[str, Any]:
        """Its columns of storage.schema.CLIP_SCHEMA."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Rejected:
    """A clip that the recipe's gates keep out."""

    clip_id: str
    film: str
    clip_start: float
    certificate: Certificate
    frames_id: str = ""

    @staticmethod
    def from_row(row: Row) -> Rejected:
        """From a row of storage.schema.REJECTED_SCHEMA or CLIP_SCHEMA."""
        own = (row["clip_id"], row["film"], row["clip_start"])
        return Rejected(*own, Certificate.from_row(row), row.get("frames_id") or "")

    def to_row(self) -> dict[str, Any]:
        """A row of storage.schema.REJECTED_SCHEMA."""
        own = {"clip_id": self.clip_id, "film": self.film, "clip_start": self.clip_start, "frames_id": self.frames_id}
        return {**own, **{measure.name: getattr(self.certificate, measure.name) for measure in CERTIFICATE}}


@dataclass
class ClipWork:
    """A clip on its way through the stages; each fills in its part."""

    plan: ClipPlan
    failure: Failure | None = None
    frames: np.ndarray | None = None
    """(N, H, W, 3) uint8."""
    latents: np.ndarray | None = None
    """(N, C, h, w) float16, as they will be stored."""
    next_frames: np.ndarray | None = None
    """(0 or 1, H, W, 3) uint8: the frame after the window, where the plan has one and it is no other shot's."""
    next_latents: np.ndarray | None = None
    """(0 or 1, C, h, w) float16, of that frame; None where it was not encoded, or there is none."""
    coefficients: np.ndarray | None = None
    """(order, C, h, w) float16, zero-padded."""
    certificate: Certificate = field(default_factory=Certificate)
    frames_id: str = ""
    """16 digits of its frames, see pipeline.stages.content."""

    @property
    def next_time(self) -> tuple[float, ...]:
        """Seconds of `next_latents` in the window."""
        return self.plan.window.next_time[: 0 if self.next_latents is None else len(self.next_latents)]

    def certify(self, **found: Any) -> None:
        """Fills in fields of the certificate."""
        self.certificate = dataclasses.replace(self.certificate, **found)


@dataclass(frozen=True)
class MadeClip:
    """A finished clip without its arrays: what the manifest and the shard say of it."""

    clip_id: str
    film_id: str
    film: str
    caption: str
    caption_id: str
    clip_start: float
    duration: float
    split: str
    frames: int
    frames_observed: int
    preview: bool
    certificate: Certificate
    frames_id: str = ""

    @staticmethod
    def of(work: ClipWork) -> MadeClip:
        """The facts of a clip that went through all stages."""
        plan = work.plan
        return MadeClip(
            clip_id=plan.clip_id,
            film_id=plan.film_id,
            film=plan.film,
            caption=plan.caption,
            caption_id=plan.caption_id,
            clip_start=plan.window.start,
            duration=plan.duration,
            split=plan.split,
            frames=len(plan.observed),
            frames_observed=sum(plan.observed),
            preview=plan.preview,
            certificate=work.certificate,
            frames_id=work.frames_id,
        )

    @property
    def rejected(self) -> Rejected:
        """It, as a clip that the gates keep out."""
        return Rejected(self.clip_id, self.film, self.clip_start, self.certificate, self.frames_id)

    def to_row(self) -> dict[str, Any]:
        """The columns of storage.schema.CLIP_SCHEMA that are known before the clip has its place in a version."""
        facts = {name: getattr(self, name) for name in (*_FACTS, "frames_id")}
        return {**facts, **self.certificate.to_row()}

    @staticmethod
    def from_row(row: Row) -> MadeClip:
        """From such a row or its JSON, also an older program's. Raises KeyError where it is no clip's."""
        facts = {name: row[name] for name in _FACTS}
        return MadeClip(**facts, certificate=Certificate.from_row(row), frames_id=row.get("frames_id") or "")


_FACTS = tuple(field.name for field in dataclasses.fields(MadeClip) if field.name not in ("certificate", "frames_id"))


@dataclass(frozen=True)
class CodecFacts:
    """The codec that made a block's latents."""

    id: str
    channels: int
    factor: int
    scale: float
    spec: Row
    """JSON from which the codec is built again."""
    latent_shape: tuple[int, ...]
    """(C, h, w)."""

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON."""
        return {**dataclasses.asdict(self), "latent_shape": list(self.latent_shape)}

    @staticmethod
    def from_json(facts: Row) -> CodecFacts:
        """The reverse of `to_json`."""
        own = {field.name: facts[field.name] for field in dataclasses.fields(CodecFacts)}
        return CodecFacts(**{**own, "latent_shape": tuple(own["latent_shape"])})

    def to_version(self) -> dict[str, Any]:
        """What a version file says of it."""
        return {name: value for name, value in self.to_json().items() if name != "latent_shape"}


@dataclass(frozen=True)
class BlockResult:
    """What became of a block's clips."""

    block_id: str
    made: tuple[MadeClip, ...]
    """Finished and staged, in the block's order."""
    failures: tuple[Failure, ...]
    seconds: Mapping[str, float]
    """Time taken, by stage."""
    codec: CodecFacts | None
    """None where no worker came to its end."""

    @property
    def done(self) -> list[str]:
        """Ids of the finished clips."""
        return [clip.clip_id for clip in self.made]

    def to_json(self, recipe_fingerprint: str) -> dict[str, Any]:
        """The JSON member of a staged block.

        Failures are the run's, not the block's: what failed is tried again by the next run, because its cause may lie
        outside the film. `block` names the staged clips and `failures` is empty: older programs look there.
        """
        return {
            "clips": [finite_json(clip.to_row()) for clip in self.made],
            "failures": [],
            "block": self.done,
            "seconds": dict(self.seconds),
            "recipe": recipe_fingerprint,
            "codec": self.codec.to_json() if self.codec else None,
        }

    @staticmethod
    def from_json(block_id: str, meta: Row) -> BlockResult:
        """The reverse of `to_json`, also of an older program's. Raises KeyError or TypeError for another JSON."""
        codec = CodecFacts.from_json(meta["codec"]) if meta["codec"] else None
        made = tuple(MadeClip.from_row(row) for row in meta["clips"])
        return BlockResult(block_id, made, (), meta["seconds"], codec)
