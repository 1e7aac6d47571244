"""Recipes by name, and the one way to override their fields from the command line. Imports nothing heavy."""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any, NamedTuple, TypeVar, cast

Recipe = TypeVar("Recipe")


class Rule(NamedTuple):
    """Which values a setting may have."""

    holds: Callable[[Any], bool]
    """Whether a value is one of them; NaN is none."""
    words: str
    """What they are, after "it must be"."""


ABOVE_0 = Rule(lambda value: 0 < value < math.inf, "a number above 0")
AT_LEAST_0 = Rule(lambda value: 0 <= value < math.inf, "0 or more")
AT_LEAST_1 = Rule(lambda value: 1 <= value < math.inf, "at least 1")
SHARE = Rule(lambda value: 0 <= value <= 1, "in [0, 1]")
SHARE_BELOW_1 = Rule(lambda value: 0 <= value < 1, "in [0, 1)")
SEED = Rule(lambda value: 0 <= value < 2**62, "between 0 and 2^62")


def one_of(*values: str) -> Rule:
    """One of some words."""
    return Rule(lambda value: value in values, f"{', '.join(values[:-1])} or {values[-1]}")


def check_settings(recipe: Any, rules: Mapping[str, Rule]) -> None:
    """Compare the fields of a dataclass with the rules, given by the fields' names.

    Raises:
        ValueError: a field breaks its rule; the message has name, value and what it must be.
    """
    for name, rule in rules.items():
        if not rule.holds(value := getattr(recipe, name)):
            raise ValueError(f"{name} is {value!r}; it must be {rule.words}")


def recipe_names(module: ModuleType, kind: type[Any]) -> list[str]:
    """Names of the recipe functions of `module`, sorted: its public functions that are annotated to return `kind`."""
    return sorted(
        key
        for key, value in vars(module).items()
        if callable(value)
        and not key.startswith("_")
        and getattr(value, "__annotations__", {}).get("return") in (kind, kind.__name__)
        # A recipe is made from its defaults: what must be given something makes none.
        and all(each.default is not each.empty for each in inspect.signature(value).parameters.values())
    )


def recipe_named(module: ModuleType, name: str, kind: type[Recipe]) -> Callable[..., Recipe]:
    """The recipe function `name` of `module`, one of `recipe_names`.

    Raises:
        ValueError: there is no such recipe; the message lists those there are.
    """
    known = recipe_names(module, kind)
    if name not in known:
        raise ValueError(f"recipe {name!r} is unknown; the recipes are: {', '.join(known)}")
    return cast(Callable[..., Recipe], getattr(module, name))


def override(recipe: Recipe, settings: Mapping[str, Any]) -> Recipe:
    """`recipe` with single fields replaced, as by `--set key=value`.

    Values are JSON where they parse as JSON, else plain text; they must be of the field's type. A dictionary
    field takes single entries as `field.entry=value`. The fields of a nested dataclass are named like the recipe's own,
    and are replaced after those: the recipe may have chosen another dataclass by then.

    Raises:
        ValueError: an unknown field, or a value of the wrong type; the message names the field and what it takes.
    """
    own = {field.name for field in dataclasses.fields(cast(Any, recipe))}
    direct = {key: value for key, value in settings.items() if key.partition(".")[0] in own}
    changed = dataclasses.replace(cast(Any, recipe), **_changes(recipe, direct))
    left = {key: value for key, value in settings.items() if key not in direct}
    for name in _nested(changed):
        nested = getattr(changed, name)
        known = {field.name for field in dataclasses.fields(nested)}
        taken = {key: left.pop(key) for key in list(left) if key.partition(".")[0] in known}
        changed = dataclasses.replace(changed, **{name: dataclasses.replace(nested, **_changes(nested, taken))})
    if left:
        known = own | {f.name for name in _nested(changed) for f in dataclasses.fields(getattr(changed, name))}
        fields = ", ".join(sorted(known - set(_nested(changed))))
        raise ValueError(f"setting {next(iter(left))!r} is unknown; the fields are: {fields}")
    return cast(Recipe, changed)


def _nested(recipe: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(recipe) if dataclasses.is_dataclass(getattr(recipe, field.name))]


def _changes(recipe: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    fields = {field.name: field for field in dataclasses.fields(recipe)}
    changes: dict[str, Any] = {}
    for key, given in settings.items():
        name, _, entry = key.partition(".")
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
    return changes


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
