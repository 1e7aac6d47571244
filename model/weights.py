"""Pretrained weights: where they lie, which ones they are, and one clear sentence when they are missing.

The network is never asked: a hub id is looked up in the local Hugging Face cache, so that a run neither starts a
download of gigabytes nor changes its weights under way. Only safetensors are read and no code of a repository is run.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

Loaded = TypeVar("Loaded")


SHIPPED = Path(__file__).parent / "shipped"
"""Folders of weights that come with this package; each is known by its folder's name."""
FILES = ("*model.safetensors", "*.json", "*.txt")
"""What is read of a hub repository: one precision of the weights, configs, tokenizers."""


class CodecUnavailable(RuntimeError):
    """Weights of a codec or a text encoder cannot be had; the message is one sentence that says how to get them."""


@dataclass(frozen=True)
class Weights:
    """A folder of pretrained weights on this machine."""

    source: str
    """The hub id, a shipped folder's name, or the folder's absolute path: what finds the weights again from another
    working directory."""
    folder: Path
    """Where the files lie."""
    name: str
    """Hub id, or the folder's last name: fit for ids, no machine path."""
    revision: str | None
    """Commit of the hub's repository; None for a plain folder."""


def is_shipped(source: str | Path) -> bool:
    """Whether `source` names weights that come with this package."""
    return "/" not in str(source) and (SHIPPED / source / "model_index.json").is_file()


def find_weights(source: str | Path, revision: str | None = None) -> Weights:
    """The folder of `source`: the name of shipped weights (`vlfm-small`), a local folder, or a hub id (`owner/name`) in
    the local Hugging Face cache.

    revision: branch, tag or commit of a hub id; the commit it stands for is recorded. A folder has none.
    Raises CodecUnavailable where nothing is found, ValueError for a revision of a plain folder.
    """
    if is_shipped(source):
        if revision is not None:
            raise ValueError(f"{source} comes with vlfm and has no revision {revision!r}: leave the revision out")
        return Weights(str(source), SHIPPED / source, str(source), None)
    folder = Path(source).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise ValueError(f"{source} is a folder and has no revision {revision!r}: leave the revision out")
        return Weights(str(folder.resolve()), folder, folder.resolve().name, None)
    name = str(source)
    if name.startswith(("/", ".", "~")) or name.count("/") != 1:
        raise CodecUnavailable(
            f"{name} is neither an existing folder nor a hub id of the form owner/name: check the path, or fetch "
            "weights with `hf download stable-diffusion-v1-5/stable-diffusion-v1-5` and name it by that id"
        )
    return _cached(name, revision)


def _cached(name: str, revision: str | None) -> Weights:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        folder = Path(snapshot_download(name, revision=revision, local_files_only=True, allow_patterns=list(FILES)))
    except (OSError, HfHubHTTPError, HFValidationError, ValueError) as error:
        raise CodecUnavailable(missing(name, revision)) from error
    return Weights(name, folder, name, folder.name)


def missing(name: str, revision: str | None = None) -> str:
    """The sentence for weights that are not on this machine, with the command that fetches them."""
    wanted = " ".join(f"--include '{pattern}'" for pattern in FILES)
    pinned = f" --revision {revision}" if revision else ""
    return (
        f"the weights {name}{' at ' + revision if revision else ''} are not on this machine: with network run "
        f"`hf download {name}{pinned} {wanted}`, or pass the folder they lie in"
    )


def load_part(
    load: Callable[..., Loaded],
    weights: Weights,
    part: str,
    files: tuple[str, ...] = ("*.safetensors",),
    options: Mapping[str, object] | None = None,
) -> Loaded:
    """Calls a library's `from_pretrained` on one part (a subfolder, "" for the folder itself) of `weights`.

    files: patterns of which one must be there.  options: for the loader.
    Raises CodecUnavailable in one sentence for what is missing or broken.
    """
    folder = weights.folder / part if part else weights.folder
    place = f"{weights.name}/{part}" if part else weights.name
    if not any(any(folder.glob(pattern)) for pattern in files):
        why = " (other formats can run code and are not read)" if "*.safetensors" in files else ""
        remedy = (
            missing(weights.name, weights.revision) if weights.revision else "fetch it whole or pass another folder"
        )
        raise CodecUnavailable(f"{place} has no {' or '.join(files)}{why}; {remedy}")
    safe = {"use_safetensors": True} if "*.safetensors" in files else {}
    expected = getattr(getattr(load, "__self__", None), "__name__", "")
    if (folder / "config.json").is_file() and expected:
        found = json.loads((folder / "config.json").read_text()).get("_class_name", expected)
        if found != expected:
            raise CodecUnavailable(f"{place} holds a {found}, a codec needs {expected} there: pass another folder")
    try:
        with _without_progress_bars():
            return load(str(folder), local_files_only=True, **safe, **(options or {}))
    except Exception as error:  # Any failure of a library's loader is the same to the user: these files are no good.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CodecUnavailable(
            f"{place} cannot be loaded ({reason}): fetch its files again, or pass another folder"
        ) from error


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    """Keeps transformers from drawing a bar of its own for every folder it reads."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def digest_tensors(tensors: Mapping[str, Tensor]) -> str:
    """sha256 (hex) of named tensors: names, types, shapes and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
