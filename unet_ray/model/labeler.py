"""Frames to labels: the network, compiled for one batch size, on the whole frame or on windows of it.

Shapes: `B` batch, `N` frames, `H` height px, `W` width px, `C` colour, `K` classes; `h`, `w` the size of the logits.

What a frame gets depends on nothing but the frame: not on its neighbours, its place, or the batch.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import Any

import numpy as np

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # its notices of every process name no trouble of the user's

import tensorflow as tf

from unet_ray.model.bundle import Bundle
from unet_ray.model.label_options import LabelOptions
from unet_ray.model.labels import Labels, concatenate, label_fused, label_scanned, label_unscaled, one_frame

_FUSED_LOGITS = 2**26
"""Logits at the frame's size that a GPU holds at once: 256 MB."""


class Labeler:
    """A bundle's network, compiled for one batch size and precision, and what turns its logits into labels."""

    def __init__(self, bundle: Bundle, options: LabelOptions) -> None:
        """Builds the network of a trained model."""
        config = bundle.model_config
        self.model_size = (config.image_height_px, config.image_width_px)
        self._network_size = options.tiling.window if options.tiling else self.model_size
        height_px, width_px = self._network_size
        sized = dataclasses.replace(config, image_height_px=height_px, image_width_px=width_px)
        model = dataclasses.replace(bundle, model_config=sized).build_model(dtype_policy=options.precision)
        self._n_classes = config.n_classes
        self._mask_size = options.mask_size
        self._tiling = options.tiling
        self._fused = options.device == "gpu"
        # A batch for each thread, never threads within one: oneDNN on AVX2 and Eigen (half precision where oneDNN has
        # none) cut sums by their number, and a frame's last bits would depend on it. As fast: 96x128, 32 filters,
        # float32, two threads: 48 to 53 ms a frame either way (TF 2.21, 2 cores with AVX2, 2026-11-24).
        self._n_batches = 1 if self._fused else options.n_threads
        self._threads = ThreadPoolExecutor(self._n_batches)
        self._batch_size = -(-options.batch_size // self._n_batches)
        # On 2 cores at 96x128 in bfloat16: 171 img/s; with XLA fewer (float32: 58 against 91); `predict` 49.
        self._network = tf.function(
            lambda images_BHWC: _predict(model, images_BHWC, flip=options.tta == "flip"),
            input_signature=[tf.TensorSpec((self._batch_size, height_px, width_px, 3), tf.uint8)],
            jit_compile=self._fused,
            autograph=False,
        )

    def warm_up(self) -> None:
        """Compiles the network, so that the first frame does not wait for it."""
        self._network(tf.zeros((self._batch_size, *self._network_size, 3), tf.uint8))

    def label(self, images: Sequence[np.ndarray] | np.ndarray, sizes: Sequence[tuple[int, int]]) -> Labels:
        """Labels N frames.

        Args:
            images: uint8 RGB: [N, h, w, 3] of the network's size, or with `tiling` frames of any size.
            sizes: the frames' own (height, width).
        """
        mask_sizes = sizes if self._mask_size == "native" else [self.model_size] * len(sizes)
        if self._tiling:
            return concatenate([self._label_tiled(*item) for item in zip(images, mask_sizes, strict=True)])
        batches = _cut(images, self._batch_size), _cut(mask_sizes, self._batch_size)
        return concatenate(list(self._threads.map(self._label_batch, *batches)))

    def _label_batch(self, images_NHWC: Sequence[np.ndarray] | np.ndarray, sizes: Sequence[tuple[int, int]]) -> Labels:
        logits_BhwK = self._logits(np.asarray(images_NHWC))
        if self._mask_size == "model" and not self._fused:
            return label_unscaled(logits_BhwK, len(sizes))
        return self._label_logits(logits_BhwK[: len(sizes)], sizes)

    def _logits(self, images_NHWC: np.ndarray) -> tf.Tensor:
        """At most a batch of images to the logits of a whole batch [B, h, w, K]: those of the padding come last."""
        padding = ((0, self._batch_size - len(images_NHWC)), (0, 0), (0, 0), (0, 0))
        return self._network(tf.constant(np.pad(images_NHWC, padding)))

    def _label_logits(self, logits_NhwK: tf.Tensor, sizes: Sequence[tuple[int, int]]) -> Labels:
        if self._fused:
            return self._label_fused(logits_NhwK, sizes)
        return concatenate([label_scanned(*item) for item in zip(tf.unstack(logits_NhwK), sizes, strict=True)])

    def _label_fused(self, logits_NhwK: tf.Tensor, sizes: Sequence[tuple[int, int]]) -> Labels:
        """As many frames at once as the GPU has room for; always as many, so that shapes stay static."""
        parts: dict[int, Labels] = {}
        for size in dict.fromkeys(sizes):
            indices = [index for index, other in enumerate(sizes) if other == size]
            group = max(1, min(self._batch_size, _FUSED_LOGITS // (size[0] * size[1] * self._n_classes)))
            for start in range(0, len(indices), group):
                chosen = indices[start : start + group]
                padded = chosen + chosen[:1] * (group - len(chosen))
                labels = [np.asarray(array) for array in label_fused(tf.gather(logits_NhwK, padded), *size)]
                for position, index in enumerate(chosen):
                    parts[index] = one_frame(*(array[position] for array in labels))
        return concatenate([parts[index] for index in range(len(sizes))])

    def _label_tiled(self, image_HWC: np.ndarray, size: tuple[int, int]) -> Labels:
        """Blends the logits of a frame's windows: their mean, weighted by the distance from the window's border."""
        assert self._tiling
        height_px, width_px = image_HWC.shape[:2]
        window_height_px, window_width_px = self._tiling.window
        missing = ((0, max(0, window_height_px - height_px)), (0, max(0, window_width_px - width_px)), (0, 0))
        image_HWC = np.pad(image_HWC, missing, mode="edge")
        padded_height_px, padded_width_px = image_HWC.shape[:2]
        corners = self._tiling.corners(padded_height_px, padded_width_px)
        weights_hw = self._tiling.weights()
        sums = tf.Variable(tf.zeros((padded_height_px * padded_width_px, self._n_classes)))
        total_HW = np.zeros((padded_height_px, padded_width_px), np.float32)

        def weighted(batch: Sequence[tuple[int, int]]) -> list[tf.Tensor]:
            windows = [image_HWC[y : y + window_height_px, x : x + window_width_px] for y, x in batch]
            return tf.unstack(self._logits(np.stack(windows)) * weights_hw[..., None])[: len(batch)]

        for group in _cut(corners, self._batch_size * self._n_batches):  # all at once would fill memory
            updates = self._threads.map(weighted, _cut(group, self._batch_size))
            for (y, x), update in zip(group, chain.from_iterable(updates), strict=True):
                # No pixel twice in one call, so the order of the sums is fixed, on a GPU too.
                rows = np.arange(y, y + window_height_px)[:, None] * padded_width_px
                rows = rows + np.arange(x, x + window_width_px)
                sums.scatter_add(tf.IndexedSlices(tf.reshape(update, (-1, self._n_classes)), rows.ravel()))
                total_HW[y : y + window_height_px, x : x + window_width_px] += weights_hw

        logits = tf.reshape(sums, (padded_height_px, padded_width_px, self._n_classes)) / total_HW[..., None]
        return self._label_logits(logits[None, :height_px, :width_px], [size])


def _cut(items: Any, n_items: int) -> list[Any]:
    return [items[start : start + n_items] for start in range(0, len(items), n_items)]


def _predict(model: Any, images_BHWC: tf.Tensor, *, flip: bool) -> tf.Tensor:
    logits_BhwK = model(images_BHWC, training=False)
    if not flip:
        return logits_BhwK
    mirrored_BhwK = model(tf.reverse(images_BHWC, [2]), training=False)
    return (logits_BhwK + tf.reverse(mirrored_BhwK, [2])) / 2
