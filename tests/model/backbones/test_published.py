"""Official DiT checkpoints: the backbone computes what the published network does, before it is told more."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from model.backbones.conditioning import Conditioning
from model.backbones.dit import Backbone, BackboneConfig
from model.backbones.embeddings import STEPS_PER_FLOW_TIME
from model.backbones.published import official_weights, start_from_dit

WIDTH, DEPTH, HEADS, PATCH, CHANNELS, SIDE = 24, 3, 2, 2, 4, 8
CONFIG = BackboneConfig(
    channels=CHANNELS, height=SIDE, width_latent=SIDE, text_dim=10, width=WIDTH, depth=DEPTH, heads=HEADS,
    patch=PATCH, architecture="dit",
)  # fmt: skip


class Reference:
    """The network of arXiv 2212.09748 with adaLN-Zero, from its description: functions of tensors by official names."""

    def __init__(self, side: int = SIDE, seed: int = 0) -> None:
        draw = torch.Generator().manual_seed(seed)
        shapes: dict[str, tuple[int, ...]] = {"x_embedder.proj.weight": (WIDTH, CHANNELS, PATCH, PATCH)}
        shapes |= {"t_embedder.mlp.0.weight": (WIDTH, 256), "t_embedder.mlp.2.weight": (WIDTH, WIDTH)}
        for n in range(DEPTH):
            shapes |= {
                f"blocks.{n}.attn.qkv.weight": (3 * WIDTH, WIDTH), f"blocks.{n}.attn.proj.weight": (WIDTH, WIDTH),
                f"blocks.{n}.mlp.fc1.weight": (4 * WIDTH, WIDTH), f"blocks.{n}.mlp.fc2.weight": (WIDTH, 4 * WIDTH),
                f"blocks.{n}.adaLN_modulation.1.weight": (6 * WIDTH, WIDTH),
            }  # fmt: skip
        shapes |= {"final_layer.linear.weight": (PATCH * PATCH * 2 * CHANNELS, WIDTH)}
        shapes |= {"final_layer.adaLN_modulation.1.weight": (2 * WIDTH, WIDTH)}
        self.tensors = {"y_embedder.embedding_table.weight": torch.randn(1001, WIDTH, generator=draw)}
        for name, shape in shapes.items():
            fan_in = math.prod(shape[1:])
            self.tensors[name] = torch.randn(shape, generator=draw) / math.sqrt(fan_in)
            self.tensors[name.replace("weight", "bias")] = 0.1 * torch.randn(shape[0], generator=draw)
        self.tensors["pos_embed"] = self.sine_cosine(side // PATCH)[None]

    @staticmethod
    def sine_cosine(side: int) -> Tensor:
        """(side * side, W): half the width tells the column, half the row; of each half sines come first."""
        rates = 1 / 10_000 ** (torch.arange(WIDTH // 4, dtype=torch.float64) / (WIDTH // 4))
        places = torch.arange(side, dtype=torch.float64)[:, None] * rates
        one = torch.cat([places.sin(), places.cos()], dim=1)  # (side, W/2)
        rows, columns = one.repeat_interleave(side, 0), one.repeat(side, 1)
        return torch.cat([columns, rows], dim=1).float()

    def linear(self, x: Tensor, name: str) -> Tensor:
        return functional.linear(x, self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"])

    @staticmethod
    def norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        unit = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return unit * (1 + scale[:, None]) + shift[:, None]

    def attention(self, x: Tensor, name: str) -> Tensor:
        count, tokens, _ = x.shape
        q, k, v = self.linear(x, f"{name}.qkv").split(WIDTH, dim=-1)
        q, k, v = (part.view(count, tokens, HEADS, -1).transpose(1, 2) for part in (q, k, v))
        weights = (q @ k.transpose(-1, -2) / math.sqrt(WIDTH // HEADS)).softmax(-1)
        return self.linear((weights @ v).transpose(1, 2).reshape(count, tokens, WIDTH), f"{name}.proj")

    def hidden(self, latents: Tensor, step: Tensor) -> tuple[list[Tensor], Tensor]:
        """Tokens (B, n, W) after each block, and the condition (B, W), of latents (B, C, h, w) at steps (B,)."""
        embed = self.tensors["x_embedder.proj.weight"], self.tensors["x_embedder.proj.bias"]
        x = functional.conv2d(latents, *embed, stride=PATCH).flatten(2).transpose(1, 2) + self.tensors["pos_embed"]
        rates = torch.exp(-math.log(10_000) * torch.arange(128) / 128)
        angles = step[:, None] * rates
        sinusoids = torch.cat([angles.cos(), angles.sin()], dim=1)
        condition = self.linear(
            functional.silu(self.linear(sinusoids, "t_embedder.mlp.0")), "t_embedder.mlp.2"
        )  # no class
        kept = []
        for n in range(DEPTH):
            parts = self.linear(functional.silu(condition), f"blocks.{n}.adaLN_modulation.1").chunk(6, dim=1)
            shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = parts
            x = x + gate[:, None] * self.attention(self.norm(x, shift, scale), f"blocks.{n}.attn")
            inner = self.linear(self.norm(x, shift_mlp, scale_mlp), f"blocks.{n}.mlp.fc1")
            x = x + gate_mlp[:, None] * self.linear(functional.gelu(inner, approximate="tanh"), f"blocks.{n}.mlp.fc2")
            kept.append(x)
        return kept, condition

    def noise(self, latents: Tensor, step: Tensor) -> Tensor:
        """The predicted noise (B, C, h, w)."""
        hidden, condition = self.hidden(latents, step)
        shift, scale = self.linear(functional.silu(condition), "final_layer.adaLN_modulation.1").chunk(2, dim=1)
        out = self.linear(self.norm(hidden[-1], shift, scale), "final_layer.linear")  # (B, n, p*p*2C)
        picture = torch.zeros(len(latents), 2 * CHANNELS, *latents.shape[2:])
        columns = latents.shape[3] // PATCH
        for place, values in enumerate(out.unbind(1)):
            top, left = PATCH * (place // columns), PATCH * (place % columns)
            square = values.view(-1, PATCH, PATCH, 2 * CHANNELS).permute(0, 3, 1, 2)
            picture[:, :, top : top + PATCH, left : left + PATCH] = square
        return picture[:, :CHANNELS]


def told(latents: Tensor, start_given: float = 1.0) -> Conditioning:
    """A caption, a start and a given first frame for each of the latents (B, 1, C, h, w)."""
    draw, count = torch.Generator().manual_seed(3), len(latents)
    return Conditioning(
        text=torch.randn(count, 5, 10, generator=draw),
        text_length=torch.full((count,), 5),
        clip_start=torch.linspace(0, 5, count),
        start_given=torch.full((count,), start_given),
        log_duration=torch.full((count,), 0.7),
        context=torch.randn(count, 1, *latents.shape[2:], generator=draw),
        context_given=torch.ones(count, 1, dtype=torch.bool),
    )


def saved(tensors: dict[str, Tensor], path: Path) -> Path:
    if path.suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors if path.stem == "plain" else {"ema": tensors, "model": {}}, path)
    return path


@pytest.mark.parametrize("name", ["plain.pt", "training.pt", "weights.safetensors"])
def test_a_backbone_starts_as_the_official_checkpoint(tmp_path: Path, name: str) -> None:
    reference = Reference()
    backbone = Backbone(CONFIG)
    start_from_dit(backbone, saved(reference.tensors, tmp_path / name))
    seen: list[Tensor] = []
    for block in backbone.blocks:
        block.register_forward_hook(lambda _module, _given, tokens: seen.append(tokens[:, 0]))
    latents = torch.randn(3, 1, CHANNELS, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    flow_time = torch.tensor([[-0.25], [-0.1], [-0.003]])
    step = STEPS_PER_FLOW_TIME * flow_time[:, 0]  # 1000, 400 and 12
    with torch.no_grad():
        found = backbone(latents, flow_time, told(latents))
    expected, _ = reference.hidden(latents[:, 0], step)
    for mine, theirs in zip(seen, expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found["mean"][:, 0], reference.noise(latents[:, 0], step), atol=1e-5, rtol=1e-5)
    assert float(found["mean"].std()) > 0.1
    assert not found["derivative"].any(), "a new head starts at zero"


def test_what_is_new_learns_from_its_start_without_effect(tmp_path: Path) -> None:
    backbone = Backbone(CONFIG)
    start_from_dit(backbone, saved(Reference().tensors, tmp_path / "plain.pt"))
    latents = torch.randn(2, 1, CHANNELS, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.SGD(backbone.parameters(), 0.1)
    for _ in range(3):  # a zero layer lets the one before it learn only after its first step
        optimizer.zero_grad()
        found = backbone(latents, torch.full((2, 1), -0.1), told(latents))
        sum((value - latents).square().mean() for value in found.values()).backward()
        optimizer.step()
    dead = [name for name, value in backbone.named_parameters() if value.grad is None or not value.grad.any()]
    assert dead == []


def test_positions_are_interpolated_to_another_grid(tmp_path: Path) -> None:
    """The places of a 4x4 grid, stretched over 8x4: as smooth as they were, and each between its neighbours."""
    config = dataclasses.replace(CONFIG, height=16)
    backbone = Backbone(config)
    reference = Reference()
    start_from_dit(backbone, saved(reference.tensors, tmp_path / "plain.pt"))
    assert backbone.position.shape == (32, WIDTH)
    grid, before = backbone.position.detach().view(8, 4, WIDTH), reference.tensors["pos_embed"].view(4, 4, WIDTH)
    torch.testing.assert_close(
        grid[:, :, 0], before[:1, :, 0].expand(8, 4), atol=1e-5, rtol=0
    )  # tells the column alone
    # Halves of a step beside the old places: the mean of two new rows is near the old one.
    inner = (grid[2:6:2] + grid[3:7:2]) / 2
    assert float((inner - before[1:3]).abs().max()) < 0.1
    assert float((grid[2:6:2] - before[1:3]).abs().max()) > 0.1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 48, "depth": 2}, r"it.pt has width 24, not 48, depth 3, not 2: --set width=24 --set depth=3"),
        ({"patch": 4}, r"it.pt has patch 2, not 4: --set patch=2"),
        ({"channels": 12}, r"it.pt has latents of 4 channels, not 12; take a dataset whose codec has as many"),
        ({"architecture": "vlfm"}, r"it.pt fits the published architecture alone: --set architecture=dit"),
        ({"qk_norm": "rms"}, r"it.pt was trained without a norm of queries and keys: --set qk_norm=none"),
    ],
)
def test_a_checkpoint_of_another_size_is_one_line(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    path = saved(Reference().tensors, tmp_path / "it.pt")
    with pytest.raises(ValueError, match=f"^{message}$"):
        start_from_dit(Backbone(dataclasses.replace(CONFIG, **changes)), path)  # type: ignore[arg-type]


def test_heads_which_no_tensor_shows_are_those_of_the_published_width(tmp_path: Path) -> None:
    tensors = {"x_embedder.proj.weight": torch.zeros(384, 4, 2, 2), "pos_embed": torch.zeros(1, 16, 384)}
    path = saved({**tensors, "blocks.2.attn.proj.bias": torch.zeros(384)}, tmp_path / "plain.pt")
    with pytest.raises(ValueError, match=r"^plain.pt has heads 6, not 12: --set heads=6$"):
        official_weights(path, dataclasses.replace(CONFIG, width=384, heads=12))


def test_missing_unexpected_and_misshapen_tensors_are_named(tmp_path: Path) -> None:
    tensors = Reference().tensors
    backbone = Backbone(CONFIG)
    for change, message in (
        ({"blocks.0.attn.qkv.bias": None}, r"plain.pt is of another network: it lacks blocks.0.qkv.bias$"),
        ({"ab.c": torch.zeros(1)}, r"it has unexpected ab.c$"),
        (
            {"blocks.1.mlp.fc1.weight": torch.zeros(5, WIDTH)},
            rf"it has another shape of blocks.1.up.weight \(5, {WIDTH}\), not \({4 * WIDTH}, {WIDTH}\)$",
        ),
        ({"pos_embed": None}, "no official DiT checkpoint: it lacks x_embedder.proj.weight"),
    ):
        given = {name: value for name, value in {**tensors, **change}.items() if value is not None}
        with pytest.raises(ValueError, match=message):
            start_from_dit(backbone, saved(given, tmp_path / "plain.pt"))


class Code:
    """What a file of tensors must not hold."""


def test_a_file_that_runs_code_or_is_damaged_is_refused(tmp_path: Path) -> None:
    torch.save({"model": Code()}, tmp_path / "code.pt")
    (tmp_path / "words.pt").write_text("these are words")
    (tmp_path / "words.safetensors").write_text("these are words")
    torch.save(nn.Linear(2, 2).weight.detach(), tmp_path / "one.pt")
    for name, message in (
        ("code.pt", "cannot be read as plain tensors"),
        ("words.pt", "cannot be read as plain tensors"),
        ("words.safetensors", "is damaged"),
        ("one.pt", "holds no tensors by name"),
    ):
        with pytest.raises(ValueError, match=f"{name} {message}") as told_error:
            start_from_dit(Backbone(CONFIG), tmp_path / name)
        assert "\n" not in str(told_error.value)
    with pytest.raises(FileNotFoundError, match=r"nowhere.pt: there is no such file"):
        start_from_dit(Backbone(CONFIG), tmp_path / "nowhere.pt")
