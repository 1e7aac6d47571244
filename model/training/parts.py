"""Tensors that several processes write together: torch.distributed.checkpoint, in safetensors.

Its usual format has pickled metadata; that of its Hugging Face writer says in each file's own header which slices of
which tensors are there.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.training.sharding import is_sharded

PATTERN = "shard-*.safetensors"
"""Of the files' names."""


def write(tensors: Mapping[str, Tensor], folder: Path, group: Any) -> Any:
    """Have each process write its part of the tensors, as they are now; returns a future of the end of all of it.

    group: of the processes that each call this, by a backend of the CPU; None for one alone.
    """
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter  # takes a second to import
    from torch.distributed.checkpoint.state_dict_saver import async_save

    _quiet()
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    return async_save(dict(tensors), storage_writer=writer, process_group=group, no_dist=group is None)


def read(folder: Path, like: Callable[[str], Tensor | None], prefix: str = "") -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`, each sharded as `like(name)` is where that has its shape."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    _quiet()
    reader = HuggingFaceStorageReader(str(folder))
    found: Mapping[str, Any] = reader.read_metadata().state_dict_metadata
    into: dict[str, Any] = {}
    for name, about in found.items():
        if name.startswith(prefix):
            example, size, dtype = like(name), about.size, about.properties.dtype
            fits = example is not None and example.shape == size
            into[name] = torch.empty_like(example, dtype=dtype) if fits else torch.empty(size, dtype=dtype)  # type: ignore[arg-type]
    load(into, storage_reader=reader, no_dist=not any(is_sharded(value) for value in into.values()))
    return into


def wait(written: Any) -> None:
    """Wait for the parts of all processes. Raises OSError where one could not be written."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        written.result()
    except CheckpointException as error:
        reasons = [reason[0] if isinstance(reason, tuple) else reason for reason in error.failures.values()]
        first = next((reason for reason in reasons if isinstance(reason, OSError)), reasons[0])
        raise first from None


def _quiet() -> None:
    """torch warns of saving and loading in one process even where it is told of it."""
    warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized", UserWarning)
