"""Published annotation files of video datasets: which columns they have, and how a row finds its film.

Such a table names films by ids, not by files: its rows are joined with the films of a folder, by the names that the
dataset's own scripts give them. A film is either the clip itself, already cut, or the whole film, of which the row's
times say the part. A row whose film is not there is no failure: hardly anybody has all films of such a dataset.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from pipeline.rows import printable, unusable
from pipeline.sources.tables import (
    BAD_TIMES,
    TABLE_SUFFIXES,
    BadRow,
    Row,
    SourceError,
    Table,
    caption_fault,
    read_values,
)


@dataclass(frozen=True)
class TableFormat:
    """The columns of a dataset's annotation files, by which films, captions and times are found.

    A pattern is a name with columns in braces, without a suffix or with one: `{youtube_id}_{time_start:06}`, where the
    time has six digits.
    """

    name: str
    """What --table-format takes."""
    about: str
    """One line for people: the dataset, and which of its files are read."""
    cut: tuple[str, ...] = ()
    """Patterns of films that are the clip itself, in order of preference."""
    whole: tuple[str, ...] = ()
    """Patterns of films that the clip is a part of, by its times."""
    caption: tuple[str, ...] = ()
    """Columns of the caption, in order of preference; of a list the first one is taken."""
    times: tuple[tuple[str, str], ...] = ()
    """Columns of start and end, as seconds or as H:MM:SS."""
    span: str = ""
    """A column with both, as text or list: `['0:01:02.5', '0:02:00']`."""
    frames: str = ""
    """A column with both as frames, `0:65`, of the column `fps`."""
    labels: str = ""
    """A column of numbers whose names, in `vocabulary.csv` beside the table, are the caption."""
    class_folders: bool = False
    """Whether a film without another caption has that of its folder: `ApplyEyeMakeup` is "apply eye makeup"."""
    suffixes: tuple[str, ...] = TABLE_SUFFIXES
    """Kinds of its files."""

    @property
    def columns(self) -> frozenset[str]:
        """All columns that are read."""
        patterns = " ".join((*self.cut, *self.whole))
        found = {name for name, _ in _FIELD.findall(patterns)} | set(self.caption)
        found |= {name for pair in self.times for name in pair} | {self.span, self.frames, self.labels}
        return frozenset((found | ({"fps"} if self.frames else set())) - {""})


FORMATS = {
    each.name: each
    for each in (
        TableFormat(
            "openvid",
            "OpenVid-1M: OpenVid-1M.csv or OpenVidHD.csv",
            cut=("{video}",),
            caption=("caption",),
        ),
        TableFormat(
            "ucf101",
            "UCF-101: class folders, with or without a list such as trainlist01.txt",
            cut=("{file}",),
            class_folders=True,
            suffixes=(".txt",),
        ),
        TableFormat(
            "kinetics",
            "Kinetics-400 (and 600, 700): train.csv, val.csv; the label is the caption",
            cut=("{label}/{youtube_id}_{time_start:06}_{time_end:06}", "{youtube_id}_{time_start:06}_{time_end:06}"),
            whole=("{youtube_id}",),
            caption=("label",),
            times=(("time_start", "time_end"),),
        ),
        TableFormat(
            "internvid",
            "InternVid: the JSON lines or Parquet of InternVid-10M-FLT and others",
            cut=("{YoutubeID}_{Start_timestamp}_{End_timestamp}",),
            whole=("{YoutubeID}",),
            caption=("Caption",),
            times=(("Start_timestamp", "End_timestamp"),),
        ),
        TableFormat(
            "miradata",
            "MiraData: miradata_v1_*.csv or miradata_v0.csv; the dense caption, else the short one",
            cut=("{file_path}", "{clip_id}", "{index}"),
            whole=("{clip_id:012}", "{video_id}"),
            caption=("dense_caption", "short_caption"),
            times=(("start_timestep", "end_timestep"),),
            span="timestamp",
        ),
        TableFormat(
            "pixabay",
            "Pixabay: Open-Sora-Plan's video_pixabay_*.json, or answers of Pixabay's API, whose tags are the caption",
            cut=("{path}", "{id}"),
            caption=("cap", "tags"),
            frames="frame_idx",
            suffixes=(".json", *TABLE_SUFFIXES),
        ),
        TableFormat(
            "youtube8m",
            "YouTube-8M: *.tfrecord, or a table of id and labels, beside vocabulary.csv whose names are the caption",
            cut=("{youtube_id}", "{id}"),
            labels="labels",
            suffixes=(".tfrecord", *TABLE_SUFFIXES),
        ),
    )
}

_FIELD = re.compile(r"\{(\w+)(?::0(\d+))?\}")
_CLOCK = re.compile(r"(?:(?:(\d+):)?(\d+):)?(\d+(?:\.\d+)?)")


def format_named(name: str | None) -> TableFormat | None:
    """The format of this name; None for None. Raises SourceError for another name."""
    if name is not None and name not in FORMATS:
        raise SourceError(f"no table format {name!r}; there are: {', '.join(FORMATS)}")
    return None if name is None else FORMATS[name]


@dataclass
class Annotations:
    """The rows of a published table, to be joined with the films of folders."""

    table: str
    """Name of the file."""
    format: TableFormat
    rows: list[_Annotation] = field(default_factory=list)
    bad: list[BadRow] = field(default_factory=list)
    _met: set[int] = field(default_factory=set)

    def joined(self, films: Iterable[str]) -> Table:
        """Rows of the films (relative paths) of a folder; each film of which there is no row keeps its own caption."""
        index = _Index(films)
        table = Table(bad=[])
        for number, row in enumerate(self.rows):
            found, part = index.find(row.cut), False
            if not found:
                found, part = index.find(row.whole), True
            if found:
                self._met.add(number)
            if len(found) > 1:
                told = f"{found[0]} and {found[1]} are both its film; keep one"
                table.bad.append(BadRow(f"{self.table}, {row.where}", printable(told)))
            elif found:
                start, end = (row.start, row.end) if part else (0.0, None)
                caption = row.caption or (folder_words(found[0]) if self.format.class_folders else "")
                fault = (row.bad_times if part else None) or caption_fault(caption)
                table.rows.append(Row(found[0], caption, start, end, fault))
        return table

    def missing(self) -> str:
        """A line of the rows whose films no folder has; empty where there are none."""
        lost = [row for number, row in enumerate(self.rows) if number not in self._met]
        if not lost:
            return ""
        example = printable((*lost[0].cut, *lost[0].whole)[0])
        return (
            f"{len(lost)} of {len(self.rows)} rows of {self.table} are of films that are not there, such as {example}"
        )


@dataclass(frozen=True)
class _Annotation:
    where: str
    cut: tuple[str, ...]
    whole: tuple[str, ...]
    caption: str
    start: float = 0.0
    end: float | None = None
    bad_times: tuple[str, str] | None = None


class _Index:
    """Films by their paths and names, with and without suffix."""

    def __init__(self, films: Iterable[str]) -> None:
        self._by: dict[str, list[str]] = {}
        self._films: set[str] = set()
        for film in films:
            self._films.add(film)
            path = PurePosixPath(film)
            for name in {film, str(path.with_suffix("")), path.name, path.stem}:
                self._by.setdefault(name, []).append(film)

    def find(self, names: Sequence[str]) -> list[str]:
        """The films of the first of these names that there is; more than one where it is not clear which is meant."""
        for name in names:
            parts = PurePosixPath(name).parts
            # A path of the dataset's own may begin above the folder that was given.
            for first in range(len(parts)):
                shorter = "/".join(parts[first:])
                if shorter in self._films:
                    return [shorter]
                if shorter in self._by:
                    return self._by[shorter]
        return []


def folder_words(film: str) -> str:
    """The words of a film's folder: `ApplyEyeMakeup/v_1.avi` is "apply eye makeup"; empty where it has none."""
    folder = PurePosixPath(film).parent.name
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", " ", folder)
    return " ".join(re.sub(r"[_-]+", " ", words).lower().split())


def read_annotations(path: Path, chosen: TableFormat) -> Annotations:
    """The rows of a published table.

    Raises:
        SourceError: the table is not there, is of another kind, or has not the format's columns.
    """
    kind = path.suffix.lower()
    if not path.is_file():
        raise SourceError(f"{path} does not exist; give {chosen.about}")
    if kind not in chosen.suffixes:
        raise SourceError(
            f"{path} is no {' or '.join(chosen.suffixes)}; --table-format {chosen.name} is {chosen.about}"
        )
    found = Annotations(path.name, chosen)
    names = _vocabulary(path) if chosen.labels else {}
    try:
        for where, values in _values(path, kind, chosen):
            try:
                if isinstance(values, ValueError):
                    raise values
                found.rows.append(_annotation(where, values, chosen, names))
            except ValueError as fault:
                found.bad.append(BadRow(f"{path.name}, {where}", printable(str(fault))))
    except OSError as error:
        raise SourceError(f"{path} cannot be read ({error.strerror or error}); check it and its permissions") from None
    if not found.rows:
        why = found.bad[0].detail if found.bad else "it is empty"
        raise SourceError(f"{path} has no row that can be used ({why}); --table-format {chosen.name} is {chosen.about}")
    return found


_Where = Iterator[tuple[str, Mapping[str, Any] | ValueError]]


def _values(path: Path, kind: str, chosen: TableFormat) -> _Where:
    if kind == ".txt":
        yield from _list_lines(path)
    elif kind == ".json":
        yield from _json_array(path)
    elif kind == ".tfrecord":
        yield from _tfrecord(path)
    else:
        yield from read_values(path, lambda header: _columns(path, header, chosen))


def _columns(path: Path, header: Sequence[str], chosen: TableFormat) -> dict[str, str]:
    """The table's own column for each of the format's that it has."""
    own = {name.strip().casefold(): name for name in header}
    found = {name: own[name.casefold()] for name in chosen.columns if name.casefold() in own}
    patterns = [{name for name, _ in _FIELD.findall(pattern)} for pattern in (*chosen.cut, *chosen.whole)]
    if not any(names <= set(found) for names in patterns):
        seen = printable(", ".join(name.strip() for name in header if name.strip())) or "none"
        raise SourceError(f"{path} has not the columns of {chosen.about}; it has: {seen}")
    return found


def _annotation(where: str, values: Mapping[str, Any], chosen: TableFormat, names: Mapping[int, str]) -> _Annotation:
    cut = tuple(filter(None, (_filled(pattern, values) for pattern in chosen.cut)))
    whole = tuple(filter(None, (_filled(pattern, values) for pattern in chosen.whole)))
    if not cut and not whole:
        raise ValueError("it names no film; correct or remove the row")
    caption = next(filter(None, (_caption(values.get(column)) for column in chosen.caption)), "")
    if chosen.labels:
        caption = ", ".join(filter(None, (names.get(number) for number in _numbers(values.get(chosen.labels, ())))))
    start, end, bad = 0.0, None, None
    try:
        start, end = _span(values, chosen)
        if end is not None and end <= start:
            raise ValueError(f"it ends at {end:g} s, not after its start at {start:g} s")
    except ValueError as error:
        start, end, bad = 0.0, None, (BAD_TIMES, f"{error}; correct the table")
    if chosen.frames and (start > 0 or end is not None or bad):
        cut, whole = (), cut  # a film with frames named is not the clip itself
    return _Annotation(where, cut, whole, caption, start, end, bad)


def _filled(pattern: str, values: Mapping[str, Any]) -> str:
    """The pattern with the row's values; empty where one is missing, or is no number where one is needed."""
    filled = pattern
    for name, digits in _FIELD.findall(pattern):
        text = "" if values.get(name) is None else str(values[name]).strip()
        if digits:
            figures = text.partition(".")[0]
            text = figures.zfill(int(digits)) if figures.isdigit() else ""
        if not text or unusable(text):
            return ""
        filled = filled.replace(f"{{{name}:0{digits}}}" if digits else f"{{{name}}}", text)
    # A name stays within the folder: `..` and a root are no names of films.
    parts = [part for part in filled.replace("\\", "/").split("/") if part not in ("", ".")]
    return "" if ".." in parts else "/".join(parts)


def _caption(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        value = next((each for each in value if each), "")
    return "" if value is None else " ".join(str(value).split())


def _span(values: Mapping[str, Any], chosen: TableFormat) -> tuple[float, float | None]:
    """Start and end in seconds. Raises ValueError where they are none."""
    if chosen.span and values.get(chosen.span) not in (None, ""):
        value = values[chosen.span]
        texts = re.findall(r"[\d:.]+", value) if isinstance(value, str) else list(map(str, value))
        if len(texts) != 2:
            raise ValueError(f"{chosen.span} is {str(value)[:40]!r}, not a start and an end")
        return _seconds(texts[0]), _seconds(texts[1])
    if chosen.frames and values.get(chosen.frames) not in (None, ""):
        first, _, last = str(values[chosen.frames]).partition(":")
        rate = float(values.get("fps") or 0)
        if not (first.isdigit() and last.isdigit() and rate > 0):
            raise ValueError(f"{chosen.frames} is {values[chosen.frames]!r}, which needs first:last and a column fps")
        return int(first) / rate, int(last) / rate
    for start, end in chosen.times:
        if values.get(start) not in (None, "") or values.get(end) not in (None, ""):
            till = values.get(end)
            return _seconds(values.get(start) or 0), None if till in (None, "") else _seconds(till)
    return 0.0, None


def _seconds(value: Any) -> float:
    found = _CLOCK.fullmatch(str(value).strip())
    if found is None:
        raise ValueError(f"{str(value)[:40]!r} is neither seconds nor H:MM:SS")
    hours, minutes, seconds = (float(part or 0) for part in found.groups())
    return 3600 * hours + 60 * minutes + seconds


def _numbers(value: Any) -> list[int]:
    found = re.findall(r"\d+", value) if isinstance(value, str) else value
    return [int(number) for number in (found if isinstance(found, (list, tuple)) else [found])]


def _vocabulary(table: Path) -> dict[int, str]:
    path = table.parent / "vocabulary.csv"
    if not path.is_file():
        raise SourceError(f"{path} does not exist; put YouTube-8M's vocabulary.csv beside {table.name}")
    columns = ("Index", "Name")

    def choose(header: Sequence[str]) -> dict[str, str]:
        if any(name not in header for name in columns):
            raise SourceError(f"{path} lacks the columns Index and Name; it has: {printable(', '.join(header))}")
        return {name: name for name in columns}

    rows = [values for _, values in read_values(path, choose) if not isinstance(values, ValueError)]
    return {int(row["Index"]): str(row["Name"]) for row in rows if str(row["Index"]).isdigit()}


def _list_lines(path: Path) -> _Where:
    """UCF-101's lists: `Class/film.avi`, and in some a number behind it."""
    for number, line in enumerate(path.read_text("utf-8", "surrogateescape").splitlines(), start=1):
        if line.strip():
            yield f"line {number}", {"file": line.split()[0]}


def _json_array(path: Path) -> _Where:
    """A list of objects, or one under the name `hits`."""
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{path} is no JSON ({' '.join(str(error).split())}); download it again") from None
    value = value.get("hits", value) if isinstance(value, dict) else value
    if not isinstance(value, list):
        raise SourceError(f"{path} is no list of objects; download it again")
    for number, each in enumerate(value, start=1):
        yield f"entry {number}", each if isinstance(each, dict) else ValueError("it is no object; remove it")


def _tfrecord(path: Path) -> _Where:
    """The `id` and `labels` of each record, an Example or a SequenceExample of protocol buffers.

    A record is its length (8 bytes, little-endian), a checksum of that, the message, and a checksum (4 bytes each).
    """
    with path.open("rb") as file:
        number = 0
        while head := file.read(12):
            number += 1
            size = struct.unpack("<Q", head[:8])[0] if len(head) == 12 else -1
            body = file.read(size + 4) if 0 <= size < 1 << 30 else b""
            if len(body) != size + 4:
                yield f"record {number}", ValueError("the file is cut off or damaged here; download it again")
                return
            try:
                yield f"record {number}", _example(body[:-4])
            except (ValueError, IndexError):
                yield f"record {number}", ValueError("it is no YouTube-8M record; download the file again")


def _example(message: bytes) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for features in _fields(message, 1):  # of the example, or the context of a sequence
        for entry in _fields(features, 1):
            (name,), (feature,) = _fields(entry, 1), _fields(entry, 2)
            if name == b"id":
                found["id"] = _fields(_fields(feature, 1)[0], 1)[0].decode("utf-8")
            elif name == b"labels":
                packed = _fields(_fields(feature, 3)[0], 1)
                found["labels"] = [number for part in packed for number in _varints(part)]
    if set(found) != {"id", "labels"}:
        raise ValueError("no id or no labels")
    return found


def _fields(message: bytes, wanted: int) -> list[bytes]:
    """The contents of the fields `wanted` of a message; numbers as their own varints."""
    found, place = [], 0
    while place < len(message):
        tag, place = _varint(message, place)
        kind = tag & 7
        begin = place
        if kind == 0:
            _, place = _varint(message, place)
        elif kind == 2:
            size, begin = _varint(message, place)
            place = begin + size
        else:
            place += {1: 8, 5: 4}[kind] if kind in (1, 5) else len(message) + 1
        if place > len(message):
            raise ValueError("a field ends beyond its message")
        if tag >> 3 == wanted:
            found.append(message[begin:place])
    return found


def _varints(data: bytes) -> Iterator[int]:
    place = 0
    while place < len(data):
        number, place = _varint(data, place)
        yield number


def _varint(data: bytes, place: int) -> tuple[int, int]:
    number = shift = 0
    while True:
        byte = data[place]
        number |= (byte & 127) << shift
        place, shift = place + 1, shift + 7
        if byte < 128:
            return number, place
        if shift > 63:
            raise ValueError("a number too long")
