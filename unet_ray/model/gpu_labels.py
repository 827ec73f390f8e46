"""Frames to labels on a GPU: batches of one static shape, each on its way before the one before it is read back.

Shapes: `B` batch, `N` frames, `G` frames that are labelled together, `H` height px, `W` width px, `C` colour, `K`
classes; `h`, `w` the size of the logits or of a window.
"""

from __future__ import annotations

import os
import socket
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # its notices of every process name no trouble of the user's

import tensorflow as tf

from unet_ray.messages import count
from unet_ray.model.interpolation import padded_lookup, padded_px
from unet_ray.model.label_options import LabelOptions
from unet_ray.model.labels import Labels, concatenate, label_fused, one_frame

FUSED_LOGITS = 2**26
"""Logits at the frame's size that a GPU holds at once: 256 MB."""

READERS = 4
"""Threads that wait for the GPU: for two batches of each block of frames that an actor has at once."""

T = TypeVar("T")
R = TypeVar("R")
Size = tuple[int, int]
Pending = list[tuple[list[int], list[tuple[Sequence[int], Size]], Sequence[tf.Tensor]]]
"""Labels that the GPU is about to make: the frames' places in their batch, their extents and sizes, and the arrays."""


@dataclass(frozen=True, kw_only=True)
class _Compiled:
    """What TensorFlow compiles for one size of a batch."""

    batch_size: int
    network: Callable[..., tf.Tensor]
    blend: Callable[..., tf.Tensor]


class GpuLabeler:
    """A network that is compiled for one batch size on a GPU, with what makes labels of its logits."""

    def __init__(
        self,
        predict: Callable[[tf.Tensor], tf.Tensor],
        network_size: tuple[int, int],
        n_classes: int,
        options: LabelOptions,
        *,
        temperature: float = 1.0,
    ) -> None:
        """Takes the network as a function of uint8 [B, h, w, C] that returns logits [B, h, w, K].

        Confidences are of the logits divided by `temperature`.
        """
        self._temperature = np.float32(temperature)
        self._predict, self._network_size, self._n_classes = predict, network_size, n_classes
        self._tiling, self._xla = options.tiling, options.xla
        self.label_logits = self._function(label_fused)
        self._compiled = self._compile(options.batch_size)
        self._halving = threading.Lock()
        self._readers = ThreadPoolExecutor(READERS)
        self.note: str | None = None
        """What a person should know of it: that a batch did not fit."""

    def warm_up(self) -> None:
        """Compiles the network, so that the first frame does not wait for it."""
        if self._tiling is None:
            height_px, width_px = self._network_size
            self.label(np.zeros((1, height_px, width_px, 3), np.uint8), [self._network_size])

    def label(
        self,
        images: Sequence[np.ndarray] | np.ndarray,
        sizes: Sequence[tuple[int, int]],
        extents: Sequence[tuple[int, int]] | None = None,
    ) -> Labels:
        """Labels N frames at the sizes of their masks; with half the batch where the memory does not do.

        `extents` are the parts of the images that show the frames, from the top left; by default all of them.
        """
        compiled, extents = self._compiled, extents or [self._network_size] * len(sizes)
        try:
            return self._label(compiled, images, sizes, extents)
        except tf.errors.ResourceExhaustedError:
            if not self._halve(compiled):
                raise
        return self._label(
            self._compiled, images, sizes, extents
        )  # here, as the error would hold what the first try took

    def _label(
        self,
        compiled: _Compiled,
        images: Any,
        sizes: Sequence[tuple[int, int]],
        extents: Sequence[tuple[int, int]],
    ) -> Labels:
        items: list[tuple[Any, ...]]
        submit: Callable[..., Pending]
        if self._tiling:
            items, submit = list(zip(images, sizes, strict=True)), self.submit_tiled
        else:
            starts = range(0, len(sizes), compiled.batch_size)
            spans = [slice(start, start + compiled.batch_size) for start in starts]
            items, submit = [(images[span], sizes[span], extents[span]) for span in spans], self.submit
        labels = overlapped(lambda item: submit(compiled, *item), self.read, items, self._readers)
        return concatenate(list(labels))

    def submit(
        self,
        compiled: _Compiled,
        images: Any,
        sizes: Sequence[tuple[int, int]],
        extents: Sequence[tuple[int, int]],
    ) -> Pending:
        """Sends at most a batch to the GPU and waits for nothing; it is filled up, so that its shape stays."""
        images_NHWC = np.asarray(images)
        padding = ((0, compiled.batch_size - len(images_NHWC)), (0, 0), (0, 0), (0, 0))
        logits_BhwK = compiled.network(tf.constant(np.pad(images_NHWC, padding)))
        return self._submit_logits(logits_BhwK, extents, sizes)

    def submit_tiled(self, compiled: _Compiled, image_HWC: np.ndarray, size: tuple[int, int]) -> Pending:
        """Sends one frame to the GPU, which cuts it into windows, and blends their logits, weighted by the distance
        from the window's border."""
        assert self._tiling
        frame_size = image_HWC.shape[:2]
        covered = [max(px, window_px) for px, window_px in zip(frame_size, self._tiling.window, strict=True)]
        image_HWC = _padded(image_HWC, covered, mode="edge")
        totals = self._tiling.totals(*covered)
        shape = [padded_px(px) for px in covered]
        image_on_gpu = tf.constant(_padded(image_HWC, shape, mode="constant"))
        sums_HWK = tf.zeros((*shape, self._n_classes))
        corners = np.array(self._tiling.corners(*covered), np.int32)
        for start in range(0, len(corners), compiled.batch_size):
            group = corners[start : start + compiled.batch_size]
            missing = (0, compiled.batch_size - len(group))
            counts_B = np.pad(np.ones(len(group), np.float32), missing)
            sums_HWK = compiled.blend(sums_HWK, image_on_gpu, np.pad(group, (missing, (0, 0))), counts_B)
        rows_H, columns_W = (
            tf.constant(np.pad(total, (0, px - len(total)), constant_values=1))
            for total, px in zip(totals, shape, strict=True)
        )
        logits_HWK = sums_HWK / (rows_H[:, None] * columns_W)[..., None]
        return self._submit_logits(logits_HWK[None], [frame_size], [size])

    def _submit_logits(
        self, logits_NhwK: tf.Tensor, extents: Sequence[Sequence[int]], sizes: Sequence[tuple[int, int]]
    ) -> Pending:
        """As many frames at once as the GPU has room for; always as many, so that shapes stay static."""
        steps: dict[tuple[int, int], list[int]] = {}
        for index, (height_px, width_px) in enumerate(sizes):
            steps.setdefault((padded_px(height_px), padded_px(width_px)), []).append(index)
        pending: Pending = []
        for (height_px, width_px), indices in steps.items():
            n_together = max(1, min(logits_NhwK.shape[0], FUSED_LOGITS // (height_px * width_px * self._n_classes)))
            for start in range(0, len(indices), n_together):
                chosen = indices[start : start + n_together]
                padded = chosen + chosen[:1] * (n_together - len(chosen))
                frames = [(extents[index], sizes[index]) for index in padded]
                arrays = self.label_logits(tf.gather(logits_NhwK, padded), *_lookups(frames), self._temperature)
                pending.append((chosen, frames[: len(chosen)], arrays))
        return pending

    def read(self, pending: Pending) -> Labels:
        """Waits for the GPU, and returns the labels of a batch in its order."""
        parts: dict[int, Labels] = {}
        for indices, frames, arrays in pending:
            masks_GHW, pixels_GK, units_GK, low_margins_G, grids_Ghw = (np.asarray(array) for array in arrays)
            for position, (index, (extent, (height_px, width_px))) in enumerate(zip(indices, frames, strict=True)):
                parts[index] = one_frame(
                    np.ascontiguousarray(masks_GHW[position, :height_px, :width_px]),
                    pixels_GK[position],
                    units_GK[position],
                    low_margins_G[position],
                    np.ascontiguousarray(grids_Ghw[position, : extent[0], : extent[1]]),
                )
        return concatenate([parts[index] for index in range(len(parts))])

    def _halve(self, tried: _Compiled) -> bool:
        """Whether another try is worth it: the batch is half of what was tried, from now on or already."""
        with self._halving:
            if self._compiled is tried and self.note is None and tried.batch_size > 1:
                self._compiled = self._compile(tried.batch_size // 2)
                what = count(tried.batch_size, "window" if self._tiling else "frame")
                self.note = (
                    f"a batch of {what} does not fit a GPU of node {socket.gethostname()}; there it is "
                    f"{self._compiled.batch_size} from now on (--batch-size)"
                )
            return self._compiled is not tried

    def _compile(self, batch_size: int) -> _Compiled:
        shape = (batch_size, *self._network_size, 3)
        return _Compiled(
            batch_size=batch_size,
            network=self._function(self._predict, input_signature=[tf.TensorSpec(shape, tf.uint8)]),
            blend=self._function(self._blend),
        )

    def _function(self, function: Callable[..., Any], **options: Any) -> Any:
        return tf.function(function, jit_compile=self._xla, autograph=False, **options)

    def _blend(self, sums_HWK, image_HWC, corners_B2, counts_B):
        """Adds the weighted logits of some windows of a frame to their sums, one after the other: always in one order.

        `counts_B` is 1 for a window and 0 for what fills the batch up.
        """
        assert self._tiling
        (height_px, width_px), n_classes = self._tiling.window, self._n_classes
        rows_Bh = corners_B2[:, :1] + tf.range(height_px)
        columns_Bw = corners_B2[:, 1:] + tf.range(width_px)
        places_Bhw = rows_Bh[:, :, None] * image_HWC.shape[1] + columns_Bw[:, None, :]
        windows_BhwC = tf.gather(tf.reshape(image_HWC, (-1, 3)), places_Bhw)
        weights_Bhw1 = counts_B[:, None, None, None] * self._tiling.weights()[..., None]
        updates_BhwK = self._predict(windows_BhwC) * weights_Bhw1
        set_slice = _set_slice_compiled if self._xla else _set_slice
        size = [height_px, width_px, n_classes]

        def add(index, sums_HWK):
            corner = tf.concat([corners_B2[index], [0]], 0)
            return index + 1, set_slice(sums_HWK, tf.slice(sums_HWK, corner, size) + updates_BhwK[index], corner, size)

        n_windows = corners_B2.shape[0]
        return tf.while_loop(lambda index, _: index < n_windows, add, (0, sums_HWK))[1]


def overlapped(
    submit: Callable[[Any], T], read: Callable[[T], R], items: Iterable[Any], readers: ThreadPoolExecutor
) -> Iterator[R]:
    """Yields in order what is read of each item that was submitted; the next is on its way meanwhile.

    A batch is read by another thread, which asks for it before the next one is submitted: TensorFlow's copy to the host
    waits for all that the GPU has been given when it is asked for (`GPUUtil::CopyGPUTensorToCPU`, 2.21).
    """
    reading: deque[Future[R]] = deque()
    try:
        for item in items:
            reading.append(readers.submit(read, submit(item)))
            if len(reading) > 1:
                yield reading.popleft().result()
        while reading:
            yield reading.popleft().result()
    finally:
        wait(reading)  # after an error, too: the memory is then free for another try


def _lookups(frames: Sequence[tuple[Sequence[int], Size]]) -> tuple[list[np.ndarray], list[np.ndarray], np.ndarray]:
    """The lookups of some frames of one step, down and across, as `label_fused` takes them, and their sizes.

    A frame is the part of the logits that shows it, and the size of its mask.
    """
    lookups: list[list[np.ndarray]] = []
    for axis in (0, 1):
        of_frames = [padded_lookup(extent[axis], size[axis]) for extent, size in frames]
        lookups.append([np.stack(arrays) for arrays in zip(*of_frames, strict=True)])
    return lookups[0], lookups[1], np.array([size for _, size in frames], np.int32)


def _padded(image_HWC: np.ndarray, size: Sequence[int], **how: Any) -> np.ndarray:
    missing = [(0, px - has_px) for px, has_px in zip(size, image_HWC.shape, strict=False)]
    return np.pad(image_HWC, [*missing, (0, 0)], **how)


def _set_slice_compiled(array, update, begin, size):
    """XLA wants a slice's bounds to be constants, but in its own operation (TensorFlow 2.21)."""
    from tensorflow.compiler.tf2xla.python import xla

    return xla.dynamic_update_slice(array, update, begin)


def _set_slice(array, update, begin, size):
    return tf.raw_ops.TensorStridedSliceUpdate(
        input=array, begin=begin, end=begin + size, strides=[1] * len(size), value=update
    )
