"""A lake made on one machine goes on on another, whose processor rounds otherwise: what is stored is used as it is."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import pipeline.ingest.publish
from model.text.encoder import TextEncoder
from pipeline.ingest import ingest
from pipeline.stages.invert import InvertStage
from pipeline.stages.project import ProjectStage
from storage.arrays import read_clips, read_texts
from storage.layout import Lake, LakeError
from storage.rounding import ROUNDING, check_rounding, relative_difference
from storage.shards import ShardReader
from storage.verify import verify
from storage.version import list_versions, load, read_empty_text, read_manifest
from tests.perturb.hook import neighbours
from tests.pipeline.ingest.in_process import RECIPE, InProcess
from tests.pipeline.test_old_lakes import RECIPE as OLD_RECIPE
from tests.pipeline.test_old_lakes import old

__all__ = ["old"]  # the golden lake's fixture

Film = Callable[..., Path]
Machine = Callable[[], list[str]]


@pytest.fixture
def other_machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Called, it makes this machine another one; returns the list of captions that the encoder is asked for."""

    def become() -> list[str]:
        asked: list[str] = []
        encode = TextEncoder.encode

        def embeddings(self: TextEncoder, captions: Sequence[str], padded: bool = False) -> Any:
            asked.extend(captions)
            rows, lengths = encode(self, captions, padded)
            return torch.from_numpy(neighbours(rows.numpy().astype(np.float16)).astype(np.float32)), lengths

        monkeypatch.setattr(TextEncoder, "encode", embeddings)
        for stage, name in ((InvertStage, "latents"), (ProjectStage, "coefficients")):
            monkeypatch.setattr(stage, "process", off_by_one(stage.process, name))
        return asked

    return become


def off_by_one(process: Any, name: str) -> Any:
    def perturbed(self: Any, works: Any) -> Any:
        for work in process(self, works):
            setattr(work, name, neighbours(getattr(work, name)))
            yield work

    return perturbed


@pytest.fixture
def films(scene: Film, tmp_path: Path) -> Path:
    for name, caption in (("a", "a picture"), ("b", "another picture"), ("c", "")):
        scene(tmp_path / "films" / f"{name}.mp4", rate="10", seconds=2).with_suffix(".txt").write_text(caption)
    return tmp_path / "films"


def add(films: Path, scene: Film) -> None:
    """Films with a caption that the lake has, with a new one and with the empty one."""
    for name, caption in (("d", "a picture"), ("e", "a new one"), ("f", "")):
        scene(films / f"{name}.mp4", rate="9", seconds=1 + "def".index(name)).with_suffix(".txt").write_text(caption)


RECIPE = dataclasses.replace(RECIPE, captions_required=False)


def die(*_: object) -> None:
    raise KeyboardInterrupt


def contents(lake: Lake, number: int) -> dict[str, dict[str, Any]]:
    """Everything that version `number` holds of its clips, in the shards and in the arrays, by clip."""
    version = load(lake, number)
    found = {}
    texts = read_texts(lake, version.snapshot, version.group)
    for row in read_manifest(lake, version).to_pylist():
        sample = ShardReader(lake, row["shard"])[row["shard_row"]]
        stored = read_clips(lake, version.snapshot, version.group, [row["array_row"]])
        text = {"array text": texts.embeddings[row["text_row"], : texts.lengths[row["text_row"]]]}
        found[row["clip_id"]] = {**sample, **{f"array {name}": value for name, value in stored.items()}, **text}
    return found


def sound(lake: Lake) -> None:
    for number in list_versions(lake):
        assert verify(lake, load(lake, number)) == []


def unchanged(before: dict[str, dict[str, Any]], after: dict[str, dict[str, Any]]) -> None:
    for clip, members in before.items():
        for name, value in members.items():
            np.testing.assert_array_equal(after[clip][name], value, f"{name} of {clip}")


def test_a_refresh_on_another_machine(films: Path, scene: Film, tmp_path: Path, other_machine: Machine) -> None:
    ingest(films, tmp_path / "lake", recipe=RECIPE, runner=InProcess())
    lake = Lake.open(tmp_path / "lake")
    before, empty = contents(lake, 1), read_empty_text(lake, load(lake))
    add(films, scene)
    asked = other_machine()
    report = ingest(films, lake, recipe=RECIPE, runner=InProcess())
    assert (report.version, report.clips.done, report.clips.unchanged) == (2, 6, 6)
    assert asked == ["", "a new one"], "a caption that is stored is not encoded again; the empty one is a check"
    sound(lake)
    after = contents(lake, 2)
    unchanged(before, after)
    np.testing.assert_array_equal(read_empty_text(lake, load(lake)), empty)
    assert load(lake, 2).text == load(lake, 1).text
    by_caption: dict[str, set[bytes]] = {}
    for members in after.values():
        by_caption.setdefault(members["clip.json"]["caption"], set()).add(members["text.npy"].tobytes())
    assert {caption: len(rows) for caption, rows in by_caption.items()} == dict.fromkeys(by_caption, 1)
    assert by_caption[""] == {empty.tobytes()}


def test_another_recipe_on_another_machine(films: Path, tmp_path: Path, other_machine: Machine) -> None:
    ingest(films, tmp_path / "lake", recipe=RECIPE, runner=InProcess())
    lake = Lake.open(tmp_path / "lake")
    other_machine()
    other = dataclasses.replace(RECIPE, observe="all")
    assert ingest(films, lake, recipe=other, runner=InProcess()).version == 2
    sound(lake)
    assert load(lake, 2).text["empty"] == load(lake, 1).text["empty"]


@pytest.mark.parametrize("blocks", [1, None])
def test_a_run_that_died_goes_on_on_another_machine(
    blocks: int | None, films: Path, tmp_path: Path, other_machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It died among its blocks, or when shards and arrays were written and the version was not."""
    lake = Lake.create(tmp_path / "lake")
    dying = InProcess(KeyboardInterrupt(), after=10**9 if blocks is None else blocks)
    with monkeypatch.context() as patch:
        if blocks is None:
            patch.setattr(pipeline.ingest.publish, "publish_version", die)
        with pytest.raises(KeyboardInterrupt):
            ingest(films, lake, recipe=RECIPE, runner=dying)
    left = {path.name: path.read_bytes() for path in lake.shards.glob("*.tar")}
    assert len(left) == (2 if blocks is None else 0)
    other_machine()
    runner = InProcess()
    report = ingest(films, lake, recipe=RECIPE, runner=runner)
    assert (report.version, report.clips.done, len(runner.tasks)) == (1, 6, 0 if blocks is None else 1)
    sound(lake)
    for name, data in left.items():
        assert (lake.shards / name).read_bytes() != data, "the dead run's shard is written again, and replaced"


def test_another_encoder_is_refused_before_any_work(
    films: Path, scene: Film, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ingest(films, tmp_path / "lake", recipe=RECIPE, runner=InProcess())
    lake = Lake.open(tmp_path / "lake")
    add(films, scene)
    encode = TextEncoder.encode

    def wrong(self: TextEncoder, captions: Sequence[str], padded: bool = False) -> Any:
        rows, lengths = encode(self, captions, padded)
        return rows * 1.05, lengths

    monkeypatch.setattr(TextEncoder, "encode", wrong)
    runner = InProcess()
    told = r"empty caption's embedding by builtin@\w+ differs .* \(0\.05 of its norm, where rounding explains 0\.0039\)"
    with pytest.raises(LakeError, match=told):
        ingest(films, lake, recipe=RECIPE, runner=runner)
    assert (runner.tasks, list_versions(lake)) == ([], [1])
    sound(lake)


def test_the_golden_lake_on_another_machine(old: Path, scene: Film, other_machine: Machine) -> None:
    """It stores the words of version 1's encoder; a film with one of its captions joins it, and one with another."""
    lake = Lake.open(old / "lake")
    before, empty = contents(lake, 1), read_empty_text(lake, load(lake))
    caption = read_manifest(lake, load(lake)).to_pylist()[0]["caption"]
    scene(old / "films" / "same.mp4", seconds=2).with_suffix(".txt").write_text(caption)
    scene(old / "films" / "new.mp4", seconds=2, rate="8").with_suffix(".txt").write_text("a new film")
    asked = other_machine()
    report = ingest(old / "films", lake, recipe=OLD_RECIPE, runner=InProcess())
    assert (report.version, report.clips.done, report.clips.unchanged) == (2, 4, 3)
    assert asked == ["", "a new film"]
    sound(lake)
    unchanged(before, contents(lake, 2))
    np.testing.assert_array_equal(read_empty_text(lake, load(lake)), empty)


def test_a_stored_embedding_that_is_damaged_is_named(films: Path, scene: Film, tmp_path: Path) -> None:
    ingest(films, tmp_path / "lake", recipe=RECIPE, runner=InProcess())
    lake = Lake.open(tmp_path / "lake")
    (file,) = lake.texts.iterdir()
    shutil.copy(films / "a.mp4", file)
    add(films, scene)
    with pytest.raises(LakeError, match=rf"{file.name}: wrong checksum"):
        ingest(films, lake, recipe=RECIPE, runner=InProcess())


def test_how_far_rounding_goes() -> None:
    random = np.random.default_rng(0)
    rows = random.normal(size=(20, 768)).astype(np.float16)
    moved = neighbours(rows)
    assert (moved != rows).all()
    assert 2.0**-12 < relative_difference(rows, moved) < 2.0**-10 < ROUNDING
    check_rounding("rows", rows, neighbours(moved))
    assert relative_difference(rows, rows) == 0
    assert relative_difference(rows, rows[:1]) == float("inf")
    one = rows.copy()
    one[3] *= np.float16(1.5)
    with pytest.raises(LakeError, match=r"rows differs .* \(0\.5 of its norm"):
        check_rounding("rows", rows, one)
