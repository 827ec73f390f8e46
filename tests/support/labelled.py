"""An output without network or Ray: a small archive, labels that follow from each frame's id, and the whole job."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np
import pyarrow as pa

from unet_ray import storage
from unet_ray.archives.listing import list_archives
from unet_ray.classes import ClassSet, SegmentationClass
from unet_ray.digests import content_digest
from unet_ray.output import ledger, manifest, plans, publish, salvage
from unet_ray.output import rows as results
from unet_ray.output.chunks import Chunk, Cutting
from unet_ray.output.records import commit

CLASSES = ClassSet(
    name="two",
    classes=(
        SegmentationClass(name="road", color=(128, 64, 128), values=(0,)),
        SegmentationClass(name="sky", color=(70, 130, 180), values=(1,)),
    ),
)
LINEAGE = plans.Lineage(bundle_digest="ab" * 32, class_set=CLASSES, options={"mask_size": "model", "window": None})
CUTTING = Cutting(chunk_frames=3, shard_rows=5)
DRIVES = {"a": 5, "b": 7, "c": 1}


def write_archive(root: Path, drives: dict[str, int] = DRIVES) -> str:
    for drive, n_frames in drives.items():
        (root / drive).mkdir(parents=True, exist_ok=True)
        for number in range(n_frames):
            path = root / drive / f"{number}.png"
            path.write_bytes(f"{drive}{number}".encode())
            os.utime(path, ns=(0, 10**9 * number))  # the version is part of the key
    return str(root)


def label(chunk: Chunk, *, reject: tuple[str, ...] = ()) -> pa.Table:
    """Rows of a chunk: masks of 2 x 3 pixels that follow from the frame's id; frames in `reject` are truncated."""
    rows = manifest.read_rows(chunk)
    ids = rows["frame_id"].to_pylist()
    seeds = [int(hashlib.sha256(i.encode()).hexdigest(), 16) for i in ids]
    masks = [np.array([(seed >> bit) & 1 for bit in range(6)], np.uint8) for seed in seeds]
    bad = [i in reject for i in ids]
    sky = np.array([mask.sum() for mask in masks], np.int64)
    pixels_NK = np.stack([6 - sky, sky], axis=1)
    confidence_NK = np.where(pixels_NK > 0, np.float32(0.75), np.float32(np.nan)).astype(np.float32)
    labels = results.ChunkLabels(
        reason=["truncated" if b else None for b in bad],
        error=["ends early" if b else None for b in bad],
        height_px=[2] * len(ids),
        width_px=[3] * len(ids),
        content_digest=[content_digest(i.replace("/", "").removesuffix(".png").encode()) for i in ids],
        mask=[None if b else mask.tobytes() for mask, b in zip(masks, bad, strict=True)],
        mask_encoding="raw",
        mask_height_px=[2] * len(ids),
        mask_width_px=[3] * len(ids),
        grids=[None if b else mask.reshape(2, 3) for mask, b in zip(masks, bad, strict=True)]
        if chunk.rows is None
        else (),
        figures={
            "pixels_<class>": pixels_NK,
            "confidence_<class>": confidence_NK,
            "confidence": np.full(len(ids), 0.75, np.float32),
            "low_margin_share": np.zeros(len(ids), np.float32),
        },
    )
    return results.result_table(rows, labels, CLASSES)


def make_plan(root: str, out: str, **options) -> plans.Plan:
    lineage = options.pop("lineage", LINEAGE)
    return plans.plan(out, list_archives([root]), lineage, CUTTING, **{"config_yaml": "frames: log\n", **options})


def run(root: str, out: str, *, reject: tuple[str, ...] = (), max_rejected: float = 1.0, seen=None) -> dict:
    """The whole job, as `segment` does it; `seen` collects the chunks that were labelled."""
    plan = make_plan(root, out)
    salvage.look_after_damage(plan)
    for chunk in ledger.pending(plan):
        commit(out, chunk, label(chunk, reject=reject), writer="test")
        if seen is not None:
            seen.append(chunk.chunk_id)
    return publish.publish(plan, max_rejected=max_rejected)


def published(out: str) -> dict[str, bytes]:
    return {file.path: storage.read_bytes(file.uri) for file in storage.list_files(out)}
