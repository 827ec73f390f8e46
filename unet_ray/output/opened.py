"""A finished output of `segment` to look at: all frames in the manifest's order, one by its id, or some by a condition.

Shapes: `H` height px, `W` width px, `C` colour (red, green, blue).

>>> labels = unet_ray.open_labels("labels")
>>> labels["drive07/000001.png"].overlay().save("look.png")
>>> for frame in labels.where("pixels_pedestrian > 0"): ...

Of `frames/`, footers and one row group's columns without masks are in memory at a time, and 64 masks once one is asked
for. The index is the smallest and the largest id of each row group, from the footers.
"""

from __future__ import annotations

import difflib
import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from unet_ray import storage
from unet_ray.archives.reading import FrameGone, read_frames
from unet_ray.classes import ClassSet
from unet_ray.digests import content_digest
from unet_ray.drawing import overlays
from unet_ray.messages import count, shown_path
from unet_ray.options.config_types import AnyPath
from unet_ray.output import expressions, labels, ledger, manifest, plans, publish
from unet_ray.output import rows as results
from unet_ray.output.masks import MASK_COLUMNS, mask_of
from unet_ray.output.plans import Plan
from unet_ray.output.tables import read_parquet
from unet_ray.pixels import images

_MASKS_AT_ONCE = 64
_BUFFER_BYTES = 2**23  # of a column while its masks are read, as in `masks`

_SHOWN_FRAMES = 8
"""Of a view, in a notebook."""

_GROUPS_SEARCHED = 4
"""Row groups in which an id like one that is not there is looked for."""


def open_labels(uri: AnyPath) -> Labels:
    """Opens a finished output of `segment`, of this or an earlier version; local or at any URI.

    The options of a store come from the environment.

    Raises:
        ValueError: no output, or one that is not finished: how far it is.
        JobFailed: its plan is damaged.
        StorageError: the store did not answer.
    """
    out = storage.resolve(os.fspath(uri))
    plan = plans.read_plan(out)
    summary = publish.finished_summary(plan)
    if summary is None:
        n_done, _ = ledger.done_so_far(plan)
        raise ValueError(
            f"{shown_path(out)} is not finished: {n_done:,} of {count(plan.n_frames, 'frame')} are done; run segment "
            "again, then open it"
        )
    files = [file["path"] for file in summary["files"] if ledger.is_shard(file)]
    return Labels(_Output(plan, tuple(storage.join(out, path) for path in files), summary))


@dataclass(frozen=True, kw_only=True)
class RowGroup:
    """A row group of a file of `frames/`."""

    uri: str
    number: int
    """Within the file."""
    start: int
    """Place in the output of its first row."""
    n_rows: int
    ids: tuple[str, str] | None
    """The smallest and the largest id; None where the footer does not say them."""

    def may_hold(self, frame_id: str) -> bool:
        """Whether a frame may be among its rows."""
        return self.ids is None or self.ids[0] <= frame_id <= self.ids[1]


_Reader = Callable[[Sequence[str]], pa.Table]
"""Columns of a row group, by their names and in that order."""


def _read_columns(file: pq.ParquetFile, group: RowGroup, columns: Sequence[str]) -> pa.Table:
    with labels.naming(group.uri):
        return file.read_row_group(group.number, columns=list(columns)).select(list(columns))


class _Output:
    """The files of an output, and what is read of them."""

    def __init__(self, plan: Plan, uris: Sequence[str], summary: Mapping[str, Any]) -> None:
        self.plan, self.uris, self.summary = plan, uris, summary
        self.class_set: ClassSet = plan.lineage.class_set
        schema = results.frames_schema(self.class_set, plan.carried, plan.lineage.result_version)
        self.schema = pa.schema([column for column in schema if column.name != "mask"])
        self._chunk_starts = np.cumsum([0, *(chunk.n_rows for chunk in plan.chunks)])
        self._masks: tuple[RowGroup, Iterator[pa.RecordBatch]] | None = None
        self._batch, self._batch_start = pa.RecordBatch.from_pylist([]), 0

    @functools.cached_property
    def groups(self) -> tuple[RowGroup, ...]:
        """All row groups, in order."""
        groups: list[RowGroup] = []
        start = 0
        for uri in self.uris:
            with labels.opened(uri) as file:
                for number in range(file.num_row_groups):
                    n_rows = file.metadata.row_group(number).num_rows
                    ids = _ids_of(file.metadata.row_group(number))
                    groups.append(RowGroup(uri=uri, number=number, start=start, n_rows=n_rows, ids=ids))
                    start += n_rows
        return tuple(groups)

    def readers(self, groups: Sequence[RowGroup]) -> Iterator[tuple[RowGroup, _Reader]]:
        """Yields row groups, and with each what reads columns of it until the next one comes."""
        for uri, of_file in groupby(groups, lambda group: group.uri):
            with labels.opened(uri) as file:
                for group in of_file:
                    yield group, functools.partial(_read_columns, file, group)

    def mask(self, group: RowGroup, row: int) -> np.ndarray:
        """Returns a mask; the next ones of its row group are read on from there."""
        if self._masks is None or self._masks[0] != group or row < self._batch_start:
            self._masks = group, self._mask_batches(group)
            self._batch, self._batch_start = next(self._masks[1]), 0
        while row >= self._batch_start + len(self._batch):
            self._batch_start += len(self._batch)
            self._batch = next(self._masks[1])
        (mask_row,) = self._batch.slice(row - self._batch_start, 1).to_pylist()
        return mask_of(mask_row)

    def _mask_batches(self, group: RowGroup) -> Iterator[pa.RecordBatch]:
        with labels.opened(group.uri, buffer_size=_BUFFER_BYTES, pre_buffer=False) as file:
            yield from file.iter_batches(_MASKS_AT_ONCE, row_groups=[group.number], columns=list(MASK_COLUMNS))

    def content(self, index: int) -> bytes | FrameGone:
        """Reads a frame again where the manifest says that it lies."""
        number = int(np.searchsorted(self._chunk_starts, index, side="right")) - 1
        rows = manifest.read_rows(self.plan.chunks[number])
        return next(read_frames(rows.slice(index - int(self._chunk_starts[number]), 1)))


def _require_condition(condition: pc.Expression, schema: pa.Schema) -> None:
    """Raises ValueError, in one line, where an expression does not say yes or no of rows with such columns."""
    try:
        schema.empty_table().filter(condition)
    except pa.ArrowException as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"the condition {condition} does not fit the output's columns: {reason}") from error


def _ids_of(row_group: pq.RowGroupMetaData) -> tuple[str, str] | None:
    columns = (row_group.column(number) for number in range(row_group.num_columns))
    statistics = next(column.statistics for column in columns if column.path_in_schema == "frame_id")
    return (statistics.min, statistics.max) if statistics is not None and statistics.has_min_max else None


class LabelledFrame(Mapping[str, Any]):
    """A row of an output: its columns by name, but the mask, which is read when it is asked for."""

    def __init__(self, output: _Output, group: RowGroup, row: int, columns: pa.Table, index: int) -> None:
        self._output, self._group, self._row = output, group, row
        self._columns, self._index = columns, index

    def __getitem__(self, column: str) -> Any:
        if column not in self._columns.column_names:
            close = difflib.get_close_matches(column, self._columns.column_names, n=1)
            raise KeyError(f"no column {column!r}" + (f"; perhaps you meant {close[0]!r}" if close else ""))
        return self._columns[column][self._index].as_py()

    def __iter__(self) -> Iterator[str]:
        return iter(self._columns.column_names)

    def __len__(self) -> int:
        return self._columns.num_columns

    @property
    def frame_id(self) -> str:
        """Path relative to the archive's root."""
        return self["frame_id"]

    @property
    def confidence(self) -> float | None:
        """Mean over the pixels of the largest class probability; None where rejected, or where there is none."""
        return self["confidence"]

    @property
    def class_pixels(self) -> dict[str, int]:
        """Pixels of each class in the mask; 0 where rejected."""
        return {name: self[f"pixels_{name}"] or 0 for name in self._output.class_set.names}

    @property
    def mask(self) -> np.ndarray:
        """Class ids, uint8 [H, W]; it may be read-only. Raises ValueError where the frame was rejected."""
        if self["status"] != "ok":
            raise ValueError(f"{self.frame_id} was rejected as {self['reason']}, so it has no mask: {self['error']}")
        return self._output.mask(self._group, self._row)

    def image(self) -> Image.Image:
        """Reads the frame again from its archive.

        Raises:
            ValueError: it is gone, has changed since it was labelled, or is no image that is read.
            StorageError: the store did not answer, or this machine does not see the archive.
        """
        content = self._output.content(self._group.start + self._row)
        if isinstance(content, FrameGone):
            raise ValueError(f"{self.frame_id}: {content.error}")
        digest = self.get("content_digest")
        if digest is not None and content_digest(content) != digest:
            raise ValueError(f"{self.frame_id}: {self['uri']} holds other bytes than those that were labelled")
        return Image.fromarray(images.decode_frame(content, max_pixels=10**9))

    def overlay(self) -> Image.Image:
        """Returns the frame with the mask over it, in the frame's size. Raises as `image` and `mask`."""
        mask_HW = self.mask
        return Image.fromarray(overlays.overlay(np.asarray(self.image()), mask_HW, self._output.class_set))

    def __repr__(self) -> str:
        what = f"rejected as {self['reason']}" if self["status"] != "ok" else f"confidence {self.confidence or 0:.2f}"
        return f"LabelledFrame({self.frame_id!r}: {what})"

    def _repr_png_(self) -> bytes | None:
        return None if self["status"] != "ok" else overlays.png_to_show(np.asarray(self.overlay()))


class Labels:
    """The frames of an output, or those that a condition meets; see `open_labels`."""

    def __init__(
        self, output: _Output, condition: pc.Expression | None = None, condition_columns: Sequence[str] | None = ()
    ) -> None:
        self._output, self._condition = output, condition
        self._condition_columns = output.schema.names if condition_columns is None else condition_columns

    @property
    def uri(self) -> str:
        """The output's folder."""
        return self._output.plan.out

    @property
    def class_set(self) -> ClassSet:
        """What the ids of a mask mean."""
        return self._output.class_set

    def where(self, condition: str | pc.Expression) -> Labels:
        """Returns a view of the frames that meet a condition, of the same kind as this.

        Args:
            condition: a text in the manner of SQL (`output.expressions`), such as `pixels_pedestrian > 0`; or an
                expression of pyarrow, `pc.field("pixels_pedestrian") > 0`.

        Raises:
            ValueError: one line: a text that is none, a column that is not there.
        """
        columns: Sequence[str] | None = None  # pyarrow does not say which ones an expression looks at
        if isinstance(condition, str):
            text = condition
            condition = expressions.parse_expression(text, self._output.schema)
            columns = expressions.column_names(text, self._output.schema)
        else:
            _require_condition(condition, self._output.schema)
        if self._condition is not None:
            condition = self._condition & condition
            columns = None if columns is None else sorted({*columns, *self._condition_columns})
        return Labels(self._output, condition, columns)

    def __len__(self) -> int:
        return self._output.summary["listed"] if self._condition is None else self._n_matching

    @functools.cached_property
    def _n_matching(self) -> int:
        return sum(len(rows) for _, _, rows in self._matching(self._output.groups))

    def __iter__(self) -> Iterator[LabelledFrame]:
        for group, rows, table in self._tables(self._output.schema.names):
            for index, row in enumerate(rows):
                yield LabelledFrame(self._output, group, row, table, index)

    def _matching(self, groups: Sequence[RowGroup]) -> Iterator[tuple[RowGroup, _Reader, Sequence[int]]]:
        """Yields row groups, what reads them, and which of their rows are meant, where any is."""
        for group, read in self._output.readers(groups):
            rows: Sequence[int] = range(group.n_rows)
            if self._condition is not None:
                table = read(self._condition_columns or ["frame_id"])
                numbered = table.append_column(_ROW, pa.array(rows, pa.int64()))
                rows = numbered.filter(self._condition)[_ROW].to_pylist()
            if len(rows):
                yield group, read, rows

    def _tables(
        self, columns: Sequence[str], groups: Sequence[RowGroup] | None = None
    ) -> Iterator[tuple[RowGroup, Sequence[int], pa.Table]]:
        """Yields, of each row group, the rows that are meant and some columns of them."""
        for group, read, rows in self._matching(self._output.groups if groups is None else groups):
            table = read(columns)
            yield group, rows, table if len(rows) == group.n_rows else table.take(pa.array(rows))

    def __getitem__(self, frame_id: str) -> LabelledFrame:
        if not isinstance(frame_id, str):
            raise TypeError(f"a frame is looked up by its id, a text, not by {frame_id!r}; iterate for the first ones")
        if (frame := self._find(frame_id)) is None:
            close = difflib.get_close_matches(frame_id, self._ids_near(frame_id), n=1, cutoff=0.5)
            raise KeyError(f"no frame {frame_id!r} here" + (f"; perhaps you meant {close[0]!r}" if close else ""))
        return frame

    def __contains__(self, frame_id: object) -> bool:
        return isinstance(frame_id, str) and self._find(frame_id) is not None

    def _find(self, frame_id: str) -> LabelledFrame | None:
        for group, read, rows in self._matching([group for group in self._output.groups if group.may_hold(frame_id)]):
            row = pc.index(read(["frame_id"])["frame_id"], frame_id).as_py()
            if row in rows:
                return LabelledFrame(self._output, group, row, read(self._output.schema.names).take([row]), 0)
        return None

    def _ids_near(self, frame_id: str) -> list[str]:
        """The ids of the row groups whose ids are most like one."""
        groups = sorted(
            self._output.groups,
            key=lambda group: (group.may_hold(frame_id), max(_n_alike(frame_id, other) for other in group.ids or [""])),
        )
        tables = self._tables(["frame_id"], groups[-_GROUPS_SEARCHED:])
        return [frame_id for _, _, table in tables for frame_id in table["frame_id"].to_pylist()]

    @property
    def frames(self) -> pa.Table:
        """All rows without their masks, as an Arrow table; of a view its own."""
        tables = [table for _, _, table in self._tables(self._output.schema.names)]
        return pa.concat_tables([self._output.schema.empty_table(), *tables])

    @property
    def statistics(self) -> pa.Table:
        """Frames, pixels, share and mean confidence by sequence, camera and class, as an Arrow table; of a view its
        own."""
        if self._condition is None:
            uri = storage.join(self.uri, ledger.STATISTICS)
            with labels.naming(uri):
                return read_parquet(storage.read_bytes(uri)).replace_schema_metadata()
        columns = results.statistics_columns(self.class_set)
        return results.class_statistics((table for _, _, table in self._tables(columns)), self.class_set)

    def __repr__(self) -> str:
        what = "" if self._condition is None else f" where {self._condition}"
        return f"Labels({shown_path(self.uri)!r}: {count(len(self), 'frame')}{what})"

    def _repr_png_(self) -> bytes | None:
        """The output's preview; of a view a few frames, spread over it."""
        if self._condition is None:
            try:
                return storage.read_bytes(storage.join(self.uri, "preview.png"))
            except FileNotFoundError:
                return None
        pictures = [picture for frame in self._spread(_SHOWN_FRAMES) if (picture := _overlay_of(frame)) is not None]
        return overlays.png_to_show(overlays.sheet(pictures)) if pictures else None

    def _spread(self, n_frames: int) -> Iterator[LabelledFrame]:
        """Yields frames at about equal steps; of row groups without any, only the condition's columns are read."""
        steps = np.linspace(0, len(self) - 1, n_frames).astype(int).tolist() if len(self) else []
        start = 0
        for group, read, rows in self._matching(self._output.groups):
            chosen = [rows[step - start] for step in dict.fromkeys(steps) if start <= step < start + len(rows)]
            start += len(rows)
            if chosen:
                table = read(self._output.schema.names).take(pa.array(chosen))
                for index, row in enumerate(chosen):
                    yield LabelledFrame(self._output, group, row, table, index)


def _overlay_of(frame: LabelledFrame) -> np.ndarray | None:
    """A frame with its mask, uint8 [H, W, 3]; None where it is rejected, or its archive is gone."""
    try:
        return np.asarray(frame.overlay()) if frame["status"] == "ok" else None
    except (ValueError, OSError):  # a picture to look at does without
        return None


def _n_alike(one: str, other: str) -> int:
    """Letters at the beginning that two texts share."""
    pairs = zip(one, other, strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


_ROW = "\0row"
"""Name of a column that no output has."""
