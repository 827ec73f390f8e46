"""What of a plan is done: commit records of chunks, and the published files that stand for theirs.

    OUT/_work/parts/*.parquet      rows of a finished chunk, named by its key and their digest
    OUT/_work/records/KEY.json     the chunk is done: its part, digest, counts
    OUT/_work/shards/FILE.json     a file of frames/ is or will be of these bytes; it stands for its chunks where it is
    OUT/_work/damaged/FILE         what `verify` found to be damaged
    OUT/_work/kept/*.parquet       labels that a damaged file still had (see `salvage`)
    OUT/_work/retries/000.json     rejected frames that are tried again (see `retries`)

A chunk's key is a digest of its frames with their versions and of the lineage. A chunk is **done** when the record of
its key exists, or when its shard is published (see `publish`). No lock: two jobs on one output write the same bytes
under the same keys, and of two records of one key the first stands.

Steps of a commit, after each of which a kill does no harm: (1) the part, whole or not at all: without a record it is
nothing; (2) the record, put if absent: the chunk is done.

Any of these files may be a stranger's or of a job whose output was overwritten. So every name in them is one that this
module would have given, and what is said of a published file counts only beside the key of its chunks.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pyarrow.parquet as pq

from unet_ray import storage
from unet_ray.output import manifest, retries
from unet_ray.output.chunks import Chunk
from unet_ray.output.plans import Plan, read_summary
from unet_ray.output.records import PART_FILE, Record, committed_keys, list_work, part_uri, read_records, record_uri
from unet_ray.output.retries import Retry
from unet_ray.output.tables import UNREADABLE
from unet_ray.storage.sealed import is_count, same_json, sealed, unsealed

FILES_KEY = "unet_ray.files"
"""In the footer of class_statistics.parquet: what summary.json says of the files of `frames/`."""

_SHARD = re.compile(r"part-(\d{5,})\.parquet")


# --- chunks ---


def pending(plan: Plan) -> list[Chunk]:
    """Returns the chunks that are not done, in order; lists the records and opens none of them."""
    # Records before summary.json: they go after it was written, so who sees none of them sees it.
    recorded = committed_keys(plan.out)
    published = published_shards(plan)
    chunks = [chunk for chunk in plan.chunks if chunk.shard not in published and chunk.key not in recorded]
    undone = {chunk.chunk_id for chunk in chunks}
    again = [chunk for _, chunk in open_retries(plan) if chunk.key not in recorded and chunk.chunk_id not in undone]
    if chunks:
        kept = {match[1]: match[0] for file in list_work(plan.out, "kept") if (match := PART_FILE.fullmatch(file.path))}
        chunks = [dataclasses.replace(chunk, kept=kept.get(chunk.key)) for chunk in chunks]
    return [*chunks, *again]


def open_retries(plan: Plan) -> list[tuple[Retry, Chunk]]:
    """Returns the chunks of all retries that no published file holds yet, retry after retry."""
    every = retries.read(plan)
    if not every:
        return []
    published = published_shards(plan)
    applied = dict.fromkeys(plan.of_shard, 0)
    for entry in read_notes(plan):
        shard = shard_of(entry["file"]["path"])
        if shard in applied and published.get(shard) == entry["file"]:
            applied[shard] = entry["n_retries"]
    return [(retry, chunk) for retry in every for chunk in retry.chunks(plan) if retry.number >= applied[chunk.shard]]


def done_so_far(plan: Plan) -> tuple[int, Counter[str]]:
    """Returns the number of frames that are done and not to be tried again, and of the rejected ones by reason."""
    published, recorded = published_shards(plan), committed_keys(plan.out)
    is_done = {c.chunk_id for c in plan.chunks if c.shard in published or c.key in recorded}
    keys = [c.key for c in plan.chunks if c.shard not in published and c.key in recorded]
    records = read_records(plan.out, keys)
    n_done = sum(chunk.n_rows for chunk in plan.chunks if chunk.chunk_id in is_done)
    rejected = rejected_of(published.values(), records)
    for retry, chunk in open_retries(plan):
        if chunk.chunk_id in is_done:
            rejected.subtract(retry.rejected[chunk.chunk_id])
            n_done -= chunk.n_rows
            if chunk.key in recorded:
                (record,) = read_records(plan.out, [chunk.key])
                rejected.update(record.rejected)
                n_done += chunk.n_rows
    return n_done, +rejected


# --- published files ---


def shard_name(shard: int) -> str:
    """Returns the name of a published file within `frames/`."""
    return f"part-{shard:05d}.parquet"


def published_shards(plan: Plan) -> dict[int, dict[str, Any]]:
    """Returns what is said of each file of frames/ that is there in its size and not known to be damaged.

    Its note says it, or else summary.json, or where that is lost the footer of class_statistics.parquet.
    """
    # Notes before summary.json: they go after it was written. The files after both, which are written after the files.
    expected = expected_files(plan)
    there = {file.path: file.size_bytes for file in storage.list_folder(storage.join(plan.out, "frames"))}
    damaged = {file.path for file in list_work(plan.out, "damaged")}
    shards: dict[int, dict[str, Any]] = {}
    for shard, files in expected.items():
        name = shard_name(shard)
        files = [file for file in files if there.get(name) == file["bytes"] and name not in damaged]
        if len({file["sha256"] for file in files}) > 1:  # before and after a retry, by chance of one size
            files = [file for file in files if is_whole(plan.out, file)]
        if files:
            shards[shard] = files[-1]
    return shards


def expected_files(plan: Plan) -> dict[int, list[dict[str, Any]]]:
    """Returns all that is said of each published file of a plan, the newest last: one of these it should be."""
    notes = [note["file"] for note in read_notes(plan)]
    summary = own_summary(plan)
    files = _files_of_statistics(plan) if summary is None else filter(is_shard, summary["files"])
    expected: dict[int, list[dict[str, Any]]] = {}
    for file in [*files, *notes]:
        shard = shard_of(file["path"])
        if shard in plan.of_shard and file.get("key", plan.shard_key[shard]) == plan.shard_key[shard]:
            expected.setdefault(shard, []).append(file)
    return expected


def is_shard(file: Mapping[str, Any]) -> bool:
    """Whether something is said of a file of `frames/`."""
    return shard_of(file["path"]) is not None


def own_summary(plan: Plan) -> dict[str, Any] | None:
    """Returns summary.json, None where there is none or it is of another lineage or of other frames.

    It may lack the plan's last generations.
    """
    summary = read_summary(plan.out)
    if summary is None:
        return None
    files = [file for file in summary["files"] if is_shard(file)]
    if all("key" not in file for file in files):  # of an older version
        run = {file["path"]: file for file in summary["files"]}.get("run.json")
        return summary if run and is_whole(plan.out, run) else None
    keys = {shard_of(file["path"]): file["key"] for file in files if "key" in file}
    return summary if all(keys.get(shard, key) == key for shard, key in plan.shard_key.items()) else None


def shard_of(path: str) -> int | None:
    """Returns the number of a published file, None of any other path."""
    folder, _, name = path.partition("/")
    match = _SHARD.fullmatch(name) if folder == "frames" else None
    return int(match[1]) if match else None


def is_whole(out: str, file: Mapping[str, Any]) -> bool:
    """Whether a file of an output is what is said of it; reads it."""
    try:
        data = storage.read_bytes(storage.join(out, file["path"]))
    except FileNotFoundError:
        return False
    return len(data) == file["bytes"] and storage.sha256(data) == file["sha256"]


def _checked_files(value: Mapping[str, Any]) -> list[dict[str, Any]]:
    for file in value["files"]:
        if shard_of(manifest.require_entry(file)["path"]) is None:
            raise ValueError(f"it names {file['path']!r}, which is no published file")
    return value["files"]


def _files_of_statistics(plan: Plan) -> list[dict[str, Any]]:
    try:
        with storage.open_read(storage.join(plan.out, "class_statistics.parquet")) as file:
            metadata = pq.read_schema(file).metadata or {}
        files = _checked_files(unsealed(metadata.get(FILES_KEY.encode(), b"")))
    except storage.StorageError:
        raise
    except (*UNREADABLE, KeyError, TypeError):  # there is none, or it is damaged
        return []
    return [file for file in files if "key" in file or _has_lineage(plan, file["path"])]


def lineage_of(out: str, path: str) -> bytes | None:
    """Returns the lineage in a published file's footer, None where it cannot be read."""
    try:
        with storage.open_read(storage.join(out, path)) as file:
            return (pq.read_schema(file).metadata or {}).get(b"unet_ray.lineage")
    except storage.StorageError:
        raise
    except UNREADABLE:
        return None


def read_notes(plan: Plan) -> list[dict[str, Any]]:
    """Returns the notes of the files that a job has published and that summary.json may not know yet, oldest first.

    A note has `file`, what summary.json will say, and `n_retries`, how many retries the file holds. One that is damaged
    or of another lineage is none.
    """
    listed = list_work(plan.out, "shards")
    contents = storage.read_many([(file.uri, 0, None) for file in listed]) if listed else []
    notes = []
    for file, content in zip(listed, contents, strict=True):
        if isinstance(content, storage.StorageError):  # a note that is gone is another job's doing
            raise content
        if isinstance(content, bytes):
            with contextlib.suppress(ValueError, KeyError, TypeError):
                note = unsealed(content)
                (entry,) = _checked_files({"files": [note["file"]]})
                n_retries = note.get("n_retries", 0)
                is_ours = "key" in entry or _has_lineage(plan, entry["path"])
                is_named = file.path == f"{storage.name(entry['path'])}.json"
                if is_ours and is_named and is_count(n_retries):
                    notes.append({"file": entry, "n_retries": n_retries})
    return notes


def _has_lineage(plan: Plan, path: str) -> bool:
    """Whether a published file is of a plan's lineage by its footer: notes of old versions do not say it."""
    stored = lineage_of(plan.out, path)
    return stored is not None and same_json(stored, plan.lineage.to_dict())


def note(out: str, file: Mapping[str, Any], n_retries: int) -> None:
    """Says what a file of frames/ is about to be; until it is, what was said of it before holds."""
    name = storage.name(file["path"])
    content = {"file": dict(file), "n_retries": n_retries}
    storage.write_whole(storage.join(out, "_work", "shards", f"{name}.json"), sealed(content))


def let_work_go(out: str, file: Mapping[str, Any], records: Sequence[Record]) -> None:
    """Deletes what a file of frames/ was made of, now that it is there."""
    storage.delete(storage.join(out, "_work", "damaged", storage.name(file["path"])))
    if not records:  # it was made anew for a retry
        return
    # Records first: while one counts its part is needed.
    storage.delete_many([record_uri(out, record.key) for record in records])
    storage.delete_many([part_uri(out, record.part) for record in records])


def mark_damaged(out: str, name: str) -> None:
    """Notes that a published file is not what it was, so that its chunks are done again; and what it is now."""
    assert shard_of(f"frames/{name}") is not None or name == STATISTICS, name
    try:
        path = name if name == STATISTICS else f"frames/{name}"
        digest = storage.sha256(storage.read_bytes(storage.join(out, path)))
    except FileNotFoundError:
        digest = "gone"
    storage.write_whole(storage.join(out, "_work", "damaged", name), digest.encode())


def is_mended(out: str, file: Mapping[str, Any]) -> bool:
    """Whether a published file that was noted as damaged is whole now, say by a copy of it. One that never changed and
    whose rows are not what its record says is not."""
    noted = storage.read_bytes(storage.join(out, "_work", "damaged", storage.name(file["path"])))
    return noted != file["sha256"].encode() and is_whole(out, file)


STATISTICS = "class_statistics.parquet"


def rejected_of(files: Iterable[Mapping[str, Any]], records: Iterable[Record]) -> Counter[str]:
    """Returns the number of rejected frames by reason, of published files and of chunks that are not published."""
    rejected: Counter[str] = Counter()
    for file in files:
        rejected.update(file["rejected"])
    for record in records:
        rejected.update(record.rejected)
    return rejected
