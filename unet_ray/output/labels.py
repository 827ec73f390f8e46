"""Rows of an output as they lie in parts and published files; what is damaged is named and done again."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from unet_ray import storage
from unet_ray.errors import JobFailed
from unet_ray.output import ledger, manifest
from unet_ray.output.columns import type_of
from unet_ray.output.neighbours import Borders
from unet_ray.output.plans import Plan
from unet_ray.output.records import Record, committed_keys, part_uri, read_records, record_uri
from unet_ray.output.rows import FRAME_COLUMNS, statistics_schema
from unet_ray.output.tables import UNREADABLE, read_parquet, require_columns

_PARTS_AT_ONCE = 16
"""Parts that are read at once: 0.6 to 9 MB each (96 masks of 480x640, PNG or raw with zstd), so well below a shard."""


@dataclass(frozen=True, kw_only=True)
class NewRows:
    """Rows of a chunk that were tried again."""

    position: int
    """Of the chunk within its shard."""
    rows: tuple[int, ...]
    """Places within the chunk."""
    rejected: Mapping[str, int]
    """Number of them by the reason that they had before."""
    record: Record


def new_rows(plan: Plan) -> tuple[dict[int, list[NewRows]], int]:
    """Returns the rows of each shard that were tried again, in the retries' order, and the number of retries."""
    places = {chunk.chunk_id: n for chunks in plan.of_shard.values() for n, chunk in enumerate(chunks)}
    every, recorded = ledger.open_retries(plan), committed_keys(plan.out)
    new: dict[int, list[NewRows]] = {}
    for retry, chunk in every:
        if chunk.key in recorded:
            (record,) = read_records(plan.out, [chunk.key])
            row = NewRows(
                position=places[chunk.chunk_id],
                rows=chunk.rows or (),
                rejected=retry.rejected[chunk.chunk_id],
                record=record,
            )
            new.setdefault(chunk.shard, []).append(row)
    return new, max((retry.number + 1 for retry, _ in every), default=0)


def replaced(rows: pa.Table, places: Sequence[int], new: pa.Table) -> pa.Table:
    """Returns rows with some of the rejected ones replaced."""
    order = np.arange(len(rows))
    reasons = rows["reason"]
    for index, row in enumerate(places):
        if reasons[row].is_valid:
            order[row] = len(rows) + index
    return pa.concat_tables([rows, new.select(rows.column_names)]).take(pa.array(order))


def read_published(out: str, file: Mapping[str, Any], n_rows: Sequence[int]) -> Iterator[pa.Table]:
    """Yields the rows of each chunk of a published file. Raises StorageError where it is not as it was published."""
    uri = storage.join(out, file["path"])
    data = storage.read_bytes(uri)
    if storage.sha256(data) != file["sha256"]:
        raise damaged(out, file["path"])
    try:
        rows, start = read_parquet(data).replace_schema_metadata(), 0
        require_columns(rows.schema, FRAME_COLUMNS)
    except UNREADABLE as error:
        raise damaged(out, file["path"]) from error
    for number in n_rows:
        yield rows.slice(start, number)
        start += number


def damaged(out: str, path: str) -> storage.StorageError:
    """Notes that a published file is damaged, and returns the error that says so."""
    with contextlib.suppress(OSError):  # where nothing can be written, what comes next will say so
        ledger.mark_damaged(out, storage.name(path))
    return storage.StorageError(
        f"{storage.join(out, path)} is damaged; run the same command again: its frames are done anew"
    )


def read_parts(out: str, records: Sequence[Record]) -> Iterator[pa.Table]:
    """Yields the parts of chunks in order; some at once, as many requests in flight where the store is not local.

    Raises FileNotFoundError where a part is gone, StorageError where it is damaged; its record counts no more.
    """
    for start in range(0, len(records), _PARTS_AT_ONCE):
        group = records[start : start + _PARTS_AT_ONCE]
        uris = [part_uri(out, record.part) for record in group]
        contents = storage.read_many([(uri, 0, None) for uri in uris])
        for record, uri, content in zip(group, uris, contents, strict=True):
            if isinstance(content, OSError) and not isinstance(content, FileNotFoundError):
                raise content
            if isinstance(content, OSError) or storage.sha256(content) != record.sha256:
                storage.delete(record_uri(out, record.key))
                if isinstance(content, OSError):
                    raise content
                raise storage.StorageError(f"{uri} is damaged; run the same command again: its frames are done anew")
            yield read_parquet(content)


def borders_of(plan: Plan, file: Mapping[str, Any]) -> Borders:
    """Returns the end of a published file. Raises StorageError where its footer is damaged."""
    try:
        with storage.open_read(storage.join(plan.out, file["path"])) as source:
            return Borders.from_footer(pq.read_metadata(source).metadata, plan.lineage.class_set.n_classes)
    except storage.StorageError:
        raise
    except UNREADABLE as error:
        raise damaged(plan.out, file["path"]) from error


def read_columns(out: str, path: str, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """Yields columns of a published file. Raises StorageError where it is damaged, which Arrow says without a name."""
    try:
        with storage.open_read(storage.join(out, path)) as source:
            file = pq.ParquetFile(source, page_checksum_verification=True)
            require_columns(file.schema_arrow, _fields(path, columns))
            yield from file.iter_batches(columns=list(columns))
    except (storage.StorageError, PermissionError):
        raise
    except UNREADABLE as error:
        raise damaged(out, path) from error


def _fields(path: str, columns: Iterable[str]) -> list[pa.Field]:
    """Returns columns of a published file with the types that they have."""
    if path == ledger.STATISTICS:
        return [statistics_schema().field(name) for name in columns]
    return [pa.field(name, type_of(name)) for name in columns]


@contextlib.contextmanager
def opened(uri: str, **options: Any) -> Iterator[pq.ParquetFile]:
    """Opens a file of `frames/` for reading, with options of `pq.ParquetFile`.

    Raises:
        JobFailed: it is damaged, also where that shows within the block; what Arrow says names no file.
    """
    with (
        naming(uri),
        storage.open_read(uri) as source,
        pq.ParquetFile(source, page_checksum_verification=True, **options) as file,
    ):
        require_columns(file.schema_arrow, FRAME_COLUMNS)
        yield file


@contextlib.contextmanager
def naming(uri: str) -> Iterator[None]:
    """Makes JobFailed, with its name, of what Arrow says of a published file that is damaged or gone."""
    try:
        yield
    except (storage.StorageError, PermissionError):
        raise
    except UNREADABLE as error:
        what = "gone" if isinstance(error, FileNotFoundError) else f"damaged ({manifest.first_line(error)})"
        raise JobFailed(f"{uri} is {what}; unet-ray verify names all that is, then segment makes it again") from error
