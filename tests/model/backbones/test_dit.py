"""The backbone: shapes, its start at zero, what it must not look at, and that all of it learns."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from model.backbones.conditioning import Conditioning
from model.backbones.dit import Backbone, BackboneConfig, Block, position_embedding

CONFIG = BackboneConfig(
    channels=3, height=4, width_latent=6, text_dim=10, width=32, depth=2, heads=2, patch=2
)  # fmt: skip
BATCH, WORDS = 2, 5


def given(**changes: torch.Tensor) -> Conditioning:
    """Two clips: one with its start and its first frame, one with neither."""
    draw = torch.Generator().manual_seed(1)
    return Conditioning(
        **{
            "text": torch.randn(BATCH, WORDS, 10, generator=draw),
            "text_length": torch.tensor([5, 3]),
            "clip_start": torch.tensor([1.0, 6.5]),
            "start_given": torch.tensor([1.0, 0.0]),
            "log_duration": torch.tensor([0.7, 0.7]),
            "context": torch.randn(BATCH, 1, 3, 4, 6, generator=draw),
            "context_given": torch.tensor([[True], [False]]),
            **changes,
        }
    )


def latents(frames: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(2)
    return torch.randn(BATCH, frames, 3, 4, 6, generator=draw), torch.rand(BATCH, frames, generator=draw)


@pytest.fixture(scope="module")
def awake() -> Backbone:
    """A backbone whose gates, heads and inputs are all away from zero, as after training."""
    torch.manual_seed(0)
    backbone = Backbone(CONFIG)
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return backbone.eval()


def differs(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], row: int) -> float:
    assert a.keys() == b.keys() == {"mean", "derivative"}
    return max(float((a[name][row] - b[name][row]).detach().abs().max()) for name in a)


@pytest.mark.parametrize("frames", [1, 3])
def test_shapes_and_zero_at_the_start(frames: int, awake: Backbone) -> None:
    x, r = latents(frames)
    for out in Backbone(CONFIG)(x, r, given()).values():
        assert out.shape == (BATCH, frames, 3, 4, 6)
        assert not out.any()
    mean, derivative = awake(x, r, given()).values()
    assert mean.shape == derivative.shape == x.shape
    assert mean.std() > 0.01
    assert not torch.equal(mean, derivative)


def test_rows_past_the_captions_end_are_not_read(awake: Backbone) -> None:
    x, r = latents()
    text = given().text.clone()
    text[1, 3:] = 1e3
    assert differs(awake(x, r, given()), awake(x, r, given(text=text)), 1) < 1e-6
    text[1, 2, 0] += 1
    assert differs(awake(x, r, given()), awake(x, r, given(text=text)), 1) > 1e-4


def test_more_padding_changes_nothing(awake: Backbone) -> None:
    x, r = latents()
    padded = torch.nn.functional.pad(given().text, (0, 0, 0, 4), value=7.0)
    assert differs(awake(x, r, given()), awake(x, r, given(text=padded)), 0) < 1e-5


class Masks(TorchFunctionMode):
    """The masks of all attention inside."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is functional.scaled_dot_product_attention:
            assert len(args) == 3
            self.seen.append((kwargs or {}).get("attn_mask"))
        return func(*args, **(kwargs or {}))


def filled(awake: Backbone, rows: int) -> Backbone:
    """A backbone of the same weights that fills captions up to so many rows."""
    backbone = Backbone(dataclasses.replace(CONFIG, caption_rows=rows)).eval()
    backbone.load_state_dict(awake.state_dict())
    return backbone


def test_captions_that_are_filled_up_need_no_mask(awake: Backbone) -> None:
    x, r = latents()
    for backbone, masks in ((awake, CONFIG.depth), (filled(awake, 9), 0)):
        with Masks() as called:
            loss = backbone(x, r, given())["mean"].square().mean()
        assert len(called.seen) == 2 * CONFIG.depth, "a block attends to its tokens and to the caption"
        assert sum(mask is not None for mask in called.seen) == masks
        loss.backward()
    with pytest.raises(ValueError, match="captions have 5 rows; the backbone takes at most 4"):
        filled(awake, 4)(x, r, given())


def test_a_caption_that_is_filled_up_does_not_depend_on_its_batch(awake: Backbone) -> None:
    x, r = latents()
    backbone = filled(awake, 9)
    before = backbone(x, r, given())
    assert differs(before, awake(x, r, given()), 0) > 1e-4, "its rows of zeros are seen"
    wider = functional.pad(given().text, (0, 0, 0, 3), value=7.0)
    wider[1, 3:] = 1e3
    assert differs(before, backbone(x, r, given(text=wider)), 0) == 0
    assert differs(before, backbone(x, r, given(text=wider)), 1) == 0


def test_cross_attention_over_filled_up_captions_against_a_slow_reference(awake: Backbone) -> None:
    """float64, a head and a query at a time: a row of zeros is a key like others, with its weight in the softmax."""
    cross = filled(awake, 9).double().blocks[0].cross
    draw = torch.Generator().manual_seed(3)
    tokens = torch.randn(BATCH, 1, 6, 32, generator=draw, dtype=torch.float64)
    told = given(text=given().text.double())
    text, words = told.captions(9)
    assert words is None
    assert text.shape == (BATCH, 9, 10)
    assert not text[0, 5:].any()
    assert not text[1, 3:].any()
    text = text @ torch.randn(10, 32, generator=draw, dtype=torch.float64)  # zeros stay zeros
    with torch.no_grad():
        found = cross(tokens, text, None)
        q, (k, v) = cross.query(tokens), cross.key_value(text).chunk(2, -1)
        for clip in range(BATCH):
            for place in range(6):
                mixed = []
                for head in (slice(0, 16), slice(16, 32)):
                    scores = (k[clip, :, head] @ q[clip, 0, place, head] / 4).exp()
                    mixed.append((scores[:, None] * v[clip, :, head]).sum(0) / scores.sum())
                torch.testing.assert_close(found[clip, 0, place], cross.out(torch.cat(mixed)), rtol=1e-12, atol=1e-12)


def test_clip_start_counts_only_where_it_is_given(awake: Backbone) -> None:
    x, r = latents()
    moved = awake(x, r, given(clip_start=torch.tensor([3.0, 3.0])))
    assert differs(awake(x, r, given()), moved, 0) > 1e-4
    assert differs(awake(x, r, given()), moved, 1) == 0


def test_context_counts_only_where_it_is_given(awake: Backbone) -> None:
    x, r = latents()
    other = awake(x, r, given(context=given().context + 1))
    assert differs(awake(x, r, given()), other, 0) > 1e-4
    assert differs(awake(x, r, given()), other, 1) == 0
    # A first frame that is zero is still a first frame.
    zero = torch.zeros(BATCH, 1, 3, 4, 6)
    both = [awake(x, r, given(context=zero, context_given=torch.full((BATCH, 1), flag))) for flag in (False, True)]
    assert differs(both[0], both[1], 0) > 1e-4


@pytest.mark.parametrize("what", ["flow_time", "log_duration"])
def test_times_are_read(awake: Backbone, what: str) -> None:
    x, r = latents()
    if what == "flow_time":
        other = awake(x, r + 0.01, given())
    else:
        other = awake(x, r, given(log_duration=given().log_duration + 0.3))
    assert differs(awake(x, r, given()), other, 0) > 1e-5


def test_clips_of_a_batch_do_not_see_each_other_but_frames_of_a_clip_do(awake: Backbone) -> None:
    x, r = latents(3)
    changed = x.clone()
    changed[0, 2] += 1
    before, after = awake(x, r, given())["mean"], awake(changed, r, given())["mean"]
    assert torch.equal(before[1], after[1])
    assert float((before[0, 0] - after[0, 0]).detach().abs().max()) > 1e-4


def test_unpatchify_inverts_patchify() -> None:
    backbone = Backbone(CONFIG)
    x, _ = latents(3)
    patches = backbone.patchify(x)
    assert patches.shape == (BATCH, 3, 6, 12)
    assert torch.equal(backbone.unpatchify(patches), x)
    # The second token is the square of rows 0-1, columns 2-3.
    assert torch.equal(patches[0, 0, 1].view(3, 2, 2), x[0, 0, :, 0:2, 2:4])


def test_places_differ(awake: Backbone) -> None:
    embedding = position_embedding(dataclasses.replace(CONFIG, height=16, width_latent=16))
    assert embedding.shape == (64, 32)
    distances = torch.cdist(embedding, embedding) + 100 * torch.eye(64)
    assert distances.min() > 0.3


def test_every_parameter_learns(awake: Backbone) -> None:
    x, r = latents(3)
    awake.zero_grad()
    mean, derivative = awake(x, r, given()).values()
    (mean.square().mean() + derivative.square().mean()).backward()
    dead = [name for name, value in awake.named_parameters() if value.grad is None or not value.grad.any()]
    assert dead == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch": 4}, r"patch 4 does not divide the latents 4x6; choose another with --set patch=..."),
        ({"width": 36}, r"width 36 is no multiple of 4 x heads \(2\); choose others with --set width=..."),
        ({"patch": 0}, "patch is 0; it must be at least 1"),
        ({"heads": 0}, "heads is 0; it must be at least 1"),
        ({"depth": -1}, "depth is -1; it must be at least 1"),
        ({"outputs": ()}, "outputs is empty; a backbone needs a head"),
        ({"qk_norm": "batch"}, "qk_norm is .batch.; it must be one of none, rms, layer"),
        ({"architecture": "unet"}, "architecture is .unet.; it must be one of vlfm, dit"),
    ],
)
def test_shapes_that_cannot_be_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **changes)


def test_a_config_survives_json() -> None:
    for config in (CONFIG, dataclasses.replace(CONFIG, outputs=("rate",), temporal=True)):
        assert BackboneConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
    new = ("outputs", "temporal", "qk_norm", "architecture", "rates", "frame_count")
    old = {name: value for name, value in CONFIG.to_json().items() if name not in new}
    assert BackboneConfig.from_json(old) == CONFIG, "a run.json of before named none of them"


def test_states_that_share_a_caption_may_have_it_once(awake: Backbone) -> None:
    """Two states of each of two clips: the caption once for a clip gives what it gives once for a state."""
    x, time = latents()
    pairs = {name: value.repeat_interleave(2, 0) for name, value in vars(given()).items()}
    once = {**pairs, "text": given().text, "text_length": given().text_length}
    states = torch.cat([x, x.flip(-1)]), torch.cat([time, time / 2])
    torch.testing.assert_close(awake(*states, Conditioning(**pairs)), awake(*states, Conditioning(**once)))


@pytest.fixture(scope="module")
def temporal() -> Backbone:
    """The same for sequences of frames with their times, with one head."""
    torch.manual_seed(0)
    backbone = Backbone(dataclasses.replace(CONFIG, outputs=("velocity",), temporal=True))
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return backbone.eval()


TIMES = torch.tensor([[0.0, 0.5, 1.5], [0.0, 0.25, 2.0]])


def test_heads_have_names_and_cost_no_other_weight() -> None:
    two, one = Backbone(CONFIG), Backbone(dataclasses.replace(CONFIG, outputs=("mean",)))
    x, r = latents()
    assert list(one(x, r, given())) == ["mean"]
    assert set(two.state_dict()) - set(one.state_dict()) == {"derivative_head.weight", "derivative_head.bias"}


def test_frames_at_one_flow_time_are_told_apart_by_their_place(awake: Backbone, temporal: Backbone) -> None:
    x, _ = latents(3)
    same = torch.full((BATCH, 3), 0.3)
    swapped = x[:, [1, 0, 2]]
    before, after = awake(x, same, given())["mean"], awake(swapped, same, given())["mean"]
    torch.testing.assert_close(before[:, [1, 0, 2]], after)  # without a place they are interchangeable
    before, after = (temporal(state, same, given(), TIMES)["velocity"] for state in (x, swapped))
    assert float((before[:, [1, 0, 2]] - after).detach().abs().max()) > 1e-3
    for backbone, times in ((awake, TIMES), (temporal, None)):
        with pytest.raises(ValueError, match=r"frame_time is (given|missing); build it for the method that runs it"):
            backbone(x, same, given(), times)


def test_padding_is_not_seen_and_stays_finite(temporal: Backbone) -> None:
    x, r = latents(3)
    valid = torch.tensor([[True, True, False], [True, True, True]])
    whole = temporal(x, r, given(), TIMES, valid)["velocity"]
    other = x.clone()
    other[0, 2] = 1e3
    padded = temporal(other, r, given(), TIMES, valid)["velocity"]
    torch.testing.assert_close(whole[0, :2], padded[0, :2])
    torch.testing.assert_close(whole[1], padded[1])
    assert bool(padded.isfinite().all())
    alone = temporal(x[:1, :2], r[:1, :2], first(given()), TIMES[:1, :2])["velocity"]
    torch.testing.assert_close(whole[:1, :2], alone)
    nothing = temporal(x, r, given(), TIMES, torch.zeros(BATCH, 3, dtype=torch.bool))["velocity"]
    assert bool(nothing.isfinite().all())


def first(all_of: Conditioning) -> Conditioning:
    return Conditioning(**{name: value[:1] for name, value in vars(all_of).items()})


def test_a_causal_frame_sees_what_came_before(temporal: Backbone) -> None:
    x, r = latents(3)
    before = temporal(x, r, given(), TIMES, causal=True)["velocity"]
    changed = x.clone()
    changed[:, 2] += 1
    after = temporal(changed, r, given(), TIMES, causal=True)["velocity"]
    assert torch.equal(before[:, :2], after[:, :2])
    changed = x.clone()
    changed[:, 0] += 1
    after = temporal(changed, r, given(), TIMES, causal=True)["velocity"]
    assert float((before[:, 2] - after[:, 2]).detach().abs().max()) > 1e-4


def test_every_frame_may_have_its_own_given_frame(temporal: Backbone) -> None:
    """The tasks' masks: frames that are given are shown clean beside the noisy ones, each in its place."""
    x, r = latents(3)
    clean = torch.randn(BATCH, 3, 3, 4, 6, generator=torch.Generator().manual_seed(9))
    shown = torch.tensor([[True, False, True], [True, True, False]])
    base = given(context=clean, context_given=shown)
    before = temporal(x, r, base, TIMES)["velocity"]
    hidden = clean.clone()
    hidden[0, 1] += 5
    torch.testing.assert_close(temporal(x, r, given(context=hidden, context_given=shown), TIMES)["velocity"], before)
    visible = clean.clone()
    visible[0, 2] += 5
    after = temporal(x, r, given(context=visible, context_given=shown), TIMES)["velocity"]
    assert float((before[0] - after[0]).detach().abs().max()) > 1e-3
    assert torch.equal(before[1], after[1])


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_queries_and_keys_are_normed_by_head(kind: str) -> None:
    """Scaled queries then change nothing, which they do without a norm; an older config has none."""
    x, r = latents()

    def moved(config: BackboneConfig) -> float:
        torch.manual_seed(0)
        backbone = Backbone(config).eval()
        with torch.no_grad():
            for parameter in backbone.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape))
            before = backbone(x, r, given())
            for block in backbone.blocks:
                for layer, rows in ((block.qkv, 2 * config.width), (block.cross.query, None)):
                    layer.weight[:rows] *= 3  # queries, and in self-attention keys
                    layer.bias[:rows] *= 3
            return differs(before, backbone(x, r, given()), 0)

    assert moved(dataclasses.replace(CONFIG, qk_norm=kind)) < 1e-4
    assert moved(CONFIG) > 1e-3
    backbone = Backbone(dataclasses.replace(CONFIG, qk_norm=kind))
    assert backbone.blocks[0].norm_q.norm.weight.shape == (CONFIG.width // CONFIG.heads,)
    with torch.autocast("cpu", torch.bfloat16):
        assert all(bool(value.isfinite().all()) for value in backbone(x, r, given()).values())


@pytest.mark.bit_identical
def test_activation_checkpointing_changes_no_gradient(awake: Backbone) -> None:
    x, r = latents(3)
    gradients = []
    for again in (False, True):
        awake.zero_grad()
        awake.activation_checkpointing = again
        calls: list[int] = []
        hook = awake.blocks[0].register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        sum(value.square().mean() for value in awake(x, r, given()).values()).backward()
        hook.remove()
        gradients.append([value.grad for value in awake.parameters()])
        assert len(calls) == 1 + again, "the block is computed again"
    awake.activation_checkpointing = False
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_a_backbone_is_saved_and_comes_back(awake: Backbone, tmp_path: Path) -> None:
    awake.save_pretrained(tmp_path / "kept")
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == ["config.json", "model.safetensors"]
    again = Backbone.from_pretrained(tmp_path / "kept")
    assert again.config == awake.config
    assert not again.training
    x, r = latents()
    assert differs(awake(x, r, given()), again(x, r, given()), 0) == 0


def test_a_folder_that_holds_no_backbone_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"config.json is missing; give a folder that Backbone.save_pretrained"):
        Backbone.from_pretrained(tmp_path)
    Backbone(CONFIG).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for changes, message in (
        ({"magic": 1}, r"config.json describes no backbone \(.*magic"),
        ({"depth": 3}, r"model.safetensors is of another network: it lacks blocks.2.\w+.\w+, .* and \d+ more$"),
        ({"text_dim": 12}, r"it has another shape of pooled_text.0.weight \(10,\), not \(12,\)"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
        with pytest.raises(ValueError, match=message):
            Backbone.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model.safetensors: there is no such file"):
        Backbone.from_pretrained(tmp_path)


# torch's tracer looks at a gradient and hides its own warning, which pytest brings back.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_blocks_compute_the_same(awake: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward, checkpointed too; without the code generator, which takes a compiler and half a minute."""
    compiled = Backbone(CONFIG).eval()
    compiled.load_state_dict(awake.state_dict())
    monkeypatch.setattr(Block, "compile", lambda self: torch.nn.Module.compile(self, backend="aot_eager"))
    compiled.compile_blocks()
    assert compiled.state_dict().keys() == awake.state_dict().keys()
    x, r = latents()
    gradients = []
    for backbone, again in ((awake, False), (compiled, False), (compiled, True)):
        backbone.activation_checkpointing = again
        loss = sum(value.square().sum() for value in backbone(x, r, given()).values())
        gradients.append(torch.autograd.grad(loss, list(backbone.blocks.parameters())))
    for one, other, third in zip(*gradients, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(third, one, rtol=1e-4, atol=1e-5)
