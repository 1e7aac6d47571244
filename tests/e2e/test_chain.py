"""The whole chain with Prefect and Ray: ingest, train, sample, evaluate; and a demo whose second run redoes nothing."""

from __future__ import annotations

import csv
import json
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from flows.cli import main
from model.evaluation.headline import GROUPS
from model.video import ffmpeg_binary
from pipeline.corpus import make_corpus, read_combinations
from pipeline.corpus.grammar import attributes_of
from pipeline.runner import Runner
from storage.layout import Lake
from storage.verify import verify
from storage.version import list_versions, load, read_manifest

TINY = [
    f"--set={pair}"
    for pair in ("width=32", "depth=1", "heads=2", "batch=2", "steps=4", "checkpoint_every=2", "log_every=1")
]


@pytest.fixture(scope="module", autouse=True)
def servers() -> Iterator[None]:
    """One Prefect and one Ray for all runs of the module."""
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=60), Runner() as runner:
        runner.start()
        yield


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three drawn films in three containers, and their captions."""
    return make_corpus(tmp_path_factory.mktemp("chain") / "films", films=3).parent


@pytest.fixture
def vlfm(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, str]]:
    """Runs a command: exit status, stdout and stderr."""
    monkeypatch.setenv("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")

    def run(*arguments: object) -> tuple[int, str, str]:
        status = main([str(word) for word in arguments])
        return status, *capsys.readouterr()

    return run


Say = Callable[..., tuple[int, str, str]]


def video(path: Path) -> tuple[int, int, float, int]:
    """Width, height, frames per second and number of frames, as ffmpeg finds them."""
    command = [ffmpeg_binary(), "-i", str(path), "-fps_mode", "passthrough", "-f", "rawvideo", "-pix_fmt", "gray", "-"]
    run = subprocess.run(command, capture_output=True, check=True)
    told = re.search(r"Video: .*?, (\d+)x(\d+).*?, ([\d.]+) fps", run.stderr.decode())
    assert told is not None
    width, height = int(told[1]), int(told[2])
    return width, height, float(told[3]), len(run.stdout) // (width * height)


def test_films_become_a_report(vlfm: Say, films: Path, tmp_path: Path) -> None:
    lake, run, report = tmp_path / "lake", tmp_path / "run", tmp_path / "report"
    ingest = ["ingest", films, "--lake", lake, "--recipe", "linear"]
    ingest += ["--set", "size=[32,32]", "--set", "validation_fraction=0"]
    status, out, told = vlfm(*ingest)
    assert status == 0, out + told
    lines = out.splitlines()
    assert "films: 3 discovered = 3 done + 0 unchanged + 0 filtered + 0 failed" in lines
    assert "clips: 3 discovered = 3 done + 0 unchanged + 0 filtered + 0 failed" in lines
    assert lines[-1].startswith(f"version 1 of {lake} is published")
    assert re.search(r"ingest +3/3 clips", told), "progress was told to the end"
    assert verify(Lake.open(lake), load(Lake.open(lake))) == []

    assert vlfm("train", "--lake", lake, "--run", run, "--recipe", "demo", *TINY)[0] == 0
    steps = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in steps if "loss" in line] == [1, 2, 3, 4]

    with (films / "captions.csv").open(newline="") as table:
        captions = [row["caption"] for row in csv.DictReader(table)]
    status, out, _ = vlfm(
        "sample", "--run", run, "--prompt", captions[1], "--fps", 30, "--duration", 3, "--out", tmp_path / "film.mp4"
    )
    assert (status, out) == (0, f"{tmp_path / 'film.mp4'}  90 frames at 30 fps\n")
    assert video(tmp_path / "film.mp4") == (32, 32, 30.0, 90)

    status, out, _ = vlfm("evaluate", "--run", run, "--lake", lake, "--out", report)
    assert status == 0
    assert out.splitlines()[-1] == str(report / "report.html")
    metrics = json.loads((report / "metrics.json").read_text())
    assert metrics["train"]["clips"] == 3
    # The codec and the projection are good on the drawn films, whatever the model has learned in four steps.
    assert metrics["train"]["mean"]["film_ceiling"] > 30
    assert metrics["train"]["mean"]["film_lookup_held_out"] > 25
    page = (report / "report.html").read_text()
    assert all(caption in page for caption in captions)

    # The same films again: nothing is done, and no version is made.
    status, out, _ = vlfm(*ingest)
    assert status == 0
    assert out.splitlines()[-1] == f"nothing new: version 1 of {lake} is up to date"
    assert list_versions(Lake.open(lake)) == [1]


def test_the_second_demo_redoes_nothing(vlfm: Say, films: Path, tmp_path: Path) -> None:
    demo = ["demo", "--source", films, "--out", tmp_path, "--steps", "2"]
    status, out, told = vlfm(*demo)
    assert status == 0, out + told
    (base,) = tmp_path.glob("films-*")
    lines = out.strip().splitlines()
    assert lines[-1] == str((base / "report-1" / "report.html").resolve())
    assert Path(lines[-1]).is_file()
    titles = [line.strip() for line in lines if line.startswith("  ") and not line.startswith("   ")]
    assert titles == list(GROUPS)
    for stage in ("ingest", "train", "evaluate", "sample"):
        assert re.search(rf"^{stage} +(\d+)/\1 ", told, re.MULTILINE), f"{stage} told its progress to the end"
    films_made = sorted((base / "samples-1").glob("*.mp4"))
    assert len(films_made) == load(Lake.open(base / "lake")).counts["clips"]["done"]
    assert video(films_made[0]) == (64, 64, 24.0, 48)

    before = {path: path.stat().st_mtime_ns for path in base.rglob("*") if path.is_file() and ".lock" not in path.name}
    status, again, told = vlfm(*demo)
    assert status == 0
    assert again.strip().splitlines()[1:] == lines[1:], "the same figures"
    assert "nothing new: version 1" in told
    assert "2 steps are done already" in told
    assert not re.search(r"\d+/\d+ (clips|steps|videos)", told), told
    after = {path: path.stat().st_mtime_ns for path in base.rglob("*") if path.is_file() and ".lock" not in path.name}
    assert {path for path in after if path not in before} <= set((base / "lake" / "failures").glob("*"))
    assert {path: after[path] for path in before} == before


def test_real_films(vlfm: Say, real_films: Path, tmp_path: Path) -> None:
    status, out, told = vlfm("ingest", real_films, "--lake", tmp_path / "lake", "--limit", 2, "--set", "rate=8")
    assert status == 0, out + told
    assert "films: 2 discovered = 2 done + 0 unchanged + 0 filtered + 0 failed" in out
    lake = Lake.open(tmp_path / "lake")
    rows = read_manifest(lake, load(lake)).to_pylist()
    assert {row["film"] for row in rows} == {"armwrestling.mp4", "bigbuckbunny.mp4"}
    # 5 s and more of film give several windows, with all their frames at 8 a second.
    assert len(rows) >= 4
    assert all(14 <= row["frames"] <= 16 for row in rows)
    assert verify(lake, load(lake)) == []
    status, out, _ = vlfm("inspect", "--lake", lake.root)
    assert status == 0
    assert "Two people arm wrestle across a kitchen table." in out


def test_the_demo_ends_with_captions_that_no_film_had(
    vlfm: Say, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = {"captions": 3, "seeds": 1, "guidance": 2.0, "diverse": 2, "longest": 1}
    monkeypatch.setattr("flows.demo.UNSEEN", few)
    command = ["demo", "--out", tmp_path, "--limit", "4", "--steps", "2"]
    status, out, told = vlfm(*command)
    assert status == 0, out + told
    base = tmp_path / "corpus"
    assert len(read_combinations(base / "films" / "captions.csv")) == 4
    asked = sorted((base / "samples-1").glob("*.mp4"))
    assert len(asked) == 9
    captions = [path.stem.partition("-")[2].partition("-background")[0].replace("-", " ") for path in asked]
    assert all(attributes_of(f"{caption} background").held_out for caption in captions)
    assert video(asked[0])[:3] == (64, 64, 24.0)
    assert "| true films through the codec (ceiling) | 100 |" in out
    assert "Diversity, samples over data" in out
    status, again, told = vlfm(*command)
    assert (status, again.splitlines()[2:]) == (0, out.splitlines()[2:]), "nothing is done twice"
