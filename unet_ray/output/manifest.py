"""The manifest of an output: every listed frame, cut into chunks and shards, generation after generation.

    OUT/manifest/g000-00000-DIGEST.parquet   a row a frame, with the chunk and the shard that it belongs to
    OUT/manifest/_g000.json                  the generation is whole: its files and their digests, sealed by its own

What is planned never moves: frames that are found later are a new generation with chunks and shards of its own.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from unet_ray import storage
from unet_ray.archives.listing import with_roots
from unet_ray.errors import JobFailed
from unet_ray.frames import MANIFEST_SCHEMA, Root
from unet_ray.output.chunks import (
    CHUNK_ID,
    CHUNK_SCHEMA,
    GROUP_ROWS,
    KEY,
    Chunk,
    Cutting,
    _fill,
    chunk_starts,
    file_spans,
    with_chunks,
)
from unet_ray.output.tables import UNREADABLE, parquet_bytes, read_parquet, require_columns
from unet_ray.storage.sealed import are_counts, is_count, is_digest, sealed, unsealed

_KNOWN = pa.schema([(name, pa.string()) for name in ("frame_id", "version", "uri")])


def known_and_new(out: str, listed: pa.Table) -> tuple[pa.Table, pa.Table]:
    """Returns id, version and URI of the planned frames, and the listed rows that are not among them.

    Raises:
        JobFailed: a file of the manifest is damaged or gone.
    """
    known = read_known(out, read_generations(out))
    return known, listed.filter(pc.is_null(pc.index_in(listed["frame_id"], known["frame_id"])))


def read_known(out: str, generations: Sequence[Mapping[str, Any]]) -> pa.Table:
    """Returns id, version and URI of the frames of some generations. Raises JobFailed for a damaged file."""
    files = [file for generation in generations for file in generation["files"]]
    tables = [_read_table(storage.join(out, file["path"]), _KNOWN.names).cast(_KNOWN) for file in files]
    return pa.concat_tables([_KNOWN.empty_table(), *tables]).combine_chunks()


def refuse_doubled(out: str, new: pa.Table) -> None:
    """Raises ValueError where a frame that is new by its id is, by place and version, one that is planned."""
    new_places = _places(new)
    for file in (file for generation in read_generations(out) for file in generation["files"]):
        known = _read_table(storage.join(out, file["path"]), ("frame_id", *_PLACE))
        matches = pc.index_in(new_places, _places(known))
        if matches.null_count < len(matches):
            row = pc.indices_nonzero(pc.is_valid(matches))[0].as_py()
            before, now = known["frame_id"][matches[row].as_py()].as_py(), new["frame_id"][row].as_py()
            raise ValueError(
                f"{new['uri'][row].as_py()} is planned in {out} as {before} and would be labelled once more as {now}; "
                "give the archives as they were given before (those with more frames behind them), or another --out"
            )


_PLACE = ("uri", "kind", "offset_bytes", "row", "version")


def _places(table: pa.Table) -> pa.ChunkedArray:
    """Where each frame lies: a file by its path; without the version, an archive that was written anew under its name
    would pass for the old one."""
    offset, row, version = (pc.fill_null(table[name].cast(pa.string()), "") for name in _PLACE[2:])
    version = pc.if_else(pc.equal(table["kind"], "file"), "", version)
    return pc.binary_join_element_wise(table["uri"], offset, row, version, "\n")


_MARK = re.compile(r"_g(\d{3,})\.json")
_FILE = re.compile(r"manifest/g(\d{3,})-(\d{5,})-([0-9a-f]{16})\.parquet")


def generation_path(number: int) -> str:
    """Returns the path of a generation's record within the output."""
    return f"manifest/_g{number:03d}.json"


def generation_path_of(path: str) -> str:
    """Returns the path of the record of the generation that a file of the manifest belongs to."""
    return f"manifest/_{storage.name(path).partition('-')[0]}.json"


def read_generations(out: str) -> list[dict[str, Any]]:
    """Returns the records of all whole generations, in order.

    Raises:
        JobFailed: a record is damaged, or one before it is missing.
    """
    matches = (_MARK.fullmatch(file.path) for file in storage.list_folder(storage.join(out, "manifest")))
    n_generations = max((int(match[1]) + 1 for match in matches if match), default=0)
    generations = []
    for number in range(n_generations):
        uri = storage.join(out, generation_path(number))
        try:
            generations.append(_checked_generation(unsealed(storage.read_bytes(uri)), number))
        except (FileNotFoundError, ValueError) as error:
            raise lost(uri, error) from error
    return generations


def _checked_generation(generation: dict[str, Any], number: int) -> dict[str, Any]:
    """Returns a record that names only files that this generation may have; raises ValueError for another."""
    files = generation.get("files")
    if not isinstance(files, list) or not files:
        raise ValueError("it names no files")
    for index, file in enumerate(files):
        match = _FILE.fullmatch(require_entry(file)["path"])
        if not match or (int(match[1]), int(match[2])) != (number, index) or not file["sha256"].startswith(match[3]):
            raise ValueError(f"it names {file['path']!r}, which is no file of this generation")
        if not is_count(file.get("rows")):
            raise ValueError(f"it has no counts of {file['path']!r}")
    if not is_count(generation.get("last_shard"), below=_SHARDS):
        raise ValueError("its last shard is no number")
    if not is_count(generation.get("frame_pixels", 0)) or not are_counts(generation.get("ignored", {})):
        raise ValueError("what it counts are no numbers")
    if not _are_roots(generation.get("roots", [])):
        raise ValueError("its roots are no pairs of texts")
    return generation


_SHARDS = 2**30  # the column is int32, and later generations have higher numbers


def _are_roots(value: object) -> bool:
    return isinstance(value, list) and all(
        isinstance(root, list) and len(root) == 2 and all(isinstance(text, str) for text in root) for root in value
    )


def require_entry(file: Any) -> dict[str, Any]:
    """Returns what a small JSON file says of another file, if it has path, size and digest; else raises ValueError."""
    if not isinstance(file, dict) or not isinstance(file.get("path"), str) or not is_count(file.get("bytes")):
        raise ValueError("it says nothing of a file")
    if not is_digest(file.get("sha256")):
        raise ValueError(f"it has no digest of {file['path']!r}")
    if file["path"].startswith("frames/") and not (is_count(file.get("rows")) and are_counts(file.get("rejected"))):
        raise ValueError(f"it has no counts of {file['path']!r}")
    return file


def recorded_roots(generations: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Returns label by URI of the roots that all generations were listed from; earlier versions noted none."""
    return {uri: label for generation in generations for uri, label in generation.get("roots", ())}


def lost(uri: str, error: Exception, remedy: str = "restore it, or start anew with --overwrite") -> JobFailed:
    """Returns the error that says of a file of the plan that it is missing or damaged, and what to do."""
    missing = isinstance(error, FileNotFoundError)
    return JobFailed(f"{uri}: {'missing' if missing else f'damaged ({first_line(error)})'}; {remedy}")


def first_line(error: BaseException) -> str:
    """Returns the first line of what an error says, its kind where it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def append_generation(
    out: str,
    rows: pa.Table,
    lineage_digest: str,
    cutting: Cutting,
    ignored: Mapping[str, int],
    roots: Sequence[Root] = (),
) -> None:
    """Writes new frames as the next generation of the plan; where another job was first, its generation stands."""
    generations = read_generations(out)
    number, first_shard = len(generations), _next_shard(generations)
    frame_pixels = cutting.frame_pixels(rows)
    contents, last_shard = _generation(rows, number, first_shard, frame_pixels, cutting, lineage_digest)
    files = []
    for path, data, n_rows in contents:
        storage.write_whole(storage.join(out, path), data)
        files.append({"path": path, "rows": n_rows, "bytes": len(data), "sha256": storage.sha256(data)})
    generation = {
        "files": files,
        "last_shard": last_shard,
        "ignored": dict(ignored),
        "frame_pixels": frame_pixels,
        "lineage": lineage_digest,
        "roots": [list(root) for root in roots],
    }
    storage.put_if_absent(storage.join(out, generation_path(number)), sealed(generation))


def _next_shard(generations: Sequence[Mapping[str, Any]]) -> int:
    return max((generation["last_shard"] for generation in generations), default=-1) + 1


def _generation(
    rows: pa.Table, number: int, first_shard: int, frame_pixels: int, cutting: Cutting, lineage_digest: str
) -> tuple[list[tuple[str, bytes, int]], int]:
    """Returns path, content and rows of each file of a generation, and its last shard."""
    starts = chunk_starts(rows, cutting.most_frames(frame_pixels))
    sizes = np.diff([*starts, len(rows)])
    shards = first_shard + _fill(sizes, cutting.shard_rows)
    planned = with_chunks(rows, starts, sizes, shards, number, lineage_digest)
    files = []
    for index, (start, length) in enumerate(file_spans(starts, sizes)):
        data = parquet_bytes(planned.slice(start, length), row_group_size=GROUP_ROWS)
        files.append((f"manifest/g{number:03d}-{index:05d}-{storage.sha256(data)[:16]}.parquet", data, length))
    return files, int(shards[-1])


def mend(out: str, listed: pa.Table, cutting: Cutting, lineage_digest: str) -> list[str]:
    """Writes damaged or lost files of the manifest again where the archives are as they were; returns their paths.

    A file's name holds its digest: only the very same bytes take its place. Where the listing does not give them
    (frames have gone or changed, or chunks were cut with other options), the file stays as it is.
    """
    generations = read_generations(out)
    broken = [[file["path"] for file in generation["files"] if not _is_whole(out, file)] for generation in generations]
    mended = []
    for number, paths in enumerate(broken):
        if not paths:
            continue
        if any(paths and other != number for other, paths in enumerate(broken)):
            break  # what else is damaged decides which frames are missing here
        rows = _rows_of(out, listed, generations, number)
        if len(rows) != sum(file["rows"] for file in generations[number]["files"]):
            continue
        roots = [uri for uri, _ in generations[number].get("roots", ())]
        rows = with_roots(rows, roots) if roots else rows
        frame_pixels = generations[number].get("frame_pixels", 0)
        contents, _ = _generation(
            rows, number, _next_shard(generations[:number]), frame_pixels, cutting, lineage_digest
        )
        for path, data, _ in contents:
            if path in paths:
                storage.write_whole(storage.join(out, path), data)
                mended.append(path)
    return mended


def _rows_of(out: str, listed: pa.Table, generations: Sequence[Mapping[str, Any]], number: int) -> pa.Table:
    """The listed rows of a generation: those that its published files have, else all that no other generation has."""
    shards = range(_next_shard(generations[:number]), generations[number]["last_shard"] + 1)
    try:
        uris = [storage.join(out, "frames", f"part-{shard:05d}.parquet") for shard in shards]
        ids = [read_parquet(storage.read_bytes(uri), ["frame_id"])["frame_id"] for uri in uris]
        published = pa.concat_tables([pa.table({"frame_id": column}) for column in ids])["frame_id"]
        return listed.filter(pc.is_in(listed["frame_id"], value_set=published))
    except (FileNotFoundError, ValueError, KeyError, pa.ArrowException):
        known = read_known(out, [generation for other, generation in enumerate(generations) if other != number])
        return listed.filter(pc.is_null(pc.index_in(listed["frame_id"], known["frame_id"])))


def _is_whole(out: str, file: Mapping[str, Any]) -> bool:
    try:
        return storage.sha256(storage.read_bytes(storage.join(out, file["path"]))) == file["sha256"]
    except FileNotFoundError:
        return False


def delete_unmarked(out: str) -> None:
    """Deletes manifest files that a killed or slower job wrote for a generation whose record names others.

    Other tools read all of `manifest/`. A generation's record is put once, so such a file can never come to count.
    """
    generations = read_generations(out)
    named = {file["path"] for generation in generations for file in generation["files"]}
    for file in storage.list_folder(storage.join(out, "manifest")):
        generation = re.match(r"g(\d{3,})-", file.path)
        if generation and int(generation[1]) < len(generations) and f"manifest/{file.path}" not in named:
            storage.delete(file.uri)


def read_chunks(manifest_uri: str) -> Iterator[Chunk]:
    """Yields the chunks of one file of the manifest, in order. Raises JobFailed where it is damaged."""
    table = _read_table(manifest_uri, _NEVER_NULL)
    ids = pc.run_end_encode(table["chunk_id"].combine_chunks())
    start = 0
    for end in ids.run_ends.to_pylist():
        chunk = Chunk(
            chunk_id=table["chunk_id"][start].as_py(),
            key=table["chunk_key"][start].as_py(),
            manifest_uri=manifest_uri,
            row_start=start,
            n_rows=end - start,
            shard=table["shard"][start].as_py(),
        )
        if not CHUNK_ID.fullmatch(chunk.chunk_id) or not KEY.fullmatch(chunk.key) or chunk.shard < 0:
            raise lost(manifest_uri, ValueError(f"it has no chunk {chunk.chunk_id!r} of ours"))
        yield chunk
        start = end


_NEVER_NULL = (*CHUNK_SCHEMA.names, "frame_id", "uri", "version", "kind")


def read_rows(chunk: Chunk) -> pa.Table:
    """Returns the manifest's rows of a chunk: `frames.MANIFEST_SCHEMA` and the catalogue's own columns."""
    n_rows = chunk.n_rows if chunk.rows is None else chunk.rows[-1] + 1
    first, last = chunk.row_start // GROUP_ROWS, (chunk.row_start + n_rows - 1) // GROUP_ROWS
    rows = pa.concat_tables([_read_group(chunk.manifest_uri, group) for group in range(first, last + 1)])
    rows = rows.slice(chunk.row_start - first * GROUP_ROWS, n_rows).drop_columns(CHUNK_SCHEMA.names)
    return rows if chunk.rows is None else rows.take(pa.array(chunk.rows))


@lru_cache(maxsize=8)
def _read_group(uri: str, group: int) -> pa.Table:
    # A manifest's file is named by its content, so what is cached here cannot be stale.
    with _named(uri):
        return open_manifest(uri).read_row_group(group)


@lru_cache(maxsize=4)
def open_manifest(uri: str) -> pq.ParquetFile:
    """Opens one file of the manifest; the last few stay open. Raises JobFailed where it is damaged or gone."""
    with _named(uri):
        return pq.ParquetFile(storage.open_read(uri))


@contextmanager
def _named(uri: str) -> Iterator[None]:
    """Says of a file of the manifest that it is damaged; what Arrow says of it names no file."""
    try:
        yield
    except (storage.StorageError, PermissionError):
        raise
    except UNREADABLE as error:
        raise lost(uri, error) from error


def _read_table(uri: str, columns: Sequence[str]) -> pa.Table:
    with _named(uri):
        data = storage.read_bytes(uri)
        if storage.sha256(data)[:16] not in storage.name(uri):
            raise ValueError("its content is not what was planned")
        table = read_parquet(data, columns)
        require_columns(pq.read_schema(io.BytesIO(data)), (*MANIFEST_SCHEMA, *CHUNK_SCHEMA))
        for name in columns:
            if name in _NEVER_NULL and table[name].null_count:
                raise ValueError(f"its column {name} has nulls")
        return table
