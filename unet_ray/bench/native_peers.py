"""What people would write for masks of the frames' own size with TensorFlow alone: logits resized, the largest, PNG.

Shapes: `B` batch, `H`, `W` the frame's px, `h`, `w` the network's px, `C` colour, `K` classes.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from PIL import Image

from unet_ray.bench.peers import MaskFile, list_frames


def mask_png(mask_HW: np.ndarray) -> bytes:
    """A mask as Pillow's fastest PNG."""
    buffer = io.BytesIO()
    Image.fromarray(mask_HW).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def tfdata_native(
    *, frames: str, model: str, out: str, batch_size: int, threads: int, precision: str
) -> dict[str, Any]:
    """`peers.tfdata_loop` with `tf.image.resize` of the logits, a frame a thread."""
    import tensorflow as tf

    from unet_ray.model.devices import configure_tensorflow

    configure_tensorflow("cpu", threads, op_threads=threads)
    from unet_ray.model.bundle import read_bundle

    net = read_bundle(model).build_model(dtype_policy=precision)
    size = net.input_shape[1:3]

    @tf.function(input_signature=[tf.TensorSpec((batch_size, *size, 3), tf.uint8)], autograph=False)
    def predict(image_BhwC: Any) -> Any:
        return net(image_BhwC, training=False)

    @tf.function(reduce_retracing=True, autograph=False)
    def paint(logits_hwK: Any, size_HW: Any) -> Any:
        return tf.cast(tf.argmax(tf.image.resize(logits_hwK, size_HW), axis=-1), tf.uint8)

    file = MaskFile(out, encode=mask_png)
    with ThreadPoolExecutor(threads) as pool:
        for path_B, image_BhwC, size_B2 in _batches(list_frames(frames), size, batch_size):
            missing = batch_size - len(path_B)
            logits_BhwK = predict(tf.pad(image_BhwC, [[0, missing], [0, 0], [0, 0], [0, 0]]))
            masks = pool.map(paint, logits_BhwK[: len(path_B)], size_B2)
            file.add([path.decode() for path in path_B.numpy()], [mask_HW.numpy() for mask_HW in masks])
    file.close()
    return {}


def _batches(paths: Sequence[str], size: Sequence[int], batch_size: int) -> Iterator[Any]:
    """Paths, pictures of the network's size, and each frame's own height and width."""
    import tensorflow as tf

    def load(path: Any) -> Any:
        image_HWC = tf.io.decode_image(tf.io.read_file(path), channels=3, expand_animations=False)
        return path, tf.image.resize(image_HWC, size, method="nearest"), tf.shape(image_HWC)[:2]

    auto = tf.data.AUTOTUNE
    dataset = tf.data.Dataset.from_tensor_slices(paths).map(load, num_parallel_calls=auto, deterministic=False)
    yield from dataset.batch(batch_size).prefetch(auto)
