"""Which film of the lake a file is, the name it goes by, and who else has its clips.

A film's identity is its place: the path of its file, and which part of it. The name that people see is the path within
its source. Where another film has that name, it is told apart by its source: `walks/1.mp4`, then `walks-2/1.mp4`.
A film that is at another place with the same content, while nothing is left at the old place, has moved.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import count

from pipeline.items import Failure, Row
from pipeline.rows import part_of, place, printable
from pipeline.sources.folders import FilmEntry

Item = FilmEntry | Failure


class Identities:
    """The films of a run among those of the lake."""

    def __init__(self, rows: Iterable[Row], run: Sequence[Item], windows: bool = True) -> None:
        """`rows`: the lake's films; those of lakes that knew no paths are found by name, whatever the source.
        `windows`: clips are windows that follow each other, else shots or parts."""
        self.windows = windows
        self._rows = {row["film"]: row for row in rows}
        self._places = {item.place for item in run}
        self._files = {printable(str(item.path)) for item in run}
        self._names: dict[str, str] = {}
        self._taken: set[str] = set()
        self._digests = {_version(row["path"] or _file(name), row): row["sha256"] for name, row in self._rows.items()}
        self._by_content: dict[tuple[str, str], list[Row]] | None = None
        known = {place(row["path"], row["film"]): row["film"] for row in self._rows.values() if row["path"]}
        for item in run:
            if item.place in known:
                self._give(item, known[item.place])
        for item in run:
            row = self._rows.get(item.film)
            if row is not None and not row["path"] and item.place not in self._names and item.film not in self._taken:
                self._give(item, item.film)

    def row(self, item: Item) -> Row | None:
        """The lake's row of a film, as far as its name is known."""
        return self._rows.get(self._names.get(item.place, ""))

    def digest(self, entry: FilmEntry) -> str:
        """The digest of a film's content if its file is as the lake knows it; empty where it has to be read."""
        now = {"bytes": entry.bytes, "modified_ns": entry.modified_ns}
        names = (printable(str(entry.path)), _file(entry.film))
        return next((digest for name in names if (digest := self._digests.get(_version(name, now)))), "")

    def name(self, item: Item, digest: str = "") -> str:
        """The name of a film of this run, from now on its own. `digest`: its content's, where it has been read."""
        if item.place not in self._names:
            free = (name for name in _candidates(item) if name not in self._taken and self._free(name, digest))
            self._give(item, next(free))
        return self._names[item.place]

    def in_run(self, film: str) -> bool:
        """Whether the name is that of a film of this run."""
        return film in self._taken

    def elsewhere(self, film: str) -> bool:
        """Whether the lake's film of this name is no matter of this run: from another source, where it still is."""
        row = self._rows.get(film)
        if row is None or film in self._taken or not row["path"] or row["path"] in self._files:
            return False
        return os.path.exists(row["path"])

    def heir(self, clip: Row) -> str | None:
        """The film elsewhere that has the same clip (a row of storage.schema.CLIP_SCHEMA), if there is one."""
        if self._by_content is None:
            self._by_content = {}
            for row in self._rows.values():
                self._by_content.setdefault(content(row), []).append(row)
        rows = self._by_content.get(content(clip), [])
        heirs = (
            row["film"] for row in rows if _covers(row["film"], clip, self.windows) and self.elsewhere(row["film"])
        )
        return next(heirs, None)

    def _give(self, item: Item, name: str) -> None:
        self._names[item.place] = name
        self._taken.add(name)

    def _free(self, name: str, digest: str) -> bool:
        """Whether no film has the name, or this one that has moved, or one that is not in this run and gave nothing."""
        row = self._rows.get(name)
        if row is None:
            return True
        gave_nothing = not row["sha256"] and not row["clips"]
        # Where the old file is still there, this one is a copy: it shares the clips under a name of its own.
        moved = digest != "" and row["sha256"] == digest and not os.path.exists(row["path"])
        return place(row["path"], name) not in self._places and (gave_nothing or moved)


def _candidates(item: Item) -> Iterator[str]:
    yield item.film
    source = printable(item.source) or "source"
    yield f"{source}/{item.film}"
    yield from (f"{source}-{number}/{item.film}" for number in count(2))


def content(row: Row) -> tuple[str, str]:
    """What a film or a clip shows and says: rows with the same are of twins."""
    return row["film_id"], row["caption"]


def _file(film: str) -> str:
    return film.removesuffix(part_of(film))


def _version(file: str, row: Row) -> tuple[str, int, int]:
    return file, row["bytes"], row["modified_ns"]


def _covers(film: str, clip: Row, windows: bool) -> bool:
    """Whether a film, or a part by its name, may have the clip; `windows`: they follow each other from its start."""
    start, end, named = 0.0, math.inf, False
    number = r"[0-9.]+(?:e[+-]?[0-9]+)?"
    if found := re.fullmatch(f"#({number})-({number})?", part_of(film)):
        start, end, named = float(found[1]), float(found[2] or math.inf), True
    before = (clip["clip_start"] - start) / clip["duration"]
    whole = abs(before - round(before)) < 1e-6 if windows else not named or abs(before) < 1e-6
    return bool(before > -1e-6 and whole and clip["clip_start"] + clip["duration"] <= end + 0.002)
