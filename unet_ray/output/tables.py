"""Parquet files in memory: the same table gives the same bytes, and what is read is checked."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence

import pyarrow as pa
import pyarrow.parquet as pq

UNREADABLE = (OSError, ValueError, pa.ArrowException, MemoryError)
"""What Arrow raises for a damaged Parquet file; storage's own trouble is among it and is to be let through before."""

_SMALL_BYTES = 2**20  # of a Parquet file whose columns are not worth a thread each


def read_parquet(data: bytes, columns: Sequence[str] | None = None) -> pa.Table:
    """Returns the rows of a Parquet file that lies in memory.

    `pq.read_table` may still hold `data` in a thread when it has returned, and a process that ends then is aborted: one
    of 20 (Arrow 26 with other work beside it, 2026-11-24; github.com/apache/arrow/issues/34314).
    """
    names = None if columns is None else list(columns)
    # Of a frame's part threads cost 2.0 ms instead of 1.4, `pq.read_table` 3.5 (70 columns, 2 cores, 2026-11-24).
    return pq.ParquetFile(io.BytesIO(data)).read(columns=names, use_threads=len(data) > _SMALL_BYTES)


def require_columns(schema: pa.Schema, fields: Iterable[pa.Field]) -> None:
    """Raises ValueError where a file's schema lacks one of the fields, has it twice, or with another type."""
    for field in fields:
        index = schema.get_field_index(field.name)  # -1 also where it is there twice
        if index < 0 or schema.field(index).type != field.type:
            raise ValueError(f"it has no column {field.name} of type {field.type}")


def parquet_bytes(table: pa.Table, *, row_group_size: int | None = None) -> bytes:
    """Returns a table as a Parquet file; the same table gives the same bytes."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd", row_group_size=row_group_size)
    return buffer.getvalue()
