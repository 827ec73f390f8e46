"""Finished chunks become the published output, and a published output is proved whole.

Steps, after each of which a kill does no harm and the same command goes on. Of each shard: (1) its parts become a file
of `frames/`, a pure function of the records; (2) the file is noted, and stands for its chunks from now on; (3) their
records and parts go, so that the masks do not lie there twice. Of all: (4) class_statistics.parquet; (5) summary.json,
which says what is whole; (6) `_work/` goes, and what killed writers left of files. Until (2), (1) is done again and
writes the same bytes; so does (4) until (5). What (5) says of the files of `frames/` is in the footer of (4) too:
either can be made again from the other.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from unet_ray import ledger, manifest, results, storage
from unet_ray.endings import JobFailed
from unet_ray.ledger import Chunk, Lineage, Plan, Receipt
from unet_ray.manifest import list_folder, parquet_bytes, sealed

_GROUP_ROWS = 2_048
"""Rows of a row group of a published file: 12 MB of masks of 480x640, small enough to skip by statistics."""

_PAGE_ROWS = 64
"""Most rows of a page, which a reader unpacks whole: raw masks of 1 MB, read 16 at a time, take 144 MB of memory. With
Arrow's own 1,024 rows they take 1,200 MB (pyarrow 26, 2026-11-21)."""

_PARTS_AT_ONCE = 16
"""Parts that are read at once: 0.6 to 9 MB each (96 masks of 480x640, PNG or raw with zstd), so well below a shard."""

# Not on masks and errors: nobody filters by them, and a minimum of 6 KB would be stored for every row group.
_WITHOUT_STATISTICS = ("mask", "error", "uri")


@dataclass(frozen=True, kw_only=True)
class ShardTask:
    """One published file to write: picklable, so that a task on any node can do it."""

    out: str
    shard: int
    lineage: Lineage
    carried: pa.Schema
    receipts: tuple[Receipt, ...]
    """In the manifest's order."""


def shard_name(shard: int) -> str:
    """Returns the name of a published file within `frames/`."""
    return f"part-{shard:05d}.parquet"


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
        StorageError: a part is damaged, or the store did not answer; the same command goes on.
    """
    done = finished_summary(plan)
    if done is not None:
        _clear_up(plan.out)  # after a kill after step 5
        return done
    published, receipts = _published_and_not(plan)
    _require_share(plan, published, receipts, max_rejected)
    tasks = [
        ShardTask(
            out=plan.out, shard=shard, lineage=plan.lineage, carried=plan.carried, receipts=tuple(receipts[shard])
        )
        for shard in sorted(receipts)
    ]
    files = {
        **published,
        **{task.shard: file for task, file in zip(tasks, map_shards(write_shard, tasks), strict=True)},
    }
    in_order = [files[shard] for shard in sorted(files)]
    summary = _summary(plan, in_order, figures or {})
    # Last, and only then the work goes: a record stands until what it stands for is published.
    storage.write_whole(storage.join(plan.out, "summary.json"), sealed(summary))
    _clear_up(plan.out)
    return summary


def _clear_up(out: str) -> None:
    """Deletes the work, and what killed writers left beside it. What stays goes at the next run: all is published."""
    with contextlib.suppress(storage.StorageError):
        # Damage first: while it is noted its records count, and while a record counts its part is needed.
        for name in ("_work/damaged", "_work/records", "_work"):
            storage.delete_tree(storage.join(out, name))
        for name in ("", "frames", "manifest"):
            storage.delete_unfinished(storage.join(out, name))


def _published_and_not(plan: Plan) -> tuple[dict[int, dict[str, Any]], dict[int, list[Receipt]]]:
    """Returns what is said of each published file, and the records of each one that is to be written."""
    published = ledger.published_shards(plan.out)
    of_shard: dict[int, list[Chunk]] = {}
    for chunk in plan.chunks:
        if chunk.shard not in published:
            of_shard.setdefault(chunk.shard, []).append(chunk)
    receipts = {}
    for shard, chunks in of_shard.items():
        try:
            receipts[shard] = ledger.read_receipts(plan.out, [chunk.key for chunk in chunks])
        except FileNotFoundError:
            published[shard] = _published_by_another(plan.out, shard)
    return published, receipts


def _published_by_another(out: str, shard: int) -> dict[str, Any]:
    """Returns what is said of a file whose records or parts went just now: another job was faster, or it is damage."""
    try:
        return ledger.published_shards(out)[shard]
    except KeyError:
        raise storage.StorageError(
            f"{out}: parts of {shard_name(shard)} are gone; run the same command again: their frames are done anew"
        ) from None


def finished_summary(plan: Plan) -> dict[str, Any] | None:
    """Returns summary.json where it speaks of all of the plan and nothing of it is known to be damaged."""
    summary = ledger.read_summary(plan.out)
    if summary is None or summary.get("listed") != plan.n_frames:
        return None
    published = ledger.published_shards(plan.out)
    if set(published) != {chunk.shard for chunk in plan.chunks} or _not_in(summary, published.values()):
        return None
    statistics = storage.join(plan.out, "class_statistics.parquet")
    damaged = storage.exists(storage.join(plan.out, "_work", "damaged", "class_statistics.parquet"))
    return None if damaged or not storage.exists(statistics) else summary


def _not_in(summary: Mapping[str, Any], files: Iterable[Mapping[str, Any]]) -> list[str]:
    """Returns the paths of files that summary.json does not know as they are now: it is still to be written."""
    return [file["path"] for file in files if file not in summary["files"]]


def _require_share(
    plan: Plan,
    published: Mapping[int, Mapping[str, Any]],
    receipts: Mapping[int, Sequence[Receipt]],
    max_rejected: float,
) -> None:
    rejected: Counter[str] = Counter()
    for file in published.values():
        rejected.update(file["rejected"])
    for shard in receipts.values():
        for receipt in shard:
            rejected.update(receipt.rejected)
    require_share(rejected, plan.n_frames, plan.n_frames, max_rejected)


def require_share(rejected: Mapping[str, int], n_done: int, n_frames: int, max_rejected: float) -> None:
    """Raises JobFailed where more than `max_rejected` of `n_frames` are rejected.

    Args:
        rejected: number by reason, of the frames that are done.
        n_done: frames that are done, for the message.
        n_frames: frames in all.
        max_rejected: a share.
    """
    n_rejected = sum(rejected.values())
    if n_rejected > max_rejected * n_frames:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in Counter(rejected).most_common())
        raise JobFailed(
            f"{n_rejected:,} of {n_done:,} frames are rejected ({n_rejected / n_done:.1%}: {reasons}), more than "
            f"--max-rejected {max_rejected:g} of {n_frames:,}; nothing is published. With a larger --max-rejected the "
            "same command publishes what is labelled; --retry-rejected tries those frames again"
        )


def write_shard(task: ShardTask) -> dict[str, Any]:
    """Writes one file of `frames/` from its parts, lets these go, and returns what summary.json says of it.

    Raises:
        StorageError: a part is missing or damaged; its record is taken back, so that it is done again.
    """
    try:
        data = _shard_bytes(task)
    except FileNotFoundError:
        return _published_by_another(task.out, task.shard)
    path = f"frames/{shard_name(task.shard)}"
    storage.write_whole(storage.join(task.out, path), data)
    rejected: Counter[str] = Counter()
    for receipt in task.receipts:
        rejected.update(receipt.rejected)
    file = {
        "path": path,
        "rows": sum(receipt.n_rows for receipt in task.receipts),
        "bytes": len(data),
        "sha256": storage.sha256(data),
        "rejected": dict(sorted(rejected.items())),
    }
    ledger.let_work_go(task.out, file, task.receipts)
    return file


def _shard_bytes(task: ShardTask) -> bytes:
    schema = results.frames_schema(task.lineage.class_set, task.carried).with_metadata(_footer(task.lineage))
    buffer = io.BytesIO()
    statistics = [name for name in schema.names if name not in _WITHOUT_STATISTICS]
    with pq.ParquetWriter(
        buffer,
        schema,
        compression="zstd",
        write_statistics=statistics,  # type: ignore[arg-type]
        write_batch_size=_PAGE_ROWS,
    ) as writer:
        for rows in _in_groups(_read_parts(task)):
            writer.write_table(rows.cast(schema), row_group_size=_GROUP_ROWS)
    return buffer.getvalue()


def _read_parts(task: ShardTask) -> Iterator[pa.Table]:
    """Yields the parts of a shard in order; some at once, as many requests in flight where the store is not local.

    Raises FileNotFoundError where a part is gone, StorageError where it is damaged; its record counts no more.
    """
    for start in range(0, len(task.receipts), _PARTS_AT_ONCE):
        some = task.receipts[start : start + _PARTS_AT_ONCE]
        uris = [ledger.part_uri(task.out, receipt.part) for receipt in some]
        contents = storage.read_many([(uri, 0, None) for uri in uris])
        for receipt, uri, content in zip(some, uris, contents, strict=True):
            if isinstance(content, OSError) and not isinstance(content, FileNotFoundError):
                raise content
            if isinstance(content, OSError) or storage.sha256(content) != receipt.sha256:
                storage.delete(ledger.record_uri(task.out, receipt.key))
                if isinstance(content, OSError):
                    raise content
                raise storage.StorageError(f"{uri} is damaged; run the same command again: its frames are done anew")
            yield manifest.read_parquet(content)


def _in_groups(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Joins small tables into ones of `_GROUP_ROWS` rows; what they are cut into depends on the rows alone."""
    held: list[pa.Table] = []
    n_rows = 0
    for table in tables:
        held.append(table)
        n_rows += len(table)
        while n_rows >= _GROUP_ROWS:
            joined = pa.concat_tables(held)
            yield joined.slice(0, _GROUP_ROWS)
            held, n_rows = [joined.slice(_GROUP_ROWS)], n_rows - _GROUP_ROWS
    if n_rows:
        yield pa.concat_tables(held)


def _footer(lineage: Lineage) -> dict[str, str]:
    return {
        "unet_ray.format_version": str(results.FORMAT_VERSION),
        "unet_ray.class_set": json.dumps(lineage.class_set.to_dict()),
        "unet_ray.lineage": json.dumps(lineage.to_dict()),
    }


def _summary(plan: Plan, files: Sequence[dict[str, Any]], figures: Mapping[str, Any]) -> dict[str, Any]:
    """Writes class_statistics.parquet, and returns what summary.json is to hold."""
    rejected: Counter[str] = Counter()
    for file in files:
        rejected.update(file["rejected"])
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
        "ok": listed - sum(rejected.values()),
        "rejected": dict(sorted(rejected.items())),
        "ignored": dict(plan.ignored),
        "files": [*_proofs(plan), *plan.manifest_files, *files, _entry("class_statistics.parquet", statistics)],
        "recorded": dict(plan.recorded),
        "figures": dict(figures),
    }


def _proofs(plan: Plan) -> list[dict[str, Any]]:
    """Returns what summary.json says of run.json and of the marks of the plan's generations."""
    marks = dict.fromkeys(manifest.mark_of(file["path"]) for file in plan.manifest_files)
    return [_entry(path, storage.read_bytes(storage.join(plan.out, path))) for path in ("run.json", *marks)]


def _entry(path: str, data: bytes) -> dict[str, Any]:
    return {"path": path, "bytes": len(data), "sha256": storage.sha256(data)}


def _statistics(out: str, files: Iterable[Mapping[str, Any]], lineage: Lineage) -> pa.Table:
    columns = results.statistics_columns(lineage.class_set)
    batches = (
        batch
        for file in files
        for batch in pq.ParquetFile(storage.open_read(storage.join(out, file["path"]))).iter_batches(columns=columns)
    )
    return results.class_statistics(batches, lineage.class_set)


def retry_rejected(plan: Plan, reasons: Collection[str] = ()) -> int:
    """Makes chunks with frames rejected for some reasons (any, without one) pending again; returns how many frames.

    A published shard with such frames goes back to parts and records: those of its other chunks, so that only the
    chunks with rejected frames are done again; one that is damaged is done again whole.

    Raises:
        ValueError: there is no such reason.
    """
    for reason in reasons:
        if reason not in results.REASONS:
            raise ValueError(
                f"--retry-rejected is {reason!r}; the reasons are {', '.join(results.REASONS)}; without one, all"
            )
    reasons = reasons or results.REASONS
    n_frames = 0
    published = ledger.published_shards(plan.out)
    for shard, file in published.items():
        if not (count := _count(file["rejected"], reasons)):
            continue
        if _verify_file(plan.out, file):
            ledger.mark_damaged(plan.out, shard_name(shard))
            n_frames += count
        else:
            n_frames += _reopen(plan, shard, reasons)
    recorded = ledger.recorded_keys(plan.out)
    keys = [chunk.key for chunk in plan.chunks if chunk.shard not in published and chunk.key in recorded]
    for receipt in ledger.read_receipts(plan.out, keys):
        if count := _count(receipt.rejected, reasons):
            storage.delete(ledger.record_uri(plan.out, receipt.key))
            n_frames += count
    return n_frames


def _count(rejected: Mapping[str, int], reasons: Collection[str]) -> int:
    return sum(count for reason, count in rejected.items() if reason in reasons)


def _reopen(plan: Plan, shard: int, reasons: Collection[str]) -> int:
    """Takes a published shard apart: a part and record for each chunk without such frames, then it counts no more."""
    table = manifest.read_parquet(storage.read_bytes(storage.join(plan.out, "frames", shard_name(shard))))
    start = n_frames = 0
    for chunk in (chunk for chunk in plan.chunks if chunk.shard == shard):
        rows = table.slice(start, chunk.n_rows).replace_schema_metadata()
        start += chunk.n_rows
        rejected = Counter(rows["reason"].to_pylist())
        del rejected[None]
        if count := _count(rejected, reasons):
            n_frames += count
        else:
            ledger.commit(plan.out, chunk, rows, writer="reopened")
    ledger.mark_damaged(plan.out, shard_name(shard))
    return n_frames


# --- proof ---


def verify(out: str) -> list[str]:
    """Checks a published output: every file's size and digest, every row against the manifest, every count.

    What is found damaged is noted in the output, so that `segment` does that, and only that, again.

    Returns:
        One line a problem; none where all is whole.

    Raises:
        ValueError: the folder is no output.
    """
    try:
        plan = ledger.read_plan(out)
    except JobFailed as error:
        return [str(error)]
    summary = ledger.read_summary(out)
    if summary is None:
        return [_unfinished(plan)]
    if newer := _not_in(summary, ledger.read_notes(out)):
        return [f"{path}: published by a job that did not finish; run segment again" for path in newer]
    problems = [problem for file in summary["files"] for problem in _verify_file(out, file)]
    problems += _strangers(out, summary)
    chunks_of = {shard: [c for c in plan.chunks if c.shard == shard] for shard in {c.shard for c in plan.chunks}}
    listed = {file["path"]: file for file in summary["files"]}
    for shard, chunks in sorted(chunks_of.items()):
        path = f"frames/{shard_name(shard)}"
        if path not in listed:
            problems.append(f"{path}: not published yet; run segment again")
        elif not any(problem.startswith((path, "manifest/")) for problem in problems):
            problems += _verify_rows(plan, listed[path], chunks)
    problems += _verify_counts(plan, summary)
    for name in {problem.partition(":")[0] for problem in problems}:
        if name.startswith("frames/") or name == "class_statistics.parquet":
            with contextlib.suppress(PermissionError):  # who may only read may verify
                ledger.mark_damaged(out, name.removeprefix("frames/"))
    return problems


def _unfinished(plan: Plan) -> str:
    left = ledger.pending(plan)
    first = ""
    if left:
        frame = ledger.read_rows(left[0])["frame_id"][0].as_py()
        first = f" (first {left[0].chunk_id}, from frame {frame} on)"
    return (
        f"{plan.out}/summary.json: missing or damaged: the output is not finished, {len(left):,} of "
        f"{len(plan.chunks):,} chunks are to be done{first}; run segment again"
    )


def _verify_counts(plan: Plan, summary: Mapping[str, Any]) -> list[str]:
    """Checks that the manifest and the counts of the single files, which are those of their rows, give the sums."""
    files = [file for file in summary["files"] if file["path"].startswith("frames/")]
    rejected = sum((Counter(file["rejected"]) for file in files), Counter())
    n_rows = sum(file["rows"] for file in files)
    said = (summary["listed"], summary["ok"], Counter(summary["rejected"]))
    if said == (plan.n_frames, n_rows - rejected.total(), rejected) and n_rows == plan.n_frames:
        return []
    return [
        f"summary.json: {summary['listed']:,} frames listed, {summary['ok']:,} ok, {summary['rejected']} rejected; "
        f"the manifest lists {plan.n_frames:,}, and of {n_rows:,} rows {dict(rejected)} are rejected"
    ]


def _verify_file(out: str, file: Mapping[str, Any]) -> list[str]:
    try:
        data = storage.read_bytes(storage.join(out, file["path"]))
    except FileNotFoundError:
        return [f"{file['path']}: missing"]
    if len(data) != file["bytes"]:
        return [f"{file['path']}: {len(data):,} bytes, summary.json says {file['bytes']:,}"]
    if storage.sha256(data) != file["sha256"]:
        return [f"{file['path']}: its content is not what was published (sha256 differs)"]
    return []


def _strangers(out: str, summary: Mapping[str, Any]) -> list[str]:
    listed = {file["path"] for file in summary["files"]}
    folder = storage.join(out, "frames")
    there = [f"frames/{file.path}" for file in list_folder(folder)]
    return [
        f"{path}: not in summary.json; its rows would be read twice, delete it" for path in there if path not in listed
    ]


def _verify_rows(plan: Plan, file: Mapping[str, Any], chunks: Sequence[Chunk]) -> list[str]:
    """Checks that the rows of a file are the manifest's, in order, and that their counts and pixels add up."""
    path = file["path"]
    names = [f"pixels_{name}" for name in plan.lineage.class_set.names]
    columns = ["frame_id", "status", "reason", "mask_height_px", "mask_width_px", *names]
    rows = manifest.read_parquet(storage.read_bytes(storage.join(plan.out, path)), columns)
    planned = pa.concat_tables([ledger.read_rows(chunk).select(["frame_id"]) for chunk in chunks])
    if not rows["frame_id"].equals(planned["frame_id"]):
        return [f"{path}: its frames are not those of the manifest ({len(rows):,} rows for {len(planned):,} frames)"]
    found = Counter(zip(rows["status"].to_pylist(), rows["reason"].to_pylist(), strict=True))
    said = Counter({("rejected", reason): count for reason, count in file["rejected"].items()})
    said["ok", None] = file["rows"] - said.total()
    if found != said:
        shown = [
            ", ".join(f"{n:,} {reason or status}" for (status, reason), n in some.items()) for some in (found, said)
        ]
        return [f"{path}: its rows are {shown[0]}; summary.json says {shown[1]}"]
    return _verify_pixels(path, rows.filter(pc.equal(rows["status"], "ok")), names)


def _verify_pixels(path: str, ok: pa.Table, names: Sequence[str]) -> list[str]:
    total = pc.multiply(ok["mask_height_px"].cast(pa.int64()), ok["mask_width_px"].cast(pa.int64()))
    for name in names:
        total = pc.subtract(total, ok[name])
    wrong = ok.filter(pc.not_equal(total, 0))
    if len(wrong):
        frame = wrong["frame_id"][0].as_py()
        return [f"{path}: the class pixels of {len(wrong):,} masks do not add up to height x width, first {frame}"]
    return []
