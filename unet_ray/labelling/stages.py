"""The steps that chunks of frames go through, each a pure function of a table: decode, label, write; no Ray here.

Shapes: `N` frames, `H` height px, `W` width px, `C` colour, `K` classes; `h`, `w` the network's input.

Between the steps a table has one row a frame, of one chunk or of several small ones: the columns of the manifest, and
beside them those of a step, whose names begin with `_`. After trouble with storage it has one row a chunk.

| column | after `decode_chunks` | after `label_chunks` |
|---|---|---|
| `_chunk` | the chunk, as JSON | the same |
| `_trouble` | what was said: all must be tried again, and there is no column but the next; else null | the same |
| `_kind` | only beside trouble: of which of `TROUBLES` | the same |
| `_height_px`, `_width_px` | the frame's size, null where it was not found out | the same |
| `_content_digest` | of the frame's bytes, null where they could not be read | the same |
| `_reason`, `_error` | why the frame is rejected, null where it is not | the same |
| `_image` | uint8 RGB of the network's size (or the frame's); null where rejected | gone |
| `_mask`, `_mask_height_px`, `_mask_width_px` | | uint8 rows; null where rejected |
| `_grid`, `_grid_height_px`, `_grid_width_px` | | class ids on the network's grid; null where that is the mask |
| `_` and the name of a figure (`columns.MEASURED`) | | one number, or K by class |
| `_note` | | only where a person should know of something: the same in all rows |
"""

from __future__ import annotations

import dataclasses
import json
import textwrap
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from unet_ray import PACKAGE
from unet_ray.archives.reading import FrameGone, read_frames
from unet_ray.classes import ClassSet
from unet_ray.labelling import decoding
from unet_ray.labelling.decoding import DecodedFrame, DecodeOptions
from unet_ray.model.devices import UnusableGpu
from unet_ray.output import rows as results
from unet_ray.output.chunks import Chunk
from unet_ray.output.columns import MEASURED, Figure
from unet_ray.output.manifest import read_rows
from unet_ray.output.origins import relocate
from unet_ray.output.records import commit
from unet_ray.pixels.mask_png import encode_mask_png
from unet_ray.storage import StorageError, is_local

if TYPE_CHECKING:
    from unet_ray.model.labeler import Labeler

STORAGE_WAITS_S = (1.0, 5.0)
"""Pauses before a disk of this machine is asked again; a store was asked until `--storage-retry-s` were over."""

TROUBLES = ("storage", "refused", "failed", "unusable")
"""Storage does not answer; it refuses for want of rights; a step has failed, so a device or the program is at fault;
TensorFlow cannot use the GPU that Ray gives, so that no frame need be tried."""

_MOST_SAID = 300  # letters of an error that is not storage's: TensorFlow's have pages

T = TypeVar("T")


def decode_chunks(
    chunks: Sequence[Chunk], options: DecodeOptions, *, moved: Mapping[str, str] | None = None, carefully: bool = False
) -> pa.Table:
    """Reads and decodes the frames of some chunks, as if they were one.

    Args:
        chunks: which frames.
        options: how.
        moved: where an archive lies now, by where it lay when it was listed.
        carefully: each frame in a process that it may end, because one of them has ended this one's.
    """
    decode = decoding.decode_carefully if carefully else decoding.decode_here

    def attempt() -> pa.Table:
        rows = pa.concat_tables([read_rows(chunk) for chunk in chunks])
        contents = read_frames(relocate(rows, moved or {}))
        of_rows = [text for chunk in chunks for text in [_to_json(chunk)] * chunk.n_rows]
        return _pack_frames(rows, of_rows, decode(map(_gone_or_bytes, contents), options))

    try:
        return _patiently(attempt)
    except Exception as error:  # noqa: BLE001
        return _trouble_table([_to_json(chunk) for chunk in chunks], error)


def _gone_or_bytes(content: bytes | FrameGone) -> bytes | DecodedFrame:
    return DecodedFrame(reason=content.reason, error=content.error) if isinstance(content, FrameGone) else content


def _patiently(act: Callable[[], T]) -> T:
    """Does it again after a pause where this may help, and where `storage` has not done that itself."""
    for wait_s in STORAGE_WAITS_S:
        try:
            return act()
        except StorageError as error:
            if not is_local(str(error.filename or "")):
                raise
            time.sleep(wait_s)
    return act()


def _pack_frames(rows: pa.Table, chunks: Sequence[str], decoded: Iterable[DecodedFrame]) -> pa.Table:
    """The table after decoding; a frame's pixels are copied once."""
    pixels = _Buffers()
    sizes: list[tuple[int | None, int | None]] = []
    refusals: list[tuple[str | None, str | None]] = []
    digests: list[str | None] = []
    for frame in decoded:
        pixels.append(frame.image)
        sizes.append((frame.height_px, frame.width_px))
        refusals.append((frame.reason, frame.error))
        digests.append(frame.content_digest)
    assert len(sizes) == rows.num_rows, (len(sizes), rows.num_rows)
    return _with_columns(
        rows,
        _chunk=pa.array(chunks, pa.string()),
        _trouble=pa.nulls(rows.num_rows, pa.string()),
        _height_px=pa.array([height_px for height_px, _ in sizes], pa.int32()),
        _width_px=pa.array([width_px for _, width_px in sizes], pa.int32()),
        _content_digest=pa.array(digests, pa.string()),
        _reason=pa.array([reason for reason, _ in refusals], pa.string()),
        _error=pa.array([error for _, error in refusals], pa.string()),
        _image=pixels.to_array(),
    )


def with_trouble(table: pa.Table, error: Exception) -> pa.Table:
    """Returns what chunks are after trouble in a step behind decoding."""
    return table if _has_trouble(table) else _trouble_table(list(dict.fromkeys(table["_chunk"].to_pylist())), error)


def _trouble_table(chunks: Sequence[str], error: Exception) -> pa.Table:
    message, kind = _trouble(error)
    rows = [{"_chunk": chunk, "_trouble": message, "_kind": kind} for chunk in chunks]
    return pa.Table.from_pylist(rows, pa.schema([(name, pa.string()) for name in ("_chunk", "_trouble", "_kind")]))


def _trouble(error: Exception) -> tuple[str, str]:
    """What an error says in one line, and of which of `TROUBLES` it is.

    Every error counts, as one that a task raises would cost its block without a word: Ray is told to drop those, for
    that of the process that a frame has ended is one of them.
    """
    message = " ".join(str(error).split())
    if isinstance(error, PermissionError):
        return message, "refused"
    if isinstance(error, OSError):
        return message, "storage"
    if isinstance(error, UnusableGpu):
        return message, "unusable"
    places = [(Path(frame.filename), frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    path, line = [entry for entry in places if entry[0].is_relative_to(PACKAGE)][-1]
    message = textwrap.shorten(message, _MOST_SAID, placeholder=" …")
    return f"{type(error).__name__} in {path.relative_to(PACKAGE)}:{line}: {message}", "failed"


def _to_json(chunk: Chunk) -> str:
    return json.dumps(dataclasses.asdict(chunk))


def _from_json(text: str) -> Chunk:
    chunk = Chunk(**json.loads(text))
    return chunk if chunk.rows is None else dataclasses.replace(chunk, rows=tuple(chunk.rows))


def _has_trouble(table: pa.Table) -> bool:
    return table["_trouble"][0].is_valid


def label_chunks(table: pa.Table, labeler: Labeler, network_size: tuple[int, int] | None) -> pa.Table:
    """Returns the table with masks and figures in place of pixels.

    Args:
        table: after decoding.
        labeler: the network.
        network_size: (h, w) of the pixels; None where each frame has its own size.
    """
    if _has_trouble(table):
        return table
    sizes = list(zip(table["_height_px"].to_pylist(), table["_width_px"].to_pylist(), strict=True))
    reasons = table["_reason"].to_pylist()
    accepted = [index for index, reason in enumerate(reasons) if reason is None]
    views = [_view(table["_image"], index, (*(network_size or sizes[index]), 3)) for index in accepted]
    masks: list[np.ndarray | None] = [None] * table.num_rows
    grids: list[np.ndarray | None] = [None] * table.num_rows
    figures: dict[str, list[object]] = {figure.name: [None] * table.num_rows for figure in MEASURED}
    if accepted:
        labels = labeler.label(views, [sizes[index] for index in accepted])
        values = {figure.name: of_labels(labels) for figure, of_labels in MEASURED.items()}
        for position, index in enumerate(accepted):
            masks[index] = mask = labels.masks[position]
            grids[index] = None if labels.grids[position] is mask else labels.grids[position]
            for name in figures:
                figures[name][index] = values[name][position]
    note = labeler.note if accepted else None
    return _with_columns(
        table.drop_columns(["_image"]),
        **_packed("_mask", masks),
        **_packed("_grid", grids),
        **{
            f"_{figure.name}": pa.array(figures[figure.name], pa.list_(figure.type) if figure.by_class else figure.type)
            for figure in MEASURED
        },
        **({"_note": pa.array([note] * table.num_rows, pa.string())} if note else {}),
    )


def _packed(name: str, ids: Sequence[np.ndarray | None]) -> dict[str, pa.Array]:
    """Columns of class ids, uint8 [H, W] each, and of their sizes."""
    buffers = _Buffers()
    for ids_HW in ids:
        buffers.append(ids_HW)
    sizes = [(None, None) if ids_HW is None else ids_HW.shape for ids_HW in ids]
    heights, widths = (pa.array([size[axis] for size in sizes], pa.int32()) for axis in (0, 1))
    return {name: buffers.to_array(), f"{name}_height_px": heights, f"{name}_width_px": widths}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChunkOutcome:
    """What became of a chunk, as the driver hears it."""

    chunk_id: str
    n_rows: int
    rejected: Mapping[str, int]
    """Frames by reason."""
    trouble: str | None = None
    """What failed and where; None where the chunk is done."""
    kind: str | None = None
    """Of the trouble, of `TROUBLES`."""
    note: str | None = None
    """What a person should know of how it was labelled."""


def outcomes_of(table: pa.Table) -> list[ChunkOutcome]:
    """Returns what a table of `write_chunks` says."""
    return [ChunkOutcome(**{**row, "rejected": json.loads(row["rejected"])}) for row in table.to_pylist()]


def write_chunks(table: pa.Table, out: str, class_set: ClassSet, mask_encoding: str, writer: str) -> pa.Table:
    """Writes the part of each labelled chunk and then its record, and returns one row a chunk for the driver.

    Returns:
        The fields of `ChunkOutcome`, of which `rejected` is JSON.
    """

    def write(of_chunk: pa.Table) -> dict[str, Any]:
        chunk = _from_json(of_chunk["_chunk"][0].as_py())
        row: dict[str, Any] = {"chunk_id": chunk.chunk_id, "n_rows": chunk.n_rows, "rejected": "{}"}
        if "_note" in of_chunk.column_names:
            row["note"] = of_chunk["_note"][0].as_py()
        if _has_trouble(of_chunk):
            return row | {"trouble": of_chunk["_trouble"][0].as_py(), "kind": of_chunk["_kind"][0].as_py()}
        try:
            rows = of_chunk.select([name for name in of_chunk.column_names if not name.startswith("_")])
            labels = chunk_labels(of_chunk, class_set, mask_encoding, are_neighbours=chunk.rows is None)
            result = results.result_table(rows, labels, class_set)
            record = _patiently(lambda: commit(out, chunk, result, writer=writer))
        except Exception as error:  # noqa: BLE001
            return row | dict(zip(("trouble", "kind"), _trouble(error), strict=True))
        return row | {"rejected": json.dumps(dict(record.rejected))}

    return pa.Table.from_pylist([write(of_chunk) for of_chunk in _by_chunk(table)], schema=_OUTCOME_SCHEMA)


_OUTCOME_SCHEMA = pa.schema(
    [
        ("chunk_id", pa.string()),
        ("n_rows", pa.int64()),
        ("rejected", pa.string()),
        ("trouble", pa.string()),
        ("kind", pa.string()),
        ("note", pa.string()),
    ]
)


def _by_chunk(table: pa.Table) -> Iterator[pa.Table]:
    start = 0
    for end in pc.run_end_encode(table["_chunk"].combine_chunks()).run_ends.to_pylist():
        yield table.slice(start, end - start)
        start = end


def chunk_labels(
    table: pa.Table, class_set: ClassSet, mask_encoding: str, *, are_neighbours: bool
) -> results.ChunkLabels:
    """Returns what became of the frames of a labelled table, with masks encoded; each may be before the next one."""
    heights, widths = table["_mask_height_px"].to_pylist(), table["_mask_width_px"].to_pylist()
    masks: list[bytes | None] = []
    for index, size in enumerate(zip(heights, widths, strict=True)):
        if size[0] is None:
            masks.append(None)
        elif mask_encoding == "raw":
            masks.append(table["_mask"][index].as_py())
        else:
            masks.append(encode_mask_png(_view(table["_mask"], index, size), class_set.palette_K3))
    n_classes = class_set.n_classes
    return results.ChunkLabels(
        reason=table["_reason"].to_pylist(),
        error=table["_error"].to_pylist(),
        height_px=table["_height_px"].to_pylist(),
        width_px=table["_width_px"].to_pylist(),
        content_digest=table["_content_digest"].to_pylist(),
        mask=masks,
        mask_encoding=mask_encoding,
        mask_height_px=heights,
        mask_width_px=widths,
        grids=[_grid(table, index) for index in range(len(table))] if are_neighbours else (),
        figures={figure.name: _values(table[f"_{figure.name}"], figure, n_classes) for figure in MEASURED},
    )


def _grid(table: pa.Table, index: int) -> np.ndarray | None:
    """Class ids of a frame on the network's grid, which may be the mask; None where it is rejected."""
    for name in ("_grid", "_mask"):
        if table[name][index].is_valid:
            size = (table[f"{name}_height_px"][index].as_py(), table[f"{name}_width_px"][index].as_py())
            return _view(table[name], index, size)
    return None


def _values(column: pa.ChunkedArray, figure: Figure, n_classes: int) -> np.ndarray:
    """Of a figure after labelling, [N] or [N, K]; zeros where a row is null."""
    dtype = figure.type.to_pandas_dtype()
    return _matrix(column, n_classes, dtype) if figure.by_class else np.array(column.fill_null(0).to_numpy(), dtype)


def _matrix(column: pa.ChunkedArray, n_classes: int, dtype: type) -> np.ndarray:
    """Rows of K numbers; zeros where a row is null."""
    matrix_NK: np.ndarray = np.zeros((len(column), n_classes), dtype)
    valid = column.is_valid().to_numpy()
    if valid.any():
        matrix_NK[valid] = (
            column.combine_chunks().drop_null().flatten().to_numpy(zero_copy_only=False).reshape(-1, n_classes)
        )
    return matrix_NK


class _Buffers:
    """Collects arrays into one Arrow column of bytes."""

    def __init__(self) -> None:
        self._parts: list[np.ndarray] = []
        self._offsets = [0]
        self._valid: list[bool] = []

    def append(self, array: np.ndarray | None) -> None:
        if array is not None:
            self._parts.append(np.ascontiguousarray(array).reshape(-1))
        self._offsets.append(self._offsets[-1] + (0 if array is None else array.size))
        self._valid.append(array is not None)

    def to_array(self) -> pa.Array:
        data = np.concatenate(self._parts) if self._parts else np.zeros(0, np.uint8)
        validity = pa.array(self._valid).buffers()[1]
        offsets = pa.py_buffer(np.array(self._offsets, np.int64))
        buffers = [validity, offsets, pa.py_buffer(data)]
        return pa.LargeBinaryArray.from_buffers(pa.large_binary(), len(self._valid), buffers)


def _view(column: pa.ChunkedArray, index: int, shape: Sequence[int]) -> np.ndarray:
    return np.frombuffer(column[index].as_buffer(), np.uint8).reshape(shape)


def _with_columns(table: pa.Table, **arrays: pa.Array) -> pa.Table:
    for name, column in arrays.items():
        table = table.append_column(name, column)
    return table
