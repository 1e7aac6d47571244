"""Which parameters decay, by name, under each optimiser."""

from __future__ import annotations

import pytest
from torch.optim import AdamW

from model.backbones.dit import Backbone, BackboneConfig
from model.recipes import train_recipe
from model.settings import override
from model.training.muon import Muon
from model.training.optimizers import make_optimizers

CONFIG = BackboneConfig(
    channels=3, height=4, width_latent=4, text_dim=10, width=32, depth=1, heads=2, patch=2, qk_norm="rms"
)  # fmt: skip
MATRICES = {
    "embed_latents", "embed_context", "time.first", "time.second", "duration.first", "duration.second",
    "clip_start.first", "clip_start.second", "pooled_text.1", "text.1", "modulation", "mean_head", "derivative_head",
}  # fmt: skip
"""Layers outside the blocks whose weights decay."""
BLOCK = {"modulation", "qkv", "attention_out", "cross.query", "cross.key_value", "cross.out", "up", "down"}
"""And inside them."""


@pytest.mark.parametrize("matrix_learning_rate", [0.0, 1e-3])
def test_matrices_decay_and_positions_biases_and_norms_do_not(matrix_learning_rate: float) -> None:
    backbone = Backbone(CONFIG)
    names = {id(value): name for name, value in backbone.named_parameters()}
    recipe = override(train_recipe("demo"), {"weight_decay": 0.1, "matrix_learning_rate": matrix_learning_rate})
    optimizers = make_optimizers(backbone, recipe)
    groups = [(o, g["weight_decay"], {names[id(p)] for p in g["params"]}) for o in optimizers for g in o.param_groups]
    inside = {f"blocks.0.{name}.weight" for name in BLOCK}
    outside = {f"{name}.weight" for name in MATRICES}
    decaying = [(type(optimizer), found) for optimizer, decay, found in groups if decay == 0.1]
    expected = [(AdamW, outside), (Muon, inside)] if matrix_learning_rate else [(AdamW, outside | inside)]
    assert decaying == expected
    (free,) = [found for _, decay, found in groups if decay == 0]
    assert free == set(names.values()) - inside - outside
    assert {"position", "context_flag", "text.0.weight", "time.first.bias", "blocks.0.norm_q.norm.weight"} <= free


def test_without_decay_the_groups_are_those_of_older_checkpoints() -> None:
    """A checkpoint knows a parameter by its place in the groups."""
    backbone = Backbone(CONFIG)
    (optimizer,) = make_optimizers(backbone, train_recipe("demo"))
    assert any(p is backbone.position for p in optimizer.param_groups[0]["params"])
