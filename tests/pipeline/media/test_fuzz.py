"""A hundred hostile films through an ingest, of the thousand that `make fuzz` takes; and that the watch sees at all."""

from __future__ import annotations

import subprocess
from pathlib import Path

from pipeline.media.decode import ffmpeg_binary
from tests.bench.fuzz import KINDS, read_logs, run, tracing
from tests.bench.hostile import Outside
from tests.pipeline.ingest.in_process import InProcess


def test_a_hundred_hostile_films(tmp_path: Path) -> None:
    tally = run(tmp_path, 100, seed=1, runner=InProcess(), few=True)
    assert tally.problems == []
    assert all(tally.kinds[kind] for kind in KINDS)
    assert 10 <= tally.done <= 60, "harmless ones too"
    assert {"truncated", "corrupt", "not_a_video"} <= tally.reasons.keys()
    assert min(tally.memory["driver"], tally.memory["ffmpeg"]) > 0, "it was looked at"
    if tally.untraced:
        print(f"not traced: {tally.untraced}")
    else:
        assert tally.traced > 100


def test_what_is_read_outside_is_seen(tmp_path: Path) -> None:
    """A playlist without the pipeline's options reads the film that it names; strace tells, and the listener does."""
    outside = Outside(tmp_path / "outside")
    tool, untraced = tracing(tmp_path, ffmpeg_binary())
    for number, target in enumerate((outside.film, outside.url)):
        film = tmp_path / f"{number}.m3u8"
        film.write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\n{target}\n#EXT-X-ENDLIST\n")
        options = ["-v", "error", "-protocol_whitelist", "file,http,tcp", "-allowed_extensions", "ALL"]
        command = [str(tool), *options, "-i", f"file:{film}", "-f", "null", "-"]
        subprocess.run(command, check=False, capture_output=True, timeout=60)
    outside.close()
    assert outside.connections >= 1
    if untraced:
        print(f"not traced: {untraced}")
        return
    count, found = read_logs(tmp_path / "logs")
    assert count == 2
    assert any(line == f"opened {outside.film}" for line in found)
    assert any(line.startswith("connect(") for line in found)
