"""Expected errors have one base class with a kind, wherever they are raised; programs know them by that alone."""

from __future__ import annotations

import copy
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from flows.server import ServerError
from model.ffmpeg import NoFfmpeg
from model.weights import CodecUnavailable
from pipeline.cluster import RunnerError
from pipeline.ingest.pack import PackError
from pipeline.ingest.report import AccountError
from pipeline.media.faults import DecodeError
from pipeline.sources.tables import SourceError
from storage.errors import Kind, VlfmError, is_expected
from storage.layout import DiskFull, LakeBusy, LakeError
from storage.shards import DamagedShard

ROOT = Path(__file__).parents[2]

ERRORS: list[tuple[VlfmError, Kind, type[Exception]]] = [
    (LakeError("no lake"), Kind.INPUT, Exception),
    (LakeBusy("in use"), Kind.CONFLICT, LakeError),
    (DiskFull("/lake/file", 7), Kind.ENVIRONMENT, OSError),
    (DamagedShard("torn"), Kind.DAMAGE, Exception),
    (CodecUnavailable("no weights"), Kind.ENVIRONMENT, RuntimeError),
    (NoFfmpeg("none works"), Kind.ENVIRONMENT, OSError),
    (SourceError("no films"), Kind.INPUT, ValueError),
    (DecodeError("corrupt", "it cannot be decoded"), Kind.INPUT, Exception),
    (DecodeError("no_ffmpeg", "none works"), Kind.ENVIRONMENT, Exception),
    (PackError("another codec"), Kind.CONFLICT, RuntimeError),
    (RunnerError("Ray cannot start"), Kind.ENVIRONMENT, RuntimeError),
    (ServerError("Prefect does not start"), Kind.ENVIRONMENT, RuntimeError),
]


@pytest.mark.parametrize(("error", "kind", "also"), ERRORS, ids=lambda value: getattr(value, "__name__", None))
def test_each_has_its_kind_and_its_second_class(error: VlfmError, kind: Kind, also: type[Exception]) -> None:
    assert isinstance(error, also)
    assert error.kind is kind
    assert is_expected(error)
    again = copy.copy(error)  # made anew from its arguments, as Ray does with an error that travels
    assert (type(again), str(again), again.kind) == (type(error), str(error), kind)


def test_the_remedy_follows_the_message() -> None:
    error = VlfmError("there is no film", "name a folder", Kind.CONFLICT)
    assert str(error) == "there is no film; name a folder"
    assert (error.message, error.remedy, error.kind) == ("there is no film", "name a folder", Kind.CONFLICT)
    full = DiskFull("/lake/file", 7)
    assert full.remedy == "make room and run the same command again, what is done is kept"
    assert (full.filename, full.free, full.errno) == ("/lake/file", 7, 28)


def test_a_defect_keeps_its_traceback() -> None:
    assert not is_expected(AccountError("these are 4, not 5"))
    assert not is_expected(RuntimeError("who knows"))
    assert not is_expected(KeyError("clip"))
    assert is_expected(ValueError("rate = 0 cannot be"))
    assert is_expected(FloatingPointError("the loss is not finite"))


def test_every_error_that_users_see_derives_from_it() -> None:
    """A new public error class outside the base class would end a program with a traceback."""
    control = {"Stopped", "StepFailed", "IngestFailed", "FirstFailed"}  # these end a program in their own way
    found = set()
    for package in ("storage", "model", "pipeline", "flows"):
        for path in sorted((ROOT / package).rglob("*.py")):
            if "Error" not in path.read_text() and "Exception" not in path.read_text():
                continue
            module = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
            for name, value in vars(module).items():
                error = isinstance(value, type) and issubclass(value, Exception)
                own = error and value.__module__ == module.__name__ and not name.startswith("_")
                if own and name not in control:
                    assert issubclass(value, VlfmError), f"{module.__name__}.{name}"
                    found.add(name)
    assert {type(error).__name__ for error, _, _ in ERRORS} <= found


def test_catching_them_loads_nothing() -> None:
    program = "import sys; before = set(sys.modules); import storage.errors; print(*sorted(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, text=True, capture_output=True, check=True)
    assert {name for name in done.stdout.split() if name.partition(".")[0] not in sys.stdlib_module_names} == {
        "storage",
        "storage.errors",
    }
