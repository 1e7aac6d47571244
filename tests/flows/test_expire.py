"""A refresh that keeps only so many versions: what stays is whole. No server is needed for it."""

from __future__ import annotations

from pathlib import Path

from storage.layout import Lake
from storage.verify import verify
from storage.version import list_versions, load
from tests.storage.film_lake import Film, publish


def test_a_refresh_keeps_the_newest_versions_alone(tmp_path: Path) -> None:
    """`keep_versions`: what stays is whole, and what the versions that went alone needed is gone."""
    from prefect.logging import disable_run_logger

    from flows.dataset import _expire

    films = [Film(f"film-{number}.mp4", f"content {number}", f"caption {number}", 2) for number in range(4)]
    lake = Lake.create(tmp_path / "lake")
    for count in range(1, 5):
        publish(lake, films[:count])
    before = {number: load(lake, number).merkle_root for number in (3, 4)}
    with disable_run_logger():
        _expire(str(tmp_path / "lake"), 2)
        assert list_versions(lake) == [3, 4]
        _expire(str(tmp_path / "lake"), 2)  # again: nothing to do
    assert {number: load(lake, number).merkle_root for number in list_versions(lake)} == before
    assert [verify(lake, load(lake, number)) for number in (3, 4)] == [[], []]
