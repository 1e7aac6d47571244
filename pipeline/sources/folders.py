"""What there is to ingest: films and their captions, from folders, buckets, tars and tables. No film is opened.

A SOURCE is a folder (read recursively), a bucket or a prefix of one (`s3://bucket/prefix`), a WebDataset tar of films,
or a table (CSV, JSON lines, Parquet) with the columns `file, caption` and, for parts of a film, `start, end` in
seconds. In a folder or bucket captions come from the file given, else from its captions.csv, else from `clip.txt`
beside `clip.mp4`.
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from stat import S_ISLNK

from pipeline.items import Failure
from pipeline.rows import printable, unusable
from pipeline.sources.buckets import Bucket
from pipeline.sources.entries import (
    CAPTION_BYTES,
    FILM_SUFFIXES,
    LATENT_SUFFIXES,
    Discovery,
    FilmEntry,
    Source,
    Stat,
    caption_text,
    failure,
    is_film,
)
from pipeline.sources.formats import Annotations, TableFormat, folder_words, format_named, read_annotations
from pipeline.sources.tables import (
    BAD_ROW,
    TABLE_SUFFIXES,
    BadRow,
    Row,
    SourceError,
    Table,
    caption_fault,
    read_table,
)
from pipeline.sources.tars import TAR_SUFFIX, Tar
from storage.address import is_bucket, store_at

__all__ = [
    "FILM_SUFFIXES",
    "Discovery",
    "FilmEntry",
    "SourceError",
    "discover",
    "films_in",
]

OUTSIDE = "outside_source"
"""Reason of films that a link or `..` reaches outside their source."""
_OUTSIDE = OUTSIDE, "a link or '..' leads out of its source; move the film there, or give --allow-outside"


class _Folder(Source):
    """A folder, or the one that a table is in: `path` is absolute, without links."""

    def __init__(
        self, path: Path, captions_required: bool, origin: str, allow_outside: bool, given: Path, latents: bool
    ) -> None:
        super().__init__(path.name, origin, captions_required, latents)
        self.path, self.allow_outside, self._given = path, allow_outside, given
        self.tars: list[str] = []
        """Tars in the folder, once its films were looked for."""
        self.plain: set[str] = set()
        """Films in the folder itself, to which no link leads, once they were looked for."""

    def holds(self, path: Path) -> bool:
        """Whether a file or folder lies within the source, wherever links on the way lead, or may lie elsewhere."""
        return self.allow_outside or Path(os.path.realpath(path)).is_relative_to(self.path)

    def films(self, found: Discovery) -> dict[str, Stat]:
        self.tars, self.plain = [], set()
        return {name: Stat(stat.st_size, stat.st_mtime_ns) for name, stat in _scan(self, found)}

    def address(self, file: str) -> str:
        return os.path.normpath(os.path.join(self.path, file))

    def fault(self, file: str) -> tuple[str, str] | None:
        return None if file in self.plain or self.holds(Path(self.address(file))) else _OUTSIDE

    def look(self, file: str) -> Stat | None:
        try:
            stat = os.stat(self.address(file))
        except OSError:
            return None
        return Stat(stat.st_size, stat.st_mtime_ns)

    @contextlib.contextmanager
    def own_table(self) -> Iterator[Path | None]:
        own = self._given / "captions.csv"
        if own.is_file() and not self.holds(own):
            raise SourceError(f"{own} is a link that leads out of its source; name the table itself with --captions")
        yield own if own.is_file() else None

    def sidecar(self, film: str) -> str:
        path = (self.path / film).with_suffix(".txt")
        try:
            if not path.is_file() or not self.holds(path):
                return ""
            with path.open("rb") as file:
                return caption_text(file.read(CAPTION_BYTES))
        except OSError:
            return ""


def discover(
    sources: Sequence[str | Path] | str | Path,
    captions: str | Path | None = None,
    captions_required: bool = True,
    columns: Mapping[str, str] | None = None,
    allow_outside: bool = False,
    table_format: str | None = None,
    latents: bool = False,
) -> Discovery:
    """Every film that the sources name, with its caption, or the reason why it has none.

    A source that is given twice, by whatever path, counts once; so does a file that several sources name.

    Args:
        sources: folders, buckets, tars and tables.
        captions: a table of captions for the films of the folders; its files are relative to their folder.
        captions_required: whether a film without a caption fails (`no_caption`); else its caption is empty.
        columns: the table's own names for `file, caption, start, end`, where they differ.
        allow_outside: whether links and `..` may lead out of a source; else such a film fails (`outside_source`), and
            a linked folder is left out with a line.
        table_format: the tables are a dataset's published annotation files, of this name in `pipeline.sources.formats`.
        latents: whether the sources hold files of latents (pipeline.media.latents) in the place of films.

    Raises:
        SourceError: a source or the captions file is not there or cannot be read, or there is no film at all.
        BucketError: a bucket cannot be used.
    """
    sources = [sources] if isinstance(sources, (str, Path)) else list(sources)
    if not sources:
        raise SourceError("no source was given; name a folder of films or a table")
    for given in [*sources, *([captions] if captions is not None else [])]:
        if unusable(str(given)):
            raise SourceError(f"{printable(str(given))} has a name that is not UTF-8; rename it")
    chosen = format_named(table_format)
    if chosen is not None and columns:
        raise SourceError("--table-format knows its columns; leave --column out")
    found = Discovery(latents=latents)
    tables = _Tables(captions_required, columns, chosen)
    with contextlib.ExitStack() as stack:
        shared = None
        if captions is not None:
            shared = tables.read(stack.enter_context(_table_file(captions)))
        used: set[str] = set()
        seen: dict[str, Source] = {}
        for given in sources:
            source, table = _opened(given, captions_required, allow_outside, tables, stack, latents)
            if source.origin in seen:
                continue
            seen[source.origin] = source
            found.origins.append(source.origin)
            if table is not None:
                _discover_table(source, table, tables.read(table), found)
            else:
                _discover_films(source, shared, tables, used, found)
                for tar in _tars_of(source, stack):
                    _discover_films(tar, shared, tables, used, found)
        if isinstance(shared, Annotations):
            found.failures += _bad_rows(Path(str(captions)), shared.bad)
            found.notes += [shared.missing()] if shared.missing() else []
        elif shared is not None:
            first = next(iter(seen.values()))
            lost = [row for row in shared.rows if row.file not in used]
            for row in _of_kind(first, lost, Path(str(captions)).name, found):
                first.missing(found, row, f"captions file {Path(str(captions)).name}")
            found.failures += _bad_rows(Path(str(captions)), shared.bad)
    if not found.entries and not found.failures:
        kind = "latents" if latents else "films"
        kinds = ", ".join(sorted(LATENT_SUFFIXES if latents else FILM_SUFFIXES))
        lines = f" ({'; '.join(found.notes)})" if chosen is not None and found.notes else ""
        raise SourceError(
            f"no {kind} in {', '.join(map(str, sources))}{lines}; put {kind} there ({kinds}) or name another source"
        )
    return _settled(found, captions_required)


class _Tables:
    """How tables are read."""

    def __init__(self, captions_required: bool, columns: Mapping[str, str] | None, chosen: TableFormat | None) -> None:
        self.captions_required, self.columns, self.format = captions_required, columns, chosen

    @property
    def suffixes(self) -> tuple[str, ...]:
        """Names that tables end with."""
        return TABLE_SUFFIXES if self.format is None else self.format.suffixes

    def read(self, path: Path) -> Table | Annotations:
        """A table's rows."""
        if self.format is not None:
            return read_annotations(path, self.format)
        return read_table(path, self.columns, self.captions_required)


def _opened(
    given: str | Path,
    captions_required: bool,
    allow_outside: bool,
    tables: _Tables,
    stack: contextlib.ExitStack,
    latents: bool,
) -> tuple[Source, Path | None]:
    """A source, and its table as a file where it is one."""
    text = str(given)
    if isinstance(given, str) and is_bucket(given):
        url = given.rstrip("/")
        suffix = Path(url).suffix.lower()
        if "@" in url.partition("//")[2].partition("/")[0]:
            raise SourceError("a source holds no credentials; give s3://BUCKET/PREFIX, and set AWS_ACCESS_KEY_ID")
        if is_film(url, latents):
            raise SourceError(f"source {url} is a film by its name; name the prefix that it is in")
        if suffix in (*tables.suffixes, TAR_SUFFIX) and url.count("/") > 2:
            parent = Bucket(url.rpartition("/")[0], captions_required, url, latents)
            name = url.rpartition("/")[2]
            if name not in parent.objects:
                raise SourceError(f"source {url} does not exist; name a prefix with films, a table or a tar")
            file = stack.enter_context(parent.file(name))
            if suffix == TAR_SUFFIX:
                stamp = parent.stat(name).modified_ns
                return Tar(file, url, name, stamp, name, printable(url), captions_required, latents), None
            return parent, file
        return Bucket(url, captions_required, latents=latents), None
    if text.startswith("file://"):
        text = str(store_at(text).local_path())
    elif "://" in text:
        raise SourceError(f"source {text}: name a folder, s3://BUCKET/PREFIX, a table or a tar")
    path = Path(text).expanduser()
    if not path.exists():
        raise SourceError(
            f"source {path} does not exist; name a folder of films, or a table {', '.join(tables.suffixes)}"
        )
    real = Path(os.path.realpath(path if path.is_dir() else path.parent))
    itself = real if path.is_dir() else real / path.name
    if path.is_file() and path.suffix.lower() == TAR_SUFFIX:
        where = (str(itself), path.name, itself.stat().st_mtime_ns, path.name, printable(str(itself)))
        return Tar(itself, *where, captions_required, latents), None
    if path.is_file() and path.suffix.lower() not in tables.suffixes:
        kinds = ", ".join(tables.suffixes)
        raise SourceError(f"source {path} is neither a folder nor a table {kinds}; name its folder")
    folder = _Folder(real, captions_required, printable(str(itself)), allow_outside, path, latents)
    return folder, None if path.is_dir() else path


@contextlib.contextmanager
def _table_file(captions: str | Path) -> Iterator[Path]:
    if not (isinstance(captions, str) and is_bucket(captions)):
        yield Path(captions)
        return
    parent, name = Bucket(captions.rpartition("/")[0], False), captions.rpartition("/")[2]
    if name not in parent.objects:
        raise SourceError(f"captions file {captions} does not exist; give one with file,caption")
    with parent.file(name) as file:
        yield file


def _tars_of(source: Source, stack: contextlib.ExitStack) -> Iterator[Tar]:
    """The tars in a folder or bucket, one after the other."""
    facts = (source.name, source.origin, source.captions_required, source.latents)
    if isinstance(source, _Folder):
        for name in source.tars:
            path = source.path / name
            yield Tar(path, str(path), name, path.stat().st_mtime_ns, *facts)
    elif isinstance(source, Bucket):
        for name in source.tars():
            with source.file(name) as file:
                yield Tar(file, f"{source.url}/{name}", name, source.stat(name).modified_ns, *facts)


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


def _discover_films(
    source: Source, shared: Table | Annotations | None, tables: _Tables, used: set[str], found: Discovery
) -> None:
    """The films of a source; `used` gets the files of `shared` that are there."""
    films = source.films(found)
    table, own_name = shared, ""
    if shared is None:
        with source.own_table() as own:
            if own is not None:
                own_name = "captions.csv"
                found.notes.append(f"captions: {source.address(own_name)}")
                table = read_table(own, tables.columns, source.captions_required)
                found.failures += _bad_rows(Path(source.address(own_name)), table.bad)
    if isinstance(table, Annotations):
        table = table.joined(films)
        found.failures += _bad_rows(Path(source.origin), table.bad)
    captioned = set()
    lost = []
    for row in table.rows if table is not None else ():
        if row.file in films:
            captioned.add(row.file)
            source.add(found, row, films[row.file])
        else:
            lost.append(row)
    if shared is None:
        for row in _of_kind(source, lost, own_name, found):
            source.missing(found, row, own_name)
    used |= captioned
    for name, stat in films.items():
        if name not in captioned:
            caption = source.sidecar(name)
            if not caption and tables.format is not None and tables.format.class_folders:
                caption = folder_words(name)
            source.add(found, Row(name, caption, fault=caption_fault(caption)), stat)


def _discover_table(source: Source, path: Path, table: Table | Annotations, found: Discovery) -> None:
    """The films that a table names."""
    if isinstance(table, Annotations):
        films = source.films(Discovery())
        joined = table.joined(films)
        found.notes += [table.missing()] if table.missing() else []
        found.failures += _bad_rows(path, table.bad)
        table = joined
    else:
        films = {}
    for row in _of_kind(source, table.rows, path.name, found):
        if (fault := source.fault(row.file)) is not None:
            source.fail(found, row, *fault)
            continue
        stat = films.get(row.file) or source.look(row.file)
        if stat is None:
            source.missing(found, row, "the table")
        else:
            source.add(found, row, stat)
    found.failures += _bad_rows(path, table.bad)


def _of_kind(source: Source, rows: Sequence[Row], table: str, found: Discovery) -> list[Row]:
    """The rows but those that name films where latents are read, or the other way; these are counted in a line."""
    chosen = [row for row in rows if not is_film(row.file, not source.latents)]
    if len(chosen) < len(rows):
        others = len(rows) - len(chosen)
        found.notes.append(f"{others} rows of {table} do not name {source.kind}, by their suffixes; they are left out")
    return chosen


def _bad_rows(table: Path, rows: Sequence[BadRow]) -> list[Failure]:
    parent = os.path.realpath(table.parent)
    return [failure(row.name, BAD_ROW, row.detail, path=printable(f"{parent}/{row.name}")) for row in rows]


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
        path = f"{printable(item.path)} ({again[item.place]})"
        again_named = failure(name, "duplicate_name", detail, path, item.source, item.origin)
        places[again_named.place] = again_named
    for item in sorted(places.values(), key=lambda item: item.film):
        if isinstance(item, Failure):
            settled.failures.append(item)
        elif captions_required and not item.caption:
            remedy = f"add a line to the captions file, or {Path(item.film).with_suffix('.txt').name} beside it"
            detail, path = f"it has no caption; {remedy}", printable(item.path)
            settled.failures.append(failure(item.film, "no_caption", detail, path, item.source, item.origin))
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

    def below(parent: str, linked_folder: bool = False) -> Iterator[tuple[str, bool]]:
        """Files, and whether a linked folder led to them."""
        for where, folders, files in os.walk(parent, onerror=unlisted):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for name in sorted(files):
                if not name.startswith("."):
                    yield os.path.join(where, name), linked_folder
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
                    yield from below(linked, True)

    root = os.path.join(folder.path, "")
    for path, by_link in below(str(folder.path)):
        name = path.removeprefix(root)
        suffix = os.path.splitext(name)[1].lower()
        if suffix == TAR_SUFFIX and folder.holds(Path(path)):
            folder.tars.append(name)
            continue
        if suffix not in folder.suffixes:
            others[suffix or "no suffix"] += suffix not in (*TABLE_SUFFIXES, ".txt")
            continue
        try:
            seen = os.lstat(path)
            if S_ISLNK(seen.st_mode):
                seen = os.stat(path)
            elif not by_link:
                folder.plain.add(name)
            yield name, seen
        except OSError as error:
            row = Row(name, "")
            folder.fail(found, row, "film_missing", f"it is a link to nothing ({error.strerror}); correct or remove it")
    if said := ", ".join(f"{printable(suffix)} {count}" for suffix, count in sorted(others.items()) if count):
        found.notes.append(f"left out of {printable(str(folder.path))}, no {folder.kind} by their names: {said}")
