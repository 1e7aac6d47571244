"""Bad input through the whole ingest on a real Ray: each fault is one clear line, and everything good is published."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.ingest import IngestReport, ingest
from pipeline.media.decode import ffmpeg_binary
from pipeline.recipes import linear
from pipeline.runner import Runner
from pipeline.sources.folders import SourceError
from storage.failures import read_failures
from storage.layout import DiskFull, Lake
from storage.verify import verify
from storage.version import latest, load, read_manifest

RECIPE = dataclasses.replace(linear(), size=(16, 16), duration=1.0, rate=8.0, block_clips=2)


@pytest.fixture(scope="module")
def runner() -> Iterator[Runner]:
    """One Ray for the module; it starts at the first block that is to be made."""
    with Runner() as runner:
        yield runner


def ffmpeg(*arguments: str) -> None:
    subprocess.run([ffmpeg_binary(), "-v", "error", "-nostdin", "-y", *arguments], check=True)


def make_film(path: Path, seconds: float = 2.5) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = f"testsrc2=size=64x48:rate=24:duration={seconds}"
    ffmpeg("-f", "lavfi", "-i", picture, "-c:v", "libx264", "-preset", "ultrafast", "-movflags", "faststart", str(path))
    return path


# --- what is no film's fault: one line, and nothing is made ---


def test_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "films").mkdir()
    with pytest.raises(SourceError, match=r"^no films in .*films; put films there \(.*\) or name another source$"):
        ingest(tmp_path / "films", tmp_path / "lake", recipe=RECIPE)
    assert not (tmp_path / "lake").exists()


def test_missing_captions_file(tmp_path: Path) -> None:
    make_film(tmp_path / "films" / "a.mp4")
    with pytest.raises(SourceError, match=r"^captions file .*words.csv does not exist; give a .* with file,caption$"):
        ingest(tmp_path / "films", tmp_path / "lake", tmp_path / "words.csv", recipe=RECIPE)
    assert not (tmp_path / "lake").exists()


# --- what is a film's fault: a row, while the good film beside it is published ---

FAULTS = {
    "gone.mp4": ("failed", "film_missing"),
    "silent.mp4": ("failed", "no_caption"),
    "zero.mp4": ("failed", "empty_file"),
    "text.mp4": ("failed", "not_a_video"),
    "cut.mp4": ("failed", "truncated"),
    "cut_index.mp4": ("failed", "truncated"),
    "sound.mp4": ("failed", "no_video_stream"),
    "playlist.mp4": ("failed", "not_a_video"),
    "short.mp4": ("filtered", "shorter_than_window"),
}


@pytest.fixture(scope="module")
def messy(tmp_path_factory: pytest.TempPathFactory, runner: Runner) -> tuple[Path, IngestReport]:
    """The lake and the report of a folder with one good film and every kind of bad one."""
    folder = tmp_path_factory.mktemp("messy") / "films"
    good = make_film(folder / "good.mp4")
    data = good.read_bytes()
    shutil.copy(good, folder / "silent.mp4")
    (folder / "zero.mp4").touch()
    (folder / "text.mp4").write_text("these are words\n" * 50)
    (folder / "cut.mp4").write_bytes(data[: len(data) * 2 // 3])
    ffmpeg("-i", str(good), "-c", "copy", str(folder / "cut_index.mp4"))
    (folder / "cut_index.mp4").write_bytes((folder / "cut_index.mp4").read_bytes()[: len(data) * 2 // 3])
    ffmpeg("-f", "lavfi", "-i", "sine=duration=3", str(folder / "sound.mp4"))
    (folder / "playlist.mp4").write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:3\n#EXTINF:2.5,\n{good}\n#EXT-X-ENDLIST\n")
    make_film(folder / "short.mp4", seconds=0.5)
    lines = [f"{name},a picture called {name}" for name in [*FAULTS, "good.mp4"] if name != "silent.mp4"]
    (folder / "captions.csv").write_text("\n".join(["file,caption", *lines]) + "\n")
    lake = folder.parent / "lake"
    return lake, ingest(folder, lake, recipe=RECIPE, runner=runner)


@pytest.mark.parametrize("film", FAULTS)
def test_a_bad_film_is_one_row(messy: tuple[Path, IngestReport], film: str) -> None:
    lake, report = messy
    rows = [row for row in read_failures(Lake.open(lake), report.run_id) if row["film"] == film]
    assert [(row["status"], row["reason"]) for row in rows] == [FAULTS[film]]
    detail = rows[0]["detail"]
    assert "\n" not in detail
    assert "Traceback" not in detail
    assert ";" in detail, "the line says the remedy"
    if FAULTS[film][0] == "failed":
        assert [line for line in report.lines() if line.strip().startswith(f"{film}: {FAULTS[film][1]}: ")]


def test_the_good_film_beside_them_is_published(messy: tuple[Path, IngestReport]) -> None:
    lake, report = messy
    assert report.published
    assert report.exit_status == 3, "more films failed than the recipe tolerates"
    assert report.films.line() == (
        "films: 10 discovered = 1 done + 0 unchanged + 1 filtered (shorter_than_window 1) + 8 failed (empty_file 1, "
        "film_missing 1, no_caption 1, no_video_stream 1, not_a_video 2, truncated 2)"
    )
    assert report.clips.line() == "clips: 2 discovered = 2 done + 0 unchanged + 0 filtered + 0 failed"
    opened = Lake.open(lake)
    version = load(opened)
    assert verify(opened, version) == []
    assert {row["film"] for row in read_manifest(opened, version).to_pylist()} == {"good.mp4"}
    assert version.counts["films"]["failed"]["truncated"] == 2


# --- interruptions ---


def test_a_killed_run_goes_on(tmp_path: Path, runner: Runner) -> None:
    """kill -9 in the middle; the second run keeps every finished block and publishes all of it."""
    for number in range(4):
        make_film(tmp_path / "films" / f"{number}.mp4", seconds=4).with_suffix(".txt").write_text(f"film {number}")
        # Different sounds make the films different to their fingerprints.
        with open(tmp_path / "films" / f"{number}.mp4", "ab") as file:
            file.write(b"\0\0\0\x0cfree" + f"{number:04d}".encode())
    lake = tmp_path / "lake"
    settings = {name: getattr(RECIPE, name) for name in ("size", "duration", "rate", "block_clips")}
    program = (
        "import dataclasses\nfrom pipeline.ingest import ingest\nfrom pipeline.recipes import linear\n"
        f"recipe = dataclasses.replace(linear(), **{settings!r})\n"
        f"ingest({str(tmp_path / 'films')!r}, {str(lake)!r}, recipe=recipe)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], cwd=Path(__file__).parents[2]) as process:
        staged: list[Path] = []
        while not staged and process.poll() is None:
            time.sleep(0.005)
            staged = list((lake / "staging").glob("*.npz"))
        process.send_signal(signal.SIGKILL)
    assert latest(Lake.open(lake)) is None, "it was killed before it could publish"
    time.sleep(1)  # what was being written ends or dies with its worker
    kept = {path.name: path.stat().st_mtime_ns for path in (lake / "staging").glob("*.npz")}
    assert 1 <= len(kept) < 8
    heard: list[str] = []
    report = ingest(tmp_path / "films", lake, recipe=RECIPE, runner=runner, say=heard.append)
    assert f"{len(kept)} blocks are finished from an interrupted run and are kept" in heard
    assert report.clips.line() == "clips: 16 discovered = 16 done + 0 unchanged + 0 filtered + 0 failed"
    version = load(Lake.open(lake))
    assert len(version.shards) == 8
    assert verify(Lake.open(lake), version) == []


def test_a_full_disk(tmp_path: Path, runner: Runner) -> None:
    """A real file system of 300 kB: one line, what is finished stays, and with more room the run goes on."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(disk)], capture_output=True)
    if os.geteuid() != 0 or mounted.returncode != 0:
        pytest.skip("no right to mount a small file system")
    try:
        for number in range(3):
            film = make_film(tmp_path / "films" / f"{number}.mp4", seconds=4 + number)
            film.with_suffix(".txt").write_text("a film")
        with pytest.raises(DiskFull, match=r"the disk is full .*make room and run the same command again"):
            ingest(tmp_path / "films", disk / "lake", recipe=RECIPE, runner=runner)
        finished = len(list((disk / "lake" / "staging").glob("*.npz")))
        subprocess.run(["mount", "-o", "remount,size=50m", str(disk)], check=True)
        heard: list[str] = []
        report = ingest(tmp_path / "films", disk / "lake", recipe=RECIPE, runner=runner, say=heard.append)
        assert finished >= 1
        assert f"{finished} blocks are finished from an interrupted run and are kept" in heard
        assert report.clips.done == 15
        assert verify(Lake.open(disk / "lake"), load(Lake.open(disk / "lake"))) == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)
