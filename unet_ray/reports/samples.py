"""Frames of an output with their masks, small enough for a page: of each one row of one row group is unpacked.

Shapes: `H` height px, `W` width px, `C` colour.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from unet_ray import storage
from unet_ray.archives.reading import read_frames
from unet_ray.classes import ClassSet
from unet_ray.drawing import overlays
from unet_ray.frames import Listing
from unet_ray.output import labels, manifest, masks, origins
from unet_ray.output.plans import Plan
from unet_ray.pixels import images
from unet_ray.pixels.mask_png import encode_mask_png

BOX_PX = (270, 360)
"""Height and width that a picture fits into."""

_BATCH_ROWS = 64
_BUFFER_BYTES = 2**20
_SIZES = ((1.0, 82), (1.0, 65), (0.8, 65), (0.6, 60), (0.4, 50))
"""Scales and JPEG qualities that are tried until a picture is small enough."""

_MAX_PIXELS = 200_000_000


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A frame as the page shows it: `data:` URIs of JPEG or PNG."""

    row: int
    frame_id: str
    sequence: str
    camera: str
    frame: str | None
    """None where it is not shown."""
    overlay: str
    """The mask over the frame, or the mask alone."""
    note: str
    """Why the frame is not shown; empty where it is."""
    height_px: int
    width_px: int
    """Of the pictures as they are laid out."""


class Sources:
    """The frames where the manifest says that they lie; after the first trouble no other is asked for."""

    def __init__(self, plan: Plan, listing: Listing | None, *, are_read: bool) -> None:
        """Reads frames of a plan.

        Args:
            plan: of the output.
            listing: what was listed just now; other files are not opened. None: the manifest is believed.
            are_read: False: no frame is read.
        """
        self._plan, self._listing, self._are_read = plan, listing, are_read
        self._starts = np.cumsum([0, *(chunk.n_rows for chunk in plan.chunks)])
        self._trouble = False

    def frame(self, row: int) -> tuple[np.ndarray | None, str]:
        """Returns a frame, uint8 [H, W, C], or None and why there is none."""
        if not self._are_read:
            return None, "frames are not read (--no-sources)"
        if self._trouble:
            return None, "the frames cannot be reached now"
        number = int(np.searchsorted(self._starts, row, side="right")) - 1
        rows = manifest.read_rows(self._plan.chunks[number]).slice(row - int(self._starts[number]), 1)
        rows = origins.relocate(rows, self._plan.origin.moved)
        if self._listing is not None and not origins.are_own(rows, self._listing)[0].as_py():
            return None, "the frame lies outside --frames"
        try:
            content = next(read_frames(rows))
        except storage.StorageError:
            self._trouble = True
            return None, "the frames cannot be reached now"
        if not isinstance(content, bytes):
            return None, "the frame has gone" if content.reason == "missing" else "the frame has changed"
        try:
            return images.decode_frame(content, max_pixels=_MAX_PIXELS), ""
        except images.ImageRefused:
            return None, "the frame cannot be decoded"


def read_samples(
    rows: Iterable[int],
    group_rows: Sequence[tuple[str, Sequence[int]]],
    sources: Sources,
    class_set: ClassSet,
    *,
    picture_bytes: int,
) -> dict[int, Sample]:
    """Returns the frames of some rows by row.

    Args:
        rows: places among all rows of the output.
        group_rows: each file of `frames/` and the rows of its row groups.
        sources: where frames come from.
        class_set: gives the colours.
        picture_bytes: about the most that one picture may take.

    Raises:
        JobFailed: a file of the output is damaged.
        StorageError: the output could not be read.
    """
    samples = {}
    for row, label in _labels(sorted(set(rows)), group_rows):
        frame_HWC, note = sources.frame(row)
        samples[row] = _sample(row, label, frame_HWC, note, class_set, picture_bytes)
    return samples


def _labels(
    rows: Sequence[int], group_rows: Sequence[tuple[str, Sequence[int]]]
) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Yields rows of `frames/` with their masks; of each row group only as much as they need is unpacked."""
    start = 0
    for uri, sizes in group_rows:
        ends = start + np.cumsum(sizes, dtype=np.int64)
        wanted: dict[int, list[int]] = {}
        for row in rows:
            if start <= row < (ends[-1] if len(ends) else start):
                group = int(np.searchsorted(ends, row, side="right"))
                wanted.setdefault(group, []).append(row)
        for group, of_group in wanted.items():
            first = int(ends[group]) - sizes[group]
            yield from zip(of_group, _read_rows(uri, group, [row - first for row in of_group]), strict=True)
        start = int(ends[-1]) if len(ends) else start


def _read_rows(uri: str, group: int, rows: Sequence[int]) -> list[dict[str, Any]]:
    """Returns rows of one row group, which are in order; a page of masks is unpacked at a time."""
    columns = ["frame_id", "sequence", "camera", *masks.MASK_COLUMNS]
    chosen: list[dict[str, Any]] = []
    start = 0
    with labels.opened(uri, buffer_size=_BUFFER_BYTES, pre_buffer=False) as file:
        for batch in file.iter_batches(_BATCH_ROWS, row_groups=[group], columns=columns):
            inside = [row - start for row in rows if start <= row < start + len(batch)]
            chosen += batch.take(pa.array(inside, pa.int64())).to_pylist() if inside else []
            start += len(batch)
            if start > rows[-1]:
                break
    return chosen


def _sample(
    row: int, label: Mapping[str, Any], frame_HWC: np.ndarray | None, note: str, class_set: ClassSet, limit: int
) -> Sample:
    mask_HW = masks.mask_of(label)
    height_px, width_px = _fitted(mask_HW.shape if frame_HWC is None else frame_HWC.shape)
    if frame_HWC is None:
        small_HW = images.resize_nearest(mask_HW, height_px, width_px)
        frame, overlay = None, data_uri(encode_mask_png(small_HW, class_set.palette_K3))
    else:
        small_HWC = _reduced(frame_HWC, height_px, width_px)
        frame = _jpeg(small_HWC, limit)
        overlay = _jpeg(overlays.overlay(small_HWC, mask_HW, class_set), limit)
    return Sample(
        row=row,
        frame_id=label["frame_id"],
        sequence=label["sequence"],
        camera=label["camera"],
        frame=frame,
        overlay=overlay,
        note=note,
        height_px=height_px,
        width_px=width_px,
    )


def _fitted(shape: tuple[int, ...]) -> tuple[int, int]:
    scale = min(BOX_PX[0] / shape[0], BOX_PX[1] / shape[1])
    return max(1, round(shape[0] * scale)), max(1, round(shape[1] * scale))


def _reduced(frame_HWC: np.ndarray, height_px: int, width_px: int) -> np.ndarray:
    filtering = Image.Resampling.BOX if height_px < frame_HWC.shape[0] else Image.Resampling.BILINEAR
    return np.asarray(Image.fromarray(frame_HWC).resize((width_px, height_px), filtering))


def _jpeg(image_HWC: np.ndarray, limit: int) -> str:
    """Returns a picture as a `data:` URI of a JPEG within the limit, or the smallest that is tried."""
    data = b""
    for scale, quality in _SIZES:
        size = [max(1, round(side * scale)) for side in image_HWC.shape[1::-1]]
        image = Image.fromarray(image_HWC)
        image = image if scale == 1 else image.resize((size[0], size[1]), Image.Resampling.BOX)
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=quality, optimize=True, subsampling=0)  # edges of classes keep their colours
        data = buffer.getvalue()
        if len(data) <= limit:
            break
    return data_uri(data)


def data_uri(data: bytes) -> str:
    """Returns a PNG or a JPEG as the URI that holds it."""
    kind = "png" if data.startswith(b"\x89PNG") else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
