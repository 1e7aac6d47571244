"""What there is to ingest: films and their captions, from folders and tables. Nothing is opened but the tables.

A SOURCE is a folder (read recursively) or a table (CSV, JSON lines, Parquet) with the columns `file, caption` and, for
parts of a film, `start, end` in seconds. In a folder captions come from the file given, else from its captions.csv,
else from `clip.txt` beside `clip.mp4`.
"""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FILM_SUFFIXES = frozenset(
    {".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts"}
    | {".m2ts", ".flv", ".ogv", ".ogg", ".wmv", ".asf", ".3gp", ".3g2"}
)
TABLE_SUFFIXES = (".csv", ".jsonl", ".ndjson", ".parquet")
COLUMNS = ("file", "caption", "start", "end")


class SourceError(ValueError):
    """There is nothing to ingest; the message is one line that says the mend."""


@dataclass(frozen=True)
class FilmEntry:
    """A film, or a part of one, with its caption."""

    film: str
    """The name people see: the path relative to its source, with `#start-end` for a part."""
    path: Path
    """Where the file is."""
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


@dataclass(frozen=True)
class FilmFailure:
    """A film that cannot be used, found without opening it."""

    film: str
    reason: str
    detail: str
    status: str = "failed"


@dataclass
class Discovery:
    """All that the sources name, in order of the films' names; every name is once in `entries` or in `failures`."""

    entries: list[FilmEntry] = field(default_factory=list)
    failures: list[FilmFailure] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """Lines for people: where the captions came from."""

    def limited(self, films: int | None) -> Discovery:
        """The first `films` films by name, failures among them."""
        if films is None:
            return self
        names = sorted([entry.film for entry in self.entries] + [failure.film for failure in self.failures])[:films]
        chosen = set(names)
        return Discovery(
            [entry for entry in self.entries if entry.film in chosen],
            [failure for failure in self.failures if failure.film in chosen],
            self.notes,
        )


@dataclass(frozen=True)
class _Row:
    """A line of a table."""

    file: str
    caption: str
    start: float
    end: float | None
    problem: str = ""

    @property
    def film(self) -> str:
        if self.start == 0 and self.end is None:
            return self.file
        return f"{self.file}#{self.start:g}-{'' if self.end is None else f'{self.end:g}'}"


def discover(
    sources: Sequence[str | Path] | str | Path,
    captions: str | Path | None = None,
    captions_required: bool = True,
    columns: Mapping[str, str] | None = None,
) -> Discovery:
    """Every film that the sources name, with its caption, or the reason why it has none.

    Args:
        sources: folders and tables.
        captions: a table of captions for the films of the folders; its files are relative to their folder.
        captions_required: whether a film without a caption fails (`no_caption`); else its caption is empty.
        columns: the table's own names for `file, caption, start, end`, where they differ.

    Raises:
        SourceError: a source or the captions file is not there or cannot be read, or there is no film at all.
    """
    sources = [sources] if isinstance(sources, (str, Path)) else list(sources)
    if not sources:
        raise SourceError("no source was given; name a folder of films or a table")
    found = Discovery()
    rows = list(_read_table(Path(captions), columns)) if captions is not None else None
    used: set[str] = set()
    for source in sources:
        path = _existing(source)
        if path.is_dir():
            _discover_folder(path, rows, columns, used, found)
        else:
            _discover_rows(path.parent, list(_read_table(path, columns)), found)
    for row in rows or []:
        if row.file not in used:
            found.failures.append(_missing(row, f"captions file {Path(str(captions)).name}"))
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
    folder: Path, rows: list[_Row] | None, columns: Mapping[str, str] | None, used: set[str], found: Discovery
) -> None:
    films = dict(_scan(folder))
    own = folder / "captions.csv"
    tabled = rows
    if tabled is None and own.is_file():
        found.notes.append(f"captions: {own}")
        tabled = list(_read_table(own, columns))
        used_here: set[str] = set()
    else:
        used_here = used
    captioned = set()
    for row in tabled or []:
        if row.file in films:
            captioned.add(row.file)
            used_here.add(row.file)
            _add(found, row, films[row.file])
        elif rows is None:
            found.failures.append(_missing(row, own.name))
    for name, entry in films.items():
        if name not in captioned:
            _add(found, _Row(name, _sidecar(folder / name), 0.0, None), entry)


def _discover_rows(folder: Path, rows: list[_Row], found: Discovery) -> None:
    for row in rows:
        try:
            path = folder / row.file
            _add(found, row, (path, path.stat()))
        except OSError:
            found.failures.append(_missing(row, "the table"))


def _add(found: Discovery, row: _Row, place: tuple[Path, os.stat_result]) -> None:
    path, stat = place
    if row.problem:
        found.failures.append(FilmFailure(row.film, "bad_times", row.problem))
        return
    found.entries.append(
        FilmEntry(row.film, path.absolute(), row.caption, stat.st_size, stat.st_mtime_ns, row.start, row.end)
    )


def _missing(row: _Row, where: str) -> FilmFailure:
    detail = f"{where} names {row.file}, which is not there; add the film or remove the line"
    return FilmFailure(row.film, "film_missing", detail)


def _settled(found: Discovery, captions_required: bool) -> Discovery:
    """Each name once, in order; films without a caption moved to the failures where one is required."""
    settled = Discovery(notes=found.notes)
    names: dict[str, FilmEntry | FilmFailure] = {}
    items: list[FilmEntry | FilmFailure] = [*found.entries, *found.failures]
    for item in sorted(items, key=lambda item: item.film):
        earlier = names.get(item.film)
        if earlier is not None:
            if earlier != item:
                number = sum(name == item.film or name.startswith(f"{item.film} (") for name in names)
                detail = f"{item.film} is named twice; keep one line, or give parts of a film by start and end"
                failure = FilmFailure(f"{item.film} ({number + 1})", "duplicate_name", detail)
                names[failure.film] = failure
                settled.failures.append(failure)
            continue
        names[item.film] = item
        if isinstance(item, FilmFailure):
            settled.failures.append(item)
        elif captions_required and not item.caption:
            mend = f"add a line to the captions file, or {Path(item.film).with_suffix('.txt').name} beside it"
            settled.failures.append(FilmFailure(item.film, "no_caption", f"it has no caption; {mend}"))
        else:
            settled.entries.append(item)
    return settled


def _scan(folder: Path) -> Iterator[tuple[str, tuple[Path, os.stat_result]]]:
    """Films below a folder by relative name, sorted; hidden files and linked folders are left out."""
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if os.path.splitext(name)[1].lower() in FILM_SUFFIXES and not name.startswith("."):
                path = os.path.join(parent, name)
                try:
                    stat = os.stat(path)
                except OSError:
                    continue  # a dangling link is no film
                yield os.path.relpath(path, folder).replace(os.sep, "/"), (Path(path), stat)


def _sidecar(film: Path) -> str:
    try:
        return " ".join(film.with_suffix(".txt").read_text("utf-8-sig", errors="replace").split())
    except OSError:
        return ""


def _read_table(path: Path, columns: Mapping[str, str] | None) -> Iterator[_Row]:
    """The lines of a table. Raises SourceError where it is not there, cannot be read, or lacks the column `file`."""
    if not path.is_file():
        raise SourceError(f"captions file {path} does not exist; give a {', '.join(TABLE_SUFFIXES)} with file,caption")
    names = {name: (columns or {}).get(name, name) for name in COLUMNS}
    kind = path.suffix.lower()
    try:
        if kind == ".parquet":
            import pyarrow as pa
            import pyarrow.parquet as pq

            try:
                lines: Iterable[dict[str, Any]] = pq.ParquetFile(path).read().to_pylist()
            except pa.ArrowInvalid as error:
                raise SourceError(f"{path} is no Parquet file ({error}); write it again") from None
        elif kind in (".jsonl", ".ndjson"):
            lines = [json.loads(line) for line in path.read_text("utf-8-sig").splitlines() if line.strip()]
        else:
            with path.open(encoding="utf-8-sig", newline="") as table:
                lines = list(csv.DictReader(table))
    except (UnicodeDecodeError, json.JSONDecodeError, csv.Error) as error:
        raise SourceError(f"{path} cannot be read as {kind or 'a table'} ({error}); save it as UTF-8") from None
    for number, line in enumerate(lines, start=1):
        if not isinstance(line, dict) or names["file"] not in line:
            seen = ", ".join(map(str, line)) if isinstance(line, dict) else "no columns"
            raise SourceError(f"{path} needs the columns file,caption; it has: {seen}")
        file = str(line[names["file"]] or "").strip()
        if not file:
            raise SourceError(
                f"{path}, line {number}: the column {names['file']} is empty; name a film or remove the line"
            )
        caption = " ".join(str(line.get(names["caption"]) or "").split())
        start, start_bad = _seconds(line.get(names["start"]), 0.0)
        end, end_bad = _seconds(line.get(names["end"]), None)
        problem = start_bad or end_bad
        if not problem and start is not None and end is not None and end <= start:
            problem = f"its part ends at {end:g} s, not after its start at {start:g} s; correct the table"
        yield _Row(Path(file).as_posix(), caption, start or 0.0, end, problem)


def _seconds(value: Any, default: float | None) -> tuple[float | None, str]:
    if value is None or str(value).strip() == "":
        return default, ""
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        seconds = math.nan
    if not math.isfinite(seconds) or seconds < 0:
        return default, f"start and end are seconds from 0 on, not {value!r}; correct the table"
    return seconds, ""
