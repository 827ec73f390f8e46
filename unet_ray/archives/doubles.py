"""Listings that name one frame twice are refused: an archive reached by two ways, a file that is named twice.

A link or a hard link below a root has a name of its own there and is a frame of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from unet_ray.frames import archive_of
from unet_ray.storage import overlaps


def require_once(table: pa.Table, roots: Mapping[str, bool]) -> None:
    """Refuses a listing that has one frame twice.

    Args:
        table: the listing: `frames.MANIFEST_SCHEMA`, ids that differ.
        roots: of each root whether it is a folder.

    Raises:
        ValueError: one line that names the frame's place and both ids.
    """
    if list(roots.values()) == [True]:
        # The ids of one folder's files are their paths, so that these differ; a million take 0.2 GB to compare.
        table = table.filter(pc.not_equal(table["kind"], "file"))
    column = table["uri"].cast(pa.large_string())  # of 20 million frames a string array's offsets do not suffice
    uris = pc.unique(column)
    if len(uris) < len(table):
        _require_distinct_members(table, pc.index_in(column, value_set=uris))
    del column
    _require_distinct_files(uris, [root for root, is_folder in roots.items() if is_folder])


def _require_distinct_members(table: pa.Table, file_of_row: pa.ChunkedArray) -> None:
    """Rows of one URI differ by offset or by row; a Parquet file is read by one column, so that says nothing more."""
    keys = [pc.fill_null(table[name], -1).to_numpy() for name in ("row", "offset_bytes")]
    keys.append(file_of_row.to_numpy())
    order = np.lexsort(keys)
    same = np.ones(len(order) - 1, bool)
    for key in keys:
        same &= np.diff(key[order]) == 0
    for at in np.flatnonzero(same).tolist():
        first, second = sorted(order[at : at + 2].tolist())
        ids = [table["frame_id"][row].as_py() for row in (first, second)]
        if table["kind"][first].as_py() == "tar" and len({archive_of(frame_id) for frame_id in ids}) == 1:
            continue  # a link in it has a name of its own, as one below a folder
        uri = table["uri"][first].as_py()
        raise ValueError(f"{uri} is listed twice: as {ids[0]!r} and as {ids[1]!r} it is one frame; name each once")


def _require_distinct_files(uris: pa.Array, folders: Sequence[str]) -> None:
    """Different URIs of one file, by links among the folders above it; those below one root are names of their own."""
    encoded = _folders_of(uris).dictionary_encode()
    known: dict[str, str] = {}
    order = {root: index for index, root in enumerate(folders)}
    n_paths = len(encoded.dictionary)
    # One by one: a million folders as Python's strings would take more memory than the listing.
    reals = pa.array(
        (overlaps.real_uri(path.as_py() or "/", known).rstrip("/") for path in encoded.dictionary),
        pa.large_string(),
        size=n_paths,
    )
    if pc.all(pc.equal(reals, encoded.dictionary)).as_py():  # no links: what differs differs
        return
    roots = pa.array((_root_of(path.as_py(), order) for path in encoded.dictionary), pa.int64(), size=n_paths)
    names = pc.replace_substring_regex(uris, r"(?s)^.*/", "")
    files = pc.binary_join_element_wise(reals.take(encoded.indices), names, pa.scalar("/", pa.large_string()))
    if pc.count_distinct(files).as_py() == len(files):
        return
    rows = pa.table({"file": files, "root": roots.take(encoded.indices)})
    groups = rows.group_by("file").aggregate([("root", "count"), ("root", "count_distinct"), ("root", "min")])
    is_double = pc.or_(pc.greater(groups["root_count_distinct"], 1), pc.equal(groups["root_min"], -1))
    doubles = groups.filter(pc.and_(is_double, pc.greater(groups["root_count"], 1)))["file"]
    if len(doubles):
        pair = uris.filter(pc.equal(files, doubles[0])).slice(0, 2).to_pylist()
        raise ValueError(f"{pair[0]} and {pair[1]} are one file, {doubles[0]}; name each once")


def _root_of(folder: str, order: Mapping[str, int]) -> int:
    """The place among the roots of the one that a folder is or lies in; -1 where a catalogue alone names its files."""
    return next((order[path] for path in (folder or "/", *overlaps.folders_above(folder)) if path in order), -1)


def require_outside(uris: pa.ChunkedArray, out: str) -> None:
    """Refuses frames that lie in the output, to which a catalogue or a link leads.

    Raises:
        ValueError: one line that names a folder of such frames.
    """
    known: dict[str, str] = {}
    real_out = overlaps.real_uri(out, known)
    for chunk in uris.chunks:
        for path in pc.unique(_folders_of(chunk)):
            folder = path.as_py() or "/"
            if overlaps.lies_in(overlaps.real_uri(folder, known), real_out):
                raise ValueError(f"--frames leads to {folder}, which lies in --out {out}; give an --out beside it")


def _folders_of(uris: pa.Array) -> pa.Array:
    """Returns the folder of each URI, `""` for the root of the file tree."""
    return pc.replace_substring_regex(uris, r"/[^/]*$", "")
