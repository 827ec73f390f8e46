"""A graph of Keras' own layers becomes a `keras.Model`; nothing of Keras' own reading of configurations is used.

Shapes: B batch, H height px, W width px, C colour, K classes; h, w the size of the graph's own logits.
"""

from __future__ import annotations

import importlib
import math
import operator
import re
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np

from unet_ray.messages import reason_of
from unet_ray.model.architecture import KerasConfig
from unet_ray.model.keras_graph import LAYERS, MAX_TENSOR_VALUES, OPERATIONS, home_of, last_kernel
from unet_ray.pixels.preprocessing import Preprocessing

_FLOAT32 = ("Normalization", "Rescaling")
"""Layers in float32 under every policy: 1/255 in bfloat16 is off by 0.4%."""


def build_graph(config: KerasConfig) -> keras.Model:
    """Builds the network under Keras' global policy, but for its last layer with a kernel and what follows: float32.

    Logits that are smaller than the image, by a whole factor, are resized bilinearly (half-pixel centres).

    Returns:
        `[B, H, W, 3]` uint8 to `[B, H, W, K]` float32 logits.

    Raises:
        ValueError: one line: which layer Keras does not make or call, or what the logits are.
    """
    graph = config.graph
    last = last_kernel(graph)
    image_BHWC = keras.Input((*config.image_size, 3), dtype="uint8", name="image")
    tensors = [image_BHWC if config.takes == "uint8" else normalize(image_BHWC, config.preprocessing)]
    entries = {entry["name"]: entry for entry in graph["layers"]}
    layers: dict[str, keras.Layer] = {}
    for number, call in enumerate(graph["calls"]):
        name = call.get("layer", call.get("operation"))
        try:
            if "layer" in call and name not in layers:
                layers[name] = _layer(entries[name], is_last=number >= last)
            tensors.append(_named(_called(call, layers, tensors), f"operation.{number}"))
        except Exception as error:
            what = f"Keras {keras.__version__} does not make or call {_title(call, entries)}"
            raise ValueError(f"{what}: {type(error).__name__}: {reason_of(error)[:300]}") from error
    logits_BHWK = _logits(tensors[graph["output"]], config)
    try:
        return keras.Model(image_BHWC, logits_BHWK, name="network")
    except ValueError as error:
        raise ValueError(f"Keras {keras.__version__} does not make the network: {reason_of(error)[:300]}") from error


def normalize(image_BHWC: Any, preprocessing: Preprocessing) -> Any:
    """Puts in front of a network what `preprocessing.normalized` computes, to the bit."""
    scale = (1 / np.array(preprocessing.std, np.float64)).astype(np.float32).tolist()
    offset = [-value for value in preprocessing.mean]
    step = -1 if preprocessing.channels == "BGR" else 1
    shifted = keras.layers.Rescaling(1.0, offset=offset[::step], dtype="float32", name="shift")(image_BHWC)
    x = keras.layers.Rescaling(scale[::step], dtype="float32", name="scale")(shifted)
    return x if step == 1 else _named(keras.ops.flip(x, axis=-1), "operation.flip")


def _named(tensor: Any, name: str) -> Any:
    """Names the operation that made a tensor; Keras counts operations in a process, and a layer may have that name."""
    operation = tensor._keras_history.operation
    if not isinstance(operation, keras.Layer):
        operation.name = name
    return tensor


def allowed_class(name: str) -> type[keras.Layer]:
    """Returns a class of `LAYERS`. Raises ValueError where this version of Keras lacks it."""
    return _of_home(name, LAYERS)


def _of_home(name: str, homes: Mapping[str, tuple[str, ...]]) -> Any:
    home = home_of(name, homes)
    assert home is not None, name  # check_graph
    try:
        return getattr(importlib.import_module(home), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"Keras {keras.__version__} has no {home}.{name}") from error


def _layer(entry: Mapping[str, Any], *, is_last: bool) -> keras.Layer:
    # JSON has lists where Keras takes tuples; of an axis, RMSNormalization (keras 3.12) takes a list only.
    options = {name: value if name == "axis" else _as_tuples(value) for name, value in entry["options"].items()}
    if is_last or entry["class"] in _FLOAT32:
        options["dtype"] = "float32"
    layer = allowed_class(entry["class"])(**options, name=entry["name"])
    layer.trainable = entry["trainable"]
    return layer


def _called(call: Mapping[str, Any], layers: Mapping[str, keras.Layer], tensors: Sequence[Any]) -> Any:
    arguments = [_value(value, tensors) for value in call["arguments"]]
    named = {name: _value(value, tensors) for name, value in call["named"].items()}
    if call.get("operation") == "get_item":
        image, key = arguments
        result = operator.getitem(image, tuple(key) if isinstance(key, list) else key)
    elif "operation" in call:
        result = _of_home(call["operation"], OPERATIONS)(*arguments, **named)
    else:
        result = layers[call["layer"]](*arguments, **named)
        _name_weights(layers[call["layer"]])
    if not isinstance(result, keras.KerasTensor):
        raise ValueError("gives something else than one tensor")
    if math.prod(side for side in result.shape[1:] if side) > MAX_TENSOR_VALUES:
        raise ValueError(f"gives {result.shape} of one frame, more than {MAX_TENSOR_VALUES:,} numbers")
    return result


def _name_weights(layer: keras.Layer) -> None:
    """Gives weights without a name one that is the same in every process; Keras (3.15) counts them over all models."""
    for variable in layer.weights:
        if re.fullmatch(r"variable(_\d+)?", variable.name):
            variable._name, variable._path = "weight", f"{layer.name}/weight"


def _value(value: Any, tensors: Sequence[Any]) -> Any:
    if isinstance(value, list):
        return [_value(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return tensors[value["tensor"]]
    if "slice" in value:
        return slice(*value["slice"])
    if "ellipsis" in value:
        return ...
    return np.array(value["constant"], "float32" if value["dtype"] == "bfloat16" else value["dtype"])


def _as_tuples(value: Any) -> Any:
    return tuple(map(_as_tuples, value)) if isinstance(value, list) else value


def _title(call: Mapping[str, Any], entries: Mapping[str, Mapping[str, Any]]) -> str:
    if "operation" in call:
        return f"the operation {call['operation']}"
    return f"the layer {call['layer']} ({entries[call['layer']]['class']})"


def _logits(logits_BhwK: Any, config: KerasConfig) -> Any:
    height_px, width_px = config.image_size
    shape = logits_BhwK.shape
    if len(shape) != 4 or not all(shape[1:]):
        raise ValueError(f"the network gives {shape}; it must give logits (None, height, width, classes)")
    if shape[3] != config.n_classes:
        raise ValueError(f"the network gives {shape[3]} classes; the class set has {config.n_classes}")
    factor = height_px // shape[1]
    if (shape[1] * factor, shape[2] * factor) != (height_px, width_px):
        raise ValueError(
            f"the network gives {shape[1]}x{shape[2]} logits of an image of {height_px}x{width_px}; both sides must be "
            "divided by one whole number: choose another image size"
        )
    logits_BhwK = _named(keras.ops.cast(logits_BhwK, "float32"), "operation.cast")
    if factor == 1:
        return logits_BhwK
    resized = keras.ops.image.resize(logits_BhwK, config.image_size, interpolation="bilinear")
    return _named(resized, "operation.resize")
