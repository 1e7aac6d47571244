"""Recipes: functions that return frozen dataclasses, and the one way to override a field from the command line.

A training recipe owns the path, the network and the optimiser. What the data is like (window, order, sizes, codec,
text) is read from the dataset's version and never repeated here.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any, TypeVar, cast

Recipe = TypeVar("Recipe")


@dataclasses.dataclass(frozen=True)
class TrainRecipe:
    """Everything a training run needs besides the data."""

    name: str
    """Name of the recipe function that made it."""
    width: int = 384
    """Width of the backbone; a multiple of 64."""
    depth: int = 12
    """Number of transformer blocks."""
    heads: int = 6
    """Attention heads; divides the width."""
    patch: int = 2
    """Side of a square latent patch that makes one token; divides the latent's height and width."""
    path: str = "warmup"
    """Flow path: `warmup` (method.md, section 4) or `paper` (as printed, for comparison)."""
    warmup: float = 0.25
    """Length of the noise-to-first-frame part, in units of the clip's duration."""
    sigma_end: float = 0.1
    """Standard deviation of the path at every time of the clip, in latents of unit variance."""
    warmup_share: float = 0.3
    """Share of the training times that fall on the warm-up, in (0, 1)."""
    warmup_focus: float = 2.0
    """Draws the warm-up's times towards the noise, where the caption alone must tell the frame; 1 is uniform."""
    state_jitter: float = 0.3
    """How far along the clip (standard deviation, in flow time) a state may be from its time in training. Without it
    the network reads the time off the state, and a sample that once lags stays behind (docs/experiments.md)."""
    error_focus: float = 1.0
    """Exponent that weighs a state by its error relative to the others', so that no time of a clip is left behind; 0
    weighs all alike."""
    derivative_weight: float = 0.1
    """Weight of the derivative's loss beside the mean's; each is in units of its own mean square over the data."""
    caption_dropout: float = 0.1
    """Rate at which caption and clip_start are replaced by the empty caption, for guidance."""
    context_dropout: float = 0.75
    """Rate at which the first frame is hidden; high, because most videos start from a prompt alone."""
    batch: int = 64
    """Clips in one step, over all processes together."""
    times_per_clip: int = 4
    """Flow times drawn for each clip of a step: one read of the clip serves them all."""
    steps: int = 100_000
    """Optimiser steps of the whole run."""
    learning_rate: float = 3e-4
    """Peak learning rate of AdamW."""
    matrix_learning_rate: float = 0.0
    """Peak learning rate of Muon for the blocks' matrices; 0 trains them with AdamW too."""
    weight_decay: float = 0.0
    """Decoupled weight decay of the matrices."""
    learning_rate_warmup: int = 200
    """Steps over which the learning rate rises from 0."""
    learning_rate_decay: float = 0.5
    """Last share of the run over which the learning rate falls linearly to 0, in [0, 1]."""
    gradient_clip: float = 1.0
    """Largest global gradient norm."""
    bad_steps_allowed: int = 10
    """Steps in a row that may be skipped because loss or gradient are not finite; one more ends the run."""
    ema_decay: float = 0.999
    """Decay of the exponential moving average of the weights, per step; sampling uses the average."""
    precision: str = "float32"
    """`float32`, or `bfloat16` for autocast."""
    seed: int = 0
    """Seed of initialisation, order, noise and times."""
    checkpoint_every: int = 1000
    """Steps between checkpoints."""
    checkpoints_kept: int = 2
    """Newest checkpoints that stay on disk."""
    log_every: int = 20
    """Steps between two lines of the log."""
    validate_every: int = 500
    """Steps between two losses on the validation split."""
    loader_workers: int = 0
    """Processes that read shards ahead, for each trainer process; 0 reads in the trainer."""


def base() -> TrainRecipe:
    """A backbone of about 33 million parameters, for one GPU."""
    return TrainRecipe(name="base", loader_workers=4)


def demo() -> TrainRecipe:
    """A backbone that learns some fifty short clips in minutes on two CPU cores."""
    return TrainRecipe(
        name="demo",
        width=192,
        depth=6,
        heads=4,
        patch=2,
        batch=16,
        times_per_clip=2,
        warmup_share=0.25,
        context_dropout=0.9,
        steps=1500,
        learning_rate=2e-3,
        learning_rate_warmup=50,
        ema_decay=0.99,
        checkpoint_every=500,
        log_every=10,
        validate_every=500,
    )


def recipe_named(module: ModuleType, name: str, kind: type[Recipe]) -> Callable[..., Recipe]:
    """The recipe function `name` of `module`: any public function there that is annotated to return `kind`.

    Raises:
        ValueError: there is no such recipe; the message lists those there are.
    """
    functions = {
        key: value
        for key, value in vars(module).items()
        if callable(value) and getattr(value, "__annotations__", {}).get("return") in (kind, kind.__name__)
    }
    if name not in functions or name.startswith("_"):
        known = ", ".join(sorted(key for key in functions if not key.startswith("_") and key != "override"))
        raise ValueError(f"recipe {name!r} is unknown; the recipes are: {known}")
    return cast(Callable[..., Recipe], functions[name])


def train_recipe(name: str) -> TrainRecipe:
    """The training recipe called `name`, with its defaults."""
    return recipe_named(sys.modules[__name__], name, TrainRecipe)()


def override(recipe: Recipe, settings: Mapping[str, Any]) -> Recipe:
    """`recipe` with single fields replaced, as by `--set key=value`.

    Values are JSON where they parse as JSON, else plain text; they must be of the field's type. A dictionary
    field takes single entries as `field.entry=value`.

    Raises:
        ValueError: an unknown field, or a value of the wrong type; the message names the field and what it takes.
    """
    fields = {field.name: field for field in dataclasses.fields(cast(Any, recipe))}
    changes: dict[str, Any] = {}
    for key, given in settings.items():
        name, _, entry = key.partition(".")
        if name not in fields:
            raise ValueError(f"setting {key!r} is unknown; the fields are: {', '.join(sorted(fields))}")
        current = changes.get(name, getattr(recipe, name))
        value = _parsed(given) if isinstance(given, str) else given
        if entry:
            if not isinstance(current, dict):
                raise ValueError(f"setting {key!r}: {name} is no dictionary but {type(current).__name__}")
            changes[name] = {**current, entry: value}
        else:
            changes[name] = _coerced(
                key, given if isinstance(current, str) else value, current, any_length="..." in str(fields[name].type)
            )
    return dataclasses.replace(cast(Any, recipe), **changes)


def _parsed(text: str) -> Any:
    try:
        return json.loads(text.lower() if text.lower() in ("true", "false") else text)
    except json.JSONDecodeError:
        return text


def _coerced(key: str, value: Any, current: Any, any_length: bool = False) -> Any:
    kind = type(current)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is tuple and isinstance(value, list) and (any_length or len(value) == len(current)):
        return tuple(value)
    if isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    count = "any number of" if any_length else len(current) if kind is tuple else 1
    shape = f"{count} values as [a, b]" if kind is tuple else kind.__name__
    raise ValueError(f"setting {key!r} takes {shape}, like {current!r}; it was given {value!r}")
