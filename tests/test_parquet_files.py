"""Catalogues of all encodings and types are carried as they are; a damaged one is refused in one line."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from unet_ray.frames import list_archives

TABLE = pa.table(
    {
        "uri": [f"drive/{index}.png" for index in range(300)],
        "frame_id": pa.array([f"id {index}" for index in range(300)]).cast(pa.large_string()),
        "weather": pa.array(["rain", "sun", None] * 100).dictionary_encode(),
        "tags": [["night", None], [], None] * 100,
        "speed": [{"kmh": 3.5, "of": "car"}, None, {"kmh": None, "of": "van"}] * 100,
        "counts": pa.array([[("car", 3)], [("van", 1), ("bus", 2)], []] * 100, pa.map_(pa.string(), pa.int64())),
        "box": pa.array([[1, 2]] * 300, pa.list_(pa.int32(), 2)),
        "blob": pa.array([b"12345678"] * 300, pa.binary(8)),
        "view": pa.array(["a text that is longer than twelve", "b", None] * 100, pa.string_view()),
        "night": [True, False, None] * 100,
    }
)
TEXTS = ["uri", "frame_id", "tags.list.element", "speed.of", "counts.key_value.key", "view"]
ENCODINGS = {
    "dictionaries": {},
    "dictionaries that overflow": {"dictionary_pagesize_limit": 50, "data_page_size": 100},
    **{
        name: {"use_dictionary": False, "column_encoding": dict.fromkeys(TEXTS, name)}
        for name in ("PLAIN", "DELTA_BYTE_ARRAY", "DELTA_LENGTH_BYTE_ARRAY")
    },
}


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_catalogue_is_carried_whatever_its_encoding(encoding: str, tmp_path: Path) -> None:
    path = tmp_path / "catalogue.parquet"
    pq.write_table(TABLE, path, row_group_size=130, **ENCODINGS[encoding])
    listed = list_archives([str(path)]).table
    carried = TABLE.drop_columns(["uri"]).to_pylist()
    assert listed.select(TABLE.column_names[1:]).to_pylist() == carried


def test_a_catalogue_with_a_damaged_byte_is_refused_in_one_line_or_read(tmp_path: Path) -> None:
    path = tmp_path / "catalogue.parquet"
    pq.write_table(TABLE.select(["uri", "tags", "weather"]), path, compression="gzip")
    whole = path.read_bytes()
    refused = 0
    for place in range(4, len(whole) - 8, len(whole) // 60):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        try:
            list_archives([str(path)])
        except ValueError as error:
            refused += 1
            assert str(path) in str(error) and "\n" not in str(error)
    assert refused > 10
