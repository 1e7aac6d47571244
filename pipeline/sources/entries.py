"""What a source gives, films with their captions or the reason why one cannot be used, and what every source can do."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from pipeline.items import Failure
from pipeline.rows import place, printable, unusable
from pipeline.sources.tables import BAD_NAME, Row

FILM_SUFFIXES = frozenset(
    {".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts"}
    | {".m2ts", ".mts", ".vob", ".flv", ".f4v", ".ogv", ".ogg", ".wmv", ".asf", ".3gp", ".3g2", ".gif"}
)
"""A film by its name. Files of a folder with other names are counted in a line, never left out in silence."""
LATENT_SUFFIXES = frozenset({".safetensors"})
"""A file of latents by its name, which stands for a film where latents are imported (pipeline.media.latents)."""
CAPTION_BYTES = 2**16
"""Most bytes of a caption beside its film that are read."""


@dataclass(frozen=True)
class FilmEntry:
    """A film, or a part of one, with its caption."""

    film: str
    """The path relative to its source, with `#start-end` for a part."""
    path: str
    """Where it is: an absolute path, its source without links; `s3://bucket/key`; either one with `!/member` for a
    film in a tar. `pipeline.sources.fetch` makes a file of it."""
    caption: str
    """As given; empty where there is none and none is required."""
    bytes: int
    """Size of the film."""
    modified_ns: int
    """Time of the file's last change, nanoseconds since 1970; of an object a number made of its ETag."""
    start: float = 0.0
    """Where the part begins, seconds from the film's first frame."""
    end: float | None = None
    """Where it ends; None for the film's end."""
    source: str = ""
    """Name of the folder that is its source, or that holds the table."""
    origin: str = ""
    """Address of its source: the absolute path of the folder or the table, or its URL."""
    latents: bool = False
    """Whether it is a file of latents."""

    @cached_property
    def place(self) -> str:
        """What tells it from all other films."""
        return place(self.path, self.film)


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
    latents: bool = False
    """Whether files of latents were looked for, and no films."""

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


class Stat(NamedTuple):
    """What tells a film from the one that was there before."""

    bytes: int
    modified_ns: int


def failure(film: str, reason: str, detail: str, path: str = "", source: str = "", origin: str = "") -> Failure:
    """A film that cannot be used, found without opening it."""
    return Failure(film, "source", reason, detail, path=path, source=source, origin=origin)


class Source:
    """A place that holds films: a folder, a bucket or a tar.

    Args:
        name: its last name.
        origin: its address, printable.
        captions_required: whether a film without a caption fails.
        latents: whether its films are files of latents.
    """

    def __init__(self, name: str, origin: str, captions_required: bool, latents: bool = False) -> None:
        self.name, self.origin, self.captions_required, self.latents = name, origin, captions_required, latents

    @property
    def kind(self) -> str:
        """What it holds, in a word."""
        return "latents" if self.latents else "films"

    @property
    def suffixes(self) -> frozenset[str]:
        """How the names of its films end, in small letters."""
        return LATENT_SUFFIXES if self.latents else FILM_SUFFIXES

    def is_film(self, name: str) -> bool:
        """Whether a file is a film by its name."""
        return is_film(name, self.latents)

    def films(self, found: Discovery) -> dict[str, Stat]:
        """The films by their names relative to the source, in order; what is left out is said in `found`."""
        raise NotImplementedError

    def address(self, file: str) -> str:
        """FilmEntry's `path` of a file that a table or the source names."""
        raise NotImplementedError

    def fault(self, file: str) -> tuple[str, str] | None:
        """Why a file is not read, as reason and detail."""
        return None

    def look(self, file: str) -> Stat | None:
        """What is known of a file that a table names; None where it is not there."""
        raise NotImplementedError

    @contextlib.contextmanager
    def own_table(self) -> Iterator[Path | None]:
        """The source's captions.csv as a file, where it has one."""
        yield None

    def sidecar(self, film: str) -> str:
        """The caption that lies beside a film."""
        raise NotImplementedError

    def add(self, found: Discovery, row: Row, stat: Stat) -> None:
        """An entry for a row whose film is there, or its failure."""
        fault = row.fault
        if unusable(row.file):
            fault = BAD_NAME, "its name is not UTF-8; rename the file"
        else:
            fault = self.fault(row.file) or fault
        if fault is not None:
            self.fail(found, row, *fault)
            return
        where = (self.name, self.origin)
        part = (row.start, row.end)
        entry = FilmEntry(row.film, self.address(row.file), row.caption, *stat, *part, *where, latents=self.latents)
        found.entries.append(entry)

    def fail(self, found: Discovery, row: Row, reason: str, detail: str) -> None:
        """A failure of a row's film."""
        path = printable(self.address(row.file))
        found.failures.append(failure(printable(row.film), reason, detail, path, self.name, self.origin))

    def missing(self, found: Discovery, row: Row, where: str) -> None:
        """The failure of a row whose film is not there."""
        detail = f"{where} names {row.file}, which is not there; add the film or remove the line"
        self.fail(found, row, "film_missing", detail)


def caption_text(data: bytes) -> str:
    """The caption in a text file: one line, of UTF-8."""
    return " ".join(data[:CAPTION_BYTES].decode("utf-8-sig", errors="replace").split())


def is_film(name: str, latents: bool = False) -> bool:
    """Whether a file is a film by its name, or one of latents."""
    return os.path.splitext(name)[1].lower() in (LATENT_SUFFIXES if latents else FILM_SUFFIXES)
