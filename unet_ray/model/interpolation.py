"""Which logits a pixel of a frame comes from: bilinear and nearest neighbour, with half-pixel centres, one side each.

Of logits of which only a part shows the frame, `in_px` is that part, from the first; it need not end with a logit.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

_SIZE_STEP_PX = 64
"""Frame sizes are rounded up to this for compiling (1 s each), so that an archive of many sizes compiles few times."""


def positions(in_px: float, out_px: int) -> np.ndarray:
    """Returns where each output pixel lies between the logits, float32: logit 0 is at 0."""
    scale = np.float32(in_px) / np.float32(out_px)
    return (np.arange(out_px, dtype=np.float32) + np.float32(0.5)) * scale - np.float32(0.5)


@lru_cache(maxsize=256)
def interpolation(in_px: float, out_px: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lower and upper source index (int32) and the upper's weight (float32) of each output pixel.

    As `tf.image.resize(method="bilinear")` in TensorFlow 2: half-pixel centres, float32, no antialiasing.
    """
    at = positions(in_px, out_px)
    below = np.floor(at)
    lower, upper = (np.clip(index, 0, math.ceil(in_px) - 1).astype(np.int32) for index in (below, np.ceil(at)))
    return lower, upper, at - below


@lru_cache(maxsize=256)
def nearest(in_px: float, out_px: int) -> np.ndarray:
    """Source index (int32) of each output pixel: floor((i + 0.5) * in / out)."""
    at = (np.arange(out_px) + 0.5) * (in_px / out_px)
    return np.minimum(at, math.ceil(in_px) - 1).astype(np.int32)


def padded_lookup(in_px: float, out_px: int) -> tuple[np.ndarray, ...]:
    """`interpolation` and `nearest` as four arrays, with zeros up to the next step.

    What compiles for these takes any size up to it.
    """
    arrays = (*interpolation(in_px, out_px), nearest(in_px, out_px))
    return tuple(np.pad(array, (0, padded_px(out_px) - out_px)) for array in arrays)


def padded_px(side_px: int) -> int:
    """Returns the side of a frame, rounded up to a step."""
    return side_px + -side_px % _SIZE_STEP_PX
