"""A dataset made by a Stable-Diffusion-format codec: random weights, but the real VAE, UNet, text encoder and DDIM."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from model.codecs.diffusers import DiffusersCodec
from model.codecs.factory import codec_from_spec
from pipeline.ingest import commit, embed_captions, plan_ingest
from pipeline.ingest.block import BlockWorker
from pipeline.recipes import stable_diffusion
from pipeline.sources.folders import discover
from storage.layout import Lake
from storage.shards import ShardReader
from storage.verify import verify
from storage.version import load
from tests.model.tiny_diffusion import tiny_diffusion

Film = Callable[..., Path]


@pytest.mark.parametrize("depth", [0, 2])
def test_films_become_inverted_latents(scene: Film, tmp_path: Path, depth: int) -> None:
    folder = tiny_diffusion(tmp_path / "weights")
    recipe = stable_diffusion(folder)
    codec = {**recipe.codec, "ddim_steps": 10, "inversion_depth": depth, "refinements": 1}
    recipe = dataclasses.replace(recipe, size=(16, 16), duration=1.0, rate=8.0, codec=codec)
    scene(tmp_path / "films" / "a.mp4", seconds=2).with_suffix(".txt").write_text("a picture")
    lake = Lake.create(tmp_path / "lake")
    with lake.writing():
        plan = plan_ingest(lake, discover(tmp_path / "films"), recipe)
        texts = embed_captions(plan)
        worker = BlockWorker(lake, recipe, plan.recipe_fingerprint)
        worker.setup()
        results = [worker.process(block.block_id, block.clips) for block in plan.blocks]
        report = commit(plan, texts, results)
    assert report.exit_status == 0
    version = load(lake)
    assert verify(lake, version) == []
    assert (version.codec["channels"], version.codec["factor"]) == (4, 4)
    rebuilt = codec_from_spec(version.codec["spec"])
    assert isinstance(rebuilt, DiffusersCodec)
    sample = ShardReader(lake, version.shards[0].name)[0]
    assert sample["latents.npy"].shape == (8, 4, 4, 4)
    frames = torch.from_numpy(sample["preview.npy"].copy()).permute(0, 3, 1, 2).float() / 127.5 - 1
    expected = rebuilt.encode(frames, text="a picture").latents.numpy()
    np.testing.assert_allclose(sample["latents.npy"].astype(np.float32), expected, atol=2e-2)
    assert np.abs(expected).max() > 0.05
