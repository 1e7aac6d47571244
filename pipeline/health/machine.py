"""All checks of one machine. None needs Ray or Prefect, and one that breaks is a finding itself: a half-broken machine
still answers."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable

from pipeline.health.finding import Finding, run_checks
from pipeline.health.gpus import check_torch
from pipeline.health.places import check_clock, check_disks, check_lake, check_shared_memory, check_store
from pipeline.health.programs import check_ffmpeg, check_packages, check_python, check_weights
from pipeline.recipes import DataRecipe


def check_machine(recipe: DataRecipe, lake: str | None = None, folders: Iterable[str] = ()) -> list[Finding]:
    """All findings about this machine that need neither Ray nor Prefect.

    Args:
        recipe: whose codec and text encoder must be here.
        lake: a lake, or where one is going to be; None leaves the store out.
        folders: further folders whose disks are written to.
    """
    places = [*([lake] if lake else []), *folders, tempfile.gettempdir()]
    checks: dict[str, Callable[[], Finding | list[Finding]]] = {
        "python": check_python,
        "packages": check_packages,
        "torch": check_torch,
        "ffmpeg": check_ffmpeg,
        "weights": lambda: check_weights(recipe),
        "disk": lambda: check_disks(places),
        "memory": check_shared_memory,
        "store": lambda: check_store(lake),
        "lake": lambda: check_lake(lake),
        "clock": check_clock,
    }
    return run_checks(checks)
