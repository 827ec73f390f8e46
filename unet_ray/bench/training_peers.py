"""Training and ingest beside what people would use instead: our step and blocks, Keras' `fit`, `tf.data`.

All train on the same frames in memory from the same weights. `loss` is that of the first batch before the first step,
without dropout, which draws other numbers in each library: by it one sees that they compute the same.

Shapes: `B` batch, `H` height px, `W` width px, `C` colour, `K` classes.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from multiprocessing import get_context
from typing import Any

import numpy as np

from unet_ray.bench.peers import list_frames, load_frame

WARM_UP_STEPS = 3


def some_pairs(
    images: str, masks: str, n_pairs: int, size: Sequence[int], class_set_name: str
) -> tuple[np.ndarray, np.ndarray]:
    """Returns frames, uint8 [N, H, W, 3], and encoded masks, uint8 [N, H, W], of the network's size."""
    from unet_ray.classes import PRESETS
    from unet_ray.pairs.pairs import find_pairs, load_pair
    from unet_ray.pixels.images import resize_nearest

    pairs = find_pairs(images, masks).pairs
    loaded = [load_pair(pairs[index % len(pairs)], PRESETS[class_set_name], "channel-max") for index in range(n_pairs)]
    return tuple(np.stack([resize_nearest(pair[side], *size) for pair in loaded]) for side in (0, 1))  # type: ignore[return-value]


def our_step(
    *,
    images: str,
    masks: str,
    model: str,
    batch_size: int,
    steps: int,
    threads: int,
    device: str,
    precision: str,
    n_workers: int = 1,
) -> dict[str, float]:
    """The train step of `unet-ray train` on one worker, or on one of several, which `TF_CONFIG` names."""
    from unet_ray.model.bundle import read_bundle
    from unet_ray.model.devices import choose_policy, configure_tensorflow
    from unet_ray.training import steps as ours
    from unet_ray.training.optimizer import make_optimizer

    configure_tensorflow(device, threads, op_threads=threads)
    strategy = ours.start_strategy(n_workers, "cpu")
    bundle = read_bundle(model)
    net = bundle.build_model(dtype_policy=choose_policy(precision, device))
    image_BHWC, mask_BHW = some_pairs(images, masks, batch_size, net.input_shape[1:3], bundle.class_set.name)
    predict = ours.Predictor(net)
    loss = predict.loss(predict(image_BHWC, mask_BHW)[2])
    step = ours.TrainStep(net, make_optimizer("adam", 1e-3, 0.0), strategy, loss="ce")
    started = 0.0
    for number in range(WARM_UP_STEPS + steps):
        if number == WARM_UP_STEPS:
            started = time.perf_counter()
        float(step(image_BHWC, mask_BHW, ours.dropout_seeds(0, number, 0, step.n_dropouts)).loss)
    return {"images_per_s": steps * batch_size / (time.perf_counter() - started), "loss": loss}


def steps_apart(*, cores: Sequence[int], **options: Any) -> dict[str, float]:
    """`our_step` on the first core alone; then on every core at once, in processes that have nothing in common; then
    in such that sum their gradients, as workers do, without Ray."""
    alone, *_ = _on_cores(cores[:1], options)
    apart = sum(_on_cores(cores, options))
    return {"one_per_s": alone, "all_per_s": apart, "summing_per_s": sum(_on_cores(cores, options, summing=True))}


def _on_cores(cores: Sequence[int], options: dict[str, Any], *, summing: bool = False) -> list[float]:
    addresses = []
    with ExitStack() as stack:
        for _ in cores if summing else ():
            free = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            addresses.append(f"127.0.0.1:{free.getsockname()[1]}")
    with ProcessPoolExecutor(len(cores), get_context("spawn")) as pool:
        return list(pool.map(_on_core, range(len(cores)), cores, [options] * len(cores), [addresses] * len(cores)))


def _on_core(rank: int, core: int, options: dict[str, Any], addresses: list[str]) -> float:
    os.sched_setaffinity(0, {core})
    if addresses:
        task = {"type": "worker", "index": rank}
        os.environ["TF_CONFIG"] = json.dumps({"cluster": {"worker": addresses}, "task": task})
    return our_step(**options, threads=1, n_workers=max(1, len(addresses)))["images_per_s"]


def keras_step(*, images: str, masks: str, model: str, batch_size: int, steps: int, threads: int) -> dict[str, float]:
    """The notebook's training: `fit` in float32 over a cached data set."""
    import tensorflow as tf

    from unet_ray.model.devices import configure_tensorflow

    configure_tensorflow("cpu", threads, op_threads=threads)
    from unet_ray.model.bundle import read_bundle

    bundle = read_bundle(model)
    net = bundle.build_model(dtype_policy="float32")
    image_BHWC, mask_BHW = some_pairs(images, masks, batch_size, net.input_shape[1:3], bundle.class_set.name)
    _compile(net)
    loss = float(net.evaluate(image_BHWC, mask_BHW, batch_size=batch_size, verbose=0)[0])
    dataset = tf.data.Dataset.from_tensor_slices((image_BHWC, mask_BHW)).cache().repeat().batch(batch_size)
    net.fit(dataset, steps_per_epoch=WARM_UP_STEPS, epochs=1, verbose=0)
    # One call, of two epochs: what `fit` does once is in the first, and is not counted.
    clock = _epoch_clock()
    net.fit(dataset, steps_per_epoch=steps, epochs=2, verbose=0, callbacks=[clock])
    return {"images_per_s": steps * batch_size / clock.seconds[-1], "loss": loss}


def _compile(net: Any) -> None:
    import keras

    net.compile(
        optimizer="adam", loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"]
    )


def _epoch_clock() -> Any:
    import keras

    class Clock(keras.callbacks.Callback):
        def __init__(self) -> None:
            super().__init__()
            self.seconds: list[float] = []

        def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
            self._started = time.perf_counter()

        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            self.seconds.append(time.perf_counter() - self._started)

    return Clock()


def keras_fit(
    *, images: str, masks: str, classes: str, out: str, size: Sequence[int], epochs: int, batch_size: int,
    n_filters: int, depth: int, threads: int, seed: int,
) -> dict[str, float]:  # fmt: skip
    """The notebook, from the files to a model that is kept: read, resize, cache, shuffle, `fit` in float32.

    Masks are grey PNG files whose values are the classes' ids. The seed decides weights, order and dropout.
    """
    import tensorflow as tf

    from unet_ray.model.devices import configure_tensorflow

    configure_tensorflow("cpu", threads, op_threads=threads)
    import keras

    from unet_ray.config import load_class_set
    from unet_ray.model.architecture import UnetConfig
    from unet_ray.model.bundle import save_bundle
    from unet_ray.model.unet import build_unet

    keras.utils.set_random_seed(seed)
    class_set = load_class_set(classes)
    config = UnetConfig(
        image_height_px=size[0], image_width_px=size[1], n_classes=class_set.n_classes, n_filters=n_filters, depth=depth
    )

    def load(image_path: Any, mask_path: Any) -> Any:
        mask_HW1 = tf.image.decode_png(tf.io.read_file(mask_path), channels=1)
        return load_frame(image_path, size), tf.image.resize(mask_HW1, size, method="nearest")

    dataset = tf.data.Dataset.from_tensor_slices((list_frames(images), list_frames(masks))).map(load)
    net = build_unet(config, seed=seed, dtype_policy="float32")
    _compile(net)
    history = net.fit(dataset.cache().shuffle(500).batch(batch_size), epochs=epochs, verbose=0)
    save_bundle(out, net, config, class_set, {})
    return {"loss": float(history.history["loss"][-1])}


# --- ingest ---


def digest_of(pairs: Iterable[tuple[np.ndarray, np.ndarray]]) -> str:
    """Returns a digest of frames and masks, in order."""
    hasher = hashlib.sha256()
    for image_HWC, mask_HW in pairs:
        hasher.update(np.ascontiguousarray(image_HWC).tobytes() + np.ascontiguousarray(mask_HW).tobytes())
    return hasher.hexdigest()


def our_ingest(*, images: str, masks: str, size: Sequence[int], threads: int) -> dict[str, Any]:
    """Pairs to blocks in the object store, with everything that `unet-ray train` looks at in them; Ray is up before."""
    from unet_ray.classes import PRESETS
    from unet_ray.cluster import connection as cluster
    from unet_ray.pairs.pairs import find_pairs
    from unet_ray.training.batches import IngestPlan
    from unet_ray.training.blocks import ingest

    cluster.connect()
    plan = IngestPlan(
        class_set=PRESETS["carla23"], mask_format="channel-max", image_size=(size[0], size[1]), keep_full_mask=False
    )
    pairs = find_pairs(images, masks).pairs
    ingest(pairs[: 4 * threads], plan)  # starts Ray's workers
    started = time.perf_counter()
    reader = ingest(pairs, plan).frames.open()
    rate = len(pairs) / (time.perf_counter() - started)
    return {"pairs_per_s": rate, "digest": digest_of(map(reader.read, range(len(pairs))))}


def tfdata_ingest(*, images: str, masks: str, size: Sequence[int], batch_size: int, threads: int) -> dict[str, Any]:
    """The same by `tf.data`, parallel as it sees fit."""
    import tensorflow as tf

    from unet_ray.model.devices import configure_tensorflow

    configure_tensorflow("cpu", threads, op_threads=threads)
    paths = (list_frames(images), list_frames(masks))

    def load(image_path: Any, mask_path: Any) -> Any:
        mask_HWC = tf.image.decode_png(tf.io.read_file(mask_path), channels=3)
        return load_frame(image_path, size), tf.image.resize(tf.reduce_max(mask_HWC, -1)[..., None], size, "nearest")

    def batches(part: tuple[list[str], list[str]]) -> Any:
        dataset = tf.data.Dataset.from_tensor_slices(part).map(load, num_parallel_calls=tf.data.AUTOTUNE)
        return dataset.batch(batch_size).prefetch(tf.data.AUTOTUNE).as_numpy_iterator()

    list(batches((paths[0][:8], paths[1][:8])))
    started = time.perf_counter()
    blocks = list(batches(paths))
    rate = len(paths[0]) / (time.perf_counter() - started)
    # Encoded as ours: the place among the classes.
    pairs = (
        (image, mask[..., 0]) for images_B, masks_B in blocks for image, mask in zip(images_B, masks_B, strict=True)
    )
    return {"pairs_per_s": rate, "digest": digest_of(_encoded(pairs))}


def _encoded(pairs: Iterable[tuple[np.ndarray, np.ndarray]]) -> Iterable[tuple[np.ndarray, np.ndarray]]:
    from unet_ray.classes import PRESETS

    return ((image, PRESETS["carla23"].encode_ids(mask)) for image, mask in pairs)
