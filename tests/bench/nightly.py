"""A lake that gets one film a night: what each night writes, and what `gc` leaves of it.

    python -m tests.bench.nightly [--nights 50] [--json]

Films are made up (tests/storage/film_lake.py), stores and protocol are the real ones. Bytes of a night are those of all
files that it leaves behind: shard, tables, version file, and the parts of the arrays that it wrote. Beside them stands
the baseline, a lake that got all films at once.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from storage.garbage import collect, lake_bytes
from storage.layout import Lake
from storage.verify import verify
from storage.version import load
from tests.storage.film_lake import Film, publish


def measure(folder: Path, nights: int) -> dict[str, object]:
    """Bytes of every night, of the lake before and after `gc --keep 1`, and of a fresh lake."""
    films = [Film(f"film-{night:03}.mp4", f"content {night}", f"caption {night}", 2) for night in range(nights)]
    lake, written, arrays = Lake.create(folder / "nightly"), [], []
    before = before_arrays = 0
    for night in range(nights):
        publish(lake, films[: night + 1])
        now, in_arrays = lake_bytes(lake), sum(lake.store.sizes("arrays/").values())
        written.append(now - before)
        arrays.append(in_arrays - before_arrays)
        before, before_arrays = now, in_arrays
    with lake.writing():
        collect(lake, keep=1)
    fresh = Lake.create(folder / "fresh")
    publish(fresh, films)
    assert verify(lake, load(lake)) == []
    tenth = max(1, nights // 10)
    first, last = sum(written[tenth : 2 * tenth]) / tenth, sum(written[-tenth:]) / tenth
    return {
        "nights": nights, "written": written, "of_them_arrays": arrays, "last_to_first": last / first,
        "before_gc": before, "after_gc": lake_bytes(lake), "fresh": lake_bytes(fresh),
        "after_gc_to_fresh": lake_bytes(lake) / lake_bytes(fresh), "before_gc_to_fresh": before / lake_bytes(fresh),
    }  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Print the figures; status 1 where a lake after `gc` is over 1.2 times a fresh one."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.nightly", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--nights", type=int, default=50)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), options.nights)
    if options.json:
        print(json.dumps(found))
    else:
        written, arrays = found["written"], found["of_them_arrays"]
        assert isinstance(written, list)
        assert isinstance(arrays, list)
        for night in range(0, options.nights, max(1, options.nights // 10)):
            print(
                f"night {night + 1:3}: {written[night] / 1e3:8.1f} kB, {arrays[night] / 1e3:8.1f} of them in the arrays"
            )
        print(f"the last tenth of the nights writes {found['last_to_first']:.2f} times what the second tenth does")
        print(
            f"before gc {found['before_gc_to_fresh']:.2f} times a fresh lake, after gc "
            f"{found['after_gc_to_fresh']:.3f} times (goal 1.2)"
        )
    return int(float(str(found["after_gc_to_fresh"])) > 1.2)


if __name__ == "__main__":
    sys.exit(main())
