"""What each logit of the network's own grid says: its class, how confident, and by how much the class leads.

Shapes: `N` frames, `K` classes; `h`, `w` the size of the logits; `P` logits of any frames, one after the other.

A logit's confidence is the softmax of its class. It has a low margin where the probabilities of its two best classes
lie within `LOW_MARGIN`. Both are of `logits / temperature`; the class is not, as dividing could make a tie.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

LOW_MARGIN = 0.2
"""Two best probabilities that lie within this are a low margin: the pixel could as well be the other class."""

CONFIDENCE_UNITS = 2**24
"""Confidences are integers in units of 1 / 2^24, so that their sums do not depend on the order of adding."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Grid:
    """Scores of each logit; all arrays are [N, h, w], or of one frame [h, w]."""

    ids: np.ndarray
    """Best class, uint8; the first of equals."""
    units: np.ndarray
    """Confidence, int32, in units of 1 / 2^24; 0 where it is not a number."""
    low: np.ndarray
    """Whether the margin is low, bool."""
    lead: np.ndarray
    """By how much the best logit leads the second, float32."""
    largest: np.ndarray
    """The largest absolute logit of any class, float32."""

    def frame(self, index: int, height: int, width: int) -> Grid:
        """Returns one frame's part of the size given, from the top left."""
        arrays = {name: array[index, :height, :width] for name, array in vars(self).items()}
        return Grid(**arrays)


def read_grid(logits_NhwK: np.ndarray, temperature: float) -> Grid:
    """Computes all scores on the CPU in one pass over float32 logits [N, h, w, K].

    A frame of 96x128 with 11 classes takes 0.6 ms of a core (AMD EPYC with AVX2, beside other work, 2026-11-30).
    """
    shape, n_classes = logits_NhwK.shape[:-1], logits_NhwK.shape[-1]
    n_logits = int(np.prod(shape))
    missing = stepped(n_logits, least=1024) - n_logits
    logits_PK = logits_NhwK.reshape(-1, n_classes)
    if missing:
        logits_PK = np.pad(logits_PK, ((0, missing), (0, 0)))
    with tf.device("CPU:0"):
        arrays = _read(tf.constant(logits_PK), tf.constant(temperature, tf.float32))
    names = ("ids", "units", "low", "lead", "largest")
    return Grid(**{name: array.numpy()[:n_logits].reshape(shape) for name, array in zip(names, arrays, strict=True)})


def stepped(n: int, least: int) -> int:
    """Rounds a length up, to quarters of a power of two: what is compiled for it serves all up to it."""
    step = max(least, 2 ** max(0, n.bit_length() - 3))
    return n + -n % step


@tf.function(jit_compile=True, autograph=False)
def _read(logits_PK, temperature):
    logits = tf.unstack(logits_PK, axis=1)
    ids, best, second = best_class(logits)
    units, low = confidence(logits, best, second, temperature)
    largest = tf.abs(logits[0])
    for logit in logits[1:]:
        largest = tf.maximum(largest, tf.abs(logit))
    return tf.cast(ids, tf.uint8), units, low, best - second, largest


def best_class(logits: list[tf.Tensor]) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """The best class (int32, the first of equals), its logit, and the second best's.

    One tensor a class instead of reductions over the classes: XLA makes one vectorised loop of it.
    """
    best, second = logits[0], tf.fill(tf.shape(logits[0]), -np.inf)
    ids = tf.zeros_like(best, tf.int32)
    for class_id, logit in enumerate(logits[1:], start=1):
        ids = tf.where(logit > best, class_id, ids)
        second = tf.maximum(second, tf.minimum(best, logit))
        best = tf.maximum(best, logit)
    return ids, best, second


def confidence(
    logits: list[tf.Tensor], best: tf.Tensor, second: tf.Tensor, temperature: Any
) -> tuple[tf.Tensor, tf.Tensor]:
    """The best class's softmax, int32 in `CONFIDENCE_UNITS`, and whether the second best lies within `LOW_MARGIN`."""
    top = best / temperature
    share = 1 / tf.add_n([tf.exp(logit / temperature - top) for logit in logits])
    # Multiplied, not divided: XLA on a CPU makes twice the time of a second division (13 against 6 ms a frame).
    low = share - tf.exp(second / temperature - top) * share <= LOW_MARGIN
    return tf.cast(tf.where(share > 0, tf.round(share * CONFIDENCE_UNITS), 0), tf.int32), low
