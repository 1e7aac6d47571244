"""Stands for another processor: every computed embedding, latent and coefficient is off by one unit in the last place.

`VLFM_TEST_PERTURB=1` makes tests/conftest.py install it in pytest and, by sitecustomize.py here on PYTHONPATH, in every
Python that a test starts: Ray's workers, torchrun's processes, the command line. The directions are drawn anew for
every call, so the same caption or frame never gives the same bits twice. No production code knows of it.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any


@functools.cache
def _random() -> Any:
    import numpy as np

    return np.random.default_rng()


def neighbours(values: Any) -> Any:
    """Each number of a float array moved to the next one of its type, up or down; zeros (padding) stay."""
    import numpy as np

    upwards = _random().random(values.shape) < 0.5
    moved = np.nextafter(values, np.where(upwards, np.inf, -np.inf).astype(values.dtype))
    return np.where((values == 0) | ~np.isfinite(moved), values, moved)


def _tensor(values: Any, kind: str) -> Any:
    """A tensor's numbers moved as numbers of the type `kind` ("float16", "float32"), in its own type and place."""
    import torch

    plain = values.detach().cpu().numpy()
    return torch.from_numpy(neighbours(plain.astype(kind)).astype(plain.dtype)).to(values.device)


def _prompts(module: ModuleType) -> None:
    encode = module.TextEncoder.encode

    @functools.wraps(encode)
    def perturbed(self: Any, captions: Sequence[str], padded: bool = False) -> Any:
        embeddings, lengths = encode(self, captions, padded)
        return _tensor(embeddings, "float16"), lengths

    module.TextEncoder.encode = perturbed


def _linear(module: ModuleType) -> None:
    encode = module.LinearCodec.encode

    @functools.wraps(encode)
    def perturbed(self: Any, frames: Any, text: Any = None) -> Any:
        found = encode(self, frames, text)
        if self._identity:  # it adds nothing that could round
            return found
        return type(found)(_tensor(found.latents, "float32"))

    module.LinearCodec.encode = perturbed


def _diffusers(module: ModuleType) -> None:
    encode = module.DiffusersCodec.encode

    @functools.wraps(encode)
    def perturbed(self: Any, frames: Any, text: Any = None) -> Any:
        found = encode(self, frames, text)
        return type(found)(_tensor(found.latents, "float32"), found.residual, found.round_trip)

    module.DiffusersCodec.encode = perturbed


def _invert(module: ModuleType) -> None:
    stored = module.InvertStage._stored

    @functools.wraps(stored)
    def perturbed(self: Any, work: Any, latents: Any) -> Any:
        found = stored(self, work, latents)
        if found.failure is None:
            found.latents = neighbours(found.latents)
        return found

    module.InvertStage._stored = perturbed


def _project(module: ModuleType) -> None:
    process = module.ProjectStage.process

    @functools.wraps(process)
    def perturbed(self: Any, works: Any) -> Iterator[Any]:
        for work in process(self, works):
            if work.failure is None:
                work.coefficients = neighbours(work.coefficients)
            yield work

    module.ProjectStage.process = perturbed


WRAPPED: dict[str, Callable[[ModuleType], None]] = {
    "model.text.encoder": _prompts,
    "model.codecs.linear": _linear,
    "model.codecs.diffusers": _diffusers,
    "pipeline.stages.invert": _invert,
    "pipeline.stages.project": _project,
}


class _Loader(importlib.abc.Loader):
    def __init__(self, loader: Any, wrap: Callable[[ModuleType], None]) -> None:
        self.loader, self.wrap = loader, wrap

    def create_module(self, spec: Any) -> Any:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        self.wrap(module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)  # inspect and linecache ask the loader for the source


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        wrap = WRAPPED.get(name)
        spec = importlib.machinery.PathFinder.find_spec(name, path, target) if wrap else None
        if wrap and spec is not None:
            spec.loader = _Loader(spec.loader, wrap)
        return spec


def install() -> None:
    """From here on the modules in WRAPPED are wrapped as they are imported."""
    imported = sorted(set(WRAPPED) & set(sys.modules))
    assert not imported, f"install the hook before {', '.join(imported)}"
    sys.meta_path.insert(0, _Finder())
