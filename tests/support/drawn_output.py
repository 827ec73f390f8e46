"""An output of `segment` of any size without network or Ray: a few drawn frames, labelled again and again.

Every row has a real mask and the numbers of it; confidences and changes are drawn. The frames lie in one tar, so that a
million of them need no more files than forty. What is published is what `segment` publishes: `verify` finds it whole.

    python tests/support/drawn_output.py OUT 1000000     # a million frames of 200 drives: 5 minutes, 1.5 GB
    /usr/bin/time -v unet-ray report OUT/labels
"""

from __future__ import annotations

import io
import json
import sys
import tarfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from unet_ray import storage
from unet_ray.archives.listing import list_archives
from unet_ray.classes import PRESETS
from unet_ray.demo import synthetic
from unet_ray.frames import Listing
from unet_ray.output import plans, publish, rejected_csv
from unet_ray.output import rows as results
from unet_ray.output.chunks import Cutting
from unet_ray.output.columns import fields
from unet_ray.output.ledger import shard_name
from unet_ray.pixels.mask_png import encode_mask_png
from unet_ray.storage.sealed import sealed

CLASSES = PRESETS["carla23"]
N_DRAWN = 40
ODD_DRIVE = 3
"""This one and every 50th behind it has frames of one kind alone, so that its shares are unlike the others'."""

_REASONS = ("truncated", "not_an_image", "too_large")


@dataclass(frozen=True, kw_only=True, eq=False)
class _Drawn:
    """The frames that all rows are made of, T of them."""

    listed: pa.Table
    masks: pa.Array
    pixels_TK: np.ndarray
    size: tuple[int, int]


def draw_output(
    folder: str,
    n_frames: int,
    *,
    n_drives: int = 200,
    n_cameras: int = 2,
    size: tuple[int, int] = (96, 128),
    shard_rows: int = 50_000,
    group_rows: int = publish.GROUP_ROWS,
    rejected_share: float = 0.001,
    config_yaml: str = "frames: [drives]\n",
) -> str:
    """Writes `frames.tar` and the output `labels` below a folder and returns the output's URI.

    Args:
        folder: where.
        n_frames: in all, at least one a drive.
        n_drives: pairs of a sequence and a camera.
        n_cameras: of each sequence.
        size: height and width of frames and masks, px.
        shard_rows: rows of a file of `frames/`.
        group_rows: rows of a row group of it.
        rejected_share: of the frames.
        config_yaml: what the output's `config.yaml` holds.
    """
    drawn = _draw(folder, size)
    out, rng = storage.join(folder, "labels"), np.random.default_rng(7)
    others_N = rng.integers(0, n_drives, n_frames - n_drives)
    drive_N = np.sort(np.concatenate([np.arange(n_drives), others_N]))  # each drive has a frame
    kind_N = (np.arange(n_frames) // 5 + 7 * drive_N) % N_DRAWN
    kind_N[drive_N % 50 == ODD_DRIVE] = 0
    listing = _listing(drawn, drive_N, kind_N, n_cameras)
    lineage = plans.Lineage(bundle_digest="cd" * 32, class_set=CLASSES, options={"mask_encoding": "png"})
    cutting = Cutting(chunk_frames=96, shard_rows=shard_rows)
    plan = plans.plan(out, listing, lineage, cutting, config_yaml=config_yaml, recorded={"unet-ray": "0.1.0"})
    files, start = [], 0
    for shard, chunks in sorted(plan.of_shard.items()):
        n_rows = sum(chunk.n_rows for chunk in chunks)
        rows = listing.table.slice(start, n_rows)
        reasons = np.where(rng.random(n_rows) < rejected_share, rng.choice(_REASONS, n_rows), None)
        table = _rows(rows, kind_N[start : start + n_rows], reasons.tolist(), drawn, rng)
        files.append(_write_shard(plan, shard, table, group_rows))
        start += n_rows
    _finish(plan, files)
    return out


def _finish(plan: plans.Plan, files: list[dict]) -> None:
    """Writes what `publish` writes behind the files of `frames/`."""
    summary = publish._summary(plan, files, {})
    rejected_csv.write(plan, is_empty=not summary["rejected"])
    storage.write_whole(storage.join(plan.out, "summary.json"), sealed(summary))
    storage.delete_tree(storage.join(plan.out, "_work"))


def _draw(folder: str, size: tuple[int, int]) -> _Drawn:
    masks, pixels = [], []
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        for kind in range(N_DRAWN):
            frame_HWC, mask_HW = synthetic.draw_frame(1, kind, 3 * kind, height_px=size[0], width_px=size[1])
            jpeg = io.BytesIO()
            Image.fromarray(frame_HWC).save(jpeg, "JPEG", quality=90)
            member = tarfile.TarInfo(f"{kind:03d}.jpg")
            member.size = len(jpeg.getvalue())
            tar.addfile(member, io.BytesIO(jpeg.getvalue()))
            masks.append(encode_mask_png(mask_HW.astype(np.uint8), CLASSES.palette_K3))
            pixels.append(np.bincount(mask_HW.ravel(), minlength=CLASSES.n_classes))
    uri = storage.join(folder, "frames.tar")
    storage.write_whole(uri, packed.getvalue())
    listed = list_archives([uri]).table
    return _Drawn(listed=listed, masks=pa.array(masks, pa.binary()), pixels_TK=np.stack(pixels), size=size)


def _listing(drawn: _Drawn, drive_N: np.ndarray, kind_N: np.ndarray, n_cameras: int) -> Listing:
    """The same frames under many names, in the order of drives."""
    _, first = np.unique(drive_N, return_index=True)
    index_N = np.arange(len(drive_N)) - first[np.searchsorted(np.unique(drive_N), drive_N)]
    sequences = [f"drive{drive // n_cameras:05d}" for drive in drive_N.tolist()]
    cameras = [f"cam{drive % n_cameras}" for drive in drive_N.tolist()]
    ids = [f"{s}/{c}/{index:07d}.jpg" for s, c, index in zip(sequences, cameras, index_N.tolist(), strict=True)]
    table = drawn.listed.take(pa.array(kind_N))
    columns = {"frame_id": pa.array(ids), "sequence": pa.array(sequences), "camera": pa.array(cameras)}
    columns["frame_index"] = pa.array(index_N, pa.int64())
    for name, column in columns.items():
        table = table.set_column(table.column_names.index(name), name, column)
    return Listing(table=table)


def _rows(
    listed: pa.Table, kind_N: np.ndarray, reasons: list[str | None], drawn: _Drawn, rng: np.random.Generator
) -> pa.Table:
    """Rows of `frames/`, as `rows.result_table` makes them of a chunk."""
    n_rows, ok_N = len(listed), np.array([reason is None for reason in reasons])
    confidence_N = 0.97 - 0.2 * rng.random(n_rows) ** 3 - 0.05 * (kind_N % 4 == 1)
    pixels_NK = drawn.pixels_TK[kind_N]
    by_name = {
        "height_px": np.full(n_rows, drawn.size[0]),
        "width_px": np.full(n_rows, drawn.size[1]),
        "confidence": confidence_N,
        "expected_error_share": 1 - confidence_N,
        "low_margin_share": (1 - confidence_N) * 1.5,
        "changed_share": np.where(np.arange(n_rows) % 5, 0.02, 0.3) * rng.random(n_rows),
    }
    for k, name in enumerate(CLASSES.names):
        by_name[f"pixels_{name}"] = pixels_NK[:, k]
        by_name[f"confidence_{name}"] = np.where(pixels_NK[:, k] > 0, confidence_N, np.nan)
        by_name[f"changed_share_{name}"] = np.where(pixels_NK[:, k] > 0, by_name["changed_share"], np.nan)
    texts = {
        "content_digest": ["0" * 16] * n_rows,
        "status": np.where(ok_N, "ok", "rejected").tolist(),
        "reason": reasons,
        "error": [None if reason is None else f"it is {reason}" for reason in reasons],
        "mask_encoding": np.where(ok_N, "png", None).tolist(),
    }
    arrays = []
    for column, name in fields(CLASSES.names, results.RESULT_VERSION):
        if name == "mask":
            arrays.append(drawn.masks.take(pa.array(kind_N, mask=~ok_N)))
        elif name in ("mask_height_px", "mask_width_px"):
            side = drawn.size[name == "mask_width_px"]
            arrays.append(pa.array(np.full(n_rows, side), column.type, mask=~ok_N))
        elif name in by_name:
            is_size = name in ("height_px", "width_px")
            missing = np.isnan(by_name[name].astype(float)) | (~ok_N & (not is_size))
            arrays.append(pa.array(by_name[name], column.type, mask=missing))
        else:
            arrays.append(pa.array(texts[name], column.type) if name in texts else listed[name].combine_chunks())
    return pa.Table.from_arrays(arrays, schema=results.frames_schema(CLASSES))


def _write_shard(plan: plans.Plan, shard: int, table: pa.Table, group_rows: int) -> dict:
    """Writes one file of `frames/` with the row groups and pages of `publish`; returns what summary.json says of it."""
    buffer = io.BytesIO()
    pq.write_table(
        table.replace_schema_metadata(publish._footer(plan.lineage)),
        buffer,
        row_group_size=group_rows,
        compression={name: "none" if name == "mask" else "zstd" for name in table.column_names},
        use_dictionary=[name for name in table.column_names if name != "mask"],
        write_statistics=[name for name in table.column_names if name not in publish._WITHOUT_STATISTICS],
        write_batch_size=publish._PAGE_ROWS,
        write_page_checksum=True,
    )
    data, path = buffer.getvalue(), f"frames/{shard_name(shard)}"
    storage.write_whole(storage.join(plan.out, path), data)
    counts = Counter(reason for reason in table["reason"].to_pylist() if reason)
    file = {"path": path, "key": plan.shard_key[shard], "rows": len(table), "bytes": len(data)}
    return {**file, "sha256": storage.sha256(data), "rejected": dict(sorted(counts.items()))}


if __name__ == "__main__":
    Path(sys.argv[1]).mkdir(parents=True)
    more = json.loads(sys.argv[3]) if len(sys.argv) > 3 else {}
    print(draw_output(str(Path(sys.argv[1]).resolve()), int(sys.argv[2]), **more))
