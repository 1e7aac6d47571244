"""How dark and how still good films are: luma and its change, beside the thresholds of the content gates.

    python -m tests.bench.thresholds FILM_OR_FOLDER... [--json]

Frames are those that the recipe `demo` keeps. For every film: the darkest frame, the stillest step, low percentiles,
and the shares below BLACK and STILL (pipeline/stages/content.py), which are `black_frames` and `static_frames`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pipeline.media.decode import decode, probe, select_frames
from pipeline.media.faults import DecodeError
from pipeline.recipes import demo
from pipeline.sources.folders import films_in
from pipeline.stages.content import BLACK, STILL, luma_and_change


def measure(film: Path) -> dict[str, float]:
    """Figures of one film, all of its frames that a recipe of its rate and size keeps. Raises DecodeError."""
    recipe = demo()
    found = probe(film)
    window = select_frames(found, 0.0, found.seconds + 1.0, recipe.rate)
    luma, change = luma_and_change(next(decode(film, [window], recipe.size)))
    return {
        "frames": len(luma),
        "darkest": float(luma.min()),
        "dark_1_percent": float(np.percentile(luma, 1)),
        "luma_median": float(np.median(luma)),
        "black_share": float((luma < BLACK).mean()),
        "stillest": float(change.min()),
        "still_1_percent": float(np.percentile(change, 1)),
        "still_10_percent": float(np.percentile(change, 10)),
        "change_median": float(np.median(change)),
        "static_share": float((change < STILL).mean()),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints a row for each film."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.thresholds", description=__doc__.partition("\n")[0])
    parser.add_argument("films", nargs="+", metavar="FILM_OR_FOLDER")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    rows = []
    for film in films_in(options.films):
        try:
            rows.append({"film": film.name, **measure(film)})
        except DecodeError as error:
            print(f"{film.name}: {error}", file=sys.stderr)
    if options.json:
        print(json.dumps(rows))
    elif rows:
        print(" | ".join(rows[0]))
        for row in rows:
            print(" | ".join(f"{value:.3g}" if isinstance(value, float) else str(value) for value in row.values()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
