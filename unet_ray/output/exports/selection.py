"""Which rows of an output are exported: those of some drives, or that fit a condition; read a few at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from unet_ray import storage
from unet_ray.output import labels, ledger, manifest
from unet_ray.output.expressions import column_names, parse_expression
from unet_ray.output.masks import MASK_COLUMNS, require_values
from unet_ray.output.plans import Plan

_BATCH_ROWS = 64
_BUFFER_BYTES = 2**23
"""Of a column while it is read, instead of all of it in a row group; Arrow unpacks a page, up to 1,024 masks."""

_NEVER_NULL = ("frame_id", "uri", *MASK_COLUMNS)
"""Of a labelled frame."""

_DIGEST = "content_digest"
_ROW = "unet_ray.row"


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Rows of an output that is finished."""

    plan: Plan
    groups: Sequence[tuple[str, Sequence[int]]]
    """Files of `frames/`, in the manifest's order, and the row groups that are read of each."""
    columns: tuple[str, ...]
    """All that the files have: a version has columns that an earlier one lacks."""
    sequences: tuple[str, ...] = ()
    """Only the rows of these; all where there is none."""
    where: pc.Expression | None = None
    """Only the rows that fit it."""
    where_columns: tuple[str, ...] = ()

    def labelled(self, columns: Sequence[str]) -> Iterator[list[dict[str, Any]]]:
        """Yields the chosen rows that have a mask, in order, a few at a time, with these columns and some more."""
        for rows in self._batches(columns):
            yield rows.filter(pc.equal(rows["status"], "ok")).to_pylist()

    def counted(self) -> tuple[int, int]:
        """Returns how many of the chosen rows have a mask, and how many have none."""
        statuses: Counter[str] = Counter()
        for rows in self._batches(()):
            statuses.update(rows["status"].to_pylist())
        return statuses["ok"], statuses.total() - statuses["ok"]

    def _batches(self, columns: Sequence[str]) -> Iterator[pa.Table]:
        names = list(dict.fromkeys(("sequence", "status", *columns, *self.where_columns)))
        for uri, groups in self.groups:
            with labels.opened(uri, buffer_size=_BUFFER_BYTES, pre_buffer=False) as file:
                for batch in file.iter_batches(_BATCH_ROWS, row_groups=groups, columns=names):
                    rows = pa.Table.from_batches([batch])
                    require_values(rows, [name for name in columns if name in _NEVER_NULL])
                    yield self._chosen(rows)

    def sources(self) -> Iterator[pa.Table]:
        """Yields the manifest's rows of the chosen labelled frames, chunk by chunk, in the order of `labelled`.

        Beside the manifest's columns they have `content_digest` (null where it is unknown), `height_px` and `width_px`.
        """
        names = [name for name in ("height_px", "width_px", _DIGEST) if name in self.columns]
        for uri, groups in self.groups:
            rows = self._indexed(uri, names) if groups else None
            if rows is None:
                continue
            indices, start = rows[_ROW].to_numpy(), 0
            for chunk in self.plan.of_shard[_shard_of(uri)]:
                first, last = np.searchsorted(indices, (start, start + chunk.n_rows))
                if last > first:
                    planned = manifest.read_rows(chunk).take(pa.array(indices[first:last] - start))
                    for name in names:
                        planned = planned.append_column(name, rows[name].slice(first, last - first))
                    yield planned if _DIGEST in names else planned.append_column(_DIGEST, pa.nulls(len(planned)))
                start += chunk.n_rows

    def _indexed(self, uri: str, names: Sequence[str]) -> pa.Table:
        """Returns columns of the chosen rows of a file that have a mask, and as `_ROW` their indices in it."""
        columns = list(dict.fromkeys(("sequence", "status", *names, *self.where_columns)))
        parts, start = [], 0
        with labels.opened(uri, buffer_size=_BUFFER_BYTES, pre_buffer=False) as file:
            for batch in file.iter_batches(_BATCH_ROWS, columns=columns):
                indices = pa.array(np.arange(start, start + len(batch)))
                rows = self._chosen(pa.Table.from_batches([batch]).append_column(_ROW, indices))
                parts.append(rows.filter(pc.equal(rows["status"], "ok")).select([*names, _ROW]))
                start += len(batch)
        return pa.concat_tables(parts)

    def _chosen(self, rows: pa.Table) -> pa.Table:
        if self.sequences:
            rows = rows.filter(pc.is_in(rows["sequence"], value_set=pa.array(self.sequences, pa.string())))
        return rows if self.where is None else rows.filter(self.where)


def select(plan: Plan, files: Sequence[str], sequences: tuple[str, ...], where: str | None) -> Selection:
    """Returns the chosen rows of some published files.

    Args:
        plan: the output's.
        files: paths of its files of `frames/`.
        sequences: names of drives; none: all.
        where: a condition on the columns (`expressions`).

    Raises:
        ValueError: a drive or a column that the output does not have, or no condition.
    """
    uris = sorted((storage.join(plan.out, path) for path in files), key=_shard_of)
    with labels.opened(uris[0]) as file:
        schema = file.schema_arrow
    expression, names = None, list[str]()
    if where is not None:
        try:
            expression, names = parse_expression(where, schema), column_names(where, schema)
        except ValueError as error:
            raise ValueError(f"--where: {error}") from None
    return Selection(
        plan=plan,
        groups=_groups_of(uris, sequences) if sequences else _all_groups(uris),
        columns=tuple(schema.names),
        sequences=sequences,
        where=expression,
        where_columns=tuple(names),
    )


def _shard_of(uri: str) -> int:
    shard = ledger.shard_of(f"frames/{storage.name(uri)}")
    assert shard is not None, uri
    return shard


def _all_groups(uris: Sequence[str]) -> list[tuple[str, Sequence[int]]]:
    groups: list[tuple[str, Sequence[int]]] = []
    for uri in uris:
        with labels.opened(uri) as file:
            groups.append((uri, range(file.num_row_groups)))
    return groups


def _groups_of(uris: Sequence[str], sequences: tuple[str, ...]) -> list[tuple[str, Sequence[int]]]:
    """Returns the row groups with frames of these drives, by that one column.

    Raises:
        ValueError: a drive that the output does not have.
    """
    groups: list[tuple[str, Sequence[int]]] = []
    drives: dict[str, None] = {}
    for uri in uris:
        chosen = []
        with labels.opened(uri) as file:
            for group in range(file.num_row_groups):
                column = file.read_row_group(group, columns=["sequence"])["sequence"]
                names = pc.unique(column).to_pylist()
                drives |= dict.fromkeys(names)
                if set(names) & set(sequences):
                    chosen.append(group)
        groups.append((uri, chosen))
    for sequence in sequences:
        if sequence not in drives:
            there = ", ".join(str(name) for name in list(drives)[:10]) + (", …" if len(drives) > 10 else "")
            raise ValueError(f"--sequence is {sequence!r}; the output's drives are {there}")
    return groups
