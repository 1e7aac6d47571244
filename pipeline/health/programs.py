"""The programs of this machine: Python, the packages, ffmpeg, the weights of a recipe, and the code itself."""

from __future__ import annotations

import functools
import importlib.metadata
import platform
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from packaging.requirements import Requirement
from safetensors import SafetensorError, safe_open

import model
import pipeline
import storage
from model.ffmpeg import PATIENCE, encoders, environment, find_ffmpeg
from model.video import ENCODERS
from pipeline.health.finding import ERROR, OK, SKIPPED, WARNING, Finding
from pipeline.recipes import DataRecipe
from storage.fingerprint import file_digest, fingerprint

PROTOCOLS = ("file", "pipe")
EXTRAS = {"train": "torch", "pipeline": "ray", "flows": "prefect"}
"""The extras that a machine may have, and the package that tells whether it was meant to."""
INSTALL = "pip install --constraint constraints.txt '.[{}]'"
SAME_EVERYWHERE = ("ray", "torch", "numpy", "diffusers", "transformers")
"""Packages whose versions must agree on all nodes of a cluster."""


def check_python() -> Finding:
    """The version of Python, of which torch's and Ray's wheels allow two."""
    where = f"Python {platform.python_version()} at {sys.executable}"
    if not (3, 11) <= sys.version_info[:2] <= (3, 12):
        return Finding("python", ERROR, where, "use 3.11 or 3.12: make setup PYTHON=python3.12")
    return Finding("python", OK, f"{where}, {platform.platform()}")


def check_packages() -> list[Finding]:
    """The versions of what is installed against what this project asks for, extra by extra.

    `pip check` does not do this: it never compares an extra's requirements.
    """
    try:
        wanted = [Requirement(line) for line in importlib.metadata.requires("vlfm") or []]
    except importlib.metadata.PackageNotFoundError:
        return [Finding("packages", SKIPPED, "vlfm runs from a folder and is not installed: versions are not compared")]
    found = []
    for extra, sign in EXTRAS.items():
        own = [
            each for each in wanted if each.name != "vlfm" and each.marker and each.marker.evaluate({"extra": extra})
        ]
        have = {each.name: installed(each.name) for each in own}
        if have[sign] is None:
            found.append(
                Finding("packages", SKIPPED, f"[{extra}] is not installed", f"if needed: {INSTALL.format(extra)}")
            )
            continue
        missing = [each.name for each in own if have[each.name] is None]
        wrong = [f"{each.name} is {have[each.name]}, not {each.specifier}" for each in own if _is_wrong(each, have)]
        wrong += [f"{', '.join(missing)} missing"] if missing else []
        if wrong:
            found.append(Finding("packages", ERROR, f"[{extra}] {'; '.join(wrong)}", INSTALL.format(extra)))
        else:
            found.append(Finding("packages", OK, f"[{extra}] {sign} {have[sign]} and {len(own) - 1} others"))
    return found


def installed(name: str) -> str | None:
    """The version of a package, None where it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _is_wrong(wanted: Requirement, have: Mapping[str, str | None]) -> bool:
    version = have[wanted.name]
    return version is not None and not wanted.specifier.contains(version, prereleases=True)


def check_ffmpeg() -> Finding:
    """The ffmpeg that would be used, after its test (model.ffmpeg), with its protocols and its encoder of mp4."""
    found = find_ffmpeg()
    known = input_protocols(found.path)
    encoder = next((name for name in ENCODERS if name in encoders(found.path)), None)
    text = f"{found} at {found.path}; protocols {', '.join(PROTOCOLS)} and {len(known) - len(PROTOCOLS)} others"
    lacking = [name for name in PROTOCOLS if name not in known]
    if lacking:
        remedy = "name another one with VLFM_FFMPEG, or unset it: imageio-ffmpeg brings one that works"
        return Finding("ffmpeg", ERROR, f"{found} at {found.path} lacks the protocol {', '.join(lacking)}", remedy)
    if encoder is None:
        remedy = "write .gif or .webp, or name another ffmpeg with VLFM_FFMPEG"
        return Finding("ffmpeg", WARNING, f"{text}; it has no encoder for an mp4", remedy)
    return Finding("ffmpeg", OK, f"{text}; writes mp4 with {encoder}")


@functools.cache
def input_protocols(path: str) -> frozenset[str]:
    """The protocols that the ffmpeg at `path` reads from."""
    command = [path, "-hide_banner", "-protocols"]
    run = subprocess.run(command, capture_output=True, timeout=PATIENCE, env=environment())
    text = run.stdout.decode("utf-8", "replace").partition("Input:")[2].partition("Output:")[0]
    return frozenset(text.split())


def check_weights(recipe: DataRecipe) -> list[Finding]:
    """The weights that a data recipe names: they lie here, and their files are whole."""
    from model.weights import find_weights

    found = []
    for part, spec in (("codec", recipe.codec), ("text", recipe.text)):
        source = spec.get("source")
        if source is None:
            found.append(Finding("weights", OK, f"{part} {spec['kind']} of recipe {recipe.name} needs none"))
            continue
        weights = find_weights(source, spec.get("revision"))
        files = sorted(weights.folder.rglob("*.safetensors"))
        broken = []
        for file in files:
            try:
                with safe_open(file, "numpy") as tensors:  # compares the header with the length of the file
                    tensors.keys()
            except (SafetensorError, OSError) as error:
                broken.append(f"{file} is damaged ({error})")
        if broken or not files:
            told = "; ".join(broken) or f"{weights.folder} holds no .safetensors"
            found.append(Finding("weights", ERROR, told, "fetch it again, or install the package again"))
        else:
            size = sum(file.stat().st_size for file in files) / 1e6
            found.append(Finding("weights", OK, f"{part} {weights.name}: {len(files)} files, {size:.1f} MB"))
    return found


@functools.cache
def code_digest() -> str:
    """sha256 (hex) over the code that workers run: storage, model and pipeline. Equal where the code is."""
    # Code that was sent to a node has a folder of its own for each package.
    found = {}
    for package in (storage, model, pipeline):
        folder = Path(str(package.__file__)).resolve().parent
        for file in folder.rglob("*.py"):
            found[file.relative_to(folder.parent).as_posix()] = file_digest(file)
    return fingerprint(found)


def program_versions() -> dict[str, str | None]:
    """What must be the same on all nodes of a cluster: the code, and the versions that results depend on."""
    versions = {name: installed(name) for name in SAME_EVERYWHERE}
    return {"code": code_digest(), "Python": platform.python_version(), **versions}
