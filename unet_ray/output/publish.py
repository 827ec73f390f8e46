"""Finished chunks become the published output.

Steps, after each of which a kill does no harm and the same command goes on. Of each shard: (1) its parts become the
content of a file of `frames/`, a pure function of the records and of the end of the file before (see `neighbours`); (2)
the file is noted; (3) it is written, and stands for its chunks from now on; (4) their records and parts go, so that the
masks do not lie there twice. Of all: (5) class_statistics.parquet; (6) summary.json, which says what is whole; (7)
`_work/` goes, and what killed writers left of files. Until (3), (1) is done again and writes the same bytes; so does
(5) until (6). What (6) says of the files of `frames/` is in the footer of (5) too: either can be made again from the
other.

Where rejected frames were tried again, a file of `frames/` is made of the one that is there and of the new rows, and
takes its place at once: no label goes before what replaces it is there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from unet_ray import storage
from unet_ray.errors import JobFailed
from unet_ray.output import labels, ledger, manifest, plans, rejected_csv, retries, run_facts
from unet_ray.output import rows as results
from unet_ray.output.chunks import Chunk
from unet_ray.output.labels import NewRows
from unet_ray.output.ledger import shard_name
from unet_ray.output.neighbours import Borders, Sewing
from unet_ray.output.plans import Lineage, Plan
from unet_ray.output.records import Record, read_records
from unet_ray.output.rejected import require_share
from unet_ray.output.tables import parquet_bytes
from unet_ray.storage.sealed import sealed

GROUP_ROWS = 2_048
"""Rows of a row group of a published file: 12 MB of masks of 480x640, small enough to skip by statistics."""

_PAGE_ROWS = 64
"""Most rows of a page, which a reader unpacks whole: raw masks of 1 MB, read 16 at a time, take 144 MB of memory. With
Arrow's own 1,024 rows they take 1,200 MB (pyarrow 26, 2026-11-21)."""

# Not on masks and errors: nobody filters by them, and a minimum of 6 KB would be stored for every row group.
_WITHOUT_STATISTICS = ("mask", "error", "uri")


@dataclass(frozen=True, kw_only=True)
class ShardTask:
    """One published file to write: picklable, so that a task on any node can do it."""

    plan: Plan
    """With the chunks of this file alone."""
    shard: int
    before: Borders | None = None
    """The end of what lies before this file; None where no frame of it is before one of this file."""
    records: tuple[Record, ...] = ()
    """Of each chunk; none where the file that is there is made anew with rows that were tried again."""
    base: Mapping[str, Any] | None = None
    """What is said of that file."""
    new_rows: tuple[NewRows, ...] = ()
    """A later one counts."""
    n_retries: int = 0
    """All retries below this number are held by the file then."""

    @property
    def rejected(self) -> Counter[str]:
        """Number of rejected rows by reason, as the records say."""
        rejected = ledger.rejected_of([self.base] if self.base else (), self.records)
        for new in self.new_rows:
            rejected.subtract(new.rejected)
            rejected.update(new.record.rejected)
        return +rejected


# --- publishing ---


def publish(
    plan: Plan,
    *,
    max_rejected: float,
    figures: Mapping[str, Any] | None = None,
    map_shards: Callable[[Callable[[ShardTask], dict[str, Any]], Sequence[ShardTask]], Iterable[dict[str, Any]]] = map,
) -> dict[str, Any]:
    """Publishes a finished plan; where it is published already, no frame or label is read or written.

    Args:
        plan: what was planned; all of its chunks are done.
        max_rejected: largest share of rejected frames with which anything is published.
        figures: of this run, for summary.json.
        map_shards: `map`, or one that spreads the shards over a cluster.

    Returns:
        What summary.json holds.

    Raises:
        JobFailed: too many frames are rejected, or the counts do not add up.
        Grown: another job has planned more frames, which are to be done first.
        TryAgain: another job has overwritten the output.
        StorageError: a part is damaged, or the store did not answer; the same command goes on.
    """
    plans.require_whole(plan)
    done = finished_summary(plan)
    if done is not None:
        _clear_up(plan)
        if done["rejected"] and not storage.exists(storage.join(plan.out, rejected_csv.NAME)):
            with contextlib.suppress(PermissionError):  # a finished output may lie where nobody can write
                rejected_csv.write(plan)  # after a kill after step 6
        return done
    published, tasks = _shard_tasks(plan)
    to_write = {task.shard for task in tasks}
    rejected = ledger.rejected_of((file for shard, file in published.items() if shard not in to_write), ())
    rejected += sum((task.rejected for task in tasks), Counter[str]())
    require_share(rejected, plan.n_frames, plan.n_frames, max_rejected)
    files = {
        **published,
        **{task.shard: file for task, file in zip(tasks, map_shards(write_shard, tasks), strict=True)},
    }
    plans.require_whole(plan)
    summary = _summary(plan, [_with_key(plan, shard, files[shard]) for shard in sorted(files)], figures or {})
    rejected_csv.write(plan, is_empty=not summary["rejected"])
    # Last, and only then the work goes: a record stands until what it stands for is published.
    storage.write_whole(storage.join(plan.out, "summary.json"), sealed(summary))
    _clear_up(plan)
    return summary


def _with_key(plan: Plan, shard: int, file: Mapping[str, Any]) -> dict[str, Any]:
    return {"path": file["path"], "key": plan.shard_key[shard], **file}


def _clear_up(plan: Plan) -> None:
    """Deletes the work, and what killed writers left beside it. What stays goes at the next run: all is published."""
    with contextlib.suppress(storage.StorageError):
        # A retry's rows before their records, or they would be tried again; damage too: while it is noted its records
        # count, and while a record counts its part is needed.
        for name in ("_work/retries", "_work/damaged", "_work/records", "_work"):
            storage.delete_tree(storage.join(plan.out, name))
        for name in ("", "frames", "manifest"):
            storage.delete_unfinished(storage.join(plan.out, name))
        _delete_strange_shards(plan.out)


def _delete_strange_shards(out: str) -> None:
    """Deletes files of `frames/` that a job wrote whose output had been overwritten; its rows would count twice."""
    files = storage.list_folder(storage.join(out, "frames"))
    shards = {shard_name(shard) for shard in plans.read_plan(out).of_shard}  # after the files: others may add shards
    for file in files:
        if file.path not in shards and ledger.lineage_of(out, f"frames/{file.path}") is not None:
            storage.delete(file.uri)


def _shard_tasks(plan: Plan) -> tuple[dict[int, dict[str, Any]], list[ShardTask]]:
    """Returns what is said of each published file that stays, and the files that are to be written."""
    published = ledger.published_shards(plan)
    new_rows, n_retries = labels.new_rows(plan)
    tasks = []
    before = {chunk: last for last, chunk in pairwise(plan.chunks) if last.generation == chunk.generation}
    for shard, chunks in sorted(plan.of_shard.items()):
        base = published.get(shard)
        if base is not None and shard not in new_rows:
            continue
        records: list[Record] = []
        if base is None:
            try:
                records = read_records(plan.out, [chunk.key for chunk in chunks])
            except FileNotFoundError:
                published[shard] = _published_by_another(plan, shard)
                continue
        tasks.append(
            ShardTask(
                plan=dataclasses.replace(plan, chunks=chunks),
                shard=shard,
                before=_end_of(plan, before.get(chunks[0]), published) if base is None else None,
                records=tuple(records),
                base=base,
                new_rows=tuple(new_rows.get(shard, ())),
                n_retries=n_retries,
            )
        )
    return published, tasks


def _end_of(plan: Plan, last: Chunk | None, published: Mapping[int, Mapping[str, Any]]) -> Borders | None:
    """Returns the end of the last chunk of a file: of the part, or once that is gone of the file."""
    if last is None:
        return None
    if last.shard in published:
        return labels.borders_of(plan, published[last.shard])
    try:
        (part,) = labels.read_parts(plan.out, read_records(plan.out, [last.key]))
    except FileNotFoundError:
        return labels.borders_of(plan, _published_by_another(plan, last.shard))
    return Borders.from_footer(part.schema.metadata, plan.lineage.class_set.n_classes)


def _published_by_another(plan: Plan, shard: int) -> dict[str, Any]:
    """Returns what is said of a file whose records or parts went just now: another job was faster, or it is damage."""
    try:
        return ledger.published_shards(plan)[shard]
    except KeyError:
        raise storage.StorageError(
            f"{plan.out}: parts of {shard_name(shard)} are gone; run the same command again: their frames are done anew"
        ) from None


def finished_summary(plan: Plan) -> dict[str, Any] | None:
    """Returns summary.json where it speaks of all of the plan and nothing of it is known to be damaged."""
    summary = ledger.own_summary(plan)
    if summary is None or summary["listed"] != plan.n_frames or retries.read(plan):
        return None
    published = ledger.published_shards(plan)
    if set(published) != set(plan.of_shard) or not_in(summary, published.values()):
        return None
    if run_facts.problems(plan.out, summary):
        return None
    statistics = storage.join(plan.out, "class_statistics.parquet")
    damaged = storage.exists(storage.join(plan.out, "_work", "damaged", "class_statistics.parquet"))
    return None if damaged or not storage.exists(statistics) else summary


def not_in(summary: Mapping[str, Any], files: Iterable[Mapping[str, Any]]) -> list[str]:
    """Returns the paths of files that summary.json does not know as they are now: it is still to be written."""
    return [file["path"] for file in files if file not in summary["files"]]


def write_shard(task: ShardTask) -> dict[str, Any]:
    """Writes one file of `frames/` from its parts, lets these go, and returns what summary.json says of it.

    Raises:
        TryAgain: another job has overwritten the output.
        StorageError: a part is missing or damaged; its record is taken back, so that it is done again.
    """
    plan = task.plan
    plans.has_grown(plan)
    counts = ledger.rejected_of((), task.records)
    try:
        data, rejected = _shard_bytes(task)
    except FileNotFoundError:
        return _published_by_another(plan, task.shard)
    path = f"frames/{shard_name(task.shard)}"
    file = {
        "path": path,
        "key": plan.shard_key[task.shard],
        "rows": plan.n_frames,
        "bytes": len(data),
        "sha256": storage.sha256(data),
        "rejected": dict(sorted((rejected if task.new_rows else counts).items())),
    }
    ledger.note(plan.out, file, task.n_retries)
    storage.write_whole(storage.join(plan.out, path), data)
    ledger.let_work_go(plan.out, file, task.records)
    return file


def _shard_bytes(task: ShardTask) -> tuple[bytes, Counter[str]]:
    """Returns a file of `frames/`, and the number of its rejected rows by reason."""
    lineage, rejected = task.plan.lineage, Counter[str]()
    schema = results.frames_schema(lineage.class_set, task.plan.carried, lineage.result_version).with_metadata(
        _footer(lineage)
    )
    buffer, is_png = io.BytesIO(), lineage.options.get("mask_encoding") == "png"
    statistics = [name for name in schema.names if name not in _WITHOUT_STATISTICS]
    with pq.ParquetWriter(
        buffer,
        schema,
        # A PNG is packed already; on its own, a changed bit costs one mask and not all that share a page.
        compression={name: "none" if name == "mask" and is_png else "zstd" for name in schema.names},
        use_dictionary=[name for name in schema.names if name != "mask"],  # type: ignore[arg-type]
        write_statistics=statistics,  # type: ignore[arg-type]
        write_batch_size=_PAGE_ROWS,
        write_page_checksum=True,
    ) as writer:
        digests, unproved = [], results.unproved_columns(lineage.class_set)
        sewing = Sewing(lineage.class_set, task.before)
        for rows in _in_groups(_with_new_rows(task, sewing)):
            rejected.update(pc.drop_null(rows["reason"]).to_pylist())
            digests.append(results.column_digests(rows, unproved))
            writer.write_table(rows.cast(schema), row_group_size=GROUP_ROWS)
        end = sewing.end if task.base is None else labels.borders_of(task.plan, task.base)
        assert end is not None
        writer.add_key_value_metadata({results.DIGESTS_KEY: json.dumps(digests), **end.to_footer()})
    return buffer.getvalue(), rejected


def _with_new_rows(task: ShardTask, sewing: Sewing) -> Iterator[pa.Table]:
    """Yields the rows of each chunk, sewn to the chunk before; where they were rejected, what trying again gave."""
    out, base = task.plan.out, task.base
    new_parts = list(labels.read_parts(out, [new.record for new in task.new_rows]))
    sizes = [chunk.n_rows for chunk in task.plan.chunks]
    chunks = labels.read_parts(out, task.records) if base is None else labels.read_published(out, base, sizes)
    for position, rows in enumerate(chunks):
        rows = sewing.sewn(rows) if base is None else rows
        for new, part in zip(task.new_rows, new_parts, strict=True):
            if new.position == position:
                rows = labels.replaced(rows, new.rows, part)
        yield rows


def _in_groups(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Joins small tables into ones of `GROUP_ROWS` rows; what they are cut into depends on the rows alone."""
    waiting: list[pa.Table] = []
    n_rows = 0
    for table in tables:
        waiting.append(table)
        n_rows += len(table)
        while n_rows >= GROUP_ROWS:
            joined = pa.concat_tables(waiting)
            yield joined.slice(0, GROUP_ROWS)
            waiting, n_rows = [joined.slice(GROUP_ROWS)], n_rows - GROUP_ROWS
    if n_rows:
        yield pa.concat_tables(waiting)


def _footer(lineage: Lineage) -> dict[str, str]:
    return {
        "unet_ray.format_version": str(results.FORMAT_VERSION),
        "unet_ray.class_set": json.dumps(lineage.class_set.to_dict()),
        "unet_ray.lineage": json.dumps(lineage.to_dict()),
    }


def _summary(plan: Plan, files: Sequence[dict[str, Any]], figures: Mapping[str, Any]) -> dict[str, Any]:
    """Writes class_statistics.parquet, and returns what summary.json is to hold."""
    rejected = ledger.rejected_of(files, ())
    listed, rows = plan.n_frames, sum(file["rows"] for file in files)
    if rows != listed:
        raise JobFailed(
            f"{plan.out}: {listed:,} frames are listed and {rows:,} rows published; this is a bug, report it"
        )
    noted = {ledger.FILES_KEY: sealed({"files": list(files)})}  # should summary.json be lost
    statistics = parquet_bytes(_statistics(plan.out, files, plan.lineage).replace_schema_metadata(noted))
    storage.write_whole(storage.join(plan.out, "class_statistics.parquet"), statistics)
    return {
        "format_version": results.FORMAT_VERSION,
        "listed": listed,
        "ok": listed - rejected.total(),
        "rejected": dict(sorted(rejected.items())),
        "ignored": dict(plan.ignored),
        "files": [*_proofs(plan), *plan.manifest_files, *files, _entry("class_statistics.parquet", statistics)],
        "recorded": dict(plan.recorded),
        run_facts.ARE_SEALED: True,
        "figures": run_facts.sealed_figures(plan.out, figures),
    }


def _proofs(plan: Plan) -> list[dict[str, Any]]:
    """Returns what summary.json says of run.json and of the records of the plan's generations."""
    generations = dict.fromkeys(manifest.generation_path_of(file["path"]) for file in plan.manifest_files)
    return [_entry(path, storage.read_bytes(storage.join(plan.out, path))) for path in ("run.json", *generations)]


def _entry(path: str, data: bytes) -> dict[str, Any]:
    return {"path": path, "bytes": len(data), "sha256": storage.sha256(data)}


def _statistics(out: str, files: Iterable[Mapping[str, Any]], lineage: Lineage) -> pa.Table:
    columns = results.statistics_columns(lineage.class_set)
    return results.class_statistics(
        (batch for file in files for batch in labels.read_columns(out, file["path"], columns)), lineage.class_set
    )
