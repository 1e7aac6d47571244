"""The benchmark of the visual codec on a GPU, run on the CPU with tiny networks: the code, not the figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.bench import gpu, gpu_training, ingest, many_films, shards
from tests.bench.sd15 import TINY, Plan, count_tflop
from tests.bench.sizes import published_config, work_of


def bench(**changes: Any) -> gpu.Bench:
    return gpu.Bench(TINY, "cpu", **{"repeats": 1, "minutes": 1.0, "json_file": None, **changes})


def test_a_tiny_run_gives_every_row_and_the_file_shows_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = tmp_path / "rows.json"
    given = ["--tiny", "--no-compile", "--repeats", "1", "--batches", "2", "--markdown", "--json", str(kept)]
    assert gpu.main(given) == 0
    told = capsys.readouterr().out
    rows = [gpu.Row(**row) for row in json.loads(kept.read_text())["rows"]]
    assert sorted(row.goal_id for row in rows) == ["H1", "H2", "H6", "H6", "H6"]
    assert all(row.value and row.limit and row.share and row.share < 1 for row in rows)
    section = told[told.index("### ") :]
    assert section.count("\n| H") == 5
    assert gpu.main(["--read", str(kept), "--markdown"]) == 0
    assert capsys.readouterr().out.endswith(section)


def test_the_work_of_a_frame_is_that_of_performance_md() -> None:
    counted = count_tflop(Plan())
    assert {name: round(value, 3) for name, value in counted.items()} == {
        "unet": 0.803,
        "encode": 1.117,
        "decode": 2.515,
    }
    whole = counted["encode"] + 50 * counted["unet"]
    assert whole == pytest.approx(41.3, abs=0.05)


def test_compiled_rows_stand_beside_the_eager_ones() -> None:
    compiled = []

    def compiler(computation: Any) -> Any:
        def call(*inputs: torch.Tensor) -> torch.Tensor:
            compiled.append(len(inputs[0]))
            result: torch.Tensor = computation(*inputs)
            return result

        return call

    made = bench()
    gpu.run(made, compiler)
    rows = {mode: {(row.what, row.batch) for row in made.rows if row.mode == mode} for mode in ("eager", "compiled")}
    assert rows["eager"] == rows["compiled"]
    assert len(rows["eager"]) == 2 * len(TINY.batches) + 3
    assert set(compiled) == {1, 2}, "full batches only"


def test_what_does_not_fit_or_has_no_time_is_a_row(tmp_path: Path) -> None:
    def full() -> None:
        raise torch.OutOfMemoryError("no more")

    kept = tmp_path / "rows.json"
    made, late = bench(json_file=kept), bench(minutes=0.0)
    row = gpu.Row("H1", "inversion", "eager", 64, None, "frames/s", limit=19.1, goal=6.7)
    assert not made.measure(row, full, full, float)
    assert not late.measure(row, full, full, float)
    assert [made.rows[0].note, late.rows[0].note] == ["out of memory", "not run: the time was up"]
    assert made.rows[0].met is None
    assert "out of memory" in kept.read_text()


def test_shares_and_goals_know_seconds_from_rates() -> None:
    rate = gpu.Row("H1", "", "eager", 8, 7.64, "frames/s", limit=19.1, goal=6.7)
    seconds = gpu.Row("H6", "", "eager", 32, 6.92, "s", limit=1.73, goal=5.0)
    assert (rate.share, rate.met) == (pytest.approx(0.4), True)
    assert (seconds.share, seconds.met) == (pytest.approx(0.25), False)


def test_a_compiler_that_fails_is_a_row_and_ends_the_compiled_part() -> None:
    def compiler(computation: Any) -> Any:
        def call(*inputs: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("no compiler")

        return call

    made = bench()
    gpu.run(made, compiler)
    assert made.rows[-1].note == "compiling failed"
    assert sum(row.goal_id == "H2" for row in made.rows) == len(TINY.batches) + 1


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    assert capsys.readouterr().err == "error: there is no GPU here; --tiny runs the same code on the CPU\n"


@pytest.mark.parametrize(
    ("name", "pixels", "million", "gmac"),
    [("S/4", 256, 33, 1.41), ("B/8", 256, 131, 1.42), ("XL/2", 256, 675, 118.64), ("XL/2", 512, 675, 524.60)],
)
def test_the_published_sizes_and_their_work(name: str, pixels: int, million: float, gmac: float) -> None:
    """arXiv 2212.09748, table 4, where parameters are rounded and count the class embedding, which is dropped here."""
    work = work_of(published_config(name, pixels))
    classes = 1001 * published_config(name).width
    assert (work.published_parameters + classes) / 1e6 == pytest.approx(million, rel=5e-3, abs=0.5)
    assert work.published_gmac == pytest.approx(gmac, rel=5e-3)
    assert 1.15 < work.gmac / work.published_gmac < 2, "caption and given frames cost something"
    assert 1.2 < work.parameters / work.published_parameters < 1.3


def test_a_tiny_training_gives_every_row_and_the_kernels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = tmp_path / "rows.json"
    given = ["--tiny", "--no-compile", "--repeats", "1", "--markdown", "--json", str(kept)]
    assert gpu_training.main(given) == 0
    found = json.loads(kept.read_text())
    rows = [gpu.Row(**row) for row in found["rows"]]
    assert [(row.goal_id, row.what) for row in rows] == [
        ("H3", "tiny"), ("H3", "tiny, captions seen"), ("H3", "tiny, captions masked"),
        ("H5", "waiting for data, tiny"),
    ]  # fmt: skip
    assert all(row.value and row.share and row.share < 1 for row in rows[:3])
    assert rows[3].value is not None
    assert 0 <= rows[3].value < 1
    assert found["kernels"]
    assert "### " in capsys.readouterr().out


def test_the_work_of_a_training_step_is_that_of_performance_md() -> None:
    """Ours has the embedding of given frames and of the clip besides."""
    for pixels, expected in ((256, 0.712), (512, 3.147)):
        found = gpu_training.tflop(published_config("XL/2", pixels), captions="none")
        assert found == pytest.approx(expected, rel=0.01)


# WebDataset leaves the file of a tar open that it has read to its end.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore:unclosed file:ResourceWarning")
def test_reading_shards_is_compared_with_webdataset(capsys: pytest.CaptureFixture[str]) -> None:
    shards.main(["--samples", "3", "--rounds", "1"])
    told = capsys.readouterr().out
    assert [line.split("  ")[0] for line in told.splitlines()[:4]] == [
        "webdataset .decode()", "ours", "ours, first read", "bare bytes",
    ]  # fmt: skip


def test_many_films_a_few(tmp_path: Path) -> None:
    """All parts, tiny; the whole command is left out, it starts Prefect."""
    made = many_films.part_ingest(tmp_path, 3)
    refresh = many_films.part_refresh(tmp_path, 3, command=False)
    clips = [many_films.part_clips(tmp_path, count) for count in (4, 8)]
    plan = many_films.part_plan(tmp_path, 3)
    assert (made["clips"], plan["clips"]) == (15, 15)
    assert (
        min(each for part in (made, *clips) for each in (part["cpu_ms_a_film" if part is made else "cpu_ms_a_clip"],))
        > 0
    )
    rows = many_films.judge({"refresh": {**refresh, "command_cpu_s": 31.0}, "clips": clips})
    assert [name.split()[0] for name, _, _ in rows] == ["G9", "G9", "G10", "G10"]
    assert rows[1][1] > rows[1][2], "a goal can be missed"


def test_decoders_are_compared_on_the_same_frames(tmp_path: Path) -> None:
    film = ingest.make_film(tmp_path / "a.mp4", "64x48", 2.0)
    assert ingest.ours(film) == 32
    for other in (lambda: ingest.pipe(film, "64x48"), *ingest.peers(film).values()):
        assert other() == pytest.approx(32, abs=1)
