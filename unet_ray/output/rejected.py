"""Rejected frames: whether they are too many, which they are, and trying them again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence

import pyarrow as pa

from unet_ray.errors import JobFailed
from unet_ray.output import labels, ledger, retries
from unet_ray.output import rows as results
from unet_ray.output.chunks import Chunk
from unet_ray.output.ledger import shard_name
from unet_ray.output.plans import Plan
from unet_ray.output.records import committed_keys, read_records


class TooManyRejected(JobFailed):
    """More frames are rejected than may be; nothing is published."""


def require_share(rejected: Mapping[str, int], n_done: int, n_frames: int, max_rejected: float) -> None:
    """Raises TooManyRejected where more than `max_rejected` of `n_frames` are rejected.

    Args:
        rejected: number by reason, of the frames that are done.
        n_done: frames that are done, for the message.
        n_frames: frames in all.
        max_rejected: a share.
    """
    n_rejected = sum(rejected.values())
    if n_rejected > max_rejected * n_frames:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in Counter(rejected).most_common())
        raise TooManyRejected(
            f"{n_rejected:,} of {n_done:,} frames are rejected ({n_rejected / n_done:.1%}: {reasons}), more than "
            f"--max-rejected {max_rejected:g} of {n_frames:,}; nothing is published. With a larger --max-rejected the "
            "same command publishes what is labelled; --retry-rejected tries those frames again"
        )


def retry_rejected(plan: Plan, reasons: Collection[str] = ()) -> int:
    """Makes frames that were rejected for some reasons (any, without one) pending again; returns how many.

    No other row of their chunks is touched. Rows of a retry that is not over are left to it. A published file that is
    found to be damaged is done again whole.

    Raises:
        ValueError: there is no such reason.
    """
    for reason in reasons:
        if reason not in results.REASONS:
            raise ValueError(
                f"--retry-rejected is {reason!r}; the reasons are {', '.join(results.REASONS)}; without one, all"
            )
    n_damaged = _mark_damage(plan, reasons or results.REASONS)
    open_chunks = ledger.open_retries(plan)
    recorded = committed_keys(plan.out)
    unfinished = {retry.number for retry, chunk in open_chunks if chunk.key not in recorded}
    waiting: dict[str, set[int]] = {}
    for retry, chunk in open_chunks:
        if retry.number in unfinished:
            waiting.setdefault(chunk.chunk_id, set()).update(chunk.rows or ())
    rows: dict[str, tuple[int, ...]] = {}
    counts: dict[str, Counter[str]] = {}
    for chunk_id, reason_of_row in _rejected_rows(plan):
        again = {
            row: reason
            for row, reason in reason_of_row.items()
            if reason in (reasons or results.REASONS) and row not in waiting.get(chunk_id, ())
        }
        if again:
            rows[chunk_id], counts[chunk_id] = tuple(sorted(again)), Counter(again.values())
    if rows:
        n_retries = max((entry["n_retries"] for entry in ledger.read_notes(plan)), default=0)
        retries.write(plan, rows, counts, number=n_retries)
    n_waiting = sum(len(places) for places in waiting.values())
    return n_damaged + n_waiting + sum(len(places) for places in rows.values())


def _mark_damage(plan: Plan, reasons: Collection[str]) -> int:
    """Notes damage among published files with frames to try again, and returns how many frames that are."""
    n_frames = 0
    for shard, file in ledger.published_shards(plan).items():
        number = sum(count for reason, count in file["rejected"].items() if reason in reasons)
        if number and not ledger.is_whole(plan.out, file):
            ledger.mark_damaged(plan.out, shard_name(shard))
            n_frames += number
    return n_frames


def _rejected_rows(plan: Plan) -> Iterator[tuple[str, dict[int, str]]]:
    """Yields each done chunk's id, and the reason of each of its rejected rows by its place, newest retries applied."""
    for chunk, rows in rows_with_rejected(plan, ["reason"]):
        reasons = enumerate(rows["reason"].to_pylist())
        yield chunk.chunk_id, {n: reason for n, reason in reasons if reason is not None}


def rows_with_rejected(plan: Plan, columns: Sequence[str]) -> Iterator[tuple[Chunk, pa.Table]]:
    """Yields each done chunk with rejected rows, and columns of all of its rows, newest retries applied.

    Args:
        plan: of the output.
        columns: some of `frames/`, `reason` among them.

    Raises:
        StorageError: a file is damaged, or the store did not answer.
        FileNotFoundError: another job has published a chunk meanwhile.
    """
    new_rows, _ = labels.new_rows(plan)
    for chunk, position, rows in _chunks_with_rejected_rows(plan, columns):
        for new in (new for new in new_rows.get(chunk.shard, ()) if new.position == position):
            (part,) = labels.read_parts(plan.out, [new.record])
            rows = labels.replaced(rows, new.rows, part)
        yield chunk, rows


def _chunks_with_rejected_rows(plan: Plan, columns: Sequence[str]) -> Iterator[tuple[Chunk, int, pa.Table]]:
    """Yields done chunks with rejected rows, place within the shard, and columns of all of their rows."""
    published, recorded = ledger.published_shards(plan), committed_keys(plan.out)
    for shard, chunks in plan.of_shard.items():
        file = published.get(shard)
        if file is None:
            done = [(position, chunk) for position, chunk in enumerate(chunks) if chunk.key in recorded]
            records = read_records(plan.out, [chunk.key for _, chunk in done])
            for (position, chunk), record in zip(done, records, strict=True):
                if record.rejected:
                    (part,) = labels.read_parts(plan.out, [record])
                    yield chunk, position, part.select(columns)
        elif file["rejected"]:
            rows = pa.Table.from_batches(list(labels.read_columns(plan.out, file["path"], columns)))
            start = 0
            for position, chunk in enumerate(chunks):
                yield chunk, position, rows.slice(start, chunk.n_rows)
                start += chunk.n_rows
