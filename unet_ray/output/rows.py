"""The row of one frame, the row of one class in a drive, and the schemas of both tables.

Shapes: `N` frames of a chunk, `K` classes.

`frames/*.parquet`, one row a listed frame:

| column | type | |
|---|---|---|
| `frame_id` | string | path relative to the archive's root; `drive07.tar!cam0/000001.png` inside a tar |
| `uri` | string | where the frame was read: the file, or the archive that holds it |
| `sequence` | string | the drive |
| `camera` | string | |
| `frame_index` | int64 | |
| `timestamp_ns` | int64 | |
| `height_px` | int32 | the frame's height; null where it could not be found out |
| `width_px` | int32 | |
| `status` | string | `ok` or `rejected` |
| `reason` | string | why it was rejected, one of `REASONS` |
| `error` | string | the reason in words; of a labelled frame, that its label was kept from a damaged file |
| `mask` | binary | class id of every pixel, encoded |
| `mask_encoding` | string | `png` (8-bit palette) or `raw` (uint8, row after row) |
| `mask_height_px` | int32 | |
| `mask_width_px` | int32 | |
| `confidence` | float32 | mean over the pixels |
| `low_margin_share` | float32 | share of pixels whose two best classes lie within 0.2 |
| `pixels_<class>` | int64 | for each class; together `mask_height_px` x `mask_width_px` |
| `confidence_<class>` | float32 | for each class: mean over its pixels; null where it has none |

and a catalogue's own columns. All columns from `mask` to `confidence_<class>` are null where `status` is `rejected`.

`class_statistics.parquet`, one row for each class of each sequence and camera with a labelled frame:

| column | type | |
|---|---|---|
| `sequence` | string | |
| `camera` | string | |
| `class_id` | int32 | |
| `class_name` | string | |
| `frames` | int64 | labelled frames of this sequence and camera |
| `frames_with_class` | int64 | those in which the class has a pixel |
| `pixels` | int64 | pixels of the class |
| `share` | float64 | of all pixels of this sequence and camera |
| `confidence` | float64 | mean over the pixels of the class; null where it has none |
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from unet_ray import storage
from unet_ray.classes import ClassSet
from unet_ray.frames import carried_schema

FORMAT_VERSION = 1
"""Of the tables' layout; in every file's footer."""

RESULT_VERSION = 4
"""Raised when the code's labels for the same frame and model can change; part of every chunk's key."""

REASONS = (
    "missing",
    "changed",
    "not_an_image",
    "truncated",
    "too_large",
    "unsupported",
    "crashed",
    "timed_out",
    "out_of_memory",
)
"""What `reason` can be."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ChunkLabels:
    """What became of the N frames of a chunk, in the manifest's order; a rejected frame's places hold anything."""

    reason: Sequence[str | None]
    """None where the frame is labelled."""
    error: Sequence[str | None]
    height_px: Sequence[int | None]
    width_px: Sequence[int | None]
    mask: Sequence[bytes | None]
    mask_encoding: str
    mask_height_px: Sequence[int | None]
    mask_width_px: Sequence[int | None]
    pixels_NK: np.ndarray
    """int64"""
    class_confidence_NK: np.ndarray
    """float32; NaN where the class has no pixel."""
    confidence_N: np.ndarray
    low_margin_share_N: np.ndarray


_FROM_MANIFEST = (
    ("frame_id", pa.string()),
    ("uri", pa.string()),
    ("sequence", pa.string()),
    ("camera", pa.string()),
    ("frame_index", pa.int64()),
    ("timestamp_ns", pa.int64()),
)
_OF_FRAME = (
    ("height_px", pa.int32()),
    ("width_px", pa.int32()),
    ("status", pa.string()),
    ("reason", pa.string()),
    ("error", pa.string()),
    ("mask", pa.binary()),
    ("mask_encoding", pa.string()),
    ("mask_height_px", pa.int32()),
    ("mask_width_px", pa.int32()),
    ("confidence", pa.float32()),
    ("low_margin_share", pa.float32()),
)

FRAME_COLUMNS = pa.schema([*_FROM_MANIFEST, *_OF_FRAME])
"""Of `frames/`, whatever its classes."""


def frames_schema(class_set: ClassSet, carried: pa.Schema | None = None) -> pa.Schema:
    """Returns the schema of `frames/`, with a catalogue's own columns at the end.

    Raises:
        ValueError: a carried column has the name of one of ours, be it in other letters (SQL knows no case).
    """
    pixels = [(f"pixels_{name}", pa.int64()) for name in class_set.names]
    confidences = [(f"confidence_{name}", pa.float32()) for name in class_set.names]
    ours = pa.schema([*FRAME_COLUMNS, *pixels, *confidences])
    names = {name.lower() for name in ours.names}
    for column in carried or ():
        if column.name.lower() in names:
            raise ValueError(
                f"the catalogue's column {column.name!r} has the name of a column of the output; give it another"
            )
        names.add(column.name.lower())
    return pa.schema([*ours, *(carried or ())])


def statistics_schema() -> pa.Schema:
    """Returns the schema of `class_statistics.parquet`."""
    return pa.schema(
        [
            ("sequence", pa.string()),
            ("camera", pa.string()),
            ("class_id", pa.int32()),
            ("class_name", pa.string()),
            ("frames", pa.int64()),
            ("frames_with_class", pa.int64()),
            ("pixels", pa.int64()),
            ("share", pa.float64()),
            ("confidence", pa.float64()),
        ]
    )


def result_table(manifest_rows: pa.Table, labels: ChunkLabels, class_set: ClassSet) -> pa.Table:
    """Returns the rows of a chunk: `frames_schema` of the class set and the manifest's carried columns."""
    ok_N = _checked(labels, len(manifest_rows), class_set.n_classes)
    schema = frames_schema(class_set, carried_schema(manifest_rows.schema))
    where_ok = [labels.mask_encoding if ok else None for ok in ok_N]
    columns: dict[str, Any] = {
        "height_px": labels.height_px,
        "width_px": labels.width_px,
        "status": ["ok" if ok else "rejected" for ok in ok_N],
        "reason": labels.reason,
        "error": [None if ok else error for ok, error in zip(ok_N, labels.error, strict=True)],
        "mask": _where(ok_N, labels.mask),
        "mask_encoding": where_ok,
        "mask_height_px": _where(ok_N, labels.mask_height_px),
        "mask_width_px": _where(ok_N, labels.mask_width_px),
        "confidence": _numbers(labels.confidence_N, pa.float32(), ok_N),
        "low_margin_share": _numbers(labels.low_margin_share_N, pa.float32(), ok_N),
    }
    for k, name in enumerate(class_set.names):
        has_class_N = ok_N & (labels.pixels_NK[:, k] > 0)
        columns[f"pixels_{name}"] = _numbers(labels.pixels_NK[:, k], pa.int64(), ok_N)
        columns[f"confidence_{name}"] = _numbers(labels.class_confidence_NK[:, k], pa.float32(), has_class_N)
    arrays = [
        pa.array(columns[column.name], column.type)
        if column.name in columns
        else manifest_rows[column.name].combine_chunks()
        for column in schema
    ]
    return pa.Table.from_arrays(arrays, schema=schema)


def _where(ok_N: np.ndarray, values: Sequence[Any]) -> list[Any]:
    return [value if ok else None for ok, value in zip(ok_N, values, strict=True)]


def _numbers(values_N: np.ndarray, dtype: pa.DataType, valid_N: np.ndarray) -> pa.Array:
    return pa.array(np.ascontiguousarray(values_N), dtype, mask=~valid_N)


def _checked(labels: ChunkLabels, n_frames: int, n_classes: int) -> np.ndarray:
    """Returns which frames are labelled, having asserted what holds of every row."""
    assert len(labels.reason) == n_frames, f"labels of {len(labels.reason)} frames for {n_frames} rows of the manifest"
    assert labels.pixels_NK.shape == labels.class_confidence_NK.shape == (n_frames, n_classes)
    unknown = {reason for reason in labels.reason if reason is not None} - set(REASONS)
    assert not unknown, f"no such reason: {unknown}"
    for n in (index for index, reason in enumerate(labels.reason) if reason is None):
        height_px, width_px, pixels = labels.mask_height_px[n], labels.mask_width_px[n], labels.pixels_NK[n].sum()
        assert labels.mask[n] is not None and height_px is not None and width_px is not None
        assert pixels == height_px * width_px, f"{pixels} pixels counted in a mask of {height_px} x {width_px}"
    return np.array([reason is None for reason in labels.reason], bool)


DIGESTS_KEY = "unet_ray.column_digests"
"""In a published file's footer: `column_digests` of each row group, as JSON (earlier versions wrote none)."""


def unproved_columns(class_set: ClassSet) -> list[str]:
    """Returns the columns of a label whose values nothing else in a row proves."""
    confidences = (f"confidence_{name}" for name in class_set.names)
    return ["height_px", "width_px", "confidence", "low_margin_share", *confidences]


def column_digests(rows: pa.Table, names: Iterable[str]) -> dict[str, str]:
    """Returns a digest of the values of each of some columns of numbers, by its name."""
    columns = {name: rows[name].to_numpy(zero_copy_only=False).astype("<f8") for name in names}  # null: NaN
    return {name: storage.sha256(np.nan_to_num(column, nan=-1).tobytes())[:16] for name, column in columns.items()}


@dataclass(kw_only=True, eq=False)
class _Sums:
    """Of one sequence and camera."""

    n_classes: int
    frames: int = 0
    frames_with_class_K: np.ndarray = field(init=False)
    pixels_K: np.ndarray = field(init=False)
    confidence_K: np.ndarray = field(init=False)
    """Sum over the pixels, float64."""

    def __post_init__(self) -> None:
        self.frames_with_class_K = np.zeros(self.n_classes, np.int64)
        self.pixels_K = np.zeros(self.n_classes, np.int64)
        self.confidence_K = np.zeros(self.n_classes, np.float64)


def statistics_columns(class_set: ClassSet) -> list[str]:
    """Returns the columns of `frames/` that `class_statistics` looks at."""
    names = class_set.names
    return ["sequence", "camera", "status", *(f"pixels_{n}" for n in names), *(f"confidence_{n}" for n in names)]


def class_statistics(tables: Iterable[pa.Table | pa.RecordBatch], class_set: ClassSet) -> pa.Table:
    """Returns `class_statistics.parquet` of the rows of `frames/`, given piece by piece in order.

    The same as SQL gives (and a test compares): `frames` count(*), `frames_with_class` count_if(pixels > 0), `pixels`
    sum(pixels), `confidence` sum(confidence * pixels) / sum(pixels), where status = 'ok', by sequence and camera.
    """
    of_drive: dict[tuple[str, str], _Sums] = {}
    for table in tables:
        rows = table.select(statistics_columns(class_set))
        rows = rows.filter(pc.equal(rows["status"], "ok"))
        for drive, part in _by_drive(rows):
            sums = of_drive.setdefault(drive, _Sums(n_classes=class_set.n_classes))
            pixels_NK = _matrix(part, [f"pixels_{name}" for name in class_set.names], np.int64)
            confidence_NK = _matrix(part, [f"confidence_{name}" for name in class_set.names], np.float64)
            sums.frames += len(pixels_NK)
            sums.frames_with_class_K += (pixels_NK > 0).sum(axis=0)
            sums.pixels_K += pixels_NK.sum(axis=0)
            sums.confidence_K += (confidence_NK * pixels_NK).sum(axis=0)
    rows_of_table = [row for drive, sums in of_drive.items() for row in _statistics_rows(drive, sums, class_set)]
    return pa.Table.from_pylist(rows_of_table, schema=statistics_schema())


def _by_drive(rows: pa.Table | pa.RecordBatch) -> Iterator[tuple[tuple[str, str], pa.Table | pa.RecordBatch]]:
    """Splits rows where sequence or camera change; in the manifest's order each pair is one run."""
    drives = list(zip(rows["sequence"].to_pylist(), rows["camera"].to_pylist(), strict=True))
    starts = [n for n, drive in enumerate(drives) if n == 0 or drive != drives[n - 1]]
    for start, end in pairwise([*starts, len(drives)]):
        yield drives[start], rows.slice(start, end - start)


def _matrix(rows: pa.Table | pa.RecordBatch, names: Sequence[str], dtype: type) -> np.ndarray:
    columns = [pc.fill_null(rows[name], 0).to_numpy(zero_copy_only=False) for name in names]
    return np.stack(columns, axis=1).astype(dtype)


def _statistics_rows(drive: tuple[str, str], sums: _Sums, class_set: ClassSet) -> Iterator[dict[str, Any]]:
    n_pixels = int(sums.pixels_K.sum())
    for k, name in enumerate(class_set.names):
        pixels = int(sums.pixels_K[k])
        yield {
            "sequence": drive[0],
            "camera": drive[1],
            "class_id": k,
            "class_name": name,
            "frames": sums.frames,
            "frames_with_class": int(sums.frames_with_class_K[k]),
            "pixels": pixels,
            "share": pixels / n_pixels if n_pixels else 0.0,
            "confidence": float(sums.confidence_K[k]) / pixels if pixels else None,
        }
