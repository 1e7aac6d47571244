"""WebDataset tars as sources: films `key.mp4` with captions `key.txt` or `key.json` in one plain tar."""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath

from pipeline.rows import printable
from pipeline.sources.entries import CAPTION_BYTES, Discovery, Source, Stat, caption_text
from pipeline.sources.fetch import INSIDE, tar_members

TAR_SUFFIX = ".tar"
CAPTION_KEYS = ("caption", "text")
"""Where a JSON member has the caption."""


class Tar(Source):
    """The films of a tar.

    Args:
        file: the tar as a file of this machine.
        address: where it is: its path or URL.
        shown: its name relative to its own source, with which its films' names begin.
        stamp: its time of change, or that of its ETag.
        name, origin, captions_required, latents: as Source.
    """

    def __init__(
        self,
        file: Path,
        address: str,
        shown: str,
        stamp: int,
        name: str,
        origin: str,
        captions_required: bool,
        latents: bool = False,
    ) -> None:
        super().__init__(name, origin, captions_required, latents)
        self._file, self._address, self._shown, self._stamp = file, address, shown, stamp
        stat = file.stat()
        self._members = tar_members(str(file), stat.st_size, stat.st_mtime_ns)
        self._captions: dict[str, str] = {}
        for member in self._members:
            key, suffix = _key(member)
            if suffix in (".txt", ".json") and (suffix == ".txt" or key not in self._captions):
                self._captions[key] = member

    def films(self, found: Discovery) -> dict[str, Stat]:
        chosen = {f"{self._shown}/{name}": size for name, (_, size) in self._members.items() if self.is_film(name)}
        others = sum(not self.is_film(name) and _key(name)[1] not in (".txt", ".json") for name in self._members)
        if others:
            found.notes.append(f"left out of {printable(self._shown)}, no {self.kind} by their names: {others} members")
        return {name: Stat(size, self._stamp) for name, size in sorted(chosen.items())}

    def address(self, file: str) -> str:
        return f"{self._address}{INSIDE}{file.removeprefix(f'{self._shown}/')}"

    def sidecar(self, film: str) -> str:
        member = self._captions.get(_key(film.removeprefix(f"{self._shown}/"))[0])
        if member is None:
            return ""
        offset, size = self._members[member]
        with self._file.open("rb") as file:
            file.seek(offset)
            data = file.read(min(size, 16 * CAPTION_BYTES))
        if member.endswith(".txt"):
            return caption_text(data)
        try:
            about = json.loads(data)
        except (ValueError, RecursionError):
            return ""
        texts = [about.get(name) for name in CAPTION_KEYS] if isinstance(about, dict) else []
        return next((" ".join(text.split()) for text in texts if isinstance(text, str) and text.strip()), "")


def _key(member: str) -> tuple[str, str]:
    """WebDataset's key of a member, up to the first dot of its name, and what follows."""
    path = PurePosixPath(member)
    stem, dot, suffix = path.name.partition(".")
    return str(path.with_name(stem)) if stem else member, f"{dot}{suffix}".lower()
