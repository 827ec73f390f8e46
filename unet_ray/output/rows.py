"""The row of one frame, the row of one class in a drive, and the schemas of both tables.

Shapes: `N` frames of a chunk, `K` classes; `h`, `w` the network's grid.

`frames/*.parquet`, one row a listed frame, as `columns.COLUMNS` has it:

| column | type | |
|---|---|---|
| `frame_id` | string | path relative to the archive's root; inside a tar `drive07.tar!cam0/000001.png` |
| `uri` | string | the file, or the archive that holds the frame |
| `sequence`, `camera` | string | the drive and its camera |
| `frame_index`, `timestamp_ns` | int64 | place and time within the drive; null if the name does not say |
| `height_px`, `width_px` | int32 | size of the frame |
| `content_digest` | string | XXH3 (64 bits) of the frame's bytes, 16 hex digits; null if they could not be read |
| `status` | string | `ok` or `rejected` |
| `reason`, `error` | string | why it is rejected, such as `truncated`; in words, or that a label was kept from damage |
| `mask` | binary | the mask; this and all below are null if rejected |
| `mask_encoding` | string | `png` (8-bit palette, index = class id) or `raw` (uint8 rows) |
| `mask_height_px`, `mask_width_px` | int32 | size of the mask |
| `confidence`, `expected_error_share` | float32 | mean over the pixels of the largest class probability, and 1 - that |
| `low_margin_share` | float32 | share of pixels whose two best classes lie within 0.2 |
| `changed_share`, `changed_share_<class>` | float32 | share of grid points labelled otherwise than the frame before |
| `pixels_<class>` | int64 | pixels of the class in the mask |
| `confidence_<class>` | float32 | mean probability over the class's pixels; null if it has none |

and a catalogue's own columns.

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

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from unet_ray import storage
from unet_ray.classes import ClassSet
from unet_ray.frames import carried_schema
from unet_ray.output import columns
from unet_ray.output.neighbours import Borders, figures_of

FORMAT_VERSION = 1
"""Of the tables' layout; in every file's footer."""

RESULT_VERSION = 5
"""Raised when what a row holds of the same frame and model can change; part of every chunk's key."""

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
    content_digest: Sequence[str | None]
    """Of the frame's bytes; None where they could not be read."""
    mask: Sequence[bytes | None]
    mask_encoding: str
    mask_height_px: Sequence[int | None]
    mask_width_px: Sequence[int | None]
    grids: Sequence[np.ndarray | None]
    """Class ids on the network's grid, uint8 [h, w] each, None where rejected; empty where the rows, which are tried
    again, are no neighbours of each other."""
    figures: Mapping[str, np.ndarray]
    """Those of `columns.MEASURED`, by name: [N], or [N, K] by class; NaN where there is none."""


FRAME_COLUMNS = pa.schema([(name, column.type) for column, name in columns.fields((), 1)])
"""Of `frames/`, whatever its classes and the version that wrote it."""


def frames_schema(
    class_set: ClassSet, carried: pa.Schema | None = None, result_version: int = RESULT_VERSION
) -> pa.Schema:
    """Returns the schema of `frames/` as a version writes it, with a catalogue's own columns at the end.

    Raises:
        ValueError: a carried column has the name of one of ours, be it in other letters (SQL knows no case).
    """
    ours = pa.schema([(name, column.type) for column, name in columns.fields(class_set.names, result_version)])
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
    arrays: dict[str, Any] = {
        "height_px": labels.height_px,
        "width_px": labels.width_px,
        "content_digest": labels.content_digest,
        "status": ["ok" if ok else "rejected" for ok in ok_N],
        "reason": labels.reason,
        "error": [None if ok else error for ok, error in zip(ok_N, labels.error, strict=True)],
        "mask": _where(ok_N, labels.mask),
        "mask_encoding": where_ok,
        "mask_height_px": _where(ok_N, labels.mask_height_px),
        "mask_width_px": _where(ok_N, labels.mask_width_px),
    }
    for figure, name, values_N in figures_of(labels.grids, class_set.n_classes, class_set.names):
        values_N = values_N if labels.grids else np.full(len(ok_N), np.nan)
        arrays[name] = _numbers(values_N, figure.type, ok_N)
    for figure, values in columns.with_derived(labels.figures).items():
        for name, values_N in zip(
            figure.names(class_set.names), values.T if figure.by_class else [values], strict=True
        ):
            arrays[name] = _numbers(values_N, figure.type, ok_N)
    table = pa.Table.from_arrays(
        [
            pa.array(arrays[field.name], field.type)
            if field.name in arrays
            else manifest_rows[field.name].combine_chunks()
            for field in schema
        ],
        schema=schema,
    )
    return table.replace_schema_metadata(Borders.of(table, labels.grids).to_footer()) if labels.grids else table


def _where(ok_N: np.ndarray, values: Sequence[Any]) -> list[Any]:
    return [value if ok else None for ok, value in zip(ok_N, values, strict=True)]


def _numbers(values_N: np.ndarray, dtype: pa.DataType, valid_N: np.ndarray) -> pa.Array:
    # NaN is what nobody knows: the confidence of a network that gives class ids alone.
    return pa.array(np.ascontiguousarray(values_N), dtype, mask=~valid_N | np.isnan(values_N))


def _checked(labels: ChunkLabels, n_frames: int, n_classes: int) -> np.ndarray:
    """Returns which frames are labelled, having asserted what holds of every row."""
    assert len(labels.reason) == n_frames, f"labels of {len(labels.reason)} frames for {n_frames} rows of the manifest"
    assert len(labels.grids) in (0, n_frames)
    for figure in columns.MEASURED:
        shape = (n_frames, n_classes) if figure.by_class else (n_frames,)
        assert labels.figures[figure.name].shape == shape, figure.name
    pixels_NK = labels.figures["pixels_<class>"]
    unknown = {reason for reason in labels.reason if reason is not None} - set(REASONS)
    assert not unknown, f"no such reason: {unknown}"
    for n in (index for index, reason in enumerate(labels.reason) if reason is None):
        height_px, width_px, pixels = labels.mask_height_px[n], labels.mask_width_px[n], pixels_NK[n].sum()
        assert labels.mask[n] is not None and height_px is not None and width_px is not None
        assert pixels == height_px * width_px, f"{pixels} pixels counted in a mask of {height_px} x {width_px}"
    return np.array([reason is None for reason in labels.reason], bool)


DIGESTS_KEY = "unet_ray.column_digests"
"""In a published file's footer: `column_digests` of each row group, as JSON (earlier versions wrote none)."""


def unproved_columns(class_set: ClassSet) -> list[str]:
    """Returns the columns of a label whose values nothing else in a row proves."""
    return [name for column, name in columns.fields(class_set.names, RESULT_VERSION) if column.is_unproved]


def column_digests(rows: pa.Table, names: Iterable[str]) -> dict[str, str]:
    """Returns a digest of the values of each of some columns of numbers or texts, by its name."""
    return {name: storage.sha256(_value_bytes(rows[name]))[:16] for name in names}


def _value_bytes(column: pa.ChunkedArray) -> bytes:
    if pa.types.is_string(column.type):
        return "\n".join(value or "" for value in column.to_pylist()).encode()
    return np.nan_to_num(column.to_numpy(zero_copy_only=False).astype("<f8"), nan=-1).tobytes()  # null: NaN


@dataclass(kw_only=True, eq=False)
class _Sums:
    """Of one sequence and camera."""

    n_classes: int
    frames: int = 0
    frames_with_class_K: np.ndarray = field(init=False)
    pixels_K: np.ndarray = field(init=False)
    confidence_K: np.ndarray = field(init=False)
    """Sum over the pixels, float64."""
    has_confidence_K: np.ndarray = field(init=False)
    """Whether any frame has one: a network that gives class ids alone has none."""

    def __post_init__(self) -> None:
        self.frames_with_class_K = np.zeros(self.n_classes, np.int64)
        self.pixels_K = np.zeros(self.n_classes, np.int64)
        self.confidence_K = np.zeros(self.n_classes, np.float64)
        self.has_confidence_K = np.zeros(self.n_classes, bool)


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
            confidences = [f"confidence_{name}" for name in class_set.names]
            confidence_NK = _matrix(part, confidences, np.float64)
            sums.has_confidence_K |= [part[name].null_count < len(part) for name in confidences]
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
    values = [pc.fill_null(rows[name], 0).to_numpy(zero_copy_only=False) for name in names]
    return np.stack(values, axis=1).astype(dtype)


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
            "confidence": float(sums.confidence_K[k]) / pixels if sums.has_confidence_K[k] else None,
        }
