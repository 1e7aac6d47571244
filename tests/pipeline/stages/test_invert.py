"""Clips through the codec in groups: a clip's latents are its own, a fault costs one clip, the certificate is true."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model.codecs.base import Encoded
from model.codecs.diffusers import DiffusersCodec, DiffusersSettings
from model.metrics.pictures import pooled_psnr, ssim
from pipeline.ingest.block import BlockWorker
from pipeline.items import ClipPlan, ClipWork, Window
from pipeline.recipes import demo
from pipeline.stage import Stage, fail, run_stages
from pipeline.stages.invert import InvertStage, SharedCodec, evenly, groups, to_signed
from pipeline.stages.project import ProjectStage
from storage.layout import Lake
from tests.model.tiny_diffusion import tiny_diffusion

SIDE = 16


def plan(number: int, frames: int, caption: str = "") -> ClipPlan:
    window = Window(float(number), tuple(range(frames)), tuple(k / frames for k in range(frames)))
    seen = tuple(k % 2 == 0 or k == frames - 1 for k in range(frames))
    return ClipPlan(
        f"{number:016x}", "film", "a.mp4", "/a.mp4", 1, 1, caption or f"clip {number}", "id", window, 1.0, seen,
        "train", preview=False,
    )  # fmt: skip


def works(*counts: int) -> list[ClipWork]:
    """Clips of so many frames; each its own noise, moving."""
    made = []
    for number, frames in enumerate(counts):
        picture = np.random.default_rng(number).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
        made.append(ClipWork(plan(number, frames), frames=np.stack([np.roll(picture, k, 1) for k in range(frames)])))
    return made


def spec(folder: Path, **settings: Any) -> dict[str, Any]:
    fixed = {"ddim_steps": 10, "inversion_depth": 2, "refinements": 1}
    return {"kind": "diffusers", "source": str(folder), **fixed, **settings}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> SharedCodec:
    codec = SharedCodec(spec(tiny_diffusion(tmp_path_factory.mktemp("weights") / "tiny")))
    codec.load()
    return codec


class Counting(SharedCodec):
    """Another codec's work, with the size of each call to the encoder; `bad` raises where its frames are among them."""

    def __init__(self, codec: SharedCodec, bad: int | None = None, error: Exception | None = None) -> None:
        super().__init__(codec.spec)
        self._codec, self.bad, self.error = codec.load(), bad, error or ValueError("these frames are bad")
        self.encoded: list[int] = []

    def encode(self, frames: torch.Tensor, captions: Sequence[str]) -> Encoded:
        self.encoded.append(len(frames))
        if f"clip {self.bad}" in captions:
            raise self.error
        return super().encode(frames, captions)


def test_groups_follow_from_the_clips_alone() -> None:
    clips = works(3, 3, 3, 2, 9, 1, 1, 1)
    assert [[len(w.frames) for w in group if w.frames is not None] for group in groups(clips, 6)] == [
        [3, 3], [3, 2], [9], [1, 1, 1]
    ]  # fmt: skip
    clips[1] = fail(clips[1], "decode", "corrupt", "x")
    assert [len(group) for group in groups(clips, 6)] == [3, 1, 1, 3], "a failed clip takes no room"
    assert list(groups([])) == []


def test_what_comes_of_a_group_is_what_comes_of_its_clips(shared: SharedCodec) -> None:
    """Each clip has its own caption; the order and every figure of the certificate stay."""
    codec = Counting(shared)
    together = list(InvertStage(codec).process(works(4, 3, 5)))
    assert codec.encoded == [12]
    for work, one in zip(together, works(4, 3, 5), strict=True):
        (alone,) = InvertStage(shared).process([one])
        assert work.plan == alone.plan
        assert work.latents is not None
        assert alone.latents is not None
        assert np.abs(work.latents - alone.latents).mean() < 1.5e-4  # a unit in the last place
        together_row, alone_row = work.certificate.to_row(), alone.certificate.to_row()
        assert together_row.pop("method_used") == alone_row.pop("method_used") == ""
        for name, value in together_row.items():
            assert value == pytest.approx(alone_row[name], rel=2e-2, nan_ok=True), name
    (other,) = InvertStage(shared).process([dataclasses.replace(works(4)[0], plan=plan(0, 4, "other words"))])
    assert together[0].latents is not None
    assert other.latents is not None
    assert np.abs(together[0].latents - other.latents).mean() > 2e-4, "a caption matters, so they were not mixed"


def test_the_certificate(shared: SharedCodec) -> None:
    (work,) = InvertStage(shared).process(works(6))
    codec = shared.load()
    assert isinstance(codec, DiffusersCodec)
    frames = to_signed(works(6)[0].frames)
    found = codec.encode(frames, "clip 0")
    assert work.latents is not None
    decoded = codec.decode(torch.from_numpy(work.latents.astype(np.float32)), "clip 0")
    alone = codec.without_inversion(frames)
    expected = {
        "psnr_codec": pooled_psnr(decoded, frames), "ssim_codec": float(ssim(decoded, frames).mean()),
        "psnr_vae": pooled_psnr(alone, frames), "ssim_vae": float(ssim(alone, frames).mean()), "frames_certified": 6,
        "residual": float(found.residual.max()), "latent_round_trip": float(found.round_trip.min()),
    }  # fmt: skip
    row = work.certificate.to_row()
    assert {name: row[name] for name in expected} == pytest.approx(expected, rel=1e-3)
    flat = DiffusersCodec.from_pretrained(shared.spec["source"], DiffusersSettings(inversion_depth=0))
    torch.testing.assert_close(alone, flat.decode(flat.encode(frames).latents), atol=1e-4, rtol=0)
    assert work.certificate.residual > 0
    assert work.certificate.latent_round_trip > 20


def test_a_sample_of_the_frames_is_certified(shared: SharedCodec) -> None:
    assert evenly(9, 0).tolist() == list(range(9))
    assert evenly(9, 3).tolist() == [0, 4, 8]
    assert evenly(2, 3).tolist() == [0, 1]
    stages: list[Stage] = [InvertStage(shared, 2), ProjectStage(shared, 6, "cubic", 2)]
    (work,) = stages[1].process(stages[0].process(works(6)))
    assert work.certificate.frames_certified == 2
    (whole,) = InvertStage(shared).process(works(6))
    of_all = pytest.approx(whole.certificate.latent_round_trip, rel=1e-3)
    assert work.certificate.latent_round_trip == of_all, "of all frames anyway"
    assert work.latents is not None
    frames = to_signed(works(6)[0].frames)[[0, 5]]
    assert work.certificate.psnr_codec == pytest.approx(
        pooled_psnr(shared.decode(work.latents[[0, 5]], "clip 0"), frames), rel=1e-3
    )


def test_a_bad_clip_costs_itself(shared: SharedCodec, caplog: pytest.LogCaptureFixture) -> None:
    codec = Counting(shared, bad=1)
    with caplog.at_level(logging.WARNING):
        done = list(InvertStage(codec).process(works(2, 2, 2)))
    assert codec.encoded == [6, 2, 2, 2]
    assert [work.failure is None for work in done] == [True, False, True]
    assert done[1].failure is not None
    assert (done[1].failure.stage, done[1].failure.reason) == ("invert", "invert_failed")
    assert done[1].failure.detail == "ValueError: these frames are bad"
    assert done[1].latents is None
    assert "3 clips are encoded one by one, together they gave ValueError: these frames are bad" in caplog.text
    good = list(InvertStage(shared).process(works(2, 2, 2)))
    for place in (0, 2):
        np.testing.assert_allclose(done[place].latents, good[place].latents, atol=2e-3)  # type: ignore[arg-type]


def test_frames_that_are_no_bytes_are_refused(shared: SharedCodec) -> None:
    """Floats could be in any range, and could hold NaN: nothing is guessed, and nothing is stored."""
    clips = works(2, 2, 2)
    poisoned = works(2)[0].frames.astype(np.float32) / 255  # type: ignore[union-attr]
    poisoned[0, 0, 0, 0] = math.nan
    clips[1].frames = poisoned
    done = list(InvertStage(shared).process(clips))
    assert [work.latents is not None for work in done] == [True, False, True]
    assert done[1].failure is not None
    assert done[1].failure.detail == (
        "TypeError: frames are of type float32, the codec's stage takes uint8 from 0 to 255: correct what decoded them"
    )


def test_a_noise_predictor_that_gives_nan_poisons_nothing(shared: SharedCodec) -> None:
    codec = SharedCodec(shared.spec)
    loaded = codec.load()
    assert isinstance(loaded, DiffusersCodec)
    loaded._networks.unet.conv_out.bias.fill_(math.nan)
    done = list(InvertStage(codec).process(works(2, 2)))
    assert [work.latents for work in done] == [None, None]
    for work in done:
        assert work.failure is not None
        assert work.failure.reason == "invert_failed"
        assert "hold NaN or infinity: the noise predictor diverged there; run it in float32" in work.failure.detail


def test_a_decoder_that_gives_nan_is_found(shared: SharedCodec) -> None:
    codec = SharedCodec({**shared.spec, "inversion_depth": 0})
    loaded = codec.load()
    assert isinstance(loaded, DiffusersCodec)
    loaded._networks.vae.decoder.conv_out.bias.fill_(math.nan)
    done = list(InvertStage(codec).process(works(2, 2)))
    assert {work.failure.reason for work in done if work.failure is not None} == {"not_finite"}
    assert all(work.failure and "decode to frames that are not finite" in work.failure.detail for work in done)


def test_out_of_memory_halves_the_batch(shared: SharedCodec, caplog: pytest.LogCaptureFixture) -> None:
    """A real codec whose UNet has room for three frames: the clips are done, in smaller batches."""
    codec = SharedCodec(shared.spec)
    loaded = codec.load()
    assert isinstance(loaded, DiffusersCodec)
    sizes: list[int] = []

    def small(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        sizes.append(len(inputs[0]))
        if len(inputs[0]) > 3:
            raise torch.OutOfMemoryError("no room")

    loaded._networks.unet.register_forward_pre_hook(small)
    with caplog.at_level(logging.WARNING):
        done = list(InvertStage(codec).process(works(5, 4)))
    assert all(work.failure is None for work in done)
    assert max(sizes) == 9
    assert "out of memory: the batch is halved to" in caplog.text
    for work, one in zip(done, InvertStage(shared).process(works(5, 4)), strict=True):
        np.testing.assert_allclose(work.latents, one.latents, atol=2e-3)  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [(18, 16), (16, 12)])
def test_a_size_that_does_not_divide_is_refused_before_anything_is_decoded(
    shared: SharedCodec, tmp_path: Path, size: tuple[int, int]
) -> None:
    """4 pixels a latent, and the UNet halves those once: sides must divide by 8."""
    recipe = dataclasses.replace(demo(), size=size, codec=shared.spec)
    told = f"frames of {size[0]} x {size[1]} pixels .* do not divide into blocks of 8: .*the recipe's `size`"
    with pytest.raises(ValueError, match=told):
        BlockWorker(Lake.create(tmp_path / "lake"), recipe, "f" * 64).setup()


class Frames:
    """A stage in decoding's place."""

    name = "decode"
    resources = InvertStage(SharedCodec({"kind": "linear"})).resources

    def setup(self) -> None: ...

    def teardown(self) -> None: ...

    def process(self, stream: Any) -> Any:
        for work in stream:
            number = int(work.plan.clip_id, 16)
            count = len(work.plan.observed)
            if number == 3:
                yield fail(work, self.name, "corrupt", "x")
            else:
                yield dataclasses.replace(work, frames=works(*[1] * number, count)[number].frames)


@pytest.mark.bit_identical
@pytest.mark.parametrize("kind", ["linear", "diffusers"])
def test_decoding_ahead_changes_no_byte(shared: SharedCodec, kind: str) -> None:
    codec = shared if kind == "diffusers" else SharedCodec({"kind": "linear", "factor": 4, "channels": 12})
    stages: list[Stage] = [Frames(), InvertStage(codec), ProjectStage(codec, 8, "cubic")]
    frames = 20 if kind == "linear" else 3  # 64 frames are a group
    plans = [plan(number, frames + number % 3) for number in range(6)]
    one, _ = run_stages(stages, plans, ahead=0)
    for ahead in (1, 5):
        other, clock = run_stages(stages, plans, ahead)
        assert set(clock) == {"decode", "invert", "project"}
        for a, b in zip(one, other, strict=True):
            assert (a.plan, a.failure) == (b.plan, b.failure)
            assert repr(a.certificate) == repr(b.certificate)
            if a.failure is None:
                assert a.latents is not None
                assert b.latents is not None
                assert a.coefficients is not None
                assert b.coefficients is not None
                assert a.latents.tobytes() == b.latents.tobytes()
                assert a.coefficients.tobytes() == b.coefficients.tobytes()
    assert [work.failure is None for work in one] == [number != 3 for number in range(6)]
