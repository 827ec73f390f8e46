"""What people would label an archive with instead: the notebook's loop, `tf.data` at its best, Ray's own pattern.

Each takes a folder of frames and a bundle, and writes one Parquet row a frame (`frame_id`, `mask`: uint8 rows of the
network's size), so that all do the same and their masks can be compared. They know no broken frame, no resuming and no
statistics: a frame that cannot be read ends them.

Shapes: `B` batch, `H` height px, `W` width px, `C` colour, `K` classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq


def frame_id(path: str) -> str:
    """The name by which rows are compared: drive and file."""
    return "/".join(Path(path).parts[-2:])


class MaskFile:
    """A Parquet file of masks; encoding and writing go on beside the next batch."""

    def __init__(self, out: str, encode: Callable[[np.ndarray], bytes] = np.ndarray.tobytes) -> None:
        self._encode = encode
        Path(out).mkdir(parents=True, exist_ok=True)
        self._schema = pa.schema([("frame_id", pa.string()), ("mask", pa.binary())])
        self._file = pq.ParquetWriter(Path(out) / "masks.parquet", self._schema, compression="zstd")
        self._beside = ThreadPoolExecutor(1)
        self._running: list[Future[None]] = []

    def add(self, paths: Sequence[str], masks: Iterable[np.ndarray]) -> None:
        """Adds a batch of masks [H, W]; the arrays are not to be changed afterwards."""
        self._running.append(self._beside.submit(self._write, paths, masks))

    def _write(self, paths: Sequence[str], masks: Iterable[np.ndarray]) -> None:
        rows = {"frame_id": list(map(frame_id, paths)), "mask": list(map(self._encode, masks))}
        self._file.write_table(pa.table(rows, schema=self._schema))

    def close(self) -> None:
        """Waits for what is still to be written."""
        for written in self._running:
            written.result()
        self._file.close()


def read_masks(out: str, *, at_most: int) -> tuple[int, dict[str, bytes]]:
    """Returns how many masks a contestant wrote, ours too, and of at most so many of them, by `frame_id`, the rows."""
    labels = ds.dataset(out, format="parquet")
    names = labels.to_table(columns=["frame_id"])["frame_id"].to_pylist()
    chosen = sorted(names)[:: -(-len(names) // at_most)]
    table = labels.to_table(columns=["frame_id", "mask"], filter=ds.field("frame_id").isin(chosen))
    return len(names), dict(zip(map(frame_id, table["frame_id"].to_pylist()), table["mask"].to_pylist(), strict=True))


def rows_of_bytes(mask: bytes) -> np.ndarray:
    """Returns a mask of rows of uint8 as it is, flat."""
    return np.frombuffer(mask, np.uint8)


def equal_share(
    ours: Mapping[str, bytes],
    theirs: Mapping[str, bytes],
    decode: Callable[[bytes], np.ndarray] = rows_of_bytes,
) -> float:
    """Returns the share of pixels with the same class in both; a mask that only one side has counts as unequal."""
    equal = total = 0
    nothing = np.empty(0, np.uint8)
    for name in ours.keys() | theirs.keys():
        a, b = (decode(side[name]) if name in side else nothing for side in (ours, theirs))
        total += max(a.size, b.size)
        equal += int((a == b).sum()) if a.size == b.size else 0
    return equal / total


def list_frames(folder: str) -> list[str]:
    """Returns the files below a folder, in order."""
    return sorted(str(path) for path in Path(folder).rglob("*.*"))


def store_bytes() -> int:
    """Returns the bytes of all objects that the object stores of this process' Ray have ever held."""
    import ray
    from ray._private import internal_api

    state = internal_api.get_state_from_address(ray.get_runtime_context().gcs_address)
    return int(internal_api.get_memory_info_reply(state).store_stats.cumulative_created_bytes)


def load_frame(path: Any, size: Sequence[int]) -> Any:
    """A path to the network's uint8 input, as TensorFlow does it."""
    import tensorflow as tf

    image_HWC = tf.io.decode_image(tf.io.read_file(path), channels=3, expand_animations=False)
    return tf.image.resize(image_HWC, size, method="nearest")


def notebook_loop(*, frames: str, model: str, out: str, batch_size: int, threads: int) -> dict[str, Any]:
    """The notebook's way: map to float32 in [0, 1], one by one; batches; `predict`; argmax."""
    import tensorflow as tf

    from unet_ray.model.devices import configure_tensorflow

    configure_tensorflow("cpu", threads, op_threads=threads)
    import keras

    from unet_ray.model.bundle import read_bundle

    whole = read_bundle(model).build_model(dtype_policy="float32")
    net = keras.Model(whole.get_layer("rescaling").output, whole.output)  # the notebook divides by 255 before it
    size = whole.input_shape[1:3]
    paths = list_frames(frames)
    dataset = tf.data.Dataset.from_tensor_slices(paths)
    dataset = dataset.map(lambda path: tf.cast(load_frame(path, size), tf.float32) / 255).batch(batch_size)
    file = MaskFile(out)
    for index, image_BHWC in enumerate(dataset):
        masks_BHW = tf.argmax(net.predict(image_BHWC, verbose=0), axis=-1).numpy().astype(np.uint8)
        file.add(paths[index * batch_size : (index + 1) * batch_size], masks_BHW)
    file.close()
    return {}


def tfdata_loop(*, frames: str, model: str, out: str, batch_size: int, threads: int, precision: str) -> dict[str, Any]:
    """The best loop of TensorFlow alone: parallel map, prefetching, one static function with the argmax inside."""
    import tensorflow as tf

    from unet_ray.model.devices import configure_tensorflow

    configure_tensorflow("cpu", threads, op_threads=threads)
    from unet_ray.model.bundle import read_bundle

    net = read_bundle(model).build_model(dtype_policy=precision)
    size = net.input_shape[1:3]
    paths = list_frames(frames)
    auto = tf.data.AUTOTUNE
    dataset = (
        tf.data.Dataset.from_tensor_slices(paths)
        .map(lambda path: (path, load_frame(path, size)), num_parallel_calls=auto, deterministic=False)
        .batch(batch_size)
        .prefetch(auto)
    )
    label = tf.function(
        lambda image_BHWC: tf.cast(tf.argmax(net(image_BHWC, training=False), axis=-1), tf.uint8),
        input_signature=[tf.TensorSpec((batch_size, *size, 3), tf.uint8)],
        autograph=False,
    )
    file = MaskFile(out)
    for path_B, image_BHWC in dataset:
        n_frames = len(path_B)
        if n_frames < batch_size:
            image_BHWC = tf.pad(image_BHWC, [[0, batch_size - n_frames], [0, 0], [0, 0], [0, 0]])
        file.add([path.decode() for path in path_B.numpy()], label(image_BHWC).numpy()[:n_frames])
    file.close()
    return {}


def ray_pattern(
    *, frames: str, model: str, out: str, batch_size: int, threads: int, precision: str, with_predict: bool
) -> dict[str, Any]:
    """Batch inference as Ray Data's user guide shows it: read_images, map, map_batches with a class, write_parquet.

    The resize is a map of its own: `read_images(size=)` is bilinear, and the network has learnt from nearest.
    """
    import ray
    import ray.data

    from unet_ray.model.bundle import read_bundle

    ray.init(address="local", include_dashboard=False, log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    config = read_bundle(model).model_config
    size = config.image_size
    (
        ray.data.read_images(frames, mode="RGB", include_paths=True)
        .map(_Resize(size))
        .map_batches(
            _Predictor,
            fn_constructor_args=(model, batch_size, threads, precision, with_predict),
            batch_size=batch_size,
            compute=ray.data.ActorPoolStrategy(size=1),
            num_cpus=1,
        )
        .write_parquet(out)
    )
    return {"object_store_bytes": store_bytes()}


class _Resize:
    """The documented preprocessing function of a row."""

    def __init__(self, size: tuple[int, int]) -> None:
        self._size = size

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        from unet_ray.pixels.images import resize_nearest

        return {"image": resize_nearest(row["image"], *self._size), "path": row["path"]}

    @property
    def __name__(self) -> str:  # Ray Data names a stage by it
        return "preprocess"


class _Predictor:
    """The documented callable class: a model, and a batch through it, with Keras' `predict` or our own function."""

    def __init__(self, model: str, batch_size: int, threads: int, precision: str, with_predict: bool) -> None:
        from unet_ray.model.bundle import read_bundle
        from unet_ray.model.devices import configure_tensorflow
        from unet_ray.model.label_options import LabelOptions
        from unet_ray.model.labeler import Labeler

        configure_tensorflow("cpu", threads, op_threads=threads if with_predict else 1)
        bundle = read_bundle(model)
        self._size = bundle.model_config.image_size
        self._net = bundle.build_model(dtype_policy="float32") if with_predict else None
        self._labeler = None
        if not with_predict:
            options = LabelOptions(precision=precision, batch_size=batch_size, mask_size="model", n_threads=threads)
            self._labeler = Labeler(bundle, options)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        images_BHWC = batch["image"]
        names = [frame_id(path) for path in batch["path"]]
        if self._net is not None:
            masks = list(self._net.predict(images_BHWC, verbose=0).argmax(-1).astype(np.uint8))
        else:
            assert self._labeler is not None
            masks = self._labeler.label(images_BHWC, [self._size] * len(names)).masks
        return {"frame_id": names, "mask": [mask.tobytes() for mask in masks]}
