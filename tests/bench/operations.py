"""Kills what runs a dataset's and a model's flows, at three moments each, and tells what the next run makes of it.

    python -m tests.bench.operations kills [--only flow,worker,both,server,ray,actor,rank] [--moments 1,2,3]
    python -m tests.bench.operations schedule [--minutes 10]

`kills`: a real Prefect server and worker with the deployments of this project. In each trial a run is started, killed
at one of three moments, and ends somehow; the same run is started once more. Afterwards there must be no process of the
runs, no held or left lock, no version but whole ones, no leftover in the lake, no run that is still Running, and the
Merkle root of a run that nothing disturbed. What is killed, by SIGKILL:

    flow     the process of the run
    worker   Prefect's worker, which started it; a new one takes its place
    both     both at once, as when their machine is lost
    server   Prefect's server; a new one takes its place 5 s later
    ray      the raylet of the run's Ray session
    actor    a process that makes clips
    rank     one of the two processes of a training

Moments are found by what lies on the disk: for an ingest while it plans, when a block is staged, when shards are
written (`ray` and `actor`: when 1, 3 and 5 of the 6 blocks are staged, because Ray runs no longer); for a training
before the first step, in the middle, and within a step that writes a checkpoint.

`schedule`: a refresh every minute. A film is added after the fourth minute and one after the seventh: the first run
publishes a version, the runs after each film one more, none by any other run, and two versions are kept. A run that
begins while an ingest goes on is Skipped. Every run ends, all of them Completed or Skipped.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from model.training.checkpoint import Run
from model.training.log import read_log
from pipeline.corpus import make_corpus
from pipeline.sessions import sessions_folder
from storage.layout import Lake
from storage.verify import verify
from storage.version import list_versions, load
from tests.flows.test_deployment import PREFECT, ROOT, Prefect
from tests.model.tiny_lake import make_lake

ENDED = {"COMPLETED", "FAILED", "CANCELLED", "CRASHED"}
FILMS = 6
DATA: dict[str, Any] = {"recipe": "linear", "settings": {"size": [16, 16], "rate": 8.0, "block_clips": 1}}
STEPS = 40
LINGER = 15.0
"""Seconds that a run's processes have after its last state: it is set before they end."""
TRAIN: dict[str, Any] = {
    "recipe": "tiny_cpu", "processes": 2,
    "settings": {
        "width": 32, "depth": 1, "heads": 2, "batch": 2, "steps": STEPS, "checkpoint_every": 5, "log_every": 1,
        "precision": "float64",
    },
}  # fmt: skip
Moment = Callable[[Path], bool]


def staged(blocks: int) -> Moment:
    """Whether so many blocks wait in a lake for their publication."""
    return lambda lake: len(list((lake / "staging").glob("*.npz"))) >= blocks


def logged(steps: int) -> Moment:
    """Whether a training has logged so many steps."""
    return lambda run: len(losses(run)) >= steps


INGEST_MOMENTS: dict[str, Moment] = {
    "while it plans": lambda lake: (lake / ".writing.lock").exists(),
    "a block is staged": staged(1),
    "shards are written": lambda lake: any((lake / "shards").glob("*.tar")),
}
RAY_MOMENTS = {f"{blocks} of {FILMS} blocks staged": staged(blocks) for blocks in (1, 3, 5)}
RANK_MOMENTS: dict[str, Moment] = {
    "before the first step": lambda run: (run / "log.jsonl").exists(),
    "in the middle": logged(STEPS // 2 - 2),
    "a checkpoint is written": lambda run: any((run / "checkpoints").glob("[!s]*")) or len(Run(run).steps()) > 2,
}


@dataclass
class Trial:
    """A kill, and what came of it."""

    target: str
    moment: str
    folder: Path
    """The lake, or the run of the trainer."""
    deployment: str
    parameters: dict[str, Any]
    first: str = ""
    """The id of the run that was disturbed."""
    killed: float = 0.0
    """When (seconds since 1970)."""
    seen: dict[tuple[int, int], str] = field(default_factory=dict)
    """The command lines of the processes that both runs were seen to have, by identity()."""
    ended: str = ""
    """How the disturbed run ended, and how long after the kill."""
    wrong: list[str] = field(default_factory=list)

    def row(self) -> str:
        """A line of the tally."""
        return f"| {self.target} | {self.moment} | {self.ended} | {'; '.join(self.wrong) or 'all as it should be'} |"


class Site:
    """A Prefect server and a worker that come back when they are killed, with this project's deployments."""

    def __init__(self, home: Path) -> None:
        self.prefect = Prefect(home)
        quick = {"PREFECT_WORKER_QUERY_SECONDS": "2"}  # else each run waits up to 10 s for the worker
        self.prefect.environment |= {"VLFM_BENCH": str(home), "PYTHONPATH": str(ROOT), **quick}
        self.server = self.start_server()
        self.prefect("work-pool", "create", "local", "--type", "process")
        self.prefect("deploy", "--all")
        self.deployments = {each["name"]: each["id"] for each in self.prefect.read("deployments")}
        self.worker = self.start_worker()

    def _start(self, name: str, *words: str) -> subprocess.Popen[bytes]:
        with open(self.prefect.home / f"{name}.log", "a") as log:
            return subprocess.Popen(
                [PREFECT, *words],
                cwd=ROOT,
                env=self.prefect.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def start_server(self) -> subprocess.Popen[bytes]:
        """A server, answering."""
        server = self._start("server", "server", "start", "--host", "127.0.0.1", "--port", str(self.prefect.port))
        self.prefect.wait_until_healthy()
        return server

    def start_worker(self) -> subprocess.Popen[bytes]:
        """A worker."""
        return self._start("worker", "worker", "start", "--pool", "local", "--limit", "4")

    def close(self) -> None:
        """Ends both, the worker first, and what is left of their runs."""
        for process in (self.worker, self.server):
            for number in (signal.SIGTERM, signal.SIGKILL):
                with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                    os.killpg(process.pid, number)
                    process.wait(timeout=15)
                    break
        for left in processes(f"VLFM_BENCH={self.prefect.home}"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(left, signal.SIGKILL)

    def post(self, path: str, body: Any, method: str = "POST") -> Any:
        """Asks the server; again where it answers that it is busy (503: its database is locked)."""
        data, kind = json.dumps(body).encode(), {"content-type": "application/json"}
        request = urllib.request.Request(f"{self.prefect.api}/{path}", data, kind, method=method)
        for attempt in range(10):
            try:
                with urllib.request.urlopen(request, timeout=30) as answer:
                    return json.loads(answer.read() or b"null")
            except urllib.error.HTTPError as error:
                if error.code != 503 or attempt == 9:
                    raise
                time.sleep(3)

    def begin(self, deployment: str, parameters: dict[str, Any]) -> str:
        """Starts a run of a deployment: its id."""
        made = self.post(f"deployments/{self.deployments[deployment]}/create_flow_run", {"parameters": parameters})
        return str(made["id"])

    def state(self, run: str) -> str:
        """A run's state, in Prefect's words; '' while the server does not answer."""
        try:
            return str(self.read(run)["state_type"])
        except OSError:
            return ""

    def read(self, run: str) -> dict[str, Any]:
        """A run, as the server knows it."""
        (found,) = self.post("flow_runs/filter", {"flow_runs": {"id": {"any_": [run]}}})
        return dict(found)

    def wait(self, run: str, seconds: float, seen: dict[tuple[int, int], str] | None = None) -> str:
        """How a run ended; its last state where it did not within the time. Its processes meanwhile go to `seen`."""
        until = time.monotonic() + seconds
        while (state := self.state(run)) not in ENDED and time.monotonic() < until:
            note(run, {} if seen is None else seen)
            time.sleep(0.5)
        return state

    def unended(self) -> list[str]:
        """Names of the runs that are neither done nor waiting for their time."""
        found = self.post("flow_runs/filter", {"flow_runs": {"state": {"type": {"not_any_": [*ENDED, "SCHEDULED"]}}}})
        return [f"{each['name']} is {each['state_type']}" for each in found]


def processes(environment: str) -> dict[int, str]:
    """Processes with this text in their environment, and their command lines."""
    found = {}
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and environment.encode() in (entry / "environ").read_bytes():
                found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return found


def family(run: str) -> dict[int, str]:
    """A run's processes: those with its id in their environment, and their children (Ray's workers hide theirs)."""
    found, parents = processes(f"PREFECT__FLOW_RUN_ID={run}"), {}
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit():
                parents[int(entry.name)] = parent(int(entry.name))
    while more := {process for process, parent in parents.items() if parent in found and process not in found}:
        for process in more:
            found[process] = ""
            with contextlib.suppress(OSError):
                line = Path(f"/proc/{process}/cmdline").read_bytes()
                found[process] = line.replace(b"\0", b" ").decode(errors="replace").strip()
    return found


def parent(process: int) -> int:
    """The number of a process's parent."""
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])


def identity(process: int) -> tuple[int, int]:
    """A process's number and when it began; (number, 0) for one that is no more, a zombie too."""
    try:
        words = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return process, 0
    return process, 0 if words[0] == "Z" else int(words[19])


def note(run: str, seen: dict[tuple[int, int], str]) -> None:
    """Notes a run's processes."""
    seen.update({identity(process): line for process, line in family(run).items()})


def kill(site: Site, trial: Trial) -> None:
    """Kills the trial's target."""
    own = family(trial.first)
    trial.seen.update({identity(process): line for process, line in own.items()})
    flow = min(process for process, line in own.items() if "prefect" in line)
    if trial.target in ("worker", "both"):
        os.kill(site.worker.pid, signal.SIGKILL)
        site.worker.wait()
    if trial.target in ("flow", "both"):
        os.kill(flow, signal.SIGKILL)
    if trial.target == "server":
        os.killpg(site.server.pid, signal.SIGKILL)
        site.server.wait()
    if trial.target in ("ray", "actor", "rank"):
        ranks = processes("\0RANK=1\0")
        marks: dict[str, Callable[[int, str], bool]] = {
            "ray": lambda process, line: "/raylet/raylet " in line,
            "actor": lambda process, line: line.startswith("ray::Actor"),
            "rank": lambda process, line: process in ranks and parent(process) not in ranks,  # no helper of a rank
        }
        marked = sorted(process for process, line in own.items() if marks[trial.target](process, line))
        if not marked:
            raise RuntimeError(f"no {trial.target} to kill among {sorted(own.values())}")
        os.kill(marked[-1], signal.SIGKILL)
    trial.killed = time.time()
    if trial.target == "server":
        time.sleep(5)
        site.server = site.start_server()
    if trial.target in ("worker", "both"):
        site.worker = site.start_worker()


def disturb(site: Site, trial: Trial, moment: Moment, seconds: float) -> None:
    """Starts the trial's run and kills at the moment."""
    trial.first = site.begin(trial.deployment, trial.parameters)
    until = time.monotonic() + seconds
    while not moment(trial.folder):
        if time.monotonic() > until or (int(time.monotonic() * 10) % 50 == 0 and site.state(trial.first) in ENDED):
            print(site.prefect.logs(), file=sys.stderr)
            raise RuntimeError(f"the moment never came; the run is {site.state(trial.first)}")
        time.sleep(0.005)
    kill(site, trial)


def finish(site: Site, trial: Trial, expected: Any, seconds: float) -> None:
    """Waits for the end of the disturbed run, runs once more, and looks for what must not be there."""
    state = site.wait(trial.first, seconds, trial.seen)
    trial.ended = state.capitalize()
    if state not in ENDED:
        trial.wrong.append(f"the disturbed run is {state}")
    else:
        ended = datetime.fromisoformat(site.read(trial.first)["end_time"]).timestamp()
        trial.ended += f" after {ended - trial.killed:.0f} s"
    second = site.begin(trial.deployment, trial.parameters)
    state = site.wait(second, seconds, trial.seen)
    if state != "COMPLETED":
        trial.wrong.append(f"the next run is {state}")
        return
    until = time.monotonic() + LINGER
    while (stray := [line for each, line in trial.seen.items() if each[1] and identity(each[0]) == each]) and (
        time.monotonic() < until
    ):
        time.sleep(0.5)
    for run in (trial.first, second):
        stray += processes(f"PREFECT__FLOW_RUN_ID={run}").values()
    trial.wrong += [f"stray process: {line[:80]}" for line in dict.fromkeys(stray)]
    found = look_at_run(trial) if trial.target == "rank" else look_at_lake(trial)
    if found != expected:
        trial.wrong.append("the result is another one than that of an undisturbed run")


def look_at_lake(trial: Trial) -> Any:
    """The Merkle root; what is wrong with the lake is noted."""
    lake = Lake.open(trial.folder)
    try:
        with lake.writing():
            pass
    except Exception as error:
        trial.wrong.append(f"lock: {error}")
    left = lake.store.clean(delete=False) + [str(path) for path in trial.folder.glob(".*.turn")]
    left += [str(path) for path in (trial.folder / "staging").iterdir()]
    trial.wrong += [f"left: {path}" for path in left]
    if list_versions(lake) != [1]:
        trial.wrong.append(f"versions {list_versions(lake)}")
    trial.wrong += [str(problem) for problem in verify(lake, load(lake))]
    return load(lake).merkle_root


def losses(run: Path) -> dict[int, float]:
    """The loss of each step in a training's log."""
    file = run / "log.jsonl"
    return {line["step"]: line["loss"] for line in read_log(file) if "loss" in line} if file.exists() else {}


def look_at_run(trial: Trial) -> Any:
    """The losses; what is wrong with the run's folder is noted."""
    odd = [path.name for path in (trial.folder / "checkpoints").iterdir() if not path.name.startswith("step-")]
    trial.wrong += [f"left: {name}" for name in odd]
    return losses(trial.folder)


def kills(folder: Path, targets: Sequence[str], numbers: Sequence[int], patience: float) -> list[Trial]:
    """The trials of these targets, at their first, second, third moment."""
    films = make_corpus(folder / "films", films=FILMS).parent
    home = folder / "prefect"
    home.mkdir()
    site = Site(home)
    try:
        expected: dict[str, Any] = {}
        print("| killed | when | the run ended | afterwards, and after the next run |\n|---|---|---|---|", flush=True)

        def trial(target: str, moment: str, place: Path) -> Trial:
            if target == "rank":
                given = {"lake": str(folder / "clips"), "run": str(place), **TRAIN}
                return Trial(target, moment, place, "train", given)
            given = {"source": str(films), "lake": str(place), **DATA}
            return Trial(target, moment, place, "ingest", given)

        make_lake(folder / "clips", clips=8)
        for kind in ("rank", "lake"):
            if (kind == "rank") == ("rank" in targets) or (kind == "lake" and set(targets) - {"rank"}):
                calm = trial(kind, "undisturbed", folder / f"calm-{kind}")
                calm.first = site.begin(calm.deployment, calm.parameters)
                if (state := site.wait(calm.first, patience)) != "COMPLETED":
                    raise RuntimeError(f"the undisturbed run is {state}\n{site.prefect.logs()}")
                expected[kind] = look_at_run(calm) if kind == "rank" else look_at_lake(calm)
                if calm.wrong:
                    raise RuntimeError(f"the undisturbed run: {calm.wrong}")
        done: list[Trial] = []
        for target in targets:
            moments = {"ray": RAY_MOMENTS, "actor": RAY_MOMENTS, "rank": RANK_MOMENTS}.get(target, INGEST_MOMENTS)
            waiting = []
            for number, (words, moment) in enumerate(moments.items(), 1):
                if number not in numbers:
                    continue
                each = trial(target, words, folder / f"{target}-{number}")
                done.append(each)
                try:
                    disturb(site, each, moment, patience)
                except (RuntimeError, ProcessLookupError) as error:
                    each.wrong.append(str(error))
                    print(each.row(), flush=True)
                    continue
                waiting.append(each)
                if target != "both":  # where nobody is left to say that a run is dead, three wait together
                    finish(site, waiting.pop(), expected["rank" if target == "rank" else "lake"], patience)
                    print(each.row(), flush=True)
            for each in waiting:
                finish(site, each, expected["lake"], patience)
                print(each.row(), flush=True)
        for left in site.unended():
            print(f"still not ended: {left}")
            done[-1].wrong.append(left)
        return done
    finally:
        site.close()


def schedule(folder: Path, minutes: int, patience: float) -> bool:
    """A refresh every minute, a film added in between, as the docstring above says; whether all was as it should be."""
    films = make_corpus(folder / "films", films=4).parent
    kept, table = folder / "late", films / "captions.csv"
    kept.mkdir()
    rows = table.read_text().splitlines()
    moved = [films / row.partition(",")[0] for row in rows[-2:]]
    for path in moved:
        shutil.move(path, kept / path.name)
    table.write_text("\n".join(row for row in rows if not any(path.name in row for path in moved)) + "\n")
    home, lake = folder / "prefect", folder / "lake"
    home.mkdir()
    site = Site(home)
    try:
        given = {"source": str(films), "lake": str(lake), "keep_versions": 2, **DATA}
        schedules = f"deployments/{site.deployments['refresh']}/schedules"
        every_minute = {"schedule": {"cron": "* * * * *", "timezone": "UTC"}, "active": True, "parameters": given}
        (made,) = site.post(schedules, [every_minute])
        begun, seen, adding = time.monotonic(), [], {4: moved[0], 7: moved[1]}
        for minute in range(1, minutes + 1):
            time.sleep(max(0.0, begun + 60 * minute - time.monotonic()))
            versions = list_versions(Lake.open(lake)) if lake.exists() else []
            seen.append(versions)
            print(f"after {minute} minutes: versions {versions}", flush=True)
            if minute in adding:
                path = adding[minute]
                shutil.copyfile(kept / path.name, path.with_name(f".{path.name}.part"))
                os.replace(path.with_name(f".{path.name}.part"), path)
                table.write_text(table.read_text() + next(row for row in rows if path.name in row) + "\n")
                print(f"after {minute} minutes: {path.name} is added", flush=True)
        site.post(f"{schedules}/{made['id']}", {"active": False}, "PATCH")
        until = time.monotonic() + patience
        while (unended := site.unended()) and time.monotonic() < until:
            time.sleep(1)
        runs = site.post("flow_runs/filter", {"flow_runs": {"start_time": {"is_null_": False}}})
        for run in sorted(runs, key=lambda run: run["start_time"]):
            print(f"{run['start_time'][11:19]} {run['state_name']}, {run['total_run_time']:.1f} s")
        summaries = [each for each in site.post("artifacts/filter", {}) if each["key"].endswith("-summary")]
        versions = list_versions(Lake.open(lake))
        print(f"{len(runs)} runs, {len(summaries)} with news, versions now {versions}; not ended: {unended or 'none'}")
        good = {run["state_name"] for run in runs} <= {"Completed", "Skipped"} and not unended
        return good and versions == [2, 3] and len(summaries) == 3 and len(runs) >= minutes - 1
    finally:
        site.close()


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints what happened; 1 where something was not as it should be."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.operations", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("what", choices=("kills", "schedule"))
    parser.add_argument("--only", default="flow,worker,both,server,ray,actor,rank", help="what to kill, by commas")
    parser.add_argument("--moments", default="1,2,3", help="at which of their three moments, by commas")
    parser.add_argument("--patience", type=float, default=300, help="seconds to wait for anything (default 300)")
    parser.add_argument("--minutes", type=int, default=10)
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # else server and worker would stay
    with short_folder() as folder:
        if options.what == "schedule":
            return 0 if schedule(folder, options.minutes, options.patience) else 1
        trials = kills(folder, options.only.split(","), [*map(int, options.moments.split(","))], options.patience)
    sessions = [path.name for path in sessions_folder().iterdir()]
    wrong = sum(bool(trial.wrong) for trial in trials)
    print(f"{len(trials)} kills, {wrong} with something wrong; Ray sessions left: {sessions or 'none'}")
    return 1 if wrong else 0


@contextlib.contextmanager
def short_folder() -> Iterator[Path]:
    """A folder for all of it."""
    with tempfile.TemporaryDirectory(prefix="vlfm-ops-", ignore_cleanup_errors=True) as name:
        yield Path(name)


if __name__ == "__main__":
    sys.exit(main())
