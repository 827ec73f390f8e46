"""What every format writes from: the labels that were chosen, a few rows at a time, and what each frame is called."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from unet_ray.classes import ClassSet
from unet_ray.output.exports.frames import Written
from unet_ray.output.exports.selection import Selection
from unet_ray.output.exports.targets import Target
from unet_ray.output.masks import MASK_COLUMNS, mask_of
from unet_ray.pixels import images
from unet_ray.pixels.mask_png import encode_mask_png
from unet_ray.progress import Progress

FRAME_SIZE = ("height_px", "width_px")
FRAME_MASK_COLUMNS = (*MASK_COLUMNS, *FRAME_SIZE)
"""What `frame_mask` looks at."""


@dataclass(frozen=True, kw_only=True)
class Export:
    """The chosen labels of an output."""

    selection: Selection
    class_set: ClassSet
    n_labelled: int
    file_name: str
    """Of `--out`, for a format that is one file."""
    written: Written | None
    """The frames that were written; None where they were not asked for."""

    @property
    def with_frames(self) -> bool:
        """Whether frames were asked for."""
        return self.written is not None

    def rows(self, columns: Sequence[str], progress: Progress | None = None) -> Iterator[list[dict[str, Any]]]:
        """Yields the labels that are exported, in the manifest's order, a few at a time.

        A row has these columns, and as `ending` what its frame's name got beside the id; None without frames.
        """
        number = 0
        for rows in self.selection.labelled(columns):
            exported = []
            for row in rows:
                ending = None if self.written is None else self.written.ending(number)
                number += 1
                if self.written is None or ending is not None:
                    exported.append({**row, "ending": ending})
            yield exported
            if progress is not None:
                progress.advance(len(rows))

    def write_masks(
        self, target: Target, path_of: Callable[[str], str], encode: Callable[[Mapping[str, Any]], bytes]
    ) -> None:
        """Writes a file for each label; `encode` takes a row with `FRAME_MASK_COLUMNS`."""
        progress = Progress(self.n_labelled, "masks")
        for rows in self.rows(("frame_id", *FRAME_MASK_COLUMNS), progress):
            target.write([(path_of(row["frame_id"]), encode(row)) for row in rows])
        progress.finish()


@dataclass(frozen=True, kw_only=True)
class Format:
    """A format: what it writes, and where."""

    write: Callable[[Export, Target], None]
    """Writes all but the frames."""
    mask_path: Callable[[str, bool], str] | None
    """A frame's id, and whether frames are written too, to the path of its mask; None: all masks lie in one file."""
    frame_path: Callable[[str, str, str], str]
    """A frame's id, its ending (`frames.candidates`) and the name of `--out` to the path of the frame."""
    list_path: str | None = None
    """The file that is written last and lists the others, which a reader goes by."""
    listed: Callable[[str], str] | None = None
    """A line of that list to the path of its mask, where there is a reader that goes by the folders instead."""
    needs_files: bool = False
    """Whether its reader opens the frames by itself, so that without `--with-frames` each is to be a file."""


def frame_mask(row: Mapping[str, Any]) -> np.ndarray:
    """Returns a row's mask in its frame's size, uint8 [H, W]: of `--mask-size model` each pixel is that of the nearest.

    A label that was kept from damage has no frame's size: its mask comes as it is.
    """
    mask_HW = mask_of(row)
    size = row["height_px"], row["width_px"]
    return mask_HW if None in size else images.resize_nearest(mask_HW, *size)


def frame_png(row: Mapping[str, Any], palette_K3: np.ndarray) -> bytes:
    """Returns `frame_mask` as a palette PNG, pixel = class id."""
    size, mask_size = ((row[f"{of}height_px"], row[f"{of}width_px"]) for of in ("", "mask_"))
    if row["mask_encoding"] == "png" and (None in size or size == mask_size):
        return row["mask"]
    return encode_mask_png(frame_mask(row), palette_K3)
