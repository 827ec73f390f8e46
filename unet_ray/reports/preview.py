"""A dozen frames of a published output with their masks over them, spread over drives and confidences: `preview.png`.

Shapes: `H` height px, `W` width px, `C` colour.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from unet_ray import images, pictures, storage
from unet_ray.archives.reading import read_frames
from unet_ray.frames import Listing
from unet_ray.output import labels, ledger, manifest, masks, origins
from unet_ray.output.ledger import Plan

N_FRAMES = 12
_QUANTILES = (0.02, 0.35, 0.65, 0.98)


def write_preview(plan: Plan, listing: Listing) -> str | None:
    """Writes `preview.png` of a published output and returns its URI; None where no chosen frame can be shown.

    Args:
        plan: of the output.
        listing: of its archives; other files that the plan may name are not opened.
    """
    published = ledger.published_shards(plan)
    uris = [storage.join(plan.out, published[shard]["path"]) for shard in sorted(published)]
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(labels.opened(uri)) for uri in uris]
        samples = list(_read_samples(plan, listing, files, choose_rows(*_confidences(files))))
    if not samples:
        return None
    frames_HWC, masks_HW, captions = zip(*samples, strict=True)
    png = pictures.draw_preview(list(frames_HWC), list(masks_HW), list(captions), plan.lineage.class_set)
    uri = storage.join(plan.out, "preview.png")
    storage.write_whole(uri, png)
    return uri


def _confidences(files: Sequence[pq.ParquetFile]) -> tuple[np.ndarray, np.ndarray]:
    """Returns, for every frame in the manifest's order, a number of its drive and its confidence (NaN: rejected)."""
    columns = ["sequence", "camera", "confidence"]
    table = pa.concat_tables([file.read(columns=columns) for file in files]).combine_chunks()
    codes = [table[name].combine_chunks().dictionary_encode().indices.to_numpy() for name in ("sequence", "camera")]
    drives = codes[0].astype(np.int64) * (codes[1].max(initial=0) + 1) + codes[1]
    return drives, table["confidence"].to_numpy(zero_copy_only=False).astype(np.float64)


def choose_rows(drives_N: np.ndarray, confidence_N: np.ndarray, n_frames: int = N_FRAMES) -> list[int]:
    """Returns places of up to `n_frames` labelled frames: drives in turn, each at another quantile of confidence.

    Args:
        drives_N: a number of each frame's drive.
        confidence_N: its confidence, NaN where it is rejected.
        n_frames: how many.
    """
    labelled = np.flatnonzero(~np.isnan(confidence_N))
    if not len(labelled):
        return []
    drives = list(dict.fromkeys(drives_N[labelled].tolist()))
    chosen: list[int] = []
    for turn in range(n_frames):
        drive = drives[turn * len(drives) // n_frames] if len(drives) > n_frames else drives[turn % len(drives)]
        of_drive = labelled[drives_N[labelled] == drive]
        left = of_drive[~np.isin(of_drive, chosen)]
        if len(left):
            in_order = left[np.argsort(confidence_N[left], kind="stable")]
            chosen.append(int(in_order[round(_QUANTILES[turn % len(_QUANTILES)] * (len(in_order) - 1))]))
    return sorted(chosen)


def _read_samples(
    plan: Plan, listing: Listing, files: Sequence[pq.ParquetFile], places: list[int]
) -> Iterator[tuple[np.ndarray, np.ndarray, str]]:
    """Yields frame, mask and caption; a frame that is no longer there is passed over."""
    starts = np.cumsum([0, *(chunk.n_rows for chunk in plan.chunks)])
    for index in places:
        number = int(np.searchsorted(starts, index, side="right")) - 1
        row = manifest.read_rows(plan.chunks[number]).slice(index - int(starts[number]), 1)
        row = origins.relocate(row, plan.origin.moved)
        content = next(read_frames(row)) if origins.are_own(row, listing)[0].as_py() else None
        if not isinstance(content, bytes):
            continue
        label = _read_row(files, index)
        frame_HWC = images.decode_frame(content, max_pixels=10**9)
        yield frame_HWC, masks.mask_of(label), f"{label['frame_id']}  {label['confidence']:.2f}"


def _read_row(files: Sequence[pq.ParquetFile], index: int) -> dict:
    """Reads one row of `frames/` by its place, and of its file one row group."""
    columns = ["frame_id", "confidence", *masks.MASK_COLUMNS]
    for file in files:
        for group in range(file.num_row_groups):
            n_rows = file.metadata.row_group(group).num_rows
            if index < n_rows:
                return file.read_row_group(group, columns=columns).slice(index, 1).to_pylist()[0]
            index -= n_rows
    raise AssertionError(f"no row {index}")
