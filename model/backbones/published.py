"""The published DiT (Peebles and Xie 2023, arXiv 2212.09748): its sizes, and its checkpoints as a backbone's start.

An official checkpoint's tensors are known by their names. Of its two outputs the prediction of the noise goes into the
backbone's first head; the class embedding and the prediction of the variance have no use here. What the backbone has
beside it (caption, clip, given frames, further heads) starts at zero, so the first head computes what that DiT
computes without a class.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from model.backbones.dit import Backbone, BackboneConfig
from model.backbones.embeddings import ScalarEmbedding
from model.backbones.tensors import check_tensors, read_tensors


class Size(NamedTuple):
    """What the paper's Table 1 gives of a size."""

    width: int
    """Width of the tokens."""
    depth: int
    """Number of blocks."""
    heads: int
    """Attention heads."""


SIZES: Mapping[str, Size] = {
    "S": Size(384, 12, 6),
    "B": Size(768, 12, 12),
    "L": Size(1024, 24, 16),
    "XL": Size(1152, 28, 16),
}
"""The four sizes by name."""
PATCHES = (2, 4, 8)
"""Their patches: DiT-XL/2 has the size XL and patch 2."""
NAMES: tuple[tuple[str, str], ...] = (
    (r"x_embedder\.proj\.(weight|bias)", r"embed_latents.\1"),
    (r"pos_embed", r"position"),
    (r"t_embedder\.mlp\.0\.(weight|bias)", r"time.first.\1"),
    (r"t_embedder\.mlp\.2\.(weight|bias)", r"time.second.\1"),
    (r"blocks\.(\d+)\.attn\.qkv\.(weight|bias)", r"blocks.\1.qkv.\2"),
    (r"blocks\.(\d+)\.attn\.proj\.(weight|bias)", r"blocks.\1.attention_out.\2"),
    (r"blocks\.(\d+)\.mlp\.fc1\.(weight|bias)", r"blocks.\1.up.\2"),
    (r"blocks\.(\d+)\.mlp\.fc2\.(weight|bias)", r"blocks.\1.down.\2"),
    (r"blocks\.(\d+)\.adaLN_modulation\.1\.(weight|bias)", r"blocks.\1.modulation.\2"),
    (r"final_layer\.adaLN_modulation\.1\.(weight|bias)", r"modulation.\1"),
    (r"final_layer\.linear\.(weight|bias)", r"head.\1"),
)
"""Official names as patterns, and ours; `head` is the backbone's first."""
DROPPED = "y_embedder.embedding_table.weight"
"""The class embedding."""


def official_weights(path: Path, config: BackboneConfig) -> dict[str, Tensor]:
    """The tensors of an official checkpoint (`.pt` or `.safetensors`), float32, under the names of a backbone.

    Raises:
        FileNotFoundError, ValueError: the file cannot be read or is of another size; the message says what differs.
    """
    if config.architecture != "dit":
        raise ValueError(f"{path.name} fits the published architecture alone: --set architecture=dit")
    if config.stem:
        raise ValueError(f"{path.name} has no convolutions around its blocks: --set stem=0")
    if config.qk_norm != "none":
        raise ValueError(f"{path.name} was trained without a norm of queries and keys: --set qk_norm=none")
    tensors = read_tensors(path)
    _check_size(tensors, config, path.name)
    found = translated(tensors, config, path.name)
    with torch.device("meta"):
        expected = Backbone(config).state_dict()
    check_tensors({name: expected[name] for name in published_names(config, expected)}, found, path.name)
    return found


def start_from_dit(backbone: Backbone, path: Path) -> None:
    """Set a new backbone's weights to those of an official checkpoint, and what it has beside them to no effect.

    backbone: as its constructor leaves it: gates, given frames and heads are zero. Raises as `official_weights`.
    """
    backbone.load_state_dict(official_weights(path, backbone.config), strict=False)
    added: list[nn.Module] = [backbone.pooled_text[-1]]
    added += [m.second for m in backbone.children() if isinstance(m, ScalarEmbedding) and m is not backbone.time]
    for layer in added:
        assert isinstance(layer, nn.Linear)
        nn.init.zeros_(layer.weight)


def published_names(config: BackboneConfig, names: Iterable[str]) -> list[str]:
    """Those of a backbone's parameters that the published DiT has too; of the heads that is the first."""
    outer = {"embed_latents", "position", "time", "modulation", f"{config.outputs[0]}_head"}
    inner = re.compile(r"blocks\.\d+\.(qkv|attention_out|up|down|modulation)\.")
    return [name for name in names if name.split(".")[0] in outer or inner.match(name)]


def translated(tensors: Mapping[str, Tensor], config: BackboneConfig, where: str) -> dict[str, Tensor]:
    """An official checkpoint's tensors under a backbone's names and in its shapes.

    Raises:
        ValueError: it has a tensor of another name; the message has it and `where`.
    """
    found: dict[str, Tensor] = {}
    unknown: dict[str, Tensor] = {}
    for name, value in tensors.items():
        ours = [re.sub(pattern, new, name) for pattern, new in NAMES if re.fullmatch(pattern, name)]
        if name == DROPPED:
            continue
        if not ours:
            unknown[name] = value
        elif ours[0].startswith("head."):
            found[f"{config.outputs[0]}_{ours[0]}"] = _head(value, config)
        elif name == "pos_embed":
            found[ours[0]] = _position(value, config)
        else:
            found[ours[0]] = value.flatten(1) if name == "x_embedder.proj.weight" else value
    check_tensors({}, unknown, where)
    return {name: value.float() for name, value in found.items()}


def _head(value: Tensor, config: BackboneConfig) -> Tensor:
    """Rows (p, p, C or 2C) of the last layer's weight or bias to rows (C, p, p), without the variance's."""
    p = config.patch
    places = value.unflatten(0, (p, p, -1))[:, :, : config.channels]
    return places.movedim(2, 0).flatten(0, 2)


def _position(value: Tensor, config: BackboneConfig) -> Tensor:
    """(1, side * side, W) to (tokens, W), interpolated where the grids differ."""
    side = round(value.shape[1] ** 0.5)
    rows, columns = config.height // config.patch, config.width_latent // config.patch
    if (side, side) == (rows, columns):
        return value[0]
    grid = value.float().unflatten(1, (side, side)).movedim(3, 1)  # (1, W, side, side)
    wanted = functional.interpolate(grid, (rows, columns), mode="bicubic", align_corners=False)
    return wanted[0].flatten(1).T.contiguous()


def _check_size(tensors: Mapping[str, Tensor], config: BackboneConfig, where: str) -> None:
    """Raises ValueError where width, depth, heads, patch or channels are others than the checkpoint's."""
    first, position = tensors.get("x_embedder.proj.weight"), tensors.get("pos_embed")
    if first is None or first.ndim != 4 or position is None or position.ndim != 3:
        raise ValueError(
            f"{where} is no official DiT checkpoint: it lacks x_embedder.proj.weight (width, channels, patch, patch) "
            "or pos_embed (1, tokens, width)"
        )
    width, channels, patch, _ = first.shape
    depth = 1 + max((int(m[1]) for m in map(re.compile(r"blocks\.(\d+)\.").match, tensors) if m), default=-1)
    heads = {size.width: size.heads for size in SIZES.values()}.get(width, config.heads)  # no tensor shows them
    sizes = {"width": width, "depth": depth, "heads": heads, "patch": patch}
    other = {name: value for name, value in sizes.items() if value != getattr(config, name)}
    if other:
        told = ", ".join(f"{name} {value}, not {getattr(config, name)}" for name, value in other.items())
        settings = " ".join(f"--set {name}={value}" for name, value in other.items())
        raise ValueError(f"{where} has {told}: {settings}")
    if channels != config.channels:
        raise ValueError(
            f"{where} has latents of {channels} channels, not {config.channels}; take a dataset whose codec has as many"
        )
