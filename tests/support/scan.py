"""A frame's mask, row by row, all classes of every pixel: what masks by cells are compared with, bit for bit.

It is the program that labelled frames before cells did. XLA fuses its products and sums.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import tensorflow as tf

from unet_ray.model.grid import best_class
from unet_ray.model.interpolation import interpolation


def scanned_mask(
    logits_hwK: np.ndarray, size: tuple[int, int], extent: tuple[float, float] | None = None
) -> np.ndarray:
    """Returns class ids, uint8 [H, W]; `extent` is the part of the logits, from the top left, that shows the frame."""
    lookup = [
        array for pair in zip(extent or logits_hwK.shape[:2], size, strict=True) for array in interpolation(*pair)
    ]
    return _scan(tf.constant(logits_hwK), *lookup).numpy()


@partial(tf.function, jit_compile=True, autograph=False)
def _scan(logits_hwK, y_lower, y_upper, y_weight, x_lower, x_upper, x_weight):
    planes_Khw = tf.transpose(logits_hwK, (2, 0, 1))
    left, right = tf.gather(planes_Khw, x_lower, axis=2), tf.gather(planes_Khw, x_upper, axis=2)
    planes_KhW = left + (right - left) * x_weight
    n_rows, n_columns = y_lower.shape[0], x_lower.shape[0]

    def next_row(y, mask_HW):
        above, below = tf.gather(planes_KhW, y_lower[y], axis=1), tf.gather(planes_KhW, y_upper[y], axis=1)
        ids = best_class(tf.unstack(above + (below - above) * y_weight[y]))[0]
        return y + 1, tf.tensor_scatter_nd_update(mask_HW, [[y]], [tf.cast(ids, tf.uint8)])

    return tf.while_loop(lambda y, _: y < n_rows, next_row, (0, tf.zeros((n_rows, n_columns), tf.uint8)))[1]
