"""What this project adds to the command `prefect`, loaded by its entry point `prefect.plugins` (see prefect.toml).

Every flow here has one deployment of its own name, so `prefect deployment run ingest` can only mean `ingest/ingest`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from prefect.plugins import register_hook

PREFECT_PLUGIN_API_REQUIRES = ">=0.1,<1"


@register_hook
def setup_environment(*, ctx: Any) -> None:
    """Called while `prefect` is imported: completes the command line before it is read."""
    sys.argv[:] = complete(sys.argv)


def complete(words: Sequence[str]) -> list[str]:
    """A command line in which `deployment run NAME` became `deployment run NAME/NAME`; any other is as it was."""
    words = list(words)
    for index in range(len(words) - 2):
        if words[index : index + 2] == ["deployment", "run"]:
            name = words[index + 2]
            if not name.startswith("-") and "/" not in name:
                words[index + 2] = f"{name}/{name}"
            break
    return words
