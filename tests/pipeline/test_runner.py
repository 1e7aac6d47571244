"""Ray, really: an item that kills its worker or raises is named, and every other item finishes."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from pipeline.items import Resources
from pipeline.runner import Runner, RunnerError, Task
from storage.layout import DiskFull


def siblings(text: str) -> list[int]:
    """Processes of the same parent, Ray's node, that have the text on their command line."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parent = (entry / "stat").read_text().rpartition(")")[2].split()[1]
            if int(parent) == os.getppid() and text in (entry / "cmdline").read_text():
                found.append(int(entry.name))
    return found


class Squares:
    """Squares numbers; some items do harm."""

    resources = Resources()

    def __init__(self, notes: Path, setup_error: str = "") -> None:
        self.notes, self.setup_error = notes, setup_error

    def setup(self) -> None:
        if self.setup_error:
            raise ValueError(self.setup_error)

    def process(self, task_id: str, items: Sequence[Any]) -> list[int]:
        for item in items:
            with open(self.notes / str(item), "a") as file:
                file.write(".")
            if item == "killer":
                os.kill(os.getpid(), signal.SIGKILL)
            if item == "raiser":
                raise ArithmeticError("it will not divide")
            if item == "node":
                for agent in siblings("DashboardAgent"):
                    os.kill(agent, signal.SIGKILL)
                time.sleep(60)
            if item == "no room":
                raise DiskFull("/lake/file", 7)
            if item == "once" and len((self.notes / "once").read_text()) == 1:
                os.kill(os.getpid(), signal.SIGKILL)
        return [item**2 if isinstance(item, int) else -1 for item in items]

    def teardown(self) -> None:
        (self.notes / f"ended {os.getpid()}").touch()


@pytest.fixture(scope="module")
def runner() -> Iterator[Runner]:
    import ray

    # Workers cannot import a test's module: what is defined here travels as it is.
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    with Runner() as runner:
        runner.start()
        yield runner


def run(runner: Runner, worker: Squares, tasks: list[tuple[str, list[Any]]]) -> tuple[dict[Any, int], list[Any]]:
    results: dict[Any, int] = {}
    lost: list[Any] = []

    def done(task: Task, values: list[int]) -> None:
        for item, value in zip(task.items, values, strict=True):
            assert item not in results, "no item is done twice"
            results[item] = value

    runner.run(worker, tasks, str, done, lambda task, reason, detail: lost.append((task.items[0], reason, detail)))
    return results, lost


def test_a_bad_item_costs_itself_alone(runner: Runner, tmp_path: Path) -> None:
    numbers: list[Any] = list(range(24))
    numbers[2], numbers[10], numbers[20] = "killer", "raiser", "once"
    tasks = [(f"t{first}", numbers[first : first + 6]) for first in range(0, 24, 6)]
    results, lost = run(runner, Squares(tmp_path), tasks)
    assert results == {number: number**2 for number in numbers if isinstance(number, int)} | {"once": -1}
    assert sorted(item for item, _, _ in lost) == ["killer", "raiser"]
    reasons = {item: (reason, detail) for item, reason, detail in lost}
    assert reasons["killer"][0] == "worker_died"
    assert reasons["raiser"] == ("worker_failed", "ArithmeticError: it will not divide")
    assert len((tmp_path / "killer").read_text()) == 3, "an item is tried as often as allowed, and no more"


def test_a_full_disk_stops_the_run_by_name(runner: Runner, tmp_path: Path) -> None:
    with pytest.raises(DiskFull) as caught:
        run(runner, Squares(tmp_path), [("a", [1]), ("b", ["no room"]), ("c", [2])])
    assert caught.value.filename == "/lake/file"
    assert caught.value.free == 7


def test_what_cannot_be_set_up_is_one_line(runner: Runner, tmp_path: Path) -> None:
    with pytest.raises(RunnerError, match=r"^no weights in that folder; name another$"):
        run(runner, Squares(tmp_path, "no weights in\nthat folder; name another"), [("a", [1])])


def test_a_hanging_worker_is_ended(runner: Runner, tmp_path: Path) -> None:
    class Sleeper(Squares):
        def process(self, task_id: str, items: Sequence[Any]) -> list[int]:
            import time

            if "sleep" in items:
                time.sleep(600)
            return super().process(task_id, items)

    impatient = Runner(attempts=1, task_seconds=1)
    results, lost = run(impatient, Sleeper(tmp_path), [("a", [3]), ("b", ["sleep"]), ("c", [4])])
    assert results == {3: 9, 4: 16}
    assert [(item, reason) for item, reason, _ in lost] == [("sleep", "worker_died")]


def test_a_worker_frees_what_it_holds_when_there_is_no_more_work(runner: Runner, tmp_path: Path) -> None:
    """Once in each process that worked; a process that is lost has nothing left to free."""
    results, _ = run(runner, Squares(tmp_path), [(f"t{number}", [number]) for number in range(6)])
    assert len(results) == 6
    ended = list(tmp_path.glob("ended *"))
    assert 1 <= len(ended) <= 2
    assert os.getpid() not in {int(path.name.split()[1]) for path in ended}

    class Clumsy(Squares):
        def teardown(self) -> None:
            raise OSError("its cache cannot be removed")

    results, _ = run(runner, Clumsy(tmp_path), [("a", [3])])
    assert results == {3: 9}, "the work is done all the same"


class Loud(Squares):
    """Says things that the person who runs it has to know."""

    def setup(self) -> None:
        logging.getLogger("codec").warning("compiling failed, it runs as it is;\n  install a compiler")

    def process(self, task_id: str, items: Sequence[Any]) -> list[int]:
        logging.getLogger("codec").info("all is well")
        warnings.warn("this GPU is slow", RuntimeWarning, stacklevel=2)
        if "raiser" in items:
            logging.getLogger("codec").error("about to fail")
        return super().process(task_id, items)

    def teardown(self) -> None:
        raise OSError("its cache cannot be removed")


def test_what_workers_warn_of_reaches_the_log_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "pipeline.runner"), Runner(attempts=1) as fresh:
        tasks: list[tuple[str, list[Any]]] = [(f"t{number}", [number]) for number in range(6)]
        run(fresh, Loud(tmp_path), [*tasks, ("bad", ["raiser"])])
        run(fresh, Loud(tmp_path), tasks)
    assert sorted(record.getMessage() for record in caplog.records if record.name == "pipeline.runner") == [
        "RuntimeWarning: this GPU is slow",
        "a worker did not end cleanly: OSError: its cache cannot be removed",
        "about to fail",
        "compiling failed, it runs as it is; install a compiler",
    ]
    assert {record.levelname for record in caplog.records if record.name == "pipeline.runner"} == {"WARNING"}


def test_the_end_of_ray_itself_is_told_at_once(tmp_path: Path) -> None:
    """Its node ends with its agents. The run waited ten minutes for a node that could not come."""
    code = """if True:
        import sys
        from pathlib import Path
        import ray
        import tests.pipeline.test_runner as it
        ray.cloudpickle.register_pickle_by_value(it)
        with it.Runner() as runner:
            try:
                it.run(runner, it.Squares(Path(sys.argv[1])), [("a", [1]), ("b", ["node"]), ("c", [3])])
            except it.RunnerError as error:
                print(error)
    """
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert "Ray has ended on this machine" in done.stdout, done.stderr
    assert "run the same command again" in done.stdout
    assert done.returncode == 0
    assert time.monotonic() - began < 200, "the limit for workers that do not start is 600 s"


def test_no_work_starts_nothing(tmp_path: Path) -> None:
    nowhere = Runner(address="127.0.0.1:1")
    nowhere.run(Squares(tmp_path), [], str, lambda task, result: None, lambda task, reason, detail: None)
