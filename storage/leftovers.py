"""What a killed run leaves in a lake on a local disk: temporary files, its own and Icechunk's."""

from __future__ import annotations

import contextlib
import os
import re

from storage.layout import Lake, LakeError
from storage.local import TEMPORARY_SUFFIX

_ICECHUNK = re.compile(r"#[0-9]+$")
"""How Icechunk's store ends the name of a file that it is still writing."""


def remove_leftovers(lake: Lake) -> list[str]:
    """Remove temporary files that no process writes to any more: their paths within the lake, in order.

    Call it inside `lake.writing()`: then nobody else is writing. A lake in a bucket has none.
    """
    try:
        root = lake.store.local_path()
    except LakeError:
        return []
    removed = []
    for folder, _, files in os.walk(root):
        inside = os.path.relpath(folder, root)
        for name in files:
            ours = name.startswith(".") and name.endswith(TEMPORARY_SUFFIX)
            if ours or (inside.split(os.sep)[0] == "arrays" and _ICECHUNK.search(name)):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(os.path.join(folder, name))
                    removed.append(os.path.normpath(os.path.join(inside, name)))
    return sorted(removed)
