"""What a projection knows of slopes: nearly all of them inside the window, less at its ends."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.corpus.combinations import plan_combinations
from pipeline.experiments.slopes import OBSERVED, Grid, experiment, figures, film_figures, main, table


def test_the_ends_are_what_a_projection_gets_wrong() -> None:
    films = plan_combinations(3, 3, films_per_caption=1)
    known, linear, ended = (
        figures(grid, films) for grid in (Grid(8, 2, "cubic"), Grid(8, 2, "linear"), Grid(8, 2, "cubic", True))
    )
    assert known["slope_inside"] < 0.1 < 1 < known["slope_end"]
    assert linear["slope_start"] > 5 * known["slope_start"]
    assert ended["frame_end"] < 0.2 * known["frame_end"], "a frame at the very end need not be held"


def test_a_still_picture_has_no_frame_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.experiments import slopes

    still = plan_combinations(0, 1)[0]
    real = slopes.latents_at
    monkeypatch.setattr(slopes, "latents_at", lambda film, times: real(film, 0 * times))
    found = figures(Grid(8, 2, "cubic"), [still])
    assert max(found[f"frame_{place}"] for place in ("inside", "start", "end")) < 1e-6


def test_frames_of_a_film_after_the_last_kept_one(scene: Callable[..., Path], tmp_path: Path) -> None:
    """They are known with the next frame as those inside are; the film's last window has none and is left out."""
    scene(tmp_path / "a.mp4", rate="24", seconds=4)
    for rate, observe in OBSERVED:
        found = film_figures(tmp_path / "a.mp4", rate, observe)
        assert found["windows"] == 1
        assert found["after_next"] > found["after"] + 1
        assert found["end_next"] > 30 > found["end"]
        assert abs(found["inside_next"] - found["inside"]) < 0.5
    assert main([str(tmp_path / "nothing"), "--json"]) == 1


def test_the_table_has_a_row_for_each_way(capsys: pytest.CaptureFixture[str]) -> None:
    found = experiment(1, grids=(Grid(8, 1, "cubic"),))
    assert table(found).splitlines()[2].startswith("| cubic, s = 1 N, 8 a second | ")
    assert main(["--films", "0"]) == 1
    assert "films = 0" in capsys.readouterr().err
