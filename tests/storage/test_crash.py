"""A crash at any point leaves the published versions as they were, and the next run succeeds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path


def test_a_kill_at_every_step_of_a_publication(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("crash_driver.py")), str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=150,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    steps = [row["step"] for row in report if row["killed"] and row["trial"].startswith("change")]
    # The driver has been everywhere: before and after each kind of file appears under its name.
    for kind in ("staging", "shards", "manifests", "versions"):
        assert any(step.startswith(("open", "os.rename", "os.link")) and f"{kind}/" in step for step in steps), steps
    assert sum("os.rename shards/" in step for step in steps) == 2  # the tar and its index
    link = next(number for number, step in enumerate(steps) if step == "os.link versions/2.json")
    # The version file is the only commit point: before its link there is version 1, right after it version 2.
    newest = [row["newest"] for row in report if row["trial"].startswith("change")]
    assert newest == [1] * (link + 1) + [2] * (len(newest) - link - 1)
    assert any(row["killed"] for row in report if row["trial"].startswith("clock"))
