"""Networks of Keras' own layers as plain JSON: what a model folder of the kind `keras` says, and what it may say.

A graph is `{"layers": […], "calls": […], "output": tensor}`. Tensor 0 is the network's input, call number i makes
tensor i + 1, so that a call uses only what was made before it. Nested models are flattened.

| | keys |
|---|---|
| layer | `name`, `class` (one of `LAYERS`), `options` (of its constructor, plain values), `trainable` |
| call | `layer` (a name) or `operation` (one of `OPERATIONS`), `arguments` (by position), `named` (by name) |

A value of a call is plain, or a tensor `{"tensor": 3}`, numbers `{"constant": [[0.5]], "dtype": "float32"}`, a part of
an index `{"slice": [0, null, 2]}` or `{"ellipsis": true}`.

This is not Keras' own format: that names modules and functions which Keras then imports and calls (CVE-2025-1550,
CVE-2025-8747, CVE-2025-9905, CVE-2025-9906, CVE-2026-1462). A graph names nothing but entries of the lists below, and
is checked against them and the limits before any code of Keras sees it. It holds no initializers, since its weights
stand beside it, and no regularizers and constraints, which belong to a training.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

LAYERS = {
    "keras.layers": (
        *("Conv1D", "Conv2D", "Conv2DTranspose", "DepthwiseConv2D", "SeparableConv2D", "Dense", "EinsumDense"),
        *("AveragePooling2D", "GlobalAveragePooling2D", "GlobalMaxPooling2D", "MaxPooling2D"),
        *("BatchNormalization", "GroupNormalization", "LayerNormalization", "RMSNormalization", "UnitNormalization"),
        *("Normalization", "Rescaling", "Resizing", "UpSampling2D", "ZeroPadding2D", "Cropping2D"),
        *("Activation", "ELU", "LeakyReLU", "PReLU", "ReLU", "Softmax"),
        *("Add", "Average", "Concatenate", "Dot", "Maximum", "Minimum", "Multiply", "Subtract"),
        *("Flatten", "Identity", "Permute", "RepeatVector", "Reshape"),
        *("AdditiveAttention", "Attention", "GroupQueryAttention", "MultiHeadAttention"),
        *("Dropout", "GaussianDropout", "GaussianNoise", "SpatialDropout2D"),
    ),
    "keras.src.applications.convnext": ("LayerScale", "StochasticDepth"),
}
"""Classes that are functions of their options, their weights and their input, by the module that has them."""

OPERATIONS = {
    "keras.ops": (
        *("add", "subtract", "multiply", "divide", "true_divide", "power", "maximum", "minimum", "negative"),
        *("absolute", "square", "sqrt", "rsqrt", "exp", "log", "clip", "cast", "matmul"),
        *("mean", "max", "min", "sum", "concatenate", "stack", "reshape", "transpose", "expand_dims", "squeeze"),
        *("flip", "moveaxis", "swapaxes", "average_pool", "max_pool"),
        *("elu", "gelu", "hard_sigmoid", "hard_silu", "leaky_relu", "log_softmax", "relu", "relu6", "sigmoid"),
        *("silu", "softmax", "softplus", "tanh"),
    ),
    "keras.ops.image": ("resize",),
    "operator": ("get_item",),
}
"""Functions of tensors, by the module that has them; `get_item` is what `x[:, ::2]` does."""

ACTIVATIONS = {
    *("celu", "elu", "exponential", "gelu", "hard_sigmoid", "hard_silu", "hard_tanh", "leaky_relu", "linear"),
    *("log_sigmoid", "log_softmax", "mish", "relu", "relu6", "selu", "sigmoid", "silu", "softmax", "softplus"),
    *("softsign", "squareplus", "tanh"),
}
"""What an option `activation` may name."""

OPTIONS = {
    *("activation", "alpha", "antialias", "attention_axes", "axes", "axis", "bias_axes", "center", "cropping"),
    *("crop_to_aspect_ratio", "data_format", "depth_multiplier", "dilation_rate", "dims", "drop_path_rate"),
    *("dropout", "epsilon", "equation", "fill_mode", "fill_value", "filters", "flash_attention", "groups", "head_dim"),
    *("height", "init_values", "interpolation", "invert", "keepdims", "kernel_size", "key_dim", "max_value", "mean"),
    *("momentum", "n", "negative_slope", "noise_shape", "normalize", "num_heads", "num_key_value_heads"),
    *("num_query_heads", "offset", "output_padding", "output_shape", "pad_to_aspect_ratio", "padding", "pool_size"),
    *(
        "projection_dim",
        "rate",
        "renorm",
        "renorm_clipping",
        "renorm_momentum",
        "rms_scaling",
        "scale",
        "score_mode",
        "shared_axes",
    ),
    *("size", "sliding_window", "stddev", "strides", "synchronized", "target_shape", "threshold", "units", "use_bias"),
    *("use_gate", "use_scale", "value_dim", "variance", "width"),
}
"""Options of layers that a graph may hold."""

NAMED = {
    *("approximate", "axis", "axis1", "axis2", "axes", "dtype", "initial", "keepdims", "newshape", "x_min", "x_max"),
    *("alpha", "negative_slope", "source", "destination", "pool_size", "strides", "padding", "data_format", "size"),
    *("interpolation", "antialias", "crop_to_aspect_ratio", "pad_to_aspect_ratio", "fill_mode", "fill_value"),
    *("training", "query", "value", "key", "attention_mask", "use_causal_mask"),
}
"""Arguments of calls that a graph may hold by name."""

RESERVED = ("image", "shift", "scale")
"""Names of layers that are put in front of a graph."""

DTYPES = ("float32", "float16", "bfloat16", "int32", "int64", "uint8", "bool")

MAX_CALLS = 5_000
MAX_SIZE = 65_536
"""Of whole numbers that are options: filters, units, sides."""
MAX_NUMBERS = 4_096
"""Of a list, so of a constant too."""
MAX_DEPTH = 4
"""Of lists in lists."""
MAX_TENSOR_VALUES = 2**30
"""Of what a call makes of one frame: 1080x1920 with 512 channels."""

_KERNELS = ("Conv1D", "Conv2D", "Conv2DTranspose", "DepthwiseConv2D", "SeparableConv2D", "Dense", "EinsumDense")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,199}")
_TEXT = re.compile(r"[A-Za-z0-9_.,> -]{0,100}")


def home_of(name: str, homes: Mapping[str, tuple[str, ...]]) -> str | None:
    """Returns the module of `LAYERS` or `OPERATIONS` that has a name; None for one that is in no list."""
    return next((module for module, names in homes.items() if name in names), None)


def check_graph(graph: Mapping[str, Any]) -> None:
    """Raises a one-line ValueError where a graph holds anything that is in none of the lists, or beyond the limits."""
    _require_keys(graph, {"layers", "calls", "output"}, "the graph")
    layers, calls = graph["layers"], graph["calls"]
    for name, entries in (("layers", layers), ("calls", calls)):
        if not isinstance(entries, list) or not 0 < len(entries) <= MAX_CALLS:
            raise ValueError(f"the graph's {name} are not a list of 1 to {MAX_CALLS:,}")
    for layer in layers:
        _check_layer(layer)
    names = {layer["name"] for layer in layers}
    if len(names) < len(layers):
        raise ValueError("two layers of the graph have one name")
    for number, call in enumerate(calls):
        _check_call(call, names, number + 1)
    _check_tensor(graph["output"], len(calls) + 1)


def last_kernel(graph: Mapping[str, Any]) -> int:
    """Returns the number of the last call of a layer with a kernel: it makes classes of features."""
    classes = {layer["name"]: layer["class"] for layer in graph["layers"]}
    numbers = [i for i, call in enumerate(graph["calls"]) if classes.get(call.get("layer")) in _KERNELS]
    return numbers[-1] if numbers else 0


def with_outputs(graph: Mapping[str, Any], before: int, n_outputs: int) -> dict[str, Any]:
    """Returns a checked graph whose last layer with a kernel has another number of outputs.

    Raises:
        ValueError: that layer has not as many outputs as there were classes before.
    """
    name = graph["calls"][last_kernel(graph)].get("layer")
    options: Mapping[str, Any] = next((layer["options"] for layer in graph["layers"] if layer["name"] == name), {})
    option = next((option for option in ("filters", "units") if options.get(option) == before), None)
    if option is None:
        raise ValueError(f"the network's last layer ({name}) has not {before} outputs, so it cannot get {n_outputs}")
    layers = [
        layer | {"options": layer["options"] | {option: n_outputs}} if layer["name"] == name else layer
        for layer in graph["layers"]
    ]
    return {**graph, "layers": layers}


def _check_layer(layer: Any) -> None:
    _require_keys(layer, {"name", "class", "options", "trainable"}, "a layer")
    name, class_name = layer["name"], layer["class"]
    if not isinstance(name, str) or not _NAME.fullmatch(name) or name in RESERVED:
        raise ValueError(
            f"a layer has the name {str(name)[:50]!r}; allowed are letters, digits, '_', '-' and '.', but for "
            f"{', '.join(RESERVED)}"
        )
    if not isinstance(class_name, str) or home_of(class_name, LAYERS) is None:
        raise ValueError(f"the layer {name} is of the class {str(class_name)[:50]!r}, which is not allowed")
    if type(layer["trainable"]) is not bool or not isinstance(layer["options"], dict):
        raise ValueError(f"the layer {name} has no options, or does not say whether it is trained")
    for option, value in layer["options"].items():
        if option not in OPTIONS:
            raise ValueError(f"the layer {name} has the option {str(option)[:50]!r}, which is not allowed")
        is_fine = value in ACTIVATIONS if option == "activation" and isinstance(value, str) else _is_plain(value)
        if not is_fine:
            raise ValueError(f"the layer {name} has {option} = {str(value)[:50]!r}, which is not allowed")


def _check_call(call: Any, names: set[str], n_tensors: int) -> None:
    if not isinstance(call, dict) or not ({"layer", "operation"} & call.keys()):
        raise ValueError("a call is of no layer and no operation")
    kind = "layer" if "layer" in call else "operation"
    _require_keys(call, {kind, "arguments", "named"}, "a call")
    name = call[kind]
    if not isinstance(name, str) or (name not in names if kind == "layer" else home_of(name, OPERATIONS) is None):
        raise ValueError(f"a call is of the {kind} {str(name)[:50]!r}, which is not there or not allowed")
    if not isinstance(call["arguments"], list) or not isinstance(call["named"], dict):
        raise ValueError(f"the call of {name} has no arguments")
    if unknown := sorted(str(key)[:50] for key in call["named"].keys() - NAMED):
        raise ValueError(f"the call of {name} has the argument {unknown[0]!r}, which is not allowed")
    values = [*call["arguments"], *call["named"].values()]
    tensors = [tensor for value in values for tensor in _tensors_in(value, name, 0)]
    if not tensors:
        raise ValueError(f"the call of {name} is given no tensor")
    for tensor in tensors:
        _check_tensor(tensor, n_tensors)


def _check_tensor(tensor: Any, n_tensors: int) -> None:
    if type(tensor) is not int or not 0 <= tensor < n_tensors:
        raise ValueError(f"the graph uses the tensor {str(tensor)[:50]!r} before it is made")


def _tensors_in(value: Any, name: str, depth: int) -> Iterator[Any]:
    """Yields the tensors of a call's value. Raises ValueError for what is no value."""
    if isinstance(value, dict):
        keys = value.keys()
        if keys == {"tensor"}:
            yield value["tensor"]
            return
        if not all(_is_plain(item, largest=2**31) for item in value.values()) or not (
            (keys == {"constant", "dtype"} and value["dtype"] in DTYPES and _count(value["constant"]) <= MAX_NUMBERS)
            or (keys == {"slice"} and isinstance(value["slice"], list) and len(value["slice"]) == 3)
            or (keys == {"ellipsis"} and value["ellipsis"] is True)
        ):
            raise ValueError(f"the call of {name} has the argument {str(value)[:50]!r}, which is not allowed")
    elif isinstance(value, list) and depth < MAX_DEPTH and len(value) <= MAX_NUMBERS:
        for item in value:
            yield from _tensors_in(item, name, depth + 1)
    elif not _is_plain(value, largest=2**31):
        raise ValueError(f"the call of {name} has the argument {str(value)[:50]!r}, which is not allowed")


def _is_plain(value: Any, depth: int = 0, largest: int = MAX_SIZE) -> bool:
    if isinstance(value, list):
        fits = depth < MAX_DEPTH and len(value) <= MAX_NUMBERS
        return fits and all(_is_plain(item, depth + 1, largest) for item in value)
    if isinstance(value, str):
        return _TEXT.fullmatch(value) is not None
    if isinstance(value, float):
        return math.isfinite(value)
    return value is None or isinstance(value, bool) or (isinstance(value, int) and abs(value) <= largest)


def _count(value: Any) -> int:
    return sum(map(_count, value)) if isinstance(value, list) else 1


def _require_keys(entry: Any, keys: set[str], what: str) -> None:
    if not isinstance(entry, dict) or entry.keys() != keys:
        given = ", ".join(sorted(str(key)[:50] for key in entry)[:10]) if isinstance(entry, dict) else "none"
        raise ValueError(f"{what} has the keys {given}; it must have {', '.join(sorted(keys))}")
