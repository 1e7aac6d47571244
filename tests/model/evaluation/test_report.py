"""The report: its page, read as a browser would, and the part on how well a dataset's clips were made."""

from __future__ import annotations

import html
import math
import re
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image

from model.evaluation.generation import SEEDS
from model.evaluation.report import _certificates, certificates
from storage.schema import CERTIFICATE
from tests.model.evaluated import CAPTION, Made, Page
from tests.model.tiny_lake import DURATION, SIDE

ROWS: list[dict[str, Any]] = [
    {
        **dict.fromkeys((measure.name for measure in CERTIFICATE), math.nan),
        **{"psnr_codec": 20.0 + number, "end_ratio": 1.0 + number, "flags": "end_ratio" if number == 4 else ""},
    }
    for number in range(5)
]


def test_the_spread_of_each_figure_that_was_measured() -> None:
    found = certificates(ROWS, bins=4)
    assert found["flagged"] == 1
    assert set(found["figures"]) == {"psnr_codec", "end_ratio"}
    psnr = found["figures"]["psnr_codec"]
    assert psnr == {
        **{"clips": 5, "worst": 20.0, "median": 22.0, "best": 24.0},
        **{"low": 20.0, "high": 24.0, "counts": [1, 1, 1, 2]},
    }
    assert (found["figures"]["end_ratio"]["worst"], found["figures"]["end_ratio"]["best"]) == (5.0, 1.0)


def test_the_table_of_the_report() -> None:
    page = _certificates({"certificates": certificates(ROWS)})
    cells = re.findall(r"<td>(.*?)</td>", page)
    assert cells[:5] == ["psnr_codec", "5", "20 dB", "22 dB", "24 dB"]
    assert "aria-label='5 clips from 20 to 24'" in cells[5]
    heights = [float(height) for height in re.findall(r"height=([0-9.]+) />", cells[5])]
    assert sorted(set(heights)) == [0.0, 24.0], "a bar for each of the five values"
    assert "1 clips are outside the recipe's gates" in page
    assert "No figure was measured" in _certificates({"certificates": certificates([])})


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
