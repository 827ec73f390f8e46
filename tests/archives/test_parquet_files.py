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


def can_be_written(kind: pa.DataType) -> bool:
    try:
        pq.write_table(pa.table({"value": pa.array([], kind)}), pa.BufferOutputStream())
    except pa.ArrowNotImplementedError:
        return False
    return True


VIEWS = can_be_written(pa.string_view())  # not by pyarrow 19
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
        "view": pa.array(["a text longer than twelve", "b", None] * 100, pa.string_view() if VIEWS else pa.string()),
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


# --- images as others write them ---

IMAGES = [b"\x89PNG one", b"\xff\xd8 two..", b"RIFF 3rd"]  # of one length
PATHS = ["cam0/1.png", "cam0/2.jpg", "cam0/3.webp"]


def in_structs(bytes_type: pa.DataType, path_type: pa.DataType) -> pa.Array:
    values = [{"bytes": image, "path": path} for image, path in zip(IMAGES, PATHS, strict=True)]
    return pa.array(values, pa.struct([("bytes", bytes_type), ("path", path_type)]))


def in_lists(kind: pa.DataType) -> pa.Array:
    signed = kind.value_type == pa.int8()
    return pa.array([[byte - 256 * (signed and byte > 127) for byte in image] for image in IMAGES], kind)


COLUMNS = {
    "binary": pa.array(IMAGES),
    "large binary": pa.array(IMAGES, pa.large_binary()),
    "binary view": pa.array(IMAGES, pa.binary_view()),
    "fixed size": pa.array(IMAGES, pa.binary(8)),
    "list of uint8": in_lists(pa.list_(pa.uint8())),
    "list of int8": in_lists(pa.list_(pa.int8())),
    "large list": in_lists(pa.large_list(pa.uint8())),
    "struct": in_structs(pa.binary(), pa.string()),
    "struct of views": in_structs(pa.binary_view(), pa.string_view()),
    "struct of lists": in_structs(pa.list_(pa.uint8()), pa.large_string()),
}


@pytest.mark.parametrize("how", COLUMNS)
@pytest.mark.parametrize("name", ["image", "pixel_values", "jpg.bytes"])
def test_images_are_read_however_arrow_holds_their_bytes(how: str, name: str, tmp_path: Path) -> None:
    label = in_structs(pa.binary(), pa.string())  # of data sets for segmentation, which has images, too
    table = pa.table({"label": label, name: COLUMNS[how]})
    # Arrow 26 cannot cut a struct of views into row groups.
    try:
        pq.write_table(table, tmp_path / "log.parquet", row_group_size=3 if how == "struct of views" else 2)
    except pa.ArrowNotImplementedError:
        pytest.skip(f"pyarrow {pa.__version__} writes no views")
    named = name if name == "jpg.bytes" else None
    listed = list_archives([str(tmp_path)], image_column=named).table
    names = PATHS if how.startswith("struct") else [f"{row:06d}" for row in range(3)]
    assert listed["frame_id"].to_pylist() == [f"log.parquet!{path}" for path in names]
    assert list(read_frames(listed)) == IMAGES


def test_rows_whose_bytes_are_null_say_so_and_a_file_of_them_is_refused(tmp_path: Path) -> None:
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    values = [{"bytes": None, "path": path} for path in PATHS]
    pq.write_table(pa.table({"image": pa.array(values, struct)}), tmp_path / "paths.parquet", row_group_size=2)
    listing = list_archives([str(tmp_path)])
    assert listing.unlistable == (
        (
            f"{tmp_path}/paths.parquet",
            "has no bytes in its column 'image.bytes', only paths of files: the images lie elsewhere; give "
            "their folder, or write their bytes into the column",
        ),
    )
    values[1]["bytes"] = IMAGES[1]
    pq.write_table(pa.table({"image": pa.array([*values, None], struct)}), tmp_path / "paths.parquet")
    first, second, third, fourth = read_frames(list_archives([str(tmp_path)]).table)
    assert second == IMAGES[1]
    assert [content.reason for content in (first, third, fourth)] == ["not_an_image"] * 3
    assert third.error.startswith("row 2 has no bytes in the column 'image.bytes': the images lie elsewhere; ")


def test_paths_that_are_no_text_stand_beside_bytes_that_are_null(tmp_path: Path) -> None:
    paths = pa.array([b"cam0/\xff.png"]).view(pa.string())
    image = pa.StructArray.from_arrays([pa.nulls(1, pa.binary()), paths], ["bytes", "path"])
    pq.write_table(pa.table({"image": image}), tmp_path / "log.parquet")
    ((_, why),) = list_archives([str(tmp_path)]).unlistable
    assert why.startswith("has no bytes in its column 'image.bytes', only paths of files: ")


def test_a_list_with_empty_places_is_no_image(tmp_path: Path) -> None:
    column = pa.array([[1, None, 3], list(IMAGES[0]), []], pa.list_(pa.uint8()))
    pq.write_table(pa.table({"image": column}), tmp_path / "log.parquet")
    first, second, third = read_frames(list_archives([str(tmp_path)]).table)
    assert isinstance(first, FrameGone) and first.error == "row 0 has a list with empty places in the column 'image'"
    assert (second, third) == (IMAGES[0], b"")


PIXELS = pa.array([[[[1, 2, 3], [4, 5, 6]]]], pa.list_(pa.list_(pa.list_(pa.uint8()))))


@pytest.mark.parametrize(
    ("columns", "why"),
    [
        ({"content": [b"x"]}, "no column 'image' of encoded images (--image-column may be content)"),
        (
            {"front": in_structs(pa.binary(), pa.string())[:1], "rear": [b"x"]},
            None,  # the only struct with bytes
        ),
        (
            {"front": in_structs(pa.binary(), pa.string())[:1], "rear": in_structs(pa.binary(), pa.string())[:1]},
            "no column 'image' of encoded images (--image-column may be front or rear)",
        ),
        (
            {"image": ["cam0/1.png"], "label": [b"x"]},
            "a column 'image' of type string, which are no encoded images (--image-column may be label)",
        ),
        (
            {"pixel_values": PIXELS},
            "a column 'pixel_values' of type list<element: list<element: list<element: uint8>>>, which are decoded "
            "pixels; encode them, as PNG or JPEG",
        ),
    ],
)
def test_a_file_of_other_columns_says_what_is_there_and_which_option_reads_it(
    columns: dict[str, object], why: str | None, tmp_path: Path
) -> None:
    pq.write_table(pa.table(columns), tmp_path / "log.parquet")
    if why is None:
        assert len(list_archives([str(tmp_path)]).table) == 1
        return
    (tmp_path / "1.png").write_bytes(b"x")
    assert list_archives([str(tmp_path)]).ignored == {f".parquet with {why}": 1}
    (tmp_path / "1.png").unlink()
    with pytest.raises(ValueError) as error:
        list_archives([str(tmp_path)])
    assert str(error.value).startswith(f"{tmp_path} holds 1 .parquet with {why}; frames are .png")
    with pytest.raises(ValueError) as error:
        list_archives([f"{tmp_path}/log.parquet"])
    names = ", ".join(columns)
    assert str(error.value) == f"{tmp_path}/log.parquet has {why}, and no column 'uri'; its columns are {names}"


def test_a_column_that_is_named_and_not_there_is_told(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": IMAGES}), tmp_path / "log.parquet")
    (tmp_path / "1.png").write_bytes(b"x")
    listing = list_archives([str(tmp_path)], image_column="jpg")
    assert listing.ignored == {".parquet with no column 'jpg' of encoded images (--image-column may be image)": 1}
    pq.write_table(pa.table({"x": [1]}), tmp_path / "log.parquet")
    assert list_archives([str(tmp_path)]).ignored == {".parquet without images": 1}
