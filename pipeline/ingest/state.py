"""The state of an ingest: what becomes of each film, and all that the run is going to do."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.gates import GateDecision
from pipeline.ingest.block import Block
from pipeline.ingest.identity import Identities
from pipeline.items import BlockResult, ClipPlan, CodecFacts, Failure, Outcome, Row
from pipeline.recipes import DataRecipe
from pipeline.rows import printable
from storage.layout import Lake
from storage.version import Version

Progress = Callable[[str, int, int], None]
"""Called with a stage's name, how many are done, and how many there are."""

PARTIAL = "clips_failed"
"""Reason of a film that gave some clips and lost others; the next run tries those again."""


@dataclass
class FilmState:
    """A film of this run: its row of the manifest as far as it is known, and what becomes of its windows."""

    row: dict[str, Any]
    new: list[str] = field(default_factory=list)
    """Ids of clips to be made."""
    known: list[str] = field(default_factory=list)
    """Ids of clips that the dataset has already."""
    filtered: int = 0
    """Windows that gave no clip by rule."""
    gated: list[str] = field(default_factory=list)
    """Ids of clips made before that the recipe's gates keep out."""
    remembered: bool = False
    """Whether it is as the dataset knows it, and was not looked at."""

    @property
    def name(self) -> str:
        """The film's name."""
        return str(self.row["film"])

    @property
    def outcome(self) -> Outcome:
        """What became of the film, as far as that is known."""
        return Outcome(self.name, self.row["status"], self.row["reason"], self.row["detail"])

    def settle(self, status: str, reason: str = "", detail: str = "") -> None:
        """Says what became of the film."""
        self.row |= {"status": status, "reason": reason, "detail": detail}

    def reject(self, failure: Failure) -> None:
        """Says why the film is not used."""
        self.settle(failure.status, failure.reason, failure.detail)


@dataclass
class IngestPlan:
    """All that an ingest is going to do."""

    lake: Lake
    recipe: DataRecipe
    recipe_fingerprint: str
    run_id: str
    created: str
    """UTC, ISO 8601."""
    parent: Version | None
    """The newest version."""
    base: Version | None
    """The newest version of this recipe, whose clips are carried on."""
    identities: Identities
    films: list[FilmState]
    blocks: list[Block]
    staged: Mapping[str, BlockResult]
    """Blocks that an interrupted run finished, by their ids."""
    base_clips: Sequence[Row]
    base_films: Sequence[Row]
    restored: Sequence[Row]
    """Rows of older versions for clips that are wanted again; they are copied, not made."""
    gate_decision: GateDecision
    """What the recipe's gates make of the base."""
    failures: list[Failure]
    """What the plan itself found."""
    notes: list[str]
    seconds: dict[str, float]
    missing: Mapping[str, str] = field(default_factory=dict)
    """Films of the dataset that the sources had and have no longer, each with its source."""
    prune: bool = False
    """Whether the missing films leave the dataset."""
    imported: CodecFacts | None = None
    """Where the new clips are of imported latents: the codec that made them."""
    tried: list[Outcome] = field(default_factory=list)
    """What became of the clips that this run has finished so far."""

    @property
    def tolerated(self) -> int:
        """How many films may fail for one reason before the environment is blamed: as many as are known to be good."""
        return sum(bool(film.known) for film in self.films)

    @property
    def clips(self) -> list[ClipPlan]:
        """The clips to be made."""
        return [clip for block in self.blocks for clip in block.clips]

    @property
    def pruned(self) -> set[str]:
        """Films that leave the dataset because their sources no longer have them."""
        return set(self.missing) if self.prune else set()

    @property
    def goes_back(self) -> bool:
        """Whether the recipe is that of a version before the newest: its clips become the newest version again."""
        return self.base is not None and self.parent is not None and self.base.number != self.parent.number

    def lines(self) -> list[str]:
        """The plan for people."""
        known = sum(len(film.known) for film in self.films)
        faulty = [film for film in self.films if film.row["status"] in ("failed", "filtered")]
        new = f"{len(self.clips)} new clips in {len(self.blocks)} blocks"
        lines = [*self.notes, f"{len(self.films)} films: {new}, {known} clips unchanged"]
        if self.gate_decision.leaving:
            lines.append(f"{len(self.gate_decision.leaving)} clips of the dataset are outside the gates and leave it")
        copied, reused = (
            sum(clip.copied is kind and clip.stored is not None for clip in self.clips) for kind in (True, False)
        )
        imported = sum(clip.latents and not clip.copied for clip in self.clips)
        if copied:
            lines.append(f"{copied} of them are stored under other captions: only their text is new")
        if imported:
            lines.append(f"{imported} of them are imported latents: they are only projected")
        elif reused:
            missing = any(clip.window.next_ticks and clip.stored and not clip.stored.next_frame for clip in self.clips)
            but = ", but for the frame after each window" if missing else ""
            lines.append(f"{reused} of them take stored latents: they are not encoded again{but}")
        if self.staged:
            lines.append(f"{len(self.staged)} blocks are finished from an interrupted run and are kept")
        if faulty:
            lines.append(f"{len(faulty)} films cannot be used:")
        return lines + [f"  {printable(film.name)}: {film.row['reason']}: {film.row['detail']}" for film in faulty]
