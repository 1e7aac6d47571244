"""The convolutions around the blocks: that they start as nothing, learn, and keep what the transformer promises."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from model.backbones.dit import Backbone, BackboneConfig
from model.backbones.stem import ConvolutionBlock
from tests.model.backbones.test_dit import CONFIG, differs, given, latents

STEM = dataclasses.replace(CONFIG, stem=16, stem_depth=1)


@pytest.fixture(scope="module")
def awake() -> Backbone:
    """A backbone whose gates, heads and inputs are all away from zero, as after training."""
    torch.manual_seed(0)
    backbone = Backbone(STEM)
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return backbone.eval()


@pytest.mark.parametrize("frames", [1, 3])
def test_shapes_and_zero_at_the_start(frames: int, awake: Backbone) -> None:
    x, r = latents(frames)
    for out in Backbone(STEM)(x, r, given()).values():
        assert out.shape == x.shape
        assert not out.any()
    assert all(out.shape == x.shape for out in awake(x, r, given()).values())


def test_every_parameter_learns(awake: Backbone) -> None:
    x, r = latents(3)
    awake.zero_grad()
    sum(value.square().mean() for value in awake(x, r, given()).values()).backward()
    assert [name for name, value in awake.named_parameters() if value.grad is None or not value.grad.any()] == []


def test_given_frames_count_only_where_they_are_given(awake: Backbone) -> None:
    x, r = latents()
    other = awake(x, r, given(context=given().context + 1))
    assert differs(awake(x, r, given()), other, 0) > 1e-4
    assert differs(awake(x, r, given()), other, 1) == 0
    assert not Backbone(STEM).stem.context.weight.any()


def test_clips_do_not_see_each_other_and_frames_see_each_other_through_the_transformer(awake: Backbone) -> None:
    x, r = latents(3)
    changed = x.clone()
    changed[0, 2] += 1
    before, after = awake(x, r, given())["mean"], awake(changed, r, given())["mean"]
    # Convolutions of one batch may differ in the last bit from those of another.
    assert float((before[1] - after[1]).detach().abs().max()) < 1e-6
    assert float((before[0, 0] - after[0, 0]).detach().abs().max()) > 1e-4


def test_a_block_does_the_same_at_every_place() -> None:
    torch.manual_seed(0)
    block = ConvolutionBlock(8, 4).eval()
    x, condition = torch.zeros(1, 8, 12, 12), torch.randn(1, 4)
    x[:, :, 4, 4] = torch.randn(8)
    here, there = block(x, condition), block(x.roll((2, 3), (2, 3)), condition)
    torch.testing.assert_close(here.roll((2, 3), (2, 3))[:, :, 4:9, 5:10], there[:, :, 4:9, 5:10])


def test_a_backbone_with_a_stem_is_saved_and_comes_back(awake: Backbone, tmp_path: Path) -> None:
    awake.save_pretrained(tmp_path)
    again = Backbone.from_pretrained(tmp_path)
    assert again.config == STEM
    assert differs(awake(*latents(), given()), again(*latents(), given()), 0) == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stem": 12}, "stem is 12; it must be a multiple of 8, or 0 for none"),
        ({"stem": -8}, "stem is -8; it must be at least 0"),
        ({"stem_depth": 0}, "stem_depth is 0; it must be at least 1"),
    ],
)
def test_stems_that_cannot_be_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **changes)


def test_a_config_of_before_has_no_stem() -> None:
    old = {name: value for name, value in CONFIG.to_json().items() if not name.startswith("stem")}
    assert BackboneConfig.from_json(old) == CONFIG
    assert not any(name.startswith(("stem", "leave_blocks")) for name in Backbone(CONFIG).state_dict())
