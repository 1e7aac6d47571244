"""The compositional corpus: its captions and what is held out, its films and their truth, drawn the same everywhere."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from model.text.words import WORDS
from pipeline.corpus import (
    Attributes,
    attributes_of,
    combinations,
    make_combinations,
    plan_combinations,
    plan_film,
    read_combinations,
)
from pipeline.corpus.combinations import LONG
from pipeline.corpus.grammar import HELD_OUT
from pipeline.media.decode import decode, probe, select_frames

RING = Attributes("large", "red", "ring", "slides", "to the left", "slowly", "dark blue")


def test_a_caption_says_all_attributes_in_known_words() -> None:
    assert RING.caption == "a large red ring slides slowly to the left on a dark blue background"
    captions = [one.caption for one in combinations()]
    assert len(set(captions)) == len(captions) == 2880
    assert max(len(caption.split()) for caption in captions) < 20
    assert {word for caption in captions for word in caption.split()} <= set(WORDS.split())
    assert all(attributes_of(one.caption) == one for one in combinations()[::97])
    with pytest.raises(ValueError, match="'a blue moon' is no caption"):
        attributes_of("a blue moon")


def test_what_is_held_out_is_a_sixth_and_only_pairs() -> None:
    everything, training, held_out = combinations(), combinations(False), combinations(True)
    assert sorted(training + held_out) == sorted(everything)
    assert 0.15 <= len(held_out) / len(everything) <= 0.2
    for one in held_out:
        assert any(all(getattr(one, name) == value for name, value in pair.items()) for pair in HELD_OUT)
    for name in vars(RING):
        assert {getattr(one, name) for one in training} == {getattr(one, name) for one in everything}
    words = {word for one in training for word in one.caption.split()}
    assert {word for one in held_out for word in one.caption.split()} <= words


def test_a_plan_has_every_value_and_several_films_of_a_caption() -> None:
    plans = plan_combinations(films=96)
    assert plans == plan_combinations(films=96) != plan_combinations(seed=1, films=96)
    assert plans[:12] == plan_combinations(films=12), "more films change the first ones"
    assert len({film.file for film in plans}) == 96
    assert len({film.attributes for film in plans}) == 32
    assert not any(film.attributes.held_out for film in plans)
    for name in vars(RING):
        assert len({getattr(film.attributes, name) for film in plans}) == len(
            {getattr(one, name) for one in combinations()}
        ), name
    one, other = plans[0], plans[1]
    assert one.attributes == other.attributes
    assert one.path.phase != other.path.phase
    assert one.path.lane != other.path.lane
    unseen = plan_combinations(films=80, held_out=True, films_per_caption=1)
    assert all(film.attributes.held_out for film in unseen)
    assert len({film.attributes for film in unseen}) == 80
    many = plan_combinations(films=600, held_out=True, films_per_caption=1)
    assert many[len(combinations(True))].attributes == many[0].attributes, "all captions come before one comes again"


@pytest.mark.parametrize("wrong", [{"films": 0}, {"films_per_caption": 0}, {"seconds": 0.0}, {"seconds": 61.0}])
def test_a_plan_out_of_range_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} = "):
        plan_combinations(**wrong)  # type: ignore[arg-type]


def test_the_speed_is_what_the_caption_says_or_drawn_from_the_range() -> None:
    films = plan_combinations(films=300, films_per_caption=1)
    for speed, wanted in (("slowly", 0.2), ("quickly", 0.4)):
        assert {film.path.speed for film in films if film.attributes.speed == speed} == {wanted}
    drawn = [film.path.speed for film in films if film.attributes.speed == ""]
    assert len(set(drawn)) == len(drawn) >= 80
    assert 0.18 <= min(drawn) < 0.2
    assert 0.43 < max(drawn) <= 0.45


def test_a_slide_returns_at_the_other_border_and_is_told_by_a_frame_and_the_caption() -> None:
    film = plan_film(RING, seconds=LONG)
    frames = film.draw()
    assert len(frames) == len(film.times) == 144
    assert np.array_equal(np.roll(frames[0], -16, axis=1), frames[20]), "a quarter of the picture in 1.25 s"
    assert np.array_equal(frames[0], frames[80]), "all around in 5 s"


def test_the_pixels_are_the_same_on_every_machine() -> None:
    digest = hashlib.sha256()
    for film in (*plan_combinations(films=6, films_per_caption=1), plan_film(RING)):
        digest.update(film.draw().tobytes())
    assert digest.hexdigest() == "14400c7f6e8f3de155fbd8221a36896aa1284e449d26c23ae7003b77084d8659"


def test_films_are_stored_as_drawn_and_their_truth_read_back(tmp_path: Path) -> None:
    captions = make_combinations(tmp_path, seed=2, films=3, held_out=True)
    films = read_combinations(captions)
    assert films == plan_combinations(2, 3, held_out=True)
    for film in films:
        found = probe(tmp_path / film.file)
        assert np.abs(found.times - film.times).max() <= 0.0006
        window = select_frames(found, 0.0, 2.0, 16.0)
        assert len(window.ticks) == 32
        (decoded,) = decode(tmp_path / film.file, [window], (64, 64))
        assert np.array_equal(decoded, film.draw()[:32])


def test_goes_on_where_it_stopped(tmp_path: Path) -> None:
    told: list[str] = []
    make_combinations(tmp_path, films=3)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    lost = plan_combinations(films=3)[1].file
    (tmp_path / lost).unlink()
    make_combinations(tmp_path, films=3, progress=lambda done, total, file: told.append(f"{done}/{total} {file}"))
    assert told == [f"3/3 {lost}"]
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    make_combinations(tmp_path, films=2)
    assert len(list(tmp_path.glob("*.mkv"))) == 2


def test_a_table_that_is_another_is_refused(tmp_path: Path) -> None:
    table = tmp_path / "captions.csv"
    table.write_text("file,caption\na.mkv,a red ring\n")
    with pytest.raises(ValueError, match=r"captions\.csv was not written by make_combinations"):
        read_combinations(table)
