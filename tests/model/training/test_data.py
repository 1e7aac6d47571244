"""The trainer's data on real shards: what a clip is, how clips are joined, and that workers see the same."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model.settings import override
from model.train import main, train
from model.training import data
from model.training.data import Clips, Collate, Loader, Steps, lake_and_version
from storage import version
from storage.layout import Lake, LakeError
from storage.shards import ShardReader, write_shard
from tests.model.test_train import TINY, command
from tests.model.tiny_lake import KEPT, ORDER, SIDE, frames, make_lake, sample
from tests.model.wrapped_method import Wrapper, vlfm_wrapped


@pytest.fixture(scope="module")
def lake(tmp_path_factory: pytest.TempPathFactory) -> Lake:
    return make_lake(tmp_path_factory.mktemp("data") / "lake", clips=5, validation=2)


def test_splits_share_out_the_clips(lake: Lake) -> None:
    made = version.load(lake)
    train, validation, both = (Clips(lake, made, split) for split in ("train", "validation", None))
    assert (len(train), len(validation), len(both)) == (5, 2, 7)
    assert [clip.clip_id for clip in both.every()] == [sample(n, "")["__key__"] for n in range(7)]
    ids = {clip.clip_id for clip in train.every()} | {clip.clip_id for clip in validation.every()}
    assert ids == {clip.clip_id for clip in both.every()}
    assert all(clip.about["split"] == "validation" for clip in validation.every())


def test_splits_are_known_without_opening_a_shard(lake: Lake, monkeypatch: pytest.MonkeyPatch) -> None:
    """A start reads one table, whatever the clips; a shard is opened when a clip of it is read."""
    opened, reader = [], data.ShardReader

    def counted(lake: Lake, name: str) -> data.ShardReader:
        opened.append(name)
        return reader(lake, name)

    monkeypatch.setattr(data, "ShardReader", counted)
    clips = Clips(lake, version.load(lake), "train")
    assert len(clips) == 5
    assert opened == []
    copy = pickle.loads(pickle.dumps(clips))  # noqa: S301  (as a spawned worker gets it)
    (lake.root / clips.version.manifest["clips"]["path"]).rename(lake.root / "aside")
    try:
        assert copy[0].clip_id == clips[0].clip_id, "a worker is told the places"
    finally:
        (lake.root / "aside").rename(lake.root / clips.version.manifest["clips"]["path"])
    assert opened == ["block0.tar"] * 2
    assert clips[4].about["split"] == "train"
    assert opened == ["block0.tar"] * 2 + ["block1.tar"]


def test_a_manifest_of_other_shards_is_refused(lake: Lake) -> None:
    made = version.load(lake)
    less = dataclasses.replace(made, shards=made.shards[:1])
    with pytest.raises(ValueError, match=r"names shard 'block1.tar', which the version does not; `vlfm verify --lake"):
        len(Clips(lake, less, "train"))


def test_a_clip_is_what_was_written(lake: Lake) -> None:
    clip = Clips(lake, version.load(lake), None)[6]  # in the second shard
    written = sample(6, "validation")
    assert clip.about == written["clip.json"]
    assert set(clip.members) == {"coefficients", "text", "latents", "frame_time", "observed", "preview"}
    for name, value in clip.members.items():
        np.testing.assert_array_equal(value, written[f"{name}.npy"])
        assert value.dtype == written[f"{name}.npy"].dtype
    assert clip.members["preview"].shape == (KEPT, SIDE, SIDE, 3)
    np.testing.assert_array_equal(clip.members["preview"], frames(6))


def test_a_batch_pads_captions_and_keeps_their_lengths(lake: Lake) -> None:
    made = version.load(lake)
    clips = Clips(lake, made, "train")
    empty = version.read_empty_text(lake, made)
    two = [clips[0], clips[1]]
    short = two[1].members["text"][:3]
    two[1].members["text"] = short
    batch = Collate(empty, ["coefficients"])(two)
    assert batch.clip_ids == (two[0].clip_id, two[1].clip_id)
    assert batch.coefficients.shape == (2, ORDER, 12, SIDE // 4, SIDE // 4)
    assert batch.coefficients.dtype == batch.text.dtype == batch.empty_text.dtype == torch.float16
    assert batch.text_length.tolist() == [len(two[0].members["text"]), 3]
    assert batch.text.shape[1] == len(two[0].members["text"]) > 3
    assert not batch.text[1, 3:].any()
    np.testing.assert_array_equal(batch.text[1, :3].numpy(), short.astype(np.float32))
    assert batch.clip_start.tolist() == [0.0, 2.0]
    assert batch.duration.tolist() == [2.0, 2.0]
    np.testing.assert_array_equal(batch.empty_text.numpy(), empty.astype(np.float32))


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_numbers_travel_as_they_are_stored_and_are_widened_on_the_device(lake: Lake, kind: torch.dtype) -> None:
    made = version.load(lake)
    clips = Clips(lake, made, "train")
    members = ("coefficients", "latents", "frame_time", "observed")
    travelling = Collate(version.read_empty_text(lake, made), members)([clips[0], clips[1]])
    batch = travelling.to("cpu", kind)
    for name in ("text", "empty_text", "coefficients", "latents"):
        assert getattr(travelling, name).dtype == torch.float16, name
    for name in ("text", "empty_text", "coefficients", "latents", "frame_time", "clip_start", "duration"):
        assert getattr(batch, name).dtype == kind, name
    assert (batch.text_length.dtype, batch.observed.dtype, batch.valid.dtype) == (torch.int64, torch.bool, torch.bool)
    for row in range(2):
        for name in ("coefficients", "latents"):
            stored = torch.from_numpy(clips[row].members[name].astype("float64")).to(kind)
            assert torch.equal(batch.part(name)[row], stored)


def test_a_start_of_a_run_that_there_is_reads_no_clip(
    lake: Lake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = override(TINY, {"steps": 1, "checkpoint_every": 1})
    read, inner = [], data.ShardReader.read
    monkeypatch.setattr(data.ShardReader, "read", lambda *given: read.append(given) or inner(*given))
    folder = train(lake.root, tmp_path / "run", recipe)
    assert len(read) == 5 + 4 + 2, "the figures, the step's batch, and the validation"
    assert all({"coefficients.npy", "text.npy", "clip.json"} == set(names) for _, _, names in read)
    read.clear()
    assert train(lake.root, tmp_path / "run", recipe) == folder
    assert read == []


def test_an_open_dataset_travels_to_a_worker(lake: Lake) -> None:
    clips = Clips(lake, version.load(lake), "train")
    first = clips[0]
    there = pickle.loads(pickle.dumps(clips))  # noqa: S301 - what a worker process does with it
    assert "readers" not in there.__dict__
    np.testing.assert_array_equal(there[0].members["coefficients"], first.members["coefficients"])


class Shrinking(Wrapper):
    """A method in whose first step a shard shrinks."""

    def __init__(self, method: Any, shard: Path | None) -> None:
        super().__init__(method)
        self.shard = shard

    def loss(self, *given: Any) -> Any:
        if self.shard is not None:
            os.truncate(self.shard, 1024)
        return self.method.loss(*given)


def rewritten(made: Lake, number: int, **changes: np.ndarray) -> None:
    """Square `number`'s sample with other arrays, whole by its checksum, in a shard that was published before."""
    path = made.shards / "block0.tar"
    reader = ShardReader(made, path.name)
    samples = [{**reader[row], **({f"{k}.npy": v for k, v in changes.items()} if row == number else {})}
               for row in range(len(reader))]  # fmt: skip
    write_shard(other := Lake.create(made.root / "other"), path.name, samples)
    for name in (path.name, "block0.index.json"):
        (made.shards / name).chmod(0o644)
        shutil.copy(other.shards / name, made.shards / name)


@pytest.mark.parametrize(("kind", "workers"), [("flipped", 1), ("infinite", 0), ("shrunk", 0)])
def test_a_clip_that_cannot_be_read_is_one_line(
    tmp_path: Path, kind: str, workers: int, capfd: pytest.CaptureFixture[str]
) -> None:
    """In the trainer and in its workers; an infinite value is in no checksum's reach."""
    made = make_lake(tmp_path / "lake", clips=5)
    shard, told = made.shards / "block0.tar", "wrong checksum"
    train(
        made.root, tmp_path / "run", override(TINY, {"batch": 3, "steps": 1})
    )  # the figures, for which all clips are read
    if kind == "infinite":
        values = sample(1, "train")["coefficients.npy"].copy()
        values[1, 2, 3, 0] = np.inf
        rewritten(made, 1, coefficients=values)
        told = "coefficients has values that are not finite"
    if kind == "flipped":
        index = json.loads((made.shards / "block0.index.json").read_text())
        data = bytearray(shard.read_bytes())
        data[index["samples"][1]["members"]["text.npy"][0] + 200] ^= 1
        shard.write_bytes(data)
    if kind == "shrunk":
        told = "lies beyond the shard's end, it was truncated"
    words = command(made, tmp_path / "run", "--set=batch=3", f"--set=loader_workers={workers}")[2:]
    with vlfm_wrapped(lambda method: Shrinking(method, shard if kind == "shrunk" else None)):
        status = main(words)
    assert status == 1
    error = capfd.readouterr().err.splitlines()[-1]
    assert re.fullmatch(
        rf"error: .*block0.tar, clip \w+, .*{told}; `vlfm verify --lake .*; restore it .* ingest .*", error
    )


def test_a_training_that_fails_leaves_no_worker(lake: Lake, tmp_path: Path) -> None:
    """Python would wait for it at its end, and it holds the signal that is to end it."""

    class Failing(Wrapper):
        def loss(self, *given: Any) -> Any:
            raise ValueError("the method's own fault")

    recipe = override(TINY, {"loader_workers": 2})
    with vlfm_wrapped(Failing), pytest.raises(ValueError, match="own fault") as held:
        train(lake.root, tmp_path / "run", recipe)
    assert held.traceback  # with all that its frames hold
    assert multiprocessing.active_children() == []


def test_workers_bring_the_same_batches(lake: Lake) -> None:
    made = version.load(lake)
    clips, collate = Clips(lake, made, "train"), Collate(version.read_empty_text(lake, made), ["coefficients"])
    steps = Steps(len(clips), 2, seed=3, first=0, last=4)
    here = list(Loader(clips, steps, collate, 0, torch.device("cpu")))
    there = list(Loader(clips, steps, collate, 1, torch.device("cpu")))
    assert [batch.clip_ids for batch in here] == [batch.clip_ids for batch in there]
    assert len(here) == 4
    for one, other in zip(here, there, strict=True):
        assert torch.equal(one.coefficients, other.coefficients)
        assert torch.equal(one.text, other.text)


def test_lakes_and_versions_that_are_not_there(lake: Lake, tmp_path: Path) -> None:
    assert lake_and_version(lake.root, None)[1].number == lake_and_version(lake.root, 1)[1].number == 1
    with pytest.raises(LakeError, match="has no version 2; there are: 1"):
        lake_and_version(lake.root, 2)
    with pytest.raises(LakeError, match="vlfm ingest"):
        lake_and_version(tmp_path, None)
    with pytest.raises(LakeError, match="has no version yet"):
        lake_and_version(Lake.create(tmp_path / "empty").root, None)
