"""A catalogue: a Parquet or CSV file with one row a frame and a column `uri`.

| column | |
|---|---|
| `uri` | the frame's file; where it is relative, to the catalogue's folder |
| `frame_id` | optional: its name in all outputs; where it is empty the `uri` as it stands |
| `sequence`, `camera`, `frame_index`, `timestamp_ns` | optional; without them the id says it, as paths do elsewhere |
| any other | carried through to the output: from CSV as text, only an empty field is null; from Parquet as it is |
"""

from __future__ import annotations

import csv as csv_lines
import errno
import io
import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv

from unet_ray import storage
from unet_ray.archives.members import MAX_NAME_BYTES
from unet_ray.archives.parquet import find_image_column, why_no_images
from unet_ray.archives.parquet_files import Allowance, TooMuch, is_plain, open_parquet
from unet_ray.archives.reach import Reach
from unet_ray.frames import extension

_TYPES = {
    "uri": pa.string(),
    "frame_id": pa.string(),
    "sequence": pa.string(),
    "camera": pa.string(),
    "frame_index": pa.int64(),
    "timestamp_ns": pa.int64(),
}
_BATCH_ROWS = 20_000
_HEADER_BYTES = 2**20
_TAIL_BYTES = 64


def is_catalogue(uri: str, image_column: str | None) -> bool:
    """Whether a file that was named itself is a catalogue; a Parquet file with images in it is an archive.

    Raises:
        ValueError: a CSV or Parquet file that is neither.
    """
    if extension(uri) == ".csv":
        return True
    if extension(uri) != ".parquet":
        return False
    try:
        with open_parquet(uri) as parquet:
            schema = parquet.schema
    except pa.ArrowInvalid as error:
        raise ValueError(f"{uri} {error}") from error
    if find_image_column(schema, image_column) is not None:
        return False
    if "uri" in schema.names and image_column is None:
        return True
    raise ValueError(
        f"{uri} has {why_no_images(schema, image_column)}, and no column 'uri'; its columns are "
        f"{', '.join(schema.names)}"
    )


def read_catalogue(uri: str, reach: Reach) -> Iterator[tuple[pa.Table, list[storage.FileInfo | OSError]]]:
    """Yields a catalogue piece by piece: its rows with `frame_id` filled in, and the file of each row.

    A file that is not there has the version `""`, which no file has: it becomes a row with the reason `missing`. One
    that could not be asked for, as nobody may look into its folder, is an error.

    Raises:
        ValueError: no column `uri`, a row without one, a column of the wrong type, a name of over 4,096 bytes, or no
            rows.
        StorageError: the store did not answer.
    """
    folder = uri.rpartition("/")[0]
    n_rows = 0
    for batch in _batches(uri):
        table = _typed(batch, uri)
        uris = table["uri"].to_pylist()
        if any(not entry for entry in uris):
            raise ValueError(f"{uri}: row {n_rows + uris.index(next(e for e in uris if not e)) + 1} has no uri")
        _refuse_long_names(table, uri)
        reach.look(uri, table["uri"])
        reach.require()  # again: it may have changed since `require_readable`
        if "frame_id" in table.column_names:
            ids = pc.coalesce(table["frame_id"], table["uri"])
            table = table.set_column(table.column_names.index("frame_id"), "frame_id", ids)
        else:
            table = table.append_column("frame_id", table["uri"])
        n_rows += table.num_rows
        whole = [storage.beside(folder, entry) for entry in uris]
        with ThreadPoolExecutor(storage.REQUESTS_IN_FLIGHT) as pool:
            yield table, list(pool.map(_look, [entry if "\0" in entry else storage.resolve(entry) for entry in whole]))
    if not n_rows:
        raise ValueError(f"{uri} holds no frame: it has no rows")


def require_readable(uri: str, reach: Reach) -> None:
    """Raises ValueError where a catalogue is none; notes what it names elsewhere, and looks at no file of it."""
    for batch in _batches(uri):
        reach.look(uri, _typed(batch, uri)["uri"])


def _refuse_long_names(table: pa.Table, uri: str) -> None:
    for name in (name for name, kind in _TYPES.items() if kind == pa.string() and name in table.column_names):
        longest = pc.max(pc.binary_length(table[name])).as_py() or 0
        if longest > MAX_NAME_BYTES:
            raise ValueError(f"{uri}: a {name} has {longest:,} bytes; at most {MAX_NAME_BYTES:,} are read")


def _look(uri: str) -> storage.FileInfo | OSError:
    try:
        return storage.info(uri)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, storage.NotAFile):
        return storage.FileInfo(path=storage.name(uri), uri=uri, size_bytes=0, version="")
    except PermissionError as error:
        return error
    except storage.StorageError as error:
        if error.errno == errno.ELOOP:
            return error
        raise


def _batches(uri: str) -> Iterator[pa.RecordBatch]:
    if extension(uri) == ".parquet":
        with open_parquet(uri, as_dictionaries=True) as parquet:
            allowance = Allowance()
            try:
                for piece in parquet.pieces(allowance, _BATCH_ROWS):
                    rows = piece.cast(parquet.schema)
                    allowance.take(0, 3 * rows["uri"].nbytes)  # an id, a sequence and a key to sort by come of each
                    yield rows
            except TooMuch as error:
                raise ValueError(f"{uri} was made to fill the memory: {error}") from error
            except pa.ArrowInvalid as error:
                raise ValueError(f"{uri} {error}") from error
        return
    try:
        yield from _csv_batches(uri)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{uri} is no CSV file that can be read: {' '.join(str(error).split())}") from error


def _csv_batches(uri: str) -> Iterator[pa.RecordBatch]:
    """A CSV file's rows. Its own columns are text, whatever stands in them: `000112` is no number, `NA` no null."""
    lines = csv.ParseOptions(newlines_in_values=True)
    names = _column_names(storage.read_bytes(uri, 0, _HEADER_BYTES))
    last: list[object] = [None]
    types = {name: _TYPES.get(name, pa.string()) for name in names}
    values = csv.ConvertOptions(column_types=types, null_values=[""], strings_can_be_null=True)
    with storage.open_read(uri) as source:
        with csv.open_csv(source, parse_options=lines, convert_options=values) as reader:
            for batch in reader:
                yield batch
                last = batch.column(batch.num_columns - 1)[-1:].to_pylist()
        source.seek(-min(_TAIL_BYTES, source.seek(0, os.SEEK_END)), os.SEEK_END)
        is_closed = source.read().rstrip(b"\r\n").endswith(b'"')
    if last and isinstance(last[-1], str) and "\n" in last[-1] and not is_closed:
        raise pa.ArrowInvalid("a quote is open at its end, and the lines since then are one value")


def _column_names(head: bytes) -> list[str]:
    """The first line that is not empty. Arrow's reader reads ahead, in a thread, in a file that is closed."""
    lines = csv_lines.reader(io.StringIO(head.decode("utf-8-sig", "replace"), newline=""))
    try:
        return next(filter(None, lines), [])
    except csv_lines.Error as error:
        raise pa.ArrowInvalid(f"its first line: {error}") from error


def _typed(batch: pa.RecordBatch, uri: str) -> pa.Table:
    """The catalogue's rows with plain Arrow types: no dictionaries, no extension types."""
    if "uri" not in batch.schema.names:
        raise ValueError(f"{uri} has no column 'uri'; its columns are {', '.join(batch.schema.names)}")
    twice = next((name for name, number in Counter(batch.schema.names).items() if number > 1), None)
    if twice is not None:
        raise ValueError(f"{uri} has the column {twice!r} twice; give each a name of its own")
    columns, fields = [], []
    for column in batch.schema:
        if column.name.startswith("__index_level_"):  # pandas' own
            continue
        values = batch[column.name]
        values = values.storage if isinstance(values, pa.ExtensionArray) else values
        values = values.cast(pa.string()) if pa.types.is_string_view(values.type) else values
        values = values.dictionary_decode() if pa.types.is_dictionary(values.type) else values
        if not is_plain(values.type):
            raise ValueError(f"{uri}: column {column.name!r} is {column.type}; only Arrow's usual types are carried")
        try:
            values.validate(full=True)
        except pa.ArrowInvalid as error:
            raise ValueError(f"{uri}: column {column.name!r} is not UTF-8; write it so") from error
        wanted = _TYPES.get(column.name, values.type)
        try:
            columns.append(values.cast(wanted))
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise ValueError(f"{uri}: column {column.name!r} is {column.type}, it must be {wanted}") from error
        fields.append(pa.field(column.name, wanted))
    return pa.Table.from_arrays(columns, schema=pa.schema(fields))
