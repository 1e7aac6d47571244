"""Tables with damage: a bad row fails alone, with its place; a table that cannot be read is refused in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.sources.tables import Row, SourceError, Table, read_table


def read(path: Path, content: str | bytes, **how: bool) -> Table:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_table(path, **how)


def captions(table: Table) -> list[tuple[str, str]]:
    return [(row.file, row.caption) for row in table.rows]


def test_bad_rows_of_a_csv(tmp_path: Path) -> None:
    """Line numbers are those of an editor; behind a bad row the table goes on."""
    lines = [
        b"file,caption",
        b"a.mp4,A",
        b"",
        b"b.mp4,a bee, flying",
        b"c.mp4",
        b"d.mp4,caf\xe9",
        b"e.mp4," + b"x" * 200_000,
        b'f.mp4,"two',
        b'lines"',
        b'g.mp4,"he said "no" twice"',
        b"n\0.mp4,N",
        b",nobody",
        b",",
        'h.mp4,"one, with\u2028a separator"'.encode(),
        b"i.mp4,no\0thing",
        b'j.mp4,"never closed',
        b"k.mp4,K",
    ]
    table = read(tmp_path / "t.csv", b"\r\n".join(lines))
    assert captions(table) == [
        *[("a.mp4", "A"), ("f.mp4", "two lines"), ("h.mp4", "one, with a separator")],
        *[("i.mp4", "no\0thing"), ("k.mp4", "K")],
    ]
    assert table.rows[3].fault is not None
    assert table.rows[3].fault[0] == "bad_caption"
    places = {bad.name: bad.detail for bad in table.bad}
    assert [name.removeprefix("t.csv, line ") for name in places] == ["4", "5", "6", "7", "10", "11", "12", "16"]
    assert "3 fields, the header has 2; quote a caption that has commas" in places["t.csv, line 4"]
    assert "1 fields, the header has 2" in places["t.csv, line 5"]
    assert "not UTF-8; save the table" in places["t.csv, line 6"]
    assert "field larger than field limit" in places["t.csv, line 7"]
    assert "double the quotes" in places["t.csv, line 10"]
    assert "a NUL" in places["t.csv, line 11"]
    assert "file is empty" in places["t.csv, line 12"]
    assert "not closed; quote the caption" in places["t.csv, line 16"]
    assert all(detail.isprintable() for detail in places.values())


def test_bad_rows_of_json_lines(tmp_path: Path) -> None:
    lines = [
        '{"file": "a.mp4", "caption": "one\u2028line\u0085still"}',
        "",
        '{"file": "b.mp4", "caption": ',
        "[" * 100_000,
        '{"file": "c.mp4", "caption": "\\ud800"}',
        '["d.mp4", "D"]',
        '{"caption": "nobody"}',
        '{"file": {"name": "e.mp4"}, "caption": "E"}',
        '{"file": "f.mp4", "caption": "F", "start": 1' + "0" * 400 + "}",
        '{"file": "g.mp4", "caption": ' + "9" * 5000 + "}",
        '{"file": "h\\u0000.mp4", "caption": "H"}',
        '{"file": "i.mp4", "caption": "I"}',
    ]
    table = read(tmp_path / "t.jsonl", "\ufeff" + "\n".join(lines))
    assert captions(table) == [("a.mp4", "one line still"), ("c.mp4", "\ud800"), ("f.mp4", "F"), ("i.mp4", "I")]
    assert [row.fault and row.fault[0] for row in table.rows] == [None, "bad_caption", "bad_times", None]
    assert all(row.fault is None or row.fault[1].isprintable() for row in table.rows)
    assert [bad.name.removeprefix("t.jsonl, line ") for bad in table.bad] == ["3", "4", "6", "7", "8", "10", "11"]
    assert "Expecting value at character 31" in table.bad[0].detail
    assert "nested too deeply" in table.bad[1].detail


def test_a_damaged_part_of_a_parquet_table(tmp_path: Path) -> None:
    """Its rows fail together, by their numbers; the other row groups are read."""
    path = tmp_path / "t.parquet"
    words = pa.table({"file": [f"{n}.mp4" for n in range(6)], "caption": [f"caption number {n}" for n in range(6)]})
    how = {"row_group_size": 2, "compression": "NONE", "write_page_checksum": True, "write_statistics": False}
    pq.write_table(words, path, use_dictionary=False, **how)
    data = bytearray(path.read_bytes())
    data[data.index(b"caption number 2") + 8] ^= 0xFF
    table = read(path, bytes(data))
    assert [row.file for row in table.rows] == ["0.mp4", "1.mp4", "4.mp4", "5.mp4"]
    assert [bad.name for bad in table.bad] == ["t.parquet, rows 3-4"]
    assert "write the table again" in table.bad[0].detail
    odd = pa.table({"file": ["a.mp4", "b.mp4"], "caption": pa.array([b"A", b"caf\xe9"])})
    pq.write_table(odd.set_column(1, "caption", odd["caption"].cast(pa.string(), safe=False)), path)
    table = read_table(path)
    assert captions(table) == [("a.mp4", "A")]
    assert [bad.name for bad in table.bad] == ["t.parquet, row 2"]


@pytest.mark.parametrize(
    "content", ["file, caption\na.mp4, A\n", "\ufeffFILE,Caption \r\na.mp4,A\r\n", "caption,file\rA,a.mp4"]
)
def test_headers_may_differ_in_case_and_spaces(tmp_path: Path, content: str) -> None:
    assert captions(read(tmp_path / "t.csv", content)) == [("a.mp4", "A")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", "file,text\na.mp4,A\n", "t.csv needs the columns file,caption; it has: file, text"),
        ("t.jsonl", '{"file": "a.mp4"}\n', "t.jsonl needs the columns file,caption; it has: file"),
        ("t.csv", "file;caption\na.mp4;A\n", "needs the columns file,caption; it has: file;caption"),
        ("t.csv", "file,caption,caption\na.mp4,A,B\n", "has the column caption 2 times; keep one"),
        ("t.csv", "File,FILE,caption\na.mp4,b.mp4,B\n", "has the column file 2 times; keep one"),
        ("t.csv", "", "t.csv is empty; write a row for each film"),
        ("t.csv", "file,caption\n", "t.csv is empty; write a row for each film"),
        ("t.jsonl", "\n\n", "t.jsonl is empty"),
        ("t.csv", "file,caption\na.mp4,A\n".encode("utf-16"), "t.csv is UTF-16; save it as UTF-8"),
        ("t.csv", "file,caption\na.mp4,A\n".encode("utf-16-le"), "t.csv is UTF-16; save it as UTF-8"),
        ("t.jsonl", "\n{\n", "t.jsonl cannot be read as .jsonl, line 2: Expecting"),
        ("t.txt", "file,caption\na.mp4,A\n", "t.txt is no table by its name; name it .csv or .jsonl"),
        ("t.parquet", "file,caption\n", "t.parquet is no Parquet file"),
    ],
)
def test_tables_that_cannot_be_read(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    with pytest.raises(SourceError, match=message) as caught:
        read(tmp_path / name, content)
    assert str(caught.value).isprintable()


def test_a_column_for_captions_may_be_missing_where_none_is_required(tmp_path: Path) -> None:
    assert captions(read(tmp_path / "t.csv", "file\na.mp4\n", captions_required=False)) == [("a.mp4", "")]


def test_a_parquet_table_with_a_column_twice(tmp_path: Path) -> None:
    table = pa.Table.from_arrays(
        [pa.array(["a.mp4"]), pa.array(["A"]), pa.array(["B"])], ["file", "caption", "caption"]
    )
    pq.write_table(table, tmp_path / "t.parquet")
    with pytest.raises(SourceError, match="has the column caption 2 times"):
        read_table(tmp_path / "t.parquet")


times = st.floats(0, 1e9, allow_nan=False)


@given(times, times)
def test_parts_with_different_times_have_different_names(one: float, other: float) -> None:
    names = {Row("f.mp4", "", start).film for start in (one, other)}
    assert len(names) == len({one, other})


def test_names_of_parts() -> None:
    assert Row("f.mp4", "", 1000000.0, 1000001.0).film == "f.mp4#1e+06-1000001"
    assert Row("f.mp4", "", 2.0, 4.5).film == "f.mp4#2-4.5", "as in lakes that there are"
    assert Row("f.mp4", "", 0.1 + 0.2).film == "f.mp4#0.30000000000000004-"
    assert Row("f.mp4", "", 1234567.0, 1234568.0).film != Row("f.mp4", "", 1234566.9, 1234568.1).film
    assert Row("f#1-2", "").film != Row("f", "", 1.0, 2.0).film, "a file may be named as a part is"


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=30), min_size=1))
def test_any_caption_survives_json_lines(tmp_path_factory: pytest.TempPathFactory, said: list[str]) -> None:
    path = tmp_path_factory.mktemp("any") / "t.jsonl"
    rows = [{"file": f"{number}.mp4", "caption": caption} for number, caption in enumerate(said)]
    table = read(path, "\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    assert [row.caption for row in table.rows] == [" ".join(caption.split()) for caption in said]
