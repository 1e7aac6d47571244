"""What there is to ingest: films and their captions, from folders and tables. Nothing is opened but the tables.

A SOURCE is a folder (read recursively) or a table (CSV, JSON lines, Parquet) with the columns `file, caption` and, for
parts of a film, `start, end` in seconds. In a folder captions come from the file given, else from its captions.csv,
else from `clip.txt` beside `clip.mp4`.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from pipeline.items import Failure
from pipeline.rows import place, printable, unusable
from pipeline.sources.tables import (
    BAD_NAME,
    BAD_ROW,
    TABLE_SUFFIXES,
    BadRow,
    Row,
    SourceError,
    Table,
    caption_fault,
    read_table,
)

__all__ = [
    "FILM_SUFFIXES",
    "Discovery",
    "FilmEntry",
    "SourceError",
    "discover",
    "films_in",
]

FILM_SUFFIXES = frozenset(
    {".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts"}
    | {".m2ts", ".mts", ".vob", ".flv", ".f4v", ".ogv", ".ogg", ".wmv", ".asf", ".3gp", ".3g2", ".gif"}
)
"""A film by its name. Files of a folder with other names are counted in a line, never left out in silence."""
OUTSIDE = "outside_source"
"""Reason of films that a link or `..` reaches outside their source."""
_OUTSIDE = OUTSIDE, "a link or '..' leads out of its source; move the film there, or give --allow-outside"
CAPTION_BYTES = 2**16
"""Most bytes of a caption beside its film that are read."""


@dataclass(frozen=True)
class FilmEntry:
    """A film, or a part of one, with its caption."""

    film: str
    """The path relative to its source, with `#start-end` for a part."""
    path: Path
    """Where the file is: absolute, its source without links."""
    caption: str
    """As given; empty where there is none and none is required."""
    bytes: int
    """Size of the file."""
    modified_ns: int
    """Time of the file's last change, nanoseconds since 1970."""
    start: float = 0.0
    """Where the part begins, seconds from the film's first frame."""
    end: float | None = None
    """Where it ends; None for the film's end."""
    source: str = ""
    """Name of the folder that is its source, or that holds the table."""
    origin: str = ""
    """Address of its source: the absolute path of the folder or the table."""

    @property
    def place(self) -> str:
        """What tells it from all other films."""
        return place(str(self.path), self.film)


def _failure(film: str, reason: str, detail: str, path: str = "", source: str = "", origin: str = "") -> Failure:
    """A film that cannot be used, found without opening it."""
    return Failure(film, "source", reason, detail, path=path, source=source, origin=origin)


@dataclass
class Discovery:
    """All that the sources name, in order of the films' names; every place is once in `entries` or in `failures`."""

    entries: list[FilmEntry] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """Lines for people: where the captions came from, and what was left out."""
    origins: list[str] = field(default_factory=list)
    """Addresses of the sources: what a folder or table of these had and has no longer is gone."""
    unread: list[str] = field(default_factory=list)
    """Folders that could not be listed: nothing is known of what is in them."""

    @property
    def items(self) -> list[FilmEntry | Failure]:
        """All of it."""
        return [*self.entries, *self.failures]

    def limited(self, films: int | None) -> Discovery:
        """The first `films` films by name, failures among them."""
        if films is None:
            return self
        chosen = sorted(self.items, key=lambda item: item.film)[:films]
        return replace(
            self,
            entries=[item for item in chosen if isinstance(item, FilmEntry)],
            failures=[item for item in chosen if isinstance(item, Failure)],
        )


@dataclass(frozen=True)
class _Folder:
    """Where a source's films are relative to."""

    path: Path
    """Absolute, without links."""
    captions_required: bool
    origin: str = ""
    """As FilmEntry's."""
    allow_outside: bool = False

    def holds(self, path: Path) -> bool:
        """Whether a file or folder lies within the source, wherever links on the way lead, or may lie elsewhere."""
        return self.allow_outside or Path(os.path.realpath(path)).is_relative_to(self.path)

    def add(self, found: Discovery, row: Row, stat: os.stat_result) -> None:
        path = _within(self.path, row.file)
        fault = row.fault
        if unusable(row.file):
            fault = BAD_NAME, "its name is not UTF-8; rename the file"
        elif not self.holds(path):
            fault = _OUTSIDE
        if fault is not None:
            self.fail(found, row, *fault)
            return
        times = (stat.st_size, stat.st_mtime_ns, row.start, row.end)
        found.entries.append(FilmEntry(row.film, path, row.caption, *times, self.path.name, self.origin))

    def fail(self, found: Discovery, row: Row, reason: str, detail: str) -> None:
        path = printable(str(_within(self.path, row.file)))
        where = {"source": self.path.name, "origin": self.origin}
        found.failures.append(_failure(printable(row.film), reason, detail, path=path, **where))

    def missing(self, found: Discovery, row: Row, where: str) -> None:
        detail = f"{where} names {row.file}, which is not there; add the film or remove the line"
        self.fail(found, row, "film_missing", detail)


def discover(
    sources: Sequence[str | Path] | str | Path,
    captions: str | Path | None = None,
    captions_required: bool = True,
    columns: Mapping[str, str] | None = None,
    allow_outside: bool = False,
) -> Discovery:
    """Every film that the sources name, with its caption, or the reason why it has none.

    A source that is given twice, by whatever path, counts once; so does a file that several sources name.

    Args:
        sources: folders and tables.
        captions: a table of captions for the films of the folders; its files are relative to their folder.
        captions_required: whether a film without a caption fails (`no_caption`); else its caption is empty.
        columns: the table's own names for `file, caption, start, end`, where they differ.
        allow_outside: whether links and `..` may lead out of a source; else such a film fails (`outside_source`), and
            a linked folder is left out with a line.

    Raises:
        SourceError: a source or the captions file is not there or cannot be read, or there is no film at all.
    """
    sources = [sources] if isinstance(sources, (str, Path)) else list(sources)
    if not sources:
        raise SourceError("no source was given; name a folder of films or a table")
    for given in [*sources, *([captions] if captions is not None else [])]:
        if unusable(str(given)):
            raise SourceError(f"{printable(str(given))} has a name that is not UTF-8; rename it")
    found = Discovery()
    shared = read_table(Path(captions), columns, captions_required) if captions is not None else None
    used: set[str] = set()
    seen: dict[Path, _Folder] = {}
    for source in sources:
        path = _existing(source)
        real = Path(os.path.realpath(path if path.is_dir() else path.parent))
        itself = real if path.is_dir() else real / path.name
        if itself in seen:
            continue
        folder = seen[itself] = _Folder(real, captions_required, printable(str(itself)), allow_outside)
        found.origins.append(folder.origin)
        if path.is_dir():
            _discover_folder(folder, path, shared, columns, used, found)
        else:
            _discover_table(folder, path, read_table(path, columns, captions_required), found)
    for row in shared.rows if shared is not None else ():
        if row.file not in used:
            next(iter(seen.values())).missing(found, row, f"captions file {Path(str(captions)).name}")
    found.failures += _bad_rows(Path(str(captions)), shared.bad if shared is not None else ())
    if not found.entries and not found.failures:
        kinds = ", ".join(sorted(FILM_SUFFIXES))
        raise SourceError(
            f"no films in {', '.join(map(str, sources))}; put films there ({kinds}) or name another source"
        )
    return _settled(found, captions_required)


def films_in(paths: Sequence[str | Path]) -> list[Path]:
    """Films by their paths, in this order; a folder stands for the films directly in it, by name.

    Raises:
        SourceError: a folder without films.
    """
    films: list[Path] = []
    for path in map(Path, paths):
        found = sorted(file for file in path.glob("*.*") if file.suffix.lower() in FILM_SUFFIXES)
        if path.is_dir() and not found:
            raise SourceError(f"no films in {path}; name films, or a folder that has some")
        films += found if path.is_dir() else [path]
    return films


def _existing(source: str | Path) -> Path:
    text = str(source)
    if "://" in text:
        raise SourceError(f"source {text}: bucket addresses are not read yet; copy the films to a folder and name that")
    path = Path(source).expanduser()
    if not path.exists():
        raise SourceError(
            f"source {path} does not exist; name a folder of films, or a table {', '.join(TABLE_SUFFIXES)}"
        )
    if path.is_file() and path.suffix.lower() not in TABLE_SUFFIXES:
        raise SourceError(f"source {path} is neither a folder nor a table {', '.join(TABLE_SUFFIXES)}; name its folder")
    return path


def _discover_folder(
    folder: _Folder,
    given: Path,
    shared: Table | None,
    columns: Mapping[str, str] | None,
    used: set[str],
    found: Discovery,
) -> None:
    """The films of a folder; `used` gets the files of `shared` that are there."""
    films = dict(_scan(folder, found))
    own = given / "captions.csv"
    table = shared
    if shared is None and own.is_file():
        if not folder.holds(own):
            raise SourceError(f"{own} is a link that leads out of its source; name the table itself with --captions")
        found.notes.append(f"captions: {own}")
        table = read_table(own, columns, folder.captions_required)
        found.failures += _bad_rows(own, table.bad)
    captioned = set()
    for row in table.rows if table is not None else ():
        if row.file in films:
            captioned.add(row.file)
            folder.add(found, row, films[row.file])
        elif shared is None:
            folder.missing(found, row, own.name)
    used |= captioned
    for name, stat in films.items():
        if name not in captioned:
            caption = _sidecar(folder, folder.path / name)
            folder.add(found, Row(name, caption, fault=caption_fault(caption)), stat)


def _discover_table(folder: _Folder, path: Path, table: Table, found: Discovery) -> None:
    for row in table.rows:
        film = _within(folder.path, row.file)
        if not folder.holds(film):
            folder.fail(found, row, *_OUTSIDE)
            continue
        try:
            stat = film.stat()
        except OSError:
            folder.missing(found, row, "the table")
        else:
            folder.add(found, row, stat)
    found.failures += _bad_rows(path, table.bad)


def _bad_rows(table: Path, rows: Sequence[BadRow]) -> list[Failure]:
    parent = os.path.realpath(table.parent)
    return [_failure(row.name, BAD_ROW, row.detail, path=printable(f"{parent}/{row.name}")) for row in rows]


def _within(folder: Path, file: str) -> Path:
    return Path(os.path.normpath(folder / file))


def _settled(found: Discovery, captions_required: bool) -> Discovery:
    """Each place once, in order; films without a caption moved to the failures where one is required."""
    settled = replace(found, entries=[], failures=[])
    places: dict[str, FilmEntry | Failure] = {}
    again: dict[str, int] = {}
    # A file that two sources name is one film; one of them may have the caption.
    for item in sorted(found.items, key=lambda item: isinstance(item, Failure) or not item.caption):
        earlier = places.setdefault(item.place, item)
        if earlier is item or _same(earlier, item):
            continue
        again[item.place] = again.get(item.place, 1) + 1
        name = f"{printable(item.film)} ({again[item.place]})"
        detail = f"{printable(item.film)} is named twice; keep one line, or give parts of a film by start and end"
        path = f"{printable(str(item.path))} ({again[item.place]})"
        failure = _failure(name, "duplicate_name", detail, path, item.source, item.origin)
        places[failure.place] = failure
    for item in sorted(places.values(), key=lambda item: item.film):
        if isinstance(item, Failure):
            settled.failures.append(item)
        elif captions_required and not item.caption:
            remedy = f"add a line to the captions file, or {Path(item.film).with_suffix('.txt').name} beside it"
            detail, path = f"it has no caption; {remedy}", printable(str(item.path))
            settled.failures.append(_failure(item.film, "no_caption", detail, path, item.source, item.origin))
        else:
            settled.entries.append(item)
    return settled


def _same(one: FilmEntry | Failure, other: FilmEntry | Failure) -> bool:
    """Whether `other` says nothing that `one` does not, of the same place."""
    if isinstance(other, Failure):
        return one.source != other.source or (isinstance(one, Failure) and one.outcome == other.outcome)
    return isinstance(one, FilmEntry) and other.caption in ("", one.caption)


def _scan(folder: _Folder, found: Discovery) -> Iterator[tuple[str, os.stat_result]]:
    """Films below a folder by relative name, sorted; hidden files are left out, and linked folders unless allowed.

    What is no film by its name, leads elsewhere or cannot be listed is said in `found`.
    """
    others: Counter[str] = Counter()
    visited = {os.path.realpath(folder.path)}

    def unlisted(error: OSError) -> None:
        path = printable(str(error.filename))
        found.unread.append(path)
        found.notes.append(
            f"{path} cannot be listed ({error.strerror}); correct its permissions, its films are not read"
        )

    def below(parent: str) -> Iterator[str]:
        for where, folders, files in os.walk(parent, onerror=unlisted):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            yield from (os.path.join(where, name) for name in sorted(files) if not name.startswith("."))
            for name in folders:
                linked = os.path.join(where, name)
                real = os.path.realpath(linked)
                if not os.path.islink(linked) or Path(real).is_relative_to(folder.path):
                    continue  # its films are found in their own place
                if not folder.allow_outside:
                    said = printable(os.path.relpath(linked, folder.path))
                    found.notes.append(f"the linked folder {said} leads out of its source; --allow-outside reads it")
                elif real not in visited:
                    visited.add(real)
                    yield from below(linked)

    for path in below(str(folder.path)):
        name = os.path.relpath(path, folder.path).replace(os.sep, "/")
        suffix = os.path.splitext(name)[1].lower()
        if suffix not in FILM_SUFFIXES:
            others[suffix or "no suffix"] += suffix not in (*TABLE_SUFFIXES, ".txt")
            continue
        try:
            yield name, os.stat(path)
        except OSError as error:
            row = Row(name, "")
            folder.fail(found, row, "film_missing", f"it is a link to nothing ({error.strerror}); correct or remove it")
    if said := ", ".join(f"{printable(suffix)} {count}" for suffix, count in sorted(others.items()) if count):
        found.notes.append(f"left out of {printable(str(folder.path))}, no films by their names: {said}")


def _sidecar(folder: _Folder, film: Path) -> str:
    path = film.with_suffix(".txt")
    try:
        if not path.is_file() or not folder.holds(path):
            return ""
        with path.open("rb") as file:
            return " ".join(file.read(CAPTION_BYTES).decode("utf-8-sig", errors="replace").split())
    except OSError:
        return ""
