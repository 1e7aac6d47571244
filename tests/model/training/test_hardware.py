"""The peak of a device, and the work of a clip, which the MFU is made of."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from model.methods.vlfm import VLFMOptions
from model.recipes import TrainRecipe
from model.training.hardware import flops_per_clip, peak, seconds_at_peak
from model.training.record import DatasetVersion, RunRecord
from tests.bench.sizes import TEXT, published_config, work_of


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("NVIDIA H200", 989e12), ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12), ("NVIDIA L4", 121e12), ("NVIDIA L40S", 362e12),
        ("NVIDIA GeForce RTX 4090", 165e12), ("NVIDIA L40", None), ("Quadro of 2031", None),
    ],
)  # fmt: skip
def test_the_peak_is_of_the_named_device_or_unknown(name: str, expected: float | None) -> None:
    assert peak(name, "bfloat16") == expected
    assert peak(name, "float64") is None


def record(method: str = "vlfm", times: int = 1, **options: object) -> RunRecord:
    config = published_config("S/8")
    clip = {"order": 6, "latent_shape": [4, 32, 32], "frames_max": 8, "frames_observed_max": 4, "duration": 2.0}
    recipe = TrainRecipe(name="s", method=method, options=VLFMOptions(times_per_clip=times, **options))  # type: ignore[arg-type]
    figures = {"mean_scale": 1.0, "derivative_scale": 1.0}
    config = dataclasses.replace(config, temporal=options.get("anchor") == "ends")
    text = {"dim": TEXT[1], "length": TEXT[0]}
    return RunRecord(recipe, figures, config, clip, {}, text, DatasetVersion(1, "", ""))


def test_the_work_of_a_clip_is_three_forward_passes_of_its_states() -> None:
    forward = 2e9 * work_of(published_config("S/8")).gmac
    one = flops_per_clip(record())
    assert 2.7 * forward < one < 3 * forward, "the inputs need no gradient"
    assert 2 * one < flops_per_clip(record(times=4)) < 4 * one, "a caption is read once for all states of its clip"
    assert flops_per_clip(record("per_frame", times=4)) == 4 * one
    assert one < flops_per_clip(record(anchor="ends")) < 4 * one, "a state has two frames"


def test_the_cpu_has_no_peak() -> None:
    assert seconds_at_peak(record(), torch.device("cpu"), 1) is None
