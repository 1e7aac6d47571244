"""Overrides by --set: typed, and refused with the field's name."""

from __future__ import annotations

import dataclasses

import pytest

from model.recipes import TrainRecipe, base, demo, override, train_recipe


def test_named_recipes() -> None:
    assert train_recipe("demo") == demo()
    assert train_recipe("base") == base()
    with pytest.raises(ValueError, match="'nope' is unknown; the recipes are: base, demo"):
        train_recipe("nope")
    with pytest.raises(ValueError, match="is unknown"):
        train_recipe("override")


def test_override_parses_by_type() -> None:
    recipe = override(demo(), {"steps": "7", "learning_rate": "1", "precision": "bfloat16", "sigma_end": 0.3})
    assert (recipe.steps, recipe.learning_rate, recipe.precision, recipe.sigma_end) == (7, 1.0, "bfloat16", 0.3)
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


def test_every_field_is_documented() -> None:
    import inspect

    source = inspect.getsource(TrainRecipe)
    for field in dataclasses.fields(TrainRecipe):
        after = source.split(f"    {field.name}: ", 1)[1].split("\n", 2)[1]
        assert after.strip().startswith('"""'), field.name


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
