"""Gates: the recipe's bounds on a clip's certificate, and what they make of clips that were made before.

A gate changes which clips a dataset holds, never a clip: it is no part of a clip's id. It is applied to certificates
when a version is written, so a tighter one takes clips out of the next version, and a looser one brings them back from
older versions, or makes those that never were in one. Clips that are kept out are remembered in the version's table
`rejected`, and are not made again while the gates keep them out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from pipeline.items import Certificate, Failure, Rejected, Row
from storage.schema import CERTIFICATE

BELOW_GATE = "below_gate"
"""Reason of clips that the gates keep out."""
REJECT, FLAG = "reject", "flag"

Gates = Mapping[str, float | None]
"""Bounds by the name of a figure: the least where more is better, else the most; None is no bound."""


def check_gates(gates: Gates) -> str:
    """What is wrong with the gates, in words; empty where nothing is."""
    known = [measure.name for measure in CERTIFICATE]
    for name, bound in gates.items():
        if name not in known:
            return f"gates has no figure {name!r}; choose among {', '.join(known)}"
        number = isinstance(bound, int | float) and not isinstance(bound, bool) and math.isfinite(bound)
        if bound is not None and not number:
            return f"gates.{name} = {bound!r} cannot be; give a number, or null for no gate"
    return ""


def flags(clip: Certificate | Row, gates: Gates) -> list[str]:
    """Names of the figures of a clip, or of its row, that are outside their gates. What was not measured passes."""
    found: list[str] = []
    for measure in CERTIFICATE if gates else ():
        bound = gates.get(measure.name)
        value = getattr(clip, measure.name) if isinstance(clip, Certificate) else clip.get(measure.name)
        if bound is None or value is None or math.isnan(value):
            continue
        if value < bound if measure.higher_is_better else value > bound:
            found.append(measure.name)
    return found


def rejection(clip: Rejected, gates: Gates) -> Failure:
    """Why the gates keep a clip out: a line with figures, bounds and the remedy."""
    outside = flags(clip.certificate, gates)
    said = []
    for measure in CERTIFICATE:
        if measure.name in outside:
            side, bound = "least" if measure.higher_is_better else "most", gates[measure.name]
            value = getattr(clip.certificate, measure.name)
            said.append(f"{measure.name} {value:.4g}{measure.unit}, the {side} is {bound:g}")
    names = ", ".join(f"gates.{name}" for name in outside)
    detail = f"{'; '.join(said)}; use another codec or film, set {names} otherwise, or keep it with below_gate=flag"
    return Failure(clip.film, "gate", BELOW_GATE, detail, "filtered", clip.clip_id, clip.clip_start)


@dataclass(frozen=True)
class GateDecision:
    """What the gates make of a version's clips and of those that were kept out of it."""

    rejected: Mapping[str, Rejected] = field(default_factory=dict)
    """By clip id: clips that stay out, and clips that leave."""
    leaving: frozenset[str] = frozenset()
    """Ids of the version's clips that the gates take out."""
    open: Mapping[str, Rejected] = field(default_factory=dict)
    """Clips that were kept out and would pass now; their films are read again."""
    reflagged: bool = False
    """Whether a clip that stays has other flags now."""

    @property
    def regained(self) -> set[str]:
        """Films with clips that may come back."""
        return {clip.film for clip in self.open.values()}

    def renamed(self, names: Mapping[str, str]) -> GateDecision:
        """The same of films that have new names, by their old ones."""
        rejected, waiting = (
            {name: replace(clip, film=names.get(clip.film, clip.film)) for name, clip in clips.items()}
            for clips in (self.rejected, self.open)
        )
        return GateDecision(rejected, self.leaving, waiting, self.reflagged)

    @property
    def changes(self) -> bool:
        """Whether the next version differs by the gates alone."""
        return bool(self.leaving) or self.reflagged


def decide(
    clips: Iterable[Row], rejected: Iterable[Row], gates: Gates, below_gate: str, score_only: Iterable[str] = ()
) -> GateDecision:
    """Applies the gates to the rows of a version's tables `clips` and `rejected`; those of `score_only` flag only."""
    bounds = {name: bound for name, bound in gates.items() if below_gate == REJECT and name not in score_only}
    outside = {row["clip_id"]: Rejected.from_row(row) for row in rejected}
    stay = {name: clip for name, clip in outside.items() if flags(clip.certificate, bounds)}
    passing = {name: clip for name, clip in outside.items() if name not in stay}
    leaving: dict[str, Rejected] = {}
    reflagged = False
    for row in clips:
        if flags(row, bounds):
            leaving[row["clip_id"]] = Rejected.from_row(row)
        else:
            reflagged |= row["flags"] != " ".join(flags(row, gates))
    return GateDecision({**stay, **leaving}, frozenset(leaving), passing, reflagged)
