"""Artifacts as plain text and tables; the contact sheet is looked at in test_dataset, where there is a lake."""

from __future__ import annotations

import re

from flows.artifacts import accounts_table, artifact_key, data_address, markdown_table, summary
from pipeline.ingest.report import Account, IngestReport
from pipeline.items import Failure
from pipeline.recipes import linear


def report(**changes: object) -> IngestReport:
    failure = Failure("a|b.mp4", "plan", "empty_file", "the file has no bytes;\ncopy it <again>")
    values: dict[str, object] = {
        "run_id": "20260101T000000Z-abcdef",
        "lake": "some/lake",
        "version": 4,
        "published": True,
        "films": Account("films", 5, 2, 1, {"shorter_than_window": 1}, {"empty_file": 1}),
        "clips": Account("clips", 9, 5, 2, {"too_few_frames": 1}, {"corrupt": 1}),
        "failures": [failure],
        "superseded": 0,
        "bytes": 2_500_000,
        "certificate": {"psnr_codec": {"clips": 7, "worst": 30.5, "median": 41.234, "best": 50.0}},
        "seconds": {"plan": 1.25, "decode": 10.0},
        "tolerate": 0.05,
        "faulty_films": 1,
    }
    return IngestReport(**(values | changes))  # type: ignore[arg-type]


def test_the_accounts_add_up_in_the_table() -> None:
    rows = accounts_table(report())
    for of, discovered in (("films", 5), ("clips", 9)):
        numbers = {(row["status"], row["reason"]): row["number"] for row in rows if row["of"] == of}
        assert numbers.pop(("discovered", "")) == discovered == sum(numbers.values())
    assert {"of": "clips", "status": "failed", "reason": "corrupt", "number": 1} in rows
    assert {"of": "films", "status": "unchanged", "reason": "", "number": 1} in rows


def test_the_summary_says_outcome_recipe_accounts_and_failures() -> None:
    text = summary(report(), linear(), "holiday")
    assert "**Version 4** was published (2.5 MB of shards)" in text
    assert "More films failed than the recipe tolerates (5%)" in text
    assert "films: 5 discovered = 2 done + 1 unchanged + 1 filtered (shorter_than_window 1) + 1 failed" in text
    assert '| codec | {"kind": "linear", "factor": 4' in text
    assert "| psnr_codec | 7 | 30.5 | 41.23 | 50 |" in text
    assert "| decode | 10.0 |" in text
    assert r"| a\|b.mp4 | plan | failed | empty_file | the file has no bytes; copy it &lt;again> |" in text
    assert "`some/lake/failures/20260101T000000Z-abcdef.parquet`" in text


def test_the_summary_of_a_run_without_news_or_without_anything() -> None:
    nothing_new = report(
        published=False,
        films=Account("films", 1, 0, 1, {}, {}),
        clips=Account("clips", 2, 0, 2, {}, {}),
        failures=[],
        faulty_films=0,
        certificate={},
    )
    text = summary(nothing_new, linear(), "holiday")
    assert "Nothing new: version 4 is up to date." in text
    assert "could not be used" not in text
    nothing = report(published=False, version=None, clips=Account("clips", 0, 0, 0, {}, {}))
    assert "**Nothing was published**" in summary(nothing, linear(), "holiday")


def test_the_summary_leads_with_what_a_person_wants() -> None:
    text = summary(report(superseded=3), linear(), "holiday")
    order = ["**Version 4**", "**5 new clips** of 2 films", "could not be used", "Certificate", "Accounts", "Recipe"]
    places = [text.index(words) for words in order]
    assert places == sorted(places)
    assert "3 clips of films that changed or are gone left" in text


def test_each_lake_has_its_own_keys() -> None:
    keys = [artifact_key("ingest", lake, "summary") for lake in ("a/Lake 1", "b/Lake 1", "s3://bucket/Ünder_line/")]
    assert len(set(keys)) == 3
    assert all(re.fullmatch(r"ingest-[a-z0-9-]+-[0-9a-f]{6}-summary", key) for key in keys)


def test_long_failure_lists_are_cut_and_say_where_the_rest_is() -> None:
    many = report(failures=list(report().failures) * 80)
    text = summary(many, linear(), "holiday")
    assert text.count("empty_file |") == 50
    assert "All 80 are in" in text


def test_markdown_and_addresses() -> None:
    assert markdown_table([{"a": 1, "b": "x"}], ("b", "a")) == "| b | a |\n| --- | --- |\n| x | 1 |"
    assert data_address(b"\x89PNG") == "data:image/png;base64,iVBORw=="
