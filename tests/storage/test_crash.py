"""A crash at any point leaves the published versions as they were, and the next run ends as one that nothing stopped.

Sixty crashes, a spread over those of `python -m tests.bench.chaos`, which has more.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.timeout(1800)  # about two minutes; a crowded machine takes many times as long


@pytest.fixture(scope="module")
def trials() -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "tests.bench.chaos", "--spread", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=1700, cwd=ROOT)
    assert done.returncode in (0, 1), done.stderr
    rows: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    assert len(rows) == 60
    return rows


def test_the_next_run_ends_as_if_nothing_had_happened(trials: list[dict[str, Any]]) -> None:
    assert [row for row in trials if not row["equal"]] == []
    stopped = Counter(row["fault"] for row in trials if row["step"] and row["status"])
    stopped["clock"] += sum(row["fault"] == "clock" and row["status"] == -signal.SIGKILL for row in trials)
    for fault in ("driver", "group", "disk", "unsynced", "tear", "clock", "killed", "refused", "lost"):
        assert stopped[fault], f"{fault} stopped nothing: {stopped}"
    assert any(row["step"] and row["fault"] == "worker" for row in trials), "a worker died, and the run went on"


def test_kills_were_at_every_step_of_a_publication(trials: list[dict[str, Any]]) -> None:
    kills = [row for row in trials if (row["place"], row["operation"], row["fault"]) == ("folder", "publish", "driver")]
    steps = [row["step"] for row in kills]
    # Before and after each kind of file appears under its name.
    for kind in ("staging", "shards", "manifests", "versions"):
        assert any(step.startswith(("open", "os.rename", "os.link")) and f" {kind}/" in step for step in steps), steps
    assert sum(step.startswith("os.rename shards/") for step in steps) == 4  # two tars with their indexes
    # The version file is the only commit point: before its link there is version 1, right after it version 2.
    link = steps.index("os.link versions/2.json")
    assert [row["newest"] for row in kills] == [1] * (link + 1) + [2] * (len(kills) - link - 1)


def test_what_was_torn_is_a_block_a_shard_and_the_commit_itself(trials: list[dict[str, Any]]) -> None:
    torn = [row["step"] for row in trials if row["fault"] == "tear" and row["operation"] == "publish"]
    assert [step.split("/")[0] for step in torn] == ["os.rename staging", "os.rename shards", "os.link versions"]
