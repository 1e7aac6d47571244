"""The record of a run: everything that resuming, sampling and evaluating need to know, without the lake.

It is `run.json`. Format 1, of the first program, knew VLFM alone: its options stood among the recipe's fields, and its
two figures beside them.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from model.backbones.dit import BackboneConfig
from model.methods.base import Method
from model.methods.registry import method_named
from model.methods.vlfm import VLFMOptions
from model.recipes import TrainRecipe
from model.training.checkpoint import Run

FORMAT = 2
RESUMABLE = frozenset(
    [
        "steps",
        "log_every",
        "checkpoint_every",
        "checkpoints_kept",
        "validate_every",
        "sample_every",
        "loader_workers",
        "bad_steps_allowed",
        "spike_factor",
        "activation_checkpointing",
        "checkpoints",
        "compile",
        "sharding",
        "accumulate",
    ]
)
"""Fields of the recipe that a resumed run may change."""


@dataclass(frozen=True)
class DatasetVersion:
    """Which version of a lake a run was trained on."""

    number: int
    merkle_root: str
    recipe_fingerprint: str


@dataclass(frozen=True)
class RunRecord:
    """A training run, as `run.json` describes it."""

    recipe: TrainRecipe
    """Method and options, network, optimiser."""
    figures: Mapping[str, float]
    """What the method measured of the training clips before the first step."""
    backbone: BackboneConfig
    """Shape of the network."""
    clip: Mapping[str, Any]
    """The dataset's clip format (`Version.clip`)."""
    codec: Mapping[str, Any]
    """The dataset's codec: `id, channels, factor, scale, spec`."""
    text: Mapping[str, Any]
    """The dataset's text encoder: `id, dim, length, spec, empty`."""
    version: DatasetVersion
    initialised_from: Mapping[str, str] | None = None
    """`name` and `sha256` of the checkpoint that the first weights are from; None where they are random."""

    def method(self) -> Method:
        """The method with its options and figures. Raises ValueError for options that cannot be."""
        method: Method = method_named(self.recipe.method).build(self.recipe.options, self.figures, self.clip)
        return method

    def to_json(self) -> dict[str, Any]:
        """Plain values, as `run.json` has them."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        plain = {name: dict(value) if isinstance(value, Mapping) else value for name, value in values.items()}
        recipe = dataclasses.asdict(self.recipe)
        changed = {"backbone": self.backbone.to_json(), "version": dataclasses.asdict(self.version)}
        return {"format": FORMAT, **plain, "recipe": recipe, **changed}

    @classmethod
    def from_json(cls, values: Mapping[str, Any], where: str = "run.json") -> RunRecord:
        """The record of `to_json`, or of a run of format 1.

        Raises:
            ValueError: another program wrote it; the message says `where` and what does not fit.
        """
        try:
            number = values["format"]
            if number not in (1, FORMAT):
                raise ValueError(f"its format is {number}")
            given = _of_format_1(values) if number == 1 else {k: v for k, v in values.items() if k != "format"}
            recipe = dict(given["recipe"])
            kind = method_named(recipe["method"]).Options
            options = kind(**{**getattr(kind, "BEFORE", {}), **recipe["options"]})
            return cls(
                **{
                    **given,
                    "recipe": TrainRecipe(**{**recipe, "options": options}),
                    "backbone": BackboneConfig.from_json(given["backbone"]),
                    "version": DatasetVersion(**given["version"]),
                }
            )
        except (KeyError, TypeError, ValueError) as error:
            told = f"it lacks {error}" if isinstance(error, KeyError) else error
            raise ValueError(f"{where} is of another version of vlfm ({told}); train a new run") from None

    @classmethod
    def read(cls, run: Run) -> RunRecord:
        """The record of a run's folder. Raises FileNotFoundError and ValueError as `Run.read` and `from_json`."""
        return cls.from_json(run.read(), str(run.file))

    def identity(self) -> dict[str, Any]:
        """What a checkpoint of this run is of, by name: the dataset's version, the codec, the settings, the program."""
        kept = {k: v for k, v in _settings(self.recipe).items() if k not in RESUMABLE and k != "name"}
        return {
            **{f"dataset_{name}": value for name, value in dataclasses.asdict(self.version).items()},
            "codec": self.codec["id"],
            **{f"setting_{name}": value for name, value in kept.items()},
            "program": program_version(),
        }

    def check_start(self, start: Mapping[str, str] | None, run: Run) -> None:
        """Refuses to go on with this run from another checkpoint's weights than it was started with.

        start: `name` and `sha256` of what is given now; none need be, once the run has a checkpoint of its own.

        Raises:
            ValueError: what differs, and the remedy.
        """
        before = self.initialised_from
        if start is None and (before is None or run.steps()):
            return
        if before is None:
            raise ValueError(f"the run {run.root} was started without --init-from; leave it out, or give another --run")
        if start is None:
            raise ValueError(
                f"the run {run.root} starts from {before['name']} and has no checkpoint yet: give --init-from again"
            )
        if before["sha256"] != start["sha256"]:
            raise ValueError(
                f"the run {run.root} was started from {before['name']} (sha256 {before['sha256'][:12]}), not from "
                f"{start['name']} ({start['sha256'][:12]}); leave --init-from out, or give another --run"
            )

    def differences(self, recipe: TrainRecipe) -> list[tuple[str, Any, Any]]:
        """Settings that must stay as they are in a run and that another recipe changes: (name, before, now)."""
        before = _settings(self.recipe)
        wanted = _settings(recipe).items()
        return [(k, before.get(k), now) for k, now in wanted if k not in RESUMABLE and before.get(k) != now]

    def check_resumable(
        self, recipe: TrainRecipe, version: DatasetVersion, run: Run, allow_mismatch: bool = False
    ) -> None:
        """Refuses to go on with this run under another method, other settings or on another version.

        allow_mismatch: whether to say so in one line instead, but for another method.

        Raises:
            ValueError: what differs, with both values and the remedy.
        """
        different = self.differences(recipe)
        other = self.version.merkle_root != version.merkle_root
        if different and different[0][0] == "method":
            different = different[:1]  # the rest follows from it
        elif allow_mismatch:
            changed = [f"{name}={before!r}, now {now!r}" for name, before, now in different]
            changed += [f"version {self.version.number} of its lake, now {version.number}"] if other else []
            if changed:
                print(f"warning: the run {run.root} was started with {', '.join(changed)}; it goes on", file=sys.stderr)
            return
        if different:
            told = ", ".join(f"{name}={before!r}, not {now!r}" for name, before, now in different)
            remedy = " ".join(f"--set {name}={before}" for name, before, _ in different)
            raise ValueError(f"the run {run.root} was started with {told}; give another --run, or the same: {remedy}")
        if other:
            raise ValueError(
                f"the run {run.root} trains on version {self.version.number} of its lake, "
                f"not on {version.number}; give another --run, or --version {self.version.number}"
            )


def program_version() -> str:
    """The version of this program; empty where its files are used without an installation."""
    try:
        return importlib.metadata.version("vlfm")
    except importlib.metadata.PackageNotFoundError:
        return ""


def _settings(recipe: TrainRecipe) -> dict[str, Any]:
    """The recipe's fields and those of its method, by name; the method first, since it decides which those are."""
    values = dataclasses.asdict(recipe)
    options = values.pop("options")
    return {"method": values.pop("method"), **values, **options}


def _of_format_1(values: Mapping[str, Any]) -> dict[str, Any]:
    options = {field.name for field in dataclasses.fields(VLFMOptions)}
    old = values["recipe"]
    recipe = {name: value for name, value in old.items() if name not in options}
    return {
        "recipe": {**recipe, "method": values["method"], "options": {k: v for k, v in old.items() if k in options}},
        "figures": {name: values[name] for name in ("mean_scale", "derivative_scale")},
        **{name: values[name] for name in ("backbone", "clip", "codec", "text", "version")},
    }
