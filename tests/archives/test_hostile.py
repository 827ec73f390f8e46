"""Archives made to fill the memory or to run code: read in under 1 GB, nothing runs, and a reason is given."""

from __future__ import annotations

import json
import os
import pickle
import struct
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from unet_ray.archives.listing import list_archives

MB = 2**20

READ = """
import json, sys
from collections import Counter
from unet_ray.archives.reading import FrameGone, read_frames
from unet_ray.archives.listing import list_archives

counts, unlistable = Counter(), []
try:
    listing = list_archives(sys.argv[1:])
    unlistable = [why for _, why in listing.unlistable]
    for content in read_frames(listing.table) if len(listing.table) < 10_000 else ():
        is_gone = isinstance(content, FrameGone)
        counts[f"{content.reason}: {content.error}" if is_gone else f"{len(content) >> 20} MB"] += 1
except ValueError as error:
    unlistable = [str(error)]
# ru_maxrss would be that of the process that started this one, if it was larger.
peak_mb = next(int(line.split()[1]) // 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps([counts, unlistable, peak_mb]))
"""


def read(path: Path) -> tuple[dict[str, int], list[str]]:
    """Lists and reads an archive in a process of its own, which stays under 1 GB (1.05 before pyarrow 21)."""
    done = subprocess.run([sys.executable, "-c", READ, str(path)], capture_output=True, text=True, check=True)
    counts, unlistable, peak_mb = json.loads(done.stdout)
    assert peak_mb < (1000 if int(pa.__version__.partition(".")[0]) >= 21 else 1050)
    return counts, unlistable


def write_parquet(path: Path, schema: pa.Schema, rows: int, row: dict[str, object]) -> Path:
    with pq.ParquetWriter(path, schema, compression="zstd", use_dictionary=False) as writer:
        table = pa.Table.from_pylist([row], schema)
        for _ in range(rows):
            writer.write_table(table)
    return path


def test_a_zip_whose_members_inflate_a_thousand_times(tmp_path: Path) -> None:
    path = tmp_path / "bombs.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for index in range(6):
            with archive.open(f"{index}.png", "w") as member:
                for _ in range(260 if index == 0 else 200):
                    member.write(bytes(MB))
    assert path.stat().st_size < 10 * MB
    message = "too_large: the zip's member inflates to more than 268,435,456 bytes"
    assert read(path) == ({message: 1, "200 MB": 5}, [])


def test_a_tar_of_many_large_frames(tmp_path: Path) -> None:
    path = tmp_path / "large.tar"
    with path.open("wb") as file:
        for index in range(20):
            member = tarfile.TarInfo(f"{index}.bmp")
            member.size = 100 * MB
            file.write(member.tobuf())
            file.seek(member.size, 1)  # a hole, which costs no disk
        file.write(bytes(2 * tarfile.BLOCKSIZE))
    assert read(path) == ({"100 MB": 20}, [])


@pytest.mark.parametrize("size_mb", [20, pytest.param(300, marks=pytest.mark.slow)])
def test_a_parquet_file_whose_images_unpack_ten_thousand_times(size_mb: int, tmp_path: Path) -> None:
    schema = pa.schema([("image", pa.large_binary())])
    path = write_parquet(tmp_path / "bombs.parquet", schema, 600 // size_mb, {"image": bytes(size_mb * MB)})
    assert path.stat().st_size < MB
    counts, unlistable = read(path)
    assert unlistable == []
    if size_mb == 20:
        assert counts == {"20 MB": 30}
    else:
        (reason,) = counts
        assert reason.startswith("too_large: its row group unpacks from ") and counts[reason] == 2


NAMED = pa.schema([("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())]))])


def write_dictionary(path: Path, schema: pa.Schema, rows: int, row: dict[str, object]) -> Path:
    """One value, said in every row: a page of it, and a run length."""
    table = pa.Table.from_pylist([row], schema)
    with pq.ParquetWriter(path, schema, compression="zstd", dictionary_pagesize_limit=2**30) as writer:
        writer.write_table(pa.concat_tables([table] * rows).combine_chunks())
    return path


def write_deltas(path: Path, table: pa.Table, column: str) -> None:
    """Each value as what it has in common with the one before."""
    pq.write_table(table, path, compression="zstd", use_dictionary=False, column_encoding={column: "DELTA_BYTE_ARRAY"})


@pytest.mark.slow
def test_a_parquet_file_whose_names_unpack_ten_thousand_times(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "names.parquet", NAMED, 1, {"image": {"bytes": b"x", "path": "a" * 300 * MB}})
    counts, (why,) = read(path)
    assert counts == {} and why.startswith("its row group unpacks from ")


@pytest.mark.slow
def test_a_parquet_file_that_says_one_large_name_many_times(tmp_path: Path) -> None:
    row = {"image": {"bytes": b"x", "path": "a" * MB}}
    assert read(write_dictionary(tmp_path / "names.parquet", NAMED, 1500, row)) == ({"0 MB": 1500}, [])


def test_a_parquet_file_whose_names_are_deltas_of_one_large_name(tmp_path: Path) -> None:
    path = tmp_path / "names.parquet"
    images = [{"bytes": b"x", "path": "a" * MB + str(number)} for number in range(300)]
    write_deltas(path, pa.table({"image": images}, NAMED), "image.path")
    assert read(path) == ({"0 MB": 300}, [])  # by their rows: no name has over 4,096 letters


@pytest.mark.parametrize("names", [pytest.param(20_000, marks=pytest.mark.slow), 30_000])
def test_a_parquet_file_with_many_names_that_are_as_long_as_may_be(names: int, tmp_path: Path) -> None:
    path = tmp_path / "names.parquet"
    images = ({"bytes": None if number else b"x", "path": "a" * 4080 + str(number)} for number in range(names))
    write_deltas(path, pa.table({"image": pa.array(images, NAMED.field(0).type)}), "image.path")
    assert path.stat().st_size < MB
    counts, whys = read(path)
    assert counts == {} and len(whys) == (names > 25_000)
    assert all(why.startswith("its rows come to more than 384 MB; ") for why in whys)


@pytest.mark.slow
def test_a_parquet_file_that_says_one_large_image_many_times(tmp_path: Path) -> None:
    schema = pa.schema([("image", pa.large_binary())])
    path = write_dictionary(tmp_path / "again.parquet", schema, 60, {"image": bytes(30 * MB)})
    assert path.stat().st_size < MB
    assert read(path) == ({"30 MB": 60}, [])


@pytest.mark.slow
def test_a_parquet_file_whose_images_are_deltas_of_one_large_image(tmp_path: Path) -> None:
    images = [bytes(30 * MB) + bytes([number]) for number in range(24)]
    path = tmp_path / "images.parquet"
    write_deltas(path, pa.table({"image": images}, pa.schema([("image", pa.binary())])), "image")
    assert path.stat().st_size < MB
    assert read(path) == ({"30 MB": 24}, [])


@pytest.mark.slow
def test_a_parquet_file_with_few_large_images_among_many_small_ones(tmp_path: Path) -> None:
    table = pa.table({"image": [b"x"] * 5000 + [bytes(80 * MB)] * 3 + [b"x"]}, pa.schema([("image", pa.binary())]))
    pq.write_table(table, tmp_path / "uneven.parquet", compression="zstd", use_dictionary=False)
    assert read(tmp_path / "uneven.parquet") == ({"0 MB": 5001, "80 MB": 3}, [])


def test_a_parquet_file_of_a_hundred_million_empty_rows(tmp_path: Path) -> None:
    schema = pa.schema([("image", pa.binary())])
    with pq.ParquetWriter(tmp_path / "rows.parquet", schema) as writer:
        table = pa.table({"image": pa.nulls(10_000_000, pa.binary())}, schema)
        for _ in range(10):
            writer.write_table(table, row_group_size=len(table))
    counts, (why,) = read(tmp_path / "rows.parquet")
    assert counts == {} and why.startswith("its rows come to more than 384 MB; ")


CATALOGUES: dict[str, tuple[pa.DataType, Callable[[], object], int]] = {
    "unpacks": (pa.string(), lambda: "a" * 300 * MB, 1),
    "says one text again": (pa.string(), lambda: "a" * MB, 3000),
    "says one text again in a list": (pa.list_(pa.string()), lambda: ["a" * MB], 3000),
    "says one text again in a map": (pa.map_(pa.string(), pa.string()), lambda: [("a" * MB, "b")], 3000),
    "says one text again in a struct": (pa.struct([("it", pa.string())]), lambda: {"it": "a" * MB}, 3000),
    "says one block again": (pa.binary(MB), lambda: bytes(MB), 3000),
    "has a long list": (pa.list_(pa.int64()), lambda: [0] * 40_000_000, 1),
    "has a long list of nothing": (pa.list_(pa.null()), lambda: [None] * 100_000_000, 1),
}


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.slow) if kind == "has a long list" else kind for kind in CATALOGUES]
)
def test_a_catalogue_that_fills_the_memory(kind: str, tmp_path: Path) -> None:
    column_type, make, rows = CATALOGUES[kind]
    column = pa.array([make()], column_type)
    table = pa.table({"uri": ["1.png"], "weather": column})
    with pq.ParquetWriter(
        tmp_path / "c.parquet", table.schema, compression="zstd", dictionary_pagesize_limit=2**30
    ) as writer:
        many = pa.concat_tables([table] * min(rows, 100)).combine_chunks()
        for _ in range(max(1, rows // 100)):
            writer.write_batch(many.to_batches()[0])
    assert (tmp_path / "c.parquet").stat().st_size < MB
    counts, (why,) = read(tmp_path / "c.parquet")
    assert counts == {} and why.startswith(f"{tmp_path}/c.parquet was made to fill the memory: its row")


@pytest.mark.slow
def test_a_catalogue_that_is_as_large_as_may_be(tmp_path: Path) -> None:
    schema = pa.schema([("uri", pa.string()), ("weather", pa.string())])
    with pq.ParquetWriter(
        tmp_path / "c.parquet", schema, compression="zstd", dictionary_pagesize_limit=2**30
    ) as writer:
        for group in range(19):
            rows = {"uri": [f"{group}_{row}.png" for row in range(1000)], "weather": ["a" * 20_000] * 1000}
            writer.write_table(pa.table(rows, schema))
    assert read(tmp_path / "c.parquet") == ({}, [])


@pytest.mark.slow
def test_a_catalogue_that_is_large_so_that_it_may_say_more(tmp_path: Path) -> None:
    """Bytes that do not pack, beside a text that is said again or unpacks: no part of a file's size buys memory."""
    pictures = [os.urandom(10_000) for _ in range(2000)]
    rows = {"uri": [f"{row}.png" for row in range(2000)], "thumbnail": pictures}
    how = {"compression": "zstd", "dictionary_pagesize_limit": 2**30, "use_dictionary": ["weather"]}
    again = pa.table(rows | {"weather": pa.array(["a" * 200_000] * 2000)})
    pq.write_table(again, tmp_path / "again.parquet", **how)
    unpacks = pa.table(rows | {"weather": pa.array(["a" * 800 * MB] + [None] * 1999)})
    pq.write_table(unpacks, tmp_path / "unpacks.parquet", **how)
    assert all((tmp_path / f"{name}.parquet").stat().st_size > 20_000_000 for name in ("again", "unpacks"))
    counts, (why,) = read(tmp_path / "again.parquet")
    assert counts == {} and "made to fill the memory: its rows come to more than 384 MB" in why
    counts, (why,) = read(tmp_path / "unpacks.parquet")
    assert counts == {} and "made to fill the memory: its row group unpacks from " in why


def test_a_parquet_file_with_a_page_of_images_that_unpacks(tmp_path: Path) -> None:
    """Among others of the group that do not pack: 700 MB are not a hundred times the group."""
    images = [bytes(100 * MB)] * 7 + [os.urandom(8 * MB)]
    table = pa.table({"image": images}, pa.schema([("image", pa.binary())]))
    how = {"compression": "zstd", "use_dictionary": False}
    pq.write_table(table, tmp_path / "page.parquet", write_batch_size=7, **how)
    counts, whys = read(tmp_path / "page.parquet")
    (reason,) = counts
    assert whys == [] and reason.startswith("too_large: its page unpacks from ") and counts[reason] == 8


def varint(number: int, length: int = 0) -> bytes:
    """A number as Thrift writes it, in so many bytes at least."""
    bits = [number << 1 >> shift & 0x7F for shift in range(0, 7 * max(length, -(-(number << 1).bit_length() // 7)), 7)]
    return bytes([*(bit | 0x80 for bit in bits[:-1]), bits[-1]])


@pytest.mark.parametrize("columns", [["uri", "weather"], ["image"]])
def test_a_parquet_file_whose_footer_says_less_than_its_pages(columns: list[str], tmp_path: Path) -> None:
    path = tmp_path / "lies.parquet"
    table = pa.table({name: ["1.png" if name == "uri" else "a" * 600 * MB] for name in columns})
    table = table.cast(pa.schema([(name, pa.binary() if name == "image" else pa.string()) for name in columns]))
    pq.write_table(table, path, compression="zstd", use_dictionary=False, write_statistics=False)
    group = pq.ParquetFile(path).metadata.row_group(0)
    whole = path.read_bytes()
    footer = whole[-8 - int.from_bytes(whole[-8:-4], "little") :]
    lying = footer
    for size in {group.total_byte_size, group.column(len(columns) - 1).total_uncompressed_size}:
        lying = lying.replace(varint(size), varint(9_999, len(varint(size))))
    path.write_bytes(whole.replace(footer, lying))
    why = "its footer says 9,999 bytes and 1 values of a column that comes to more"
    if columns == ["image"]:
        assert read(path) == ({f"too_large: {why}": 1}, [])
    else:
        assert read(path) == ({}, [f"{path} was made to fill the memory: {why}"])


def write_zip_of_names(path: Path, names: int) -> Path:
    """A directory without members behind it, in the least bytes that it can have."""
    entry = struct.Struct("<4s4B4HL2L5H2L")
    with path.open("wb") as file:
        for index in range(names):
            name = f"{index}.png".encode()
            file.write(entry.pack(b"PK\1\2", 20, 3, 20, *[0] * 8, len(name), *[0] * 6) + name)
        size = file.tell()
        file.write(struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, names, names, size, 0))
        file.write(struct.pack("<4sLQL", b"PK\6\7", 0, size, 1))
        file.write(struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0))
    return path


@pytest.mark.slow
def test_a_zip_of_more_than_a_million_names(tmp_path: Path) -> None:
    counts, (why,) = read(write_zip_of_names(tmp_path / "names.zip", 1_000_001))
    assert counts == {} and why == "holds 1,000,001 members; at most 1,000,000 are read, make several zips of it"


def test_a_tar_with_a_header_of_a_million_attributes(tmp_path: Path) -> None:
    attributes = b"".join(b"13 a%06d=bb\n" % index for index in range(1_000_000))
    member = tarfile.TarInfo("attributes")
    member.type, member.size = tarfile.XHDTYPE, len(attributes)
    padding = bytes(-len(attributes) % tarfile.BLOCKSIZE)
    (tmp_path / "attributes.tar").write_bytes(member.tobuf(tarfile.USTAR_FORMAT) + attributes + padding)
    counts, (why,) = read(tmp_path / "attributes.tar")
    assert counts == {} and why.endswith("; at most 1,048,576 are read") and why.startswith("headers of ")


def test_a_tar_whose_names_nearly_all_leave_it(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "leaves.tar", "w") as archive:
        for index in range(3000):
            archive.addfile(tarfile.TarInfo(f"../{index}.png"))
    counts, whys = read(tmp_path / "leaves.tar")
    assert counts == {} and len(whys) == 1001
    assert whys[-1] == "has more than 1,000 members that cannot be listed"


class Payload:
    """Touches a file where it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("column_path", ["image", "image.bytes", "image.path", "weather", "weather.of_the_day"])
def test_a_parquet_file_with_pickled_objects_runs_nothing(column_path: str, tmp_path: Path) -> None:
    from ray.data._internal.object_extensions.arrow import ArrowPythonObjectType  # which every Ray Data process knows

    kind = ArrowPythonObjectType()
    payload = pa.array([pickle.dumps(Payload(tmp_path / "ran"))], kind.storage_type)
    evil = pa.ExtensionArray.from_storage(kind, payload)
    name, _, field = column_path.partition(".")
    plain = {"bytes": pa.array([b"x"]), "path": pa.array(["1.png"])} if name == "image" else {}
    fields = {**plain, field: evil}
    column = pa.StructArray.from_arrays(list(fields.values()), list(fields)) if field else evil
    pq.write_table(pa.table({name: column, "uri": ["1.png"]}), tmp_path / "evil.parquet")
    try:
        listing = list_archives([str(tmp_path / "evil.parquet")])
        carried = listing.table.to_pylist()[0]
        assert carried.get("weather") in (None, payload[0].as_py())  # the bytes, as which they lie in the file
    except ValueError as error:
        assert field and "only Arrow's usual types are carried" in str(error)
    assert not (tmp_path / "ran").exists()
