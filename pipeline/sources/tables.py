"""Tables of films and captions: CSV, JSON lines and Parquet, row by row.

A row that cannot be used fails alone, with its place in the table; only a table that cannot be read at all, or that
lacks a column, is an error.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from pipeline.rows import part_of, printable, unusable
from storage.errors import VlfmError

TABLE_SUFFIXES = (".csv", ".jsonl", ".ndjson", ".parquet")
COLUMNS = ("file", "caption", "start", "end")

BAD_ROW, BAD_NAME, BAD_CAPTION, BAD_TIMES = "bad_row", "bad_name", "bad_caption", "bad_times"
"""Reasons of rows that cannot be used."""


class SourceError(VlfmError, ValueError):
    """There is nothing to ingest; the message is one line that says the remedy."""


@dataclass(frozen=True)
class Row:
    """A row of a table that names a file."""

    file: str
    caption: str
    start: float = 0.0
    end: float | None = None
    fault: tuple[str, str] | None = None
    """Reason and detail where the film is named and something else is wrong."""

    @property
    def film(self) -> str:
        """The file's name, with `#start-end` for a part; different files and parts have different names."""
        # A file whose own name ends like a part's is told apart from that part.
        if self.start == 0 and self.end is None and not part_of(self.file):
            return self.file
        return f"{self.file}#{_number(self.start)}-{'' if self.end is None else _number(self.end)}"


@dataclass(frozen=True)
class BadRow:
    """A row that does not say which film it means."""

    name: str
    """The table's name and the row's place in it."""
    detail: str


@dataclass
class Table:
    """The rows of a table, in its order."""

    rows: list[Row] = field(default_factory=list)
    bad: list[BadRow] = field(default_factory=list)


class _Fault(ValueError):
    """What is wrong with a row, and the remedy."""


_DOUBLED = re.compile(r"//|(?:^|/)\.(?:/|$)|/$")
"""What `Path` takes out of a name; most names have nothing of it."""

_FOREIGN = re.compile("[\udc80-\udcff]")
"""What Python makes of bytes that are not UTF-8."""

_Values = Mapping[str, Any]
_Choose = Callable[[Sequence[str]], Mapping[str, str]]
_Lines = Iterator[tuple[str, _Values | _Fault]]
"""Where a row is, and its values by COLUMNS or what is wrong with it."""


def read_table(path: Path, columns: Mapping[str, str] | None = None, captions_required: bool = True) -> Table:
    """The rows of a table.

    Args:
        path: a table by its suffix.
        columns: the table's own names for COLUMNS, where they differ. Case and surrounding spaces do not matter.
        captions_required: whether a table without the column for captions is an error.

    Raises:
        SourceError: the table is not there, is of no known kind, has no rows or none that can be read, or lacks a
            column or has it twice.
    """
    kind = path.suffix.lower()
    if not path.is_file():
        raise SourceError(f"captions file {path} does not exist; give a {', '.join(TABLE_SUFFIXES)} with file,caption")
    if kind not in TABLE_SUFFIXES:
        raise SourceError(f"captions file {path} is no table by its name; name it {' or '.join(TABLE_SUFFIXES)}")
    names = {name: (columns or {}).get(name, name) for name in COLUMNS}

    def choose(header: Sequence[str]) -> Mapping[str, str]:
        return _chosen(path, header, names, captions_required)

    table = Table()
    try:
        for where, values in read_values(path, choose):
            try:
                if isinstance(values, _Fault):
                    raise values
                table.rows.append(_row(values, names))
            except _Fault as fault:
                table.bad.append(BadRow(f"{path.name}, {where}", printable(str(fault))))
    except OSError as error:
        raise SourceError(f"{path} cannot be read ({error.strerror or error}); check it and its permissions") from None
    if table.rows:
        return table
    if table.bad:
        where = table.bad[0].name.removeprefix(f"{path.name}, ")
        raise SourceError(f"{path} cannot be read as {kind}, {where}: {table.bad[0].detail}")
    raise SourceError(f"{path} is empty; write a row for each film, with the columns file,caption")


def read_values(path: Path, choose: _Choose) -> _Lines:
    """Where each row of a table is, and its values, or the fault (a ValueError) for which it has none.

    `choose` gets the header and says which of its columns are wanted, under which names.
    """
    kind = path.suffix.lower()
    return _parquet(path, choose) if kind == ".parquet" else _text_lines(path, kind, choose)


def _number(seconds: float) -> str:
    """The shortest text that is this number and no other."""
    short = f"{seconds:g}"
    return short if float(short) == seconds else repr(seconds).removesuffix(".0")


# --- columns and values ---


def _chosen(path: Path, header: Sequence[str], names: Mapping[str, str], captions_required: bool) -> dict[str, str]:
    """The table's own column for each of COLUMNS that it has."""
    chosen = {}
    for column, name in names.items():
        exact = [own for own in header if own == name]
        found = exact or [own for own in header if own.strip().casefold() == name.strip().casefold()]
        if len(found) > 1:
            raise SourceError(f"{path} has the column {name} {len(found)} times; keep one")
        if found:
            chosen[column] = found[0]
    if "file" not in chosen or (captions_required and "caption" not in chosen):
        seen = printable(", ".join(own.strip() for own in header)) or "no columns"
        raise SourceError(f"{path} needs the columns {names['file']},{names['caption']}; it has: {seen}")
    return chosen


def _row(values: _Values, names: Mapping[str, str]) -> Row:
    if "file" not in values:
        raise _Fault(f"it has no {names['file']}; name a film or remove the row")
    file = _text(values["file"], names["file"]).strip()
    if not file:
        raise _Fault(f"the column {names['file']} is empty; name a film or remove the row")
    if unusable(file):
        raise _Fault(f"{file[:60]} has a NUL or a code that is no character; rename the file and correct the row")
    caption = " ".join(_text(values.get("caption"), names["caption"]).split())
    fault = caption_fault(caption)
    start, start_bad = _seconds(values.get("start"), 0.0)
    end, end_bad = _seconds(values.get("end"), None)
    problem = start_bad or end_bad
    if not problem and start is not None and end is not None and end <= start:
        problem = f"its part ends at {end:g} s, not after its start at {start:g} s; correct the table"
    plain = Path(file).as_posix() if _DOUBLED.search(file) else file
    return Row(plain, caption, start or 0.0, end, (BAD_TIMES, problem) if problem else fault)


def caption_fault(caption: str) -> tuple[str, str] | None:
    """Reason and detail where a caption is no text that a dataset can hold."""
    if not unusable(caption):
        return None
    shown = printable(caption)[:60]
    return BAD_CAPTION, f"its caption has a NUL or a code that is no character ({shown}); write it again in UTF-8"


def _text(value: Any, column: str) -> str:
    if isinstance(value, bytes):
        return value.decode("utf-8", "surrogateescape")
    if isinstance(value, (dict, list)):
        raise _Fault(f"the column {column} takes text, not {str(value)[:40]}; correct the row")
    return "" if value is None else str(value)


def _seconds(value: Any, default: float | None) -> tuple[float | None, str]:
    if value is None or str(value).strip() == "":
        return default, ""
    try:
        seconds = float(value)
    except (TypeError, ValueError, OverflowError):
        seconds = math.nan
    if not math.isfinite(seconds) or seconds < 0:
        return default, f"start and end are seconds from 0 on, not {printable(str(value))[:40]!r}; correct the table"
    return seconds, ""


# --- the kinds of tables ---


def _text_lines(path: Path, kind: str, choose: _Choose) -> _Lines:
    data = path.read_bytes()
    if data[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in data[:4]:
        raise SourceError(f"{path} is UTF-16; save it as UTF-8")
    # Bytes that are not UTF-8 stay with their row; a line ends at CR and LF only, not at what Unicode counts as ends.
    text = data.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "surrogateescape")
    lines = io.StringIO(text, newline=None).readlines()
    for where, values in (_csv if kind == ".csv" else _json_lines)(path, lines, choose):
        yield where, _Fault("it is not UTF-8; save the table as UTF-8") if _is_foreign(values) else values


def _is_foreign(values: _Values | _Fault) -> bool:
    """Whether a value has bytes that are not UTF-8."""
    texts = () if isinstance(values, _Fault) else values.values()
    return any(isinstance(text, str) and not text.isascii() and _FOREIGN.search(text) for text in texts)


def _csv(path: Path, lines: list[str], choose: _Choose) -> _Lines:
    records = _records(lines)
    header = next((fields for _, fields in records if isinstance(fields, _Fault) or any(fields)), None)
    if header is None:
        return
    if isinstance(header, _Fault):
        raise SourceError(f"{path}, header: {header}")
    places = {column: header.index(name) for column, name in choose(header).items()}
    for number, fields in records:
        if isinstance(fields, _Fault):
            yield f"line {number}", fields
        elif len(fields) > len(header):
            fault = f"it has {len(fields)} fields, the header has {len(header)}; quote a caption that has commas"
            yield f"line {number}", _Fault(fault)
        elif any(text.strip() for text in fields):
            if len(fields) < len(header):
                fault = f"it has {len(fields)} fields, the header has {len(header)}; write all of them, empty or not"
                yield f"line {number}", _Fault(fault)
            else:
                yield f"line {number}", {column: fields[place] for column, place in places.items()}


def _records(lines: list[str]) -> Iterator[tuple[int, list[str] | _Fault]]:
    """The records of a CSV with the numbers of their first lines; behind a broken one it goes on at the next line."""
    first = 0
    while first < len(lines):
        begin = first
        reader = csv.reader(islice(lines, begin, None), strict=True)
        try:
            for fields in reader:
                yield first + 1, fields
                first = begin + reader.line_num
            return
        except csv.Error as error:
            said = "its quote is not closed" if "end of data" in str(error) else str(error)
            yield first + 1, _Fault(f'{said}; quote the caption, and double the quotes inside it: "a ""b"" c"')
            first += 1


def _json_lines(path: Path, lines: list[str], choose: _Choose) -> _Lines:
    found: list[tuple[int, dict[str, Any] | _Fault]] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            value = _Fault(f"{error.msg} at character {error.pos + 1}; write one JSON object on each line")
        except (ValueError, RecursionError):
            value = _Fault("it is nested too deeply or has a number too long; write one plain JSON object on each line")
        if not isinstance(value, (dict, _Fault)):
            value = _Fault(f"it is no JSON object but {str(value)[:40]}; write one JSON object on each line")
        found.append((number, value))
    objects = [value for _, value in found if isinstance(value, dict)]
    chosen = choose(list(dict.fromkeys(key for value in objects for key in value))) if objects else {}
    for number, value in found:
        if isinstance(value, _Fault):
            yield f"line {number}", value
        else:
            yield f"line {number}", {column: value[key] for column, key in chosen.items() if key in value}


def _parquet(path: Path, choose: _Choose) -> _Lines:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path, page_checksum_verification=True)
    except PermissionError:
        raise
    except (pa.ArrowException, OSError) as error:
        told = " ".join(str(error).split())
        raise SourceError(f"{path} is no Parquet file ({told}); write it again") from None
    chosen = choose(file.schema_arrow.names)
    first = 1
    for group in range(file.num_row_groups):
        count = file.metadata.row_group(group).num_rows
        where = f"rows {first}-{first + count - 1}" if count > 1 else f"row {first}"
        try:
            rows = file.read_row_group(group, columns=list(chosen.values()), use_threads=False)
        except (pa.ArrowException, OSError, ValueError) as error:
            yield where, _Fault(f"damaged ({' '.join(str(error).split())[:120]}); write the table again")
        else:
            yield from _parquet_rows(rows, chosen, first)
        first += count


def _parquet_rows(rows: Any, chosen: Mapping[str, str], first: int) -> Iterable[tuple[str, _Values | _Fault]]:
    for number in range(rows.num_rows):
        try:
            values: _Values | _Fault = {column: rows.column(own)[number].as_py() for column, own in chosen.items()}
        except ValueError:
            values = _Fault("it is not UTF-8; write the table again")
        yield f"row {first + number}", values
