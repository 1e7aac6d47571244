"""The stages on real films: latents and coefficients as stored, their certificate, and failures that stay their own."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from model.codecs.factory import codec_from_spec
from model.legs import evaluate, project, projection_matrix
from model.legs.select import leave_one_out
from pipeline.ingest.block import Block, BlockWorker, merge_parts
from pipeline.ingest.plan import plan_ingest
from pipeline.items import ClipPlan, ClipWork, Failure, Resources
from pipeline.recipes import DataRecipe, linear
from pipeline.sources.folders import discover
from pipeline.stage import run_stages
from storage.layout import Lake
from storage.rounding import ROUNDING
from storage.staging import read_block

Film = Callable[..., Path]
RECIPE = dataclasses.replace(linear(), size=(16, 24), duration=1.0, block_clips=100)


def planned(tmp_path: Path, scene: Film, recipe: DataRecipe = RECIPE, rate: str = "24") -> tuple[Lake, list[ClipPlan]]:
    scene(tmp_path / "films" / "a.mp4", rate=rate).with_suffix(".txt").write_text("a test picture")
    plan = plan_ingest(Lake.create(tmp_path / "lake"), discover(tmp_path / "films"), recipe)
    return plan.lake, plan.clips


def test_a_block_as_staged(scene: Film, tmp_path: Path) -> None:
    lake, clips = planned(tmp_path, scene)
    worker = BlockWorker(lake, RECIPE, "f" * 64)
    worker.setup()
    result = worker.process("b", clips)
    assert result.done == [clip.clip_id for clip in clips]
    assert len(clips) == 4
    assert set(result.seconds) == {"decode", "content", "stored", "invert", "project"}
    arrays, meta = read_block(lake, "b")
    assert {name: (array.shape, array.dtype.str) for name, array in arrays.items()} == {
        "latents": ((4, 16, 12, 4, 6), "<f2"),
        "coefficients": ((4, 18, 12, 4, 6), "<f2"),
        "frame_time": ((4, 16), "<f8"),
        "observed": ((4, 16), "|b1"),
        "next_latents": ((4, 1, 12, 4, 6), "<f2"),
        "next_time": ((4, 1), "<f8"),
        "preview": ((4, 16, 16, 24, 3), "|u1"),
    }
    codec = codec_from_spec(RECIPE.codec)
    for index, row in enumerate(meta["clips"]):
        frames = torch.from_numpy(arrays["preview"][index]).permute(0, 3, 1, 2) / 127.5 - 1
        latents = arrays["latents"][index].astype(np.float32)
        np.testing.assert_allclose(latents, codec.encode(frames).latents.numpy(), rtol=ROUNDING, atol=2e-3)
        error = (codec.decode(torch.from_numpy(latents)) - frames).square().mean().item()
        assert row["psnr_codec"] == pytest.approx(10 * np.log10(4 / error), abs=1e-3)
        seen = arrays["observed"][index]
        readout = evaluate(arrays["coefficients"][index].astype(np.float64), arrays["frame_time"][index], 1.0)
        relative = [
            np.linalg.norm(readout[part] - latents[part]) / np.linalg.norm(latents[part]) for part in (seen, ~seen)
        ]
        assert row["projection_error"] == pytest.approx(relative[0], rel=1e-3, abs=5e-4)
        assert row["heldout_error"] == pytest.approx(relative[1], rel=1e-3, abs=5e-4)
        assert row["projection_error"] < row["heldout_error"] < 0.5
        assert row["psnr_projection"] <= row["psnr_codec"] + 1
        steps = np.square(np.diff(latents, axis=0)).sum() / np.square(latents).sum()
        assert row["smoothness"] == pytest.approx(steps, rel=1e-3)
        step = 1e-4
        ends = evaluate(arrays["coefficients"][index].astype(np.float64), np.array([0.0, step]), 1.0)
        times = arrays["frame_time"][index][seen]
        slope = np.sqrt(np.square((ends[1] - ends[0]) / step).mean()) * np.diff(times).mean()
        assert row["end_ratio"] == pytest.approx(
            slope / np.sqrt(np.square(np.diff(latents[seen], axis=0)).mean()), rel=0.03
        )
        assert row["order_used"] == 18


def test_fewer_frames_lower_order(scene: Film, tmp_path: Path) -> None:
    lake, clips = planned(tmp_path, scene, rate="10")
    worker = BlockWorker(lake, RECIPE, "f" * 64)
    worker.process("b", clips[:1])
    arrays, meta = read_block(lake, "b")
    row = meta["clips"][0]
    assert (row["frames"], row["frames_observed"], row["order_used"]) == (10, 6, 12)
    assert not arrays["coefficients"][0, 12:].any()
    assert arrays["coefficients"][0, 11].any()
    assert np.isnan(arrays["frame_time"][0, 10:]).all()
    assert not arrays["observed"][0, 10:].any()
    assert not arrays["latents"][0, 10:].any()


def test_each_clip_has_the_method_of_its_own_frames(scene: Film, tmp_path: Path) -> None:
    """`auto` looks at the observed frames and the one after them, and what it chose is what was made."""
    lake, clips = planned(tmp_path, scene)
    BlockWorker(lake, RECIPE, "f" * 64).process("b", clips)
    arrays, meta = read_block(lake, "b")
    assert RECIPE.method == "auto"
    for index, row in enumerate(meta["clips"]):
        count = row["frames"]
        seen = arrays["observed"][index][:count]
        after = np.isfinite(arrays["next_time"][index])
        times = np.append(arrays["frame_time"][index][:count][seen], arrays["next_time"][index][after])
        latents = np.concatenate([arrays["latents"][index][:count][seen], arrays["next_latents"][index][after]])
        latents = latents.astype(np.float32)
        errors = {name: leave_one_out(latents, times, 1.0, 18, name, True) for name in ("cubic", "linear")}
        assert row["method_used"] == min(errors, key=lambda name: errors[name])
        made = project(latents, projection_matrix(times, 1.0, 18, row["method_used"], outside=True)).astype(np.float16)
        np.testing.assert_allclose(arrays["coefficients"][index], made, rtol=ROUNDING, atol=2e-3)
    spline = dataclasses.replace(RECIPE, method="cubic")
    BlockWorker(lake, spline, "f" * 64).process("c", clips)
    assert {row["method_used"] for row in read_block(lake, "c")[1]["clips"]} == {"cubic"}


def test_latents_that_do_not_fit_never_leave_the_stage(scene: Film, tmp_path: Path) -> None:
    recipe = dataclasses.replace(RECIPE, codec={**RECIPE.codec, "scale": 1e6})
    lake, clips = planned(tmp_path, scene, recipe)
    result = BlockWorker(lake, recipe, "f" * 64).process("b", clips)
    assert result.done == []
    assert {failure.reason for failure in result.failures} == {"not_finite"}
    assert {failure.stage for failure in result.failures} == {"invert"}


def test_a_film_that_changed_meanwhile_is_not_used(scene: Film, tmp_path: Path) -> None:
    lake, clips = planned(tmp_path, scene)
    scene(tmp_path / "films" / "a.mp4", seconds=3)
    result = BlockWorker(lake, RECIPE, "f" * 64).process("b", clips)
    assert {failure.reason for failure in result.failures} == {"film_changed"}


def test_one_bad_window_is_one_bad_clip(scene: Film, tmp_path: Path) -> None:
    lake, clips = planned(tmp_path, scene)
    window = clips[1].window
    wrong = dataclasses.replace(window, ticks=(window.ticks[0], window.ticks[1] + 1, *window.ticks[2:]))
    clips[1] = dataclasses.replace(clips[1], window=wrong)
    result = BlockWorker(lake, RECIPE, "f" * 64).process("b", clips)
    assert [failure.clip_id for failure in result.failures] == [clips[1].clip_id]
    assert [failure.reason for failure in result.failures] == ["corrupt"]
    assert result.done == [clip.clip_id for clip in (clips[0], *clips[2:])]


def test_parts_merge_to_the_block(scene: Film, tmp_path: Path) -> None:
    lake, clips = planned(tmp_path, scene)
    clips[2] = dataclasses.replace(clips[2], preview=False)
    worker = BlockWorker(lake, RECIPE, "f" * 64)
    worker.process("whole", clips)
    parts = [worker.process(f"parts-{number}", clips[number : number + 1]) for number in (3, 0, 2)]
    lost = Failure("a.mp4", "worker", "worker_died", "gone", clip_id=clips[1].clip_id, clip_start=1.0)
    result = merge_parts(lake, Block("parts", tuple(clips)), parts, [lost], "f" * 64)
    assert result.failures == (lost,)
    (whole, _), (merged, meta) = read_block(lake, "whole"), read_block(lake, "parts")
    for name in ("frame_time", "observed"):
        np.testing.assert_array_equal(merged[name], whole[name][[0, 2, 3]])
    for name in ("latents", "coefficients"):  # a processor may add up a batch of another size in another order
        expected = whole[name][[0, 2, 3]]
        np.testing.assert_allclose(merged[name], expected, rtol=0, atol=ROUNDING * np.abs(expected).max())
    np.testing.assert_array_equal(merged["preview"], whole["preview"][[0, 2]])
    assert [row["clip_id"] for row in meta["clips"]] == [clips[k].clip_id for k in (0, 2, 3)]
    assert not list(lake.staging.glob("parts-*"))


class Slow:
    """A stage that takes a while for each clip."""

    resources = Resources()

    def __init__(self, name: str) -> None:
        self.name = name

    def setup(self) -> None:
        pass

    def process(self, works: Iterable[ClipWork]) -> Iterator[ClipWork]:
        for work in works:
            time.sleep(0.02)
            yield work

    def teardown(self) -> None:
        pass


def test_the_first_stage_runs_ahead(scene: Film, tmp_path: Path) -> None:
    _, clips = planned(tmp_path, scene)
    begin = time.perf_counter()
    works, seconds = run_stages([Slow("one"), Slow("two")], clips * 10)
    taken = time.perf_counter() - begin
    assert [work.plan.clip_id for work in works] == [clip.clip_id for clip in clips * 10]
    assert seconds["one"] == pytest.approx(0.8, rel=0.5)
    assert seconds["two"] >= 0.8
    assert taken < 0.85 * (seconds["one"] + seconds["two"]), "side by side"
