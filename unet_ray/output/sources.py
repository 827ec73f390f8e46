"""Whether the files that were labelled still hold what was labelled: they are read again, and their digests compared.

Size and modification time, which a listing goes by, do not notice two files that were swapped under one time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from unet_ray.archives.reading import FrameGone, read_frames
from unet_ray.digests import content_digest
from unet_ray.messages import count
from unet_ray.output import labels, ledger, manifest
from unet_ray.output.columns import since
from unet_ray.output.plans import Plan
from unet_ray.progress import Progress

_THREADS = 4
"""Chunks that are read at once, each in up to 128 MB (`read_frames`)."""

_COLUMNS = ("frame_id", "status", "content_digest")


@dataclass(frozen=True, kw_only=True)
class SourcesRead:
    """What became of the sources of an output's labelled frames."""

    n_frames: int
    """Labelled frames that were read again."""
    problems: tuple[str, ...]
    """One line for each that is gone or holds other bytes."""
    n_unknown: int
    """Labelled frames without a digest: labels that were kept from a damaged file."""

    def as_text(self) -> str:
        """Returns what became of them in one line."""
        same = self.n_frames - len(self.problems)
        unknown = f"; {self.n_unknown:,} labels kept from a damaged file have no digest" if self.n_unknown else ""
        return f"sources: {same:,} of {count(self.n_frames, 'labelled frame')} hold what was labelled{unknown}"


def require_digests(plan: Plan) -> None:
    """Raises ValueError where an output was written by a version that kept no digests."""
    first = since("content_digest")
    if plan.lineage.result_version < first:
        raise ValueError(
            f"{plan.out} has result version {plan.lineage.result_version}, which kept no digests of frames; --sources "
            f"needs {first} or later: verify without it, or label the frames anew with another --out"
        )


def read_sources(plan: Plan) -> SourcesRead:
    """Reads every labelled frame of the published files again, where the manifest says that it lies.

    Raises:
        ValueError: see `require_digests`.
        StorageError: the store did not answer, or this machine does not see the archive; no verdict on a frame.
    """
    require_digests(plan)
    n_frames, n_unknown, problems = 0, 0, []
    progress = Progress(sum(file["rows"] for file in ledger.published_shards(plan).values()), "frames")
    with progress, ThreadPoolExecutor(_THREADS) as pool:
        for rows, lines in _in_flight(pool, _labelled_rows(plan)):
            known = len(rows) - rows["content_digest"].null_count
            n_frames, n_unknown = n_frames + known, n_unknown + len(rows) - known
            problems += lines
            progress.advance(len(rows))
    progress.finish("")
    return SourcesRead(n_frames=n_frames, problems=tuple(problems), n_unknown=n_unknown)


def _labelled_rows(plan: Plan) -> Iterator[pa.Table]:
    """Yields the manifest's rows of the labelled frames of each chunk, with the digest of what was decoded."""
    for shard, file in sorted(ledger.published_shards(plan).items()):
        rows = pa.Table.from_batches(list(labels.read_columns(plan.out, file["path"], _COLUMNS)))
        start = 0
        for chunk in plan.of_shard[shard]:
            planned, published = manifest.read_rows(chunk), rows.slice(start, chunk.n_rows)
            start += chunk.n_rows
            planned = planned.append_column("content_digest", published["content_digest"])
            yield planned.filter(pc.equal(published["status"], "ok"))


def _differences(rows: pa.Table) -> tuple[pa.Table, list[str]]:
    """Returns the rows, and a line for each whose source is gone or holds other bytes."""
    known = rows.filter(pc.is_valid(rows["content_digest"]))
    lines = []
    columns = (known[name].to_pylist() for name in ("frame_id", "uri", "content_digest"))
    for frame_id, uri, digest, content in zip(*columns, read_frames(known), strict=True):
        if isinstance(content, FrameGone):
            lines.append(f"{frame_id}: {content.error}")
        elif content_digest(content) != digest:
            lines.append(f"{frame_id}: {uri} holds other bytes than those that were labelled")
    return rows, lines


def _in_flight(pool: ThreadPoolExecutor, tables: Iterable[pa.Table]) -> Iterator[tuple[pa.Table, list[str]]]:
    """Yields `_differences` of each table, in order; the tables are taken as threads become free."""
    waiting: deque[Future[tuple[pa.Table, list[str]]]] = deque()
    for table in tables:
        waiting.append(pool.submit(_differences, table))
        if len(waiting) > 2 * _THREADS:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()
