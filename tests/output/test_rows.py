from __future__ import annotations

import math
import re

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from unet_ray.classes import ClassSet
from unet_ray.frames import MANIFEST_SCHEMA
from unet_ray.output import columns
from unet_ray.output import rows as results

CLASSES = ClassSet.from_dict(
    {
        "name": "three",
        "classes": [{"name": n, "color": [i, 0, 0]} for i, n in enumerate(("road", "sky", "person"))],
    }
)
HEIGHT_PX, WIDTH_PX = 4, 7


def manifest(drives: list[tuple[str, str]], **carried: list) -> pa.Table:
    """One row for each sequence and camera of `drives`."""
    rows = [
        {"frame_id": f"{s}/{c}/{n}.png", "uri": f"/log/{n}.png", "kind": "file", "version": "1", "sequence": s}
        | {"camera": c, "frame_index": n, "offset_bytes": 0, "size_bytes": 3}
        for n, (s, c) in enumerate(drives)
    ]
    table = pa.Table.from_pylist(rows, schema=MANIFEST_SCHEMA)
    for name, values in carried.items():
        table = table.append_column(name, pa.array(values))
    return table


def labels(n_frames: int, rejected: dict[int, str], seed: int = 0) -> results.ChunkLabels:
    rng = np.random.default_rng(seed)
    pixels_NK = rng.multinomial(HEIGHT_PX * WIDTH_PX, [0.7, 0.25, 0.05], n_frames).astype(np.int64)
    confidence_NK = np.where(pixels_NK > 0, rng.random((n_frames, 3)), np.nan).astype(np.float32)
    bad = [n in rejected for n in range(n_frames)]
    return results.ChunkLabels(
        reason=[rejected.get(n) for n in range(n_frames)],
        error=[f"{rejected[n]}!" if n in rejected else None for n in range(n_frames)],
        height_px=[None if b else 480 for b in bad],
        width_px=[None if b else 640 for b in bad],
        content_digest=[None if b else f"{n:016x}" for n, b in enumerate(bad)],
        mask=[None if b else b"mask %d" % n for n, b in enumerate(bad)],
        mask_encoding="png",
        mask_height_px=[None if b else HEIGHT_PX for b in bad],
        mask_width_px=[None if b else WIDTH_PX for b in bad],
        grids=[None if b else rng.integers(0, 3, (2, 3), np.uint8) for b in bad],
        figures={
            "pixels_<class>": pixels_NK,
            "confidence_<class>": confidence_NK,
            "confidence": rng.random(n_frames, np.float32),
            "low_margin_share": rng.random(n_frames, np.float32),
        },
    )


def documented(number: int) -> list[tuple[list[str], str, str]]:
    """Names, type and meaning of the rows of a table in the module's docstring."""
    tables = re.split(r"\| column \| type \| \|", results.__doc__ or "")[1:]
    rows = re.findall(r"^\| (`[^|]+`) \| (\w+) \| ?(.*?) ?\|$", tables[number], re.MULTILINE)
    return [(re.findall("`(.+?)`", names), dtype, meaning) for names, dtype, meaning in rows]


def test_the_documented_columns_are_those_of_the_table():
    assert documented(0) == columns.documented()
    fields = [(name, dtype) for names, dtype, _ in documented(1) for name in names]
    assert [(field.name, columns.type_name(field.type)) for field in results.statistics_schema()] == fields


def test_the_schema_has_a_column_of_each_class_after_all_others():
    named = [(name, dtype) for names, dtype, _ in columns.documented() for name in names]
    expected = [(name, dtype) for name, dtype in named if "<class>" not in name]
    for name, dtype in (entry for entry in named if "<class>" in entry[0]):
        expected += [(name.replace("<class>", of_class), dtype) for of_class in CLASSES.names]
    assert [(field.name, columns.type_name(field.type)) for field in results.frames_schema(CLASSES)] == expected


def test_a_row_holds_what_the_frame_got_and_a_rejected_one_nothing_but_the_reason():
    rows = manifest([("d1", "front")] * 3, weather=["rain", "sun", None])
    given = labels(3, {1: "truncated"})
    table = results.result_table(rows, given, CLASSES)
    assert table.schema == results.frames_schema(CLASSES, pa.schema([("weather", pa.string())]))
    first, second, third = table.to_pylist()
    assert first["frame_id"] == "d1/front/0.png" and first["weather"] == "rain"
    assert (first["status"], first["reason"], first["error"]) == ("ok", None, None)
    assert (first["height_px"], first["width_px"], first["mask"], first["mask_encoding"]) == (
        480,
        640,
        b"mask 0",
        "png",
    )
    assert [third[f"pixels_{name}"] for name in CLASSES.names] == given.figures["pixels_<class>"][2].tolist()
    for k, name in enumerate(CLASSES.names):
        expected = float(given.figures["confidence_<class>"][2, k])
        assert third[f"confidence_{name}"] == (None if math.isnan(expected) else expected)
    assert {name: value for name, value in second.items() if value is not None} == {
        "frame_id": "d1/front/1.png",
        "uri": "/log/1.png",
        "sequence": "d1",
        "camera": "front",
        "frame_index": 1,
        "status": "rejected",
        "reason": "truncated",
        "error": "truncated!",
        "weather": "sun",
    }


def test_what_cannot_be_is_refused():
    rows = manifest([("d", "c")] * 2)
    with pytest.raises(AssertionError, match="no such reason: {'bad luck'}"):
        results.result_table(rows, labels(2, {0: "bad luck"}), CLASSES)
    with pytest.raises(AssertionError, match="labels of 3 frames for 2 rows of the manifest"):
        results.result_table(rows, labels(3, {}), CLASSES)
    wrong = labels(2, {})
    wrong.figures["pixels_<class>"][1, 0] += 1
    with pytest.raises(AssertionError, match="29 pixels counted in a mask of 4 x 7"):
        results.result_table(rows, wrong, CLASSES)
    with pytest.raises(ValueError, match="the catalogue's column 'Mask' has the name of a column of the output"):
        results.frames_schema(CLASSES, pa.schema([("Mask", pa.string())]))


def test_class_statistics_equal_sql(tmp_path):
    drives = [("d1", "front")] * 11 + [("d1", "rear")] * 2 + [("d2", "")] * 5 + [("d3", "front")] * 3
    given = labels(len(drives), {2: "missing", 11: "changed", 18: "truncated", 19: "truncated", 20: "truncated"})
    given.figures["pixels_<class>"][13:18] = [20, 8, 0]  # a drive without persons; d3 has no labelled frame
    given.figures["confidence_<class>"][13:18, 2] = np.nan
    frames = results.result_table(manifest(drives), given, CLASSES)
    pq.write_table(frames, tmp_path / "part-00000.parquet")
    statistics = results.class_statistics((frames.slice(start, 4) for start in range(0, len(frames), 4)), CLASSES)
    assert statistics.schema == results.statistics_schema()
    by_class = " union all ".join(
        f"""select sequence, camera, {k} as class_id, '{name}' as class_name, count(*) as frames,
        count_if(pixels_{name} > 0) as frames_with_class, sum(pixels_{name})::bigint as pixels,
        sum(pixels_{name}) / sum(pixels_road + pixels_sky + pixels_person) as share,
        sum(confidence_{name}::double * pixels_{name}) / nullif(sum(pixels_{name}), 0) as confidence
        from '{tmp_path}/*.parquet' where status = 'ok' group by all"""
        for k, name in enumerate(CLASSES.names)
    )
    expected = duckdb.sql(f"{by_class} order by sequence, camera, class_id").fetchall()
    assert len(expected) == 9 and expected[-1][-1] is None
    rows = [tuple(row.values()) for row in statistics.to_pylist()]
    assert [row[:7] for row in rows] == [row[:7] for row in expected]
    for ours, sql in zip(rows, expected, strict=True):
        assert ours[7] == pytest.approx(sql[7], rel=1e-12)
        assert ours[8] == (None if sql[8] is None else pytest.approx(sql[8], rel=1e-12))


def test_statistics_do_not_depend_on_the_pieces():
    drives = [("d1", "a")] * 5 + [("d2", "a")] * 6
    frames = results.result_table(manifest(drives), labels(11, {}), CLASSES)
    whole = results.class_statistics([frames], CLASSES)
    pieces = results.class_statistics(frames.to_batches(max_chunksize=2), CLASSES)
    assert whole.drop(["confidence"]).equals(pieces.drop(["confidence"]))
    assert whole["confidence"].to_numpy() == pytest.approx(pieces["confidence"].to_numpy(), rel=1e-12)


def test_an_archive_of_rejected_frames_has_no_statistics():
    frames = results.result_table(manifest([("d", "c")]), labels(1, {0: "missing"}), CLASSES)
    statistics = results.class_statistics([frames], CLASSES)
    assert len(statistics) == 0 and statistics.schema == results.statistics_schema()
