"""A Keras model that was trained elsewhere becomes a model folder, which every command takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from unet_ray import storage
from unet_ray.class_files import class_set_of
from unet_ray.classes import ClassSet
from unet_ray.config import load_class_set
from unet_ray.errors import require
from unet_ray.messages import reason_of
from unet_ray.model.architecture import KerasConfig
from unet_ray.model.bundle import read_bundle, write_bundle
from unet_ray.model.model_json import MODEL_FILE
from unet_ray.pixels.preprocessing import Preprocessing, normalized

if TYPE_CHECKING:
    import keras

    from unet_ray.model.keras_record import Recording

_TOLERANCE, _HALF_TOLERANCE = 1e-4, 5e-2
"""Of the largest logit, by which the saved network may differ from the model: in float32, and where the model computes
in half precision."""


def save_model(
    model: keras.Model,
    out: str,
    *,
    classes: str | Sequence[str] | Mapping[Any, Any] | ClassSet,
    preprocessing: Preprocessing | Mapping[str, Any] | None = None,
    image_size: tuple[int, int] | None = None,
) -> str:
    """Writes a Keras model as a model folder: for `segment`, `evaluate`, `export-model`, `train --init-from`.

    The model is functional or sequential, of Keras' own layers and operations; `unet_ray/model/keras_graph.py` lists
    them. It takes images [B, H, W, 3], uint8 or float, and gives logits [B, h, w, K], of the images' size or smaller by
    a whole factor (then they are resized bilinearly). A softmax at its end is left out. What is written is built again
    and compared with the model on a random image.

    Initializers, regularizers and constraints are not saved. Precision is chosen where the folder is used, not here.

    Args:
        model: with its trained weights.
        out: URI of the folder to write; it must hold no model yet.
        classes: the class set of the K outputs, in order: a name or a path as `--classes` takes it, names
            (`["sky", "road"]`), or a mapping as in a class file.
        preprocessing: what the training did to a frame: a `Preprocessing`, or a mapping of some of its fields. `mean`
            and `std` are those of values from 0 to 255. A model that takes uint8 normalises by itself and needs none.
        image_size: (height, width) of the images, px, where the model takes any.

    Returns:
        The folder's URI.

    Raises:
        ValueError: one line: what of the model cannot be saved, or which argument does not fit it.
    """
    import keras

    from unet_ray.model.keras_record import record  # Keras, which `import unet_ray` does not load

    require(
        keras.config.backend() == "tensorflow",
        f"Keras runs on {keras.config.backend()} here; load the model in a process with KERAS_BACKEND=tensorflow",
    )
    out = storage.resolve(out)
    require(
        not storage.exists(storage.join(out, MODEL_FILE)), f"{out} holds a model; give a new folder, or delete it first"
    )
    class_set = _class_set(classes)
    takes = _takes(model)
    size = _image_size(model, image_size)
    recording = record(model)
    config = KerasConfig(
        image_height_px=size[0],
        image_width_px=size[1],
        n_classes=class_set.n_classes,
        preprocessing=_preprocessing(preprocessing, takes),
        takes=takes,
        graph=recording.graph,
    )
    weights = _same_weights(model, recording, config)
    write_bundle(out, weights, config, class_set, {})
    read_bundle(out)
    return out


def _class_set(classes: str | Sequence[str] | Mapping[Any, Any] | ClassSet) -> ClassSet:
    if isinstance(classes, ClassSet):
        return classes
    return load_class_set(classes) if isinstance(classes, str) else class_set_of(classes, source="classes")


def _takes(model: keras.Model) -> Any:
    inputs = getattr(model, "inputs", None)
    if not inputs or len(inputs) != 1 or len(inputs[0].shape) != 4 or inputs[0].shape[3] != 3:
        shapes = [tuple(each.shape) for each in inputs or ()]
        raise ValueError(
            f"the model takes {shapes or 'nothing known yet: it has no Input'}; it must take images of (None, height, "
            "width, 3)"
        )
    dtype = inputs[0].dtype
    if dtype != "uint8" and "float" not in dtype:
        raise ValueError(f"the model takes {dtype}; it must take uint8 or float32 images")
    return "uint8" if dtype == "uint8" else "float32"


def _image_size(model: keras.Model, image_size: tuple[int, int] | None) -> tuple[int, int]:
    own = model.inputs[0].shape[1:3]
    given = own if image_size is None else tuple(image_size)
    if None in given:
        raise ValueError("the model takes images of any size; give image_size=(height, width)")
    if len(given) != 2 or any(side not in (None, other) for side, other in zip(own, given, strict=True)):
        raise ValueError(f"image_size is {given}; the model takes {tuple(own)}")
    return int(given[0]), int(given[1])


def _preprocessing(preprocessing: Preprocessing | Mapping[str, Any] | None, takes: str) -> Preprocessing:
    if isinstance(preprocessing, Preprocessing):
        return preprocessing
    if preprocessing is None and takes == "float32":
        raise ValueError(
            "the model takes float images, so give preprocessing: {'mean': [0, 0, 0], 'std': [255, 255, 255]} for "
            "values from 0 to 1, or the mean and std (of values from 0 to 255) that its training used"
        )
    names = [field.name for field in dataclasses.fields(Preprocessing)]
    given = dict(preprocessing or {})
    if unknown := sorted(map(str, given.keys() - set(names))):
        raise ValueError(f"preprocessing has the key {unknown[0]}; it takes {', '.join(names)}")
    values: dict[str, Any] = {"std": (1, 1, 1)} if takes == "uint8" else {}
    values |= {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    return Preprocessing(**values)


def _same_weights(model: keras.Model, recording: Recording, config: KerasConfig) -> dict[str, np.ndarray]:
    """Builds the network, gives it the model's weights and compares both on a random image; returns the weights."""
    from unet_ray.model.networks import build_network
    from unet_ray.model.weights import named_weights

    network = build_network(config, dtype_policy="float32")
    for name, layer in recording.layers.items():
        own = network.get_layer(name)
        if own.weights:
            own.set_weights([np.asarray(tensor, np.float32) for tensor in layer.get_weights()])
    weights = named_weights(network)
    if broken := [name for name, tensor in weights.items() if not np.isfinite(tensor).all()]:
        raise ValueError(f"the weight {broken[0]} holds values that are not finite")
    image_BHWC = np.random.default_rng(0).integers(0, 256, (1, *config.image_size, 3), np.uint8)
    _require_same(model, network, image_BHWC, recording, config)
    return weights


def _require_same(
    model: keras.Model, network: keras.Model, image_BHWC: np.ndarray, recording: Recording, config: KerasConfig
) -> None:
    import keras

    given = image_BHWC if config.takes == "uint8" else normalized(image_BHWC, config.preprocessing)
    try:
        expected = keras.ops.cast(model(given, training=False), "float32")
    except Exception as error:
        raise ValueError(f"the model fails on a random image: {type(error).__name__}: {reason_of(error)}") from error
    if tuple(expected.shape[1:3]) != config.image_size:
        expected = keras.ops.image.resize(expected, config.image_size, interpolation="bilinear")
    logits = network(image_BHWC, training=False)
    sums = np.asarray(keras.ops.sum(expected, axis=-1))
    if recording.gave_probabilities:
        logits = keras.ops.softmax(logits)
    elif np.abs(sums - 1).max() < 1e-3 and np.min(expected) >= 0:
        raise ValueError("the model gives probabilities; give the model up to its logits, before the softmax")
    half = any(layer.compute_dtype != "float32" for layer in recording.layers.values())
    largest = max(1e-6, float(np.abs(expected).max()))
    difference = float(np.abs(np.asarray(expected) - np.asarray(logits)).max())
    if not difference <= (_HALF_TOLERANCE if half else _TOLERANCE) * largest:
        raise ValueError(
            f"the saved network's logits differ from the model's by {difference:.2g} (largest: {largest:.2g}); it "
            "holds something that its layers do not say, so it cannot be saved"
        )
