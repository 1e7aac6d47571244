"""Progress lines: what they say and when they come."""

from __future__ import annotations

import io

import pytest

from model.progress import Progress, clock


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0s"), (45, "45s"), (59.6, "1m00s"), (200, "3m20s"), (7500, "2h05m"), (3599.7, "1h00m")]
)
def test_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text


def test_a_line_says_stage_count_rate_and_time_left() -> None:
    progress = Progress("train", 100, "steps", done=10, out=io.StringIO())
    progress.done = 30
    # 20 steps in 10 s, 70 to go at 2 per second; those done before do not count for the rate.
    assert progress.line(progress.started + 10, "loss 0.5") == "train      30/100 steps  2/s  ETA 35s  loss 0.5"
    progress.done = 100
    assert progress.line(progress.started + 45, "") == "train      100/100 steps  2/s  in 45s"


def test_an_unknown_total_has_no_time_left() -> None:
    progress = Progress("plan", 0, "films", out=io.StringIO())
    progress.done = 3
    assert progress.line(progress.started + 1, "") == "plan       3 films  3/s"


def test_a_log_file_gets_a_line_now_and_then_and_always_the_last() -> None:
    out = io.StringIO()
    progress = Progress("ingest", 1000, "clips", every=3600, out=out)
    for done in range(1001):
        progress.update(done)
    lines = out.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["0/1000", "1000/1000"]
    assert "\r" not in out.getvalue()
    progress.update(1000)
    assert len(out.getvalue().splitlines()) == 2, "the same end is not told twice"


def test_a_terminal_line_is_written_over_and_ended() -> None:
    out = Terminal()
    progress = Progress("sample", 2, "videos", out=out)
    progress.advance()
    assert out.getvalue().startswith("\r\x1b[2Ksample     1/2 videos")
    assert not out.getvalue().endswith("\n")
    progress.advance(note="ball")
    assert out.getvalue().endswith("ball\n")


def test_nothing_to_do_prints_nothing() -> None:
    out = io.StringIO()
    Progress("train", 5, "steps", done=5, out=out)
    assert out.getvalue() == ""
