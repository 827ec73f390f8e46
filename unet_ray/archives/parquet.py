"""The frames of a Parquet file with encoded images, a row each; read a row group at a time."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from typing import Any

import pyarrow as pa

from unet_ray import storage
from unet_ray.archives.members import MAX_FRAME_BYTES, MAX_NAME_BYTES, BadMember, Broken, Findings, Member
from unet_ray.archives.parquet_files import Allowance, ParquetRows, TooMuch, open_parquet

_PIECE_BYTES = 64 * 2**20  # of a Parquet file's images, unpacked at once
_NAMES_AT_ONCE = 256
_LONGEST_KIND = 300  # letters of what is said of ignored files, which may have names of any length in them


_IMAGE_COLUMNS = ("image", "pixel_values")  # as Hugging Face's data sets for classification and segmentation name it


def find_image_column(schema: pa.Schema, name: str | None) -> str | None:
    """Returns the path of the column that holds encoded images: `image`, or `image.bytes` as Hugging Face writes it.

    Without a name: the column `image`, else `pixel_values`, else the only struct with a field `bytes`; None where there
    is none.
    """
    if name is not None:
        return _path_of_bytes(schema.field(name)) if name in schema.names else None
    usual = [_path_of_bytes(schema.field(column)) for column in _IMAGE_COLUMNS if column in schema.names]
    structs = [path for column in schema if pa.types.is_struct(column.type) and (path := _path_of_bytes(column))]
    return next(filter(None, usual), None if usual or len(structs) != 1 else structs[0])


def _path_of_bytes(column: pa.Field) -> str | None:
    """The path of the column's bytes: those of its values, or of their field `bytes`; None where it has none."""
    if _holds_bytes(column.type):
        return column.name
    if pa.types.is_struct(column.type) and (index := column.type.get_field_index("bytes")) >= 0:
        return f"{column.name}.bytes" if _holds_bytes(column.type.field(index).type) else None
    return None


def _holds_bytes(kind: pa.DataType) -> bool:
    """Whether values are bytes, in any of the ways in which Arrow and Spark write them."""
    is_binary = pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)
    if is_binary or pa.types.is_fixed_size_binary(kind):
        return True
    return _is_list(kind) and (pa.types.is_uint8(kind.value_type) or pa.types.is_int8(kind.value_type))


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def why_no_images(schema: pa.Schema, name: str | None) -> str:
    """Returns why `find_image_column` returns None, with the option where other columns may hold images."""
    wanted = name or next((column for column in _IMAGE_COLUMNS if column in schema.names), "image")
    why = f"no column {wanted!r} of encoded images"
    if wanted in schema.names:
        kind = schema.field(wanted).type
        numbers = kind
        while _is_list(numbers):
            numbers = numbers.value_type
        is_pixels = numbers is not kind and (pa.types.is_integer(numbers) or pa.types.is_floating(numbers))
        what = "decoded pixels; encode them, as PNG or JPEG" if is_pixels else "no encoded images"
        why = f"a column {wanted!r} of type {kind if len(str(kind)) < 60 else f'{str(kind)[:56]} …'}, which are {what}"
    others = [column.name for column in schema if column.name != wanted and _path_of_bytes(column)]
    return f"{why} (--image-column may be {' or '.join(others)})" if others else why


def list_parquet(file: storage.FileInfo, findings: Findings, image_column: str | None) -> Iterator[Member]:
    """Yields one frame a row of a Parquet file with encoded images; a file without them is ignored and counted.

    A frame's path is the image's own where every row has one, none is too long or no text and no two are the same, else
    the row's number.

    Raises:
        Broken: the rows name files and hold no bytes of any.
    """
    with open_parquet(file.uri, as_dictionaries=True) as parquet:
        column = find_image_column(parquet.schema, image_column)
        if column is None:
            findings.ignored[_ignored_kind(parquet.schema, image_column)] += 1
            return
        n_rows = sum(parquet.rows_of_groups)
        Allowance().take(n_rows, 0)
        paths = _column_of_paths(parquet.schema, column)
        if n_rows and parquet.is_all_null(column):
            such = ", only paths of files" if paths else ""
            raise Broken(f"has no bytes in its column {column!r}{such}: {_WITHOUT_BYTES}")
        if paths is not None and _all_differ(_paths(parquet, paths, file)):
            for row, path in enumerate(_paths(parquet, paths, file)):
                yield Member(path, column=column, row=row)
        else:
            for row in range(n_rows):
                yield Member(f"{row:06d}", column=column, row=row)


_WITHOUT_BYTES = "the images lie elsewhere; give their folder, or write their bytes into the column"


def _ignored_kind(schema: pa.Schema, image_column: str | None) -> str:
    why = why_no_images(schema, image_column)
    is_named = image_column is not None or any(column in schema.names for column in _IMAGE_COLUMNS)
    return f".parquet with {why}"[:_LONGEST_KIND] if is_named or "(" in why else ".parquet without images"


def _column_of_paths(schema: pa.Schema, column: str) -> str | None:
    """The texts beside the bytes of a struct, None where there are none."""
    if column in schema.names:
        return None
    struct = column.removesuffix(".bytes")
    fields = schema.field(struct).type
    index = fields.get_field_index("path")
    kind = fields.field(index).type if index >= 0 else pa.null()
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    return f"{struct}.path" if is_text else None


def _paths(parquet: ParquetRows, column: str, file: storage.FileInfo) -> Iterator[Any]:
    for piece in parquet.pieces(Allowance(), _NAMES_AT_ONCE, column, n_times=4):
        yield from piece.column(0).field("path").to_pylist()


def _all_differ(paths: Iterable[Any]) -> bool:
    seen: set[str] = set()
    try:
        for path in paths:
            if not path or len(path) > MAX_NAME_BYTES or path in seen:
                return False
            seen.add(path)
    except UnicodeDecodeError:
        return False
    return True


class ParquetImages:
    """The column of encoded images of an open Parquet file."""

    def __init__(self, parquet: ParquetRows, column: str) -> None:
        self._parquet, self._column = parquet, column
        self._ends = list(accumulate(parquet.rows_of_groups))

    def _group(self, row: int) -> int:
        return bisect_right(self._ends, row)

    def row_bytes(self, row: int) -> int:
        """Returns the size of an image, by the mean of its row group; 0 for one that is not read."""
        group = self._group(row)
        if self._parquet.why_too_much(group, self._column) is not None:
            return 0
        return self._parquet.packed_and_unpacked(group, self._column)[1] // self._parquet.rows_of_groups[group]

    def read(self, rows: Sequence[int]) -> list[bytes | BadMember]:
        """Returns the images of the first of some rows: of all, unless they turn out to be much larger than the mean.

        Each row group that holds one is read once, piece by piece.
        """
        while (images := self._read(rows)) is None:
            rows = rows[: len(rows) // 2]
        return [images[row] for row in rows]

    def _read(self, rows: Sequence[int]) -> dict[int, bytes | BadMember] | None:
        """Returns the images by their rows, None where several are too much for the memory together."""
        images: dict[int, bytes | BadMember] = {}
        of_group: dict[int, set[int]] = {}
        for row in rows:
            of_group.setdefault(self._group(row), set()).add(row)
        n_bytes = 0
        for group, wanted in of_group.items():
            if (why := self._parquet.why_too_much(group, self._column)) is not None:
                images |= dict.fromkeys(wanted, BadMember("too_large", why))
                continue
            try:
                for row, image in self._images(group, wanted):
                    n_bytes += image.size if isinstance(image, pa.Buffer) else 0
                    if n_bytes > 2 * _PIECE_BYTES and len(rows) > 1:
                        return None
                    images[row] = _bytes(image)
            except (pa.ArrowException, TooMuch) as error:
                reason = "too_large" if isinstance(error, TooMuch) else "truncated"
                damaged = BadMember(reason, " ".join(str(error).split()))
                images |= dict.fromkeys(wanted - images.keys(), damaged)
        return images

    def _images(self, group: int, wanted: set[int]) -> Iterator[tuple[int, pa.Buffer | BadMember]]:
        row = self._ends[group] - self._parquet.rows_of_groups[group]
        most_rows = max(1, min(16, _PIECE_BYTES // max(1, self.row_bytes(row))))
        for batch in self._parquet.batches(group, most_rows, self._column):
            values = batch.column(0)
            values = values.field("bytes") if pa.types.is_struct(values.type) else values
            for index in range(len(values)):
                if row + index in wanted:
                    yield row + index, self._buffer(values[index], row + index)
            row += len(values)
            if row > max(wanted):
                return

    def _buffer(self, value: Any, row: int) -> pa.Buffer | BadMember:
        if not value.is_valid:
            return BadMember("not_an_image", f"row {row} has no bytes in the column {self._column!r}: {_WITHOUT_BYTES}")
        if not _is_list(value.type):
            return value.as_buffer()
        if value.values.null_count:
            return BadMember("not_an_image", f"row {row} has a list with empty places in the column {self._column!r}")
        return pa.py_buffer(value.values.to_numpy(zero_copy_only=False).tobytes())


def _bytes(image: pa.Buffer | BadMember) -> bytes | BadMember:
    if isinstance(image, BadMember):
        return image
    if image.size > MAX_FRAME_BYTES:
        return BadMember("too_large", f"the frame has {image.size:,} bytes; at most {MAX_FRAME_BYTES:,} are read")
    return image.to_pybytes()
