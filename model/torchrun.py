"""torchrun whose exit status says what became of the training: `python -m model.torchrun OPTIONS -m model.train ...`.

torchrun ends with status 1 where its processes stopped with a checkpoint and status 75, and kills them 30 s after
SIGTERM. A cluster has to tell a stopped training from a failed one (podFailurePolicy in Kubernetes), and a checkpoint
of a large state takes longer. The options are torchrun's; so is the rendezvous.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run

from model.stop import STOPPED

SHUTDOWN = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"
"""Environment variable with the seconds that torchrun gives its processes after SIGTERM (--shutdown-timeout)."""
SECONDS = "270"
"""What they have unless it is said otherwise: less than the grace period of docker/k8s/base/trainer.yaml."""


def main(given: Sequence[str] | None = None) -> int:
    """Run torchrun with the arguments `given` (None: the command line's).

    Returns:
        0 where this machine's processes finished; STOPPED where they stopped when asked to, here or on another
        machine, or where this one was told to stop by SIGTERM; else the status of the first that failed (128 and the
        signal's number where a signal ended it).
    """
    os.environ.setdefault(SHUTDOWN, SECONDS)
    try:
        run(parse_args(sys.argv[1:] if given is None else list(given)))
    except SignalException as stopped:
        return STOPPED if stopped.sigval == signal.SIGTERM else 128 + stopped.sigval
    except ChildFailedError as failed:
        # Those that SIGTERM ended were told so by torchrun when the first of them had stopped.
        statuses = {failure.exitcode for failure in failed.failures.values()}
        if STOPPED in statuses and statuses <= {STOPPED, -signal.SIGTERM}:
            return STOPPED
        print(failed, file=sys.stderr)
        _, first = failed.get_first_failure()
        return first.exitcode if first.exitcode > 0 else 128 - first.exitcode
    return 0


if __name__ == "__main__":
    sys.exit(main())
