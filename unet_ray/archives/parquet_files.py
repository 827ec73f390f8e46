"""Parquet files that anybody may have written: read by range, and refused where they would exhaust memory.

A page may unpack ten thousand times, a dictionary say one value of megabytes in a million rows, a delta make each value
of the one before, a run length write a list of a billion. What a row group may come to is read from the file's footer,
and what its rows come to is added up before they are made.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from unet_ray import storage
from unet_ray.archives.parquet_pages import PageGuard, TooMuch

_GROUP_BYTES = 256 * 2**20  # what any row group may unpack to; one of images 100 times its size, if that is more
_BATCH_BYTES = 16 * 2**20  # what a batch of its rows may come to; Arrow takes twice that while it is made
_MOST_UNPACKED = 100  # bytes out of one; encoded images hardly pack at all, blank ones of BMP reach this
_LISTED_BYTES = 384 * 2**20  # what the rows of a file may come to
_MANIFEST_ROW_BYTES = 100  # what a row costs besides what it says
_DICTIONARY_ENCODINGS = {"PLAIN", "PLAIN_DICTIONARY", "RLE", "RLE_DICTIONARY", "BIT_PACKED"}  # Arrow 26 has no others
_VALUE_BYTES = {"BOOLEAN": 1, "INT32": 4, "INT64": 8, "INT96": 12, "FLOAT": 4, "DOUBLE": 8}


class Allowance:
    """What the rows of a file may still come to, of 384 MB: 1,000,000 rows that say 70 letters each.

    So listing stays under 1 GB (the worst found: 0.92 GB, 2026-11-22). The file's size allows no more: honest
    catalogues come to 13 to 50 times theirs, and a bad one may be as large as it likes.
    """

    def __init__(self) -> None:
        self._taken = 0

    def take(self, n_rows: int, n_bytes: int) -> None:
        """Counts rows that are about to be made, and the bytes that they hold. Raises `TooMuch`."""
        self._taken += n_rows * _MANIFEST_ROW_BYTES + n_bytes
        if self._taken > _LISTED_BYTES:
            limit = f"{_LISTED_BYTES >> 20} MB"
            raise TooMuch(f"its rows come to more than {limit}; if they are what you want, make several files of it")


def is_plain(kind: pa.DataType) -> bool:
    """Whether a type is one of Arrow's usual down to its last field.

    An extension type makes its values when they are read, and may run what the file says (Ray Data's pickled objects).
    Of views Arrow has few functions.
    """
    if isinstance(kind, pa.BaseExtensionType) or pa.types.is_string_view(kind) or pa.types.is_binary_view(kind):
        return False
    if pa.types.is_dictionary(kind):
        return is_plain(kind.value_type)
    return all(is_plain(kind.field(index).type) for index in range(kind.num_fields))


@contextmanager
def open_parquet(file_uri: str, *, as_dictionaries: bool = False) -> Iterator[ParquetRows]:
    """Opens a Parquet file by range.

    Args:
        file_uri: the file.
        as_dictionaries: whether texts are read as Arrow dictionaries, in which each is held once however often it is
            said; slow where they are images.

    Raises:
        pa.ArrowInvalid: it is none.
        StorageError: the store did not answer.
    """
    with storage.open_read(file_uri) as source:
        with _as_invalid(file_uri):
            opened = ParquetRows(source, file_uri, as_dictionaries=as_dictionaries)
        yield opened


@contextmanager
def _as_invalid(uri: str) -> Iterator[None]:
    """What is damaged is invalid, for which Arrow has OSErrors, too, without a number; others are the store's."""
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:  # the last one of a name, in pyarrow 19
        if isinstance(error, OSError) and error.errno is not None:
            with storage.naming(uri):
                raise
        raise pa.ArrowInvalid(f"is no Parquet file that can be read: {' '.join(str(error).split())}") from error


class ParquetRows:
    """An open Parquet file, whose row groups are read in bounded batches."""

    def __init__(self, source: BinaryIO, uri: str, *, as_dictionaries: bool):
        self._uri = uri
        self._source = PageGuard(source)
        self._file = pq.ParquetFile(self._source)
        self.schema: pa.Schema = self._file.schema_arrow
        self._dictionaries: set[str] = set()
        if as_dictionaries:
            self._dictionaries = set(self._texts())
            self._file = pq.ParquetFile(
                self._source, metadata=self._file.metadata, read_dictionary=sorted(self._dictionaries)
            )

    @property
    def rows_of_groups(self) -> list[int]:
        """How many rows each row group has."""
        return [self._file.metadata.row_group(group).num_rows for group in range(self._file.num_row_groups)]

    def _texts(self) -> Iterator[str]:
        """The paths of columns, at any depth, whose values have any length and can be read as dictionaries."""
        special = tuple(field.name for field in self.schema if not is_plain(field.type))
        for index in range(len(self._file.schema)):
            column = self._file.schema.column(index)
            chunks = (self._file.metadata.row_group(group).column(index) for group in range(self._file.num_row_groups))
            is_text = column.physical_type == "BYTE_ARRAY" and not column.path.startswith(special)
            if is_text and all(_DICTIONARY_ENCODINGS.issuperset(chunk.encodings) for chunk in chunks):
                yield column.path

    def _chunks(self, group: int, column: str | None) -> Iterator[tuple[Any, pq.ColumnChunkMetaData]]:
        about = self._file.metadata.row_group(group)
        for index in range(about.num_columns):
            with _as_invalid(self._uri):
                path = about.column(index).path_in_schema
            if column is None or path == column or path.startswith(f"{column}."):  # `image.list.element` of a list
                yield self._file.schema.column(index), about.column(index)

    def packed_and_unpacked(self, group: int, column: str | None = None) -> tuple[int, int]:
        """Returns the bytes of a column (of all, without one) in a row group, as they lie in the file and unpacked.

        A list is as long as it says, however few bytes its run length needs.
        """
        packed = unpacked = 0
        for about, chunk in self._chunks(group, column):
            values = chunk.num_values * _value_bytes(about) if about.max_repetition_level else 0
            packed += chunk.total_compressed_size
            unpacked += max(chunk.total_uncompressed_size, values)
        return packed, unpacked

    def is_all_null(self, column: str) -> bool:
        """Whether a column holds nothing in any row, as the file's statistics say; not known counts as no."""
        chunks = [chunk for group in range(self._file.num_row_groups) for _, chunk in self._chunks(group, column)]
        statistics = [chunk.statistics for chunk in chunks]
        return all(
            about is not None and about.has_null_count and about.null_count == chunk.num_values
            for about, chunk in zip(statistics, chunks, strict=True)
        )

    def why_too_much(self, group: int, column: str | None = None) -> str | None:
        """Returns why a row group is not unpacked: to so much more than lies in the file that nothing real is in it."""
        packed, unpacked = self.packed_and_unpacked(group, column)
        if unpacked <= max(_GROUP_BYTES, _MOST_UNPACKED * packed):
            return None
        return f"its row group unpacks from {packed:,} to {unpacked:,} bytes"

    def batches(self, group: int, most_rows: int, column: str | None = None) -> Iterator[pa.RecordBatch]:
        """Yields the rows of a group, at most so many at once that they would fit if each was as large as can be.

        Few at once where one value may be said many times: in a dictionary that is not read as one, or by a delta.
        """
        largest = 0
        for about, chunk in self._chunks(group, column):
            if about.physical_type != "BYTE_ARRAY":
                largest += 0 if about.max_repetition_level else _value_bytes(about)
            elif about.path not in self._dictionaries:
                is_repeated = chunk.has_dictionary_page or "DELTA_BYTE_ARRAY" in chunk.encodings
                largest += chunk.total_uncompressed_size if is_repeated else 0
        n_rows = max(1, min(most_rows, _BATCH_BYTES // max(1, largest)))
        columns = None if column is None else [column]
        with _as_invalid(self._uri):
            self._source.watch(self._file.metadata.row_group(group))
            yield from self._file.iter_batches(n_rows, row_groups=[group], columns=columns)

    def pieces(
        self, allowance: Allowance, most_rows: int, column: str | None = None, *, n_times: int = 1
    ) -> Iterator[pa.RecordBatch]:
        """Yields the rows of all groups in pieces that fit the memory without their dictionaries, too.

        Args:
            allowance: what the rows are counted against.
            most_rows: of a piece.
            column: the only column that is read, by its path; None reads all.
            n_times: how often the caller holds what the rows say.

        Raises:
            TooMuch: before what was made to fill the memory does so.
        """
        for group in range(self._file.num_row_groups):
            packed, unpacked = self.packed_and_unpacked(group, column)
            if unpacked > _GROUP_BYTES:  # whatever lies in the file: of rows that are listed, all are held
                raise TooMuch(f"its row group unpacks from {packed:,} to {unpacked:,} bytes; write smaller row groups")
            for batch in self.batches(group, most_rows, column):
                for piece in _halved(batch):
                    allowance.take(len(piece), n_times * _decoded_bytes(piece))
                    yield _without_the_rest(piece)


def _value_bytes(about: Any) -> int:
    """Bytes of one value in memory; of a text, those of its place."""
    return about.length if about.physical_type == "FIXED_LEN_BYTE_ARRAY" else _VALUE_BYTES.get(about.physical_type, 4)


def _halved(batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    """Halves a batch until each part fits the memory when it is decoded, or is one row."""
    if len(batch) == 1 or _decoded_bytes(batch) <= _BATCH_BYTES:
        yield batch
        return
    half = len(batch) // 2
    yield from _halved(batch.slice(0, half))
    yield from _halved(batch.slice(half))


def _without_the_rest(piece: pa.RecordBatch) -> pa.RecordBatch:
    """A slice's lists refer to those of the whole batch: casting them would make all of these."""
    rows = pa.array(range(len(piece)))
    columns = [
        column.take(rows) if pa.types.is_nested(column.type) and is_plain(column.type) else column
        for column in piece.columns
    ]
    return pa.RecordBatch.from_arrays(columns, schema=piece.schema)


def _decoded_bytes(values: pa.RecordBatch | pa.Array) -> int:
    """Returns the bytes of an array without its dictionaries."""
    if isinstance(values, pa.RecordBatch):
        return sum(map(_decoded_bytes, values.columns))
    if pa.types.is_dictionary(values.type):
        lengths = pc.binary_length(values.dictionary.cast(pa.large_binary()))
        return 4 * len(values) + (pc.sum(lengths.take(values.indices)).as_py() or 0)
    if pa.types.is_struct(values.type):
        return sum(map(_decoded_bytes, values.flatten()))
    if pa.types.is_map(values.type):
        begin, end = values.offsets[0].as_py(), values.offsets[-1].as_py()
        return sum(_decoded_bytes(part.slice(begin, end - begin)) for part in (values.keys, values.items))
    if values.type.num_fields == 1:  # lists of all kinds
        return 4 * len(values) + _decoded_bytes(values.flatten())
    return values.nbytes
