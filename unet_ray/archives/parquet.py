"""The frames of a Parquet file with encoded images, a row each; read a row group at a time."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from typing import Any

import pyarrow as pa

from unet_ray import storage
from unet_ray.archives.members import MAX_FRAME_BYTES, MAX_NAME_BYTES, BadMember, Findings, Member
from unet_ray.archives.parquet_files import Allowance, ParquetRows, TooMuch, is_plain, open_parquet

_PIECE_BYTES = 64 * 2**20  # of a Parquet file's images, unpacked at once
_NAMES_AT_ONCE = 256


def find_image_column(schema: pa.Schema, name: str | None) -> str | None:
    """Returns the path of the column that holds encoded images: `image`, or `image.bytes` as Hugging Face writes it.

    Without a name: the column `image`, else the only struct with a field `bytes`; None where there is none.
    """

    def path(column: pa.Field) -> str | None:
        if not is_plain(column.type):
            return None
        if pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type):
            return column.name
        if pa.types.is_struct(column.type) and column.type.get_field_index("bytes") >= 0:
            return f"{column.name}.bytes"
        return None

    if name is not None or "image" in schema.names:
        wanted = name or "image"
        return path(schema.field(wanted)) if wanted in schema.names else None
    structs = [image_path for column in schema if pa.types.is_struct(column.type) and (image_path := path(column))]
    return structs[0] if len(structs) == 1 else None


def list_parquet(file: storage.FileInfo, findings: Findings, image_column: str | None) -> Iterator[Member]:
    """Yields one frame a row of a Parquet file with encoded images; a file without them is ignored and counted.

    A frame's path is the image's own where every row has one, none is too long and no two are the same, else the row's
    number.
    """
    with open_parquet(file.uri, as_dictionaries=True) as parquet:
        column = find_image_column(parquet.schema, image_column)
        if column is None:
            findings.ignored[".parquet without images"] += 1
            return
        n_rows = sum(parquet.rows_of_groups)
        Allowance().take(n_rows, 0)
        folder, dot, _ = column.rpartition(".")
        has_paths = bool(dot) and parquet.schema.field(folder).type.get_field_index("path") >= 0
        if has_paths and _all_differ(_paths(parquet, f"{folder}.path", file)):
            for row, path in enumerate(_paths(parquet, f"{folder}.path", file)):
                yield Member(path, column=column, row=row)
        else:
            for row in range(n_rows):
                yield Member(f"{row:06d}", column=column, row=row)


def _paths(parquet: ParquetRows, column: str, file: storage.FileInfo) -> Iterator[Any]:
    for piece in parquet.pieces(Allowance(), _NAMES_AT_ONCE, column, n_times=4):
        yield from piece.column(0).field("path").to_pylist()


def _all_differ(paths: Iterable[Any]) -> bool:
    seen: set[str] = set()
    for path in paths:
        if not path or len(path) > MAX_NAME_BYTES or path in seen:
            return False
        seen.add(path)
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

    def read(self, rows: Sequence[int]) -> list[bytes | BadMember | None]:
        """Returns the images of the first of some rows: of all, unless they turn out to be much larger than the mean.

        Each row group that holds one is read once, piece by piece.
        """
        while (images := self._read(rows)) is None:
            rows = rows[: len(rows) // 2]
        return [images[row] for row in rows]

    def _read(self, rows: Sequence[int]) -> dict[int, bytes | BadMember | None] | None:
        """Returns the images by their rows, None where several are too much for the memory together."""
        images: dict[int, bytes | BadMember | None] = {}
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
                    n_bytes += image.size if image else 0
                    if n_bytes > 2 * _PIECE_BYTES and len(rows) > 1:
                        return None
                    images[row] = _bytes(image)
            except (pa.ArrowException, TooMuch) as error:
                reason = "too_large" if isinstance(error, TooMuch) else "truncated"
                damaged = BadMember(reason, " ".join(str(error).split()))
                images |= dict.fromkeys(wanted - images.keys(), damaged)
        return images

    def _images(self, group: int, wanted: set[int]) -> Iterator[tuple[int, pa.Buffer | None]]:
        row = self._ends[group] - self._parquet.rows_of_groups[group]
        most_rows = max(1, min(16, _PIECE_BYTES // max(1, self.row_bytes(row))))
        for batch in self._parquet.batches(group, most_rows, self._column):
            values = batch.column(0)
            values = values.field("bytes") if pa.types.is_struct(values.type) else values
            for index in range(len(values)):
                if row + index in wanted:
                    yield row + index, values[index].as_buffer()
            row += len(values)
            if row > max(wanted):
                return


def _bytes(image: pa.Buffer | None) -> bytes | BadMember | None:
    if image is not None and image.size > MAX_FRAME_BYTES:
        return BadMember("too_large", f"the frame has {image.size:,} bytes; at most {MAX_FRAME_BYTES:,} are read")
    return None if image is None else image.to_pybytes()
