"""Folders, tar, zip and Parquet files and catalogues of frames to a table of frame references: no bytes, no pixels.

>>> listing = list_archives(["drives/", "more.tar"])
>>> listing.table.slice(0, 96)            # frames.MANIFEST_SCHEMA, in the order of the output

Everything below a root is accounted for: listed (a row of the table), ignored (counted by extension: what has no
image extension, or is hidden), or unlistable (an unreadable folder, a tar that ends early), which fails the job.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from unet_ray import storage
from unet_ray.archives import doubles, members
from unet_ray.archives.catalogues import is_catalogue, read_catalogue
from unet_ray.archives.kinds import list_members
from unet_ray.archives.members import Findings
from unet_ray.archives.reach import Reach
from unet_ray.archives.roots import FoundRoots, find_roots, folder_of
from unet_ray.frames import (
    IMAGE_EXTENSIONS,
    MANIFEST_SCHEMA,
    Listing,
    PathFields,
    extension,
    is_frame,
    is_text,
    natural_key,
    parse_path,
    roots_metadata,
    with_digits,
)
from unet_ray.messages import first_few
from unet_ray.storage.listings import ListPart

_ARCHIVES_AT_ONCE = 8
_ROWS_A_BATCH = 50_000 // _ARCHIVES_AT_ONCE  # each of so many holds that as objects


def list_archives(
    uris: Sequence[str],
    *,
    roots: FoundRoots | None = None,
    path_pattern: str | None = None,
    image_column: str | None = None,
    include_hidden: bool = False,
    allow_uris: Sequence[str] = (),
) -> Listing:
    """Lists folders (at any depth), tar, zip and Parquet files, catalogues, and globs of them; archives in parallel.

    A frame's id is its path relative to its root: `drive07/000001.png`; inside an archive the member's name follows
    after `!`. Of several roots, the id begins with the root's name.

    Args:
        uris: the roots.
        roots: what `find_roots` made of them, where that was called before.
        path_pattern: see `parse_path`.
        image_column: the column of Parquet files that holds the encoded images, where it is not `image`.
        include_hidden: lists what `frames.is_hidden`, too; what a root or a catalogue names itself is never hidden.
        allow_uris: prefixes of what catalogues may name beside what lies below their folders and the roots.

    Raises:
        ValueError: a root that does not exist or holds no frame, two frames with one id, or a frame twice.
        StorageError: the store did not answer.
    """
    rows, findings = _Rows(path_pattern), Findings(include_hidden)
    archives: list[tuple[str, storage.FileInfo]] = []
    resolved = [storage.resolve(uri) for uri in uris]
    roots = find_roots(uris, include_hidden=include_hidden) if roots is None else roots
    findings.ignored.update({members.HIDDEN: roots.n_hidden} if roots.n_hidden else {})
    reach = Reach((uri for _, uri in roots.places), allow_uris)
    is_folder = {uri: storage.is_folder(uri) for _, uri in roots.places}
    for label, uri in roots.places:
        if is_folder[uri]:
            list_some = partial(_list_part, f"{label}/" if label else "", uri, path_pattern, include_hidden)
            for table, of_part, part_archives in _in_threads(list_some, storage.list_parts(uri)):
                rows.add_table(table)
                findings.add(of_part)
                archives += part_archives
        else:
            archives += _list_file(label, uri, rows, findings, image_column, reach, is_named=uri in resolved)
    list_one = partial(
        list_archive, path_pattern=path_pattern, image_column=image_column, include_hidden=include_hidden
    )
    for table, of_archive in _in_threads(list_one, archives):
        rows.add_table(table)
        findings.add(of_archive)
    table = rows.table()
    if len(table) == 0 and not findings.unlistable:
        raise ValueError(no_frames(uris, findings.ignored))
    _require_distinct(table)
    doubles.require_once(table, is_folder)
    order, columns, schema = _order(table), table.columns, _schema_with_roots(table.schema, resolved)
    del table, rows
    _take(columns, order)
    return Listing(
        table=pa.Table.from_arrays(columns, schema=schema),
        ignored=dict(sorted(findings.ignored.items())),
        include_hidden=include_hidden,
        not_files=tuple(findings.not_files),
        unlistable=tuple(findings.unlistable),
        roots=roots.roots,
    )


def no_frames(uris: Sequence[str], ignored: Mapping[str, int]) -> str:
    """Returns the error of roots that hold no frame."""
    content = first_few([f"{number:,} {kind}" for kind, number in sorted(ignored.items())]) or "nothing"
    content += " (--include-hidden takes what is hidden)" if members.HIDDEN in ignored else ""
    return f"{', '.join(uris)} holds {content}; frames are {', '.join(IMAGE_EXTENSIONS)}"


def _in_threads(function: Callable[[Any], Any], arguments: Sequence[Any]) -> Iterator[Any]:
    with ThreadPoolExecutor(_ARCHIVES_AT_ONCE) as pool:
        yield from pool.map(function, arguments)


def list_archive(
    archive: tuple[str, storage.FileInfo],
    *,
    path_pattern: str | None,
    image_column: str | None,
    include_hidden: bool = False,
) -> tuple[pa.Table, Findings]:
    """Lists one tar, zip or Parquet file, given by its path relative to the root and its file."""
    path, file = archive
    rows, findings = _Rows(path_pattern), Findings(include_hidden)
    for member in list_members(file, findings, image_column):
        rows.add(f"{path}!{member.path}", file, extension(path)[1:], member)
    return rows.table(), findings


class _Rows:
    """Rows of a manifest as Arrow batches: a million are 200 MB here and 1 GB as objects.

    Listing a million took 21 s as files, 37 s in a tar, 33 s in a zip (the store's time apart; one core of 2), the
    process was at 0.8, 0.8 and 1.1 GB at most (2026-11-21).
    """

    def __init__(self, path_pattern: str | None):
        self.path_pattern = path_pattern
        self._rows: list[tuple[Any, ...]] = []
        self._tables: list[pa.Table] = []

    def add(
        self, frame_id: str, file: storage.FileInfo, kind: str = "file", member: members.Member | None = None
    ) -> None:
        location = (0, file.size_bytes, None, None) if member is None else member[1:]
        fields = parse_path(frame_id, self.path_pattern)
        self._rows.append((frame_id, file.uri, kind, *location, file.version, *fields))
        if len(self._rows) == _ROWS_A_BATCH:
            self._flush()

    def add_table(self, table: pa.Table) -> None:
        self._tables.append(table)

    def _flush(self) -> None:
        columns = zip(*self._rows, strict=True) if self._rows else [()] * len(MANIFEST_SCHEMA)
        arrays = [pa.array(column, field.type) for column, field in zip(columns, MANIFEST_SCHEMA, strict=True)]
        self._tables.append(pa.Table.from_arrays(arrays, schema=MANIFEST_SCHEMA))
        self._rows = []

    def table(self) -> pa.Table:
        self._flush()
        try:
            # MANIFEST_SCHEMA comes first, so that carried columns follow behind whatever the order of the roots.
            return pa.concat_tables([MANIFEST_SCHEMA.empty_table(), *self._tables], promote_options="default")
        except pa.ArrowException as error:
            raise ValueError(
                f"catalogues have columns of one name and different types: {' '.join(str(error).split())}"
            ) from error


def with_roots(table: pa.Table, uris: Iterable[str]) -> pa.Table:
    """Returns listed rows as a listing of these roots has them: `ROOTS_KEY` in the schema's metadata."""
    return table.cast(_schema_with_roots(table.schema, uris))


def _schema_with_roots(schema: pa.Schema, uris: Iterable[str]) -> pa.Schema:
    return schema.with_metadata(roots_metadata(folder_of(uri) for uri in uris if storage.is_local(uri)))


def _list_part(
    prefix: str, root: str, path_pattern: str | None, include_hidden: bool, list_some: ListPart
) -> tuple[pa.Table, Findings, list[tuple[str, storage.FileInfo]]]:
    """Lists a part of a folder: the frames that are files, and the archives."""
    rows, findings = _Rows(path_pattern), Findings(include_hidden)

    def note(where: str, error: OSError) -> None:
        if isinstance(error, storage.StorageError):
            raise error
        if findings.hides(where.removeprefix(f"{root.rstrip('/')}/")):
            return
        if isinstance(error, storage.NotAFile):
            findings.ignore_no_file(where)
            return
        findings.refuse(where, error.strerror or str(error))

    files = list_some(note)
    archives = [
        archive
        for file in files
        if not findings.hides(file.path)
        for archive in _sort_out(prefix + file.path, file, rows, findings)
    ]
    return rows.table(), findings, archives


def _list_file(
    label: str, uri: str, rows: _Rows, findings: Findings, image_column: str | None, reach: Reach, *, is_named: bool
) -> list[tuple[str, storage.FileInfo]]:
    """Adds the frame that a file is or those of a catalogue, returns an archive; a glob's match may be ignored."""
    try:
        file, is_table = look_at_file(uri, image_column, is_named=is_named)
    except storage.NotAFile:
        findings.ignore_no_file(uri)
        return []
    if is_table:
        _add_catalogue(uri, rows, findings, reach)
        return []
    return list(_sort_out(label, file, rows, findings))


def look_at_file(uri: str, image_column: str | None, *, is_named: bool) -> tuple[storage.FileInfo, bool]:
    """Returns a file that is no folder, and whether it is a catalogue.

    Args:
        uri: the file.
        image_column: see `list_archives`.
        is_named: whether it was given itself, and not matched by a glob.

    Raises:
        ValueError: it is not there, or is nothing that is read.
        NotAFile: a glob's match is a pipe, a socket or a device.
        StorageError: the store did not answer.
    """
    try:
        file = storage.info(uri)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ValueError(f"{uri}: no such folder or file") from error
    except storage.NotAFile as error:
        if not is_named:
            raise
        raise ValueError(f"{uri} is {error.strerror}; give a folder, a file, or a glob of them") from error
    if (why := members.why_unreadable(uri)) is not None:
        raise ValueError(f"{uri}: {why}")
    if is_catalogue(uri, image_column):
        return file, True
    if is_named and not members.is_archive(uri) and not is_frame(uri):
        raise ValueError(f"{uri} is not an archive; give a folder, a tar, zip, Parquet or CSV file, or a glob of them")
    return file, False


def _sort_out(
    path: str, file: storage.FileInfo, rows: _Rows, findings: Findings
) -> Iterator[tuple[str, storage.FileInfo]]:
    """Adds a file that is a frame, yields one that is an archive, and notes any other."""
    if not is_text(path):
        findings.refuse(file.uri, "a name that is not UTF-8")
    elif is_frame(path):
        rows.add(path, file)
    elif (why := members.why_unreadable(path)) is not None:
        findings.refuse(file.uri, why)
    elif members.is_archive(path):
        yield path, file
    else:
        findings.ignore(path)


def _add_catalogue(uri: str, rows: _Rows, findings: Findings, reach: Reach) -> None:
    """Adds a catalogue's rows; what its columns do not say is read from the id, as from a path."""
    for given, files in read_catalogue(uri, reach):
        part = _Rows(rows.path_pattern)
        for file in files:
            if isinstance(file, OSError):
                findings.refuse_frame(file)
        given = given.filter(pa.array([isinstance(file, storage.FileInfo) for file in files]))
        present = [file for file in files if isinstance(file, storage.FileInfo)]
        for frame_id, file in zip(given["frame_id"].to_pylist(), present, strict=True):
            part.add(frame_id, file)
        table = part.table()
        for name in given.column_names:
            column = given[name]
            if name in PathFields._fields:
                filled = pc.coalesce(column, table[name])
                table = table.set_column(table.column_names.index(name), MANIFEST_SCHEMA.field(name), filled)
            elif name not in ("uri", "frame_id"):
                if name in MANIFEST_SCHEMA.names or name.startswith("_"):
                    raise ValueError(f"{uri}: the column's name {name!r} is taken; give it another")
                table = table.append_column(given.schema.field(name), column)
        rows.add_table(table)


def _require_distinct(table: pa.Table) -> None:
    frame_ids = table["frame_id"]
    if pc.count_distinct(frame_ids).as_py() == len(table):
        return
    counts = pc.value_counts(frame_ids)
    doubled = counts.filter(pc.greater(counts.field("counts"), 1))[0]["values"].as_py()
    raise ValueError(f"two frames have the id {doubled!r}; give each root once, and no name twice in an archive")


def _order(table: pa.Table) -> pa.Array:
    """Returns the rows by sequence, camera and name."""
    keys = pa.table(
        {
            "sequence": _ranks(table["sequence"]),
            "camera": _ranks(table["camera"]),
            "name": pa.chunked_array(map(_all_with_digits, table["frame_id"].chunks), pa.large_string()),
            "frame_id": table["frame_id"],  # on a tie, as in `natural_key`
        }
    )
    return pc.sort_indices(keys, sort_keys=[(name, "ascending") for name in keys.column_names])


def _take(columns: list[pa.ChunkedArray], order: pa.Array) -> None:
    """Orders columns in their place: at most one of them is there twice at a time."""
    for index in range(len(columns)):
        # Arrow would combine them for itself, and keep the chunks meanwhile.
        columns[index] = pa.table([columns[index]], names=[""]).combine_chunks().column(0)
        pa.default_memory_pool().release_unused()  # of what was freed, which the pool keeps for later
        columns[index] = columns[index].take(order)


def _all_with_digits(texts: pa.Array) -> pa.Array:
    return pa.array((with_digits(text.as_py()) for text in texts), pa.large_string(), size=len(texts))


def _ranks(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Each value's place among the column's different values, which are few."""
    values = pc.unique(column)
    texts = values.to_pylist()
    ranks = np.empty(len(texts), np.int64)
    ranks[sorted(range(len(texts)), key=lambda index: natural_key(texts[index]))] = np.arange(len(texts))
    return pc.take(pa.array(ranks), pc.index_in(column, value_set=values))
