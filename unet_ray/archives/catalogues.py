"""A catalogue: a Parquet or CSV file with one row a frame and a column `uri`.

| column | |
|---|---|
| `uri` | the frame's file; where it is relative, to the catalogue's folder |
| `frame_id` | optional: its name in all outputs; without it the `uri` as it stands |
| `sequence`, `camera`, `frame_index`, `timestamp_ns` | optional; without them the id says it, as paths do elsewhere |
| any other | carried through to the output |
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv

from unet_ray import storage
from unet_ray.archives.members import MAX_NAME_BYTES
from unet_ray.archives.parquet import find_image_column
from unet_ray.archives.parquet_files import Allowance, TooMuch, is_plain, open_parquet
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
        f"{uri} has neither a column {image_column or 'image'!r} of encoded images nor a column 'uri'; "
        f"its columns are {', '.join(schema.names)}"
    )


def read_catalogue(uri: str) -> Iterator[tuple[pa.Table, list[storage.FileInfo]]]:
    """Yields a catalogue piece by piece: its rows with `frame_id` filled in, and the file of each row.

    A file that is not there has the version `""`, which no file has: it becomes a row with the reason `missing`.

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
        if "frame_id" not in table.column_names:
            table = table.append_column("frame_id", table["uri"])
        n_rows += table.num_rows
        whole = [entry if "://" in entry or entry.startswith("/") else storage.join(folder, entry) for entry in uris]
        with ThreadPoolExecutor(storage.REQUESTS_IN_FLIGHT) as pool:
            yield table, list(pool.map(_look, [storage.resolve(entry) for entry in whole]))
    if not n_rows:
        raise ValueError(f"{uri} holds no frame: it has no rows")


def _refuse_long_names(table: pa.Table, uri: str) -> None:
    for name in (name for name, kind in _TYPES.items() if kind == pa.string() and name in table.column_names):
        longest = pc.max(pc.binary_length(table[name])).as_py() or 0
        if longest > MAX_NAME_BYTES:
            raise ValueError(f"{uri}: a {name} has {longest:,} bytes; at most {MAX_NAME_BYTES:,} are read")


def _look(uri: str) -> storage.FileInfo:
    try:
        return storage.info(uri)
    except OSError as error:
        if not isinstance(error, (FileNotFoundError, NotADirectoryError)) and error.errno != errno.ENAMETOOLONG:
            raise
        return storage.FileInfo(path=storage.name(uri), uri=uri, size_bytes=0, version="")


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
    options = csv.ConvertOptions(column_types=_TYPES, strings_can_be_null=True)
    with storage.open_read(uri) as source:
        try:
            yield from csv.open_csv(source, convert_options=options)
        except pa.ArrowInvalid as error:
            raise ValueError(f"{uri} is no CSV file that can be read: {' '.join(str(error).split())}") from error


def _typed(batch: pa.RecordBatch, uri: str) -> pa.Table:
    """The catalogue's rows with plain Arrow types: no dictionaries, no extension types."""
    if "uri" not in batch.schema.names:
        raise ValueError(f"{uri} has no column 'uri'; its columns are {', '.join(batch.schema.names)}")
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
        wanted = _TYPES.get(column.name, values.type)
        try:
            columns.append(values.cast(wanted))
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise ValueError(f"{uri}: column {column.name!r} is {column.type}, it must be {wanted}") from error
        fields.append(pa.field(column.name, wanted))
    return pa.Table.from_arrays(columns, schema=pa.schema(fields))
