"""Full-sequence flow matching: one time for all frames, masked batches, given frames, samples of a given length."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from model.backbones.attention import count_pairs
from model.methods.draws import Draws
from model.methods.full import Full, FullOptions
from model.methods.sequences import SequenceSampling
from tests.model.methods.growth import NO_CONTEXT, backbone, batch, request

FIGURES = {"latent_scale": 1.7, "shortest": 4.0, "longest": 6.0}


def full(**options: Any) -> Full:
    return Full.build(FullOptions(**{**NO_CONTEXT, **options}), FIGURES, {})


class Noted(torch.nn.Module):
    """Answers with zeros, and notes what it is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[dict[str, Any]] = []

    def forward(self, latents: torch.Tensor, flow_time: torch.Tensor, told: Any, **more: Any) -> Any:
        self.asked.append({"latents": latents, "time": 1 + 4 * flow_time, "told": told, **more})
        return {"velocity": torch.zeros_like(latents)}


def test_all_frames_of_a_clip_have_one_time_and_padding_does_not_count() -> None:
    clips, network = batch([4, 6, 5]), Noted()
    found = full().loss(network, clips, Draws(3, 3))
    (asked,) = network.asked
    valid, time = clips.part("valid"), asked["time"]
    assert torch.equal(asked["valid"], valid)
    torch.testing.assert_close(time, time[:, :1].expand(-1, 6))
    assert len(time[:, 0].unique()) == 3
    # x_t = (1 - t) e + t x, so the noise can be read off it, and with it the target x - e.
    clean = clips.part("latents") / 1.7
    wide = time[..., None, None, None]
    target = clean - (asked["latents"] - wide * clean) / (1 - wide)
    assert float(found["loss"]) == pytest.approx(float(target.square().mean((2, 3, 4))[valid].mean()), rel=1e-4)
    assert torch.equal(~found["place"].isnan(), valid)
    assert float(found["errors"][valid].mean()) == pytest.approx(float(found["loss"]), rel=1e-5)


def test_given_frames_are_clean_and_out_of_the_loss() -> None:
    clips, network = batch([6] * 8), Noted()
    found = full(context_ends=1.0, context_dropout=0.0, context_noise=0.0).loss(network, clips, Draws(3, 8))
    (asked,) = network.asked
    given, clean = asked["told"].context_given, clips.part("latents") / 1.7
    assert bool((given[:, 0] & given[:, 5]).all())
    torch.testing.assert_close(asked["latents"][given], clean[given])
    assert bool((asked["time"][given] == 1).all())
    assert torch.equal(found["place"].isnan(), given)


def test_samples_have_the_length_asked_for_and_their_given_frames() -> None:
    frames = torch.randn(2, 2, 2, 2, 2, generator=torch.Generator().manual_seed(1))
    asked = request(
        SequenceSampling(steps=5, length=7), 2, frames=frames, given=torch.tensor([[True, True], [True, False]])
    )
    made = full().sample(backbone(rates=False), asked)
    assert [len(clip) for clip in made.clips] == [7, 7]
    assert torch.equal(made.clips[0][[0, 6]], frames[0])
    assert torch.equal(made.clips[1][0], frames[1, 0])
    assert made.inserted[1].isnan().tolist() == [True] + [False] * 6
    assert made.network_calls == 5
    assert len(full().sample(backbone(rates=False), request(SequenceSampling(steps=2))).clips[0]) == 6
    with pytest.raises(ValueError, match="2 frames are given for a length of 1"):
        full().sample(backbone(rates=False), dataclasses.replace(asked, settings=SequenceSampling(length=1)))


def test_the_cost_of_sampling_is_the_unit_of_the_others() -> None:
    network = backbone(rates=False)
    with count_pairs(network) as count:
        full().sample(network, request(SequenceSampling(steps=5, length=7), 2))
    assert count.total() == 2 * 5 * (7 * network.config.tokens) ** 2
