"""What a damaged published file still holds: labels that agree with themselves are kept until there are better ones.

A file that `verify` noted, or that has not its size, counts no more, and its frames are labelled again. Some of them
may be gone by then. So before that work begins, every row of the damaged file is kept whose mask can be decoded, has
the size that the row says, and gives the row's own pixels by class: `OUT/_work/kept/KEY-DIGEST.parquet`, one file a
chunk. `commit` puts such a label where its frame is rejected now, and says so in the column `error`.

| column of a kept file | |
|---|---|
| `place` | of the row within its chunk, from 0 |
| the others | those of `frames/` that a label consists of |

Mask, counts and size prove nothing of a confidence. For that the file's footer has a digest of each such column in each
row group (`rows.column_digests`); a column that does not give it becomes null there. Earlier versions wrote no
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
from unet_ray.output.ledger import shard_name
from unet_ray.output.masks import mask_of
from unet_ray.output.plans import Plan
from unet_ray.output.records import committed_keys, content_name, kept_uri, list_work
from unet_ray.output.rows import DIGESTS_KEY, column_digests, frames_schema, unproved_columns
from unet_ray.output.tables import UNREADABLE, parquet_bytes
from unet_ray.pixels import images
from unet_ray.pixels.mask_png import encode_mask_png

_BYTES_APART = 8
"""Bytes in which a footer's lineage may differ from ours and be damaged, not another: a digest differs in about 60."""

_READ_ROWS = 64  # of a page, as they are published


def take_back_notes(plan: Plan) -> None:
    """Takes back notes of damage on files that are whole again, say by a copy of them."""
    noted = {file.path for file in list_work(plan.out, "damaged")}
    for shard, files in ledger.expected_files(plan).items() if noted else ():
        name = shard_name(shard)
        if name in noted and any(ledger.is_mended(plan.out, file) for file in files):
            storage.delete(storage.join(plan.out, "_work", "damaged", name))


def look_after_damage(plan: Plan) -> list[str]:
    """Keeps what damaged files still hold, before their frames are labelled again.

    Returns:
        A line for each damaged file, for a person.
    """
    take_back_notes(plan)
    expected, lines = ledger.expected_files(plan), []
    published, recorded = ledger.published_shards(plan), committed_keys(plan.out)
    there = {file.path for file in storage.list_folder(storage.join(plan.out, "frames"))}
    for shard, chunks in plan.of_shard.items():
        is_damaged = shard in expected or shard_name(shard) in there
        if shard in published or not is_damaged or all(chunk.key in recorded for chunk in chunks):
            continue
        lines.append(
            f"frames/{shard_name(shard)} is damaged or gone; its frames are labelled again, and where that is not "
            f"possible {count(_keep(plan, shard), 'label')} of it can stay"
        )
    return lines


def _keep(plan: Plan, shard: int) -> int:
    """Writes the labels that a damaged file still holds, and returns how many; those of a chunk that has some stay."""
    chunks, n_kept = plan.of_shard[shard], 0
    kept = {file.path.partition("-")[0] for file in list_work(plan.out, "kept")}
    frame_ids = [i for chunk in chunks for i in manifest.read_rows(chunk)["frame_id"].to_pylist()]
    groups = list(_readable(plan, f"frames/{shard_name(shard)}", frame_ids))
    if not groups:
        return 0
    rows, start = pa.concat_tables(groups), 0
    places = rows["place"].to_numpy()
    for chunk in chunks:
        begin, end = np.searchsorted(places, [start, start + chunk.n_rows])
        mine = rows.slice(begin, end - begin)
        if len(mine) and chunk.key not in kept:
            data = parquet_bytes(mine.set_column(0, "place", pa.array(places[begin:end] - start, pa.int32())))
            storage.write_whole(kept_uri(plan.out, content_name(chunk.key, data)), data)
        n_kept += len(mine)
        start += chunk.n_rows
    return n_kept


def _readable(plan: Plan, path: str, frame_ids: Sequence[str]) -> Iterator[pa.Table]:
    """Yields the labels of each row group that agree with themselves; `place` is that within the file."""
    try:
        data = storage.read_bytes(storage.join(plan.out, path))
        file = pq.ParquetFile(pa.BufferReader(data))  # of pages with a wrong checksum most rows can be read
        metadata = file.metadata.metadata or {}
        sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
    except storage.StorageError:
        raise
    except UNREADABLE:  # gone, or no footer any more
        return
    if sum(sizes) != len(frame_ids) or not _is_of(plan, data, metadata):
        return
    digests, types, start = _digests(metadata), _label_types(plan), 0
    for group, size in enumerate(sizes):
        columns = {name: _column(file, group, name, size) for name in ("frame_id", *types)}
        _forget_unproved(plan, columns, digests[group] if group < len(digests) else {})
        labels = [_label(plan, {name: column[n] for name, column in columns.items()}) for n in range(size)]
        kept = [
            n
            for n, frame_id in enumerate(frame_ids[start : start + size])
            if labels[n] is not None and columns["frame_id"][n] in (None, frame_id)
        ]
        yield pa.table(
            {
                "place": pa.array([start + n for n in kept], pa.int32()),
                **{name: pa.array([labels[n][name] for n in kept], dtype) for name, dtype in types.items()},  # type: ignore[index]
            }
        )
        start += size


def _digests(metadata: Mapping[bytes, bytes]) -> list[dict[str, str]]:
    try:
        return json.loads(metadata.get(DIGESTS_KEY.encode(), b"[]"))
    except ValueError:
        return []


def _forget_unproved(plan: Plan, columns: dict[str, Sequence[Any]], digests: Mapping[str, str]) -> None:
    """Puts nulls in place of what only a digest proves, in the columns of a row group that have not theirs."""
    types = _label_types(plan)
    names = unproved_columns(plan.lineage.class_set)
    now = column_digests(pa.table({name: pa.array(columns[name], types[name]) for name in names}), names)
    for name in names:
        if digests.get(name) != now[name]:
            columns[name] = [None] * len(columns[name])


def _label_types(plan: Plan) -> dict[str, pa.DataType]:
    schema = frames_schema(plan.lineage.class_set)
    names = ["height_px", "width_px", "content_digest", *schema.names[schema.names.index("mask") :]]
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
    except (*UNREADABLE, IndexError):
        pass
    return [*values[:size], *[None] * (size - len(values))]


def _label(plan: Plan, row: dict[str, Any]) -> dict[str, Any] | None:
    """The label of a row whose mask has the row's size and pixels by class; None where they differ.

    What cannot be read of a PNG's size and counts follows from its pixels, which have a checksum of their own.
    """
    row["mask_encoding"] = encoding = plan.lineage.options.get("mask_encoding", row["mask_encoding"])
    if row["mask"] is None or encoding is None:
        return None
    try:
        mask_HW = images.decode_mask(row["mask"]) if encoding == "png" else mask_of(row)
    except (ValueError, TypeError, OSError):
        return None
    names = [f"pixels_{name}" for name in plan.lineage.class_set.names]
    if mask_HW.ndim != 2 or int(mask_HW.max(initial=0)) >= len(names) or not mask_HW.size:
        return None
    values = dict(zip(("mask_height_px", "mask_width_px"), mask_HW.shape, strict=True))
    values |= dict(zip(names, np.bincount(mask_HW.ravel(), minlength=len(names)).tolist(), strict=True))
    unread = [name for name in values if row[name] is None]
    if any(row[name] != value for name, value in values.items() if name not in unread):
        return None
    if encoding == "png":  # written anew, as bits that no pixel depends on may have changed
        return row | values | {"mask": encode_mask_png(mask_HW, plan.lineage.class_set.palette_K3)}
    return None if unread else row
