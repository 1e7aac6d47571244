"""Gates: the recipe's bounds on a clip's certificate, and what they make of clips that were made before.

A gate changes which clips a dataset holds, never a clip: it is no part of a clip's id. It is applied to certificates
when a version is written, so a tighter one takes clips out of the next version, and a looser one brings them back from
older versions, or makes those that never were in one. Clips that are kept out are remembered in the version's table
`rejected`, and are not made again while the gates keep them out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from storage.schema import CERTIFICATE, REJECTED_SCHEMA

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


def flags(row: Mapping[str, Any], gates: Gates) -> list[str]:
    """Names of the figures of a clip's row that are outside their gates. What was not measured (NaN, None) passes."""
    found: list[str] = []
    for measure in CERTIFICATE if gates else ():
        bound, value = gates.get(measure.name), row.get(measure.name)
        if bound is None or value is None or math.isnan(value):
            continue
        if value < bound if measure.higher_is_better else value > bound:
            found.append(measure.name)
    return found


def rejection(row: Mapping[str, Any], gates: Gates) -> dict[str, str]:
    """The fault of a clip that the gates keep out: status, reason, and a line with figures, bounds and the mend."""
    said = []
    for measure in CERTIFICATE:
        if measure.name in flags(row, gates):
            side, bound = "least" if measure.higher_is_better else "most", gates[measure.name]
            said.append(f"{measure.name} {row[measure.name]:.4g}{measure.unit}, the {side} is {bound:g}")
    names = ", ".join(f"gates.{name}" for name in flags(row, gates))
    detail = f"{'; '.join(said)}; use another codec or film, set {names} otherwise, or keep it with below_gate=flag"
    return {"status": "filtered", "reason": BELOW_GATE, "detail": detail}


@dataclass(frozen=True)
class Judgement:
    """What the gates make of a version's clips and of those that were kept out of it."""

    rejected: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Rows of storage.schema.REJECTED_SCHEMA by clip id: clips that stay out, and clips that leave."""
    leaving: frozenset[str] = frozenset()
    """Ids of the version's clips that the gates take out."""
    open: dict[str, dict[str, Any]] = field(default_factory=dict)
    """The same of clips that were kept out and would pass now; their films are read again."""
    reflagged: bool = False
    """Whether a clip that stays has other flags now."""

    @property
    def regained(self) -> set[str]:
        """Films with clips that may come back."""
        return {row["film"] for row in self.open.values()}

    @property
    def changes(self) -> bool:
        """Whether the next version differs by the gates alone."""
        return bool(self.leaving) or self.reflagged


def judge(
    clips: Iterable[Mapping[str, Any]], rejected: Iterable[Mapping[str, Any]], gates: Gates, below_gate: str
) -> Judgement:
    """Applies the gates to the rows of a version's tables `clips` and `rejected`."""
    bounds = gates if below_gate == REJECT else {}
    rejected = list(rejected)
    clips = list(clips)
    stay = {row["clip_id"]: dict(row) for row in rejected if flags(row, bounds)}
    passing = {row["clip_id"]: dict(row) for row in rejected if row["clip_id"] not in stay}
    leaving = {row["clip_id"]: rejected_row(row) for row in clips if flags(row, bounds)}
    reflagged = any(row["flags"] != " ".join(flags(row, gates)) for row in clips if row["clip_id"] not in leaving)
    return Judgement({**stay, **leaving}, frozenset(leaving), passing, reflagged)


def rejected_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """A clip's row as one of storage.schema.REJECTED_SCHEMA; figures that are missing or None are NaN."""
    return {name: math.nan if row.get(name) is None else row[name] for name in REJECTED_SCHEMA.names}
