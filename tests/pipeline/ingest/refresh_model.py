"""Random histories of a folder against a plain model of what the newest version must hold.

Everything is real but ffmpeg: a film is a small text file that says how many frames it has and which pictures, and the
functions that would read it with ffmpeg read that. `python -m tests.bench.refresh` runs hundreds of histories.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

import model.text.encoder
import pipeline.ingest.plan
from pipeline.ingest import ingest
from pipeline.ingest.block import DecodeStage
from pipeline.items import ClipWork
from pipeline.media.decode import Probe
from pipeline.recipes import linear
from storage.erase import erase
from storage.fingerprint import bytes_digest, short_id
from storage.layout import Lake
from storage.verify import verify
from storage.version import list_versions, load, read_manifest
from tests.pipeline.ingest.in_process import InProcess

RATE = 4
RECIPES = {
    "a": dataclasses.replace(linear(), size=(4, 4), duration=1.0, rate=4.0, observe="all", min_observed=2, order=4),
    "b": dataclasses.replace(linear(), size=(8, 8), duration=1.0, rate=4.0, observe="all", min_observed=2, order=4),
}
CAPTIONS = ("walks", "runs", "jumps")
NAMES = tuple(f"{letter}.mp4" for letter in "abcdef")
OPERATIONS = ("add", "add", "change", "rename", "rename", "delete", "twin", "caption", "touch")


@dataclass(frozen=True)
class Shown:
    """A film of the model."""

    content: int
    caption: str

    @property
    def clips(self) -> set[tuple[int, str, float]]:
        """Content, caption and start of its clips: contents have one or two windows of a second."""
        return {(self.content, self.caption, float(start)) for start in range(1 + self.content % 2)}


@dataclass
class Model:
    """What a dataset must hold."""

    source: dict[str, Shown] = field(default_factory=dict)
    films: dict[str, Shown] = field(default_factory=dict)
    """Films of the dataset by name, those that left the source among them."""
    held: dict[str, set[tuple[int, str, float]]] = field(default_factory=dict)
    """Clips of the newest version of each recipe."""
    named: dict[str, set[int]] = field(default_factory=dict)
    """Contents that each name has had in some version."""

    def ingest(self, recipe: str, prune: bool) -> None:
        """As the documents say it: what moved, what changed in place, what is gone."""
        films, source = dict(self.films), self.source
        new = sorted(name for name in source if name not in films or films[name].content != source[name].content)
        # Of twins the one whose place another film has now has moved, and those that are gone stay what they are.
        left = sorted((name for name in films if name not in source or name in new), key=lambda it: (it not in new, it))
        for same_caption in (True, False):
            for name in list(new):
                for old in left:
                    if films[old].content == source[name].content and (
                        not same_caption or films[old].caption == source[name].caption
                    ):
                        left.remove(old)
                        new.remove(name)
                        if old != name:
                            films.pop(old)
                        break
        gone = {name: film for name, film in films.items() if name not in source}
        if prune:
            gone = {}
        base = self.held.get(recipe, set())
        wanted = {clip for film in source.values() for clip in film.clips}
        self.held[recipe] = wanted | {clip for film in gone.values() for clip in film.clips if clip in base}
        # A film that is gone, and whose clips are another's, is no film of its own any more.
        owned = set(wanted)
        kept = {}
        for name, film in sorted(gone.items()):
            if not film.clips <= owned or not film.clips <= base:
                kept[name] = film
                owned |= film.clips & base
        self.films = {**kept, **source}
        for name, film in self.films.items():
            self.named.setdefault(name, set()).add(film.content)

    def erase(self, contents: set[int]) -> None:
        """They leave every version, with all films that have or had them; those that the source has come back."""
        self.films = {name: film for name, film in self.films.items() if film.content not in contents}
        self.held = {recipe: {clip for clip in clips if clip[0] not in contents} for recipe, clips in self.held.items()}
        self.named = {name: own - contents for name, own in self.named.items()}


class Disk:
    """The folder that the model's source is."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True)
        self.clock = 10**18

    def put(self, name: str, film: Shown) -> None:
        """Writes a film and its caption."""
        (self.folder / name).write_text(f"{film.content}\n")
        (self.folder / name).with_suffix(".txt").write_text(film.caption)
        self.touch(name)

    def touch(self, name: str) -> None:
        """Gives a file another time."""
        self.clock += 10**9
        os.utime(self.folder / name, ns=(self.clock, self.clock))

    def delete(self, name: str) -> None:
        """Removes a film and its caption."""
        (self.folder / name).unlink()
        (self.folder / name).with_suffix(".txt").unlink()


def probed(path: Path, *_: Any) -> Probe:
    """In place of pipeline.media.decode.probe."""
    frames = RATE * (1 + int(Path(path).read_text()) % 2)
    return Probe(np.arange(frames, dtype=np.int64), Fraction(1, RATE), 1 / RATE, np.zeros(0, np.int64), "none", 8, 8)


def decoded(stage: DecodeStage, works: Iterable[ClipWork]) -> Iterator[ClipWork]:
    """In place of DecodeStage.process: pictures by content and time."""
    for work in works:
        content = int(Path(work.plan.path).read_text())
        draw = np.random.default_rng([content, int(work.plan.window.start)])
        work.frames = draw.integers(0, 256, (len(work.plan.window.ticks), *stage.size, 3)).astype(np.uint8)
        yield work


@contextmanager
def without_ffmpeg() -> Iterator[None]:
    """Films are read as described above, and a text encoder is built once."""
    with (
        mock.patch.object(pipeline.ingest.plan, "probe", probed),
        mock.patch.object(DecodeStage, "process", decoded),
        mock.patch.object(model.text.encoder, "text_encoder_from_spec", _encoder()),
    ):
        yield


@functools.cache
def _encoder() -> Any:
    built = model.text.encoder.text_encoder_from_spec({"kind": "builtin"})
    return lambda spec: built


def run_history(seed: int, folder: Path, steps: int = 5) -> list[str]:
    """One random history: the differences between dataset and model, and other faults, a line each."""
    draw = random.Random(f"refresh/{seed}")
    disk, told, lake = Disk(folder / "films"), Model(), folder / "lake"
    recipe, done, newest = "a", [], 1
    numbers: dict[str, int] = {}
    for _ in range(steps):
        for _ in range(draw.randint(1, 3)):
            kind = draw.choice(OPERATIONS)
            there, free = sorted(told.source), [name for name in NAMES if name not in told.source]
            if kind in ("add", "twin") and free:
                name = draw.choice(free)
                twin = told.source[draw.choice(there)] if kind == "twin" and there else None
                # Contents come back: a film that left may be put there again.
                content = twin.content if twin else draw.randint(max(0, newest - 4), newest)
                newest = max(newest, content + 1)
                caption = twin.caption if twin and draw.random() < 0.5 else draw.choice(CAPTIONS)
                told.source[name] = Shown(content, caption)
                disk.put(name, told.source[name])
            elif kind == "rename" and there and free:
                old, name = draw.choice(there), draw.choice(free)
                told.source[name] = told.source.pop(old)
                (disk.folder / old).rename(disk.folder / name)
                (disk.folder / old).with_suffix(".txt").rename((disk.folder / name).with_suffix(".txt"))
            elif kind == "delete" and len(there) > 1:
                name = draw.choice(there)
                told.source.pop(name)
                disk.delete(name)
            elif kind in ("change", "caption") and there:
                name = draw.choice(there)
                film = told.source[name]
                changed = draw.randint(max(0, newest - 4), newest)
                newest = max(newest, changed + 1) if kind == "change" else newest
                told.source[name] = (
                    dataclasses.replace(film, content=changed)
                    if kind == "change"
                    else dataclasses.replace(film, caption=draw.choice(CAPTIONS))
                )
                if kind == "change":
                    disk.put(name, told.source[name])
                else:
                    (disk.folder / name).with_suffix(".txt").write_text(told.source[name].caption)
            elif kind == "touch" and there:
                name = draw.choice(there)
                disk.touch(name)
            else:
                continue
            done.append(f"{kind} {name}")
        if not told.source:
            continue
        recipe = draw.choice("aab") if draw.random() < 0.3 else recipe
        prune = draw.random() < 0.25
        done.append(f"ingest {recipe}{' --prune' * prune}")
        told.ingest(recipe, prune)
        report = ingest(disk.folder, lake, recipe=RECIPES[recipe], runner=InProcess(), prune=prune)
        faults = _faults(lake, told, recipe, numbers)
        if not faults and draw.random() < 0.3:
            again = ingest(disk.folder, lake, recipe=RECIPES[recipe], runner=InProcess())
            if again.published or again.clips.done:
                faults.append("a second run was not without work")
        if report.exit_status:
            faults.append(f"exit status {report.exit_status}")
        if not faults and draw.random() < 0.25:
            film = told.films[name := draw.choice(sorted(told.films))]
            # By its name all that ever had it, else what it is now; which of two twins has left is nobody's business.
            by_name = name in told.source and draw.random() < 0.5
            asked, contents = (name, told.named[name]) if by_name else (_id_of(film.content), {film.content})
            done.append(f"erase {asked}")
            told.erase(set(contents))
            faults += _erased(lake, asked, contents) + _faults(lake, told, recipe, numbers)
        if faults:
            return [f"seed {seed}: {', '.join(done)}: {fault}" for fault in faults]
    opened = Lake.open(lake) if done and lake.exists() else None
    problems = verify(opened, load(opened)) if opened is not None else []
    return [f"seed {seed}: {problem}" for problem in problems]


def _id_of(content: int) -> str:
    """A film's id is a hash of its file, which is its content's number."""
    return short_id(bytes_digest(f"{content}\n".encode()))


def _erased(lake: Path, asked: str, contents: set[int]) -> list[str]:
    """Erase a film: what is left of its contents in any version, or found by the erasure's own search."""
    opened = Lake.open(lake)
    with opened.writing():
        report = erase(opened, asked)
    faults = [f"the erasure found {key}" for key in report.searched.found]
    ids = {_id_of(content) for content in contents}
    for number in list_versions(opened):
        for table in ("clips", "films"):
            rows = read_manifest(opened, load(opened, number), table).to_pylist()
            faults += [f"version {number} has {row['film']}" for row in rows if row["film_id"] in ids]
    return faults


def _faults(lake: Path, told: Model, recipe: str, numbers: dict[str, int]) -> list[str]:
    opened = Lake.open(lake)
    version = load(opened)
    clips = read_manifest(opened, version, "clips").to_pylist()
    films = read_manifest(opened, version, "films").to_pylist()
    for film in told.source.values():
        numbers[_id_of(film.content)] = film.content
    found = [(numbers[row["film_id"]], row["caption"], row["clip_start"]) for row in clips]
    faults = []
    if len(set(found)) != len(found):
        faults.append("a clip is there twice")
    expected = told.held[recipe]
    if set(found) != expected:
        faults.append(f"holds also {sorted(set(found) - expected)}, lacks {sorted(expected - set(found))}")
    # Which of two twins left, where one moved, is nobody's business.
    listed = sorted((row["film"] in told.source, numbers[row["film_id"]], row["caption"]) for row in films)
    wanted = sorted((name in told.source, film.content, film.caption) for name, film in told.films.items())
    if listed != wanted or not {row["film"] for row in films} >= told.source.keys() & told.films.keys():
        faults.append(f"films {listed}, not {wanted}")
    counted = {row["film"]: row["clips"] for row in films if row["clips"]}
    owned: dict[str, int] = {}
    for row in clips:
        owned[row["film"]] = owned.get(row["film"], 0) + 1
    if owned != counted:
        faults.append(f"clips by film {owned}, the film table says {counted}")
    return faults
