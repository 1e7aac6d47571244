"""The generated corpus: what the films are, that they move far but smoothly, and that they are the same every time."""

from __future__ import annotations

import csv
import re
import subprocess
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from model.ffmpeg import Ffmpeg, find_ffmpeg
from pipeline.corpus import FilmPlan, film_command, make_corpus, plan_films
from pipeline.media.decode import ffmpeg_binary

SIDE = 64
WINDOW = 2.0


def read_film(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """All frames of a film as float64 (N, 64, 64, 3) in [0, 1], centre crop, and their times in seconds."""
    filters = f"showinfo,scale={SIDE}:{SIDE}:force_original_aspect_ratio=increase,crop={SIDE}:{SIDE}"
    command = [ffmpeg_binary(), "-hide_banner", "-nostdin", "-xerror", "-threads", "1", "-i", str(path), "-vf", filters]
    command += [f"-{find_ffmpeg().sync_option}", "passthrough", "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    run = subprocess.run(command, capture_output=True, check=True)
    times = np.array([float(time) for time in re.findall(rb"pts_time:\s*([\d.]+)", run.stderr)])
    frames = np.frombuffer(run.stdout, np.uint8).reshape(len(times), SIDE, SIDE, 3)
    return times, frames / 255.0


def windows(times: np.ndarray, frames: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Every whole 2 s window with at most 16 frames/s: those nearest to each sixteenth of a second."""
    cut = []
    for number in range(int((times[-1] + 1 / 24) // WINDOW)):
        wanted = number * WINDOW + np.arange(32) / 16
        kept = np.unique(np.abs(times[None] - wanted[:, None]).argmin(axis=1))
        cut.append((times[kept] - number * WINDOW, frames[kept]))
    return cut


def psnr(error: np.ndarray) -> np.ndarray:
    """Decibels per frame (peak 1)."""
    return -10 * np.log10(np.maximum((error**2).mean(axis=(1, 2, 3)), 1e-10))


def natural_spline(times: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The natural cubic spline through `values` (N, ...) at `times`, read at `wanted`, which lie within."""
    gaps = np.diff(times)
    slopes = np.diff(values.reshape(len(times), -1), axis=0) / gaps[:, None]
    system = np.diag(2 * (gaps[:-1] + gaps[1:])) + np.diag(gaps[1:-1], 1) + np.diag(gaps[1:-1], -1)
    bends = np.zeros((len(times), slopes.shape[1]))  # second derivatives; zero at both ends
    bends[1:-1] = np.linalg.solve(system, 6 * np.diff(slopes, axis=0))
    left = np.searchsorted(times, wanted, side="right") - 1
    gap, past = gaps[left, None], (wanted - times[left])[:, None]
    cubic = (bends[left + 1] - bends[left]) / (6 * gap)
    linear = slopes[left] - gap * (2 * bends[left] + bends[left + 1]) / 6
    read = values.reshape(len(times), -1)[left] + past * (linear + past * (bends[left] / 2 + past * cubic))
    return read.reshape(len(wanted), *values.shape[1:])


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus")).parent


def test_every_window_moves_far_and_smoothly(corpus: Path) -> None:
    checked = 0
    with open(corpus / "captions.csv", encoding="utf-8") as table:
        files = [row["file"] for row in csv.DictReader(table)]
    for file in files:
        for times, frames in windows(*read_film(corpus / file)):
            where = f"{file}, window {checked}"
            assert psnr(frames[1:] - frames[:1]).mean() <= 18, f"{where}: holding the first frame is too good"
            assert psnr(frames - frames.mean(axis=0)).mean() <= 20, f"{where}: the mean frame is too good"
            between = natural_spline(times[::2], frames[::2], times[1:-1:2])
            assert psnr(frames[1:-1:2] - between).min() >= 30, f"{where}: frames between are not predicted"
            checked += 1
    assert checked == 48


def test_the_films_differ_in_everything() -> None:
    plans = plan_films()
    assert len(plans) == len({plan.scene.caption for plan in plans}) == len({plan.file for plan in plans}) == 32
    assert len({plan.scene.motion for plan in plans}) >= 6
    assert {"translation", "zoom", "rotation", "scroll", "bouncing", "appearance"} <= {p.scene.motion for p in plans}
    assert {plan.file.rsplit(".")[-1] for plan in plans} == {"mp4", "mkv", "webm", "avi", "mov"}
    assert len({plan.encoder for plan in plans}) >= 5
    assert len({(plan.width, plan.height) for plan in plans}) >= 6
    assert len({plan.width / plan.height for plan in plans}) >= 4
    rates = Counter(plan.rate for plan in plans if not plan.irregular)
    assert set(rates) == {24, 25, 30, 48}
    assert rates[48] >= 8
    assert sum(plan.irregular for plan in plans) == 1
    assert sum(plan.seconds >= 10 for plan in plans) == 4
    assert all(plan.width % 2 == plan.height % 2 == 0 for plan in plans)


def test_stored_as_planned(corpus: Path) -> None:
    """The container's own account of codec, size and rate, and the gaps between the frames."""
    for plan in plan_films()[:8]:
        run = subprocess.run([ffmpeg_binary(), "-hide_banner", "-i", str(corpus / plan.file)], capture_output=True)
        account = run.stderr.decode()
        assert f"{plan.width}x{plan.height}" in account, account
        times, _ = read_film(corpus / plan.file)
        gaps = np.unique(np.round(np.diff(times) * plan.rate))
        assert times[0] == 0
        assert times[-1] + 1.5 / plan.rate >= plan.seconds
        assert gaps.tolist() == ([1, 2, 3, 4] if plan.irregular else [1]), plan.file


def test_same_seed_same_bytes_other_seed_other_pixels(tmp_path: Path) -> None:
    first = make_corpus(tmp_path / "a", seed=3, films=4).parent
    second = make_corpus(tmp_path / "b", seed=3, films=4).parent
    names = sorted(path.name for path in first.iterdir())
    assert names == sorted(path.name for path in second.iterdir())
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in names)
    other = make_corpus(tmp_path / "c", seed=4, films=4).parent
    assert (first / "captions.csv").read_text() != (other / "captions.csv").read_text()


def test_goes_on_where_it_stopped_and_redoes_nothing(tmp_path: Path) -> None:
    told: list[tuple[int, int, str]] = []
    captions = make_corpus(tmp_path, films=3, progress=lambda *step: told.append(step))
    assert [(done, total) for done, total, _ in told] == [(1, 3), (2, 3), (3, 3)]
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    make_corpus(tmp_path, films=3, progress=lambda *step: pytest.fail(f"made again: {step}"))
    assert stamps == {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}

    lost, torn = (tmp_path / plan.file for plan in plan_films(films=2))
    whole = torn.read_bytes()
    lost.unlink()
    torn.write_bytes(whole[: len(whole) // 2])
    told.clear()
    make_corpus(tmp_path, films=3, progress=lambda *step: told.append(step))
    assert {file for _, _, file in told} == {lost.name, torn.name}
    assert torn.read_bytes() == whole

    make_corpus(tmp_path, films=2)
    listed = [line.split(",")[0] for line in captions.read_text().splitlines()[1:]]
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix not in (".csv", ".json")) == listed


def test_an_ffmpeg_without_the_usual_encoders_still_makes_every_film() -> None:
    plans = plan_films(encoders=frozenset({"mpeg4", "mjpeg", "ffv1"}))
    assert {plan.encoder for plan in plans} == {"mpeg4", "mjpeg", "ffv1"}
    assert not any(plan.file.endswith(".webm") for plan in plans)


@pytest.mark.parametrize("films", [0, 129])
def test_a_number_of_films_out_of_range_is_refused(films: int, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="between 1 and 128"):
        make_corpus(tmp_path, films=films)


def test_a_film_that_cannot_be_made_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(ffmpeg: Ffmpeg, plan: FilmPlan, target: Path) -> list[str]:
        return [*film_command(ffmpeg, plan, target)[:-1], "-frames:v", "nonsense", str(target)]

    monkeypatch.setattr("pipeline.corpus.films.film_command", broken)
    with pytest.raises(OSError, match=r"could not draw 01-translation\.mp4"):
        make_corpus(tmp_path, films=1)
    assert not [path for path in tmp_path.iterdir() if path.suffix == ".mp4"]
