"""Where a film still occurs in a lake: every file is read, and decoded where its bytes do not show what it says.

An erasure ends with this search: it is the proof that nothing was forgotten, so it shares no code with what erases.
"""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from storage.fingerprint import ID_LENGTH
from storage.layout import Lake

_PIECE = 4 << 20
_LONG = 8  # bytes; a shorter text is looked for as a whole value or word only, or chance would find it everywhere
_HEXADECIMAL = re.compile(rb"[0-9a-f]{%d,}" % ID_LENGTH)
_ICECHUNK_HEADER = 39  # bytes before the compressed part of a snapshot, a manifest or a transaction log
_ZSTD = b"\x28\xb5\x2f\xfd"
REDACTED = "(erased)"


@dataclass(frozen=True)
class Needles:
    """What is searched for."""

    ids: frozenset[str]
    """Ids of 16 hexadecimal digits, which digests begin with: of contents, clips and captions."""
    texts: frozenset[str]
    """Names, paths and captions."""
    others: frozenset[str] = field(default_factory=frozenset)
    """Texts that stay: a needle that is only found as a part of one of these is not found."""

    def to_json(self) -> dict[str, list[str]]:
        """As lists."""
        return {name: sorted(getattr(self, name)) for name in ("ids", "texts", "others")}

    @staticmethod
    def from_json(found: Mapping[str, Iterable[str]]) -> Needles:
        """The reverse of `to_json`."""
        return Needles(**{name: frozenset(found[name]) for name in ("ids", "texts", "others")})

    def names_row(self, row: Mapping[str, Any]) -> bool:
        """Whether a table's row is about what is searched for."""
        return any(str(row.get(name, "")) in self.texts for name in ("film", "path")) or any(
            str(row.get(name, "")) in self.ids for name in ("clip_id", "film_id")
        )

    def redacted(self, value: Any) -> Any:
        """A text without what is searched for; other values as they are."""
        if not isinstance(value, str) or not self.found_in_text(value):
            return value
        for text in sorted(self.texts, key=len, reverse=True):
            value = re.sub(re.escape(text) if len(text.encode()) >= _LONG else _word(text), REDACTED, value)
        for identity in self.ids:
            value = re.sub(rf"{identity}[0-9a-f]*", REDACTED, value)
        return value

    def found_in_text(self, text: str) -> bool:
        """Whether a value of a table is a needle, has a file's name as a word, or holds a long one anywhere."""
        if text in self.texts:
            return True
        if text not in self.others and any(re.search(word, text) for word in self._words):
            return True
        return self.found_in_bytes(text.encode("utf-8", "surrogatepass"))

    def found_in_bytes(self, data: bytes, start: int = 0, stop: int | None = None) -> bool:
        """Whether raw bytes hold a needle; of texts, one that begins from `start` up to and without `stop`."""
        for run in _HEXADECIMAL.finditer(data):
            digits = run[0].decode()
            if any(digits[at : at + ID_LENGTH] in self.ids for at in range(len(digits) - ID_LENGTH + 1)):
                return True
        end = len(data) if stop is None else stop
        return any(self._stands(data, form, containing, start, end) for form, containing in self._forms)

    @cached_property
    def longest(self) -> int:
        """Bytes of the longest text that has to be seen whole."""
        return max([len(form) for form, _ in self._forms] + [len(form) for form in self._kept] + [ID_LENGTH])

    @cached_property
    def _kept(self) -> list[bytes]:
        return [form for text in self.others for form in _spellings(text)]

    @cached_property
    def _words(self) -> list[str]:
        short = [text for text in self.texts if len(text.encode()) < _LONG and re.fullmatch(r"\S+\.\S+", text)]
        return [_word(text) for text in short]

    @cached_property
    def _forms(self) -> list[tuple[bytes, list[bytes]]]:
        """Each spelling that is looked for, with the texts that stay and contain it."""
        forms = []
        for text in sorted(self.texts):
            for form in _spellings(text):
                needle = form if len(form) >= _LONG else b'"' + form + b'"'
                forms.append((needle, [kept for kept in self._kept if needle in kept and kept != needle]))
        return forms

    def _stands(self, data: bytes, needle: bytes, containing: Sequence[bytes], start: int, stop: int) -> bool:
        at = data.find(needle, start)
        while 0 <= at < stop:
            if not any(_covered(data, at, needle, kept) for kept in containing):
                return True
            at = data.find(needle, at + 1)
        return False


@dataclass(frozen=True)
class Search:
    """The end of a search."""

    files: int
    bytes: int
    found: tuple[str, ...]
    """Keys that hold a needle, in their names or their contents."""


def search(lake: Lake, needles: Needles) -> Search:
    """Read every file of the lake: what was read, and where a needle was found."""
    sizes = lake.store.sizes()
    found = tuple(key for key in sizes if occurrences_in(lake, key, needles))
    return Search(len(sizes), sum(sizes.values()), found)


def occurrences_in(lake: Lake, key: str, needles: Needles) -> bool:
    """Whether the file under `key` holds a needle, in its name or its content, or cannot be read to say."""
    if needles.found_in_bytes(key.encode()):
        return True
    if key.endswith(".parquet"):
        return _in_table(lake.store.read(key), needles)
    if key.endswith((".npz", ".zip")):
        return _in_archive(lake.store.read(key), needles)
    if re.match(r"arrays/(snapshots|manifests|transactions)/", key):
        return any(needles.found_in_bytes(part) for part in _unpacked(lake.store.read(key)))
    with lake.store.open_read(key) as file:
        return any(needles.found_in_bytes(*piece) for piece in _pieces(file, needles.longest))


def _in_table(data: bytes, needles: Needles) -> bool:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(pa.BufferReader(data)).read(use_threads=False)
    except pa.ArrowInvalid:
        return True
    for name in table.column_names:
        column = table.column(name)
        values = column.unique().to_pylist() if pa.types.is_string(column.type) else []
        if any(needles.found_in_text(value) for value in values if value):
            return True
    return needles.found_in_bytes(str(table.schema.metadata).encode())


def _in_archive(data: bytes, needles: Needles) -> bool:
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            return any(needles.found_in_bytes(archive.read(name)) for name in archive.namelist())
    except (zipfile.BadZipFile, ValueError, EOFError):
        return needles.found_in_bytes(data)


def _unpacked(data: bytes) -> Iterator[bytes]:
    """The bytes of one of Icechunk's own files, and what is compressed in them."""
    import pyarrow as pa

    yield data
    packed = data[_ICECHUNK_HEADER:]
    if packed.startswith(_ZSTD):
        yield pa.CompressedInputStream(pa.BufferReader(packed), "zstd").read()


def _pieces(file: Any, longest: int) -> Iterator[tuple[bytes, int, int]]:
    """A file in pieces that overlap, each with where a text has to begin so that all around it is in this piece."""
    data, start = file.read(_PIECE + 2 * longest), 0
    while piece := file.read(_PIECE):
        yield data, start, len(data) - longest
        data, start = data[-2 * longest :] + piece, longest
    yield data, start, len(data)


def _spellings(text: str) -> set[bytes]:
    """A text as UTF-8, and as it stands in JSON of plain ASCII."""
    return {text.encode("utf-8", "surrogatepass"), json.dumps(text)[1:-1].encode("ascii")}


def _word(text: str) -> str:
    return rf"(?<!\S){re.escape(text)}(?![^\s;,:.])"


def _covered(data: bytes, at: int, needle: bytes, kept: bytes) -> bool:
    """Whether the needle at this place is a part of a longer text that stays."""
    start = kept.find(needle)
    while start >= 0:
        begin = at - start
        if begin >= 0 and data.startswith(kept, begin):
            return True
        start = kept.find(needle, start + 1)
    return False
