"""Records of finished chunks: one commits a part of the labels, and says what is known of it without opening it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from unet_ray import storage
from unet_ray.output.chunks import Chunk
from unet_ray.output.rows import REASONS
from unet_ray.output.tables import parquet_bytes, read_parquet
from unet_ray.storage.sealed import are_counts, is_count, is_digest, sealed, unsealed

PART_FILE = re.compile(r"([0-9a-f]{32})-([0-9a-f]{16})\.parquet")
"""Name of a part: its chunk's key and the beginning of its digest."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """A commit record: what is known of a finished chunk without opening its part."""

    chunk_id: str
    key: str
    part: str
    """Name of the part."""
    sha256: str
    size_bytes: int
    n_rows: int
    ok: int
    rejected: Mapping[str, int]
    """Number of rejected frames by reason."""
    writer: str


def committed_keys(out: str) -> set[str]:
    """Returns the keys that have a record and a part."""
    parts = list_work(out, "parts")
    keys = {file.path.removesuffix(".json") for file in list_work(out, "records")}
    return keys & {file.path.partition("-")[0] for file in parts}


def list_work(out: str, folder: str) -> list[storage.FileInfo]:
    """Returns the files of a folder below `_work/`."""
    return storage.list_folder(storage.join(out, "_work", folder))


def record_uri(out: str, key: str) -> str:
    """Returns where the record of a key lies."""
    return storage.join(out, "_work", "records", f"{key}.json")


def part_uri(out: str, part: str) -> str:
    """Returns where a part lies."""
    return storage.join(out, "_work", "parts", part)


def kept_uri(out: str, name: str) -> str:
    """Returns where labels of a chunk lie that a damaged file still had."""
    return storage.join(out, "_work", "kept", name)


def content_name(key: str, data: bytes) -> str:
    """Returns the name of a file that belongs to a chunk, from its key and content."""
    return f"{key}-{storage.sha256(data)[:16]}.parquet"


def commit(out: str, chunk: Chunk, table: pa.Table, *, writer: str) -> Record:
    """Writes a finished chunk: its part, then its record.

    Args:
        out: the output.
        chunk: which chunk.
        table: its rows, in the manifest's order (`rows.result_table`). Where one is rejected and `chunk.kept` has a
            label of that frame, the label stays.
        writer: names the job, for a person who reads the record.

    Returns:
        The record that stands: this one, or that of another job which was first.
    """
    assert len(table) == chunk.n_rows, (len(table), chunk)
    if chunk.kept is not None:
        table = _with_kept(out, chunk.kept, table)
    data = parquet_bytes(table)
    reasons = pc.value_counts(pc.drop_null(table["reason"])).to_pylist()
    rejected = {count["values"]: count["counts"] for count in sorted(reasons, key=lambda count: count["values"])}
    record = Record(
        chunk_id=chunk.chunk_id,
        key=chunk.key,
        part=content_name(chunk.key, data),
        sha256=storage.sha256(data),
        size_bytes=len(data),
        n_rows=len(table),
        ok=len(table) - sum(rejected.values()),
        rejected=rejected,
        writer=writer,
    )
    storage.write_whole(part_uri(out, record.part), data)
    if storage.put_if_absent(record_uri(out, chunk.key), sealed(dataclasses.asdict(record))):
        return record
    return read_records(out, [chunk.key])[0]


def _with_kept(out: str, name: str, table: pa.Table) -> pa.Table:
    """Puts kept labels in place of rejected rows, with the reason in `error`."""
    try:
        data = storage.read_bytes(kept_uri(out, name))
    except FileNotFoundError:
        return table  # another job has published the file that they were kept for
    if not name.endswith(f"-{storage.sha256(data)[:16]}.parquet"):
        return table
    kept = read_parquet(data)
    rows = {row: index for index, row in enumerate(kept["place"].to_pylist())}
    source = pa.array(
        [rows.get(n) if reason else None for n, reason in enumerate(table["reason"].to_pylist())], pa.int64()
    )
    is_kept = pc.is_valid(source)
    why = pc.binary_join_element_wise(
        "kept from a damaged file; the frame could not be labelled again", table["reason"], table["error"], ": "
    )
    values = {name: kept[name].take(source) for name in kept.column_names if name != "place"}
    for side in ("height_px", "width_px"):
        values[side] = pc.coalesce(values[side], table[side])
    values |= {"status": pa.scalar("ok"), "reason": pa.scalar(None, pa.string()), "error": why}
    for column, value in values.items():
        index = table.column_names.index(column)
        table = table.set_column(index, table.schema.field(column), pc.if_else(is_kept, value, table[column]))
    return table


def read_records(out: str, keys: Sequence[str]) -> list[Record]:
    """Returns the records of chunks that have one. Raises StorageError where one cannot be read."""
    contents = storage.read_many([(record_uri(out, key), 0, None) for key in keys])
    for content in contents:
        if isinstance(content, OSError):
            raise content
    records = []
    for key, content in zip(keys, contents, strict=True):
        try:
            records.append(_checked_record(unsealed(content), key))  # type: ignore[arg-type]
        except (ValueError, TypeError) as error:
            storage.delete(record_uri(out, key))
            raise storage.StorageError(
                f"{record_uri(out, key)} is damaged; run the same command again: its frames are done anew"
            ) from error
    return records


def _checked_record(content: Mapping[str, Any], key: str) -> Record:
    record = Record(**content)
    numbers = (record.size_bytes, record.n_rows, record.ok)
    if not is_digest(record.sha256) or not all(map(is_count, numbers)):
        raise ValueError("it has no digest or no counts")
    match = PART_FILE.fullmatch(record.part)
    if record.key != key or not match or match[1] != key or not record.sha256.startswith(match[2]):
        raise ValueError("it names a part that is not its own")
    if not are_counts(record.rejected) or not set(record.rejected) <= set(REASONS):
        raise ValueError("it counts frames by reasons that there are not")
    return record
