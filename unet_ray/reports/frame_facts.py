"""What the columns of `frames/` say of every frame: read once, a row group at a time, and never a mask.

Shapes: `N` frames, `D` drives, `K` classes, `R` rare classes.

What is kept of a frame is 20 bytes and 4 for each rare class, so that a million of them fit into 50 MB.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from unet_ray.classes import ClassSet
from unet_ray.output import labels
from unet_ray.reports.statistics import Drive, Statistics, shares
from unet_ray.reports.strips import Strip

EXAMPLES = 3
"""Rejected frames that are named of each reason."""

_NO_DRIVE = -1  # of a frame whose drive has no label


@dataclass(frozen=True, kw_only=True)
class RejectedExample:
    """A rejected frame."""

    frame_id: str
    error: str


@dataclass(frozen=True, kw_only=True, eq=False)
class FrameFacts:
    """Of every frame, in the order of the rows; NaN where there is no number."""

    drive_N: np.ndarray
    """Place of its drive in the statistics, int32; -1 where no frame of the drive is labelled."""
    expected_error_N: np.ndarray
    """1 - confidence, float32."""
    has_expected_error: bool
    """Whether the rows have that column: earlier versions wrote the confidence alone."""
    changed_N: np.ndarray
    """`changed_share`, float32; all NaN in outputs of versions that had none."""
    unlikeness_N: np.ndarray
    """Share of pixels that would have to be of other classes for the shares of all frames, float32."""
    rare_NR: np.ndarray
    """Pixels of the rare classes, float32."""
    strips: Mapping[int, Strip]
    """Of the drives that were asked for."""
    examples: Mapping[str, Sequence[RejectedExample]]
    """A few rejected frames by reason."""
    group_rows: Sequence[tuple[str, Sequence[int]]]
    """Each file of `frames/` and the rows of its row groups."""


@dataclass(kw_only=True, eq=False)
class _Columns:
    """What was read so far."""

    statistics: Statistics
    class_set: ClassSet
    rare: Sequence[int]
    strips: dict[int, Strip]
    drives: dict[Drive, int]
    parts: dict[str, list[np.ndarray]] = field(default_factory=dict)

    def add(self, rows: pa.Table) -> None:
        """Takes the rows of a row group."""
        labelled_N = pc.equal(rows["status"], "ok").to_numpy()
        drive_N = self._drives(rows)
        confidence_N = _floats(rows, "confidence")
        pixels_NK = np.stack(
            [pc.fill_null(rows[f"pixels_{name}"], 0).to_numpy() for name in self.class_set.names], axis=1
        )
        shares_NK = shares(pixels_NK)
        unlikeness_N = np.abs(shares_NK - self.statistics.shares_K).sum(axis=1) / 2
        values = {
            "drive": drive_N,
            "expected_error": np.where(labelled_N, 1 - confidence_N, np.nan).astype(np.float32),
            "changed": _floats(rows, "changed_share").astype(np.float32),
            "unlikeness": np.where(labelled_N, unlikeness_N, np.nan).astype(np.float32),
            "rare": np.where(labelled_N[:, None], pixels_NK[:, list(self.rare)], np.nan).astype(np.float32),
        }
        for name, value in values.items():
            self.parts.setdefault(name, []).append(value)
        for drive in np.unique(drive_N).tolist():
            if (strip := self.strips.get(drive)) is not None:
                of_drive = drive_N == drive
                strip.add(labelled_N[of_drive], shares_NK[of_drive], confidence_N[of_drive])

    def _drives(self, rows: pa.Table) -> np.ndarray:
        codes = [rows[name].combine_chunks().dictionary_encode() for name in ("sequence", "camera")]
        sequences, cameras = (code.dictionary.to_pylist() for code in codes)
        pair_N = codes[0].indices.to_numpy().astype(np.int64) * len(cameras) + codes[1].indices.to_numpy()
        pairs, inverse_N = np.unique(pair_N, return_inverse=True)
        drives = [Drive(sequences[pair // len(cameras)], cameras[pair % len(cameras)]) for pair in pairs.tolist()]
        places = [self.drives.get(drive, _NO_DRIVE) for drive in drives]
        return np.array(places, np.int32)[inverse_N]


def read_frame_facts(
    uris: Sequence[str],
    statistics: Statistics,
    class_set: ClassSet,
    *,
    rare: Sequence[int] = (),
    strip_drives: Sequence[int] = (),
) -> FrameFacts:
    """Reads the columns that the page is made of.

    Args:
        uris: the files of `frames/` in their order.
        statistics: of the same output.
        class_set: of the output.
        rare: the classes whose pixels are kept of every frame.
        strip_drives: places of the drives that are shown over time.

    Raises:
        JobFailed: a file is damaged or gone.
        StorageError: storage did not answer.
    """
    columns = _Columns(
        statistics=statistics,
        class_set=class_set,
        rare=rare,
        strips={n: Strip(int(statistics.frames_D[n]), class_set.n_classes) for n in strip_drives},
        drives={drive: n for n, drive in enumerate(statistics.drives)},
    )
    examples: dict[str, list[RejectedExample]] = {}
    group_rows, has_expected_error = [], True
    for uri in uris:
        with labels.opened(uri) as file:
            names = _names(file.schema_arrow, class_set)
            has_expected_error &= file.schema_arrow.get_field_index("expected_error_share") >= 0
            sizes = []
            for group in range(file.num_row_groups):
                rows = file.read_row_group(group, columns=names)
                sizes.append(len(rows))
                columns.add(rows)
                _add_examples(examples, file, group, rows["reason"])
            group_rows.append((uri, sizes))
    return _facts(columns, has_expected_error, examples, group_rows)


def _names(schema: pa.Schema, class_set: ClassSet) -> list[str]:
    """Returns the columns to read of a file: what its version has."""
    wanted = ("sequence", "camera", "status", "reason", "confidence", "changed_share")
    return [
        *(name for name in wanted if schema.get_field_index(name) >= 0),
        *(f"pixels_{name}" for name in class_set.names),
    ]


def _floats(rows: pa.Table, name: str) -> np.ndarray:
    """Returns a column as float64, NaN where it is null or not there."""
    if name not in rows.column_names:
        return np.full(len(rows), np.nan)
    return rows[name].to_numpy(zero_copy_only=False).astype(np.float64)


def _add_examples(
    examples: dict[str, list[RejectedExample]], file: pq.ParquetFile, group: int, reasons: pa.ChunkedArray
) -> None:
    """Names the first rejected frames of each reason; most row groups are read no second time for that."""
    if reasons.null_count == len(reasons):
        return
    present = pc.unique(reasons).drop_null().to_pylist()
    wanted = [reason for reason in present if len(examples.get(reason, ())) < EXAMPLES]
    if not wanted:
        return
    named = file.read_row_group(group, columns=["frame_id", "reason", "error"])
    for reason, frame_id, error in _rejected(named.filter(pc.is_in(named["reason"], value_set=pa.array(wanted)))):
        of_reason = examples.setdefault(reason, [])
        if len(of_reason) < EXAMPLES:
            of_reason.append(RejectedExample(frame_id=frame_id, error=error or ""))


def _rejected(rows: pa.Table) -> Iterator[tuple[str, str, str | None]]:
    yield from zip(*(rows[name].to_pylist() for name in ("reason", "frame_id", "error")), strict=True)


def _facts(
    columns: _Columns,
    has_expected_error: bool,
    examples: Mapping[str, Sequence[RejectedExample]],
    group_rows: Sequence[tuple[str, Sequence[int]]],
) -> FrameFacts:
    whole = {name: np.concatenate(parts) for name, parts in columns.parts.items()}
    return FrameFacts(
        drive_N=whole["drive"],
        expected_error_N=whole["expected_error"],
        has_expected_error=has_expected_error,
        changed_N=whole["changed"],
        unlikeness_N=whole["unlikeness"],
        rare_NR=whole["rare"],
        strips=columns.strips,
        examples=examples,
        group_rows=group_rows,
    )
