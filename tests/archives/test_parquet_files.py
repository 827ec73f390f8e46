"""Catalogues of all encodings and types are carried as they are; a damaged one is refused in one line.

Of a damaged file of images, what can be read is.
"""

from __future__ import annotations

import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from unet_ray.archives import parquet_pages
from unet_ray.archives.listing import list_archives
from unet_ray.archives.parquet_pages import TooMuch
from unet_ray.archives.reading import FrameGone, read_frames

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
    for position in range(4, len(whole) - 8, len(whole) // 60):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0xFF]) + whole[position + 1 :])
        try:
            list_archives([str(path)])
        except ValueError as error:
            refused += 1
            assert str(path) in str(error) and "\n" not in str(error)
    assert refused > 10


def test_a_name_in_a_catalogue_has_a_bounded_length(tmp_path: Path) -> None:
    path = tmp_path / "catalogue.parquet"
    pq.write_table(pa.table({"uri": ["1.png", "a" * 5000]}), path)
    with pytest.raises(ValueError, match=r"catalogue.parquet: a uri has 5,000 bytes; at most 4,096 are read$"):
        list_archives([str(path)])


def test_a_damaged_page_costs_its_row_group_alone(tmp_path: Path) -> None:
    images = [os.urandom(3000) for _ in range(90)]
    path = tmp_path / "log.parquet"
    pq.write_table(pa.table({"image": images}), path, row_group_size=30, compression="gzip", use_dictionary=False)
    whole = bytearray(path.read_bytes())
    middle = pq.ParquetFile(path).metadata.row_group(1).column(0)
    whole[middle.data_page_offset + middle.total_compressed_size // 2] ^= 0xFF
    path.write_bytes(whole)
    contents = list(read_frames(list_archives([str(path)]).table))
    assert contents[:30] == images[:30] and contents[60:] == images[60:]
    assert {content.reason for content in contents[30:60] if isinstance(content, FrameGone)} == {"truncated"}
    assert all(isinstance(content, FrameGone) for content in contents[30:60])


PAGE = bytes.fromhex("1500 15d00f 1500 2c 1502 00 00")
"""A data page of 1,000 bytes unpacked and none packed, with one value."""


@pytest.mark.parametrize("column", [PAGE, bytes.fromhex("1504 1502 1500 2c 1502 00 00") + PAGE])
def test_a_page_counts_whatever_an_index_or_dictionary_before_it_says_of_values(column: bytes) -> None:
    with pytest.raises(TooMuch, match="its footer says 999 bytes and 1 values of a column that comes to more"):
        parquet_pages._check(column, 0, parquet_pages._Chunk(packed=len(column), unpacked=999, n_values=1))
    parquet_pages._check(column, 0, parquet_pages._Chunk(packed=len(column), unpacked=1001, n_values=1))


@pytest.mark.parametrize(
    "header", [b"\x19" * 100_000, b"\x1c" * 100_000, b"\x18\xff\xff\x03", PAGE[:-1], b"\0", b"\x1c\0\0"]
)
def test_a_page_without_a_whole_header_is_damaged(header: bytes) -> None:
    with pytest.raises(pa.ArrowInvalid, match="a page's header "):
        parquet_pages._check(header, 0, parquet_pages._Chunk(packed=len(header), unpacked=10**6, n_values=9))


def test_a_column_of_forty_megabytes_is_read(tmp_path: Path) -> None:
    images = [os.urandom(1_000_000) for _ in range(40)]
    pq.write_table(pa.table({"image": images}), tmp_path / "log.parquet")
    assert list(read_frames(list_archives([str(tmp_path / "log.parquet")]).table.slice(35))) == images[35:]
