"""The forms of the deployments: choices, typed fields with words and bounds; and the bare `prefect deployment run`."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from pydantic import ValidationError

from flows.chain import lake_to_model
from flows.dataset import ingest, refresh
from flows.evaluation import evaluate
from flows.forms import DATA_RECIPES, TRAIN_RECIPES, DataSettings, TrainSettings
from flows.plugin import complete
from flows.training import train
from model.recipes import TrainRecipe, train_recipe
from model.settings import override
from pipeline.recipes import DataRecipe, demo

FLOWS = (ingest, refresh, train, evaluate, lake_to_model)


def properties(flow: Any) -> dict[str, Any]:
    found = flow.parameters.model_dump()["properties"]
    return dict(found)


@pytest.mark.parametrize("flow", FLOWS, ids=lambda flow: flow.name)
def test_every_parameter_has_words_and_every_flow_an_end(flow: Any) -> None:
    assert all(shown.get("description") for shown in properties(flow).values())
    assert flow.timeout_seconds > 3600


def test_recipes_are_choices_and_counts_have_a_minimum() -> None:
    assert properties(ingest)["recipe"]["enum"] == DATA_RECIPES
    assert properties(lake_to_model)["train_recipe"]["enum"] == TRAIN_RECIPES
    assert {"demo", "linear", "stable_diffusion"} <= set(DATA_RECIPES)
    assert properties(ingest)["limit"]["anyOf"][0] == {"minimum": 1, "type": "integer"}
    assert properties(train)["processes"]["minimum"] == 1


@pytest.mark.parametrize(
    ("form", "recipe"), [(DataSettings, DataRecipe), (TrainSettings, TrainRecipe)], ids=lambda kind: kind.__name__
)
def test_settings_are_the_recipes_fields_typed_and_explained(form: Any, recipe: type[Any]) -> None:
    shown = form.model_json_schema()["properties"]
    own = {field.name for field in dataclasses.fields(recipe)} - {"name", "options"}
    assert own <= set(shown)
    assert all(len(field["description"]) > 10 for field in shown.values())
    assert all(field["anyOf"][-1] == {"type": "null"} and "type" in field["anyOf"][0] for field in shown.values())


def test_bounds_are_those_of_the_dataclasses() -> None:
    shown = DataSettings.model_json_schema()["properties"] | TrainSettings.model_json_schema()["properties"]
    least = {name: field["anyOf"][0].get("minimum") for name, field in shown.items()}
    assert [least[name] for name in ("block_clips", "order", "batch", "loader_workers", "rate")] == [1, 0, 1, 0, None]


def test_what_was_filled_in_reaches_the_recipe() -> None:
    given = {"size": "[32, 48]", "rate": "8", "order": None, "observe": "all", "gates.psnr_codec": 25}
    chosen = DataSettings.model_validate(given).chosen()
    recipe = override(demo(), chosen)
    assert (recipe.size, recipe.rate, recipe.observe) == ((32, 48), 8.0, "all")
    assert (recipe.gates, recipe.order) == ({"psnr_codec": 25}, demo().order)
    trained = override(train_recipe("demo"), TrainSettings.model_validate({"steps": 5, "state_jitter": 0.1}).chosen())
    assert (trained.steps, trained.options.state_jitter) == (5, 0.1)
    with pytest.raises(ValidationError, match="block_clips"):
        DataSettings.model_validate({"block_clips": 0})


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ("prefect deployment run ingest", "prefect deployment run ingest/ingest"),
        ("prefect --x deployment run refresh --watch", "prefect --x deployment run refresh/refresh --watch"),
        ("prefect deployment run ingest/ingest", None),
        ("prefect deployment run --id 123", None),
        ("prefect deployment run", None),
        ("prefect deployment inspect ingest", None),
        ("prefect worker start --pool local", None),
    ],
)  # fmt: skip
def test_a_bare_name_is_the_flows_one_deployment(given: str, read: str | None) -> None:
    assert complete(given.split()) == (read or given).split()
