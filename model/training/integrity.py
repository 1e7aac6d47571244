"""Whether a checkpoint's folder is whole: the files it must have, and their checksums, which are written last."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open

from storage.fingerprint import stream_digest
from storage.local import fsync_path

FILES = ("backbone.safetensors", "average.safetensors", "optimizers.safetensors", "state.json")
"""What a checkpoint consists of, beside the checksums, where its `state.json` names no `files`."""
CHECKSUMS = "SHA256SUMS"
"""The checksums' file: `sha256sum -c SHA256SUMS` checks it too."""


def complete(folder: Path, files: Sequence[str]) -> None:
    """Write the checksums of a checkpoint's files beside them: what has none is not whole. All of it is fsynced."""
    (folder / CHECKSUMS).write_text("".join(f"{digest_of(folder / name)}  {name}\n" for name in files))
    for path in (*folder.iterdir(), folder):
        fsync_path(path)


def publish(part: Path, final: Path) -> None:
    """Give a folder its name, in place of one that has it."""
    shutil.rmtree(final, ignore_errors=True)
    part.rename(final)
    fsync_path(final.parent)  # the rename is safe on disk only when its folder is; only then may the old ones go


def damage(folder: Path) -> str:
    """What is wrong with a checkpoint, in a few words; empty where it is whole.

    Every file is compared with the checksum that was written beside it. Checkpoints of older programs have none: there
    it is only seen that all files are there and can be read to their ends.
    """
    if found := missing(folder):
        return found
    try:
        plain = json.loads((folder / "state.json").read_text())
        sums = _checksums(folder)
        if sums is None and "format" in plain:
            return f"{CHECKSUMS} is missing"
        for name in plain.get("files", FILES):
            if sums is not None and sums.get(name) != digest_of(folder / name):
                return f"{name} is not what was written, by its checksum"
            if sums is None and name.endswith(".safetensors"):
                with safe_open(folder / name, "pt"):
                    pass
        if (of := plain["step"]) != int(folder.name.removeprefix("step-")):
            return f"it is of step {of}"
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        return f"it cannot be read: {error}".splitlines()[0]
    return ""


def missing(folder: Path) -> str:
    """Which files a checkpoint lacks, in a few words; empty where it has all."""
    try:
        files = json.loads((folder / "state.json").read_text()).get("files", FILES)
    except (OSError, ValueError, AttributeError):
        files = ("state.json",) if any(folder.glob("shard-*")) else FILES
    names = [name for name in files if not (folder / name).is_file()]
    return f"{' and '.join(names)} {'is' if len(names) == 1 else 'are'} missing" if names else ""


def _checksums(folder: Path) -> dict[str, str] | None:
    """SHA-256 of the files by name, as `sha256sum` writes them; None where there are none."""
    path = folder / CHECKSUMS
    if not path.is_file():
        return None
    rows = [line.split("  ", 1) for line in path.read_text().splitlines()]
    return {name: digest for digest, name in rows}


def digest_of(path: Path) -> str:
    with open(path, "rb") as file:
        return stream_digest(file)
