"""Masks laid over their frames, and such pictures as a notebook shows them; light: no matplotlib.

Shapes: `H` height px, `W` width px, `C` colour (red, green, blue).
"""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

from unet_ray.classes import IGNORED_ID, ClassSet, Color
from unet_ray.pixels.images import resize_nearest

MASK_SHARE = 0.55
"""Of a class's colour in a pixel; the rest is the frame's."""

_SHOWN_PX = 1024
"""Longer side of a picture in a notebook, at most."""

_CELL_PX, _GAP_PX = 240, 4


def overlay(frame_HWC: np.ndarray, mask_HW: np.ndarray, class_set: ClassSet) -> np.ndarray:
    """A frame, uint8 [H, W, 3], with a mask over it, uint8 [H, W, 3]; ignored pixels show the frame alone.

    A mask of another size is brought to the frame's by nearest neighbour.
    """
    mask_HW = resize_nearest(mask_HW, *frame_HWC.shape[:2])
    mixed = frame_HWC * (1 - MASK_SHARE) + class_set.colorize(mask_HW) * MASK_SHARE
    return np.where((mask_HW == IGNORED_ID)[..., None], frame_HWC, mixed.round().astype(np.uint8))


def png_to_show(image_HWC: np.ndarray) -> bytes:
    """A picture as a PNG for a notebook, scaled down where it is large."""
    image = Image.fromarray(image_HWC)
    image.thumbnail((_SHOWN_PX, _SHOWN_PX))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def sheet(pictures: Sequence[np.ndarray], n_columns: int = 4) -> np.ndarray:
    """Pictures, uint8 [H, W, 3] of any sizes, side by side in rows on white, each as wide as the others."""
    cells = [_of_width(picture, _CELL_PX) for picture in pictures]
    rows = [cells[start : start + n_columns] for start in range(0, len(cells), n_columns)]
    heights = [max(cell.shape[0] for cell in row) for row in rows]
    width_px = min(n_columns, len(cells)) * (_CELL_PX + _GAP_PX) - _GAP_PX
    whole = np.full((sum(heights) + _GAP_PX * (len(rows) - 1), width_px, 3), 255, np.uint8)
    top = 0
    for row, height_px in zip(rows, heights, strict=True):
        for column, cell in enumerate(row):
            left = column * (_CELL_PX + _GAP_PX)
            whole[top : top + cell.shape[0], left : left + _CELL_PX] = cell
        top += height_px + _GAP_PX
    return whole


def _of_width(picture_HWC: np.ndarray, width_px: int) -> np.ndarray:
    height_px = max(1, math.floor(picture_HWC.shape[0] * width_px / picture_HWC.shape[1] + 0.5))
    return np.asarray(Image.fromarray(picture_HWC).resize((width_px, height_px), Image.Resampling.BOX))


def figure_html(png: bytes, caption: str, legend: Sequence[tuple[str, Color]]) -> str:
    """A picture with its caption and a legend, as HTML that needs nothing else."""
    source = f"data:image/png;base64,{base64.b64encode(png).decode()}"
    entries = "".join(
        f'<span style="white-space:nowrap;margin-right:1em"><span style="color:rgb{color}">&#9632;</span> '
        f"{html.escape(name)}</span>"
        for name, color in legend
    )
    return (
        f'<figure style="margin:0"><img src="{source}" style="max-width:100%">'
        f"<figcaption>{html.escape(caption)}<br>{entries}</figcaption></figure>"
    )
