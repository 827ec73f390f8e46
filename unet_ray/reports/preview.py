"""A dozen frames of a published output with their masks over them, spread over drives and confidences: `preview.png`.

Shapes: `H` height px, `W` width px, `C` colour.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

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
    # A file is open while it is read and no longer: there may be more of them than a process may open.
    rows_of = {storage.join(plan.out, file["path"]): file["rows"] for _, file in sorted(published.items())}
    samples = list(_read_samples(plan, listing, rows_of, choose_rows(*_confidences(rows_of))))
    if not samples:
        return None
    frames_HWC, masks_HW, captions = zip(*samples, strict=True)
    png = pictures.draw_preview(list(frames_HWC), list(masks_HW), list(captions), plan.lineage.class_set)
    uri = storage.join(plan.out, "preview.png")
    storage.write_whole(uri, png)
    return uri


def _confidences(uris: Iterable[str]) -> tuple[np.ndarray, np.ndarray]:
    """Returns, for every frame in the manifest's order, a number of its drive and its confidence (NaN: rejected)."""
    columns, tables = ["sequence", "camera", "status", "confidence"], []
    for uri in uris:
        with labels.opened(uri) as file:
            tables.append(file.read(columns=columns))
    table = pa.concat_tables(tables).combine_chunks()
    codes = [table[name].combine_chunks().dictionary_encode().indices.to_numpy() for name in ("sequence", "camera")]
    drives = codes[0].astype(np.int64) * (codes[1].max(initial=0) + 1) + codes[1]
    confidence = pc.if_else(pc.equal(table["status"], "ok"), pc.fill_null(table["confidence"], 0), None)
    return drives, confidence.to_numpy(zero_copy_only=False).astype(np.float64)


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
    plan: Plan, listing: Listing, rows_of: Mapping[str, int], places: list[int]
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
        label = _read_row(rows_of, index)
        frame_HWC = images.decode_frame(content, max_pixels=10**9)
        confidence = "" if label["confidence"] is None else f"  {label['confidence']:.2f}"
        yield frame_HWC, masks.mask_of(label), label["frame_id"] + confidence


def _read_row(rows_of: Mapping[str, int], index: int) -> dict:
    """Reads one row of `frames/` by its place, and of its file one row group."""
    columns = ["frame_id", "confidence", *masks.MASK_COLUMNS]
    starts = np.cumsum([0, *rows_of.values()])
    number = int(np.searchsorted(starts, index, side="right")) - 1
    index -= int(starts[number])
    with labels.opened(list(rows_of)[number]) as file:
        for group in range(file.num_row_groups):
            n_rows = file.metadata.row_group(group).num_rows
            if index < n_rows:
                return file.read_row_group(group, columns=columns).slice(index, 1).to_pylist()[0]
            index -= n_rows
    raise AssertionError(f"no row {index}")
