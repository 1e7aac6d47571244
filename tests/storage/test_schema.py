from __future__ import annotations

from types import ModuleType

import pyarrow as pa
import pytest

from storage.schema import CLIP_SCHEMA, FAILURE_SCHEMA, FILM_SCHEMA, FORMAT, check_format, table_of


@pytest.mark.parametrize("schema", [CLIP_SCHEMA, FILM_SCHEMA, FAILURE_SCHEMA])
def test_every_column_is_explained_and_the_format_has_a_number(schema: pa.Schema) -> None:
    assert schema.metadata[b"vlfm.format"] == str(FORMAT).encode()
    assert all(field.metadata[b"doc"] and not field.nullable for field in schema)


def test_rows_and_tables_become_the_schemas_table(sample_lake: ModuleType) -> None:
    row = sample_lake.film_row(3)
    table = table_of([row], FILM_SCHEMA)
    assert table.schema.equals(FILM_SCHEMA, check_metadata=True)
    turned = table_of(table.select(list(reversed(table.column_names))), FILM_SCHEMA)
    assert turned.to_pylist() == [row]
    assert table_of([], FILM_SCHEMA).num_rows == 0


def test_what_does_not_fit_is_named(sample_lake: ModuleType) -> None:
    row = sample_lake.film_row(3)
    with pytest.raises(ValueError, match=r"missing columns \['clips'\], unknown columns \['clip'\]"):
        table_of([{**{key: value for key, value in row.items() if key != "clips"}, "clip": 3}], FILM_SCHEMA)
    with pytest.raises(ValueError, match="column 'width' takes int32, it was given 'wide'"):
        table_of([row, {**row, "width": "wide"}], FILM_SCHEMA)
    with pytest.raises(ValueError, match="column 'caption' holds a null"):
        table_of([{**row, "caption": None}], FILM_SCHEMA)


def test_a_newer_format_and_another_table_are_refused() -> None:
    newer = FILM_SCHEMA.with_metadata({**FILM_SCHEMA.metadata, b"vlfm.format": b"99"})
    with pytest.raises(ValueError, match="format 99, this program reads up to"):
        check_format(newer, "films", "a.parquet")
    with pytest.raises(ValueError, match=r"a.parquet holds films, not the table of clips"):
        check_format(FILM_SCHEMA, "clips", "a.parquet")
    with pytest.raises(ValueError, match="nothing we wrote"):
        check_format(pa.schema([]), "clips", "a.parquet")
