"""The network at work: frames in, masks, class counts and confidences out, compiled once per size.

Shapes: `B` batch, `N` frames, `H` height px, `W` width px, `C` colour, `K` classes; `h`, `w` the size of the logits.

A pixel's confidence is the softmax of its class. A frame's confidence is the mean over its pixels, a class's the mean
over the pixels labelled with it. A pixel has a low margin where the probabilities of its two best classes lie within
`LOW_MARGIN`. What a frame gets depends on nothing but the frame: not on its neighbours, its place, or the batch.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from typing import Any

import numpy as np

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # its notices of every process name no trouble of the user's

import tensorflow as tf

from unet_ray.labelling.tiling import Tiling
from unet_ray.model import devices
from unet_ray.model.bundle import Bundle

LOW_MARGIN = 0.2
"""Two best probabilities that lie within this are a low margin: the pixel could as well be the other class."""

_SIZE_STEP_PX = 64
"""Frame sizes are rounded up to this for compiling (1 s each), so that an archive of many sizes compiles few times."""

_FUSED_LOGITS = 2**26
"""Logits at the frame's size that a GPU holds at once: 256 MB."""


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


def configure_tensorflow(device: str, n_threads: int, *, op_threads: int = 1) -> None:
    """Sets the device and the threads of this process; must come before TensorFlow computes anything.

    Ray sets OMP_NUM_THREADS to an actor's CPUs and TensorFlow looks at all cores of the machine: neither is meant.

    Args:
        device: `gpu` or `cpu`.
        n_threads: threads that may run TensorFlow's operations.
        op_threads: threads of one operation. More than one, and some of its sums come out in an order that depends on
            how many: a frame's last bits would too. A `Labeler` spreads frames over its threads instead.

    Raises:
        UnusableGpu: the device is `gpu` and TensorFlow sees none.
    """
    tf.config.threading.set_intra_op_parallelism_threads(op_threads)
    tf.config.threading.set_inter_op_parallelism_threads(n_threads)
    if device == "cpu":
        tf.config.set_visible_devices([], "GPU")
        return
    devices.require_gpu()
    for gpu in tf.config.list_physical_devices("GPU"):
        tf.config.experimental.set_memory_growth(gpu, True)
    tf.config.experimental.enable_op_determinism()  # autotuning would choose another convolution in another run
    tf.config.experimental.enable_tensor_float_32_execution(False)  # `float32` means float32


class Labeler:
    """A bundle's network, compiled for one batch size and precision, and what turns its logits into labels."""

    def __init__(
        self,
        bundle: Bundle,
        *,
        precision: str,
        batch_size: int,
        mask_size: str = "native",
        tiling: Tiling | None = None,
        tta: str = "none",
        device: str = "cpu",
        n_threads: int = 1,
    ) -> None:
        """Builds the network.

        Args:
            bundle: the trained model.
            precision: `float32`, `bfloat16` or `float16`: of activations and weights; the last layer is float32.
            batch_size: frames (or windows) that are in the network at once; on a CPU, rounded up to a multiple of the
                threads, each of which takes its part.
            mask_size: `native` (the frame's own size) or `model` (the network's).
            tiling: show the network windows of the frame at its own scale instead of the frame, resized.
            tta: `flip` takes the mean of the logits with those of the mirrored images; `none` does not.
            device: `gpu` or `cpu`: on the former, XLA compiles the network too.
            n_threads: threads of a CPU, as given to `configure_tensorflow`.
        """
        config = bundle.model_config
        self.model_size = (config.image_height_px, config.image_width_px)
        self._network_size = tiling.window if tiling else self.model_size
        height_px, width_px = self._network_size
        sized = dataclasses.replace(config, image_height_px=height_px, image_width_px=width_px)
        model = dataclasses.replace(bundle, model_config=sized).build_model(dtype_policy=precision)
        self._n_classes = config.n_classes
        self._mask_size = mask_size
        self._tiling = tiling
        self._fused = device == "gpu"
        # A batch for each thread, never threads within one: oneDNN on AVX2 and Eigen (half precision where oneDNN has
        # none) cut sums by their number, and a frame's last bits would depend on it. As fast: 96x128, 32 filters,
        # float32, two threads: 48 to 53 ms a frame either way (TF 2.21, 2 cores with AVX2, 2026-11-24).
        self._n_batches = 1 if self._fused else n_threads
        self._threads = ThreadPoolExecutor(self._n_batches)
        self._batch_size = -(-batch_size // self._n_batches)
        # On 2 cores at 96x128 in bfloat16: 171 img/s; with XLA fewer (float32: 58 against 91); `predict` 49.
        self._network = tf.function(
            lambda images_BHWC: _predict(model, images_BHWC, flip=tta == "flip"),
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
            return _concatenate([self._label_tiled(*item) for item in zip(images, mask_sizes, strict=True)])
        batches = _cut(images, self._batch_size), _cut(mask_sizes, self._batch_size)
        return _concatenate(list(self._threads.map(self._label_batch, *batches)))

    def _label_batch(self, images_NHWC: Sequence[np.ndarray] | np.ndarray, sizes: Sequence[tuple[int, int]]) -> Labels:
        logits_BhwK = self._logits(np.asarray(images_NHWC))
        if self._mask_size == "model" and not self._fused:
            return _label_unscaled(logits_BhwK, len(sizes))
        return self._label_logits(logits_BhwK[: len(sizes)], sizes)

    def _logits(self, images_NHWC: np.ndarray) -> tf.Tensor:
        """At most a batch of images to the logits of a whole batch [B, h, w, K]: those of the padding come last."""
        padding = ((0, self._batch_size - len(images_NHWC)), (0, 0), (0, 0), (0, 0))
        return self._network(tf.constant(np.pad(images_NHWC, padding)))

    def _label_logits(self, logits_NhwK: tf.Tensor, sizes: Sequence[tuple[int, int]]) -> Labels:
        if self._fused:
            return self._label_fused(logits_NhwK, sizes)
        return _concatenate([_label_scanned(*item) for item in zip(tf.unstack(logits_NhwK), sizes, strict=True)])

    def _label_fused(self, logits_NhwK: tf.Tensor, sizes: Sequence[tuple[int, int]]) -> Labels:
        """As many frames at once as the GPU has room for; always as many, so that shapes stay static."""
        parts: dict[int, Labels] = {}
        for size in dict.fromkeys(sizes):
            indices = [index for index, other in enumerate(sizes) if other == size]
            group = max(1, min(self._batch_size, _FUSED_LOGITS // (size[0] * size[1] * self._n_classes)))
            for start in range(0, len(indices), group):
                chosen = indices[start : start + group]
                padded = chosen + chosen[:1] * (group - len(chosen))
                labels = [np.asarray(array) for array in _label_fused(tf.gather(logits_NhwK, padded), *size)]
                for place, index in enumerate(chosen):
                    parts[index] = _one_frame(*(array[place] for array in labels))
        return _concatenate([parts[index] for index in range(len(sizes))])

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

        for some in _cut(corners, self._batch_size * self._n_batches):  # all at once would fill memory
            updates = self._threads.map(weighted, _cut(some, self._batch_size))
            for (y, x), update in zip(some, chain.from_iterable(updates), strict=True):
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


def _label_scanned(logits_hwK: tf.Tensor, size: tuple[int, int]) -> Labels:
    """One frame on a CPU: row by row, so that the logits at the frame's size never lie in memory.

    At 23 classes, 96x128 to 480x640: 42 ms on two cores with `tf.image.resize`, softmax and top-2 over the whole
    frame, 9 ms on one core this way (2 cores, 2026-11-21).
    """
    mask_HW, confidence_HW, low_margins_H = _scan_to(logits_hwK, size)
    return _count(mask_HW, confidence_HW, low_margins_H.sum(), logits_hwK.shape[2])


def _label_unscaled(logits_NhwK: tf.Tensor, n_frames: int) -> Labels:
    """Where masks have the size of the logits: 0.7 ms of a core a frame, with `_scan` 1.7 (23 classes, 96x128)."""
    masks_Nhw, confidence_Nhw, low_margins_N = (array.numpy() for array in _scan_unscaled(logits_NhwK))
    n_classes = logits_NhwK.shape[3]
    found = zip(masks_Nhw[:n_frames], confidence_Nhw, low_margins_N, strict=False)
    return _concatenate([_count(mask, confidence, low, n_classes) for mask, confidence, low in found])


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
    return _one_frame(mask_HW, pixels_K, np.bincount(class_ids, sums, n_classes), low_margins)


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
def _label_fused(logits_GhwK, height_px: int, width_px: int):
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


def _one_frame(mask_HW: np.ndarray, pixels_K: np.ndarray, sums_K: np.ndarray, low_margins: Any) -> Labels:
    with np.errstate(invalid="ignore"):  # 0/0 is NaN: the class is absent
        confidence_K = sums_K / pixels_K
    return Labels(
        masks=[mask_HW],
        pixels_NK=pixels_K[None].astype(np.int64),
        confidence_NK=confidence_K[None].astype(np.float32),
        confidence_N=np.array([sums_K.sum() / mask_HW.size], np.float32),
        low_margin_share_N=np.array([low_margins / mask_HW.size], np.float32),
    )


def _concatenate(parts: Sequence[Labels]) -> Labels:
    return Labels(
        masks=[mask for part in parts for mask in part.masks],
        **{
            field.name: np.concatenate([getattr(part, field.name) for part in parts])
            for field in dataclasses.fields(Labels)
            if field.name != "masks"
        },
    )
