"""What an ingest did: the two accounts, the lines for people, and the exit status."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.gates import BELOW_GATE, REJECT
from pipeline.items import Failure
from pipeline.rows import printable
from storage.errors import Kind, VlfmError
from storage.schema import CERTIFICATE

STATUSES = ("done", "unchanged", "filtered", "failed")


class AccountError(VlfmError, AssertionError):
    """An account does not add up: something was lost or counted twice, which is a defect of the program."""

    kind = Kind.DEFECT


@dataclass(frozen=True)
class Account:
    """discovered = done + unchanged + filtered + failed, of films or of clips."""

    what: str
    discovered: int
    done: int
    unchanged: int
    filtered: dict[str, int]
    """By reason."""
    failed: dict[str, int]
    """By reason."""

    def __post_init__(self) -> None:
        """Raises AccountError where the sum is not what was discovered."""
        total = self.done + self.unchanged + sum(self.filtered.values()) + sum(self.failed.values())
        if total != self.discovered:
            raise AccountError(f"{self.line()}: these are {total}, not {self.discovered}; please report this")

    @staticmethod
    def of(what: str, discovered: int, outcomes: Iterable[tuple[str, str]]) -> Account:
        """The account of (status, reason) pairs, beside the number discovered, counted on its own."""
        counted = Counter(outcomes)
        statuses = Counter(dict.fromkeys(STATUSES, 0))
        for (status, _), count in counted.items():
            statuses[status] += count
        by_reason = {
            kept: {reason: count for (status, reason), count in sorted(counted.items()) if status == kept}
            for kept in ("filtered", "failed")
        }
        return Account(
            what, discovered, statuses["done"], statuses["unchanged"], by_reason["filtered"], by_reason["failed"]
        )

    def line(self) -> str:
        """The account in a line."""
        parts = [f"{self.done} done", f"{self.unchanged} unchanged"]
        for name, reasons in (("filtered", self.filtered), ("failed", self.failed)):
            why = f" ({', '.join(f'{reason} {count}' for reason, count in reasons.items())})" if reasons else ""
            parts.append(f"{sum(reasons.values())} {name}{why}")
        return f"{self.what}: {self.discovered} discovered = {' + '.join(parts)}"

    def to_json(self) -> dict[str, Any]:
        """Plain numbers."""
        return {
            "discovered": self.discovered,
            "done": self.done,
            "unchanged": self.unchanged,
            "filtered": self.filtered,
            "failed": self.failed,
        }


@dataclass(frozen=True)
class IngestReport:
    """The end of an ingest."""

    run_id: str
    lake: str
    version: int | None
    """The version published, or the newest one where there was nothing new; None where there is none."""
    published: bool
    """Whether this run published it."""
    films: Account
    clips: Account
    failures: Sequence[Failure]
    """As in failures/<run_id>.parquet."""
    superseded: int
    """Clips of films that changed, which left the dataset."""
    bytes: int
    """Size of the version's shards."""
    seconds: dict[str, float]
    """By stage; stages that run side by side in several workers are summed."""
    tolerate: float
    faulty_films: int
    """Films that failed or lost clips."""
    certificate: dict[str, dict[str, float]] = field(default_factory=dict)
    """Of each figure of the certificate: clips, worst, median and best, as storage.schema.certificate_spread."""
    gates: dict[str, float | None] = field(default_factory=dict)
    """The recipe's bounds on the certificate, and what becomes of clips outside them."""
    below_gate: str = "reject"
    flagged: int = 0
    """Clips of this version that are outside a gate and kept."""
    rejected: dict[str, int] = field(default_factory=dict)
    """Clips of this run that each gate keeps out; one clip may be outside several."""
    notes: Sequence[str] = ()
    """Lines of the plan for people: where captions came from, what the sources left out."""

    @property
    def exit_status(self) -> int:
        """0: all is well; 3: more films failed than the recipe tolerates; 1: there is nothing to use."""
        if self.version is None or (not self.published and self.clips.unchanged == 0):
            return 1
        return 3 if self.faulty_films > self.tolerate * self.films.discovered else 0

    def lines(self) -> list[str]:
        """The report for people."""
        shown = sorted(self.failures, key=lambda failure: failure.status != "failed")  # what was filtered comes last
        lines = list(self.notes)
        lines += [f"  {_name(failure)}: {failure.reason}: {failure.detail}" for failure in shown[:20]]
        if len(shown) > 20:
            lines.append(f"  and {len(shown) - 20} more")
        if self.failures:
            lines.append(f"all {len(self.failures)} in {self.lake}/failures/{self.run_id}.parquet")
        lines += [self.films.line(), self.clips.line()]
        if self.superseded:
            lines.append(f"{self.superseded} clips of films that changed or are gone left the dataset")
        if self.published:
            lines += self.certificate_lines()
            lines.append(f"version {self.version} of {self.lake} is published ({self.bytes / 1e6:.1f} MB)")
        elif self.version is not None and self.clips.unchanged:
            lines.append(f"nothing new: version {self.version} of {self.lake} is up to date")
        else:
            lines.append("nothing was published: no film gave a clip; see the lines above")
        return lines

    def certificate_lines(self) -> list[str]:
        """The certificate over the version's clips, and what the gates did."""
        lines = []
        units = {measure.name: measure.unit for measure in CERTIFICATE}
        told = [
            f"{name} {spread['median']:.4g} ({spread['worst']:.4g}){units[name]}"
            for name, spread in self.certificate.items()
        ]
        if told:
            lines.append(f"certificate, median (worst clip): {', '.join(told)}")
        sides = {measure.name: "at least" if measure.higher_is_better else "at most" for measure in CERTIFICATE}
        bounds = [f"{name} {sides[name]} {bound:g}" for name, bound in self.gates.items() if bound is not None]
        if bounds:
            by_figure = ", ".join(f"{name} {count}" for name, count in self.rejected.items())
            out = f"{self.clips.filtered.get(BELOW_GATE, 0)} clips are kept out{by_figure and f' ({by_figure})'}"
            kept = f"{self.flagged} clips of this version are flagged"
            said = kept if self.below_gate != REJECT else f"{kept}; {out}" if self.flagged else out
            lines.append(f"gates: {', '.join(bounds)}: {said}")
        return lines

    def to_json(self) -> dict[str, Any]:
        """Everything but the failures, which have a table of their own."""
        return {
            "run_id": self.run_id,
            "lake": self.lake,
            "version": self.version,
            "published": self.published,
            "films": self.films.to_json(),
            "clips": self.clips.to_json(),
            "failures": len(self.failures),
            "superseded": self.superseded,
            "bytes": self.bytes,
            "quality": {name: spread["median"] for name, spread in self.certificate.items()},
            "certificate": self.certificate,
            "gates": self.gates,
            "below_gate": self.below_gate,
            "flagged": self.flagged,
            "rejected": self.rejected,
            "seconds": self.seconds,
            "notes": list(self.notes),
            "exit_status": self.exit_status,
        }


def _name(failure: Failure) -> str:
    film, start = printable(failure.film), failure.clip_start
    return f"{film} at {start:g} s" if failure.clip_id and start == start else film
