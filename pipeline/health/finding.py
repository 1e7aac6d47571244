"""A finding: what a check saw, how bad it is, and what to do about it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

from storage.errors import is_expected

OK, WARNING, ERROR, SKIPPED = "ok", "warning", "error", "skipped"
STATUSES = (OK, WARNING, ERROR, SKIPPED)
"""Fine; works with a drawback; something will fail; not looked at, or not needed for all that people do."""


@dataclass(frozen=True)
class Finding:
    """What a check found."""

    check: str
    """What was looked at, one word."""
    status: str
    """One of STATUSES."""
    message: str
    remedy: str = ""
    """What to do; empty where nothing needs to be done."""
    node: str = ""
    """The node of a cluster; empty for this machine."""

    def line(self) -> str:
        """The finding without its status: check, message and remedy."""
        where = f"node {self.node}: " if self.node else ""
        return f"{where}{self.check}: {self.message}" + (f"; {self.remedy}" if self.remedy else "")

    def to_json(self) -> dict[str, str]:
        """All fields."""
        return asdict(self)


def run_checks(checks: Mapping[str, Callable[[], Finding | list[Finding]]]) -> list[Finding]:
    """The findings of checks by name. One that raises is an error of its own and stops no other."""
    found: list[Finding] = []
    for name, check in checks.items():
        try:
            result = check()
        except Exception as error:
            words = " ".join(str(error).split()) or type(error).__name__
            told = words if is_expected(error) else f"{type(error).__name__}: {words}"
            result = Finding(name, ERROR, told, "" if is_expected(error) else "see that this library is whole")
        found += result if isinstance(result, list) else [result]
    return found
