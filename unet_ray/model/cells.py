"""Masks at a frame's size, by cells: the pixels between four neighbouring logits.

Shapes: `H` height px, `W` width px, `K` classes; `h`, `w` the size of the logits; `Y`, `X` cells down and across, one
more than logits; `N` cells that are computed together, `R` rows and `C` columns of each.

A pixel's logits are a mixture of those at the corners of its cell. So a class that leads at all four corners leads in
the whole cell, and its pixels need not be computed. The pixels of the other cells (7.5% of CamVid's) are interpolated
for all classes: across, then down, `a + (b - a) * weight` each, as XLA compiles it. It fuses the product
and the sum, so that `tf.image.resize` or NumPy may say otherwise where classes are nearly equal.

Rounding can turn such near-ties. So a cell is of one class only where that class leads at each corner by more than
`_SAFE_LEAD` times the cell's largest absolute logit: the mask is then the same, bit for bit, as with all cells
computed. NaN and infinities are always computed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import tensorflow as tf

from unet_ray.model.grid import Grid, stepped
from unet_ray.model.interpolation import interpolation, nearest, positions

_SAFE_LEAD = 2.0**-18
"""64 times the rounding of one float32 operation, of which a pixel's logit takes six."""
_BLOCK_PX, _BLOCK_CELLS = 2**17, 1024
"""Pixels and cells that are computed together at most, so that few are computed in vain."""
_PADDING = 2
"""Stands for the nearest end of a pixel that only fills a cell up."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Side:
    """One side of a frame: cell `c` lies between the logits `c - 1` and `c`, or beyond the first or last logit."""

    cell_of_pixel: np.ndarray
    """The cell of each pixel, int64."""
    sizes: np.ndarray
    """Pixels of each cell, int64 [cells]; 0 where the frame has fewer pixels than logits."""
    halves: np.ndarray
    """Pixels of each cell that are nearest to its first and to its second logit, int64 [cells, 2]."""
    pixels: np.ndarray
    """Pixels of each cell, int64 [cells, R or C]; the last one is repeated to fill it up."""
    weights: np.ndarray
    """The second logit's weight in each of these, float32."""
    nearer: np.ndarray
    """0 or 1 where the first or the second logit is nearest, `_PADDING` for what fills up; int64."""


@dataclass(frozen=True, kw_only=True, eq=False)
class CellMask:
    """A mask, and what counting its pixels by cells gave."""

    mask: np.ndarray
    """Class ids, uint8 [H, W]."""
    pixels_K: np.ndarray
    """Pixels of each class, int64."""
    units_K: np.ndarray
    """Sum over the pixels of each class of the nearest logit's confidence, int64, in `grid.CONFIDENCE_UNITS`."""
    low_margins: int
    """Pixels whose nearest logit has a low margin."""


def label_cells(logits_hwK: np.ndarray, grid: Grid, size: tuple[int, int], extent: tuple[float, float]) -> CellMask:
    """Interpolates one frame's logits, float32, to a size, and counts its pixels.

    `grid` has what these logits say. `extent` is the part of them, from the top left, that shows the frame.

    ms of a core a frame, with counting, from 96x128 logits of 11 classes, 7.5% of whose cells are mixed (CamVid's
    validation masks, blurred, as logits): the scan of every pixel that came before, and cells. All masks were equal.

    | size | scan | cells |
    |---|---|---|
    | 480x640 | 48 | 7 |
    | 1080x1920 | 266 | 14 |
    | 1280x1920 | 335 | 12 |

    CPU time of the thread, AMD EPYC with AVX2, 2 cores, beside other work, 2026-11-30. Most of the scan's
    time was the softmax of each pixel: one of masks alone takes a fifth (`pytest -n0 -m slow -k cells_take_less_time`).
    """
    n_classes = logits_hwK.shape[-1]
    down, across = (cut_side(in_px, out_px, least) for in_px, out_px, least in zip(extent, size, (2, 8), strict=True))
    rows, columns = (np.clip(np.arange(-1, math.ceil(px) + 1), 0, math.ceil(px) - 1) for px in extent)
    at_corners = rows[:, None], columns
    first_YX, is_uniform_YX = _uniform(grid.ids[at_corners], grid.lead[at_corners], grid.largest[at_corners])
    units = grid.units[at_corners].astype(np.int64)

    mask_HW = np.repeat(np.take(first_YX, across.cell_of_pixel, axis=1), down.sizes, axis=0)
    units_Yx = units[:-1] * down.halves[:, :1] + units[1:] * down.halves[:, 1:]
    units_YX = units_Yx[:, :-1] * across.halves[:, 0] + units_Yx[:, 1:] * across.halves[:, 1]
    pixels_YX = down.sizes[:, None] * across.sizes
    class_ids = np.where(is_uniform_YX, first_YX, n_classes).ravel()  # those of mixed cells come last, and are dropped
    counts_2K = np.stack(
        [
            np.bincount(class_ids, per_cell.ravel(), n_classes + 1)[:n_classes].astype(np.int64)
            for per_cell in (pixels_YX, units_YX)  # float64 holds these sums: 2^24 * 100 million < 2^53
        ]
    )
    mixed = np.nonzero(~is_uniform_YX & (pixels_YX > 0))
    for y, x, ids_NRC in _computed(logits_hwK, (rows, columns), mixed, (down, across)):
        mask_HW.reshape(-1)[(down.pixels[y] * size[1])[:, :, None] + across.pixels[x][:, None, :]] = ids_NRC
        counts_2K += _count(ids_NRC, (down.nearer[y], across.nearer[x]), (units, y, x), n_classes)
    per_row, per_column = (
        np.bincount(nearest(in_px, out_px), minlength=math.ceil(in_px))
        for in_px, out_px in zip(extent, size, strict=True)
    )
    low_margins = int(per_row @ grid.low @ per_column)
    return CellMask(mask=mask_HW, pixels_K=counts_2K[0], units_K=counts_2K[1], low_margins=low_margins)


def _uniform(ids: np.ndarray, lead: np.ndarray, largest: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The class of each cell's first corner [Y, X], and whether it is that of the whole cell.

    Takes the scores of the logits at the corners, one more than cells, as `Grid` has them.
    """
    first = ids[:-1, :-1]
    is_uniform = (first == ids[:-1, 1:]) & (first == ids[1:, :-1]) & (first == ids[1:, 1:])
    with np.errstate(over="ignore"):  # of logits whose difference may overflow, twice the largest is infinite
        bound = 2 * _over_corners(np.maximum, largest) * np.float32(_SAFE_LEAD / 2)
    return first, is_uniform & (_over_corners(np.minimum, lead) > bound)


def _over_corners(reduce: np.ufunc, corners: np.ndarray) -> np.ndarray:
    rows = reduce(corners[:-1], corners[1:])
    return reduce(rows[:, :-1], rows[:, 1:])


def _computed(
    logits_hwK: np.ndarray,
    logits_of: tuple[np.ndarray, np.ndarray],
    cells: tuple[np.ndarray, ...],
    sides: tuple[Side, Side],
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yields rows and columns of some cells, and the class ids of their pixels [N, R, C].

    `logits_of` are the rows and columns of the logits at the cells' corners.
    """
    (rows, columns), (down, across) = logits_of, sides
    n_together = max(1, min(_BLOCK_CELLS, _BLOCK_PX // (down.pixels.shape[1] * across.pixels.shape[1])))
    for start in range(0, len(cells[0]), n_together):
        y, x = (index[start : start + n_together] for index in cells)
        padded_y, padded_x = (np.pad(index, (0, n_together - len(y)), mode="edge") for index in (y, x))
        corners = [logits_hwK[rows[padded_y + j], columns[padded_x + i]] for j in (0, 1) for i in (0, 1)]
        corners_N4K = np.stack(corners, axis=1)
        with tf.device("CPU:0"):
            ids_NRC = _interpolated_ids(
                tf.constant(corners_N4K),
                tf.constant(down.weights[padded_y]),
                tf.constant(across.weights[padded_x]),
                is_finite=bool(np.isfinite(corners_N4K).all()),
            )
        yield y, x, ids_NRC.numpy()[: len(y)]


@tf.function(jit_compile=True, autograph=False)
def _interpolated_ids(corners_N4K, y_weight_NR, x_weight_NC, *, is_finite: bool):
    """Class ids, uint8 [N, R, C], of the pixels of cells; the first of equals, as `grid.best_class` has them.

    A pixel on a logit has no part of the next one. Where that is finite, its weight of 0 does for this.
    """
    n_classes = corners_N4K.shape[2]
    is_left, is_top = x_weight_NC == 0, y_weight_NR[:, :, None] == 0

    def mixture(a, b, weight, is_first):
        b = b if is_finite else tf.where(is_first, a, b)
        return a + (b - a) * weight

    for class_id in range(n_classes):
        top_left, top_right, low_left, low_right = tf.unstack(corners_N4K[:, :, class_id, None], axis=1)
        top = mixture(top_left, top_right, x_weight_NC, is_left)[:, None, :]
        bottom = mixture(low_left, low_right, x_weight_NC, is_left)[:, None, :]
        logit = mixture(top, bottom, y_weight_NR[:, :, None], is_top)
        if class_id == 0:
            best, ids = logit, tf.zeros_like(logit, tf.uint8)
        else:
            ids = tf.where(logit > best, tf.constant(class_id, tf.uint8), ids)
            best = tf.maximum(best, logit)
    return ids


def _count(
    ids_NRC: np.ndarray,
    nearer: tuple[np.ndarray, np.ndarray],
    corners: tuple[np.ndarray, np.ndarray, np.ndarray],
    n_classes: int,
) -> np.ndarray:
    """Pixels of each class in some cells, and the sum of their confidences, int64 [2, K].

    `nearer` is what `Side.nearer` has for the rows [N, R] and columns [N, C]; `corners` the confidences of the logits
    at the corners, and the cells' rows and columns.
    """
    n_cells, n_ends = len(ids_NRC), _PADDING + 1
    of_rows = (np.arange(n_cells)[:, None] * n_ends + nearer[0]) * n_ends
    keys = (of_rows[:, :, None] + nearer[1][:, None, :]) * n_classes + ids_NRC
    pixels = np.bincount(keys.ravel(), minlength=n_cells * n_ends**2 * n_classes).reshape(-1, n_classes)
    units, y, x = corners
    weights_2N33 = np.zeros((2, n_cells, n_ends, n_ends), np.int64)  # 0 for what fills up
    for j, i in np.ndindex(_PADDING, _PADDING):
        weights_2N33[0, :, j, i] = 1
        weights_2N33[1, :, j, i] = units[y + j, x + i]
    return weights_2N33.reshape(2, -1) @ pixels


@lru_cache(maxsize=256)
def cut_side(in_px: float, out_px: int, least: int) -> Side:
    """Cuts a side of `out_px` pixels into cells between `in_px` logits, filled up to a multiple of `least` pixels."""
    n_logits = math.ceil(in_px)
    cell_of_pixel = np.clip(np.floor(positions(in_px, out_px)).astype(np.int64) + 1, 0, n_logits)
    starts = np.searchsorted(cell_of_pixel, np.arange(n_logits + 2))
    sizes = np.diff(starts)
    offsets = np.arange(stepped(int(sizes.max()), least))
    pixels = np.minimum(starts[:-1, None] + offsets, np.maximum(starts[1:, None] - 1, 0))
    first = np.maximum(np.arange(n_logits + 1) - 1, 0)
    nearer = (nearest(in_px, out_px)[pixels] > first[:, None]).astype(np.int64)
    nearer[offsets >= sizes[:, None]] = _PADDING
    return Side(
        cell_of_pixel=cell_of_pixel,
        sizes=sizes,
        halves=np.stack([(nearer == end).sum(1) for end in (0, 1)], axis=1),
        pixels=pixels,
        weights=interpolation(in_px, out_px)[2][pixels],
        nearer=nearer,
    )
