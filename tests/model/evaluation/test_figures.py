"""The figures of an evaluation, made again by other means."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from model import legs
from model.evaluation.figures import CLIP_METRICS, ClipResult
from model.evaluation.headline import OF_CURVES
from model.metrics.pictures import ssim
from model.sample import Sampler
from tests.model.evaluated import CAPTION, SETTINGS, Made, Page
from tests.model.tiny_lake import DURATION, SIDE


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
    assert described.keys() == OF_CURVES.keys()
    row = {name for name, value in made.metrics["clips"][0].items() if not isinstance(value, str)} - {"clip_start"}
    assert row == {name for name, metric in described.items() if not metric["per_set"]}
    of_the_set = {name for name, metric in described.items() if metric["per_set"]}
    assert made.metrics["train"].keys() - {"clips", "mean", "clips_meeting"} == of_the_set
    text = " ".join(Page(made.page).texts)
    assert OF_CURVES["seed_diversity"].doc in text
    for row in made.metrics["clips"]:
        assert row["above_mean_frame"] == pytest.approx(row["recall"] - row["recall_mean_frame"])
        assert row["below_median"] == pytest.approx(row["recall_median"] - row["recall_worst"])
