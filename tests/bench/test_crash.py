"""A crash at any point leaves the published versions as they were, and the next run ends as if there had been none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_a_fault_at_every_step_of_what_changes_a_lake(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.bench.chaos", "--matrix", "--json"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=1200,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(done.stdout.splitlines()[-1])
    assert [row for row in rows if not row["equal"]] == []
    assert len(rows) >= 60
    assert {row["fault"] for row in rows} == {"driver", "worker", "group", "tear", "unsynced", "disk", "clock"}
    assert sum(row["status"] != 0 for row in rows) >= 50, "the faults do stop the operation"
    steps = [row["step"] for row in rows if (row["operation"], row["fault"]) == ("publish", "driver")]
    # The kills have been everywhere: before and after each kind of file appears under its name.
    for kind in ("staging", "shards", "manifests", "versions"):
        assert any(step.startswith(("open", "os.rename", "os.link")) and f"{kind}/" in step for step in steps), steps
    link = steps.index("os.link versions/3.json")
    # The version file is the only commit point: before its link there is version 2, right after it version 3.
    newest = [row["newest"] for row in rows if (row["operation"], row["fault"]) == ("publish", "driver")]
    assert newest == [2] * (link + 1) + [3] * (len(newest) - link - 1)
    for operation in ("erase", "gc", "repair"):
        own = [row["step"] for row in rows if row["operation"] == operation]
        assert any("maintenance.json" in step for step in own) or len(own) >= 4
