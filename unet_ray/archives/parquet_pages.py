"""The pages of a Parquet file's columns, sized by their own headers, which Arrow trusts more than the footer.

>>> source = PageGuard(open_read(uri))
>>> file = pq.ParquetFile(source)
>>> source.watch(file.metadata.row_group(0))    # from here on it refuses columns whose footer makes them smaller

Source: `PageHeader` in Apache Parquet's parquet.thrift; Apache Thrift's compact protocol.
"""

from __future__ import annotations

from bisect import bisect_left
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

_TYPE, _UNPACKED, _PACKED = 1, 2, 3  # fields of PageHeader
_DATA_HEADERS = {0: 5, 3: 8}  # types of data pages, and the fields of PageHeader that are theirs
_N_VALUES = 1  # field of both
_PAGE_BYTES = 512 * 2**20  # Arrow unpacks a page whole, and writes up to 1,024 images into one
_MOST_UNPACKED = 4  # bytes of a larger page out of one: pictures without a compression of their own come to 3
_DEEPEST = 8  # structs and lists in one another: statistics in a page's header are the third


class TooMuch(ValueError):
    """A file that comes to so much more than lies in it that it was made for that."""


class _Chunk(NamedTuple):
    """What the footer says of a column chunk."""

    packed: int
    unpacked: int
    n_values: int


class PageGuard:
    """A file for Arrow to read whole column chunks of, one or several at once, none larger than its footer says."""

    def __init__(self, source: BinaryIO):
        self._source = source
        self._chunks: dict[int, _Chunk] = {}
        self._starts: list[int] | None = None
        self.seekable, self.readable, self.tell = source.seekable, source.readable, source.tell
        self.seek, self.close = source.seek, source.close

    @property
    def closed(self) -> bool:
        """Whether the file is closed."""
        return self._source.closed

    def watch(self, group: pq.RowGroupMetaData) -> None:
        """Takes note of where the columns of a row group are; nothing else is read until the next is named.

        Raises:
            pa.ArrowInvalid: two of them are in one place.
        """
        self._chunks = {}
        for index in range(group.num_columns):
            column = group.column(index)
            start = column.data_page_offset
            if column.has_dictionary_page and column.dictionary_page_offset:
                start = min(start, column.dictionary_page_offset)
            if start in self._chunks:
                raise pa.ArrowInvalid(f"two columns begin at byte {start:,}")
            self._chunks[start] = _Chunk(
                column.total_compressed_size, column.total_uncompressed_size, column.num_values
            )
        self._starts = sorted(self._chunks)

    def read(self, size: int = -1) -> bytes:
        """Returns bytes as they lie in the file.

        Raises:
            TooMuch: those of a chunk whose pages come to more than the footer says, or one to far more than it holds.
            pa.ArrowInvalid: those of a chunk whose pages have no headers, or no whole chunks.
        """
        begin = self._source.tell()
        data = self._source.read(size)
        if self._starts is not None and data:
            if begin not in self._chunks:
                raise pa.ArrowInvalid(f"byte {begin:,} is read, where the footer has no column")
            first, end = (bisect_left(self._starts, position) for position in (begin, begin + len(data)))
            for start in self._starts[first:end]:
                _check(data, start - begin, self._chunks[start])
        return data


def _check(data: bytes, at: int, chunk: _Chunk) -> None:
    """Walks the pages of a column chunk, all of them: what Arrow skips counts, too."""
    end = min(len(data), at + chunk.packed)
    unpacked = n_values = 0
    while at < end:
        try:
            header, at = _struct(data, at)
        except IndexError as error:
            raise pa.ArrowInvalid("a page's header ends early") from error
        kind = header.get(_TYPE)
        about = header.get(_DATA_HEADERS.get(kind)) if isinstance(kind, int) else None
        sizes = [header.get(_UNPACKED), header.get(_PACKED), about.get(_N_VALUES) if isinstance(about, dict) else 0]
        valid = [size for size in sizes if isinstance(size, int) and size >= 0]
        if len(valid) < len(sizes):
            raise pa.ArrowInvalid("a page's header has no sizes")
        unpacked, at, n_values = unpacked + valid[0], at + valid[1], n_values + valid[2]
        if unpacked > chunk.unpacked or n_values > chunk.n_values:
            raise TooMuch(
                f"its footer says {chunk.unpacked:,} bytes and {chunk.n_values:,} values of a column that comes to more"
            )
        if valid[0] > max(_PAGE_BYTES, _MOST_UNPACKED * valid[1]):
            raise TooMuch(f"its page unpacks from {valid[1]:,} to {valid[0]:,} bytes; write smaller row groups")


# --- Thrift's compact protocol ---


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value, shift, at = value | (byte & 0x7F) << shift, shift + 7, at + 1
        if byte < 0x80:
            return value, at
        if shift > 63:
            raise pa.ArrowInvalid("a number in a page's header has no end")


def _number(data: bytes, at: int) -> tuple[int, int]:
    value, at = _varint(data, at)
    return (value >> 1) ^ -(value & 1), at


def _struct(data: bytes, at: int, depth: int = 1) -> tuple[dict[Any, Any], int]:
    """Returns the fields of a struct by their numbers, texts and lists as None, and where it ends."""
    fields: dict[Any, Any] = {}
    number = 0
    while data[at]:
        step, kind = data[at] >> 4, data[at] & 0x0F
        number, at = (number + step, at + 1) if step else _number(data, at + 1)
        fields[number], at = (None, at) if kind in (1, 2) else _value(data, at, kind, depth)  # true, false: no more
    return fields, at + 1


def _value(data: bytes, at: int, kind: int, depth: int) -> tuple[Any, int]:
    if depth > _DEEPEST:
        raise pa.ArrowInvalid(f"a page's header has more than {_DEEPEST} structs and lists in one another")
    if kind in (1, 2, 3):  # a boolean in a list; a byte
        return None, at + 1
    if kind in (4, 5, 6):
        return _number(data, at)
    if kind == 7:  # a double
        return None, at + 8
    if kind == 8:
        length, at = _varint(data, at)
        return None, at + length
    if kind in (9, 10):  # a list, a set
        length, of = data[at] >> 4, data[at] & 0x0F
        length, at = _varint(data, at + 1) if length == 15 else (length, at + 1)
        for _ in range(length):
            _, at = _value(data, at, of, depth + 1)
            data[at]  # or it ends early
        return None, at
    if kind == 12:
        return _struct(data, at, depth + 1)
    raise pa.ArrowInvalid(f"a page's header has a value of kind {kind}")
