"""Keras' two kinds of weights files against an encoder, tensor by tensor: all that it needs, and nothing else.

| file | a tensor's name | which layer it belongs to |
|---|---|---|
| Keras 3, `.weights.h5` | `layers/conv2d_3/vars/0` | the fourth `Conv2D` of the model |
| `keras.applications`, `.h5` | `LAYER/WEIGHT`, in lists `layer_names` and `weight_names` | that of its name |

Keras itself fills layers from such a file by their order and only warns where one is left as it was. Here a tensor that
is missing, left over or of another shape is refused by name. A file is data: links and data in other files are refused,
and no tensor is read before its shape is known to be the encoder's.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import h5py
import keras
import numpy as np

from unet_ray.model.convnext import own_name

_Groups = dict[str, h5py.Group]
_Tensors = dict[str, h5py.Dataset]


class Weight(NamedTuple):
    """One weight of an encoder."""

    name: str
    """As `weights.named_variables` calls it."""
    stored_shape: tuple[int, ...]
    """In a file; the same values in the same order as in `shape`."""
    shape: tuple[int, ...]


class Encoder:
    """An encoder's weights, and how the files of the Keras model call them that it was made after."""

    def __init__(self, keras_model: keras.Model, encoder: keras.Model):
        self._keras_model, self._encoder = keras_model, encoder

    def weights(self, *, legacy: bool) -> dict[str, Weight]:
        """Returns the weights by a key: `LAYER/INDEX` of a file's layer and the tensor's place in it."""
        layers = _layers_by_name(self._keras_model) if legacy else _layers_by_class(self._keras_model, "layers/")
        return {
            f"{key}/{index}": weight
            for key, leaves in layers
            for index, weight in enumerate(weight for leaf in leaves for weight in self._weights_of(leaf))
        }

    def _weights_of(self, leaf: keras.Layer) -> list[Weight]:
        own = self._encoder.get_layer(own_name(leaf)).weights if leaf.weights else []
        return [
            Weight(variable.path, tuple(stored.shape), tuple(variable.shape))
            for variable, stored in zip(own, leaf.weights, strict=True)
        ]


def _layers_by_name(model: keras.Model) -> Iterator[tuple[str, list[keras.Layer]]]:
    for layer in model.layers:
        yield layer.name, layer.layers if isinstance(layer, keras.Sequential) else [layer]


def _layers_by_class(model: keras.Model, prefix: str) -> Iterator[tuple[str, list[keras.Layer]]]:
    counts: Counter[str] = Counter()
    for layer in model.layers:
        kind = _snake_case(type(layer).__name__)
        key = prefix + kind + (f"_{counts[kind]}" if counts[kind] else "")
        counts[kind] += 1
        if isinstance(layer, keras.Sequential):
            yield from _layers_by_class(layer, f"{key}/layers/")
        else:
            yield f"{key}/vars", [layer]


def _snake_case(name: str) -> str:
    return re.sub(r"([a-z])([A-Z])", r"\1_\2", re.sub(r"(.)([A-Z][a-z]+)", r"\1_\2", name)).lower()


def read_encoder_file(path: str, encoder: Encoder) -> dict[str, np.ndarray]:
    """Returns the weights of a file by the encoder's names, float32.

    Raises:
        ValueError: one line, without the file's name: what it is, lacks, or holds that the encoder does not have.
    """
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise ValueError("it is no HDF5 file, or a damaged one") from error
    with file:
        legacy = "layer_names" in file.attrs or "layer_names0" in file.attrs
        expected = encoder.weights(legacy=legacy)
        groups, tensors = _all_items(file)
        if legacy:
            tensors = _listed_tensors(groups, tensors, list(expected))
        _require_same_tensors(expected, tensors)
        return {weight.name: _values(tensors[key], weight) for key, weight in expected.items()}


def _all_items(file: h5py.File) -> tuple[_Groups, _Tensors]:
    """All groups and tensors by path; a link is followed nowhere, and what lies in other files is refused."""
    groups: _Groups = {"": file}
    tensors: _Tensors = {}

    def visit(name: str, item: h5py.Group | h5py.Dataset) -> None:
        if not isinstance(item, h5py.Dataset):
            groups[name] = item
        elif item.is_virtual or item.external:
            raise ValueError(f"its tensor {name} lies in another file")
        else:
            tensors[name] = item

    file.visititems(visit)
    return groups, tensors


def _listed_tensors(groups: _Groups, stored: _Tensors, expected: list[str]) -> _Tensors:
    """The tensors of a file that lists them, by the keys of `Encoder.weights`, and those that it does not list.

    Keras numbered the name of the last layer, so that it differs from file to file.
    """
    listed = [name for name in _names(groups[""], "layer_names") if name in groups]
    layers = {name: weights for name in listed if (weights := _names(groups[name], "weight_names"))}
    last = expected[-1].rpartition("/")[0]
    numbered = [name for name in layers if name.startswith("layer_normalization")]
    renamed = dict.fromkeys(numbered[:1], last)
    tensors, others = {}, dict(stored)
    for layer, weights in layers.items():
        for index, weight in enumerate(weights):
            if f"{layer}/{weight}" not in stored:
                raise ValueError(f"it lists the tensor {layer}/{weight}, which is not in it")
            tensors[f"{renamed.get(layer, layer)}/{index}"] = stored[f"{layer}/{weight}"]
            others.pop(f"{layer}/{weight}", None)
    return tensors | others


def _names(group: h5py.Group, attribute: str) -> list[str]:
    """A list of names in an attribute, or, where it is long, in several that are numbered."""
    numbered = (f"{attribute}{number}" for number in itertools.count())
    parts = [attribute] if attribute in group.attrs else itertools.takewhile(group.attrs.__contains__, numbered)
    names = [name for part in parts for name in np.asarray(group.attrs[part]).ravel()]
    return [name.decode("utf-8", "replace") if isinstance(name, bytes) else str(name) for name in names]


def _require_same_tensors(expected: dict[str, Weight], tensors: _Tensors) -> None:
    if missing := [weight.name for key, weight in expected.items() if key not in tensors]:
        raise ValueError(f"it has no tensor for {_first(missing)}")
    if others := [tensor.name.removeprefix("/") for key, tensor in tensors.items() if key not in expected]:
        raise ValueError(f"its tensor {_first(others)} belongs to no layer of the encoder")
    for key, weight in expected.items():
        tensor = tensors[key]
        if tuple(tensor.shape) != weight.stored_shape:
            raise ValueError(
                f"its tensor {tensor.name.removeprefix('/')} has the shape {tuple(tensor.shape)}, but "
                f"{weight.name} has {weight.stored_shape}"
            )


def _first(names: list[str]) -> str:
    return names[0] + (f" (and {len(names) - 1} more)" if len(names) > 1 else "")


def _values(tensor: h5py.Dataset, weight: Weight) -> np.ndarray:
    name = tensor.name.removeprefix("/")
    if tensor.dtype.kind != "f":
        raise ValueError(f"its tensor {name} is of the type {tensor.dtype}; weights are floats")
    try:
        values = tensor[()].astype(np.float32)
    except OSError as error:
        raise ValueError(f"its tensor {name}, for {weight.name}, is damaged") from error
    if not np.isfinite(values).all():
        raise ValueError(f"its tensor {name}, for {weight.name}, holds values that are not finite")
    return values.reshape(weight.shape)
