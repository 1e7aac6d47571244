"""What a program makes of the demo's films, as digests: for two checkouts that must do the same.

    python tests/bench/identity.py FOLDER [--films N] [--steps K]

It runs `vlfm demo` of the checkout that PYTHONPATH names, on the first N films and for K steps, in FOLDER (films drawn
there before are used again), and prints a line for each result. It imports nothing of the project, so it runs on any
commit.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
from pathlib import Path


def digest(paths: list[Path]) -> str:
    """One sha256 over the bytes of files, in the order of their names."""
    whole = hashlib.sha256()
    for path in sorted(paths):
        whole.update(path.name.encode() + path.read_bytes())
    return whole.hexdigest()[:16]


def main() -> int:
    """Runs the demo and prints the digests."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--films", type=int, default=6)
    parser.add_argument("--steps", type=int, default=5)
    options = parser.parse_args()
    demo = [sys.executable, "-m", "flows.cli", "demo", "--out", str(options.folder)]
    subprocess.run([*demo, "--limit", str(options.films), "--steps", str(options.steps)], check=True)
    base = options.folder / "corpus"
    version = json.loads((base / "lake" / "versions" / "1.json").read_text())
    log = [json.loads(line) for line in (base / "run-1" / "log.jsonl").read_text().splitlines()]
    checkpoint = base / "run-1" / "checkpoints" / f"step-{options.steps:08d}"
    metrics = json.loads((base / "report-1" / "metrics.json").read_text())
    clips = json.dumps(metrics["clips"], sort_keys=True).encode()
    print("merkle root ", version["merkle_root"])
    print("losses      ", *[line["loss"] for line in log if "loss" in line])
    print("weights     ", digest(list(checkpoint.glob("*.safetensors"))))
    print("samples     ", digest(list((base / "samples-1").glob("*.mp4"))))
    print("figures     ", hashlib.sha256(clips).hexdigest()[:16])
    return 0


if __name__ == "__main__":
    sys.exit(main())
