"""Pictures of what a job did, as PNG bytes: samples side by side, a preview of labels, and the charts.

Shapes: `H` height px, `W` width px, `C` colour (red, green, blue), `K` classes. Frames are uint8 [H, W, C], masks are
encoded, uint8 [H, W], and may have another size than their frame.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
from PIL import Image

from unet_ray.classes import IGNORED_ID, ClassSet, Color
from unet_ray.drawing.charts import draw_confusion, draw_curves
from unet_ray.drawing.overlays import overlay
from unet_ray.drawing.picture_grid import DPI, MARGIN_IN, Grid, Line, draw_grid
from unet_ray.pixels.images import count_values, resize_nearest

__all__ = ["Box", "draw_confusion", "draw_curves", "draw_preview", "draw_samples", "overlay"]

Box = tuple[float, float, float, float]
"""Top, left, bottom and right in parts of a picture's height and width."""

_TALLEST_IN = 2.9
"""Of a picture: the width of tall frames follows, so that they are not larger than others."""
_WIDEST_IN = 10.4
"""Of a row."""
_PAIR_GAP_IN = 0.25
_SAMPLE_COLUMNS = ("Input Image", "True Mask", "Predicted Mask")
_TITLE_IN = 1.5
"""Of a column, so that these do not touch."""


def draw_samples(
    frames: Sequence[np.ndarray],
    true_masks: Sequence[np.ndarray],
    predicted_masks: Sequence[np.ndarray],
    class_set: ClassSet,
    *,
    captions: Sequence[str] = (),
) -> bytes:
    """Input, true mask and predicted mask side by side, a row for each frame, with a legend of the classes shown.

    Args:
        frames: at least one; the picture of more than about eight is larger than 500 KB.
        true_masks: one for each frame; ignored pixels are black (white where a class is black).
        predicted_masks: one for each frame.
        class_set: gives names and colours.
        captions: one for each frame, or none.
    """
    assert frames and len(frames) == len(true_masks) == len(predicted_masks), "one mask of each kind for each frame"
    cells: list[np.ndarray] = []
    cell_in = _cell_size(frames, 3.1)
    for frame, true, predicted in zip(frames, true_masks, predicted_masks, strict=True):
        masks = (_colorized(_fitted_mask(mask, frame, cell_in), class_set) for mask in (true, predicted))
        cells += [_fitted_frame(frame, cell_in), *masks]
    gap_in = max(MARGIN_IN / 2, _TITLE_IN - cell_in[1])
    grid = Grid(cell_in=cell_in, gaps_in=(gap_in, gap_in), n_lines=1 if captions else 0, has_titles=True)
    lines = {3 * row: [Line(caption, True)] for row, caption in enumerate(captions)}
    legend = _present((*true_masks, *predicted_masks), class_set)
    return draw_grid(grid, cells, lines, legend, titles=_SAMPLE_COLUMNS)


def draw_preview(
    frames: Sequence[np.ndarray],
    masks: Sequence[np.ndarray],
    captions: Sequence[str],
    class_set: ClassSet,
    *,
    reasons: Sequence[str] = (),
    marks: Sequence[Box | None] = (),
) -> bytes:
    """Frames, each beside itself with its mask laid over it, with a legend of the classes shown.

    Args:
        frames: at least one, eight at most for a picture below 500 KB.
        masks: one for each frame; ignored pixels show the frame alone.
        captions: one for each frame.
        class_set: gives names and colours.
        reasons: why each frame is shown, or none.
        marks: for each frame a box to draw around what is small in it, or none.
    """
    assert frames and len(frames) == len(masks) == len(captions), "one mask and one caption for each frame"
    cell_in = _cell_size(frames, 2.4)
    n_pairs = min(len(frames), max(2, int(_WIDEST_IN / (2 * cell_in[1] + _PAIR_GAP_IN))))
    cells = []
    for index, (frame, mask) in enumerate(zip(frames, masks, strict=True)):
        small = _fitted_frame(frame, cell_in)
        mark = marks[index] if marks else None
        cells += [_marked(picture, mark) for picture in (small, overlay(small, mask, class_set))]
    grid = Grid(cell_in=cell_in, gaps_in=((0.04, _PAIR_GAP_IN) * n_pairs)[:-1], n_lines=2 if reasons else 1)
    lines = {2 * index: [Line(caption, True)] for index, caption in enumerate(captions)}
    if reasons:
        lines = {2 * index: [Line(reason, False), *lines[2 * index]] for index, reason in enumerate(reasons)}
    return draw_grid(grid, cells, lines, _present(masks, class_set, with_ignored=False))


def _marked(picture: np.ndarray, mark: Box | None) -> np.ndarray:
    """The picture with a frame of white and black around a box, a few pixels larger than it."""
    if mark is None:
        return picture
    height_px, width_px = picture.shape[:2]
    top, left, bottom, right = (part * side for part, side in zip(mark, (height_px, width_px) * 2, strict=True))
    marked = picture.copy()
    for around_px, color in ((5, 255), (4, 255), (6, 0)):
        y0, x0 = max(0, math.floor(top) - around_px), max(0, math.floor(left) - around_px)
        y1, x1 = min(height_px, math.ceil(bottom) + around_px), min(width_px, math.ceil(right) + around_px)
        marked[[y0, y1 - 1], x0:x1] = color
        marked[y0:y1, [x0, x1 - 1]] = color
    return marked


def _cell_size(frames: Iterable[np.ndarray], width_in: float) -> tuple[float, float]:
    """Height and width, inches, for frames of the middle one's shape."""
    ratio = float(np.median([frame.shape[0] / frame.shape[1] for frame in frames]))
    width_in = max(0.5, min(width_in, _TALLEST_IN / ratio))
    return min(width_in * ratio, _TALLEST_IN), width_in


def _fitted_size(frame: np.ndarray, cell_in: tuple[float, float]) -> tuple[int, int]:
    """The size in which a frame fills its cell, [H, W] in pixels."""
    scale = min(cell_in[0] * DPI / frame.shape[0], cell_in[1] * DPI / frame.shape[1])
    return max(1, round(frame.shape[0] * scale)), max(1, round(frame.shape[1] * scale))


def _fitted_frame(frame: np.ndarray, cell_in: tuple[float, float]) -> np.ndarray:
    height_px, width_px = _fitted_size(frame, cell_in)
    filtering = Image.Resampling.BOX if height_px < frame.shape[0] else Image.Resampling.BILINEAR
    return np.asarray(Image.fromarray(frame).resize((width_px, height_px), filtering))


def _fitted_mask(mask: np.ndarray, frame: np.ndarray, cell_in: tuple[float, float]) -> np.ndarray:
    return resize_nearest(mask, *_fitted_size(frame, cell_in))


def _present(masks: Iterable[np.ndarray], class_set: ClassSet, *, with_ignored: bool = True) -> list[tuple[str, Color]]:
    """Name and colour of each class that appears, in the order of the class set."""
    pixels = np.zeros(256, np.int64)
    for mask in masks:
        pixels += count_values(mask)
    present = [(item.name, item.color) for index, item in enumerate(class_set.classes) if pixels[index]]
    return [*present, ("(ignored)", _ignored_color(class_set))] if with_ignored and pixels[IGNORED_ID] else present


def _ignored_color(class_set: ClassSet) -> Color:
    """Black as everywhere, or white where a class is black."""
    return (255, 255, 255) if any(item.color == (0, 0, 0) for item in class_set.classes) else (0, 0, 0)


def _colorized(mask_HW: np.ndarray, class_set: ClassSet) -> np.ndarray:
    ignored_HW1 = (mask_HW == IGNORED_ID)[..., None]
    return np.where(ignored_HW1, np.array(_ignored_color(class_set), np.uint8), class_set.colorize(mask_HW))
