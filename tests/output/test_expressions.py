"""Conditions as text, against DuckDB's answer to the same condition."""

from __future__ import annotations

import datetime

import duckdb
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from unet_ray.output.expressions import column_names, parse_expression

NOON = datetime.datetime(2026, 11, 30, 12)

TABLE = pa.table(
    {
        "frame_id": ["a/1.png", "a/2.png", "b's/3%.png", None],
        "status": ["ok", "rejected", "ok", "ok"],
        "timestamp_ns": [1_764_460_800_000_000_001, 1_764_460_800_000_000_002, None, 3],
        "confidence": pa.array([0.5, None, 0.75, 0.125], pa.float32()),
        "pixels_road": [0, None, 5, 7],
        "pixels_traffic light": [0, 1, 2, 3],
        'say "cheese"': [1, 2, 3, 4],
        "is_night": [True, False, None, True],
        "seen": [NOON, NOON + datetime.timedelta(days=1), None, NOON],
        "zoned": pa.array([NOON, None, NOON, None], pa.timestamp("ms", "UTC")),
        "day": [NOON.date(), None, NOON.date(), NOON.date()],
        "count": pa.array([2**63, 1, None, 3], pa.uint64()),
        "small": pa.array([7, -7, None, 1], pa.int8()),
        "price": pa.array([1, None, 1.5, 0.5], pa.float64()).cast(pa.decimal128(9, 2)),
        "mask": [b"", None, b"x", b"y"],
        "in": [1, 2, 3, 4],
    }
)


@pytest.mark.parametrize(
    "text",
    [
        "pixels_road > 0",
        "pixels_road >= 0 and not pixels_road = 5",
        "NOT pixels_road > 0",
        "not (pixels_road > 0 or status = 'ok')",
        "status = 'ok' or pixels_road = 5 and confidence < .5",
        "pixels_road <> 0 or is_night",
        "pixels_road != 5 AND Not is_night",
        "is_night = true",
        "status in ('ok', 'other')",
        "status not in ('ok')",
        "not pixels_road in (5, 0.0, 1e3)",
        "pixels_road in (-1, 7) or pixels_road is null",
        "frame_id is not null and mask is not null",
        "frame_id like 'a/_.png'",
        "frame_id not like '%.png'",
        "frame_id = 'b''s/3%.png'",
        "frame_id < 'b' and frame_id > status or status >= 'r'",
        '"pixels_traffic light" >= 2',
        '"say ""cheese""" + 1 = 3',
        '"in" - 1 in (1, 2)',
        "timestamp_ns = 1764460800000000002",
        "timestamp_ns > 1.7e18",
        "timestamp_ns in (1764460800000000002, 5)",
        "timestamp_ns not in (4611686018427387905, 3.0)",
        "small = 7 or small < 300",
        "small in (7, 300, -1)",
        "price > 1.25 or price = 1 or price in (0.5)",
        "price > pixels_road",
        "timestamp_ns / 1e9 > 1764460800 - 1",
        "pixels_road / (pixels_road + 2) > 0.7",
        "pixels_road / 2 = 2.5",
        "2 * 3 + 1 = pixels_road",
        "10 - 2 - 1 = pixels_road",
        "- - 5 = pixels_road",
        "-pixels_road < -4",
        "confidence = 0.75",
        "seen >= '2026-12-01'",
        "'2026-11-30 12:00:00' = seen",
        "seen in ('2026-11-30 12:00:00', '2026-11-29')",
        "day = '2026-11-30' and day < seen",
        "count > 1 and count >= 1.5",
        "count > -1",
        "true",
        "1 = 2",
    ],
)
def test_a_condition_chooses_the_rows_that_duckdb_chooses(text):
    rows = TABLE.append_column("row", [[0, 1, 2, 3]])
    duckdb_rows = duckdb.connect().from_arrow(rows).filter(text).project('"row"').fetchall()
    assert rows.filter(parse_expression(text, TABLE.schema))["row"].to_pylist() == [row for (row,) in duckdb_rows]


def test_what_duckdb_says_otherwise():
    def rows(text: str) -> list[int]:
        return TABLE.filter(parse_expression(text, TABLE.schema))["in"].to_pylist()

    assert rows("pixels_road == 5") == rows("pixels_road=5") == [3]
    assert rows("pixels_road / 0 > 1") == [3, 4]  # as floating point has it: 0 / 0 is not a number
    assert rows("  status\n=\t'ok'  ") == [1, 3, 4]


def test_a_time_with_a_zone():
    expression = parse_expression("zoned = '2026-11-30 13:00:00+01:00'", TABLE.schema)
    assert TABLE.filter(expression)["in"].to_pylist() == [1, 3]


def test_a_batch_is_filtered_too():
    (batch,) = TABLE.to_batches()
    assert batch.filter(parse_expression("pixels_road > 0", TABLE.schema)).num_rows == 2
    assert isinstance(parse_expression("pixels_road > 0", TABLE.schema), pc.Expression)


def test_the_columns_that_a_condition_looks_at():
    text = "status = 'ok' and (confidence < 0.5 or \"pixels_traffic light\" > pixels_road) and status is not null"
    assert column_names(text, TABLE.schema) == ["status", "confidence", "pixels_road", "pixels_traffic light"]
    assert column_names("1 = 1", TABLE.schema) == []


def test_long_conditions():
    many = " or ".join(["is_night"] * 830)
    assert len(many) < 10_000 and len(TABLE.filter(parse_expression(many, TABLE.schema))) == 2
    deep = "(" * 50 + "is_night" + ")" * 50
    assert len(TABLE.filter(parse_expression(deep, TABLE.schema))) == 2


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "it is empty; write one such as pixels_road > 0"),
        (
            "pixels_raod > 0",
            "there is no column pixels_raod; perhaps you meant pixels_road; the columns are frame_id, ",
        ),
        ('status = "ok"', "there is no column ok; the columns are frame_id, "),
        ("pixels_traffic > 0", 'perhaps you meant "pixels_traffic light"; the columns are'),
        ("status > 3", "status is text and 3 is a number, which do not compare (text stands in single quotes)"),
        ("mask = 'x'", "mask is neither number nor text and 'x' is text, which do not compare"),
        ("status in ('ok', 3)", "status is text and 3 is a number, which do not compare"),
        ("status in (frame_id)", "frame_id is no literal; `in` takes numbers or text"),
        ("pixels_road", "pixels_road is a number, not a condition; compare it, such as pixels_road = …"),
        ("not 'x'", "'x' is text, not a condition"),
        ("status + 1 = 2", "status is text, with which nothing can be calculated"),
        ("pixels_road like '1%'", "`like` compares a column of text with a pattern in single quotes"),
        ("pixels_road = null", "a comparison with null is never true; write `is null` or `is not null`"),
        ("seen > 'today'", "'today' is no timestamp[us] as seen is; write 2026-11-30 12:00:00"),
        ("zoned > '2026-11-30 12:00:00'", "is no timestamp[ms, tz=UTC] as zoned is; write 2026-11-30 12:00:00Z"),
        ("pixels_road > ", "there is the end instead of a column, a number or text in single quotes"),
        ("pixels_road is 5", "there is 5 instead of `null`"),
        ("pixels_road not 5", "after `not` there is 5 instead of `in` or `like`"),
        ("(is_night", "there is the end instead of `)`"),
        ("is_night is_night", "is_night is not expected there; conditions are joined by `and` and `or`"),
        ("status = 'ok", "there is an open quote at 'ok"),
        ("pixels_road > 3x", "there is something unknown: 3x"),
        ("__import__('os').system('true')", "there is something unknown: .system('true')"),
        ("pixels_road > 9999999999999999999", "9999999999999999999 is over 63 bits"),
        ("(" * 51 + "is_night" + ")" * 51, "it has over 50 brackets, signs or `not` within each other"),
        ("not " * 51 + "is_night", "it has over 50 brackets, signs or `not` within each other"),
        ("is_night or " * 1_000 + "is_night", "it has 12,008 letters; at most 10,000 are read"),
    ],
)
def test_what_is_no_condition_is_one_line(text, problem):
    with pytest.raises(ValueError, match="^the condition `") as refused:
        parse_expression(text, TABLE.schema)
    message = str(refused.value)
    assert problem in message and "\n" not in message and len(message) < 600
