"""The evaluation: its figures made again by other means, its page read as a browser would, and made once only."""

from __future__ import annotations

import base64
import html
import json
import re
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from model import legs
from model.evaluate import evaluate, evaluate_runs, main
from model.evaluation.figures import CLIP_METRICS, ClipResult
from model.evaluation.generation import CAPTIONS, GENERATION_METRICS, SEEDS
from model.evaluation.headline import GROUPS, METRICS, headline
from model.methods.base import SampleSettings
from model.metrics.pictures import ssim
from model.recipes import train_recipe
from model.sample import Sampler
from model.settings import override
from model.train import train
from model.training.data import Clips
from storage import version
from storage.layout import Lake
from tests.model.tiny_lake import DURATION, SIDE, make_lake

CAPTION = 'square {number} <b>slides</b> & "shines" > <script src="x.js">'
SETTINGS = SampleSettings(steps=4, warmup_steps=2, seed=11)
TINY = override(
    train_recipe("demo"),
    {
        "width": 32, "depth": 2, "heads": 2, "batch": 4, "steps": 30, "log_every": 5, "checkpoint_every": 30,
        "validate_every": 30, "learning_rate_warmup": 2, "ema_decay": 0.8,
    },
)  # fmt: skip


class Made:
    """A lake, a run and its evaluation."""

    def __init__(self, folder: Path, **looks: Any) -> None:
        self.lake, self.run, self.out = make_lake(folder / "lake", **looks), folder / "run", folder / "report"
        train(self.lake.root, self.run, TINY)
        self.metrics = self.evaluate()
        self.page = (self.out / "report.html").read_text()
        self.clips = list(Clips(self.lake, version.load(self.lake), "train").every())

    def evaluate(self, **more: Any) -> dict[str, Any]:
        return evaluate(self.run, self.lake.root, self.out, SETTINGS, shown=3, **more)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("evaluate"), caption=CAPTION, validation=2)


def decibel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(N,) PSNR of pictures (N, 3, H, W) in [-1, 1], in plain numpy; 100 dB at most."""
    error = ((np.asarray(a, np.float64) - np.asarray(b, np.float64)) ** 2).mean(axis=(1, 2, 3))
    return 20 * np.log10(2) - 10 * np.log10(error.clip(4e-10))


@pytest.mark.parametrize("number", [4, 5])
def test_the_figures_of_a_clip_made_again(made: Made, number: int) -> None:
    """A still and a moving clip alone: sampled, read, decoded and compared without the evaluation's own functions."""
    clip, row = made.clips[number], made.metrics["clips"][number]
    assert (row["clip_id"], row["split"], row["film"]) == (clip.clip_id, "train", f"film-{number}.mp4")
    assert row["caption"] == CAPTION.format(number=number)
    sampler = Sampler(made.run, device="cpu")
    codec, times, seen = sampler.codec, clip.members["frame_time"], clip.members["observed"]
    latents = clip.members["latents"].astype(np.float32)
    film = clip.members["preview"].transpose(0, 3, 1, 2) / 127.5 - 1

    def decoded(values: Any) -> np.ndarray:
        return codec.decode(torch.as_tensor(np.asarray(values), dtype=torch.float32)).numpy()

    trajectory = sampler.sample([row["caption"]], [row["clip_start"]], [SETTINGS.seed + number], SETTINGS)
    sample = decoded(trajectory.read(list(times / DURATION))[:, 0])
    reconstruction = decoded(latents)
    curve = decoded(legs.evaluate(clip.members["coefficients"].astype(np.float64), times, DURATION))
    held = np.broadcast_to(reconstruction.mean(0), reconstruction.shape)
    first = np.broadcast_to(reconstruction[0], reconstruction.shape)

    def latent_error(at: np.ndarray) -> float:
        path = legs.evaluate(clip.members["coefficients"].astype(np.float64), at, 1.0)
        return float(np.sqrt(np.square(trajectory.read(list(at))[:, 0].numpy() - path).mean()))

    codec_dB = decibel(sample, reconstruction)
    expected = {
        "film_sample": decibel(sample, film).mean(),
        "film_ceiling": decibel(reconstruction, film).mean(),
        "film_lookup": decibel(curve, film).mean(),
        "film_mean_frame": decibel(held, film).mean(),
        "film_first_frame": decibel(first, film).mean(),
        "film_sample_ssim": float(ssim(torch.from_numpy(sample), torch.from_numpy(film).float()).mean()),
        "film_ceiling_ssim": float(ssim(torch.from_numpy(reconstruction), torch.from_numpy(film).float()).mean()),
        "film_sample_held_out": decibel(sample, film)[~seen].mean(),
        "film_ceiling_held_out": decibel(reconstruction, film)[~seen].mean(),
        "film_lookup_held_out": decibel(curve, film)[~seen].mean(),
        "recall": codec_dB.mean(),
        "recall_lookup": decibel(curve, reconstruction).mean(),
        "recall_mean_frame": decibel(held, reconstruction).mean(),
        "recall_observed": codec_dB[seen].mean(),
        "recall_observed_worst": codec_dB[seen].min(),
        "recall_held_out": codec_dB[~seen].mean(),
        "recall_median": np.sort(codec_dB)[(len(codec_dB) - 1) // 2],
        "recall_worst": codec_dB.min(),
        "between_grid": latent_error((np.arange(4) + 0.5) / 4) / latent_error(np.arange(5) / 4),
    }
    assert {name: row[name] for name in expected} == pytest.approx(expected, abs=2e-3)


def test_a_held_first_frame(made: Made) -> None:
    sampler = Sampler(made.run, device="cpu")
    clip = made.clips[1]  # its square moves
    pictures = sampler.codec.decode(torch.from_numpy(clip.members["latents"].astype(np.float32))).double().numpy()
    expected = 10 * np.log10(4 / ((pictures - pictures[:1]) ** 2).mean())
    assert made.metrics["clips"][1]["recall_first_frame"] == pytest.approx(expected, abs=1e-3)


def test_the_summary_is_of_training_clips_and_the_unseen_stand_apart(made: Made) -> None:
    metrics = made.metrics
    rows = [row for row in metrics["clips"] if row["split"] == "train"]
    unseen = [row for row in metrics["clips"] if row["split"] == "validation"]
    assert (metrics["train"]["clips"], metrics["validation"]["clips"]) == (len(rows), len(unseen)) == (6, 2)
    summary = metrics["train"]
    for name in ("film_sample", "recall", "recall_mean_frame", "film_ceiling_held_out"):
        finite = [row[name] for row in rows if row[name] is not None]
        assert summary["mean"][name] == pytest.approx(np.mean(finite))
    assert summary["worst_observed_frame"] == min(row["recall_observed_worst"] for row in rows)
    assert metrics["validation"]["mean"]["recall"] == pytest.approx(np.mean([row["recall"] for row in unseen]))
    side = summary["mean"]["recall_observed"] + 20 * np.log10(SIDE / 2)
    assert summary["psnr_paper"] == pytest.approx(side), "the peak is the side of these frames"
    meeting = {
        "observed_worst_frame": sum(row["recall_observed_worst"] >= 24 for row in rows),
        "below_median": sum(row["recall_median"] - row["recall_worst"] <= 3 for row in rows),
        "held_out_gap": sum(row["recall_observed"] - row["recall_held_out"] <= 1 for row in rows),
    }
    assert {name: summary["clips_meeting"][name] for name in meeting} == meeting
    # 2 warm-up steps and a call at their end, 4 clip steps and one at their end, for any number of frames.
    assert metrics["network_calls_per_window"] == 8


def test_the_goals_can_be_met() -> None:
    bounds = {"recall_observed_worst": 24.0, "above_mean_frame": 3.0, "below_median": 3.0, "held_out_gap": 1.0}

    def result(**changes: float) -> dict[str, bool]:
        figures = {**{metric.name: 30.0 for metric in CLIP_METRICS}, **bounds, **changes}
        return ClipResult("", "", "", 0.0, "train", figures).goals()

    assert all(result().values())
    assert all(result(held_out_gap=float("nan")).values()), "a clip that shows all its frames is not blamed"
    for goal, change in {
        "observed_worst_frame": {"recall_observed_worst": 23.9},
        "above_mean_frame": {"above_mean_frame": 2.9},
        "below_median": {"below_median": 3.1},
        "held_out_gap": {"held_out_gap": 1.1},
    }.items():
        assert [name for name, met in result(**change).items() if not met] == [goal]


def test_every_figure_is_described(made: Made) -> None:
    """Name, unit, direction and meaning of each: in metrics.json, and in the report's tables."""
    described = made.metrics["metrics"]
    assert described.keys() == METRICS.keys()
    row = {name for name, value in made.metrics["clips"][0].items() if not isinstance(value, str)} - {"clip_start"}
    assert row == {name for name, metric in described.items() if not metric["per_set"]}
    of_the_set = {name for name, metric in described.items() if metric["per_set"]}
    assert made.metrics["train"].keys() - {"clips", "mean", "clips_meeting"} == of_the_set
    text = " ".join(Page(made.page).texts)
    assert METRICS["seed_diversity"].doc in text
    for row in made.metrics["clips"]:
        assert row["above_mean_frame"] == pytest.approx(row["recall"] - row["recall_mean_frame"])
        assert row["below_median"] == pytest.approx(row["recall_median"] - row["recall_worst"])


class Page(HTMLParser):
    """Collects a page's text and addresses, and checks that what is opened is closed."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.texts: list[str] = []
        self.images: list[bytes] = []
        self.tags: set[str] = set()
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attributes:
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "href", "data", "action", "srcset", "poster"):
                assert tag == "img", tag
                kind, _, data = str(value).partition(",")
                assert kind in ("data:image/webp;base64", "data:image/png;base64")
                self.images.append(base64.b64decode(data, validate=True))
        if tag not in ("img", "meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.texts.append(data)


def test_the_page_stands_alone_and_parses(made: Made) -> None:
    page = Page(made.page)
    assert page.open == []
    assert not page.tags & {"script", "link", "iframe", "object", "embed", "base", "form"}
    rest = re.sub(r"base64,[^']*", "", made.page)
    assert not re.findall(r"https?:|file:|//|url\(|@import|src=(?!'data:|&quot;)", rest)
    generated = 2 * (1 + SEEDS) + 2 * 3  # a caption of each split: the film beside what was made
    assert len(page.images) == generated + 3 * 3 * (3 + 6), "3 clips: film, look-up, sample; 3 rates and 6 stills"
    for data in page.images:
        with Image.open(BytesIO(data)) as picture:
            assert picture.size == (SIDE, SIDE)


def test_every_caption_is_there_and_does_nothing(made: Made) -> None:
    page = Page(made.page)
    for number in range(8):
        caption = CAPTION.format(number=number)
        assert caption in page.texts, "as text, whole"
        assert caption not in made.page
        assert html.escape(caption) in made.page


def test_the_page_tells_rates_goals_loss_and_seed(made: Made) -> None:
    text = " ".join(Page(made.page).texts)
    for words in (
        "8 fps", "12 fps", "16 fps", "seed 11", "every observed frame at 24 dB or more", "codec (ceiling)",
        "look-up, no network", "validation loss", "step 30", "film-6.mp4 (validation)", "training, 6 clips",
        "Seeds of one caption", "Another clip's picture", "Dataset: clips: discovered 8; films: discovered 8.",
    ):  # fmt: skip
        assert words in text, words
    row = made.metrics["clips"][0]
    assert f"{row['film_sample']:.2f}" in text
    assert "nan" not in text
    assert "None" not in text


def test_pictures_move_and_are_the_films(made: Made) -> None:
    """The second shown clip is film 1, whose square moves: 16 pictures at 8 fps, 32 at 16, from its first frame."""
    page = made.page[made.page.index("<h2>Films, look-ups and samples") :]
    shown = [row for row in made.metrics["clips"] if html.escape(row["caption"]) + "</h3>" in page]
    assert len(shown) == 3
    films = Page(made.page).images[2 * (1 + SEEDS) + 2 * 3 :]
    for number, row in enumerate(shown):
        moving = [clip for clip in made.clips if clip.clip_id == row["clip_id"] and int(row["film"][5]) % 2]
        for clip in moving:
            for place, rate in enumerate((8, 12, 16)):
                with Image.open(BytesIO(films[27 * number + place])) as film:
                    lengths = []
                    for k in range(film.n_frames):
                        film.seek(k)
                        film.load()
                        lengths.append(film.info["duration"])
                    assert sum(lengths) == 1000 * DURATION
                    assert max(lengths) >= 1000 // rate
                    film.seek(0)
                    near(film, clip.members["preview"][0])
                    film.seek(film.n_frames - 1)
                    near(film, clip.members["preview"][-1])


def near(picture: Image.Image, frame: np.ndarray) -> None:
    assert np.abs(np.asarray(picture.convert("RGB")).astype(int) - frame).mean() < 8


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
