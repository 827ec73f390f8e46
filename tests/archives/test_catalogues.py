"""A catalogue's own columns reach the output as they are written."""

from __future__ import annotations

import csv
from collections import Counter
from dataclasses import replace
from pathlib import Path

import labelled
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from unet_ray.archives.catalogues import read_catalogue
from unet_ray.archives.listing import list_archives
from unet_ray.archives.reach import Reach
from unet_ray.output import manifest, plans

TEXTS = [
    *(
        "000112",
        "20240101000000000001",
        "NA",
        "null",
        "#N/A",
        "NaN",
        "1e5",
        "1.10",
        "true",
        "False",
        "0x1F",
        "-0",
        "+1",
    ),
    *(
        "2024-01-01",
        "2024-01-01T00:00:00Z",
        "12:30",
        " padded ",
        "a,b",
        'say "hi"',
        "two\nlines",
        "crlf\r\nline",
        "日本",
    ),
]


def write(path: Path, rows: list[list[str]], **options: str) -> str:
    with path.open("w", newline="", encoding=options.pop("encoding", "utf-8")) as file:
        csv.writer(file, **options).writerows(rows)
    return str(path)


def columns(path: str) -> dict[str, list[object]]:
    return list_archives([path]).table.to_pydict()


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("lineterminator", ["\n", "\r\n"])
def test_every_text_is_carried_as_it_is_written(encoding: str, lineterminator: str, tmp_path: Path) -> None:
    rows = [[f"{index:02d}.jpg", text, text, "1" if index else ""] for index, text in enumerate(TEXTS)]
    header = ["uri", "vin", "sequence", "number"]
    path = write(tmp_path / "c.csv", [header, *rows], encoding=encoding, lineterminator=lineterminator)
    table = list_archives([path]).table
    assert table.schema.field("number").type == pa.string()
    by_uri = {row["frame_id"]: row for row in table.to_pylist()}
    for index, text in enumerate(TEXTS):
        row = by_uri[f"{index:02d}.jpg"]
        assert (row["vin"], row["sequence"], row["number"]) == (text, text, "1" if index else None)


def test_a_column_that_is_empty_for_long_and_then_text(tmp_path: Path) -> None:
    rows = [
        ["uri", "frame_id", "weather"],
        *([f"{n % 4}.jpg", f"id{n}", ""] for n in range(30_000)),
        ["0.jpg", "z", "rain"],
    ]
    path = write(tmp_path / "late.csv", rows)
    assert Counter(columns_of(path, "weather")) == {None: 30_000, "rain": 1}


def columns_of(path: str, name: str) -> list[object]:
    return [value for table, _ in read_catalogue(path, Reach(())) for value in table[name].to_pylist()]


def test_what_is_empty_is_null_and_an_empty_id_is_the_uri(tmp_path: Path) -> None:
    rows = [["uri", "frame_id", "sequence", "weather"], ["0.jpg", "a", "", ""], ["d/1.jpg", "", "north", "x"]]
    for quoting in (csv.QUOTE_MINIMAL, csv.QUOTE_ALL):
        table = list_archives([write(tmp_path / "c.csv", rows, quoting=quoting)]).table
        assert table.select(["frame_id", "sequence", "weather"]).to_pylist() == [
            {"frame_id": "a", "sequence": "", "weather": None},
            {"frame_id": "d/1.jpg", "sequence": "north", "weather": "x"},
        ]
    pq.write_table(pa.table({"uri": ["0.jpg", "1.jpg"], "frame_id": ["a", None]}), tmp_path / "c.parquet")
    assert columns(str(tmp_path / "c.parquet"))["frame_id"] == ["1.jpg", "a"]


def test_catalogues_with_numbers_and_texts_of_one_name(tmp_path: Path) -> None:
    left = write(tmp_path / "left.csv", [["uri", "vin"], ["0.jpg", "007"]])
    right = write(tmp_path / "right.csv", [["uri", "vin"], ["1.jpg", "WBA1"]])
    assert list_archives([left, right]).table["vin"].to_pylist() == ["007", "WBA1"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("uri,weather,weather\n0.jpg,a,b\n", "has the column 'weather' twice; give each a name of its own"),
        ("uri,uri\n0.jpg,1.jpg\n", "has the column 'uri' twice; give each a name of its own"),
        ("uri,timestamp_ns\n0.jpg,1e5\n", "is no CSV file that can be read: "),
        ("uri,frame_index\n0.jpg,NA\n", "is no CSV file that can be read: "),
        ("uri,frame_index\n0.jpg,99999999999999999999\n", "is no CSV file that can be read: "),
        ("uri,weather\n0.jpg\n", "is no CSV file that can be read: "),
        ('uri,weather\n0.jpg,"open\n1.jpg,x\n', "is no CSV file that can be read: "),
        ("", "is no CSV file that can be read: "),
        (f'"{"x" * 200_000}', "is no CSV file that can be read: its first line: "),
    ],
)
def test_what_is_refused_is_refused_in_one_line(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "c.csv").write_text(content)
    with pytest.raises(ValueError) as caught:
        list_archives([str(tmp_path / "c.csv")])
    assert str(caught.value).startswith(f"{tmp_path}/c.csv {message}") and "\n" not in str(caught.value)


def test_parquet_keeps_its_types(tmp_path: Path) -> None:
    kinds = {"n": pa.int32(), "share": pa.float32(), "day": pa.date32(), "tags": pa.list_(pa.string())}
    table = pa.table({"uri": ["0.jpg"], **{name: pa.nulls(1, kind) for name, kind in kinds.items()}})
    pq.write_table(table, tmp_path / "c.parquet")
    schema = list_archives([str(tmp_path / "c.parquet")]).table.schema
    assert {name: schema.field(name).type for name in kinds} == kinds
    both = pa.Table.from_arrays([pa.array(["0.jpg"]), pa.array(["a"]), pa.array(["b"])], names=["uri", "x", "x"])
    pq.write_table(both, tmp_path / "twice.parquet")
    with pytest.raises(ValueError, match="twice.parquet has the column 'x' twice; give each a name of its own"):
        list_archives([str(tmp_path / "twice.parquet")])


def planned(out: Path, table: pa.Table) -> pa.Table:
    listing = replace(list_archives([str(out.parent / "c.csv")]), table=table)
    plan = plans.plan(str(out), listing, labelled.LINEAGE, labelled.CUTTING, config_yaml="")
    return pa.concat_tables([manifest.read_rows(chunk) for chunk in plan.chunks])


def test_an_output_that_was_begun_with_other_types_goes_on_with_them(tmp_path: Path) -> None:
    """As earlier versions found them out from the first values of a CSV file."""
    names = ["uri", "vin", "share", "night", "day", "at"]
    kinds = [None, pa.int64(), pa.float64(), pa.bool_(), pa.date32(), pa.timestamp("s")]
    first = ["0.jpg", "000112", "0.5", "true", "2024-01-01", "2024-01-01 10:00:00"]
    second = ["1.jpg", "000007", "NA", "false", "", "2024-01-02 10:00:00"]
    write(tmp_path / "c.csv", [names, first])
    table = list_archives([str(tmp_path / "c.csv")]).table
    before = table
    for name, kind in zip(names[1:], kinds[1:], strict=True):
        before = before.set_column(before.column_names.index(name), name, before[name].cast(kind))
    planned(tmp_path / "out", before)
    write(tmp_path / "c.csv", [names, first, second])
    rows = planned(tmp_path / "out", list_archives([str(tmp_path / "c.csv")]).table)
    assert rows.schema.field("vin").type == pa.int64()
    assert rows["vin"].to_pylist() == [112, 7] and rows["share"].to_pylist() == [0.5, None]
    assert rows["night"].to_pylist() == [True, False] and rows["day"].to_pylist()[1] is None
    write(tmp_path / "c.csv", [names, first, second, ["2.jpg", "WBA1", "", "", "", ""]])
    with pytest.raises(
        ValueError, match="the catalogues' column 'vin' is int64 in the output, and a value here is none"
    ):
        planned(tmp_path / "out", list_archives([str(tmp_path / "c.csv")]).table)
