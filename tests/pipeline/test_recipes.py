"""Data recipes: named, documented, checked, and fingerprinted by what changes data alone."""

from __future__ import annotations

import dataclasses
import inspect

import numpy as np
import pytest

from model.settings import override
from pipeline.recipes import DataRecipe, demo, linear, recipe_named, stable_diffusion
from pipeline.rows import observed_frames, split_of


def test_names() -> None:
    assert recipe_named("demo") == demo()
    assert recipe_named("linear") == linear()
    assert recipe_named("stable_diffusion") == stable_diffusion()
    for name in ("nope", "recipe_named", "dataclasses", "override"):
        with pytest.raises(
            ValueError, match="the recipes are: combinations, demo, linear, shots, stable_diffusion, turning"
        ):
            recipe_named(name)


@pytest.mark.parametrize("name", ["combinations", "demo", "linear", "stable_diffusion"])
def test_what_every_recipe_makes_can_be_evaluated(name: str) -> None:
    """`vlfm evaluate` needs training clips that kept their frames and latents, and others to compare with."""
    recipe = recipe_named(name)
    assert recipe.store_latents
    assert recipe.preview_clips > 0
    assert recipe.validation_fraction > 0


def test_sizes_follow_from_the_window() -> None:
    recipe = demo()
    assert (recipe.frames_max, recipe.observed_max, recipe.coefficients) == (32, 17, 34)
    everything = override(recipe, {"observe": "all", "duration": 0.5, "rate": 30})
    assert (everything.frames_max, everything.observed_max, everything.coefficients) == (15, 15, 30)
    assert override(recipe, {"order": 7}).coefficients == 7


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("duration", 0.0),
        ("rate", -1.0),
        ("size", (0, 64)),
        ("observe", "odd"),
        ("order", -1),
        ("method", "spline"),
        ("next_frame", "true"),
        ("validation_fraction", 1.0),
        ("min_observed", 0),
        ("preview_clips", -1),
        ("block_clips", 0),
        ("tolerate", 2.0),
        ("timeout", 0.0),
        ("certify_frames", -1),
        ("below_gate", "drop"),
    ],
)
def test_impossible_values_are_refused(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{field} = .* cannot be"):
        dataclasses.replace(demo(), **{field: value})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gates.psnr": 20}, "gates has no figure 'psnr'; choose among psnr_codec, ssim_codec, "),
        ({"gates.psnr_codec": "high"}, "gates.psnr_codec = 'high' cannot be; give a number, or null for no gate"),
        ({"gates.end_ratio": float("nan")}, "gates.end_ratio = nan cannot be"),
        ({"gates.end_ratio": True}, "gates.end_ratio = True cannot be"),
    ],
)
def test_a_gate_is_a_number_on_a_figure_of_the_certificate(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        override(demo(), settings)
    opened = override(demo(), {"gates.psnr_codec": "21", "gates.residual": "null"})
    assert opened.gates == {"psnr_codec": 21, "residual": None}


def test_only_what_changes_data_is_fingerprinted() -> None:
    changed: dict[str, object] = {"name": "x", "captions_required": False, "observe": "all", "method": "linear"}
    changed |= {"size": (32, 32), "store_latents": False, "text": {"kind": "other"}, "codec": {"kind": "other"}}
    changed |= {
        "score_only": ["cuts"],
        "split_at_cuts": True,
        "next_frame": "no",
        "gates": {"psnr_codec": 20.0},
        "below_gate": "flag",
        "shots": {"min_frames": 4},
    }
    housekeeping = set()
    for field in dataclasses.fields(DataRecipe):
        value = getattr(demo(), field.name)
        if field.name in changed:
            value = changed[field.name]
        else:
            value = type(value)(value * 0.5) or 5
        other = dataclasses.replace(demo(), **{field.name: value})
        assert other != demo(), field.name
        if other.data_fields() == demo().data_fields():
            housekeeping.add(field.name)
    assert housekeeping == {
        *("name", "preview_clips", "block_clips", "captions_required", "tolerate"),
        *("max_pixels", "max_frames", "max_bytes", "timeout", "certify_frames", "gates", "below_gate", "score_only"),
    }


def test_a_compiled_codec_makes_the_same_data() -> None:
    spec = {"kind": "diffusers", "source": "folder"}
    plain, compiled = (dataclasses.replace(demo(), codec=codec) for codec in (spec, {**spec, "compiled": True}))
    assert plain.data_fields() == compiled.data_fields()
    assert compiled.to_json()["codec"]["compiled"] is True


def test_an_order_said_is_the_order_meant() -> None:
    assert dataclasses.replace(demo(), order=34).data_fields() == demo().data_fields()


def test_every_field_is_documented() -> None:
    source = inspect.getsource(DataRecipe)
    for field in dataclasses.fields(DataRecipe):
        after = source.split(f"    {field.name}: ", 1)[1].split('"""')
        assert len(after[1]) > 10, field.name


def test_split_is_a_stable_share() -> None:
    films = [f"{k:016x}" for k in range(4000)]
    share = np.mean([split_of(film, 0.1) == "validation" for film in films])
    assert 0.08 < share < 0.12
    assert {split_of(film, 0.0) for film in films} == {"train"}
    wider = [film for film in films if split_of(film, 0.2) == "validation"]
    assert all(film in wider for film in films if split_of(film, 0.1) == "validation")


def test_observed_frames() -> None:
    assert observed_frames(5, "every_second", "0").tolist() == [True, False, True, False, True]
    assert observed_frames(6, "every_second", "0").tolist() == [True, False, True, False, True, True]
    assert observed_frames(3, "all", "0").all()
    drawn = observed_frames(400, "random", "00ff00ff00ff00ff")
    assert drawn[0]
    assert drawn[-1]
    assert 150 < drawn.sum() < 250
    np.testing.assert_array_equal(drawn, observed_frames(400, "random", "00ff00ff00ff00ff"))
    assert (drawn != observed_frames(400, "random", "00ff00ff00ff00fe")).any()
