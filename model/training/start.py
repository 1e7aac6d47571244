"""The first weights of a run: those of an official DiT checkpoint, or of another run's backbone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import nn

from model.backbones.dit import Backbone, BackboneConfig
from model.backbones.embeddings import ScalarEmbedding
from model.backbones.published import official_weights, start_from_dit
from model.training.checkpoint import Run, averaged_weights
from model.training.integrity import CHECKSUMS
from model.training.record import RunRecord
from storage.fingerprint import stream_digest

SAME = ("channels", "height", "width_latent", "text_dim", "width", "depth", "heads", "patch", "qk_norm", "architecture")
"""What a backbone has in common with the one that its weights are from; outputs, times and rates may differ."""


class Start(Protocol):
    """Where first weights are from."""

    def describe(self) -> dict[str, str]:
        """`name`, without where it lies, and `sha256`. Raises FileNotFoundError where there is none."""
        ...

    def check(self, config: BackboneConfig) -> None:
        """Raises ValueError where the weights do not fit a backbone."""
        ...

    def load(self, backbone: Backbone) -> None:
        """Set a new backbone's weights, and what it has beside them to no effect. Raises as `check`."""
        ...


def start_from(path: Path) -> Start:
    """The start that `--init-from` names: a run's folder, or else an official checkpoint's file."""
    return FromRun(path) if path.is_dir() else FromDiT(path)


@dataclass(frozen=True)
class FromDiT:
    """An official DiT checkpoint (model/backbones/published.py)."""

    path: Path

    def describe(self) -> dict[str, str]:
        """As `Start.describe`."""
        if not self.path.is_file():
            raise FileNotFoundError(f"--init-from {self.path}: there is no such file, and no run's folder")
        return _named(self.path.name, self.path)

    def check(self, config: BackboneConfig) -> None:
        """As `Start.check`."""
        official_weights(self.path, config)

    def load(self, backbone: Backbone) -> None:
        """As `Start.load`."""
        start_from_dit(backbone, self.path)


@dataclass(frozen=True)
class FromRun:
    """The averaged weights of a run's newest checkpoint.

    Heads of names that it does not have start at zero, and so does what the network is told anew (the times of frames):
    at first they change nothing. A rate token is another key for the others, so attention changes a little.
    """

    path: Path

    @property
    def checkpoint(self) -> Path:
        """The folder of the newest checkpoint. Raises as `Run.checkpoint`."""
        return Run(self.path).checkpoint()

    def describe(self) -> dict[str, str]:
        """As `Start.describe`."""
        RunRecord.read(Run(self.path))  # a folder that is no run says so
        folder = self.checkpoint
        whole = folder / "average.safetensors"  # else the checksums of all processes' files stand for them
        return _named(f"{self.path.resolve().name}/{folder.name}", whole if whole.is_file() else folder / CHECKSUMS)

    def check(self, config: BackboneConfig) -> None:
        """As `Start.check`."""
        before = RunRecord.read(Run(self.path)).backbone
        other = {name: getattr(before, name) for name in SAME if getattr(before, name) != getattr(config, name)}
        if other:
            told = ", ".join(f"{name}={value}, not {getattr(config, name)}" for name, value in other.items())
            raise ValueError(
                f"--init-from {self.path}: its backbone has {told}; set the same with --set, on a dataset of the same "
                "latents and captions"
            )

    def load(self, backbone: Backbone) -> None:
        """As `Start.load`."""
        self.check(backbone.config)
        found, expected = averaged_weights(self.checkpoint), backbone.state_dict()
        backbone.load_state_dict({name: value for name, value in found.items() if name in expected}, strict=False)
        fresh = {name.split(".")[0] for name in expected.keys() - found.keys()}
        for name in fresh:
            embedding = getattr(backbone, name)
            if isinstance(embedding, ScalarEmbedding):
                nn.init.zeros_(embedding.second.weight)


def _named(name: str, path: Path) -> dict[str, str]:
    with open(path, "rb") as file:
        return {"name": name, "sha256": stream_digest(file)}
