"""An output as result version 4 wrote it, on the archive of `labelled`: without the columns of version 5."""

from __future__ import annotations

import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
from labelled import CLASSES, LINEAGE, label, make_plan

from unet_ray import storage
from unet_ray.output import publish, rejected_csv
from unet_ray.output import rows as results
from unet_ray.output.ledger import shard_name
from unet_ray.output.plans import Lineage
from unet_ray.output.records import commit
from unet_ray.storage.sealed import sealed

LINEAGE_4 = Lineage(
    bundle_digest=LINEAGE.bundle_digest,
    class_set=CLASSES,
    options={**LINEAGE.options, "mask_encoding": "raw"},
    result_version=4,
)
COLUMNS_4 = (
    *("frame_id", "uri", "sequence", "camera", "frame_index", "timestamp_ns", "height_px", "width_px"),
    *("status", "reason", "error", "mask", "mask_encoding", "mask_height_px", "mask_width_px"),
    *("confidence", "low_margin_share"),
    *("pixels_road", "pixels_sky", "confidence_road", "confidence_sky"),
)
UNPROVED_4 = ("height_px", "width_px", "confidence", "low_margin_share", "confidence_road", "confidence_sky")


def write_version_4(root: str, out: str, *, reject: tuple[str, ...] = (), finished: bool = True) -> None:
    """Writes the whole output, or an unfinished one with the first chunk alone."""
    plan = make_plan(root, out, lineage=LINEAGE_4, recorded={"unet-ray": "0.0.9"})
    if not finished:
        commit(out, plan.chunks[0], label(plan.chunks[0]).select(COLUMNS_4), writer="job-4")
        return
    files = []
    for shard, chunks in plan.of_shard.items():
        rows = pa.concat_tables([label(chunk, reject=reject).select(COLUMNS_4) for chunk in chunks])
        footer = {
            "unet_ray.format_version": "1",
            "unet_ray.class_set": json.dumps(CLASSES.to_dict()),
            "unet_ray.lineage": json.dumps(LINEAGE_4.to_dict()),
            "unet_ray.column_digests": json.dumps([results.column_digests(rows, UNPROVED_4)]),
        }
        buffer = io.BytesIO()
        pq.write_table(rows.replace_schema_metadata(footer), buffer, compression="zstd", write_page_checksum=True)
        data, path = buffer.getvalue(), f"frames/{shard_name(shard)}"
        storage.write_whole(storage.join(out, path), data)
        reasons = [reason for reason in rows["reason"].to_pylist() if reason]
        file = {"path": path, "key": plan.shard_key[shard], "rows": len(rows), "bytes": len(data)}
        counts = {reason: reasons.count(reason) for reason in reasons}
        files.append({**file, "sha256": storage.sha256(data), "rejected": counts})
    summary = publish._summary(plan, files, {})
    rejected_csv.write(plan, is_empty=not summary["rejected"])
    storage.write_whole(storage.join(out, "summary.json"), sealed(summary))
