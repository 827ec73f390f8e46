"""What a damaged published file still holds: labels that agree with themselves are kept until there are better ones.

A file that `verify` noted, or that has not its size, counts no more, and its frames are labelled again. Some of them
may be gone by then. So before that work begins, every row of the damaged file is kept whose mask can be decoded, has
the size that the row says, and gives the row's own pixels by class: `OUT/_work/kept/KEY-DIGEST.parquet`, one file a
chunk. `ledger.commit` puts such a label where its frame is rejected now, and says so in the column `error`.

| column of a kept file | |
|---|---|
| `place` | of the row within its chunk, from 0 |
| the others | those of `frames/` that a label consists of |

Mask, counts and size prove nothing of a confidence. For that the file's footer has a digest of each such column in each
row group (`rows.confidence_digests`); a column that does not give it becomes null there. Earlier versions wrote no
digests.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from unet_ray import storage
from unet_ray.messages import count
from unet_ray.output import ledger, manifest
from unet_ray.output.ledger import content_name, kept_uri, shard_name
from unet_ray.output.manifest import parquet_bytes
from unet_ray.output.masks import mask_of
from unet_ray.output.plans import Plan
from unet_ray.output.rows import DIGESTS_KEY, confidence_digests, frames_schema

_BYTES_APART = 8
"""Bytes in which a footer's lineage may differ from ours and be damaged, not another: a digest differs in about 60."""

_READ_ROWS = 64  # of a page, as they are published


def look_after_damage(plan: Plan) -> list[str]:
    """Takes back notes of damage on files that are whole again, and keeps what damaged files still hold.

    Returns:
        A line for each damaged file, for a person.
    """
    expected, lines = ledger.expected_files(plan), []
    noted = {file.path for file in ledger.list_work(plan.out, "damaged")}
    for shard, files in expected.items():
        name = shard_name(shard)
        if name in noted and any(ledger.is_mended(plan.out, file) for file in files):
            storage.delete(storage.join(plan.out, "_work", "damaged", name))
    published, recorded = ledger.published_shards(plan), ledger.committed_keys(plan.out)
    there = {file.path for file in manifest.list_folder(storage.join(plan.out, "frames"))}
    kept = {file.path.partition("-")[0] for file in ledger.list_work(plan.out, "kept")}
    for shard, chunks in plan.of_shard.items():
        is_damaged = shard in expected or shard_name(shard) in there
        if shard in published or not is_damaged or all(chunk.key in recorded for chunk in chunks):
            continue
        n_kept = 0 if any(chunk.key in kept for chunk in chunks) else _keep(plan, shard)
        lines.append(
            f"frames/{shard_name(shard)} is damaged or gone; its frames are labelled again, and where that is not "
            f"possible {count(n_kept, 'label')} of it can stay"
        )
    return lines


def _keep(plan: Plan, shard: int) -> int:
    """Writes the labels that a damaged file still holds, and returns how many."""
    chunks, n_kept = plan.of_shard[shard], 0
    frame_ids = [i for chunk in chunks for i in manifest.read_rows(chunk)["frame_id"].to_pylist()]
    groups = list(_readable(plan, f"frames/{shard_name(shard)}", frame_ids))
    if not groups:
        return 0
    rows, start = pa.concat_tables(groups), 0
    for chunk in chunks:
        places = rows["place"].to_numpy()
        begin, end = np.searchsorted(places, [start, start + chunk.n_rows])
        mine = rows.slice(begin, end - begin)
        if len(mine):
            data = parquet_bytes(mine.set_column(0, "place", pa.array(places[begin:end] - start, pa.int32())))
            storage.write_whole(kept_uri(plan.out, content_name(chunk.key, data)), data)
            n_kept += len(mine)
        start += chunk.n_rows
    return n_kept


def _readable(plan: Plan, path: str, frame_ids: Sequence[str]) -> Iterator[pa.Table]:
    """Yields the labels of each row group that agree with themselves; `place` is that within the file."""
    try:
        data = storage.read_bytes(storage.join(plan.out, path))
        file = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True)
    except storage.StorageError:
        raise
    except (OSError, ValueError):  # gone, or no footer any more
        return
    metadata = file.metadata.metadata or {}
    digests = _digests(metadata)
    sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
    if sum(sizes) != len(frame_ids) or not _is_of(plan, data, metadata):
        return
    types, start = _label_types(plan), 0
    for group, size in enumerate(sizes):
        columns = {name: _column(file, group, name, size) for name in ("frame_id", *types)}
        columns |= _unproved(plan, columns, digests[group] if group < len(digests) else {})
        kept = [
            n
            for n, frame_id in enumerate(frame_ids[start : start + size])
            if columns["frame_id"][n] in (None, frame_id) and _agrees(plan, {name: columns[name][n] for name in types})
        ]
        yield pa.table(
            {
                "place": pa.array([start + n for n in kept], pa.int32()),
                **{name: pa.array([columns[name][n] for n in kept], dtype) for name, dtype in types.items()},
            }
        )
        start += size


def _digests(metadata: Mapping[bytes, bytes]) -> list[dict[str, str]]:
    try:
        return json.loads(metadata.get(DIGESTS_KEY.encode(), b"[]"))
    except ValueError:
        return []


def _unproved(
    plan: Plan, columns: Mapping[str, Sequence[Any]], digests: Mapping[str, str]
) -> dict[str, Sequence[None]]:
    """Nulls in place of the confidences of a row group that have not their digest."""
    types = _label_types(plan)
    table = pa.table({name: pa.array(columns[name], dtype) for name, dtype in types.items() if dtype == pa.float32()})
    now = confidence_digests(table, plan.lineage.class_set)
    return {name: [None] * len(table) for name, digest in now.items() if digests.get(name) != digest}


def _label_types(plan: Plan) -> dict[str, pa.DataType]:
    schema = frames_schema(plan.lineage.class_set)
    names = ["height_px", "width_px", *schema.names[schema.names.index("mask") :]]
    return {name: schema.field(name).type for name in names}


def _is_of(plan: Plan, data: bytes, metadata: Mapping[bytes, bytes]) -> bool:
    """Whether a file is of a plan's lineage, though a bit of what says so may have flipped."""
    ours = json.dumps(plan.lineage.to_dict()).encode()
    if ours in data:
        return True
    theirs = metadata.get(b"unet_ray.lineage", b"")
    different = np.frombuffer(ours, np.uint8)[: len(theirs)] != np.frombuffer(theirs, np.uint8)[: len(ours)]
    return len(ours) == len(theirs) and int(different.sum()) <= _BYTES_APART


def _column(file: pq.ParquetFile, group: int, name: str, size: int) -> Sequence[Any]:
    """The values of a column in a row group; None from the first page on that cannot be read."""
    values: list[Any] = []
    try:
        for batch in file.iter_batches(_READ_ROWS, row_groups=[group], columns=[name]):
            values += batch.column(0).to_pylist()
    except (OSError, ValueError, IndexError):
        pass
    return [*values[:size], *[None] * (size - len(values))]


def _agrees(plan: Plan, row: Mapping[str, Any]) -> bool:
    """Whether a row's mask has the row's size and pixels by class."""
    height_px, width_px = row["mask_height_px"], row["mask_width_px"]
    counts = [row[f"pixels_{name}"] for name in plan.lineage.class_set.names]
    if row["mask"] is None or None in (height_px, width_px, row["mask_encoding"], *counts):
        return False
    if min(height_px, width_px) < 1 or sum(counts) != height_px * width_px:
        return False
    try:
        mask_HW = mask_of(row)
    except (ValueError, OSError, SyntaxError):
        return False
    if mask_HW.shape != (height_px, width_px):
        return False
    return np.bincount(mask_HW.ravel(), minlength=len(counts)).tolist() == counts
