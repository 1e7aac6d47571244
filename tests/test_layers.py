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
HEAVY = {
    "boto3", "botocore", "diffusers", "ffmpeg", "huggingface_hub", "icechunk", "imageio_ffmpeg", "numpy", "PIL",
    "prefect", "pyarrow", "ray", "torch", "torchdiffeq", "transformers", "webdataset", "zarr",
}  # fmt: skip
"""What a function may import when it is called: big to load, or not there where the rest of its module is used."""
STARTS_AT_ONCE = {"flows.cli", "flows.demo"}
"""Modules of the command line, which import nothing of ours until a command is known."""
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
    assert "3 kept, 0 broken" in done.stdout


def sources() -> dict[str, str]:
    """The source of every module of ours, by its full name."""
    found = {}
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = path.read_text()
    return found


def imports_of(source: str, modules: set[str]) -> tuple[set[str], set[str]]:
    """What a source imports: (outside, inside) of its functions. Imports for type checking only are left out."""
    outside: set[str] = set()
    inside: set[str] = set()

    def visit(node: ast.AST, found: set[str]) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                found |= {alias.name for alias in child.names}
            elif isinstance(child, ast.ImportFrom) and child.module:
                whole = {alias.name: f"{child.module}.{alias.name}" for alias in child.names}
                found |= {name if name in modules else child.module for name in whole.values()}
            elif not (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)):
                visit(child, inside if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) else found)

    visit(ast.parse(source), outside)
    return outside, inside


def unjustified(sources: dict[str, str]) -> list[str]:
    """Imports inside a function that are there for no good reason, of all modules' `sources`.

    A good reason is that what is imported is heavy: one of HEAVY, or a module of ours that imports one of them,
    directly or not. To break a circle is none: a module of ours that is imported inside a function must not lead back.
    """
    imports = {name: imports_of(source, set(sources)) for name, source in sources.items()}

    def reached(name: str) -> set[str]:
        seen: set[str] = set()
        waiting = [name]
        while waiting:
            module = waiting.pop()
            if module not in seen:
                seen.add(module)
                waiting += [found for part in imports.get(module, ()) for found in part]
        return seen

    problems = []
    for name, (_, inside) in imports.items():
        for module in sorted(inside):
            reach = reached(module)
            if name in reach:
                problems.append(f"{name} imports {module} inside a function, which imports {name} again")
            elif module in imports and name not in STARTS_AT_ONCE and not {m.partition(".")[0] for m in reach} & HEAVY:
                problems.append(f"{name} imports {module} inside a function, which loads nothing heavy")
            elif module not in imports and module.partition(".")[0] not in HEAVY | sys.stdlib_module_names:
                problems.append(f"{name} imports {module} inside a function, which is not in the list of heavy ones")
    return problems


def test_no_import_is_lazy_to_break_a_circle() -> None:
    assert unjustified(sources()) == []
    inside = "def f():\n    from storage.{} import x"
    for one, other, message in (
        ("from storage.b import x", inside.format("a"), "storage.b imports storage.a inside a function, which imports"),
        (inside.format("b"), "import storage.c", "storage.a imports storage.b inside a function, which imports"),
        ("", inside.format("c"), "storage.b imports storage.c inside a function, which loads nothing"),
        ("def f():\n    import attrs", "", "storage.a imports attrs inside a function, which is not in the list"),
    ):
        found = unjustified({"storage.a": one, "storage.b": other, "storage.c": "import storage.a"})
        assert any(line.startswith(message) for line in found), found
    assert unjustified({"storage.a": inside.format("b"), "storage.b": "def f():\n    import torch"}) == []


def test_the_trainer_is_lean() -> None:
    """`pip install .[train]` has none of these."""
    programs = ["model.train", "model.sample", "model.pipeline", "model.evaluate", "storage.version", "storage.shards"]
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
    """What could run code from a file: pickle and its kin, torch.load without weights_only=True and torch.save,
    allow_pickle other than False."""
    names: dict[str, str] = {}
    found = []
    tree = ast.parse(source)
    safe = {
        node.func
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and any(ast.unparse(word) == "weights_only=True" for word in node.keywords)
    }
    for node in ast.walk(tree):
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
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute | ast.Name) and node not in safe:
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
        "import torch\ntorch.load('x', weights_only=False)",
        "import torch\nread = torch.load\nread('x', weights_only=True)",
        "from torch import load as read\nread('x')",
        "import numpy as np\nnp.load('x', allow_pickle=True)",
    ],
)
def test_unsafe_uses_are_seen(source: str) -> None:
    assert unsafe_uses(source)
    assert not unsafe_uses("import torch\ntorch.load('x', weights_only=True)")


def test_there_is_no_pickle() -> None:
    modules = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    assert len(modules) > 50
    found = {str(path.relative_to(ROOT)): uses for path in modules if (uses := unsafe_uses(path.read_text()))}
    assert found == {}
