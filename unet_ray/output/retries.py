"""Rejected frames that are tried again: `OUT/_work/retries/000.json`, one file for each time that somebody asked.

A retry names rows of chunks that are done. These rows are chunks of their own, with keys, parts and records of their
own, so that no label that is there has to be given up for them: until a published file with the new rows is written,
the old one stands. A retry's files stay until all is published, and go before the records that they explain.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from unet_ray import storage
from unet_ray.output.chunks import Chunk
from unet_ray.output.plans import Plan
from unet_ray.storage.sealed import are_counts, is_count, sealed, unsealed


@dataclass(frozen=True, kw_only=True)
class Retry:
    """Rows that were rejected when somebody asked to try them again."""

    number: int
    """Its place among the retries of an output, from 0; what a later one says of a row counts."""
    rows: Mapping[str, tuple[int, ...]]
    """Places within the chunk, in order, by the chunk's id."""
    rejected: Mapping[str, Mapping[str, int]]
    """Number of these rows by the reason that they had, by the chunk's id."""

    def chunks(self, plan: Plan) -> Iterator[Chunk]:
        """Yields the rows as chunks of their own, in the plan's order."""
        for chunk in plan.chunks:
            if rows := self.rows.get(chunk.chunk_id):
                key = storage.sha256(f"{chunk.key} retry {self.number} {rows}".encode())[:32]
                yield dataclasses.replace(chunk, key=key, n_rows=len(rows), rows=rows)


def read(plan: Plan) -> list[Retry]:
    """Returns the retries of an output that are not over, in order; one that is damaged or another job's is none."""
    retries = []
    for file in sorted(_files(plan.out), key=lambda file: file.path):
        try:
            content = unsealed(storage.read_bytes(file.uri))
            if content["lineage"] == plan.lineage.digest:
                retries.append(_checked(content, int(file.path.removesuffix(".json")), plan))
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            continue
    return retries


def _checked(content: Mapping[str, Any], number: int, plan: Plan) -> Retry:
    sizes = {chunk.chunk_id: chunk.n_rows for chunk in plan.chunks}
    rows, rejected = content.get("rows"), content.get("rejected")
    if not isinstance(rows, dict) or not isinstance(rejected, dict):
        raise ValueError("it has no rows, or no reasons of theirs")
    for chunk_id, places in rows.items():
        size = sizes.get(chunk_id, 0)
        if not isinstance(places, list) or not all(is_count(row, below=size) for row in places):
            raise ValueError(f"it has rows that chunk {chunk_id} does not have")
        if not places or sorted(set(places)) != places:
            raise ValueError(f"its rows of chunk {chunk_id} are not in order")
        if not are_counts(rejected.get(chunk_id)):
            raise ValueError(f"it does not say why rows of chunk {chunk_id} were rejected")
    return Retry(number=number, rows={chunk_id: tuple(places) for chunk_id, places in rows.items()}, rejected=rejected)


def _files(out: str) -> list[storage.FileInfo]:
    return storage.list_folder(storage.join(out, "_work", "retries"))


def write(
    plan: Plan, rows: Mapping[str, tuple[int, ...]], rejected: Mapping[str, Mapping[str, int]], *, number: int
) -> None:
    """Notes rows as ones to try again, as the retry of at least this number; where another job does the same at this
    moment, its retry stands."""
    content = {
        "lineage": plan.lineage.digest,
        "rows": {chunk_id: list(places) for chunk_id, places in rows.items()},
        "rejected": {chunk_id: dict(counts) for chunk_id, counts in rejected.items()},
    }
    numbers = [int(file.path.removesuffix(".json")) for file in _files(plan.out) if file.path[:-5].isdigit()]
    number = max([number, *(other + 1 for other in numbers)])
    storage.put_if_absent(storage.join(plan.out, "_work", "retries", f"{number:03d}.json"), sealed(content))
