"""The parameters of the flows as Prefect's form shows them: choices, typed fields with their words, bounds.

The fields of a recipe are read from its dataclass, so that a new field is in the form without another word: its type,
what its docstring says, its default in the recipe, and its bound. Prefect's server refuses what does not fit before a
run begins.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import json
import typing
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, create_model, model_validator

from model.methods.vlfm import VLFMOptions
from model.recipes import TrainRecipe, train_recipes
from model.settings import recipe_names
from pipeline import recipes as data_recipes_module
from pipeline.recipes import DataRecipe


class Settings(BaseModel):
    """Single fields of a recipe to replace; what is left empty stays as the recipe has it."""

    # Entries of dictionaries (`gates.psnr_codec`) and fields of other methods come by their names too.
    model_config = ConfigDict(extra="allow", protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, given: Any) -> Any:
        """Values of a command line are text: JSON where they parse as JSON and the field is no text itself."""
        if not isinstance(given, dict):
            return given
        return {name: _parsed(value) if _wants_json(cls, name) else value for name, value in given.items()}

    def chosen(self) -> dict[str, Any]:
        """The fields that were given, for model.settings.override; an empty field of the form is none."""
        declared = type(self).model_fields
        given = self.model_dump(exclude_unset=True)
        return {name: value for name, value in given.items() if name not in declared or value is not None}


def _wants_json(kind: type[BaseModel], name: str) -> bool:
    field = kind.model_fields.get(name)
    return field is not None and str not in typing.get_args(field.annotation)


def _parsed(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value.lower() if value.lower() in ("true", "false") else value)
    except json.JSONDecodeError:
        return value


def field_words(kind: type[Any]) -> dict[str, str]:
    """The docstrings behind the fields of a dataclass."""
    (body,) = [node.body for node in ast.parse(inspect.getsource(kind)).body if isinstance(node, ast.ClassDef)]
    words = {}
    for field, text in itertools.pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(text, ast.Expr):
            value = ast.literal_eval(text.value)
            words[field.target.id] = " ".join(value.split()).replace("`", "")
    return words


def settings_form(name: str, *kinds: type[Any], left_out: Sequence[str] = ("name",)) -> type[Settings]:
    """A form with the fields of some dataclasses, all optional."""
    fields: dict[str, Any] = {}
    for kind in kinds:
        words, types = field_words(kind), typing.get_type_hints(kind)
        for field in dataclasses.fields(kind):
            if field.name in left_out:
                continue
            own = types[field.name]
            least = _least(kind, field.name) if own is int else None
            told: Any = Field(default=None, description=words.get(field.name, ""), ge=least)
            fields[field.name] = (own | None, told)
    made: type[Settings] = create_model(name, __base__=Settings, __module__=__name__, **fields)
    made.__doc__ = Settings.__doc__
    return made


def _least(kind: type[Any], field: str) -> int:
    """The least whole number that a field takes, 0 or 1: the dataclass itself refuses what cannot be."""
    needed = {"name": ""} if "name" in {each.name for each in dataclasses.fields(kind)} else {}
    try:
        kind(**needed, **{field: 0})
    except (ValueError, ZeroDivisionError):
        return 1
    return 0


def choice(names: Sequence[str]) -> Any:
    """For a text parameter: the form shows these names to choose from. The flow itself says what else is wrong."""
    return Field(json_schema_extra={"enum": list(names)})


DATA_RECIPES = recipe_names(data_recipes_module, DataRecipe)
"""Names of the data recipes that can be made from their defaults."""
TRAIN_RECIPES = train_recipes()
"""Names of the training recipes."""

if typing.TYPE_CHECKING:
    DataSettings = Settings
    TrainSettings = Settings
else:
    DataSettings = settings_form("DataSettings", DataRecipe)
    TrainSettings = settings_form("TrainSettings", TrainRecipe, VLFMOptions, left_out=("name", "options"))

DataRecipeName = Annotated[str, choice(DATA_RECIPES)]
TrainRecipeName = Annotated[str, choice(TRAIN_RECIPES)]
AtLeast1 = Annotated[int, Field(ge=1)]
AtLeast0 = Annotated[int, Field(ge=0)]
