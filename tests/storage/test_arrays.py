from __future__ import annotations

import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from storage import arrays
from storage.arrays import Texts, append_clips, count_rows, read_clips, read_texts, text_rows
from storage.layout import DiskFull, Lake, LakeError
from storage.repository import collect_garbage, open_repository
from storage.version import load


@pytest.fixture
def three(sample_lake: ModuleType) -> list[dict[str, Any]]:
    return [sample_lake.clip(number) for number in range(3)]


@pytest.fixture
def captions(sample_lake: ModuleType) -> Texts:
    return sample_lake.texts(["", "caption 0", "caption 1", "caption 2"])


def test_rows_come_back(lake: Lake, sample_lake: ModuleType, three: list[dict[str, Any]], captions: Texts) -> None:
    snapshot, first = append_clips(lake, "group", sample_lake.columns(three), captions)
    assert first == 0
    found = read_clips(lake, snapshot, "group")
    given = sample_lake.columns(three)
    assert found.keys() == (given.keys() - {"preview", "caption_id"}) | {"text_row"}
    for name in found.keys() - {"text_row"}:
        np.testing.assert_array_equal(found[name], given[name])
    assert found["text_row"].tolist() == [1, 2, 3]
    assert {name: array.dtype.str for name, array in found.items()} == {
        "clip_id": "<U16", "coefficients": "<f2", "latents": "<f2", "frame_time": "<f8", "observed": "|b1",
        "clip_start": "<f8", "duration": "<f8", "order_used": "<i4", "preview_row": "<i4", "text_row": "<i4",
    }  # fmt: skip


def test_rows_are_picked_in_any_order(
    lake: Lake, sample_lake: ModuleType, three: list[dict[str, Any]], captions: Texts
) -> None:
    snapshot, _ = append_clips(lake, "group", sample_lake.columns(three), captions)
    for rows in ([2, 0], [1], [1, 1], [], slice(1, 3), np.array([0, 2])):
        found = read_clips(lake, snapshot, "group", rows, ["clip_id", "coefficients"])
        expected = np.stack([entry["coefficients"] for entry in three])[
            rows if len(np.shape(rows)) == 0 else list(rows)
        ]
        np.testing.assert_array_equal(found["coefficients"], expected.reshape(-1, *three[0]["coefficients"].shape))
    for wrong in ([3], [-1]):
        with pytest.raises(IndexError, match="there are 3"):
            read_clips(lake, snapshot, "group", wrong, ["coefficients"])


def test_previews_are_sparse(lake: Lake, sample_lake: ModuleType, captions: Texts) -> None:
    snapshot = None
    for numbers in (range(0, 1), range(1, 4), range(4, 7)):
        entries = [sample_lake.clip(number) for number in numbers]
        snapshot, first = append_clips(lake, "group", sample_lake.columns(entries), captions, parent=snapshot)
        assert first == numbers.start
    assert snapshot is not None
    assert read_clips(lake, snapshot, "group")["preview_row"].tolist() == [-1, 0, -1, 1, -1, 2, -1]
    found = read_clips(lake, snapshot, "group", [5, 4, 1], ["preview"])
    assert found["preview_row"].tolist() == [0, -1, 1]
    np.testing.assert_array_equal(found["preview"][0], sample_lake.clip(5)["preview"])
    np.testing.assert_array_equal(found["preview"][1], sample_lake.clip(1)["preview"])


def test_appends_across_zarr_shards(
    lake: Lake, sample_lake: ModuleType, captions: Texts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Appends that start and end within a Zarr shard neither lose nor move a row."""
    monkeypatch.setattr(arrays, "CLIPS_PER_SHARD", 3)
    monkeypatch.setattr(arrays, "_SMALL_ROW", 1)
    snapshot, start = None, 0
    for count in (1, 4, 2, 5):
        entries = [sample_lake.clip(number) for number in range(start, start + count)]
        snapshot, first = append_clips(lake, "group", sample_lake.columns(entries), captions, parent=snapshot)
        assert first == start
        start += count
    assert snapshot is not None
    found = read_clips(lake, snapshot, "group", None, ["coefficients", "clip_id"])
    np.testing.assert_array_equal(
        found["coefficients"], np.stack([sample_lake.clip(number)["coefficients"] for number in range(start)])
    )


def test_texts_are_kept_once(lake: Lake, sample_lake: ModuleType, three: list[dict[str, Any]]) -> None:
    one, two = sample_lake.texts(["", "caption 0"]), sample_lake.texts(["caption 2", "caption 0", "caption 1"])
    first, _ = append_clips(lake, "group", sample_lake.columns(three[:1]), one)
    second, _ = append_clips(lake, "group", sample_lake.columns(three[1:]), two, parent=first)
    rows = text_rows(lake, second, "group")
    assert rows == {sample_lake.identity(text): n for n, text in enumerate(["", "caption 0", "caption 2", "caption 1"])}
    assert text_rows(lake, first, "group") == dict(list(rows.items())[:2])
    assert read_clips(lake, second, "group", None, ["text_row"])["text_row"].tolist() == [1, 3, 2]
    texts = read_texts(lake, second, "group", [3])
    embedding, length = sample_lake.text("caption 1")
    assert list(texts.caption_ids) == [sample_lake.identity("caption 1")]
    assert texts.lengths.tolist() == [length]
    np.testing.assert_array_equal(texts.embeddings[0], embedding)


def test_a_snapshot_sees_its_own_rows_only(published: Lake, sample_lake: ModuleType) -> None:
    first = load(published, 1)
    before = read_clips(published, first.snapshot, first.group)
    second = sample_lake.publish_clips(published, range(6, 9))
    assert count_rows(published, first.snapshot, first.group) == 6
    assert count_rows(published, second.snapshot, second.group) == 9
    again = read_clips(published, first.snapshot, first.group)
    assert before.keys() == again.keys()
    for name, array in before.items():
        np.testing.assert_array_equal(again[name], array)
    with pytest.raises(IndexError, match="there are 6"):
        read_clips(published, first.snapshot, first.group, [6])


def test_an_append_without_a_version_is_dropped_by_the_next(
    published: Lake, sample_lake: ModuleType, captions: Texts
) -> None:
    version = load(published, 1)
    lost = sample_lake.columns([sample_lake.clip(50), sample_lake.clip(51)])
    orphan, first = append_clips(published, version.group, lost, captions)
    assert (first, count_rows(published, orphan, version.group)) == (6, 8)
    assert count_rows(published, version.snapshot, version.group) == 6
    # The run died here. The next one starts from version 1, the same clips included.
    snapshot, first = append_clips(published, version.group, lost, captions)
    assert (first, count_rows(published, snapshot, version.group)) == (6, 8)
    history = [entry.id for entry in open_repository(published).ancestry(branch="main")]
    assert orphan not in history
    assert history[:2] == [snapshot, version.snapshot]


def test_an_append_before_the_first_version_is_dropped_too(
    lake: Lake, sample_lake: ModuleType, three: list[dict[str, Any]], captions: Texts
) -> None:
    append_clips(lake, "group", sample_lake.columns(three), captions)
    snapshot, first = append_clips(lake, "group", sample_lake.columns(three), captions)
    assert (first, count_rows(lake, snapshot, "group")) == (0, 3)


def test_two_recipes_live_side_by_side(lake: Lake, sample_lake: ModuleType, captions: Texts) -> None:
    entries = [sample_lake.clip(number) for number in range(3)]
    first, _ = append_clips(lake, "one", sample_lake.columns(entries), captions)
    columns = {**sample_lake.columns(entries[:2]), "coefficients": np.ones((2, 5), np.float16)}
    second, row = append_clips(lake, "two", columns, captions, parent=first)
    assert row == 0
    assert count_rows(lake, second, "one") == 3
    assert read_clips(lake, second, "two", None, ["coefficients"])["coefficients"].shape == (2, 5)


def test_garbage_is_collected_and_versions_stay(published: Lake, sample_lake: ModuleType, captions: Texts) -> None:
    version = load(published, 1)
    before = read_clips(published, version.snapshot, version.group)
    append_clips(published, version.group, sample_lake.columns([sample_lake.clip(50)]), captions)
    files = sum(path.is_file() for path in published.arrays.rglob("*"))
    assert collect_garbage(published) > 0
    assert sum(path.is_file() for path in published.arrays.rglob("*")) < files
    after = read_clips(published, version.snapshot, version.group)
    for name, array in before.items():
        np.testing.assert_array_equal(after[name], array)


def without(name: str) -> Any:
    return lambda columns: {key: value for key, value in columns.items() if key != name}


def with_value(name: str, value: Any) -> Any:
    return lambda columns: {**columns, name: value(columns[name]) if callable(value) else value}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("coefficients"), "lack coefficients"),
        (without("preview"), "preview and preview_row go together"),
        (with_value("coefficients", lambda a: a.astype(np.float32)), "has type float32, it is stored as float16"),
        (with_value("coefficients", lambda a: a[:2]), "coefficients has 2 rows, there are 3"),
        (with_value("coefficients", lambda a: a * np.float16(np.inf)), "clip .*: coefficients hold NaN or infinity"),
        (with_value("clip_id", ["short"] * 3), "'short' is not a text of 16 digits"),
        (with_value("clip_id", ["0" * 16] * 3), "a clip id occurs twice"),
        (with_value("caption_id", ["f" * 16] * 3), "caption ffffffffffffffff has no text"),
        (with_value("preview_row", np.array([0, 0, -1], np.int32)), "must name each of the 1 previews once"),
        (lambda columns: {name: value[:0] for name, value in columns.items()}, "no clips to append"),
    ],
)
def test_clips_that_do_not_fit_are_refused(
    lake: Lake, sample_lake: ModuleType, three: list[dict[str, Any]], captions: Texts, change: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        append_clips(lake, "group", change(sample_lake.columns(three)), captions)


def test_later_clips_must_be_like_the_groups(
    lake: Lake, sample_lake: ModuleType, three: list[dict[str, Any]], captions: Texts
) -> None:
    snapshot, _ = append_clips(lake, "group", sample_lake.columns(three), captions)
    again = sample_lake.columns([sample_lake.clip(7), three[0]])
    with pytest.raises(ValueError, match=f"clip {three[0]['clip_id']} is in the group already"):
        append_clips(lake, "group", again, captions, parent=snapshot)
    new = sample_lake.columns([sample_lake.clip(7)])
    with pytest.raises(ValueError, match=r"coefficients is float16 \(8, 3, 4, 4\) in the group"):
        append_clips(lake, "group", {**new, "coefficients": np.ones((1, 2), np.float16)}, parent=snapshot)
    with pytest.raises(ValueError, match="the group has arrays"):
        append_clips(lake, "group", without("latents")(new), parent=snapshot)
    # None of that left a trace.
    assert open_repository(lake).lookup_branch("main") == snapshot
    assert append_clips(lake, "group", new, parent=snapshot)[1] == 3


def test_what_is_not_there_is_named(published: Lake) -> None:
    version = load(published, 1)
    with pytest.raises(LakeError, match="has no snapshot 1CECHNKREP0F1RSTCMTX"):
        read_clips(published, "1CECHNKREP0F1RSTCMTX", version.group)
    with pytest.raises(LakeError, match=f"no group other; there are: {version.group}"):
        read_clips(published, version.snapshot, "other")
    with pytest.raises(LakeError, match="no array 'pooled'; there are: clip_id"):
        read_clips(published, version.snapshot, version.group, names=["pooled"])
    shutil.rmtree(published.arrays)
    with pytest.raises(LakeError, match="arrays is missing; restore the lake from a copy"):
        read_clips(published, version.snapshot, version.group)


def test_icechunks_warnings_do_not_reach_the_user(
    lake: Lake, sample_lake: ModuleType, three: list[dict[str, Any]], captions: Texts, capfd: pytest.CaptureFixture[str]
) -> None:
    append_clips(lake, "group", sample_lake.columns(three), captions)
    assert capfd.readouterr() == ("", "")


def test_a_full_disk_leaves_the_lake_as_it_was(small_disk: Path, sample_lake: ModuleType) -> None:
    lake = Lake.create(small_disk / "lake")
    version = sample_lake.publish_clips(lake, range(3))
    files = {path for path in lake.root.rglob("*") if path.is_file()}
    entries = [sample_lake.clip(number) for number in range(10, 13)]
    big = {**sample_lake.columns(entries), "coefficients": np.ones((3, 8, 3, 4, 4), np.float16)}
    big = {**big, "preview": np.zeros((1, 6, 2, 2, 3), np.uint8), "preview_row": np.array([0, -1, -1], np.int32)}
    texts = Texts(["0" * 16, *big["caption_id"]], np.ones((4, 200, 1000), np.float16), np.array([1] * 4))
    with pytest.raises(DiskFull, match=r"bytes free.*what is done is kept") as caught:
        append_clips(lake, "other", big, texts)
    assert caught.value.filename == str(lake.arrays)
    left = {path for path in lake.root.rglob("*") if path.is_file()} - files
    assert not [path for path in left if "chunks" in path.parts], "chunks of the failed append stay on the full disk"
    assert count_rows(lake, version.snapshot, version.group) == 3
    assert sample_lake.publish_clips(lake, range(3, 5)).number == 2
