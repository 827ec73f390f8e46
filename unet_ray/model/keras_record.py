"""A user's Keras model becomes a graph of plain JSON and named weights; what a graph cannot hold is refused by name."""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from unet_ray.model.keras_graph import LAYERS, OPERATIONS, OPTIONS, RESERVED, home_of

_LEFT_OUT = re.compile(r"name|dtype|trainable|seed|batch_(input_)?shape|.*_(initializer|regularizer|constraint)")
"""Options that a graph does without: weights stand beside it, and the rest is said elsewhere or is of a training."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Recording:
    """What a graph was made of."""

    graph: dict[str, Any]
    """See `keras_graph`; its output is logits."""
    layers: dict[str, keras.Layer]
    """The model's layers by their names in the graph."""
    gave_probabilities: bool
    """Whether the model ended in a softmax, which the graph does without."""


@dataclass(frozen=True)
class _Tensor:
    """Stands for what a call makes, while a model is walked through."""

    number: int


def record(model: keras.Model) -> Recording:
    """Walks through a functional or sequential model, into the models in it.

    Raises:
        ValueError: one line: a layer or an operation that is not in the lists of `keras_graph`, by name.
    """
    recorder = _Recorder()
    output = recorder.run(model, _Tensor(0))
    graph: dict[str, Any] = {
        "layers": list(recorder.entries.values()),
        "calls": recorder.calls,
        "output": _number(output, model.name),
    }
    gave_probabilities = _without_softmax(graph)
    names = {entry["name"] for entry in graph["layers"]}
    layers = {recorder.entries[key]["name"]: layer for key, layer in recorder.layers.items()}
    return Recording(
        graph=graph,
        layers={name: layer for name, layer in layers.items() if name in names},
        gave_probabilities=gave_probabilities,
    )


class _Recorder:
    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []
        self.entries: dict[int, dict[str, Any]] = {}
        self.layers: dict[int, keras.Layer] = {}
        self._names = set(RESERVED)
        self._is_frozen = False
        """Whether the calls that come belong to a model that is called with `training=False`."""

    def run(self, model: keras.Model, image: Any) -> Any:
        if type(model) is keras.Sequential:
            for layer in model.layers:
                image = self._called(layer, image)
            return image
        if type(model).__module__ != "keras.src.models.functional":
            raise ValueError(
                f"the model {model.name} is a {_title(type(model))}; only functional and sequential models are saved: "
                "keras.Model(inputs, outputs) or keras.Sequential"
            )
        return model._run_through_graph([image], operation_fn=lambda each: functools.partial(self._called, each))

    def _called(self, operation: Any, *arguments: Any, **named: Any) -> Any:
        if isinstance(operation, keras.Model):
            return self._model_called(operation, arguments, named)
        is_layer = isinstance(operation, keras.Layer)
        name = self._layer_name(operation) if is_layer else _operation_name(operation)
        options = {} if is_layer else _options_of_operation(operation)
        if is_layer and self._is_frozen and operation._call_has_training_arg:
            named["training"] = False
        given = {key: _plain(value, operation.name) for key, value in (options | named).items() if value is not None}
        if options:  # of an operation, None may be no default
            given |= {key: None for key, value in options.items() if value is None}
        self.calls.append(
            {
                "layer" if is_layer else "operation": name,
                "arguments": [_plain(value, operation.name) for value in arguments],
                "named": given,
            }
        )
        return _Tensor(len(self.calls))

    def _model_called(self, model: keras.Model, arguments: Any, named: dict[str, Any]) -> Any:
        training = named.pop("training", None)
        if len(arguments) != 1 or any(value is not None for value in named.values()) or training is True:
            raise ValueError(f"the model {model.name} within the model is called with more than one tensor")
        before, self._is_frozen = self._is_frozen, self._is_frozen or training is False
        try:
            return self.run(model, arguments[0])
        finally:
            self._is_frozen = before

    def _layer_name(self, layer: keras.Layer) -> str:
        if id(layer) not in self.entries:
            base = name = re.sub(r"[^A-Za-z0-9_.-]", "_", layer.name).lstrip("_.-")[:180] or "layer"
            number = 1
            while name in self._names:
                name, number = f"{base}.{number}", number + 1
            self._names.add(name)
            self.layers[id(layer)] = layer
            self.entries[id(layer)] = {
                "name": name,
                "class": _class_name(layer),
                "options": _options_of_layer(layer),
                "trainable": layer.trainable,
            }
        return self.entries[id(layer)]["name"]


def _class_name(layer: keras.Layer) -> str:
    for module, names in LAYERS.items():
        for name in names:
            if getattr(importlib.import_module(module), name, None) is type(layer):
                return name
    raise ValueError(
        f"the layer {layer.name} is a {_title(type(layer))}; only Keras' own layers are saved that are functions of "
        "their options and weights (unet_ray/model/keras_graph.py lists them); for others, train with --network"
    )


def _operation_name(operation: Any) -> str:
    name = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", type(operation).__name__).lower()
    if not type(operation).__module__.startswith("keras.src.ops.") or home_of(name, OPERATIONS) is None:
        raise ValueError(
            f"the operation {operation.name} is a {_title(type(operation))}, which is not saved; build the model of "
            "layers, or train with --network"
        )
    return name


def _options_of_layer(layer: keras.Layer) -> dict[str, Any]:
    options = {key: value for key, value in layer.get_config().items() if not _LEFT_OUT.fullmatch(key)}
    if isinstance(layer, keras.layers.Normalization) and options["mean"] is None:  # its weights are what it was given
        options |= {name: np.ravel(getattr(layer, name)).tolist() for name in ("mean", "variance")}
    for key, value in options.items():
        if key not in OPTIONS and value is not None:
            raise ValueError(f"the layer {layer.name} ({type(layer).__name__}) has {key}, which is not saved")
    return {key: _plain(value, layer.name) for key, value in options.items() if key in OPTIONS}


def _options_of_operation(operation: Any) -> dict[str, Any]:
    try:
        config = operation.get_config()
    except NotImplementedError as error:
        raise ValueError(f"the operation {operation.name} has arguments that are not saved") from error
    return {key: value for key, value in config.items() if not _LEFT_OUT.fullmatch(key) or key == "dtype"}


def _plain(value: Any, owner: str) -> Any:
    """A value of a call or an option as JSON."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, _Tensor):
        return {"tensor": value.number}
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, list | tuple):
        return [_plain(item, owner) for item in value]
    if isinstance(value, slice):
        return {"slice": [_plain(item, owner) for item in (value.start, value.stop, value.step)]}
    if value is ...:
        return {"ellipsis": True}
    if isinstance(value, np.ndarray) or (keras.ops.is_tensor(value) and not isinstance(value, keras.KerasTensor)):
        array = np.asarray(value)
        array = array.astype(np.float32) if array.dtype.kind == "f" else array
        return {"constant": array.tolist(), "dtype": array.dtype.name}
    raise ValueError(f"{owner} is given {_name_of(value)[:100]}, which is not saved: it is not Keras' own")


def _name_of(value: Any) -> str:
    """How a message calls what is no plain value: a function or an object as Keras describes them."""
    if not isinstance(value, Mapping):
        return _title(type(value))
    return str(value.get("config") if value.get("class_name") == "function" else value.get("class_name"))


def _without_softmax(graph: dict[str, Any]) -> bool:
    """Ends a graph before the softmax over the classes that it ends in; whether there was one."""
    if graph["output"] == 0:
        return False
    call = graph["calls"][graph["output"] - 1]
    if "operation" in call:
        if call["operation"] != "softmax" or call["named"].get("axis", -1) not in (-1, 3):
            return False
        graph["output"] = call["arguments"][0]["tensor"]
        graph["calls"].remove(call)
        return True
    entry = next(entry for entry in graph["layers"] if entry["name"] == call["layer"])
    options = entry["options"]
    if options.get("activation") in ("sigmoid", "log_sigmoid"):
        raise ValueError(
            f"the model ends in a sigmoid ({entry['name']}); give logits of classes of which a pixel has exactly one"
        )
    if entry["class"] != "Softmax":
        is_softmax = options.get("activation") == "softmax"
        options |= {"activation": "linear"} if is_softmax else {}
        return is_softmax
    if options["axis"] not in (-1, 3):
        return False
    graph["output"] = call["arguments"][0]["tensor"]
    graph["calls"].remove(call)
    graph["layers"].remove(entry)
    return True


def _number(output: Any, name: str) -> int:
    outputs = output if isinstance(output, list) else [output]
    if len(outputs) != 1 or not isinstance(outputs[0], _Tensor):
        raise ValueError(f"the model {name} has not one output tensor but {len(outputs)}")
    return outputs[0].number


def _title(kind: type) -> str:
    return f"{kind.__name__} of {kind.__module__}"
