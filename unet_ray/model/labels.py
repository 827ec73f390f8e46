"""Logits to labels: masks, pixels and confidences of each class, at the size of each frame.

Shapes: `N` frames, `H` height px, `W` width px, `K` classes; `h`, `w` the size of the logits; `G` frames that a GPU
labels together.

A pixel's class comes from logits that are interpolated bilinearly to the mask's size. Its confidence, and whether its
margin is low, are those of the nearest logit of the network's own grid (`unet_ray.model.grid`). A frame's confidence is
the mean over its pixels, a class's the mean over the pixels labelled with it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

from unet_ray.model.cells import label_cells
from unet_ray.model.grid import CONFIDENCE_UNITS, Grid, best_class, confidence, read_grid
from unet_ray.model.interpolation import nearest


@dataclass(frozen=True, kw_only=True, eq=False)
class Labels:
    """What the network says of N frames."""

    masks: list[np.ndarray]
    """Class ids, uint8 [H, W], one a frame: sizes may differ."""
    pixels_NK: np.ndarray
    """Pixels of each class, int64; they sum to the size of the mask."""
    confidence_NK: np.ndarray
    """Mean confidence of each class, float32; NaN where the class has no pixel."""
    confidence_N: np.ndarray
    """Mean confidence, float32."""
    low_margin_share_N: np.ndarray
    """Share of pixels with a low margin, float32."""
    grids: list[np.ndarray]
    """Class ids of the network's own grid, uint8 [h, w], one a frame: of the part that shows it. For frames that were
    labelled in windows, their masks."""


def predicted_logits(model: Any, images_BHWC: tf.Tensor, *, tta: str) -> tf.Tensor:
    """Logits [B, h, w, K]; with `flip` their mean with those of the mirrored images, mirrored back."""
    logits_BhwK = model(images_BHWC, training=False)
    if tta == "none":
        return logits_BhwK
    mirrored_BhwK = model(tf.reverse(images_BHWC, [2]), training=False)
    return (logits_BhwK + tf.reverse(mirrored_BhwK, [2])) / 2


def label_frames(
    logits_NhwK: np.ndarray,
    sizes: Sequence[tuple[int, int]],
    extents: Sequence[tuple[float, float]] | None = None,
    *,
    temperature: float = 1.0,
) -> Labels:
    """Labels frames on a CPU, from float32 logits.

    Args:
        logits_NhwK: those of frames that only fill a batch up may come last.
        sizes: height and width of the masks.
        extents: the part of the logits that shows each frame, from the top left; by default all of them.
        temperature: confidences are of the logits divided by it; masks are not.
    """
    extents = extents or [logits_NhwK.shape[1:3]] * len(sizes)
    grid = read_grid(logits_NhwK, temperature)  # all of them, as it is compiled for their number
    labels = []
    for index, (size, extent) in enumerate(zip(sizes, extents, strict=True)):
        height, width = (math.ceil(px) for px in extent)
        part = grid.frame(index, height, width)
        if tuple(size) == tuple(extent):
            labels.append(_label_unscaled(part, logits_NhwK.shape[3]))
        else:
            result = label_cells(logits_NhwK[index, :height, :width], part, size, extent)
            ids_hw = np.ascontiguousarray(part.ids)
            labels.append(one_frame(result.mask, result.pixels_K, result.units_K, result.low_margins, ids_hw))
    return concatenate(labels)


def label_ids(ids_hw: np.ndarray, size: tuple[int, int], extent: tuple[float, float], n_classes: int) -> Labels:
    """One frame of a network that gives class ids, uint8 [h, w], at a size by nearest neighbour; no confidences."""
    rows, columns = (nearest(in_px, out_px) for in_px, out_px in zip(extent, size, strict=True))
    mask_HW = np.ascontiguousarray(ids_hw[rows[:, None], columns])
    height, width = (math.ceil(px) for px in extent)
    nothing = np.full(n_classes, np.nan)
    pixels_K = np.bincount(mask_HW.ravel(), minlength=n_classes)
    return one_frame(mask_HW, pixels_K, nothing, np.nan, np.ascontiguousarray(ids_hw[:height, :width]))


def _label_unscaled(grid: Grid, n_classes: int) -> Labels:
    """Where the mask has the size of the logits, it is their grid.

    Counted by runs of pixels of one class: 480x640 in 0.6 ms of a core, pixel by pixel in 1.5 (15,000 runs, numpy 2,
    AVX-512, 2026-11-29). Where no pixel is like its neighbour it takes 2.8 instead of 0.7.
    """
    mask_hw = np.ascontiguousarray(grid.ids)
    ids = mask_hw.ravel()
    starts = np.concatenate(([0], np.flatnonzero(ids[1:] != ids[:-1]) + 1))
    class_ids = ids[starts].astype(np.int64)
    # float64 holds these sums: 2^24 * 100 million < 2^53
    pixels_K, units_K = (
        np.bincount(class_ids, of_runs, n_classes).astype(np.int64)
        for of_runs in (
            np.diff(starts, append=ids.size),
            np.add.reduceat(grid.units.ravel(), starts, dtype=np.int64),
        )
    )
    return one_frame(mask_hw, pixels_K, units_K, int(np.count_nonzero(grid.low)), mask_hw)


def label_fused(logits_GhwK, rows, columns, sizes_G2, temperature):
    """Some frames on a GPU, to be compiled: masks, pixels and confidences of each class, pixels of low margin, grids.

    `rows` and `columns` are the frames' lookups, four arrays each (`padded_lookup`), [G, H] and [G, W]: each frame has
    its own, so that all sizes of a step share what is compiled. Confidences are sums in `CONFIDENCE_UNITS`.
    """
    (y_lower_GH, y_upper_GH, y_weight_GH, y_nearest_GH), (x_lower_GW, x_upper_GW, x_weight_GW, x_nearest_GW) = (
        rows,
        columns,
    )
    n_classes, height_px, width_px = logits_GhwK.shape[3], y_lower_GH.shape[1], x_lower_GW.shape[1]
    left, right = (tf.gather(logits_GhwK, columns, axis=2, batch_dims=1) for columns in (x_lower_GW, x_upper_GW))
    logits_GhWK = left + (right - left) * x_weight_GW[:, None, :, None]
    above, below = (tf.gather(logits_GhWK, rows, axis=1, batch_dims=1) for rows in (y_lower_GH, y_upper_GH))
    logits_GHWK = above + (below - above) * y_weight_GH[:, :, None, None]
    ids = best_class(tf.unstack(logits_GHWK, axis=3))[0]

    logits = tf.unstack(logits_GhwK, axis=3)
    grid_ids, best, second = best_class(logits)
    of_grid = confidence(logits, best, second, temperature)
    units, low = (
        tf.gather(tf.gather(scores, y_nearest_GH, axis=1, batch_dims=1), x_nearest_GW, axis=2, batch_dims=1)
        for scores in of_grid
    )
    units = tf.cast(units, tf.int64)
    is_row_GH1 = (tf.range(height_px) < sizes_G2[:, :1])[:, :, None]
    inside_GHW = is_row_GH1 & (tf.range(width_px) < sizes_G2[:, 1:])[:, None, :]
    is_class = [(ids == class_id) & inside_GHW for class_id in range(n_classes)]
    pixels = [tf.reduce_sum(tf.cast(chosen, tf.int64), (1, 2)) for chosen in is_class]
    sums = [tf.reduce_sum(tf.where(chosen, units, 0), (1, 2)) for chosen in is_class]
    low_margins_G = tf.reduce_sum(tf.cast(low & inside_GHW, tf.int32), (1, 2))
    return tf.cast(ids, tf.uint8), tf.stack(pixels, 1), tf.stack(sums, 1), low_margins_G, tf.cast(grid_ids, tf.uint8)


def one_frame(
    mask_HW: np.ndarray, pixels_K: np.ndarray, units_K: np.ndarray, low_margins: float, grid_hw: np.ndarray
) -> Labels:
    """Returns the labels of one frame: mask and grid, uint8; pixels and confidences of each class [K], summed."""
    sums_K = units_K / CONFIDENCE_UNITS
    with np.errstate(invalid="ignore"):  # 0/0 is NaN: the class is absent
        confidence_K = sums_K / pixels_K
    return Labels(
        masks=[mask_HW],
        pixels_NK=pixels_K[None].astype(np.int64),
        confidence_NK=confidence_K[None].astype(np.float32),
        confidence_N=np.array([sums_K.sum() / mask_HW.size], np.float32),
        low_margin_share_N=np.array([low_margins / mask_HW.size], np.float32),
        grids=[grid_hw],
    )


def concatenate(parts: Sequence[Labels]) -> Labels:
    """Returns the labels of all frames of several parts, in order."""
    lists = ("masks", "grids")
    fields: dict[str, Any] = {name: [array for part in parts for array in getattr(part, name)] for name in lists}
    for field in dataclasses.fields(Labels):
        if field.name not in lists:
            fields[field.name] = np.concatenate([getattr(part, field.name) for part in parts])
    return Labels(**fields)
