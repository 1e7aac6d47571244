"""Buckets as sources: the films below a prefix, and their captions. Films are not fetched here."""

from __future__ import annotations

import contextlib
import io
import posixpath
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from pipeline.rows import printable
from pipeline.sources.entries import CAPTION_BYTES, Discovery, Source, Stat, caption_text
from pipeline.sources.fetch import as_file, bucket_and_key, stamp_of
from pipeline.sources.tables import TABLE_SUFFIXES
from storage.s3 import S3Store

_AT_ONCE = 16  # captions beside their films that are read at the same time


class Bucket(Source):
    """The films below a prefix of a bucket: `url` is `s3://bucket/prefix`, without a slash at its end."""

    def __init__(self, url: str, captions_required: bool, origin: str | None = None, latents: bool = False) -> None:
        super().__init__(PurePosixPath(url).name, printable(origin or url), captions_required, latents)
        self.url = url
        store, prefix = bucket_and_key(url)
        self._store = S3Store(store.bucket, prefix, store.endpoint)

    @cached_property
    def objects(self) -> dict[str, Mapping[str, Any]]:
        """Everything below the prefix by its name there. Raises BucketError where the bucket cannot be used."""
        self._store.check_bucket()
        return {name: each for name, each in self._store.objects().items() if name and not name.endswith("/")}

    def stat(self, name: str) -> Stat:
        """What tells an object from the one that was there before."""
        return Stat(int(self.objects[name]["Size"]), stamp_of(self.objects[name]["ETag"]))

    def films(self, found: Discovery) -> dict[str, Stat]:
        others: Counter[str] = Counter()
        films = {}
        for name in sorted(self.objects):
            if any(part.startswith(".") and part not in (".", "..") for part in name.split("/")):
                continue
            suffix = PurePosixPath(name).suffix.lower()
            if self.is_film(name):
                films[name] = self.stat(name)
            elif suffix not in (*TABLE_SUFFIXES, ".txt", ".tar"):
                others[suffix or "no suffix"] += 1
        if said := ", ".join(f"{printable(suffix)} {count}" for suffix, count in sorted(others.items())):
            found.notes.append(f"left out of {printable(self.url)}, no {self.kind} by their names: {said}")
        return films

    def look(self, file: str) -> Stat | None:
        name = file if file in self.objects else posixpath.normpath(file)
        return self.stat(name) if name in self.objects else None

    def tars(self) -> list[str]:
        """Names of the tars below the prefix."""
        return sorted(name for name in self.objects if name.lower().endswith(".tar"))

    def address(self, file: str) -> str:
        return f"{self.url}/{file if file in self.objects else posixpath.normpath(file)}"

    def fault(self, file: str) -> tuple[str, str] | None:
        outside = file not in self.objects and posixpath.normpath(file).startswith(("../", "/"))
        return ("outside_source", "it leads out of its source; correct the table") if outside else None

    @contextlib.contextmanager
    def own_table(self) -> Iterator[Path | None]:
        with contextlib.ExitStack() as stack:
            there = "captions.csv" in self.objects
            yield stack.enter_context(self.file("captions.csv")) if there else None

    def file(self, name: str) -> contextlib.AbstractContextManager[Path]:
        """An object as a file of this machine, while the block lasts."""
        return as_file(f"{self.url}/{name}", *self.stat(name))

    def sidecar(self, film: str) -> str:
        return self._sidecars.get(_beside(film), "")

    @cached_property
    def _sidecars(self) -> dict[str, str]:
        names = [beside for name in self.objects if self.is_film(name) and (beside := _beside(name)) in self.objects]
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            return dict(zip(names, pool.map(self._caption, names), strict=True))

    def _caption(self, name: str) -> str:
        about = self.objects[name]
        if int(about["Size"]) > 16 * CAPTION_BYTES:
            return ""

        def fetch() -> bytes:
            file = io.BytesIO()
            self._store.download(name, file, about["ETag"])
            return file.getvalue()

        cache = self._store.cache()
        try:
            # Kept by what it is: a caption that has not changed is not fetched again.
            return caption_text(fetch() if cache is None else cache.get(self._stamp(name), fetch))
        except FileNotFoundError:
            return ""  # it went away since

    def _stamp(self, name: str) -> str:
        return f"caption-{stamp_of(f'{self.url}/{name}'):x}-{self.stat(name).modified_ns:x}"


def _beside(film: str) -> str:
    return f"{film.removesuffix(PurePosixPath(film).suffix)}.txt"
