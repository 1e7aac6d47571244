"""The frame after a window: in the coefficients where the film has it, nowhere where it does not, the same for all.

Whatever way coefficients come about (films, imported latents, another order, another caption, repair), they are those
of a direct ingest, bit for bit.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pipeline.ingest.block
from model.codecs.linear import LinearCodec
from model.legs import evaluate
from pipeline.ingest import plan_ingest
from pipeline.ingest.block import BlockWorker
from pipeline.ingest.provenance import provenance
from pipeline.items import Window
from pipeline.media.decode import Probe, decode, probe, select_frames, window_starts, with_next_frame
from pipeline.media.faults import DecodeError
from pipeline.recipes import DataRecipe
from pipeline.sources.folders import discover
from storage.arrays import NEXT_ARRAYS, read_clips
from storage.layout import Lake
from storage.repair import repair
from storage.shards import ShardReader
from storage.version import load
from tests.pipeline.ingest.in_process import RECIPE, NoWork, make, rows, sound
from tests.pipeline.ingest.test_shots import cut_film
from tests.reference import legs as reference

Film = Callable[..., Path]
CUBIC = dataclasses.replace(RECIPE, method="cubic")
WITHOUT = dataclasses.replace(CUBIC, next_frame="no")


def film_of(times: np.ndarray) -> Probe:
    ticks = np.round(times * 1000).astype(np.int64)
    return Probe(ticks, Fraction(1, 1000), 0.04, np.array([], np.int64), "h264", 8, 8)


def samples(lake: Path, number: int | None = None) -> dict[tuple[str, float], dict[str, Any]]:
    """A version's samples by caption and start."""
    opened, found = Lake.open(lake), {}
    for row in rows(lake, number):
        found[row["caption"], row["clip_start"]] = ShardReader(opened, row["shard"]).read(row["shard_row"])
    return found


def coefficients(lake: Path, number: int | None = None) -> dict[tuple[str, float], bytes]:
    return {key: sample["coefficients.npy"].tobytes() for key, sample in samples(lake, number).items()}


@pytest.fixture(scope="module")
def folder(scene: Film, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two films that are thinned unevenly; the first one goes on for half a second after its last window."""
    made = tmp_path_factory.mktemp("films")
    scene(made / "a.mp4", rate="24", seconds=3.5)
    scene(made / "b.mkv", rate="10", seconds=2)
    (made / "captions.csv").write_text("file,caption\na.mp4,a\nb.mkv,b\n")
    return made


@pytest.fixture(scope="module")
def direct(folder: Path) -> Path:
    """The lake of these films."""
    make(folder, folder.parent / "direct", CUBIC)
    return folder.parent / "direct"


# --- which frame it is


@settings(max_examples=60, deadline=None)
@given(st.floats(2, 60), st.floats(2, 24), st.integers(0, 4), st.lists(st.floats(0, 0.01), min_size=1, max_size=7))
def test_it_is_the_first_of_the_window_that_follows(
    film_rate: float, rate: float, number: int, jitter: list[float]
) -> None:
    """At any rate: later than what the window keeps, at its end or up to two gaps later, and the next one's first."""
    count = int(6 * film_rate)
    film = film_of(np.sort(np.arange(count) / film_rate + np.resize(jitter, count)))
    if (np.diff(film.ticks) <= 0).any():
        return
    window = select_frames(film, float(number), 1.0, rate)
    found = with_next_frame(film, window, 1.0, rate)
    assert found.alone == window
    assert found.decoded == (*window.ticks, *found.next_ticks)
    following = select_frames(film, number + 1.0, 1.0, rate).ticks
    if found.next_ticks:
        assert found.next_ticks == following[:1]
        assert 1.0 <= found.next_time[0] <= 1.0 + 2 * max(np.diff(window.frame_time)) + 0.01
        assert found.next_time[0] > window.frame_time[-1]
        film_time = film.times[film.ticks == found.next_ticks[0]][0]
        assert with_next_frame(film, window, 1.0, rate, end=film_time) == window, "from the cut on there is none"
        assert with_next_frame(film, window, 1.0, rate, end=film_time + 1e-6) == found
    else:
        assert len(window.ticks) < 2 or not following or max(np.diff(film.times)) > max(np.diff(window.frame_time))


def test_there_is_none_where_the_film_ends_or_its_times_jump() -> None:
    even = np.arange(16) / 8
    assert with_next_frame(film_of(even), select_frames(film_of(even), 0.0, 1.0, 8.0), 1.0, 8.0).next_time == (1.0,)
    for film, start in (
        (film_of(even), 1.0),
        (film_of(np.append(even, 60.0)), 1.0),
        (film_of(np.append(even, 2.9)), 1.0),
    ):
        window = select_frames(film, start, 1.0, 8.0)
        assert len(window.ticks) == 8
        assert with_next_frame(film, window, 1.0, 8.0) == window


def test_it_is_decoded_once_for_two_windows(film: Film, tmp_path: Path) -> None:
    """One ffmpeg for windows that share frames; each gets what it gets alone."""
    path = film(tmp_path / "a.mp4", rate="24", seconds=3.5)
    found = probe(path)
    windows = [with_next_frame(found, select_frames(found, s, 1.0, 8), 1.0, 8) for s in window_starts(found, 1.0)]
    assert [len(window.next_ticks) for window in windows] == [1, 1, 1]
    together = list(decode(path, windows, (8, 8)))
    for window, frames in zip(windows, together, strict=True):
        (alone,) = decode(path, [window], (8, 8))
        assert np.array_equal(frames, alone)
        assert len(frames) == len(window.ticks) + 1
        assert frames[-1, 0, 0, 0] == round(1.3 * 24 * (window.start + 1.0)), "the frame that is asked for"
    assert np.array_equal(together[0][-1], together[1][0])
    single = Window(1.0, windows[0].next_ticks, (0.0,))
    assert [len(part) for part in decode(path, [windows[0], single, windows[2]], (8, 8))] == [9, 1, 9]


# --- what it does to the coefficients


def test_coefficients_are_those_of_the_reference(folder: Path, tmp_path: Path) -> None:
    """The piecewise linear interpolant through the frame after the window, in extended precision."""
    make(folder, tmp_path / "lake", dataclasses.replace(RECIPE, method="linear"))
    seen = 0
    for sample in samples(tmp_path / "lake").values():
        observed = sample["observed.npy"]
        times = np.append(sample["frame_time.npy"][observed], sample["next_time.npy"])
        latents = np.concatenate([sample["latents.npy"][observed], sample["next_latents.npy"]]).astype(np.float64)
        order = sample["clip.json"]["order_used"]
        for value in (0, 77, 150):
            signal = latents.reshape(len(latents), -1)[:, value]
            edges = np.unique(np.clip([0.0, *times, 1.0], 0, 1))
            expected = reference.projection(lambda r: np.interp(r.astype(float), times, signal), edges, order)  # noqa: B023
            found = sample["coefficients.npy"].reshape(len(sample["coefficients.npy"]), -1)[:order, value]
            assert np.abs(found - expected.astype(float)).max() < 2e-3 * np.abs(signal).max()
        seen += len(sample["next_time.npy"])
    assert seen == 4, "all windows but that at the end of b"


def test_the_path_arrives_at_the_next_frame(folder: Path, direct: Path, tmp_path: Path) -> None:
    """Where it held the last frame before; and nothing else of a clip changes but its projection."""
    make(folder, tmp_path / "without", WITHOUT)
    sound(direct)
    before, now = samples(tmp_path / "without"), samples(direct)
    starts = {"a": 3, "b": 2}
    assert {caption: sum(key[0] == caption for key in now) for caption in starts} == starts
    for (caption, start), sample in now.items():
        old = before[caption, start]
        for name in ("latents.npy", "frame_time.npy", "observed.npy", "text.npy"):
            assert sample[name].tobytes() == old[name].tobytes()
        for name in ("psnr_codec", "frames_certified", "frames_id", "motion", "cuts", "residual", "order_used"):
            assert sample["clip.json"][name] == old["clip.json"][name]
        if not len(sample["next_time.npy"]):
            assert (caption, start) == ("b", 1.0), "the film ends there"
            assert sample["coefficients.npy"].tobytes() == old["coefficients.npy"].tobytes()
            continue
        errors = [
            np.square(
                evaluate(each["coefficients.npy"].astype(np.float32), [1.0], 1.0)[0] - sample["next_latents.npy"][0]
            )
            for each in (sample, old)
        ]
        assert sample["next_time.npy"] == 1.0
        assert np.mean(errors[0]) < 0.1 * np.mean(errors[1])
        if ("a", start + 1) in now and caption == "a":
            assert sample["next_latents.npy"][0].tobytes() == now["a", start + 1]["latents.npy"][0].tobytes()


@pytest.mark.parametrize("split", [True, False], ids=["windows begin at cuts", "the frame itself shows the cut"])
def test_a_cut_is_not_crossed(tmp_path: Path, split: bool) -> None:
    """Shots of 8 and 20 frames at 8 a second: the first window ends at a cut, the second one in its shot."""
    cut_film(tmp_path / "films" / "cut.mp4", (8, 20))
    (tmp_path / "films" / "cut.txt").write_text("colours")
    recipes = [dataclasses.replace(recipe, split_at_cuts=split) for recipe in (CUBIC, WITHOUT)]
    for name, recipe in zip(("with", "without"), recipes, strict=True):
        make(tmp_path / "films", tmp_path / name, recipe)
        sound(tmp_path / name)
    found, before = samples(tmp_path / "with"), coefficients(tmp_path / "without")
    assert {start: len(sample["next_time.npy"]) for (_, start), sample in found.items()} == {0.0: 0, 1.0: 1, 2.0: 1}
    assert [coefficients(tmp_path / "with")[key] == before[key] for key in sorted(before)] == [True, False, False]


def test_a_fault_after_the_window_costs_the_window_nothing(folder: Path, direct: Path, tmp_path: Path) -> None:
    real = pipeline.ingest.block.decode

    def broken(path: Path, windows: list[Window], *how: Any) -> Any:
        for window in windows:
            if window.start == 1.0 and window.next_ticks:
                raise DecodeError("truncated", "cut short")
            yield from real(path, [window], *how)

    with mock.patch.object(pipeline.ingest.block, "decode", broken):
        report = make(folder, tmp_path / "lake", CUBIC)
    assert (report.clips.failed, report.clips.done) == ({}, 5)
    found, whole = samples(tmp_path / "lake"), coefficients(direct)
    assert {key for key, sample in found.items() if not len(sample["next_time.npy"])} == {("a", 1.0), ("b", 1.0)}
    assert {key for key, own in coefficients(tmp_path / "lake").items() if own != whole[key]} == {("a", 1.0)}
    sound(tmp_path / "lake")


# --- the same, however it comes about


def test_another_order_takes_it_from_the_store(folder: Path, direct: Path, tmp_path: Path) -> None:
    lake = Path(shutil.copytree(direct, tmp_path / "lake"))
    other = dataclasses.replace(CUBIC, order=6)
    make(folder, tmp_path / "straight", other)
    forbidden = mock.Mock(side_effect=AssertionError("it is stored"))
    with mock.patch.object(LinearCodec, "encode", forbidden):
        report = make(folder, lake, other)
    assert report.clips.done == 5
    assert coefficients(lake) == coefficients(tmp_path / "straight")
    sound(lake)


def test_a_lake_without_gets_that_frame_alone(folder: Path, direct: Path, tmp_path: Path) -> None:
    """Two recipes in a lake: asked for, the frame is encoded, and the others are taken as they are stored."""
    lake = tmp_path / "lake"
    make(folder, lake, WITHOUT)
    plain = dataclasses.replace(CUBIC, next_frame="auto")
    assert not make(folder, lake, plain, NoWork()).published, "nobody asked for it"
    asked = dataclasses.replace(CUBIC, next_frame="yes")
    opened = Lake.open(lake)
    lines = plan_ingest(opened, discover(folder, folder / "captions.csv"), asked).lines()
    assert "5 of them take stored latents: they are not encoded again, but for the frame after each window" in lines
    encoded: list[int] = []
    real = LinearCodec.encode

    def counting(codec: LinearCodec, frames: Any, captions: Any = ()) -> Any:
        encoded.append(len(frames))
        return real(codec, frames, captions)

    with mock.patch.object(LinearCodec, "encode", counting):
        make(folder, lake, asked)
    assert sum(encoded) == 4
    assert coefficients(lake) == coefficients(direct)
    (clip,) = [row for row in rows(lake, 1) if row["caption"] == "b" and row["clip_start"] == 0]
    told = provenance(opened, load(opened, 1), clip, asked)
    assert told.again
    assert "next_frame is 'yes' now, it was 'no'" in told.reasons
    assert not provenance(opened, load(opened, 1), clip, plain).again
    # Asked for once, it stays: the newest version decides. And back again, nothing is made anew.
    assert not make(folder, lake, plain, NoWork()).published
    assert make(folder, lake, WITHOUT, NoWork()).published
    assert coefficients(lake) == coefficients(lake, 1)
    sound(lake)


def test_another_caption_copies_it(folder: Path, direct: Path, tmp_path: Path) -> None:
    lake, films = tmp_path / "lake", Path(shutil.copytree(folder, tmp_path / "films"))
    make(films, lake, CUBIC)
    (films / "captions.csv").write_text("file,caption\na.mp4,other words\nb.mkv,b\n")
    with mock.patch.object(BlockWorker, "process", side_effect=AssertionError("only the text is new")):
        assert make(films, lake, CUBIC).clips.done == 3
    renamed = {
        (caption.replace("other words", "a"), start): own for (caption, start), own in coefficients(lake).items()
    }
    assert renamed == coefficients(direct)
    assert sum(len(sample["next_time.npy"]) for sample in samples(lake).values()) == 4
    sound(lake)


def test_repair_brings_it_back_to_either_store(direct: Path, tmp_path: Path) -> None:
    lake = Lake.open(shutil.copytree(direct, tmp_path / "lake"))
    version = load(lake)
    arrays = read_clips(lake, version.snapshot, version.group)
    assert np.isfinite(arrays["next_time"]).sum() == 4
    assert version.clip["next_frame"] is True
    assert version.recipe["next_frame"] == "yes"
    shards = {path.name: path.read_bytes() for path in lake.shards.iterdir()}
    for damage in (lambda: shutil.rmtree(lake.arrays), lambda: [path.unlink() for path in lake.shards.glob("*.tar")]):
        damage()
        with lake.writing():
            assert repair(lake).problems == []
        now = read_clips(lake, load(lake).snapshot, version.group)
        names = [name for name in arrays if name != "text_row"]  # captions may have other places
        assert {name: now[name].tobytes() for name in names} == {name: arrays[name].tobytes() for name in names}
        assert {path.name: path.read_bytes() for path in lake.shards.iterdir()} == shards
    sound(lake.root)


def test_shards_without_latents_have_none_of_it(folder: Path, direct: Path, tmp_path: Path) -> None:
    make(folder, tmp_path / "lake", dataclasses.replace(CUBIC, store_latents=False))
    assert not any("next" in name for sample in samples(tmp_path / "lake").values() for name in sample)
    assert coefficients(tmp_path / "lake") == coefficients(direct)
    sound(tmp_path / "lake")


@pytest.mark.parametrize(
    "recipe",
    [
        dataclasses.replace(RECIPE, next_frame="no"),
        dataclasses.replace(RECIPE, method="lstsq", order=4),
        dataclasses.replace(RECIPE, shots={"min_frames": 4, "max_frames": 40}),
    ],
    ids=["no", "method", "shots"],
)
def test_where_it_is_not_used_a_dataset_is_as_before(recipe: DataRecipe, folder: Path, tmp_path: Path) -> None:
    """The same fields in recipe and fingerprint, the same arrays and members: of such recipes all clips stay."""
    assert "next_frame" not in recipe.data_fields()
    assert "next_frame" not in recipe.to_json()
    make(folder, tmp_path / "lake", recipe)
    lake = Lake.open(tmp_path / "lake")
    version = load(lake)
    assert "next_frame" not in version.clip
    assert not set(NEXT_ARRAYS) & set(read_clips(lake, version.snapshot, version.group))
    assert not any("next" in name for sample in samples(tmp_path / "lake").values() for name in sample)
