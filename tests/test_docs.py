"""The documents against the code: their commands exist, the layout is the code's, and no file tells of a machine."""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from flows import cli
from model.recipes import train_recipe
from model.settings import override
from pipeline.recipes import recipe_named

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("flows", "pipeline", "model", "storage")
README = (ROOT / "README.md").read_text()
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
DOCS = "\n".join(path.read_text() for path in DOCUMENTS)
PLACEHOLDERS = {"SCHEDULE-ID": "00000000-0000-0000-0000-000000000000"}
"""Words of the documents that a reader replaces, and something that a parser takes in their place."""


def blocks(language: str) -> list[str]:
    """The documents' code blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", DOCS, re.MULTILINE | re.DOTALL)


def command_lines() -> list[list[str]]:
    """The words of every command in the documents' shell blocks, without comments."""
    lines = "".join(blocks("sh")).replace("\\\n", " ").splitlines()
    found = [shlex.split(line, comments=True) for line in lines]
    # An assignment before a command is for its environment.
    return [words[1:] if re.match(r"[A-Z_]+=", words[0]) else words for words in found if words]


def of_program(name: str) -> list[list[str]]:
    """The words behind a program of the environment, or behind its bare name."""
    found = [words[1:] for words in command_lines() if words[0] in (name, f".venv/bin/{name}")]
    return [[PLACEHOLDERS.get(word, word) for word in words] for words in found]


def inline(name: str) -> list[list[str]]:
    """The words behind a program's name in the documents' running text."""
    spans = re.findall(r"(?<!`)`([^`\n]+)`(?!`)", re.sub(r"^```.*?^```$", "", DOCS, flags=re.MULTILINE | re.DOTALL))
    return [span.split()[1:] for span in spans if span.split()[0] in (name, f".venv/bin/{name}") and " " in span]


def as_text(words: list[str]) -> str:
    return shlex.join(words)


def help_of(command: str) -> str:
    """What `vlfm COMMAND --help` prints."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        cli.parser(command).parse_args([command, "--help"])
    return out.getvalue()


def check_options_are_spelt_out(words: list[str], text: str) -> None:
    """argparse takes abbreviations, and the documents must not teach them."""
    for option in (word.split("=")[0] for word in words if word.startswith("--")):
        assert re.search(rf"(?<![\w-]){re.escape(option)}(?![\w-])", text), f"there is no option {option}"


def test_the_readme_has_commands_of_every_program() -> None:
    """So that no check below passes for lack of anything to check."""
    programs = {words[0] for words in command_lines()}
    checked = {"make"} | {f".venv/bin/{name}" for name in ("vlfm", "prefect", "hf", "pip")}
    assert programs - {"export", "python3.12", ".venv/bin/python", ".venv/bin/ray"} == checked
    for name in sorted(checked - {"make"}):
        assert Path(sys.executable).with_name(Path(name).name).exists(), f"{name} is not in the environment"


@pytest.mark.parametrize("words", of_program("vlfm"), ids=as_text)
def test_vlfm_takes_the_readmes_lines(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert words[0] in cli.COMMANDS
    try:
        options = cli.parser(words[0]).parse_args(words)
    except SystemExit:
        pytest.fail(capsys.readouterr().err)
    check_options_are_spelt_out(words, help_of(words[0]))
    if words[0] in ("ingest", "train"):
        recipe: Any = recipe_named(options.recipe) if words[0] == "ingest" else train_recipe(options.recipe)
        settings = dict(pair.split("=", 1) for pair in options.settings)
        assert not settings or override(recipe, settings) != recipe


@pytest.mark.parametrize("words", inline("vlfm"), ids=as_text)
def test_vlfm_has_what_the_text_names(words: list[str]) -> None:
    if words[0] != "COMMAND":
        assert words[0] in cli.COMMANDS
        check_options_are_spelt_out(words, help_of(words[0]))


def test_every_command_of_vlfm_is_in_the_readme() -> None:
    assert {words[0] for words in of_program("vlfm")} == set(cli.COMMANDS)


@pytest.mark.parametrize("words", of_program("make") + inline("make"), ids=as_text)
def test_make_has_the_readmes_targets(words: list[str]) -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    variables = set(re.findall(r"^([A-Z]+) *\?=", makefile, re.MULTILINE))
    for word in words:
        name, given, _ = word.partition("=")
        assert name in (variables if given else targets)


def test_torchrun_takes_the_readmes_lines() -> None:
    from torch.distributed.run import get_args_parser

    from model import train

    lines = [words[2:] for words in of_program("python") if words[:2] == ["-m", "model.torchrun"]]
    assert lines
    for words in lines:
        launched = get_args_parser().parse_args(words)
        assert launched.module
        assert launched.training_script == "model.train"
        parser = argparse.ArgumentParser()
        train.arguments(parser)
        options = parser.parse_args(launched.training_script_args)
        assert train_recipe(options.recipe)
        check_options_are_spelt_out(launched.training_script_args, parser.format_help())
        assert "--run" not in launched.training_script_args, "torchrun takes --run for an option of its own"


def test_prefect_takes_the_readmes_lines(tmp_path: Path) -> None:
    """Parsed by Prefect's own command line and not run; tests/flows/test_deployment.py runs them."""
    program = (
        "import json, sys\n"
        "from prefect.cli._app import _app\n"
        "for words in json.load(sys.stdin):\n"
        "    _app.parse_args(words, exit_on_error=False, print_error=False)\n"
    )
    environment = {**os.environ, "PREFECT_HOME": str(tmp_path), "DO_NOT_TRACK": "1"}

    def parse(lines: list[list[str]]) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", program]
        return subprocess.run(command, input=json.dumps(lines), text=True, capture_output=True, env=environment)

    lines = of_program("prefect")
    assert len(lines) >= 6
    done = parse(lines)
    assert done.returncode == 0, done.stderr[-2000:]
    assert parse([["deployment", "run", "ingest/ingest", "--wach"]]).returncode != 0


def test_the_deployments_have_their_flows_parameters() -> None:
    yaml = pytest.importorskip("yaml")
    deployments = yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]
    known = set()
    for deployment in deployments:
        path, _, function = deployment["entrypoint"].partition(":")
        module = ast.parse((ROOT / path).read_text())
        (flow,) = [node for node in module.body if isinstance(node, ast.FunctionDef) and node.name == function]
        parameters = {argument.arg for argument in flow.args.args}
        known |= parameters
        assert set(deployment["parameters"]) <= parameters
        assert f"{deployment['name']}/{deployment['name']}" in DOCS
    given = [word.partition("=")[0] for words in of_program("prefect") for word in words if "=/" in word]
    assert {"source", "lake"} <= set(given) <= known


def test_hf_takes_the_readmes_lines() -> None:
    for words in of_program("hf"):
        command = [str(Path(sys.executable).with_name("hf")), words[0], "--help"]
        done = subprocess.run(command, text=True, capture_output=True, env={**os.environ, "COLUMNS": "200"})
        assert done.returncode == 0, done.stderr
        check_options_are_spelt_out(words, re.sub(r"\x1b\[[0-9;]*m", "", done.stdout))


def extras() -> set[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return set(project["optional-dependencies"])


def test_every_extra_is_in_the_readme_and_no_other() -> None:
    assert set(re.findall(r"\.\[(\w+)\]", DOCS)) == extras()
    for words in of_program("pip"):
        assert set(re.findall(r"\.\[(\w+)\]", " ".join(words))) <= extras()
        assert (ROOT / words[words.index("--constraint") + 1]).is_file()


def listed_modules() -> list[str]:
    """Paths of the .py files in the layout of docs/architecture.md, by its indentation; each line has a caption."""
    (tree,) = [block for block in blocks("text") if block.startswith("flows/")]
    folders: list[str] = []
    found = []
    for line in tree.splitlines():
        entry = re.fullmatch(r"( *)(\S+)  +(\S.*)", line)
        assert entry is not None, f"a line without a caption: {line}"
        depth, name = len(entry[1]) // 2, entry[2]
        folders = folders[:depth]
        if name.endswith("/"):
            folders.append(name)
        elif name.endswith(".py"):
            found.append("".join(folders) + name)
        else:
            assert (ROOT / name).exists(), f"{name} is in the layout and not there"
    return found


def test_the_layout_lists_exactly_the_modules() -> None:
    there = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    modules = {path.relative_to(ROOT).as_posix() for path in there if path.name != "__init__.py"}
    listed = listed_modules()
    assert len(listed) == len(set(listed))
    assert set(listed) == modules
    for path in there:
        if path.name == "__init__.py":
            kinds = {type(node) for node in ast.parse(path.read_text()).body}
            assert kinds <= {ast.Expr, ast.ImportFrom, ast.Assign}, f"{path} holds more than a package's public names"


def test_the_reasons_of_bad_films_are_the_codes() -> None:
    table = DOCS.split("| reason | status |")[1].split("\n\n")[0]
    reasons = [
        reason
        for row in table.splitlines()
        if row.startswith("| `")
        for reason in re.findall(r"`(\w+)`", row.split("|")[1])
    ]
    code = "\n".join(path.read_text() for path in (ROOT / "pipeline").rglob("*.py"))
    assert len(reasons) > 15
    assert [reason for reason in reasons if f'"{reason}"' not in code] == []


def test_every_erratum_names_its_test() -> None:
    def tests(path: Path) -> set[str]:
        body = ast.parse(path.read_text()).body
        return {node.name for node in body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}

    named = set(re.findall(r"`(test_\w+)`", (ROOT / "docs" / "method.md").read_text()))
    assert tests(ROOT / "tests" / "model" / "test_errata.py") <= named
    there = set().union(*(tests(path) for path in (ROOT / "tests" / "model").rglob("test_*.py")))
    assert sorted(named - there) == []


def test_links_lead_somewhere() -> None:
    for document in [*DOCUMENTS, ROOT / "CHANGELOG.md", ROOT / "docker/README.md"]:
        for target in re.findall(r"\]\(([^)#]+)\)", document.read_text()):
            assert "://" in target or (document.parent / target).exists(), f"{document.name}: {target}"


# --- what no file of the project may tell ---

MACHINE_PATH = re.compile(r"(?<![\w.})-])/(?:{})(?![\w-])".replace("{}", "|".join(("root", "work", "tmp"))))
KNOWN_HOSTS = {"127.0.0.1", "localhost", "server", "prefect-server", "bucket", "BUCKET", "arxiv.org", "www.apache.org"}
"""`server` is a service of docker/compose.yaml, `prefect-server` one of docker/k8s, `bucket` an example, `BUCKET` what
people write their own for."""


def project_files() -> dict[str, str]:
    """The text of every file that git tracks, or would."""
    git = shutil.which("git")
    if git is None or not (ROOT / ".git").exists():
        pytest.skip("no git here to say which files are the project's")
    command = [git, "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listing = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, check=True).stdout
    texts = {}
    for name in filter(None, listing.split("\0")):
        with contextlib.suppress(UnicodeDecodeError, FileNotFoundError, IsADirectoryError):
            texts[name] = (ROOT / name).read_text("utf-8")
    return texts


def test_no_machine_paths() -> None:
    assert MACHINE_PATH.search('open("' + "/tm" + 'p/x")')
    assert not MACHINE_PATH.search("http://127.0.0.1/work-pools and ../work/x")
    containers = ("docker/k8s/", "docker/compose.yaml", "tests/bench/containers.py")  # paths inside them
    files = {name: text for name, text in project_files().items() if not name.startswith(containers)}
    assert {name: hit[0] for name, text in files.items() if (hit := MACHINE_PATH.search(text))} == {}


def test_no_host_names() -> None:
    found = [
        (name, host)
        for name, text in project_files().items()
        for host in re.findall(r"\b(?:https?|s3|git)://([\w.-]+)", text)
        if host not in KNOWN_HOSTS
    ]
    assert found == []


def test_the_constraints_name_no_registry() -> None:
    lines = [line.partition("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines()]
    assert [line for line in lines if line and not re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.!+_-]+", line)] == []


def test_the_readme_is_short() -> None:
    assert len(README.encode()) <= 9000


def test_no_document_leaves_the_repository() -> None:
    assert [str(path) for path in DOCUMENTS if "../shared" in path.read_text()] == []


def test_every_name_in_the_documents_exists() -> None:
    """Files and dotted names of ours in backquotes."""
    git = set(project_files())
    missing = []
    for span in re.findall(
        r"(?<!`)`([^`\n]+)`(?!`)", re.sub(r"^```.*?^```$", "", DOCS, flags=re.MULTILINE | re.DOTALL)
    ):
        if re.fullmatch(r"(flows|pipeline|model|storage|tests|docs|docker)(/[\w.-]+)*/?", span):
            known = span.rstrip("/") in git or any(name.startswith(span.rstrip("/") + "/") for name in git)
            missing += [] if known else [span]
        elif re.fullmatch(r"(flows|pipeline|model|storage)(\.\w+)+", span):
            missing += [] if resolves(span) else [span]
    assert missing == []


def resolves(dotted: str) -> bool:
    """Whether `package.module[.name[.name]]` can be imported or reached."""
    parts = dotted.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for name in parts[cut:]:
            fields = getattr(found, "__dataclass_fields__", {})
            if not hasattr(found, name) and name not in fields:
                return False
            found = getattr(found, name, None)
        return True
    return False
