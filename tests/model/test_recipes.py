"""Overrides by --set: typed, and refused with the field's name."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from model.backbones.dit import Backbone, BackboneConfig
from model.flow.path import PaperPath
from model.methods.per_frame import PerFrameOptions
from model.methods.registry import METHODS
from model.methods.vlfm import VLFM
from model.recipes import TrainRecipe, base, demo, train_recipe, train_recipes
from model.settings import override


def test_named_recipes() -> None:
    assert train_recipe("demo") == demo()
    assert train_recipe("base") == base()
    assert train_recipes() == [
        "base", "combinations", "demo", "flowception_base", "flowception_demo", "flowception_toy", "paper_xl",
        "tiny_cpu", "vlfm_b", "vlfm_l", "vlfm_s", "vlfm_xl",
    ]  # fmt: skip
    assert [train_recipe(name).name for name in train_recipes()] == train_recipes()
    with pytest.raises(ValueError, match=rf"'nope' is unknown; the recipes are: {', '.join(train_recipes())}$"):
        train_recipe("nope")
    with pytest.raises(ValueError, match="is unknown"):
        train_recipe("override")


def test_the_published_sizes() -> None:
    """Width, depth and heads of arXiv 2212.09748, table 1; patches of 2, 4 and 8."""
    sizes = {"s": (384, 12, 6), "b": (768, 12, 12), "l": (1024, 24, 16), "xl": (1152, 28, 16)}
    for letter, size in sizes.items():
        recipe = train_recipe(f"vlfm_{letter}")
        assert (recipe.width, recipe.depth, recipe.heads) == size
        for patch in (2, 4, 8):
            assert override(recipe, {"patch": str(patch)}).patch == patch


def test_flowceptions_size() -> None:
    """38 blocks of width 1536, about 2.1 billion parameters on latents of 128 channels (arXiv 2512.11438)."""
    recipe = train_recipe("flowception_base")
    assert (recipe.width, recipe.depth, recipe.heads, recipe.patch) == (1536, 38, 24, 1)
    config = BackboneConfig(
        channels=128, height=8, width_latent=8, text_dim=4096, width=recipe.width, depth=recipe.depth,
        heads=recipe.heads, patch=recipe.patch, outputs=("velocity",), temporal=True, rates=True,
    )  # fmt: skip
    with torch.device("meta"):
        count = sum(value.numel() for value in Backbone(config).parameters())
    assert 1.9e9 < count < 2.3e9
    for name in ("flowception_toy", "flowception_demo", "flowception_base"):
        assert train_recipe(name).method == "flowception"


def test_what_the_paper_prints() -> None:
    recipe = train_recipe("paper_xl")
    assert (recipe.width, recipe.depth, recipe.heads, recipe.patch) == (1152, 28, 16, 2)
    assert (recipe.architecture, recipe.optimizer) == ("dit", "grams")
    clip = {"frames_observed_max": 48, "duration": 2.0, "latent_shape": [4, 8, 8]}
    method = VLFM.build(recipe.options, {"mean_scale": 1.0, "derivative_scale": 1.0}, clip)
    assert method.path == PaperPath(frames=48, duration=2.0, sigma_min=0.01, alpha=10.0)


def test_override_parses_by_type() -> None:
    recipe = override(demo(), {"steps": "7", "learning_rate": "1", "precision": "bfloat16", "sigma_end": 0.3})
    assert (recipe.steps, recipe.learning_rate, recipe.precision, recipe.options.sigma_end) == (7, 1.0, "bfloat16", 0.3)
    assert isinstance(recipe.learning_rate, float)
    assert demo().steps != 7


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stepz": "7"}, "setting 'stepz' is unknown; the fields are: .*steps"),
        ({"steps": "many"}, "setting 'steps' takes int, like .*; it was given 'many'"),
        ({"steps": "7.5"}, "takes int"),
        ({"steps": "true"}, "takes int"),
        ({"seed.x": "1"}, "is no dictionary but int"),
    ],
)
def test_override_refuses(settings: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        override(demo(), settings)


@pytest.mark.parametrize(
    ("setting", "must"),
    [
        ("steps=0", "at least 1"), ("log_every=0", "at least 1"), ("checkpoint_every=0", "at least 1"),
        ("checkpoints_kept=0", "at least 1"), ("validate_every=0", "at least 1"), ("batch=0", "at least 1"),
        ("width=0", "at least 1"), ("depth=0", "at least 1"), ("heads=0", "at least 1"), ("patch=0", "at least 1"),
        ("architecture=unet", "vlfm or dit"), ("optimizer=sgd", "adamw or grams"),
        ("caption_padding=zero", "masked or seen"),
        ("learning_rate=-1", "a number above 0"), ("learning_rate=NaN", "a number above 0"),
        ("learning_rate=Infinity", "a number above 0"), ("gradient_clip=0", "a number above 0"),
        ("matrix_learning_rate=-1", "0 or more"), ("weight_decay=NaN", "0 or more"),
        ("learning_rate_warmup=-1", "0 or more"), ("loader_workers=-1", "0 or more"),
        ("bad_steps_allowed=-1", "0 or more"),
        ("spike_factor=-1", "0 or more"), ("ema_decay=1", r"in \[0, 1\)"), ("ema_decay=NaN", r"in \[0, 1\)"),
        ("learning_rate_decay=1.5", r"in \[0, 1\]"), ("learning_rate_decay=-0.1", r"in \[0, 1\]"),
        ("precision=fp16", "float32, bfloat16 or float64"), ("seed=-1", r"between 0 and 2\^62"),
    ],
)  # fmt: skip
def test_a_setting_that_cannot_be_is_one_line(setting: str, must: str) -> None:
    name, value = setting.split("=")
    with pytest.raises(ValueError, match=rf"^{name} is .*; it must be {must}$"):
        override(demo(), {name: value})


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("name", "value", "must"),
    [
        ("caption_dropout", 2, r"in \[0, 1\]"), ("caption_dropout", "NaN", r"in \[0, 1\]"),
        ("context_dropout", -0.1, r"in \[0, 1\]"), ("times_per_clip", 0, "at least 1"),
        ("warmup_share", 1, r"in \[0, 1\)"), ("warmup_focus", -1, "0 or more"),
        ("state_jitter", -1, "0 or more"), ("error_focus", "Infinity", "0 or more"),
        ("derivative_weight", -1, "0 or more"),
    ],
)  # fmt: skip
def test_an_option_of_a_method_that_cannot_be_is_one_line(method: str, name: str, value: float, must: str) -> None:
    recipe = override(demo(), {"method": method})
    if name not in {field.name for field in dataclasses.fields(recipe.options)}:
        return
    with pytest.raises(ValueError, match=rf"^{name} is .*; it must be {must}$"):
        override(recipe, {name: value})


def test_every_field_is_documented() -> None:
    import inspect

    for kind in (TrainRecipe, *(method.Options for method in METHODS.values())):
        source = "".join(inspect.getsource(base) for base in kind.__mro__ if dataclasses.is_dataclass(base))
        for field in dataclasses.fields(kind):
            after = source.split(f"    {field.name}: ", 1)[1].split("\n", 2)[1]
            assert after.strip().startswith('"""'), field.name


def test_a_methods_options_go_with_the_method() -> None:
    """`--set method=...` before or after the options: those that both methods have carry over, others are unknown."""
    for settings in ({"method": "per_frame", "warmup": "0.5"}, {"warmup": "0.5", "method": "per_frame"}):
        recipe = override(demo(), settings)
        assert recipe.options == PerFrameOptions(warmup=0.5, times_per_clip=2, clip_start_dropout=0.2)
    with pytest.raises(ValueError, match=r"setting .state_jitter. is unknown; the fields are: .*times_per_clip"):
        override(demo(), {"method": "per_frame", "state_jitter": "0.1"})
    with pytest.raises(ValueError, match="method is 'vae'; it must be one of vlfm, per_frame, direct"):
        override(demo(), {"method": "vae"})


def test_tuples_and_dictionaries() -> None:
    @dataclasses.dataclass(frozen=True)
    class Small:
        size: tuple[int, int] = (64, 64)
        codec: dict[str, object] = dataclasses.field(default_factory=lambda: {"kind": "linear", "factor": 4})

    changed = override(Small(), {"size": "[32, 48]", "codec.factor": "2", "codec.channels": 3})
    assert changed.size == (32, 48)
    assert changed.codec == {"kind": "linear", "factor": 2, "channels": 3}
    with pytest.raises(ValueError, match=r"takes 2 values as \[a, b\]"):
        override(Small(), {"size": "[32]"})
