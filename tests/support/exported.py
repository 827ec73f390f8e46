"""An output to export, without network or Ray: frames of uneven sizes in a folder, a tar, a zip and Parquet files."""

from __future__ import annotations

import io
import tarfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from unet_ray.archives.listing import list_archives
from unet_ray.archives.reading import read_frames
from unet_ray.classes import ClassSet, SegmentationClass
from unet_ray.digests import content_digest
from unet_ray.output import ledger, manifest, plans, publish
from unet_ray.output import rows as results
from unet_ray.output.chunks import Chunk, Cutting
from unet_ray.output.records import commit
from unet_ray.pixels.mask_png import encode_mask_png

CLASS_SET = ClassSet(
    name="three",
    classes=(
        SegmentationClass(name="road", color=(128, 64, 128), values=(1,)),
        SegmentationClass(name="sky", color=(70, 130, 180), values=(2,)),
        SegmentationClass(name="pedestrian", color=(220, 20, 60), values=(3,)),
    ),
)
LINEAGE = plans.Lineage(bundle_digest="ab" * 32, class_set=CLASS_SET, options={"mask_size": "native"})
MODEL_LINEAGE = plans.Lineage(bundle_digest="ab" * 32, class_set=CLASS_SET, options={"mask_size": "model"})
MODEL_SIZE = (8, 12)

FRAMES = {
    "a/0.png": (20, 30),
    "a/1.PNG": (18, 24),
    "a/frame.0002.jpg": (21, 33),
    "b.tar!cam0/0.jpg": (16, 40),
    "b.tar!cam0/1.png": (24, 36),
    "c.zip!#2.webp": (20, 28),
    "d.parquet!000000": (26, 26),
    "d.parquet!000001": (15, 50),
}
"""Heights and widths."""
REJECTED = ("a/9.png",)
PEDESTRIANS = tuple(frame_id for frame_id in FRAMES if zlib.crc32(frame_id.encode()) % 2)
"""Frames whose mask has class 2."""

_FORMATS = {"jpg": "JPEG", "webp": "WEBP", "000000": "JPEG", "000001": "PNG"}


def frame_bytes(frame_id: str, size: tuple[int, int]) -> bytes:
    rng = np.random.default_rng(zlib.crc32(frame_id.encode()))
    buffer = io.BytesIO()
    pixels = rng.integers(0, 256, (*size, 3), np.uint8)
    Image.fromarray(pixels).save(buffer, _FORMATS.get(frame_id.rpartition(".")[2].rpartition("!")[2], "PNG"))
    return buffer.getvalue()


def mask_of(frame_id: str, size: tuple[int, int] | None = None) -> np.ndarray:
    """Bands of the classes 0 and 1, in some frames a box of class 2."""
    height_px, width_px = size or FRAMES[frame_id]
    mask = np.zeros((height_px, width_px), np.uint8)
    mask[: height_px // 3] = 1
    if frame_id in PEDESTRIANS:
        mask[height_px // 2 :, width_px // 4 : width_px // 3] = 2
    return mask


def write_archives(root: Path) -> str:
    """Writes the frames, and one that will be rejected; returns the folder."""
    contents = {frame_id: frame_bytes(frame_id, size) for frame_id, size in FRAMES.items()}
    (root / "a").mkdir(parents=True)
    for frame_id in REJECTED:
        (root / frame_id).write_bytes(b"no image")
    rows = []
    with tarfile.open(root / "b.tar", "w") as tar, zipfile.ZipFile(root / "c.zip", "w") as archive:
        for frame_id, data in contents.items():
            drive, _, member = frame_id.partition("!")
            if drive == "b.tar":
                info = tarfile.TarInfo(member)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
            elif drive == "c.zip":
                archive.writestr(member, data)
            elif drive == "d.parquet":
                rows.append(data)
            else:
                (root / frame_id).write_bytes(data)
    pq.write_table(pa.table({"image": pa.array(rows, pa.binary())}), root / "d.parquet")
    return str(root)


def label(chunk: Chunk, lineage: plans.Lineage, mask_encoding: str) -> pa.Table:
    rows = manifest.read_rows(chunk)
    ids, contents = rows["frame_id"].to_pylist(), list(read_frames(rows))
    bad = [frame_id in REJECTED for frame_id in ids]
    sizes = [FRAMES.get(frame_id, (4, 5)) for frame_id in ids]
    mask_sizes = [MODEL_SIZE if lineage == MODEL_LINEAGE else size for size in sizes]
    masks = [mask_of(frame_id, size) for frame_id, size in zip(ids, mask_sizes, strict=True)]
    is_png = mask_encoding == "png"
    encoded = [encode_mask_png(mask, CLASS_SET.palette_K3) if is_png else mask.tobytes() for mask in masks]
    pixels_NK = np.stack([np.bincount(mask.ravel(), minlength=3) for mask in masks])
    labels = results.ChunkLabels(
        reason=["not_an_image" if b else None for b in bad],
        error=["it is none" if b else None for b in bad],
        height_px=[None if b else size[0] for b, size in zip(bad, sizes, strict=True)],
        width_px=[None if b else size[1] for b, size in zip(bad, sizes, strict=True)],
        content_digest=[content_digest(content) for content in contents],
        mask=[None if b else data for b, data in zip(bad, encoded, strict=True)],
        mask_encoding=mask_encoding,
        mask_height_px=[size[0] for size in mask_sizes],
        mask_width_px=[size[1] for size in mask_sizes],
        grids=[None if b else mask for b, mask in zip(bad, masks, strict=True)],
        figures={
            "pixels_<class>": pixels_NK,
            "confidence_<class>": np.where(pixels_NK > 0, np.float32(0.75), np.float32(np.nan)).astype(np.float32),
            "confidence": np.linspace(0.5, 0.75, len(ids), dtype=np.float32),
            "low_margin_share": np.zeros(len(ids), np.float32),
        },
    )
    return results.result_table(rows, labels, CLASS_SET)


def segment(
    root: str, out: str, *, lineage: plans.Lineage = LINEAGE, mask_encoding: str = "png", n_chunks: int | None = None
) -> None:
    """The whole job on an archive, or the first chunks of it."""
    cutting = Cutting(chunk_frames=3, shard_rows=4)
    plan = plans.plan(out, list_archives([root]), lineage, cutting, config_yaml="frames: log\n")
    for chunk in ledger.pending(plan)[:n_chunks]:
        commit(out, chunk, label(chunk, lineage, mask_encoding), writer="test")
    if n_chunks is None:
        publish.publish(plan, max_rejected=1.0)


def bare(frame_id: str) -> str:
    """The frame's name in lists, by hand."""
    return frame_id if "parquet" in frame_id else frame_id.rpartition(".")[0]


def frame_name(frame_id: str) -> str:
    """The frame's file, by hand: a Parquet row's extension is that of its content."""
    return frame_id + {"d.parquet!000000": ".jpg", "d.parquet!000001": ".png"}.get(frame_id, "")
