"""What each layer may import: the chain of packages, the trainer's lean image, a command line that starts at once."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("flows", "pipeline", "model", "storage")
UNSAFE_MODULES = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
UNSAFE_CALLS = {"torch.load", "torch.save", "torch.hub.load"}


def loaded_by(modules: list[str], suspects: list[str]) -> list[str]:
    """Those of `suspects` that are loaded after `modules` were imported, in a Python of its own."""
    names = ", ".join(modules)
    program = f"import sys, json, {names}\nprint(json.dumps([s for s in {suspects!r} if s in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return list(json.loads(done.stdout.splitlines()[-1]))


def test_imports_run_one_way() -> None:
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache", "--no-logo"]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 kept, 0 broken" in done.stdout


def test_the_trainer_is_lean() -> None:
    """`pip install .[train]` has none of these."""
    programs = ["model.train", "model.sample", "model.evaluate", "storage.version", "storage.shards"]
    absent = ["ray", "prefect", "zarr", "icechunk", "ffmpeg", "imageio_ffmpeg"]
    assert loaded_by(programs, absent) == []
    assert loaded_by(programs, ["torch"]) == ["torch"], "the check itself sees nothing"


def test_a_worker_plans_without_prefect() -> None:
    assert loaded_by(["pipeline.ingest", "pipeline.runner"], ["prefect", "ray", "zarr", "icechunk", "diffusers"]) == []


def test_the_command_line_starts_at_once() -> None:
    heavy = ["torch", "numpy", "pyarrow", "ray", "prefect", "zarr", "icechunk", "diffusers", "transformers"]
    assert loaded_by(["flows.cli"], heavy) == []


def test_docker_is_no_package() -> None:
    """A package of that name would hide the one that Prefect imports."""
    assert list((ROOT / "docker").rglob("*.py")) == []


def unsafe_uses(source: str) -> list[str]:
    """What could run code from a file: pickle and its kin, torch.load and torch.save, allow_pickle other than False."""
    names: dict[str, str] = {}
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                names[alias.asname or alias.name.partition(".")[0]] = (
                    alias.name if alias.asname else alias.name.split(".")[0]
                )
                found += [alias.name] * (alias.name.partition(".")[0] in UNSAFE_MODULES)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found += [node.module] * (node.module.partition(".")[0] in UNSAFE_MODULES)
            for alias in node.names:
                names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute | ast.Name):
            first, _, rest = ast.unparse(node).partition(".")
            called = names.get(first, first) + ("." + rest if rest else "")
            found += [called] * (called in UNSAFE_CALLS)
        elif isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            found += [ast.unparse(node)] * (ast.unparse(node.value) != "False")
    return found


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import torch\ntorch.save(1, 'x')",
        "import torch as t\nt.load('x')",
        "from torch import load as read\nread('x')",
        "import numpy as np\nnp.load('x', allow_pickle=True)",
    ],
)
def test_unsafe_uses_are_seen(source: str) -> None:
    assert unsafe_uses(source)


def test_there_is_no_pickle() -> None:
    modules = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    assert len(modules) > 50
    found = {str(path.relative_to(ROOT)): uses for path in modules if (uses := unsafe_uses(path.read_text()))}
    assert found == {}
