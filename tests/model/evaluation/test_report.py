"""The part of the report that shows how well a dataset's clips were made."""

from __future__ import annotations

import math
import re
from typing import Any

from model.evaluation.report import _certificates, certificates
from storage.schema import CERTIFICATE

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
