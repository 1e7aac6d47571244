"""Autoregressive flow matching: one frame after the clean ones before it, and a cache that is exact."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from model.backbones.attention import count_pairs
from model.methods.autoregressive import Autoregressive, AutoregressiveOptions, AutoregressiveSampling
from model.methods.draws import Draws
from tests.model.methods.growth import backbone, batch, request
from tests.model.methods.test_full import Noted

FIGURES = {"latent_scale": 1.7, "shortest": 4.0, "longest": 6.0}
METHOD = Autoregressive.build(AutoregressiveOptions(), FIGURES, {})


def test_one_frame_is_learned_after_a_uniform_number_of_clean_ones() -> None:
    clips, network = batch([6] * 600), Noted()
    found = METHOD.loss(network, clips, Draws(3, 600))
    (asked,) = network.asked
    assert asked["causal"] is True
    number = asked["valid"].sum(1)  # of frames seen, the noisy one last
    shares = torch.bincount(number, minlength=7)[1:] / 600
    assert bool(((shares - 1 / 6).abs() < 0.06).all())
    clean, rows = clips.part("latents") / 1.7, torch.arange(600)
    before = asked["valid"].clone()
    before[rows, number - 1] = False
    torch.testing.assert_close(asked["latents"][before], clean[before])
    assert bool((asked["time"][before] == 1).all())
    time = asked["time"][rows, number - 1]
    assert bool(((time > 0) & (time < 1)).all())
    wide = time[:, None, None, None]
    seen, wanted = asked["latents"][rows, number - 1], clean[rows, number - 1]
    target = wanted - (seen - wide * wanted) / (1 - wide)
    assert float(found["loss"]) == pytest.approx(float(target.square().mean()), rel=1e-3)
    assert bool(((~found["place"].isnan()).sum(1) == 1).all())


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_the_cache_is_exact_and_cheaper(guidance: float) -> None:
    network, found, counted = backbone(rates=False), {}, {}
    for cache in (True, False):
        asked = request(AutoregressiveSampling(steps=4, length=8, guidance=guidance, cache=cache), 2)
        with count_pairs(network) as count:
            found[cache] = METHOD.sample(network, asked)
        counted[cache] = count.total() / (2 * 4 * (8 * network.config.tokens) ** 2)
    for with_cache, without in zip(found[True].clips, found[False].clips, strict=True):
        torch.testing.assert_close(with_cache, without, rtol=1e-4, atol=1e-5)
    print(counted)
    sides = 1 if guidance == 1 else 2
    # Denoising frame j takes 4 steps against j frames, and one call keeps its keys.
    assert counted[True] == pytest.approx(sides * sum((4 + (j < 8)) * j for j in range(1, 9)) / (4 * 64))


def test_the_printed_bound_of_the_cost_without_a_cache_is_a_lower_one() -> None:
    """Printed: sum of j^2 over n frames <= n^3 / 3. It is more, whatever n."""
    for n in (1, 2, 10, 145):
        assert sum(j**2 for j in range(1, n + 1)) > n**3 / 3


def test_given_frames_come_first_and_come_back_unchanged() -> None:
    frames = torch.randn(2, 3, 2, 2, 2, generator=torch.Generator().manual_seed(1))
    given = torch.tensor([[True, True, True], [True, False, False]])
    asked = request(AutoregressiveSampling(steps=3, open_end=True), 2, frames=frames, given=given)
    made = METHOD.sample(backbone(rates=False), asked)
    assert torch.equal(made.clips[0][:3], frames[0])
    assert torch.equal(made.clips[1][:1], frames[1, :1])
    assert [len(clip) for clip in made.clips] == [6, 6]
    assert made.inserted[0].isnan().tolist() == [True] * 3 + [False] * 3
    assert made.inserted[0][3:].tolist() == [0, 1, 2]
    told: dict[str, Any] = {"length": 2}
    for settings, words in (({**told, "open_end": True}, "3 frames are given for a length of 2"), ({}, "--open-end")):
        with pytest.raises(ValueError, match=words):
            METHOD.sample(
                backbone(rates=False), dataclasses.replace(asked, settings=AutoregressiveSampling(**settings))
            )
