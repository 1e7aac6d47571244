"""The trainer's data on real shards: what a clip is, how clips are joined, and that workers see the same."""

from __future__ import annotations

import dataclasses
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from model.training import data
from model.training.data import Clips, Collate, Steps, lake_and_version, loader
from storage import version
from storage.layout import Lake, LakeError
from tests.model.tiny_lake import KEPT, ORDER, SIDE, frames, make_lake, sample


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
    assert batch.coefficients.dtype == batch.text.dtype == torch.float32
    assert batch.text_length.tolist() == [len(two[0].members["text"]), 3]
    assert batch.text.shape[1] == len(two[0].members["text"]) > 3
    assert not batch.text[1, 3:].any()
    np.testing.assert_array_equal(batch.text[1, :3].numpy(), short.astype(np.float32))
    assert batch.clip_start.tolist() == [0.0, 2.0]
    assert batch.duration.tolist() == [2.0, 2.0]
    np.testing.assert_array_equal(batch.empty_text.numpy(), empty.astype(np.float32))


def test_an_open_dataset_travels_to_a_worker_and_closes(lake: Lake) -> None:
    clips = Clips(lake, version.load(lake), "train")
    first = clips[0]
    there = pickle.loads(pickle.dumps(clips))  # noqa: S301 - what a worker process does with it
    assert "readers" not in there.__dict__
    np.testing.assert_array_equal(there[0].members["coefficients"], first.members["coefficients"])
    there.close()
    assert there[1].clip_id == clips[1].clip_id, "it opens again"


def test_workers_bring_the_same_batches(lake: Lake) -> None:
    made = version.load(lake)
    clips, collate = Clips(lake, made, "train"), Collate(version.read_empty_text(lake, made), ["coefficients"])
    steps = Steps(len(clips), 2, seed=3, first=0, last=4)
    here = list(loader(clips, steps, collate, workers=0))
    there = list(loader(clips, steps, collate, workers=1))
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
