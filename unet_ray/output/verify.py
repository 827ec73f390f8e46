"""Whether a published output is whole: every file against its digest, every row against the manifest, every count."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from unet_ray import storage
from unet_ray.errors import JobFailed
from unet_ray.messages import count, first_few
from unet_ray.output import labels, ledger, manifest, plans, publish, run_facts
from unet_ray.output import rows as results
from unet_ray.output.chunks import Chunk
from unet_ray.output.ledger import shard_name
from unet_ray.output.masks import MASK_COLUMNS, require_values
from unet_ray.output.plans import Plan
from unet_ray.output.tables import UNREADABLE, read_parquet, require_columns

_MASKS_AT_ONCE = 64


def verify(out: str) -> list[str]:
    """Checks an output: size and digest of every file, every row against the manifest, every count.

    What is found damaged is noted in the output, so that `segment` does that, and only that, again.

    Returns:
        One line a problem; none where all is whole.

    Raises:
        ValueError: the folder is no output.
    """
    plans.require_folders(out)
    summary = plans.read_summary(out)
    try:
        plan = plans.read_plan(out)
    except JobFailed as error:
        others = _damaged_files(out, summary["files"] if summary else [])
        return [str(error), *(problem for problem in others if problem.partition(":")[0] not in str(error))]
    summary = ledger.own_summary(plan)
    files = _newest(plan, summary)
    newer = publish.not_in(summary, filter(ledger.is_shard, files.values())) if summary else []
    if newer:
        files.pop(ledger.STATISTICS, None)  # written after the files and before summary.json
    damage = _damaged_files(out, files.values())
    for shard, chunks in sorted(plan.of_shard.items()):
        path = f"frames/{shard_name(shard)}"
        if path in files and not any(problem.startswith((path, "manifest/")) for problem in damage):
            damage += _verify_rows(plan, files[path], chunks)
    if ledger.STATISTICS in files and not any(problem.startswith(ledger.STATISTICS) for problem in damage):
        damage += _verify_statistics(out)
    problems = [_noted(out, problem) for problem in damage]
    problems += [f"{path}: of a job whose output was overwritten; run segment again" for path in _strange(plan)]
    problems += _unlisted(plan, files)
    if summary is None:
        return [*problems, _unfinished(plan)]
    problems += run_facts.problems(out, summary)
    paths = [f"frames/{shard_name(shard)}" for shard in sorted(plan.of_shard)]
    problems += [f"{path}: not published yet; run segment again" for path in paths if path not in files]
    problems += [
        f"{path}: published by a job that did not finish; run segment again"
        for path in newer
        if not any(problem.startswith(path) for problem in damage)
    ]
    return problems if newer else [*problems, *_verify_counts(plan, summary)]


def kept_labels(out: str) -> list[str]:
    """Returns a line for each published file with labels that were kept from a damaged one (see `salvage`)."""
    plan, lines = plans.read_plan(out), []
    for file in ledger.published_shards(plan).values():
        columns = labels.read_columns(out, file["path"], ["frame_id", "status", "error"])
        rows = pa.Table.from_batches(list(columns))
        kept = rows.filter(pc.and_(pc.equal(rows["status"], "ok"), pc.is_valid(rows["error"])))
        if len(kept):
            frames = first_few(kept["frame_id"].to_pylist())
            lines.append(f"{file['path']}: {count(len(kept), 'label')} kept from a damaged file: {frames}")
    return lines


def _strange(plan: Plan) -> list[str]:
    return plans.strange_marks(plan.out, plan.lineage)


def _newest(plan: Plan, summary: Mapping[str, Any] | None) -> dict[str, dict[str, Any]]:
    """What is said of each file of the output, by its path; of one that a retry made anew, what it is now."""
    files = {file["path"]: file for file in (*plan.manifest_files, *(summary["files"] if summary else ()))}
    for candidates in ledger.expected_files(plan).values():
        path = candidates[-1]["path"]
        several = candidates if len({file["sha256"] for file in candidates}) > 1 else ()
        whole = (file for file in reversed(several) if ledger.is_whole(plan.out, file))
        # A note without its file is one that a killed job was about to write.
        fallback = candidates[0] if path in files or storage.exists(storage.join(plan.out, path)) else None
        if (file := next(whole, fallback)) is not None:
            files[path] = file
    return files


def _damaged_files(out: str, files: Iterable[Mapping[str, Any]]) -> list[str]:
    return [problem for file in files for problem in _verify_file(out, file)]


def _noted(out: str, problem: str) -> str:
    """Notes a damaged file of `frames/` or the statistics, and returns the line about it."""
    path = problem.partition(":")[0]
    if path != ledger.STATISTICS and ledger.shard_of(path) is None:
        return problem
    try:
        ledger.mark_damaged(out, path.removeprefix("frames/"))
    except OSError as error:  # a mount to read from only, no rights, a full disk
        why = error.strerror or str(error)
        return f"{problem}; this could not be noted ({why}): verify again where it can, or segment does not know of it"
    return problem


def _unfinished(plan: Plan) -> str:
    left = ledger.pending(plan)
    first = ""
    if left:
        frame = manifest.read_rows(left[0])["frame_id"][0].as_py()
        first = f" (first {left[0].chunk_id}, from frame {frame} on)"
    return (
        f"{plan.out}/summary.json: missing or damaged: the output is not finished, {len(left):,} of "
        f"{count(len(plan.chunks), 'chunk')} still to be done{first}; run segment again"
    )


def _verify_counts(plan: Plan, summary: Mapping[str, Any]) -> list[str]:
    """Checks that the manifest and the counts of the single files, which are those of their rows, give the sums."""
    files = [file for file in summary["files"] if file["path"].startswith("frames/")]
    rejected = sum((Counter(file["rejected"]) for file in files), Counter())
    n_rows = sum(file["rows"] for file in files)
    expected = (summary["listed"], summary["ok"], Counter(summary["rejected"]))
    if expected == (plan.n_frames, n_rows - rejected.total(), rejected) and n_rows == plan.n_frames:
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


def _unlisted(plan: Plan, files: Collection[str]) -> Iterator[str]:
    """Yields a line for each file of `frames/` and `manifest/` that is none of the output: globs would read it, too."""
    out = plan.out
    generations = manifest.read_generations(out)
    known = {*files, *(manifest.generation_path(number) for number in range(len(generations)))}
    known |= {file["path"] for generation in generations for file in generation["files"]}
    for folder in ("frames", "manifest"):
        for file in storage.list_files(storage.join(out, folder), must_exist=False, on_unreadable=_unless_gone):
            path = f"{folder}/{file.path}"
            if path in known:
                continue
            if storage.name(path).startswith(storage.TEMPORARY_PREFIX):
                yield f"{path}: was never finished, or is being written; run segment again, and delete it if it stays"
            elif folder == "frames":
                yield f"{path}: not in summary.json; its rows would be read twice, delete it"
            else:
                yield f"{path}: of no generation of the plan; run segment again, and delete it if it stays"


def _unless_gone(uri: str, error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error


def _verify_rows(plan: Plan, file: Mapping[str, Any], chunks: Sequence[Chunk]) -> list[str]:
    """Checks that the rows of a file are the manifest's, in order, and that their counts and pixels add up."""
    path = file["path"]
    names = [f"pixels_{name}" for name in plan.lineage.class_set.names]
    columns = ["frame_id", "status", "reason", "mask_height_px", "mask_width_px", *names]
    data = storage.read_bytes(storage.join(plan.out, path))
    try:
        schema = results.frames_schema(plan.lineage.class_set, plan.carried, plan.lineage.result_version)
        require_columns(pq.read_schema(io.BytesIO(data)), schema)
        rows = read_parquet(data, columns)
        _require_masks(data)
    except UNREADABLE as error:
        return [f"{path}: damaged ({manifest.first_line(error)})"]
    planned = pa.concat_tables([manifest.read_rows(chunk).select(["frame_id"]) for chunk in chunks])
    if not rows["frame_id"].equals(planned["frame_id"]):
        return [f"{path}: its frames are not those of the manifest ({len(rows):,} rows for {len(planned):,} frames)"]
    counted = Counter(zip(rows["status"].to_pylist(), rows["reason"].to_pylist(), strict=True))
    expected = Counter({("rejected", reason): count for reason, count in file["rejected"].items()})
    expected["ok", None] = file["rows"] - expected.total()
    if counted != expected:
        texts = [
            ", ".join(f"{n:,} {reason or status}" for (status, reason), n in counts.items())
            for counts in (counted, expected)
        ]
        return [f"{path}: its rows are {texts[0]}; summary.json says {texts[1]}"]
    return _verify_pixels(path, rows.filter(pc.equal(rows["status"], "ok")), names)


def _require_masks(data: bytes) -> None:
    """Raises ValueError where a labelled row of a file of `frames/` has no mask."""
    for batch in pq.ParquetFile(io.BytesIO(data)).iter_batches(_MASKS_AT_ONCE, columns=["status", *MASK_COLUMNS]):
        require_values(batch, MASK_COLUMNS)


def _verify_statistics(out: str) -> list[str]:
    try:
        data = storage.read_bytes(storage.join(out, ledger.STATISTICS))
        require_columns(read_parquet(data).schema, results.statistics_schema())
    except storage.StorageError:
        raise
    except UNREADABLE as error:
        return [f"{ledger.STATISTICS}: damaged ({manifest.first_line(error)})"]
    return []


def _verify_pixels(path: str, ok: pa.Table, names: Sequence[str]) -> list[str]:
    total = pc.multiply(ok["mask_height_px"].cast(pa.int64()), ok["mask_width_px"].cast(pa.int64()))
    for name in names:
        total = pc.subtract(total, ok[name])
    wrong = ok.filter(pc.fill_null(pc.not_equal(total, 0), True))
    if len(wrong):
        frame = wrong["frame_id"][0].as_py()
        return [f"{path}: the class pixels of {len(wrong):,} masks do not add up to height x width, first {frame}"]
    return []
