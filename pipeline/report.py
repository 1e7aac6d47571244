"""What an ingest did: the two accounts, the lines for people, and the exit status."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

STATUSES = ("done", "unchanged", "filtered", "failed")


class AccountError(AssertionError):
    """An account does not add up: something was lost or counted twice, which is a fault of the program."""


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
    failures: list[dict[str, Any]]
    """Rows of storage.schema.FAILURE_SCHEMA, as in failures/<run_id>.parquet."""
    superseded: int
    """Clips of films that changed, which left the dataset."""
    bytes: int
    """Size of the version's shards."""
    quality: dict[str, float]
    """Medians of the certificate over this version's clips."""
    seconds: dict[str, float]
    """By stage; stages that run side by side in several workers are summed."""
    tolerate: float
    faulty_films: int
    """Films that failed or lost clips."""
    notes: list[str] = field(default_factory=list)

    @property
    def exit_status(self) -> int:
        """0: all is well; 3: more films failed than the recipe tolerates; 1: there is nothing to use."""
        if self.version is None or (not self.published and self.clips.unchanged == 0):
            return 1
        return 3 if self.faulty_films > self.tolerate * self.films.discovered else 0

    def lines(self) -> list[str]:
        """The report for people."""
        lines = list(self.notes)
        shown = sorted(self.failures, key=lambda row: row["status"] != "failed")  # what was filtered comes last
        lines += [f"  {_name(row)}: {row['reason']}: {row['detail']}" for row in shown[:20]]
        if len(shown) > 20:
            lines.append(f"  and {len(shown) - 20} more")
        if self.failures:
            lines.append(f"all {len(self.failures)} in {self.lake}/failures/{self.run_id}.parquet")
        lines += [self.films.line(), self.clips.line()]
        if self.superseded:
            lines.append(f"{self.superseded} clips of changed films left the dataset")
        if self.published:
            quality = ", ".join(f"{name} {value:.4g}" for name, value in self.quality.items())
            lines.append(
                f"version {self.version} of {self.lake} is published ({self.bytes / 1e6:.1f} MB; medians: {quality})"
            )
        elif self.version is not None and self.clips.unchanged:
            lines.append(f"nothing new: version {self.version} of {self.lake} is up to date")
        else:
            lines.append("nothing was published: no film gave a clip; see the lines above")
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
            "quality": self.quality,
            "seconds": self.seconds,
            "exit_status": self.exit_status,
        }


def _name(row: Mapping[str, Any]) -> str:
    start = row["clip_start"]
    return f"{row['film']} at {start:g} s" if row["clip_id"] and start == start else str(row["film"])
