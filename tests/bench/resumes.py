"""`python -m tests.bench.resumes`: a run that was interrupted is the run that nobody disturbed, bit by bit.

Every case of: one process or two, SIGTERM, Ctrl-C or SIGKILL (of the launcher, where there are two), no loader workers
or some. The same command then goes on to the end, and its weights, averages, optimisers and losses are compared with
those of a run of as many processes that was left alone.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import torch

from model.stop import STOPPED
from model.training.checkpoint import Run
from tests.model.test_stop import program
from tests.model.test_train import command, environment, logged, weights
from tests.model.tiny_lake import make_lake

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGKILL)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints a line for each case; 1 where one differs."""
    parser = argparse.ArgumentParser(prog="tests.bench.resumes", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=400, help="steps of a run (default 400)")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    options = parser.parse_args(arguments)
    good, cases = 0, list(product(options.processes, SIGNALS, (0, 2)))
    with tempfile.TemporaryDirectory() as scratch:
        lake = make_lake(Path(scratch) / "lake")
        never = f"--set=validate_every={10 * options.steps}"

        def words(run: Path, processes: int, workers: int) -> list[str]:
            more = [f"--processes={processes}", f"--set=loader_workers={workers}", never]
            return command(lake, run, f"--set=steps={options.steps}", "--set=checkpoint_every=3", *more)

        undisturbed = {}
        for processes in options.processes:
            undisturbed[processes] = Path(scratch) / f"undisturbed-{processes}"
            asked = [sys.executable, *words(undisturbed[processes], processes, 0)]
            subprocess.run(asked, env=environment(), check=True, capture_output=True)
        for processes, number, workers in cases:
            run = Path(scratch) / f"{processes}-{number.name}-{workers}"
            with program(*words(run, processes, workers)) as running:
                running.wait_for_steps(run, 7)
                running.process.send_signal(number)
                status, told = running.end()
                ended = running.gone_within(20)
            at = (Run(run).steps() or [0])[-1]
            again = subprocess.run(
                [sys.executable, *words(run, processes, workers)], env=environment(), capture_output=True, check=False
            )
            ours, theirs = weights(run), weights(undisturbed[processes])
            same = all(torch.equal(ours[name], value) for name, value in theirs.items())
            same &= logged(run, "loss") == logged(undisturbed[processes], "loss")
            stopped = status == (-signal.SIGKILL if number == signal.SIGKILL else STOPPED) and 0 < at < options.steps
            fine = same and stopped and ended and again.returncode == 0
            good += fine
            verdict = "the same, bit by bit" if fine else f"NOT the same {'' if stopped else told}"
            print(
                f"{processes} processes, {number.name}, {workers} workers: at step {at}, status {status}, resumed to "
                f"{Run(run).steps()[-1]}: {verdict}",
                flush=True,
            )
    print(f"{good} of {len(cases)} interrupted runs are those that nobody disturbed")
    return int(good < len(cases))


if __name__ == "__main__":
    began = time.monotonic()
    status = main()
    print(f"{time.monotonic() - began:.0f} s")
    sys.exit(status)
