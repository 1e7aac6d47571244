"""The evaluation as a program: made once only, of the right lake and of runs that are alike."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from model.evaluate import evaluate, evaluate_runs, main
from model.evaluation.generation import CAPTIONS, GENERATION_METRICS
from model.evaluation.headline import GROUPS, headline
from model.methods.base import SampleSettings
from model.settings import override
from model.train import train
from storage.layout import Lake
from tests.model.evaluated import SETTINGS, TINY, Made, Page
from tests.model.tiny_lake import make_lake


def test_it_is_made_once(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in made.out.iterdir()}
    assert before.keys() == {"report.html", "metrics.json"}
    again = made.evaluate()
    assert again == made.metrics == json.loads((made.out / "metrics.json").read_text())
    assert {path.name: path.stat().st_mtime_ns for path in made.out.iterdir()} == before
    assert "evaluate" not in capsys.readouterr().err, "no clip was sampled"
    assert headline(again) == headline(made.metrics)


@pytest.mark.parametrize("what", ["seed", "page gone", "metrics torn"])
def test_it_is_made_again_when_something_changed(made: Made, tmp_path: Path, what: str) -> None:
    out = tmp_path / "report"
    evaluate(made.run, made.lake.root, out, SETTINGS, most=1, shown=0)
    before = (out / "metrics.json").stat().st_mtime_ns
    settings = SETTINGS
    if what == "seed":
        settings = SampleSettings(steps=4, warmup_steps=2, seed=12)
    elif what == "page gone":
        (out / "report.html").unlink()
    else:
        (out / "metrics.json").write_text('{"made')
    evaluate(made.run, made.lake.root, out, settings, most=1, shown=0)
    assert (out / "metrics.json").stat().st_mtime_ns > before
    assert (out / "report.html").is_file()
    assert len(json.loads((out / "metrics.json").read_text())["clips"]) == 2, "one of training, one unseen"


def test_a_lake_whose_frames_are_all_observed(tmp_path: Path) -> None:
    """No held-out figure: a dash on the page, null in the JSON, and the goals that remain are still judged."""
    made = Made(tmp_path, every=1, clips=2, validation=0)
    assert made.metrics["clips"][0]["recall_held_out"] is None
    assert made.metrics["train"]["mean"]["recall_held_out"] is None
    lines = headline(made.metrics)
    assert lines == headline(made.evaluate()), "the same from the file"
    assert lines[0].split() == ["training,", "2", "clips", "validation,", "0", "clips"]
    assert next(line for line in lines if "sample, held-out" in line).split()[-2:] == ["–", "–"]
    assert "nan" not in " ".join(Page(made.page).texts)
    assert "No film fell into the validation split" in made.page


def test_another_lake_is_refused(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = make_lake(tmp_path / "other", clips=3)
    options = ["--run", str(made.run), "--out", str(tmp_path / "out")]
    assert main([*options, "--lake", str(other.root)]) == 1
    told = capsys.readouterr().err
    assert told == (
        f"error: version 1 of {other.root} is not the one that {made.run} was trained on; give the right --lake\n"
    )
    assert not (tmp_path / "out").exists()
    assert main([*options, "--lake", str(Lake.create(tmp_path / "empty").root)]) == 1
    assert "has no version yet; make one with: vlfm ingest" in capsys.readouterr().err


@pytest.mark.parametrize(("option", "value"), [("--clips", "0"), ("--clips", "-1"), ("--shown", "-1")])
def test_numbers_that_cannot_be(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str, value: str
) -> None:
    out = str(tmp_path / "out")
    assert main(["--run", str(made.run), "--lake", str(made.lake.root), "--out", out, option, value]) == 1
    assert "--clips must be at least 1, --shown 0" in capsys.readouterr().err


def test_the_command_prints_the_table_or_json(made: Made, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    options = ["--run", str(made.run), "--lake", str(made.lake.root), "--out", str(tmp_path), "--clips", "2"]
    assert main([*options, "--shown", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + sum(1 + len(names) for names in GROUPS.values())
    assert lines[-1] == str(tmp_path / "report.html")
    assert lines[0].split() == ["training,", "2", "clips", "validation,", "2", "clips"]
    assert lines[1:3] == ["against the film, PSNR", lines[2]]
    assert main([*options, "--shown", "1", "--json"]) == 0
    metrics = json.loads(capsys.readouterr().out)
    assert metrics["train"]["clips"] == 2
    assert lines[2].split()[:3] == ["sample", f"{metrics['train']['mean']['film_sample']:.1f}", "dB"]


def test_generation_stands_beside_the_clips(made: Made) -> None:
    """Figures of captions, of both splits; eight clips of as many captions, no film longer than a window."""
    found = {metric.name for metric in GENERATION_METRICS}
    for split, captions in (("train", 6), ("validation", 2)):
        summary = made.metrics[split]
        assert captions <= CAPTIONS
        assert found <= summary.keys()
        unknown = {name for name in found if summary[name] is None}
        assert unknown == {"data_psnr", "seed_diversity", "third_window", "third_hold", "third_velocity"}
        assert 0 < summary["seed_psnr"] <= 100
        assert 0 <= summary["image_alone"] <= 1
        # The anchored method returns the frame that it was given.
        assert summary["image_first_frame"] == pytest.approx(summary["image_ceiling"], abs=1e-3)
    log = [json.loads(line) for line in (made.run / "log.jsonl").read_text().splitlines()]
    validation = [line["validation_loss"] for line in log if "validation_loss" in line]
    assert [made.metrics["validation"][f"loss_{end}"] for end in ("first", "last")] == [validation[0], validation[-1]]
    assert made.metrics["train"]["loss_last"] < made.metrics["train"]["loss_first"]


def test_runs_of_other_seeds_have_ranges(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other"
    train(made.lake.root, other, override(TINY, {"seed": 1}))
    out = tmp_path / "out"
    options = ["--lake", str(made.lake.root), "--out", str(out), "--clips", "2", "--shown", "0"]
    assert main(["--run", str(made.run), "--run", str(other), *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2:] == [str(out / f"seed-{seed}" / "report.html") for seed in (0, 1)]
    each = [json.loads((out / f"seed-{seed}" / "metrics.json").read_text()) for seed in (0, 1)]
    values = [metrics["train"]["mean"]["recall"] for metrics in each]
    found = json.loads((out / "ranges.json").read_text())
    assert found["seeds"] == [0, 1]
    assert found["train"]["recall"] == pytest.approx([np.mean(values), min(values), max(values)])
    assert "seed_diversity" not in found["train"], "no run has it"
    row = next(line for line in lines if line.startswith("  sample "))
    film = sorted(metrics["train"]["mean"]["film_sample"] for metrics in each)
    assert f"{np.mean(film):.1f} dB [{film[0]:.1f}, {film[1]:.1f}]" in row

    with pytest.raises(ValueError, match=r"the runs have the seeds \[0, 0\]; train each with another: --set seed=N"):
        evaluate_runs([made.run, made.run], made.lake.root, out)
    assert main(["--run", str(made.run), "--run", str(other), "--step", "30", *options]) == 1
    assert "--step 30 is of one run" in capsys.readouterr().err


def test_runs_that_are_not_alike_are_refused(made: Made, tmp_path: Path) -> None:
    train(made.lake.root, tmp_path / "wide", override(TINY, {"seed": 1, "steps": 1, "batch": 2}))
    with pytest.raises(ValueError, match=r"wide has batch=2, .*run 4; give runs that differ in the seed alone"):
        evaluate_runs([made.run, tmp_path / "wide"], made.lake.root, tmp_path / "out")
    train(made.lake.root, tmp_path / "short", override(TINY, {"seed": 1, "steps": 1}))
    with pytest.raises(ValueError, match=r"of the steps \[\[30\], \[1\]\]; train them equally long"):
        evaluate_runs([made.run, tmp_path / "short"], made.lake.root, tmp_path / "out")
