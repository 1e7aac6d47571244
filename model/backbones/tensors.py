"""Files of a network's tensors, and whether they are those of a given network."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

NAMED = 4
"""Names in a message; more are counted."""


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors by name, from a .safetensors file or one of `torch.save`; the latter is read without running code.

    A training checkpoint of the published DiT has its averaged weights under `ema`: those are taken.

    Raises:
        FileNotFoundError, ValueError: there is no such file, or it holds no tensors by name; the message names it.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged ({error}); fetch it again") from None
    try:
        values = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # whatever the unpickler meets in a file that holds more than tensors, or is damaged
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"{path} cannot be read as plain tensors ({reason}); convert it to safetensors, or fetch it again"
        ) from None
    if isinstance(values, dict) and isinstance(values.get("ema"), dict):
        values = values["ema"]
    if not isinstance(values, dict) or not all(isinstance(value, Tensor) for value in values.values()):
        raise ValueError(f"{path} holds no tensors by name; give a network's state_dict")
    return values


def check_tensors(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], where: str) -> None:
    """Compare names and shapes.

    Raises:
        ValueError: a tensor is missing, unexpected or of another shape; the message names `where` and the first few.
    """
    wrong = {
        "lacks": sorted(expected.keys() - found.keys()),
        "has unexpected": sorted(found.keys() - expected.keys()),
        "has another shape of": [
            f"{name} {tuple(found[name].shape)}, not {tuple(value.shape)}"
            for name, value in expected.items()
            if name in found and found[name].shape != value.shape
        ],
    }
    if any(wrong.values()):
        told = "; ".join(f"it {what} {_some(names)}" for what, names in wrong.items() if names)
        raise ValueError(f"{where} is of another network: {told}")


def _some(names: Iterable[str]) -> str:
    first = list(names)
    return ", ".join(first[:NAMED]) + (f" and {len(first) - NAMED} more" if len(first) > NAMED else "")
