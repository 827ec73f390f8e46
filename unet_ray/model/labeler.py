"""Frames to labels: the network, compiled for one batch size, on the whole frame or on windows of it.

A GPU has code of its own, `gpu_labels`.

Shapes: `B` batch, `N` frames, `H` height px, `W` width px, `C` colour, `K` classes; `h`, `w` the size of the logits.

What a frame gets depends on nothing but the frame: not on its neighbours, its place, or the batch.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import Any

import numpy as np

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # its notices of every process name no trouble of the user's

import tensorflow as tf

from unet_ray.model.bundle import Bundle
from unet_ray.model.gpu_labels import GpuLabeler
from unet_ray.model.label_options import LabelOptions
from unet_ray.model.labels import Labels, concatenate, label_frames, label_ids, predicted_logits
from unet_ray.model.onnx_labels import OnnxLogits
from unet_ray.pixels.preprocessing import frame_box


class Labeler:
    """A bundle's network, compiled for one batch size and precision, and what turns its logits into labels."""

    def __init__(self, bundle: Bundle, options: LabelOptions) -> None:
        """Builds the network of a trained model."""
        config = bundle.model_config
        self.model_size = config.image_size
        self._network_size = options.tiling.window if options.tiling else self.model_size
        height_px, width_px = self._network_size
        self._n_classes = config.n_classes
        self._mask_size = options.mask_size
        self._preprocessing = config.preprocessing
        self._tiling = options.tiling
        self._temperature = bundle.temperature or 1.0
        self.gpu: GpuLabeler | None = None
        self._onnx = OnnxLogits(bundle, self._network_size, options) if bundle.onnx else None
        predict = None if bundle.onnx else _keras_function(bundle, self._network_size, options)
        if options.device == "gpu" and predict is not None:
            size, n_classes = self._network_size, self._n_classes
            self.gpu = GpuLabeler(predict, size, n_classes, options, temperature=self._temperature)
            return
        # A batch for each thread, never threads within one: oneDNN on AVX2 and Eigen (half precision where oneDNN has
        # none) cut sums by their number, and a frame's last bits would depend on it. As fast: 96x128, 32 filters,
        # float32, two threads: 48 to 53 ms a frame either way (TF 2.21, 2 cores with AVX2, 2026-11-24).
        self._n_batches = options.n_threads
        self._threads = ThreadPoolExecutor(self._n_batches)
        self._batch_size = -(-options.batch_size // self._n_batches)
        # On 2 cores at 96x128 in bfloat16: 171 img/s; with XLA fewer (float32: 58 against 91); `predict` 49.
        signature = [tf.TensorSpec((self._batch_size, height_px, width_px, 3), tf.uint8)]
        self._network = predict and tf.function(predict, input_signature=signature, autograph=False)

    @property
    def note(self) -> str | None:
        """What a person should know of the work so far; None where it goes as it was meant to."""
        return self.gpu.note if self.gpu else None

    def warm_up(self) -> None:
        """Compiles the network, so that the first frame does not wait for it."""
        if self.gpu:
            self.gpu.warm_up()
        else:
            self._logits(np.zeros((self._batch_size, *self._network_size, 3), np.uint8))

    def label(self, images: Sequence[np.ndarray] | np.ndarray, sizes: Sequence[tuple[int, int]]) -> Labels:
        """Labels N frames.

        Args:
            images: uint8 RGB: [N, h, w, 3] of the network's size, or with `tiling` frames of any size.
            sizes: the frames' own (height, width).
        """
        extents = [self.extent(size) for size in sizes]
        mask_sizes = sizes if self._mask_size == "native" else extents
        if self.gpu:
            return self.gpu.label(images, mask_sizes, extents)
        if self._tiling:
            return concatenate([self._label_tiled(*item) for item in zip(images, mask_sizes, strict=True)])
        batches = (_cut(items, self._batch_size) for items in (images, mask_sizes, extents))
        return concatenate(list(self._threads.map(self._label_batch, *batches)))

    def extent(self, size: tuple[int, int]) -> tuple[int, int]:
        """The part of the network's input, from the top left, that shows a frame of a size."""
        return frame_box(size, self.model_size, self._preprocessing)[2:]

    def _label_batch(
        self,
        images_NHWC: Sequence[np.ndarray] | np.ndarray,
        sizes: Sequence[tuple[int, int]],
        extents: Sequence[tuple[int, int]],
    ) -> Labels:
        scores = np.asarray(self._logits(np.asarray(images_NHWC)))
        # A network as ONNX may give less than its input has.
        scale = [out_px / in_px for out_px, in_px in zip(scores.shape[1:3], self._network_size, strict=True)]
        parts = [(height_px * scale[0], width_px * scale[1]) for height_px, width_px in extents]
        if self._onnx and self._onnx.gives_ids:
            frames = zip(scores, sizes, parts, strict=False)  # those that fill the batch up come last
            return concatenate([label_ids(*frame, self._n_classes) for frame in frames])
        return label_frames(scores, sizes, parts, temperature=self._temperature)

    def _logits(self, images_NHWC: np.ndarray) -> Any:
        """At most a batch of images to the logits of a whole batch [B, h, w, K]: those of the padding come last."""
        padding = ((0, self._batch_size - len(images_NHWC)), (0, 0), (0, 0), (0, 0))
        padded_BHWC = np.pad(images_NHWC, padding)
        if self._onnx:
            return self._onnx(padded_BHWC)
        assert self._network
        return self._network(tf.constant(padded_BHWC))

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
            logits_BhwK = self._logits(np.stack(windows))
            if logits_BhwK.shape[1:3] != (window_height_px, window_width_px):  # of a network made elsewhere
                logits_BhwK = tf.image.resize(logits_BhwK, (window_height_px, window_width_px))
            return tf.unstack(logits_BhwK * weights_hw[..., None])[: len(batch)]

        for group in _cut(corners, self._batch_size * self._n_batches):  # all at once would fill memory
            updates = self._threads.map(weighted, _cut(group, self._batch_size))
            for (y, x), update in zip(group, chain.from_iterable(updates), strict=True):
                # No pixel twice in one call, so the order of the sums is fixed.
                rows = np.arange(y, y + window_height_px)[:, None] * padded_width_px
                rows = rows + np.arange(x, x + window_width_px)
                sums.scatter_add(tf.IndexedSlices(tf.reshape(update, (-1, self._n_classes)), rows.ravel()))
                total_HW[y : y + window_height_px, x : x + window_width_px] += weights_hw

        logits = tf.reshape(sums, (padded_height_px, padded_width_px, self._n_classes)) / total_HW[..., None]
        logits_NHWK = logits[None, :height_px, :width_px].numpy()
        return label_frames(logits_NHWK, [size], temperature=self._temperature)


def _keras_function(bundle: Bundle, size: tuple[int, int], options: LabelOptions) -> Callable[[tf.Tensor], tf.Tensor]:
    model = bundle.build_model(dtype_policy=options.precision, image_size=size)
    return functools.partial(predicted_logits, model, tta=options.tta)


def _cut(items: Any, n_items: int) -> list[Any]:
    return [items[start : start + n_items] for start in range(0, len(items), n_items)]
