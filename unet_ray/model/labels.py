"""Logits to labels: masks, pixels and confidences of each class, at the size of each frame.

Shapes: `N` frames, `H` height px, `W` width px, `K` classes; `h`, `w` the size of the logits.

A pixel's confidence is the softmax of its class. A frame's confidence is the mean over its pixels, a class's the mean
over the pixels labelled with it. A pixel has a low margin where the probabilities of its two best classes lie within
`LOW_MARGIN`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import tensorflow as tf

LOW_MARGIN = 0.2
"""Two best probabilities that lie within this are a low margin: the pixel could as well be the other class."""
_SIZE_STEP_PX = 64
"""Frame sizes are rounded up to this for compiling (1 s each), so that an archive of many sizes compiles few times."""


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


@lru_cache(maxsize=256)
def interpolation(in_px: int, out_px: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lower and upper source index (int32) and the upper's weight (float32) of each output pixel.

    As `tf.image.resize(method="bilinear")` in TensorFlow 2: half-pixel centres, float32, no antialiasing.
    """
    scale = np.float32(in_px) / np.float32(out_px)
    at = (np.arange(out_px, dtype=np.float32) + np.float32(0.5)) * scale - np.float32(0.5)
    below = np.floor(at)
    lower, upper = (np.clip(index, 0, in_px - 1).astype(np.int32) for index in (below, np.ceil(at)))
    return lower, upper, at - below


def label_scanned(logits_hwK: tf.Tensor, size: tuple[int, int]) -> Labels:
    """One frame on a CPU: row by row, so that the logits at the frame's size never lie in memory.

    At 23 classes, 96x128 to 480x640: 42 ms on two cores with `tf.image.resize`, softmax and top-2 over the whole
    frame, 9 ms on one core this way (2 cores, 2026-11-21).
    """
    mask_HW, confidence_HW, low_margins_H = _scan_to(logits_hwK, size)
    return _count(mask_HW, confidence_HW, low_margins_H.sum(), logits_hwK.shape[2])


def label_unscaled(logits_NhwK: tf.Tensor, n_frames: int) -> Labels:
    """Where masks have the size of the logits: 0.7 ms of a core a frame, with `_scan` 1.7 (23 classes, 96x128)."""
    masks_Nhw, confidence_Nhw, low_margins_N = (array.numpy() for array in _scan_unscaled(logits_NhwK))
    n_classes = logits_NhwK.shape[3]
    results = zip(masks_Nhw[:n_frames], confidence_Nhw, low_margins_N, strict=False)
    return concatenate([_count(mask, confidence, low, n_classes) for mask, confidence, low in results])


def _scan_to(logits_hwK: tf.Tensor, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`_scan` to any size: mask, confidence [H, W] and low margins of each row [H]."""
    height_px, width_px = size
    lookup = []
    for in_px, out_px in zip(logits_hwK.shape[:2], size, strict=True):
        padding = (0, -out_px % _SIZE_STEP_PX)
        lookup += [np.pad(array, padding) for array in interpolation(in_px, out_px)]
    mask, confidence, low_margins = _scan(logits_hwK, *lookup, np.int32(height_px), np.int32(width_px))
    mask_HW = np.ascontiguousarray(mask.numpy()[:height_px, :width_px])
    return mask_HW, confidence.numpy()[:height_px, :width_px], low_margins.numpy()[:height_px]


def _count(mask_HW: np.ndarray, confidence_HW: np.ndarray, low_margins: Any, n_classes: int) -> Labels:
    """By runs of pixels of one class: 480x640 in 0.6 ms of a core, pixel by pixel in 1.5 (15,000 runs, numpy 2,
    AVX-512, 2026-11-29). Where no pixel is like its neighbour it takes 2.8 instead of 0.7.

    In what order confidences are added changes nothing: of 32 classes the best has 1/32 at least, so that float64 adds
    the float32 of 16 million pixels without rounding.
    """
    ids = mask_HW.ravel()
    starts = np.concatenate(([0], np.flatnonzero(ids[1:] != ids[:-1]) + 1))
    sums = np.add.reduceat(confidence_HW.ravel().astype(np.float64), starts)
    class_ids = ids[starts].astype(np.int64)
    pixels_K = np.bincount(class_ids, np.diff(starts, append=ids.size), n_classes).astype(np.int64)
    return one_frame(mask_HW, pixels_K, np.bincount(class_ids, sums, n_classes), low_margins)


@tf.function(jit_compile=True, autograph=False)
def _scan_unscaled(logits_NhwK):
    """Reads each logit once: mask uint8 and confidence [N, h, w], pixels of low margin [N]."""
    ids, confidence, low = _best_class(tf.unstack(logits_NhwK, axis=3))
    return tf.cast(ids, tf.uint8), confidence, tf.reduce_sum(tf.cast(low, tf.int32), (1, 2))


@tf.function(jit_compile=True, autograph=False)
def _scan(logits_hwK, y_lower, y_upper, y_weight, x_lower, x_upper, x_weight, n_rows, n_columns):
    """Interpolates along rows, then goes down the frame: mask uint8, confidence [H, W], pixels of low margin [H]."""
    planes_Khw = tf.transpose(logits_hwK, (2, 0, 1))
    left, right = tf.gather(planes_Khw, x_lower, axis=2), tf.gather(planes_Khw, x_upper, axis=2)
    planes_KhW = left + (right - left) * x_weight
    height_px, width_px = y_lower.shape[0], x_lower.shape[0]
    inside_W = tf.range(width_px) < n_columns

    def next_row(y, mask_HW, confidence_HW, low_margins_H):
        above, below = tf.gather(planes_KhW, y_lower[y], axis=1), tf.gather(planes_KhW, y_upper[y], axis=1)
        ids, confidence, low = _best_class(tf.unstack(above + (below - above) * y_weight[y]))
        low_margins = tf.reduce_sum(tf.cast(low & inside_W, tf.int32))
        return (
            y + 1,
            tf.tensor_scatter_nd_update(mask_HW, [[y]], [tf.cast(ids, tf.uint8)]),
            tf.tensor_scatter_nd_update(confidence_HW, [[y]], [confidence]),
            tf.tensor_scatter_nd_update(low_margins_H, [[y]], [low_margins]),
        )

    empty = (tf.zeros((height_px, width_px), tf.uint8), tf.zeros((height_px, width_px)), tf.zeros(height_px, tf.int32))
    return tf.while_loop(lambda y, *_: y < n_rows, next_row, (0, *empty))[1:]


def _best_class(logits: list[tf.Tensor]) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """The best class (the first of equals), its softmax, and whether the second best lies within `LOW_MARGIN`.

    One tensor a class instead of reductions over the classes: XLA makes one vectorised loop of it.
    """
    best, second = logits[0], tf.fill(tf.shape(logits[0]), -np.inf)
    ids = tf.zeros_like(best, tf.int32)
    for class_id, logit in enumerate(logits[1:], start=1):
        ids = tf.where(logit > best, class_id, ids)
        second = tf.maximum(second, tf.minimum(best, logit))
        best = tf.maximum(best, logit)
    confidence = 1 / tf.add_n([tf.exp(logit - best) for logit in logits])
    # Multiplied, not divided: XLA on a CPU makes twice the time of a second division (13 against 6 ms a frame).
    return ids, confidence, confidence - tf.exp(second - best) * confidence <= LOW_MARGIN


@tf.function(jit_compile=True, autograph=False)
def label_fused(logits_GhwK, height_px: int, width_px: int):
    """Some frames of one size on a GPU: masks, pixels and confidence sums of each class, pixels of low margin.

    Sums are of integers (confidence in units of 2^-24): no order of adding changes them.
    """
    n_classes = logits_GhwK.shape[3]
    logits_GHWK = tf.image.resize(logits_GhwK, (height_px, width_px), "bilinear")
    ids, confidence, low = _best_class(tf.unstack(logits_GHWK, axis=3))
    units = tf.cast(tf.round(confidence * 2**24), tf.int64)
    is_class = [ids == class_id for class_id in range(n_classes)]
    pixels = [tf.reduce_sum(tf.cast(chosen, tf.int64), (1, 2)) for chosen in is_class]
    sums = [tf.reduce_sum(tf.where(chosen, units, 0), (1, 2)) for chosen in is_class]
    sums_GK = tf.cast(tf.stack(sums, 1), tf.float64) / 2**24
    return tf.cast(ids, tf.uint8), tf.stack(pixels, 1), sums_GK, tf.reduce_sum(tf.cast(low, tf.int32), (1, 2))


def one_frame(mask_HW: np.ndarray, pixels_K: np.ndarray, sums_K: np.ndarray, low_margins: Any) -> Labels:
    """Returns the labels of one frame: mask uint8 [H, W], pixels and confidence sums of each class [K]."""
    with np.errstate(invalid="ignore"):  # 0/0 is NaN: the class is absent
        confidence_K = sums_K / pixels_K
    return Labels(
        masks=[mask_HW],
        pixels_NK=pixels_K[None].astype(np.int64),
        confidence_NK=confidence_K[None].astype(np.float32),
        confidence_N=np.array([sums_K.sum() / mask_HW.size], np.float32),
        low_margin_share_N=np.array([low_margins / mask_HW.size], np.float32),
    )


def concatenate(parts: Sequence[Labels]) -> Labels:
    """Returns the labels of all frames of several parts, in order."""
    return Labels(
        masks=[mask for part in parts for mask in part.masks],
        **{
            field.name: np.concatenate([getattr(part, field.name) for part in parts])
            for field in dataclasses.fields(Labels)
            if field.name != "masks"
        },
    )
