"""The frames of a published output that are worth a look, each beside itself with its mask over it: `preview.png`.

Shapes: `H` height px, `W` width px, `C` colour, `K` classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from unet_ray import storage
from unet_ray.archives.reading import read_frames
from unet_ray.classes import ClassSet
from unet_ray.drawing import pictures
from unet_ray.frames import Listing
from unet_ray.output import labels, ledger, manifest, masks, origins
from unet_ray.output.plans import Plan
from unet_ray.pixels import images
from unet_ray.reports.interest import Choice, choose_frames, read_interest

N_FRAMES = 8


@dataclass(frozen=True, kw_only=True, eq=False)
class Sample:
    """A frame to show."""

    frame_HWC: np.ndarray
    mask_HW: np.ndarray
    frame_id: str
    reason: str
    """Why it is shown."""
    mark: pictures.Box | None
    """What to look at in it, in parts of its height and width."""


def write_preview(plan: Plan, listing: Listing) -> str | None:
    """Writes `preview.png` of a published output and returns its URI; None where no chosen frame can be shown.

    Args:
        plan: of the output.
        listing: of its archives; other files that the plan may name are not opened.
    """
    published = ledger.published_shards(plan)
    # A file is open while it is read and no longer: there may be more of them than a process may open.
    rows_of = {storage.join(plan.out, file["path"]): file["rows"] for _, file in sorted(published.items())}
    class_set = plan.lineage.class_set
    interest = read_interest(rows_of, _class_pixels(plan.out, class_set), class_set)
    samples = list(_read_samples(plan, listing, rows_of, choose_frames(interest, class_set.names, N_FRAMES)))
    if not samples:
        return None
    png = pictures.draw_preview(
        [sample.frame_HWC for sample in samples],
        [sample.mask_HW for sample in samples],
        [sample.frame_id for sample in samples],
        class_set,
        reasons=[sample.reason for sample in samples],
        marks=[sample.mark for sample in samples],
    )
    uri = storage.join(plan.out, "preview.png")
    storage.write_whole(uri, png)
    return uri


def _class_pixels(out: str, class_set: ClassSet) -> np.ndarray:
    """Pixels of each class in all labelled frames, int64 [K]."""
    pixels = dict.fromkeys(class_set.names, 0)
    for rows in labels.read_columns(out, ledger.STATISTICS, ["class_name", "pixels"]):
        for name, n_pixels in zip(rows["class_name"].to_pylist(), rows["pixels"].to_pylist(), strict=True):
            if name not in pixels or n_pixels is None:
                raise labels.damaged(out, ledger.STATISTICS)
            pixels[name] += n_pixels
    return np.array(list(pixels.values()), np.int64)


def _read_samples(
    plan: Plan, listing: Listing, rows_of: Mapping[str, int], choices: Sequence[Choice]
) -> Iterator[Sample]:
    """Yields the chosen frames with their masks; a frame that is no longer there is passed over."""
    starts = np.cumsum([0, *(chunk.n_rows for chunk in plan.chunks)])
    for choice in choices:
        number = int(np.searchsorted(starts, choice.row, side="right")) - 1
        row = manifest.read_rows(plan.chunks[number]).slice(choice.row - int(starts[number]), 1)
        row = origins.relocate(row, plan.origin.moved)
        content = next(read_frames(row)) if origins.are_own(row, listing)[0].as_py() else None
        if not isinstance(content, bytes):
            continue
        label = _read_row(rows_of, choice.row)
        mask_HW = masks.mask_of(label)
        yield Sample(
            frame_HWC=images.decode_frame(content, max_pixels=10**9),
            mask_HW=mask_HW,
            frame_id=label["frame_id"],
            reason=choice.reason,
            mark=None if choice.class_id is None else _box_of(mask_HW == choice.class_id),
        )


def _box_of(is_class_HW: np.ndarray) -> pictures.Box | None:
    """The box around all pixels of a class, in parts of the picture; None where it has none."""
    rows, columns = np.flatnonzero(is_class_HW.any(axis=1)), np.flatnonzero(is_class_HW.any(axis=0))
    if not len(rows):
        return None
    height_px, width_px = is_class_HW.shape
    return (
        rows[0] / height_px,
        columns[0] / width_px,
        (rows[-1] + 1) / height_px,
        (columns[-1] + 1) / width_px,
    )


def _read_row(rows_of: Mapping[str, int], index: int) -> dict:
    """Reads one row of `frames/` by its place, and of its file one row group."""
    starts = np.cumsum([0, *rows_of.values()])
    number = int(np.searchsorted(starts, index, side="right")) - 1
    index -= int(starts[number])
    with labels.opened(list(rows_of)[number]) as file:
        for group in range(file.num_row_groups):
            n_rows = file.metadata.row_group(group).num_rows
            if index < n_rows:
                columns = ["frame_id", *masks.MASK_COLUMNS]
                return file.read_row_group(group, columns=columns).slice(index, 1).to_pylist()[0]
            index -= n_rows
    raise AssertionError(f"no row {index}")
