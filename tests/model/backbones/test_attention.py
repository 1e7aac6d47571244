"""Self-attention over frames: masks, rate tokens, finished frames, the cache, and the count of pairs."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from model.backbones.attention import FrameCache, attention_mask, count_pairs
from model.backbones.blocks import LOG_RATE_LEAST, LOG_RATE_MOST
from model.backbones.conditioning import Conditioning
from model.backbones.dit import Backbone, BackboneConfig

PLAIN = BackboneConfig(
    channels=3, height=4, width_latent=6, text_dim=10, width=32, depth=2, heads=2, patch=2, outputs=("velocity",),
    temporal=True,
)  # fmt: skip
RATES = dataclasses.replace(PLAIN, rates=True)
COUNTED = dataclasses.replace(RATES, frame_count=True)
BATCH, FRAMES = 2, 5


def backbone(config: BackboneConfig) -> Backbone:
    """One whose weights are all away from zero, as after training."""
    torch.manual_seed(0)
    made = Backbone(config)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return made.eval()


def inputs(frames: int = FRAMES) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(3)
    return {
        "latents": torch.randn(BATCH, frames, 3, 4, 6, generator=draw),
        "flow_time": torch.rand(BATCH, frames, generator=draw),
        "given": Conditioning(
            text=torch.randn(BATCH, 5, 10, generator=draw),
            text_length=torch.tensor([5, 3]),
            clip_start=torch.ones(BATCH),
            start_given=torch.ones(BATCH),
            log_duration=torch.zeros(BATCH),
            context=torch.randn(BATCH, frames, 3, 4, 6, generator=draw),
            context_given=torch.rand(BATCH, frames, generator=draw) < 0.5,
        ),
        "frame_time": torch.rand(BATCH, frames, generator=draw),
    }


def chosen(values: dict[str, Any], at: Tensor) -> dict[str, Any]:
    """The frames `at` (B, A) of the inputs."""

    def of(value: Tensor) -> Tensor:
        return torch.stack([row[index] for row, index in zip(value, at, strict=True)])

    given = values["given"]
    given = dataclasses.replace(given, context=of(given.context), context_given=of(given.context_given))
    return {**{name: of(values[name]) for name in ("latents", "flow_time", "frame_time")}, "given": given}


def test_masks_are_what_they_say() -> None:
    assert attention_mask(3, 2, None, False, torch.device("cpu")) is None
    valid = torch.tensor([[True, False, True]])
    mask = attention_mask(3, 2, valid, True, torch.device("cpu"))
    assert mask is not None
    assert mask.shape == (1, 1, 6, 6)
    frames = mask[0, 0, ::2, ::2].tolist()
    assert frames == [[True, False, False], [True, True, False], [True, False, True]]
    assert torch.equal(mask[0, 0, ::2, ::2], mask[0, 0, 1::2, 1::2])


def test_rates_add_a_token_and_a_head_and_change_no_name() -> None:
    plain, rates = Backbone(PLAIN), Backbone(RATES)
    added = set(rates.state_dict()) - set(plain.state_dict())
    assert added == {"rate_token", *(f"rate_head.{name}" for name in (
        "first.weight", "first.bias", "norm.weight", "last.weight", "last.bias"))}  # fmt: skip
    assert set(plain.state_dict()) <= set(rates.state_dict())
    assert (PLAIN.sequence, RATES.sequence) == (PLAIN.tokens, PLAIN.tokens + 1)
    assert set(plain(**inputs())) == {"velocity"}
    found = rates(**inputs())
    assert found["log_rate"].shape == (BATCH, FRAMES)
    assert not found["log_rate"].any(), "the last layer starts at zero"


def test_a_rate_reads_its_frame_and_its_neighbours_and_every_parameter_learns() -> None:
    rates, values = backbone(RATES), inputs()
    before = rates(**values)
    assert before["log_rate"].std() > 1e-3
    changed = {**values, "latents": values["latents"].clone()}
    changed["latents"][0, 1] += 1
    after = rates(**changed)
    moved = (before["log_rate"] - after["log_rate"]).detach().abs()
    assert moved[0].min() > 1e-6
    assert not moved[1].any()
    (before["velocity"].square().mean() + before["log_rate"].exp().mean()).backward()
    assert [name for name, value in rates.named_parameters() if value.grad is None or not value.grad.any()] == []


def test_rate_tokens_may_be_told_how_many_frames_there_are() -> None:
    """Frames without any content of their own are told apart from fewer of them by the count alone."""
    counted = backbone(COUNTED)
    assert {name.split(".")[0] for name in counted.state_dict().keys() - backbone(RATES).state_dict().keys()} == {
        "frame_count"
    }
    with torch.no_grad():
        counted.embed_latents.weight.zero_()
        counted.embed_context.weight.zero_()
        alike = {**inputs(), "flow_time": torch.zeros(BATCH, FRAMES), "frame_time": torch.zeros(BATCH, FRAMES)}
        alike["given"] = dataclasses.replace(alike["given"], context_given=torch.zeros(BATCH, FRAMES, dtype=torch.bool))
        rates = [
            counted(**alike, valid=torch.arange(FRAMES).expand(BATCH, -1) < n)["log_rate"][:, 0] for n in (3, 4, 5)
        ]
        torch.testing.assert_close(counted(**alike)["log_rate"][:, 0], rates[2])
        assert all(float((one - other).abs().min()) > 1e-4 for one, other in itertools.pairwise(rates))
        assert counted.frame_count is not None
        counted.frame_count.second.weight.zero_()
        same = [counted(**alike, valid=torch.arange(FRAMES).expand(BATCH, -1) < n)["log_rate"][:, 0] for n in (3, 5)]
        torch.testing.assert_close(*same)


@torch.no_grad()
def test_the_count_of_frames_includes_those_that_a_cache_holds() -> None:
    network = backbone(dataclasses.replace(COUNTED, depth=1))  # one block: its keys do not depend on who attends
    values, cache = inputs(), FrameCache(FRAMES)
    every = torch.arange(FRAMES).expand(BATCH, -1)
    whole = network(**values, cache=cache, place=every, keep=every < 2)
    torch.testing.assert_close(whole, network(**values))
    rest = torch.tensor([[2, 3, 4]]).expand(BATCH, -1)
    found = network(**chosen(values, rest), cache=cache, place=rest, keep=torch.zeros_like(rest, dtype=torch.bool))
    for name, value in found.items():
        torch.testing.assert_close(value, whole[name][:, 2:])


def test_a_rate_is_clamped_and_stays_not_finite() -> None:
    rates = backbone(RATES)
    assert rates.rate_head is not None
    with torch.no_grad():
        rates.rate_head.last.bias.fill_(100.0)
        assert (rates(**inputs())["log_rate"] == LOG_RATE_MOST).all()
        rates.rate_head.last.bias.fill_(-100.0)
        assert (rates(**inputs())["log_rate"] == LOG_RATE_LEAST).all()
        rates.rate_head.last.bias.fill_(float("nan"))
        assert rates(**inputs())["log_rate"].isnan().all()


def test_under_autocast_rates_are_float32() -> None:
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert backbone(RATES)(**inputs())["log_rate"].dtype == torch.float32


FINISHED = torch.tensor([[True, False, True, False, False], [False, False, False, True, False]])
VALID = torch.tensor([[True] * 5, [True] * 4 + [False]])


@pytest.mark.parametrize("config", [PLAIN, RATES, COUNTED], ids=["plain", "rates", "counted"])
@pytest.mark.parametrize("valid", [None, VALID], ids=["whole", "padded"])
def test_finished_frames_are_keys_and_see_themselves_alone(config: BackboneConfig, valid: Tensor | None) -> None:
    """Training, by a mask, and sampling, which compares no query of them with others, agree."""
    network, values = backbone(config), inputs()
    by_mask = network(**values, valid=valid, finished=FINISHED)
    with torch.no_grad():
        gathered = network(**values, valid=valid, finished=FINISHED)
    real = torch.ones(BATCH, FRAMES, dtype=torch.bool) if valid is None else valid
    for name, value in by_mask.items():
        torch.testing.assert_close(value[real], gathered[name][real])
    changed = {**values, "latents": values["latents"].clone()}
    changed["latents"][:, 1] += 1
    after = network(**changed, valid=valid, finished=FINISHED)["velocity"]
    moved = (after - by_mask["velocity"]).detach().abs().flatten(2).amax(2)
    assert not moved[0, [0, 2]].any(), "finished: nothing of another frame is read"
    assert moved[0, [1, 3, 4]].min() > 1e-5
    changed = {**values, "latents": values["latents"].clone()}
    changed["latents"][0, 0] += 1
    after = network(**changed, valid=valid, finished=FINISHED)["velocity"]
    assert float((after[0, 3] - by_mask["velocity"][0, 3]).detach().abs().max()) > 1e-5, "they are keys for the others"


def test_no_frame_finished_is_attention_of_all() -> None:
    network, values = backbone(RATES), inputs()
    for context in (torch.enable_grad, torch.no_grad):
        with context():
            none = network(**values, finished=torch.zeros(BATCH, FRAMES, dtype=torch.bool))
            torch.testing.assert_close(none, network(**values))


@pytest.mark.parametrize("config", [PLAIN, RATES], ids=["plain", "rates"])
@torch.no_grad()
def test_causal_frames_from_a_cache_equal_the_whole_sequence(config: BackboneConfig) -> None:
    """As the autoregressive sampler goes: noisy calls of a frame leave nothing, its clean one stays."""
    network, values = backbone(config), inputs()
    whole = network(**values, causal=True)
    cache = FrameCache(FRAMES)
    for frame in range(FRAMES):
        at = torch.full((BATCH, 1), frame)
        now = chosen(values, at)
        noisy = {**now, "latents": torch.randn_like(now["latents"]), "flow_time": torch.zeros(BATCH, 1)}
        kept = torch.ones(BATCH, 1, dtype=torch.bool)
        network(**noisy, causal=True, cache=cache, place=at, keep=~kept)
        found = network(**now, causal=True, cache=cache, place=at, keep=kept)
        for name, value in found.items():
            torch.testing.assert_close(value[:, 0], whole[name][:, frame], msg=f"{name} of frame {frame}")


@torch.no_grad()
def test_a_cache_has_ragged_frames_at_their_places() -> None:
    """Frames of a first call stay where they were kept, at other places in each clip; a call of the others, padded to
    the same number, sees them as one call over one block of attention would."""
    network = backbone(dataclasses.replace(RATES, depth=1))  # one block: its keys do not depend on who attends
    values = inputs()
    whole = network(**values)
    kept = torch.tensor([[0, 3, 1], [2, 0, 0]])
    valid = torch.tensor([[True, True, True], [True, False, False]])
    cache = FrameCache(FRAMES)
    network(**chosen(values, kept), valid=valid, cache=cache, place=kept, keep=valid)
    assert cache.held[:, 1:].tolist() == [[True, True, False, True, False], [False, False, True, False, False]]
    rest, there = torch.tensor([[2, 4, 0, 0], [0, 1, 3, 4]]), torch.tensor([[True, True, False, False], [True] * 4])
    for _ in range(2):  # the same again: what was not kept left nothing
        found = network(**chosen(values, rest), valid=there, cache=cache, place=rest, keep=torch.zeros_like(there))
        for clip in range(BATCH):
            for name, value in found.items():
                expected = whole[name][clip, rest[clip][there[clip]]]
                torch.testing.assert_close(value[clip][there[clip]], expected, msg=f"{name} of clip {clip}")


def test_a_cache_says_what_it_wants() -> None:
    network, values = backbone(PLAIN), inputs()
    place, keep = torch.arange(FRAMES).expand(BATCH, -1), torch.ones(BATCH, FRAMES, dtype=torch.bool)
    with pytest.raises(ValueError, match="a cache wants place and keep, and no finished"):
        network(**values, cache=FrameCache(FRAMES), place=place)
    with pytest.raises(ValueError, match="a cache wants place and keep, and no finished"):
        network(**values, cache=FrameCache(FRAMES), place=place, keep=keep, finished=keep)
    with torch.no_grad(), pytest.raises(ValueError, match="place 4 of a cache for 3; make it larger"):
        network(**values, cache=FrameCache(3), place=place, keep=keep)
    with pytest.raises(ValueError, match="frames is 0; a cache needs a place for at least 1"):
        FrameCache(0)


@torch.no_grad()
def test_pairs_are_counted_from_the_masks() -> None:
    network, values, size = backbone(RATES), inputs(), RATES.sequence
    with count_pairs(network) as count:
        network(**values)
        assert count.total() == BATCH * (FRAMES * size) ** 2
        network(**values)
        assert count.total() == 2 * BATCH * (FRAMES * size) ** 2
    assert network.pair_count is None
    with count_pairs(network) as count:
        network(**values, valid=VALID)
    assert count.total() == (5 * size) ** 2 + (4 * size) ** 2, "padding is neither query nor key"
    with count_pairs(network) as count:
        network(**values, causal=True)
    assert count.total() == BATCH * size**2 * FRAMES * (FRAMES + 1) // 2
    tokens, counted = RATES.tokens, {}
    for way, context in (("mask", torch.enable_grad), ("gathered", torch.no_grad)):
        with context(), count_pairs(network) as count:
            network(**values, finished=FINISHED)
        counted[way] = count.total()
    # Three active frames see all five, two finished ones themselves; the other clip has four and one. Rates see all.
    active = (3 + 4) * tokens * 5 * size
    assert counted["mask"] == counted["gathered"] == active + (2 + 1) * tokens * tokens + 10 * 5 * size
    cache, keep = FrameCache(FRAMES), torch.ones(BATCH, 2, dtype=torch.bool)
    with count_pairs(network) as count:
        at = torch.tensor([[0, 1]] * BATCH)
        network(**chosen(values, at), cache=cache, place=at, keep=keep)
        first = count.total()
        at = torch.tensor([[2]] * BATCH)
        network(**chosen(values, at), cache=cache, place=at, keep=keep[:, :1])
    assert first == BATCH * (2 * size) ** 2
    assert count.total() - first == BATCH * size * 3 * size
