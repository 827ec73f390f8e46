"""What is to be done, what is done, and the proof: plan, chunks and their commit records.

    OUT/run.json                   the lineage: model, classes and options that every label of this output comes from;
                                   sealed by its own digest (`manifest.sealed`), as is every JSON file below
    OUT/manifest/*.parquet         the plan: a row a frame, with the chunk and the shard that it belongs to
    OUT/manifest/_g000.json        a generation of the plan is whole; frames found later are a new generation
    OUT/_work/parts/*.parquet      rows of a finished chunk, named by its key and their digest
    OUT/_work/records/KEY.json     the chunk is done: its part, digest, counts
    OUT/_work/shards/FILE.json     a file of frames/ is whole, though others are not yet: stands for its chunks
    OUT/_work/damaged/FILE         what `verify` found to be damaged

A chunk's key is a digest of its frames with their versions and of the lineage. A chunk is **done** when the record of
its key exists, or when its shard is published (see `publish`). No lock: two jobs on one output write the same bytes
under the same keys, and of two records of one key the first stands.

Steps of a commit, after each of which a kill does no harm: (1) the part, whole or not at all: without a record it is
nothing; (2) the record, put if absent: the chunk is done. Steps of a plan: (1) run.json, put if absent;
(2) config.yaml; (3) the manifest's files, named by their content; (4) the generation's mark, put if absent: without it
they are nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from unet_ray import manifest, storage
from unet_ray.classes import ClassSet
from unet_ray.frames import MANIFEST_SCHEMA, Listing, carried_schema
from unet_ray.manifest import CHUNK_SCHEMA, Chunk, Cutting, json_bytes, parquet_bytes, read_rows, sealed, unsealed
from unet_ray.results import FORMAT_VERSION, frames_schema

__all__ = ["Chunk", "Cutting", "read_rows"]  # what a job needs of the manifest, beside what is defined here

_OURS = re.compile(
    r"frames/part-\d+\.parquet|manifest/(g\d+-.*\.parquet|_g\d+\.json)|_work/.*"
    r"|summary\.json|class_statistics\.parquet|preview\.png"
)
"""What --overwrite deletes; a user's own file beside it stays."""

FILES_KEY = "unet_ray.files"
"""In the footer of class_statistics.parquet: what summary.json says of the files of `frames/`."""


@dataclass(frozen=True, kw_only=True)
class Lineage:
    """All that decides a frame's labels, but for the frame: part of every chunk's key."""

    bundle_digest: str
    class_set: ClassSet
    options: Mapping[str, Any]
    """Every option that changes a result, as plain JSON types."""
    result_version: int = 1

    def to_dict(self) -> dict[str, Any]:
        """Returns the lineage as plain JSON types, as it is when it was written and read again."""
        lineage = {
            "bundle_digest": self.bundle_digest,
            "class_set": self.class_set.to_dict(),
            "options": dict(self.options),
            "result_version": self.result_version,
        }
        return json.loads(json.dumps(lineage))

    @cached_property
    def digest(self) -> str:
        """What of a lineage goes into every key."""
        return storage.sha256(json_bytes(self.to_dict()))


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that is to be done for one output."""

    out: str
    lineage: Lineage
    chunks: tuple[Chunk, ...]
    """In the manifest's order, generation after generation."""
    carried: pa.Schema
    """The catalogue's own columns."""
    ignored: Mapping[str, int]
    """Files that the newest listing ignored, by extension."""
    recorded: Mapping[str, Any]
    """Package versions and machines of the first run."""
    manifest_files: tuple[dict[str, Any], ...]
    """Path, rows, bytes and sha256 of the manifest's files."""
    frame_pixels: int = 0
    """Pixels of the largest frame that was looked at when chunks were cut; 0 where none said its size."""
    n_new: int = 0
    """Frames that this plan added."""
    n_changed: int = 0
    """Frames planned before, of which the archive holds another version now: they stay as they are."""
    n_vanished: int = 0
    """Frames planned before that the archive no longer has."""

    @property
    def n_frames(self) -> int:
        """Frames listed, over all generations."""
        return sum(chunk.n_rows for chunk in self.chunks)


@dataclass(frozen=True, kw_only=True)
class Receipt:
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


# --- planning ---


def plan(
    out: str,
    listing: Listing,
    lineage: Lineage,
    cutting: Cutting,
    *,
    config_yaml: str,
    recorded: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Plan:
    """Makes the plan of an output, or goes on with the one that is there: frames found since are appended.

    Args:
        out: URI of the output's folder.
        listing: what lies in the archives now.
        lineage: what the labels come from.
        cutting: how new frames are cut.
        config_yaml: the resolved configuration.
        recorded: package versions, machines: written to run.json, compared with nothing.
        overwrite: delete an output that is there, and start anew.

    Raises:
        ValueError: the folder holds something else, or an output of another lineage; the message shows the difference.
        JobFailed: what is planned is damaged or gone; the message names the file.
        StorageError: trying again may help.
    """
    frames_schema(lineage.class_set, carried_schema(listing.table.schema))  # a catalogue's column may have a taken name
    run = _claim(out, lineage, recorded or {}, overwrite)
    if overwrite or not storage.exists(storage.join(out, "config.yaml")):
        storage.write_whole(storage.join(out, "config.yaml"), config_yaml.encode())
    _refuse_lost_marks(out)
    known, new = manifest.known_and_new(out, listing.table)
    n_known = len(known)
    if n_known and len(new):
        manifest.refuse_doubled(out, new)
        _refuse_other_columns(carried_schema(listing.table.schema), _read_plan(out, run).carried)
    while len(new):  # again only where another job's generation came first
        manifest.append_generation(out, new, lineage.digest, cutting, listing.ignored)
        _, new = manifest.known_and_new(out, listing.table)
    manifest.delete_unmarked(out)
    place = pc.index_in(listing.table["frame_id"], known["frame_id"])
    versions = listing.table["version"].filter(pc.is_valid(place))
    return dataclasses.replace(
        _read_plan(out, run),
        ignored=listing.ignored,
        n_new=len(listing.table) - len(versions),
        n_changed=pc.sum(pc.not_equal(known["version"].take(pc.drop_null(place)), versions)).as_py() or 0,
        n_vanished=n_known - len(versions),
    )


def _refuse_lost_marks(out: str) -> None:
    """Raises JobFailed where a generation that was published has no mark any more: its frames would be planned anew."""
    there = {f"manifest/{file.path}" for file in manifest.list_folder(storage.join(out, "manifest"))}
    for file in (read_summary(out) or {"files": ()})["files"]:
        if file["path"].startswith("manifest/_g") and file["path"] not in there:
            raise manifest.lost(storage.join(out, file["path"]), FileNotFoundError())


def _refuse_other_columns(here: pa.Schema, there: pa.Schema) -> None:
    if here != there:
        shown = [", ".join(f"{field.name} {field.type}" for field in schema) or "none" for schema in (there, here)]
        raise ValueError(
            f"the catalogues' own columns are {shown[0]} in the output and {shown[1]} here; "
            "give catalogues with the same columns, or another --out"
        )


def read_plan(out: str) -> Plan:
    """Returns the plan of an output as it stands. Raises ValueError where there is none, JobFailed for damage."""
    return _read_plan(out, _read_run(out))


def options_of(out: str) -> dict[str, Any] | None:
    """Returns the options with which an output was begun; None where there is none yet."""
    if not storage.exists(storage.join(out, "run.json")):
        return None
    return _read_run(out)["lineage"]["options"]


def _read_run(out: str) -> dict[str, Any]:
    uri = storage.join(out, "run.json")
    try:
        return unsealed(storage.read_bytes(uri))
    except (FileNotFoundError, ValueError) as error:
        if manifest.read_generations(out):
            raise manifest.lost(uri, error, "restore it, or give another --out") from error
        whose = "run.json is missing"
        if not isinstance(error, FileNotFoundError):
            whose = "its run.json is another job's, or damaged; give another --out"
        raise ValueError(f"{out} is no output of segment: {whose}") from error


def _strangers(out: str) -> Iterator[str]:
    """Yields files that neither a job that was killed early nor one that starts beside this one leaves."""
    for file in manifest.list_folder(out):
        if not file.path.startswith("_work/"):
            yield file.path


def _claim(out: str, lineage: Lineage, recorded: Mapping[str, Any], overwrite: bool) -> dict[str, Any]:
    """Returns run.json, written now where the folder is empty; refuses what is not ours or of another lineage."""
    uri = storage.join(out, "run.json")
    ours: dict[str, Any] = {"format_version": FORMAT_VERSION, "lineage": lineage.to_dict(), "recorded": dict(recorded)}
    if not storage.exists(uri):
        stranger = next(_strangers(out), None)
        if stranger is None:
            storage.put_if_absent(uri, sealed(ours))
        elif not manifest.read_generations(out):
            raise ValueError(f"{out} holds files that are no output of segment ({stranger}); give another --out")
    run = _read_run(out)
    if overwrite:
        # What proves the output goes before what it proves.
        for file in sorted(manifest.list_folder(out), key=lambda file: "/" in file.path):
            if _OURS.fullmatch(file.path):
                storage.delete(file.uri)
        storage.write_whole(uri, sealed(ours))  # last: until then the folder is an output of ours
        return ours
    if run["format_version"] != FORMAT_VERSION:
        raise ValueError(
            f"{out} has format version {run['format_version']}, here it is {FORMAT_VERSION}; give another --out"
        )
    differences = list(_differences(run["lineage"], ours["lineage"]))
    if differences:
        raise ValueError(
            f"{out} holds labels of another kind: {'; '.join(differences)}; give another --out, or --overwrite"
        )
    return run


def _differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> Iterator[str]:
    names = {"bundle_digest": "model", "class_set": "class set", "result_version": "result version"}
    for key, name in names.items():
        if there[key] != here[key]:
            values = [lineage[key] for lineage in (there, here)]
            if key == "class_set":
                values = [value["name"] for value in values]
            yield f"{name} is {str(values[0])[:12]} there and {str(values[1])[:12]} here"
    for option in sorted({*there["options"], *here["options"]}):
        before, now = there["options"].get(option), here["options"].get(option)
        if before != now:
            yield f"--{option.replace('_', '-')} is {before} there and {now} here"


def _read_plan(out: str, run: Mapping[str, Any]) -> Plan:
    marks = manifest.read_generations(out)
    files = tuple(file for mark in marks for file in mark["files"])
    stored = run["lineage"]
    carried = pa.schema([])
    if files:
        schema = manifest.open_manifest(storage.join(out, files[0]["path"])).schema_arrow
        carried = pa.schema(
            [field for field in schema if field.name not in (*MANIFEST_SCHEMA.names, *CHUNK_SCHEMA.names)]
        )
    return Plan(
        out=out,
        lineage=Lineage(**{**stored, "class_set": ClassSet.from_dict(stored["class_set"])}),
        chunks=tuple(chunk for file in files for chunk in manifest.read_chunks(storage.join(out, file["path"]))),
        carried=carried,
        ignored=marks[-1]["ignored"] if marks else {},
        recorded=run["recorded"],
        manifest_files=files,
        frame_pixels=max((mark.get("frame_pixels", 0) for mark in marks), default=0),
    )


# --- commits ---


def pending(plan: Plan) -> list[Chunk]:
    """Returns the chunks that are not done, in order; lists the records and opens none of them."""
    # Records before summary.json: they go after it was written, so who sees none of them sees it.
    parts = manifest.list_folder(storage.join(plan.out, "_work", "parts"))
    recorded = recorded_keys(plan.out) & {file.path.partition("-")[0] for file in parts}
    published = published_shards(plan.out)
    return [chunk for chunk in plan.chunks if chunk.shard not in published and chunk.key not in recorded]


def published_shards(out: str) -> dict[int, dict[str, Any]]:
    """Returns what its note, or else summary.json, or where that is lost the footer of class_statistics.parquet, says
    of each file of frames/ that is there in its size and not known to be damaged."""
    # Notes before summary.json: they go after it was written. The files after both, which are written after the files.
    notes = read_notes(out)
    summary = read_summary(out)
    files = [*(summary["files"] if summary else _files_of_statistics(out)), *notes]
    there = {file.path: file.size_bytes for file in manifest.list_folder(storage.join(out, "frames"))}
    damaged = {file.path for file in manifest.list_folder(storage.join(out, "_work", "damaged"))}
    shards: dict[int, dict[str, Any]] = {}
    for file in files:
        folder, _, name = file["path"].partition("/")
        if folder == "frames":
            shard = int(name.removeprefix("part-").removesuffix(".parquet"))
            shards.pop(shard, None)
            if there.get(name) == file["bytes"] and name not in damaged:
                shards[shard] = file
    return shards


def _files_of_statistics(out: str) -> list[dict[str, Any]]:
    try:
        with storage.open_read(storage.join(out, "class_statistics.parquet")) as file:
            metadata = pq.read_schema(file).metadata or {}
        return unsealed(metadata.get(FILES_KEY.encode(), b""))["files"]
    except storage.StorageError:
        raise
    except (OSError, ValueError):  # there is none, or it is damaged, for which Arrow has either
        return []


def read_notes(out: str) -> list[dict[str, Any]]:
    """Returns the notes of the files that a job has published and that summary.json may not know yet.

    A note that is damaged is none.
    """
    listed = manifest.list_folder(storage.join(out, "_work", "shards"))
    contents = storage.read_many([(file.uri, 0, None) for file in listed]) if listed else []
    notes = []
    for content in contents:
        if isinstance(content, storage.StorageError):  # a note that is gone is another job's doing
            raise content
        if isinstance(content, bytes):
            with contextlib.suppress(ValueError):
                notes.append(unsealed(content)["file"])
    return notes


def let_work_go(out: str, file: Mapping[str, Any], receipts: Sequence[Receipt]) -> None:
    """Notes that a file of frames/ is whole, and deletes the records and parts that it was made of."""
    name = storage.name(file["path"])
    storage.write_whole(storage.join(out, "_work", "shards", f"{name}.json"), sealed({"file": file}))
    storage.delete(storage.join(out, "_work", "damaged", name))
    # Records first: while one counts its part is needed.
    storage.delete_many([record_uri(out, receipt.key) for receipt in receipts])
    storage.delete_many([part_uri(out, receipt.part) for receipt in receipts])


def read_summary(out: str) -> dict[str, Any] | None:
    """Returns summary.json, None where there is none or it is damaged."""
    try:
        return unsealed(storage.read_bytes(storage.join(out, "summary.json")))
    except (FileNotFoundError, ValueError):
        return None


def mark_damaged(out: str, name: str) -> None:
    """Notes that a published file is not what it was, so that its chunks are done again."""
    storage.write_whole(storage.join(out, "_work", "damaged", name), b"damaged\n")


def recorded_keys(out: str) -> set[str]:
    """Returns the keys that have a record."""
    return {file.path.removesuffix(".json") for file in manifest.list_folder(storage.join(out, "_work", "records"))}


def record_uri(out: str, key: str) -> str:
    """Returns where the record of a key lies."""
    return storage.join(out, "_work", "records", f"{key}.json")


def part_uri(out: str, part: str) -> str:
    """Returns where a part lies."""
    return storage.join(out, "_work", "parts", part)


def commit(out: str, chunk: Chunk, table: pa.Table, *, writer: str) -> Receipt:
    """Writes a finished chunk: its part, then its record.

    Args:
        out: the output.
        chunk: which chunk.
        table: its rows, in the manifest's order (`results.result_table`).
        writer: names the job, for a person who reads the record.

    Returns:
        The record that stands: this one, or that of another job which was first.
    """
    assert len(table) == chunk.n_rows, (len(table), chunk)
    data = parquet_bytes(table)
    digest = storage.sha256(data)
    reasons = pc.value_counts(pc.drop_null(table["reason"])).to_pylist()
    rejected = {count["values"]: count["counts"] for count in sorted(reasons, key=lambda count: count["values"])}
    receipt = Receipt(
        chunk_id=chunk.chunk_id,
        key=chunk.key,
        part=f"{chunk.key}-{digest[:16]}.parquet",
        sha256=digest,
        size_bytes=len(data),
        n_rows=len(table),
        ok=len(table) - sum(rejected.values()),
        rejected=rejected,
        writer=writer,
    )
    storage.write_whole(part_uri(out, receipt.part), data)
    if storage.put_if_absent(record_uri(out, chunk.key), sealed(dataclasses.asdict(receipt))):
        return receipt
    return read_receipts(out, [chunk.key])[0]


def read_receipts(out: str, keys: Sequence[str]) -> list[Receipt]:
    """Returns the records of chunks that have one. Raises StorageError where one cannot be read."""
    contents = storage.read_many([(record_uri(out, key), 0, None) for key in keys])
    for content in contents:
        if isinstance(content, OSError):
            raise content
    receipts = []
    for key, content in zip(keys, contents, strict=True):
        try:
            receipts.append(Receipt(**unsealed(content)))  # type: ignore[arg-type]
        except (ValueError, TypeError) as error:
            storage.delete(record_uri(out, key))
            raise storage.StorageError(
                f"{record_uri(out, key)} is damaged; run the same command again: its frames are done anew"
            ) from error
    return receipts


def receipts(plan: Plan) -> list[Receipt]:
    """Returns the records of all chunks that are done and not yet published, in order."""
    recorded = recorded_keys(plan.out)
    return read_receipts(plan.out, [chunk.key for chunk in plan.chunks if chunk.key in recorded])


def rejected_share(receipts: Iterable[Receipt]) -> float:
    """Returns the rejected frames' share of the finished ones; 0 where none is finished."""
    receipts = list(receipts)
    n_rows = sum(receipt.n_rows for receipt in receipts)
    return 1 - sum(receipt.ok for receipt in receipts) / n_rows if n_rows else 0.0


# --- other jobs ---


def heartbeat(out: str, writer: str) -> None:
    """Leaves a sign of life of this job, to warn others."""
    storage.write_whole(storage.join(out, "_work", "jobs", f"{writer}.json"), sealed({"time_s": time.time()}))


def end_heartbeat(out: str, writer: str) -> None:
    """Takes the sign of life away."""
    storage.delete(storage.join(out, "_work", "jobs", f"{writer}.json"))


def other_job(out: str, writer: str, *, within_s: float = 60.0) -> str | None:
    """Returns the name of another job that gave a sign of life just now, else None."""
    for file in manifest.list_folder(storage.join(out, "_work", "jobs")):
        other = file.path.removesuffix(".json")
        try:
            told = unsealed(storage.read_bytes(file.uri))
        except (FileNotFoundError, ValueError):
            continue
        if other != writer and time.time() - told["time_s"] < within_s:
            return other
    return None


def new_writer() -> str:
    """Returns a name for this job's process."""
    return f"{os.uname().nodename}-{os.getpid()}-{time.time_ns() % 10**9:09d}"
