"""The command line: help that answers at once, and every slip as one line on stderr with exit status 1."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from flows.cli import COMMANDS, main
from pipeline.ingest.provenance import provenance
from pipeline.recipes import linear
from storage.layout import Lake
from storage.version import load, read_manifest, write_table_again
from tests.model.tiny_lake import make_lake
from tests.storage.film_lake import RECIPE, Film, publish
from tests.storage.sample_lake import publish_clips

ROOT = Path(__file__).parents[2]
OPTIONS = {
    "ingest": [
        "SOURCE",
        "--lake",
        "--captions",
        "--recipe",
        "--set",
        "--limit",
        "--plan",
        "--ray-address",
        "--workers",
        "--send-code",
        "--json",
        "--column",
    ],
    "train": ["--lake", "--run", "--recipe", "--version", "--set", "--processes", "75"],
    "sample": ["--run", "--prompt", "--start", "--image", "--fps", "--duration", "--out", "--seed", "--guidance"],
    "interpolate": ["FILM", "--fps", "--out", "--start", "--duration", "--size", "--codec", "--method", "--json"],
    "evaluate": ["--run", "--lake", "--out", "--seed", "--json"],
    "inspect": ["CLIP", "--lake", "--version", "--versions", "--diff", "--recipe", "--set", "--json"],
    "verify": ["--lake", "--version", "--json"],
    "doctor": ["--lake", "--film", "--recipe", "--set", "--ray-address", "--quick", "--json"],
    "repair": ["--lake", "--give-up", "--json"],
    "gc": ["--lake", "--keep", "--yes", "--delete", "--staged", "--json"],
    "erase": ["FILM", "--lake", "--plan", "--json"],
    "experiment": ["NAME"],
    "demo": ["--source", "--captions", "--out", "--limit", "--steps"],
}
Say = Callable[..., tuple[int, str, str]]


@pytest.fixture
def vlfm(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Say:
    """Runs a command in this process, in an empty folder: exit status, stdout and stderr."""
    # main() sets these where they are unset; the other tests get them back as they were.
    for name in ("PREFECT_SERVER_ANALYTICS_ENABLED", "DO_NOT_TRACK", "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL"):
        monkeypatch.setenv(name, "CRITICAL" if name.endswith("LEVEL") else "false")
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> tuple[int, str, str]:
        status = main([str(word) for word in arguments])
        told = capsys.readouterr()
        return status, told.out, told.err

    return run


def program(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs the program as a person would."""
    code = "import sys; from flows.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, *arguments]
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "HOME": str(folder), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


def one_line(told: str) -> str:
    assert told.startswith("error: "), told
    assert told.count("\n") == 1, told
    assert told.endswith("\n")
    return told


# --- help ---


def test_help_answers_without_the_heavy_libraries() -> None:
    code = (
        "import sys\nfrom flows.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit as end: assert end.code == 0\n"
        "heavy = {'torch', 'ray', 'prefect', 'zarr', 'diffusers', 'transformers', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    for name, (summary, _) in COMMANDS.items():
        assert name in run.stdout
        assert summary in " ".join(run.stdout.split())
    assert "vlfm demo" in run.stdout
    assert "75 a training was asked to stop" in run.stdout


def test_every_command_is_tested_here() -> None:
    assert set(OPTIONS) == set(COMMANDS)


@pytest.mark.parametrize("command", OPTIONS)
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: vlfm {command} ")
    for option in OPTIONS[command]:
        assert option in text, option
    sub = argparse.ArgumentParser()
    COMMANDS[command][1](sub)
    assert all(action.help for action in sub._actions), "every option has words of its own"
    assert COMMANDS[command][0] in text.lower() or COMMANDS[command][0][1:] in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [([], "COMMAND"), (["fly"], "invalid choice: 'fly'"), (["verify"], "--lake"), (["train", "--lake", "x"], "--run")],
)
def test_wrong_usage_shows_usage(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    told = capsys.readouterr().err
    assert told.startswith("usage: vlfm")
    assert words in told


# --- slips, as a person meets them ---


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ingest", "nowhere", "--lake", "lake"], "nowhere"),
        (["verify", "--lake", "nowhere"], "vlfm ingest"),
        (["demo", "--source", "nowhere", "--out", "out"], "nowhere"),
    ],
)
def test_the_program_ends_with_one_line_and_status_1(arguments: list[str], message: str, tmp_path: Path) -> None:
    run = program(*arguments, folder=tmp_path)
    assert run.returncode == 1
    assert message in one_line(run.stderr)
    assert run.stdout == ""
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith(".")] == [], "nothing was made"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ingest", "films", "--lake", "lake"], "no films in films"),
        (
            ["ingest", "films", "--lake", "lake", "--recipe", "magic"],
            "recipe 'magic' is unknown; the recipes are: combinations, demo",
        ),
        (["ingest", "films", "--lake", "lake", "--set", "rat=8"], "setting 'rat' is unknown; the fields are: below_ga"),
        (["ingest", "films", "--lake", "lake", "--set", "rate=fast"], "setting 'rate' takes float, like 16.0"),
        (["ingest", "films", "--lake", "lake", "--set", "rate"], "--set takes key=value; it was given 'rate'"),
        (["ingest", "films", "--lake", "lake", "--set", "rate=-1"], "rate = -1.0 cannot be"),
        (["ingest", "films", "--lake", "lake", "--limit", "0"], "--limit is 0; it must be at least 1"),
        (["ingest", "films", "--lake", "lake", "--captions", "no.csv"], "captions file no.csv does not exist"),
        (["train", "--lake", "nowhere", "--run", "run"], "vlfm ingest"),
        (["train", "--lake", "{lake}", "--run", "run", "--recipe", "magic"], "recipe 'magic' is unknown"),
        (["train", "--lake", "{lake}", "--run", "run", "--set", "speed=9"], "setting 'speed' is unknown"),
        (["train", "--lake", "{lake}", "--run", "run", "--version", "9"], "has no version 9; there are: 1"),
        (["train", "--lake", "{lake}", "--run", "run", "--set", "patch=0", "--recipe", "demo"], "patch is 0"),
        (["sample", "--run", "no", "--prompt", "a", "--out", "a.gif"], "no is no training run; make one with `vlfm"),
        (["sample", "--run", "no", "--prompt", "a", "--out", "a.doc"], "a.doc: cannot write .doc; use .mp4"),
        (["interpolate", "no.mp4", "--fps", "24", "--out", "a.mp4"], "film_missing: no.mp4 is not there"),
        (["interpolate", "films", "--fps", "24", "--out", "a.mp4"], "unreadable: films is no regular file"),
        (["interpolate", "no.mp4", "--fps", "24", "--out", "a.avi"], "a.avi: cannot write .avi; use .mp4"),
        (
            ["interpolate", "a", "--fps", "9", "--out", "a.gif", "--codec", "x"],
            "codec 'x' is neither 'pixels', a folder",
        ),
        (["interpolate", "a", "--fps", "0", "--out", "a.gif"], "fps is 0; it must be above 0 and at most 1000"),
        (["experiment", "alchemy"], "experiment 'alchemy' is unknown; the experiments are: codec, combinations, drift"),
        (["evaluate", "--run", "no", "--lake", "{lake}", "--out", "o"], "no is no training run"),
        (["inspect", "--lake", "films"], "vlfm ingest"),
        (["inspect", "--lake", "{lake}", "--version", "5"], "has no version 5; there are: 1"),
        (["inspect", "ffff", "--lake", "{lake}"], "version 1 has no clip ffff; `vlfm inspect` lists its films"),
        (["verify", "--lake", "{empty}"], "has no version yet; make one with: vlfm ingest"),
        (["demo", "--source", "films", "--limit", "0"], "--limit is 0; it must be at least 1"),
        (["demo", "--source", "films", "--steps", "0"], "--steps is 0; it must be at least 1"),
        (["demo", "--source", "films"], "no films in films"),
        (["demo", "--source", "films", "--captions", "no.csv"], "captions file no.csv does not exist"),
    ],
)
def test_slips_are_one_line(vlfm: Say, small: Lake, tmp_path: Path, arguments: list[str], message: str) -> None:
    (tmp_path / "films").mkdir()
    empty = Lake.create(tmp_path / "empty").root
    before = set(tmp_path.rglob("*"))
    status, out, told = vlfm(*[word.format(lake=small.root, empty=empty) for word in arguments])
    assert status == 1
    assert message in one_line(told)
    assert out == ""
    made = {path.name for path in tmp_path.rglob("*")} - {path.name for path in before}
    assert made <= {"run", "run.json"}, made


def test_a_fault_of_the_program_is_no_slip(vlfm: Say, monkeypatch: pytest.MonkeyPatch, small: Lake) -> None:
    """What nobody foresaw keeps its traceback; Ctrl-C does not need one."""

    def fails(*_: object) -> None:
        raise error

    monkeypatch.setattr("storage.version.load", fails)
    error: BaseException = KeyError("lost")
    with pytest.raises(KeyError):
        vlfm("inspect", "--lake", small.root)
    error = KeyboardInterrupt()
    status, _, told = vlfm("inspect", "--lake", small.root)
    assert status == 130
    assert told == "\ninterrupted; everything finished is kept, the same command goes on from there\n"


# --- commands on a lake ---


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Lake:
    """A lake without films' tables, which can be trained on."""
    return make_lake(tmp_path_factory.mktemp("cli") / "lake", clips=2)


@pytest.fixture
def whole(tmp_path: Path) -> Lake:
    """A lake with arrays, shards and tables."""
    lake = Lake.create(tmp_path / "whole")
    publish_clips(lake, range(6))
    return lake


def test_train_sample_and_evaluate_go_together(vlfm: Say, small: Lake, tmp_path: Path) -> None:
    tiny = [f"--set={pair}" for pair in ("width=32", "depth=1", "heads=2", "batch=2", "steps=2", "checkpoint_every=2")]
    status, out, _ = vlfm("train", "--lake", small.root, "--run", "run", "--recipe", "demo", *tiny)
    assert (status, out) == (0, "checkpoint: run/checkpoints/step-00000002\n")
    assert vlfm("sample", "--run", "run", "--prompt", "a square", "--out", "a.gif", "--fps", "5")[0] == 0
    assert (tmp_path / "a.gif").read_bytes().startswith(b"GIF89a")
    status, out, _ = vlfm("evaluate", "--run", "run", "--lake", small.root, "--out", "report")
    assert status == 0
    assert out.splitlines()[1] == "against the film, PSNR"
    assert (tmp_path / "report" / "report.html").stat().st_size > 10_000


def test_inspect_lists_films_and_shows_a_clip(vlfm: Say, whole: Lake) -> None:
    status, out, _ = vlfm("inspect", "--lake", whole.root)
    assert status == 0
    lines = out.splitlines()
    assert lines[0].startswith(f"version 1 of {whole.root}, 2026-01-01T00:00:00+00:00: 6 clips of 2 s, order 8")
    assert lines[1].split() == ["folder/film.mp4", "6", "clips", "a", "caption"]
    clip = lines[2].split()[1]
    status, out, _ = vlfm("inspect", clip[:6], "--lake", whole.root)
    assert status == 0
    shown = {name: value for name, _, value in (line.partition(" ") for line in out.splitlines())}
    shown = {name: value.strip() for name, value in shown.items()}
    assert (shown["clip_id"], shown["psnr_codec"]) == (clip, "40.0")
    status, out, _ = vlfm("inspect", clip, "--lake", whole.root, "--json")
    assert json.loads(out)[0]["heldout_error"] is None, "JSON has no NaN"
    assert json.loads(vlfm("inspect", "--lake", whole.root, "--json")[1])[0]["film"] == "folder/film.mp4"


def test_verify_finds_a_changed_byte_and_names_the_file(vlfm: Say, whole: Lake) -> None:
    status, out, _ = vlfm("verify", "--lake", whole.root)
    assert (status, out) == (0, f"version 1 of {whole.root} is whole: 2 shards\n")
    assert json.loads(vlfm("verify", "--lake", whole.root, "--json")[1]) == {"version": 1, "problems": []}
    shard = whole.shards / load(whole).shards[1].name
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.chmod(0o644)
    shard.write_bytes(data)
    status, out, told = vlfm("verify", "--lake", whole.root)
    assert status == 1
    assert shard.name in out
    assert load(whole).shards[0].name not in out
    assert told == ""
    problems = json.loads(vlfm("verify", "--lake", whole.root, "--json")[1])["problems"]
    assert problems == out.splitlines()


# --- plans ---


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from pipeline.corpus import make_corpus

    return make_corpus(tmp_path_factory.mktemp("plan") / "films", films=2).parent


def test_a_film_is_interpolated(vlfm: Say, films: Path, tmp_path: Path) -> None:
    film = films / "01-translation.mp4"
    status, out, told = vlfm("interpolate", film, "--fps", "60", "--duration", "0.2", "--size", "24", "--out", "a.gif")
    assert status == 0, told
    assert out.startswith("a.gif  12 frames of 32x24 at 60 fps\nfrom 104 frames at 48 fps, methods ")
    assert (tmp_path / "a.gif").read_bytes().startswith(b"GIF89a")
    assert "film       12/12 frames" in told
    status, out, _ = vlfm(
        "interpolate", film, "--fps", "2", "--size", "9x9", "--method", "hold", "--out", "b.png", "--json"
    )
    found = json.loads(out)
    assert (found["frames"], found["size"], found["methods"].keys()) == (5, [9, 9], {"hold"})


# --- experiments ---


def test_experiments_are_listed_and_run(vlfm: Say, films: Path) -> None:
    status, out, _ = vlfm("experiment")
    assert status == 0
    listed = dict(line.split(maxsplit=1) for line in out.splitlines())
    modules = [path.stem for path in (ROOT / "pipeline" / "experiments").glob("*.py") if path.stem != "__init__"]
    imported = {name: importlib.import_module(f"pipeline.experiments.{name}") for name in modules}
    assert set(listed) == {name for name, module in imported.items() if hasattr(module, "main")}
    films_given = ["--size", "12x16", films]
    status, out, told = vlfm("experiment", "interpolation", *films_given, "--json")
    assert status == 0, told
    assert [row["film"] for row in json.loads(out)] == ["01-translation.mp4", "02-zoom.webm"]
    status, out, told = vlfm("experiment", "interpolation", "nowhere.mp4")
    assert (status, out) == (1, "")
    assert "film_missing" in told
    with pytest.raises(SystemExit) as end:
        vlfm("experiment", "projection", "--help")
    assert end.value.code == 0


def test_columns_of_a_table_may_have_other_names(vlfm: Say, films: Path, tmp_path: Path) -> None:
    table = films / "words.csv"
    table.write_text(f"path,words\n{next(films.glob('*.mp4')).name},a thing moves\n")
    plan = ["ingest", table, "--lake", "lake", "--plan"]
    status, _, told = vlfm(*plan)
    assert status == 1
    assert "column" in told
    status, out, _ = vlfm(*plan, "--json", "--column", "file=path", "--column", "caption=words")
    assert (status, json.loads(out)["films"]) == (0, 1)
    status, _, told = vlfm(*plan, "--column", "film=path")
    assert status == 1
    assert told.startswith("error: --column takes NAME=OWN with NAME one of file, caption, start, end; it was given ")
    table.unlink()


def test_a_plan_makes_nothing(vlfm: Say, films: Path, tmp_path: Path) -> None:
    status, out, told = vlfm("ingest", films, "--lake", "lake", "--plan")
    assert status == 0, told
    assert "2 films" in out
    assert list(tmp_path.iterdir()) == []
    status, out, _ = vlfm("ingest", films, "--lake", "lake", "--plan", "--json", "--limit", "1")
    assert json.loads(out) == {"films": 1, "clips": 1, "blocks": 1, "cost": None}
    status, out, _ = vlfm("ingest", films, "--lake", "lake", "--plan", "--json", "--set", "duration=1")
    assert json.loads(out)["clips"] == 4
    assert list(tmp_path.iterdir()) == []


# --- looking after a lake ---


def test_gc_says_first_and_removes_when_told(vlfm: Say, tmp_path: Path) -> None:
    lake = Lake.create(tmp_path / "lake")
    publish_clips(lake, range(3))
    publish_clips(lake, range(3, 6))
    lake.store.write("shards/dead.tar", b"dead")
    status, out, _ = vlfm("gc", "--lake", lake.root, "--keep", 1)
    assert (status, out.splitlines()[-1]) == (0, "nothing was removed; --yes removes it")
    assert "1 expired versions: 1\n4 files that no version needs" in out
    assert lake.store.size("versions/1.json")
    told = json.loads(vlfm("gc", "--lake", lake.root, "--keep", 1, "--delete", "--json")[1])
    assert (told["removed"], told["expired"], lake.store.size("versions/1.json")) == (True, [1], None)
    assert vlfm("gc", "--lake", lake.root, "--yes")[1].startswith("no garbage")
    assert "keep at least 1" in one_line(vlfm("gc", "--lake", lake.root, "--keep", 0)[2])
    with lake.writing():
        assert "is in use" in one_line(vlfm("gc", "--lake", lake.root)[2])


def test_erase_plans_erases_and_proves(vlfm: Say, tmp_path: Path) -> None:
    lake = Lake.create(tmp_path / "lake")
    publish_clips(lake, range(3))
    status, out, _ = vlfm("erase", "folder/film.mp4", "--lake", lake.root, "--plan")
    assert (status, out) == (0, "folder/film.mp4: 3 clips in 1 versions would be erased\n")
    assert len(load(lake).shards) == 1
    status, out, _ = vlfm("erase", "folder/film.mp4", "--lake", lake.root)
    assert (status, load(lake).shards) == (0, ())
    assert "nothing of the film is left in this lake" in out
    assert "has no film" in one_line(vlfm("erase", "folder/film.mp4", "--lake", lake.root)[2])


def test_repair_puts_right_and_tells_what_it_cannot(vlfm: Say, tmp_path: Path) -> None:
    lake = Lake.create(tmp_path / "lake")
    publish_clips(lake, range(3))
    next(lake.shards.glob("*.index.json")).unlink()
    status, out, _ = vlfm("repair", "--lake", lake.root)
    assert (status, out.count("repaired ")) == (0, 1)
    next(lake.manifests.glob("*-films.parquet")).unlink()
    told = json.loads(vlfm("repair", "--lake", lake.root, "--json")[1])
    assert told["repaired"] == []
    assert "1-films.parquet is missing" in told["problems"][0]


def test_inspect_tells_versions_apart_and_where_a_clip_comes_from(vlfm: Say, tmp_path: Path) -> None:
    lake = Lake.create(tmp_path / "lake")
    first, second = Film("a.mp4", "one", "a film"), Film("b.mp4", "two", "another film", 1)
    publish(lake, [first, second])
    moved, changed = dataclasses.replace(first, name="new/a.mp4"), dataclasses.replace(second, content="three")
    publish(lake, [moved, changed, Film("c.mp4", "four", "one more")])
    publish(lake, [moved, changed], {**RECIPE, "rate": 8})
    status, out, _ = vlfm("inspect", "--lake", lake.root, "--versions")
    assert (status, out.count("\n")) == (0, 3)
    assert "version 2  2026-01-02T00:00:00Z  recipe test" in out
    told = json.loads(vlfm("inspect", "--lake", lake.root, "--diff", 1, 2, "--json")[1])
    assert (told["films_added"], told["films_removed"]) == (["c.mp4"], [])
    assert (told["films_renamed"], told["contents_changed"]) == ([["a.mp4", "new/a.mp4"]], ["b.mp4"])
    assert (told["clips_kept"], told["clips_added"], told["clips_removed"], told["same_content"]) == (2, 3, 1, False)
    _, out, _ = vlfm("inspect", "--lake", lake.root, "--diff", 2, 3)
    assert "rate: None, then 8\nfilm removed: c.mp4\n" in out
    assert "has no version 9" in one_line(vlfm("inspect", "--lake", lake.root, "--diff", 1, 9)[2])
    clip = first.clip_id(1, RECIPE)
    status, out, _ = vlfm("inspect", clip[:9], "--lake", lake.root, "--version", 2)
    assert status == 0
    assert f"from               /films/new/a.mp4, 2 to 4 s, sha256 {first.sha256[:16]}\n" in out
    assert "in versions        1, 2\n" in out
    assert "its film is not there" in out
    (origin,) = json.loads(
        vlfm("inspect", clip, "--lake", lake.root, "--version", 2, "--recipe", "linear", "--json")[1]
    )
    assert origin["provenance"]["reasons"][0].startswith("duration is") or origin["provenance"]["reasons"]
    assert origin["provenance"]["versions"] == [1, 2]
    assert "its sample         is whole, by its checksum\n" in out
    shard = lake.shards / origin["shard"]
    shard.write_bytes(shard.read_bytes()[:600])
    status, out, _ = vlfm("inspect", clip, "--lake", lake.root, "--version", 2)
    assert (status, "try `vlfm repair`" in out) == (1, True), out
    (lake.versions / "1.json").write_text("{}")
    assert "1.json is damaged" in vlfm("inspect", "--lake", lake.root, "--versions")[1]


@pytest.mark.parametrize("change", ["none", "touched", "content", "gone", "rate", "order", "gate"])
def test_why_a_clip_would_or_would_not_be_made_again(tmp_path: Path, change: str) -> None:
    lake, recipe = Lake.create(tmp_path / "lake"), linear()
    film = Film(str(tmp_path / "a.mp4").lstrip("/"), "one", "a film")
    version = publish(lake, [film], recipe.data_fields())
    path = tmp_path / "a.mp4"
    path.write_bytes(b"one")
    rows = read_manifest(lake, version, "films").to_pylist()
    stat = path.stat()
    row = {**rows[0], "path": str(path), "bytes": stat.st_size, "modified_ns": stat.st_mtime_ns}
    entry = write_table_again(lake, 1, "films", [row], version.manifest["films"])
    version = dataclasses.replace(version, manifest={**version.manifest, "films": entry})
    if change == "touched":
        os.utime(path, ns=(1, 1))
    elif change == "content":
        path.write_bytes(b"another")
    elif change == "gone":
        path.unlink()
    elif change != "none":
        values = {"rate": {"rate": 4.0}, "order": {"order": 5}, "gate": {"gates": {"psnr_codec": 99.0}}}
        recipe = dataclasses.replace(recipe, **values[change])
    clip = read_manifest(lake, version).to_pylist()[0]
    found = provenance(lake, version, clip, recipe)
    again, words = {
        "none": (False, "as it was ingested"), "touched": (False, "touched and has the same content"),
        "content": (True, "another content"), "gone": (False, "could not be made again"),
        "rate": (True, "rate is 4.0 now, it was 16.0; from its stage decode on"),
        "order": (True, "from its stage project on"),
        "gate": (False, "gates keep it out or flag it: psnr_codec"),
    }[change]  # fmt: skip
    assert (found.again, words in "; ".join(found.reasons)) == (again, True), found.reasons
