"""The experiment `interpolation`: hidden frames, and those at a cut by themselves."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from pipeline.experiments.interpolation import hidden_frames, main, table
from pipeline.interpolate.film import PIXELS
from pipeline.media.decode import ffmpeg_binary


@pytest.fixture
def film(tmp_path: Path) -> Path:
    """Brightness that swings gently, and a cut before frame 30 of 61."""
    path = tmp_path / "cut.mkv"
    source = "nullsrc=size=24x24:rate=24:duration=2.5416,format=gray,geq=lum='60+100*gte(N,30)+30*sin(X/5+N/2)'"
    subprocess.run([ffmpeg_binary(), "-v", "error", "-f", "lavfi", "-i", source, "-c:v", "ffv1", str(path)], check=True)
    return path


def test_hidden_frames(film: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = hidden_frames(film, None, PIXELS)
    assert row["cuts"] == [1.25]
    assert row["frames"] == {"all": 30, "across": 1, "beside": 7}
    across, beside, both = (row["psnr"][part] for part in ("across", "beside", "all"))
    assert across["auto"] == pytest.approx(across["hold"], abs=0.1), "the old shot stays until the cut's own time"
    assert across["auto"] > across["blend"] + 10
    assert across["blend cuts"] < across["blend"] + 3
    assert beside["auto"] > beside["blend"] + 3, "smooth motion is for the spline, up to the cut"
    assert beside["auto"] > beside["blend cuts"] + 3, "a spline across the cut rings"
    assert both["auto"] > both["blend"] + 10
    assert "| cut.mkv, across cuts | 1 |" in table([row])
    assert main([str(film), "--size", "12"]) == 0
    assert capsys.readouterr().out.startswith("| film | frames | hold | blend | auto |")
