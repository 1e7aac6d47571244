"""Which film of the lake a file is, the name it goes by, who else has its clips, and which films are gone.

A film's identity is its place: the path of its file, and which part of it. The name that people see is the path within
its source. Where another film has that name, it is told apart by its source: `walks/1.mp4`, then `walks-2/1.mp4`.
A film that is at another place with the same content, while its content is no longer at the old place, has moved: it
stays the same film, under a new name where its file has one.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import count

from pipeline.items import Failure, Row
from pipeline.rows import part_of, place, printable
from pipeline.sources.entries import Discovery, FilmEntry, is_film
from pipeline.sources.fetch import INSIDE
from pipeline.sources.tables import TABLE_SUFFIXES

Item = FilmEntry | Failure


class Identities:
    """The films of a run among those of the lake."""

    def __init__(
        self, rows: Iterable[Row], run: Sequence[Item], sources: Discovery | None = None, windows: bool = True
    ) -> None:
        """Args:
        rows: the lake's films; those of lakes that knew no paths are found by name, whatever the source.
        run: the films that this run looks at.
        sources: all that the sources name, where that is more than the run.
        windows: clips are windows that follow each other, else shots or parts.
        """
        self.windows = windows
        self.renamed: dict[str, str] = {}
        """New names, by their old ones, of films that moved; known once `settle` was called."""
        self._rows = {row["film"]: row for row in rows}
        self._places = {item.place for item in run}
        self._named = self._places | {item.place for item in (sources.items if sources else ())}
        self._origins = list(sources.origins) if sources else []
        self._latents = sources.latents if sources else False
        self._unread = [f"{folder}/" for folder in (sources.unread if sources else ())]
        self._files = {printable(item.path) for item in run}
        self._names: dict[str, str] = {}
        self._taken: set[str] = set()
        self._sought: set[str] = set()
        """Names, in the lake, of films that moved."""
        self._replaced: set[str] = set()
        """Names, in the lake, of films that are no more, because another one moved to their place."""
        self._digests = {_version(row["path"] or _file(name), row): row["sha256"] for name, row in self._rows.items()}
        self._by_content: dict[tuple[str, str], list[Row]] | None = None
        self._at = {place(row["path"], row["film"]): row for row in self._rows.values() if row["path"]}
        pathless = {name: row for name, row in self._rows.items() if not row["path"]}
        for item in run:
            if item.place not in self._at and item.film in pathless:
                self._at[item.place] = pathless.pop(item.film)
        self._here = {row["film"] for where, row in self._at.items() if where in self._places}

    def row(self, item: Item) -> Row | None:
        """The lake's row of the film at this place."""
        return self._at.get(item.place)

    def digest(self, entry: FilmEntry) -> str:
        """The digest of a film's content if its file is as the lake knows it; empty where it has to be read."""
        now = {"bytes": entry.bytes, "modified_ns": entry.modified_ns}
        names = (printable(entry.path), _file(entry.film))
        return next((digest for name in names if (digest := self._digests.get(_version(name, now)))), "")

    def settle(self, known: Sequence[Item], read: Sequence[tuple[FilmEntry, str]]) -> None:
        """Says which film of the lake each film of the run is. Call it once.

        Args:
            known: films that were not read, or could not be: they are what was at their place.
            read: films with their contents' digests.
        """
        new = [(item, digest) for item, digest in read if not self._stays(item, digest)]
        for item in [*known, *(item for item, digest in read if self._stays(item, digest))]:
            if row := self.row(item):
                self._give(item, row["film"])
        moved = self._moved(new)
        for item, _ in new:
            row = self.row(item)
            # What became of the film that was here is settled first: it may have moved away.
            if item.place not in moved and row is not None and row["film"] not in self._sought:
                self._give(item, row["film"])
        before = {item.place: row["film"] for item, _ in new if (row := self.row(item)) is not None}
        self._replaced = {before[where] for where in moved if where in before} - self._sought
        for item, _ in new:
            if old := moved.get(item.place):
                kept = old not in before.values() and (old == item.film or old.endswith(f"/{item.film}"))
                name = old if kept else self._candidate(item)
                self._give(item, name)
                # The clips of a film that was here are the new one's to lose.
                gone = {old, *({before[item.place]} & self._replaced if item.place in before else ())}
                self.renamed |= dict.fromkeys(gone - {name}, name)
        for item in [*known, *(item for item, _ in new)]:
            if item.place not in self._names:
                self._give(item, self._candidate(item))

    def name(self, item: Item) -> str:
        """The name of a film of this run, once they are settled."""
        return self._names[item.place]

    def in_run(self, film: str) -> bool:
        """Whether the lake's film of this name is, by its place, one of this run's."""
        return film in self._here

    def elsewhere(self, film: str) -> bool:
        """Whether the lake's film of this name is no matter of this run: from another source, where it still is."""
        row = self._rows.get(film)
        if row is None or film in self._taken | self.renamed.keys() | self._replaced or not row["path"]:
            return False
        if place(row["path"], film) in self._named:
            return True  # beyond the run's limit
        return row["path"] not in self._files and not self._gone(row)

    def heir(self, clip: Row, pruned: Iterable[str] = ()) -> str | None:
        """The film that is not in this run and has the same clip (a row of storage.schema.CLIP_SCHEMA), if any.

        It is in another source, or left this one and was not `pruned`: it keeps its clips then, too.
        """
        if self._by_content is None:
            self._by_content = {}
            for row in self._rows.values():
                self._by_content.setdefault(content(row), []).append(row)
        rows = self._by_content.get(content(clip), [])
        others = (row["film"] for row in rows if row["path"] and covers(row["film"], clip, self.windows))
        settled = self._taken | self.renamed.keys() | self._replaced | set(pruned)
        return next((film for film in others if film not in settled), None)

    def missing(self) -> dict[str, str]:
        """Films of the lake that this run's sources had and have no longer, and that did not move: source by name."""
        found = {}
        for film, row in self._rows.items():
            settled = film in self._taken or film in self.renamed or film in self._replaced
            if not settled and row["path"] and place(row["path"], film) not in self._named:
                origin = self._origin(row)
                if origin is not None:
                    found[film] = origin
        return found

    def left(self, film: str, path: str, origin: str) -> bool:
        """Whether a film that no version has, of which a dead run staged clips, has left a source of this run."""
        return place(path, film) not in self._named and self._origin({"path": path, "source": origin}) is not None

    def _stays(self, item: Item, digest: str) -> bool:
        """Whether the film at this place is the one that was there, as far as its content tells."""
        row = self.row(item)
        return row is not None and bool(row["sha256"] in ("", digest))

    def _moved(self, new: Sequence[tuple[FilmEntry, str]]) -> dict[str, str]:
        """Names of the lake's films that these are, by place: of the same content, which has left its old place."""
        displaced = {row["film"] for item, _ in new if (row := self.row(item)) is not None}
        free: dict[tuple[str, str], list[Row]] = {}

        def order(item: tuple[str, Row]) -> tuple[bool, bool, str]:
            # Of twins the one whose place another film has now comes first: its clips would leave, those of one that is
            # gone stay. Of two that are gone it is the one without clips of its own.
            return item[0] not in displaced, item[1]["clips"] > 0, item[0]

        for film, row in sorted(self._rows.items(), key=order):
            if row["sha256"] and film not in self._taken and (film in displaced or self._gone(row)):
                free.setdefault((row["sha256"], part_of(film)), []).append(row)
        found: dict[str, str] = {}
        for agree in (_same_name_and_caption, _same_caption, _any):
            for item, digest in new:
                rows = free.get((digest, part_of(item.film)), [])
                row = next((row for row in rows if agree(row, item)), None)
                if item.place not in found and row is not None:
                    rows.remove(row)
                    found[item.place] = row["film"]
                    self._sought.add(row["film"])
        return found

    def _gone(self, row: Row) -> bool:
        """Whether a film that is not in this run is no longer where it was."""
        if not row["path"] or place(row["path"], row["film"]) in self._named:
            return False
        # What an address holds is known to its own source only.
        file = row["path"].partition(INSIDE)[0]
        return self._origin(row) is not None or ("://" not in file and not os.path.exists(file))

    def _origin(self, row: Row) -> str | None:
        """The source of this run that a film would have to be in."""
        if any(row["path"].startswith(folder) for folder in self._unread):
            return None
        if is_film(row["path"], not self._latents):
            return None  # films are not looked for where latents are imported, nor the other way
        own = row["source"]
        if own.endswith(TABLE_SUFFIXES):
            return own if own in self._origins else None
        below = (origin for origin in self._origins if own == origin or row["path"].startswith(f"{origin}/"))
        return next(below, None)

    def _give(self, item: Item, name: str) -> None:
        self._names[item.place] = name
        self._taken.add(name)

    def _candidate(self, item: Item) -> str:
        return next(name for name in _candidates(item) if name not in self._taken and self._free(name))

    def _free(self, name: str) -> bool:
        """Whether no film has the name, or one that moved away, or one that is not in this run and gave nothing."""
        row = self._rows.get(name)
        if row is None or name in self._sought | self._replaced:
            return True
        gave_nothing = not row["sha256"] and not row["clips"]
        return gave_nothing and place(row["path"], name) not in self._places


def _same_name_and_caption(row: Row, item: FilmEntry) -> bool:
    return bool(row["film"].rpartition("/")[2] == item.film.rpartition("/")[2] and row["caption"] == item.caption)


def _same_caption(row: Row, item: FilmEntry) -> bool:
    return bool(row["caption"] == item.caption)


def _any(row: Row, item: FilmEntry) -> bool:
    return True


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


def covers(film: str, clip: Row, windows: bool) -> bool:
    """Whether a film, or a part by its name, may have the clip; `windows`: they follow each other from its start."""
    start, end, named = 0.0, math.inf, False
    number = r"[0-9.]+(?:e[+-]?[0-9]+)?"
    if found := re.fullmatch(f"#({number})-({number})?", part_of(film)):
        start, end, named = float(found[1]), float(found[2] or math.inf), True
    before = (clip["clip_start"] - start) / clip["duration"]
    whole = abs(before - round(before)) < 1e-6 if windows else not named or abs(before) < 1e-6
    return bool(before > -1e-6 and whole and clip["clip_start"] + clip["duration"] <= end + 0.002)
