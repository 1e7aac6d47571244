"""A folder of drawn films with their captions: films are kept from run to run, and one that is missing is drawn."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from model.ffmpeg import Ffmpeg, environment, last_words
from storage.fingerprint import file_digest
from storage.layout import write_atomic

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Drawing:
    """How a film is drawn."""

    key: str
    """A fingerprint of all that the film depends on; a film made under another key is drawn anew."""
    draw: Callable[[Path], None]
    """Writes the film to a path of the film's suffix. Raises OSError where it cannot."""


def make_films(
    folder: Path,
    drawings: Mapping[str, Drawing],
    header: Sequence[str],
    rows: Sequence[Sequence[object]],
    progress: Progress | None = None,
) -> Path:
    """Draws the films (file name -> drawing) and writes `captions.csv` beside them; returns its path.

    Films that an earlier run made under the same keys and nobody changed are kept, so an interrupted run goes on where
    it stopped; other films of earlier runs are removed. `progress(done, total, file)` is called after each film.

    Raises:
        OSError: a film could not be made; the message names it.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    record = folder / ".corpus.json"
    made = _made_before(record)
    for file in made.keys() - drawings.keys():  # of an earlier, other corpus; without a caption they would fail later
        (folder / file).unlink(missing_ok=True)
    made = {file: entry for file, entry in made.items() if file in drawings}
    missing = [file for file, drawing in drawings.items() if not _is_made(folder / file, drawing.key, made)]
    with ThreadPoolExecutor(max_workers=min(2, os.cpu_count() or 1)) as pool:
        running = {pool.submit(_draw_film, folder / file, drawings[file]): file for file in missing}
        try:
            for done, drawn in enumerate(as_completed(running), start=len(drawings) - len(missing) + 1):
                file = running[drawn]
                made[file] = {"plan": drawings[file].key, "sha256": drawn.result()}
                write_atomic(record, json.dumps(made, indent=1, sort_keys=True).encode())
                if progress is not None:
                    progress(done, len(drawings), file)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    captions = folder / "captions.csv"
    if not captions.is_file() or captions.read_bytes() != table.getvalue().encode():
        write_atomic(captions, table.getvalue().encode())
    return captions


def run_ffmpeg(ffmpeg: Ffmpeg, command: Sequence[str], frames: bytes | None = None) -> None:
    """Runs a command, with raw frames on its standard input. Raises OSError with ffmpeg's message if it fails."""
    run = subprocess.run(command, input=frames, capture_output=True, timeout=300, env=environment())
    if run.returncode != 0 or not Path(command[-1]).is_file():
        raise OSError(f"{ffmpeg}: {last_words(run.returncode, run.stderr.decode('utf-8', 'replace'))}")


def _draw_film(film: Path, drawing: Drawing) -> str:
    """Draws one film under a temporary name and renames it; returns the sha256 of its bytes."""
    unfinished = film.with_name(f".unfinished-{film.name}")
    try:
        drawing.draw(unfinished)
        os.replace(unfinished, film)
    except OSError as error:
        raise OSError(f"could not draw {film.name} in {film.parent}: {error}") from error
    finally:
        unfinished.unlink(missing_ok=True)
    return file_digest(film)


def _made_before(record: Path) -> dict[str, dict[str, str]]:
    """What earlier runs left: film -> its plan's fingerprint and its bytes' sha256."""
    try:
        return dict(json.loads(record.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


def _is_made(path: Path, key: str, made: Mapping[str, Mapping[str, str]]) -> bool:
    entry = made.get(path.name, {})
    return entry.get("plan") == key and path.is_file() and entry.get("sha256") == file_digest(path)
