"""Random histories of a folder against a plain model of the newest version: `python -m tests.bench.refresh [N]`.

500 by default, from seed 0 on. It prints the differences that there are; exit status 1 where there are any.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

import torch

from tests.pipeline.ingest.refresh_model import run_history, without_ffmpeg


def main(histories: int = 500, first: int = 0) -> int:
    """Runs the histories of the seeds from `first` on."""
    torch.set_num_threads(1)
    memory = Path("/dev/shm")
    wrong = 0
    with without_ffmpeg(), tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as base:
        for seed in range(first, first + histories):
            folder = Path(base) / str(seed)
            faults = run_history(seed, folder)
            shutil.rmtree(folder)
            wrong += bool(faults)
            print("\n".join(faults) if faults else f"seed {seed}: as the model", flush=True)
    print(f"{histories} histories, {wrong} differ from the model")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
