"""`model.json` of a model folder: what it says, and the refusal of what does not hold together.

Format 2 (format 1, which unet_ray wrote before, holds the notebook's U-Net alone and keeps its digest):

| key | content |
|---|---|
| `format_version` | 2 |
| `network` | `kind` (`architecture.KINDS`) and the options of that kind, as `ModelConfig.network` gives them |
| `image_size` | [height, width] of the network's input, in px |
| `preprocessing` | how a frame becomes the network's input, as `Preprocessing.to_dict` gives it |
| `classes` | the class set, as `ClassSet.to_dict` gives it |
| `weights` | a list of `{name, shape, dtype}`, one a tensor, names such as `conv2d/kernel`; dtype is `float32` |
| `temperature` | a float; missing where the model's confidence is not calibrated (`calibration`) |
| `files` | `{"weights.safetensors": {size_bytes, sha256}, "metrics.json": {size_bytes, sha256}}` |
| `digest` | sha256 of all that a label depends on: the keys above as canonical JSON, without `metrics.json`'s entry |

A network made elsewhere (`kind` is `onnx`) has `model.onnx` in place of `weights.safetensors`, and `weights` is empty.

In format 1 `network` holds the options of the U-Net, `image_height_px`, `image_width_px` and `n_classes`; it has no
`image_size`, and `preprocessing` is always `FORMAT_1_PREPROCESSING`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from unet_ray import storage
from unet_ray.classes import ClassSet
from unet_ray.model.architecture import ModelConfig, OnnxConfig, UnetConfig, config_of
from unet_ray.pixels.preprocessing import Preprocessing

FORMAT_VERSION = 2
FORMAT_1_PREPROCESSING = {
    "channels": "RGB",
    "resize": "nearest",
    "network_input": "uint8, divided by 255 in the network",
}
MODEL_FILE = "model.json"
WEIGHTS_FILE = "weights.safetensors"
ONNX_FILE = "model.onnx"
METRICS_FILE = "metrics.json"
MAX_WEIGHTS_BYTES = 4_000_000_000
MAX_TEMPERATURE = 1000.0
"""And 1 / this is the smallest. What a training fits is well within."""

_KEYS = {"format_version", "network", "preprocessing", "classes", "weights", "files", "digest"}
_FORMAT_KEYS = {1: _KEYS, 2: _KEYS | {"image_size"}}
_OPTIONAL_KEYS: dict[int, set[str]] = {1: set(), 2: {"temperature"}}
_FORMAT_1_NETWORK = {"n_filters", "depth", "dropout", "image_height_px", "image_width_px", "n_classes"}


def network_file(files: Mapping[str, Any]) -> str:
    """Returns which file of a model folder holds the network's weights."""
    return ONNX_FILE if ONNX_FILE in files else WEIGHTS_FILE


class Altered(ValueError):
    """Something in a model folder is not what was written; the message says what, without the folder."""


def document_of(
    model_config: ModelConfig,
    class_set: ClassSet,
    tensors: Mapping[str, np.ndarray],
    *,
    temperature: float | None = None,
) -> dict[str, Any]:
    """Returns `model.json` as a dict, but for what `seal` adds."""
    assert class_set.n_classes == model_config.n_classes, (class_set.n_classes, model_config.n_classes)
    document: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "network": model_config.network(),
        "image_size": list(model_config.image_size),
        "preprocessing": model_config.preprocessing.to_dict(),
        "classes": class_set.to_dict(),
        "weights": [{"name": name, "shape": list(t.shape), "dtype": t.dtype.name} for name, t in tensors.items()],
    }
    if temperature is not None:  # so that a model without one keeps the digest that it has always had
        document["temperature"] = temperature
    return document


def seal(document: dict[str, Any], payloads: Mapping[str, bytes]) -> None:
    """Adds the model folder's other files, by their content, and then the digest."""
    document["files"] = {
        name: {"size_bytes": len(data), "sha256": storage.sha256(data)} for name, data in payloads.items()
    }
    document["digest"] = _labels_digest(document)


def check_document(document: dict[str, Any]) -> None:
    """Checks the form of `model.json` and its digest.

    Raises:
        Altered: what does not hold together.
        ValueError: a format version that is not known.
    """
    version = document.get("format_version")
    if type(version) is not int or version not in _FORMAT_KEYS:
        raise ValueError(
            f"has the model format version {repr(version)[:50]}, this unet_ray reads 1 to {FORMAT_VERSION}; use the "
            "unet_ray that wrote it, or a newer one"
        )
    keys = _FORMAT_KEYS[version]
    if document.keys() - _OPTIONAL_KEYS[version] != keys:
        raise Altered(f"{MODEL_FILE} has the keys {_listed(document)}, expected {_listed(keys)}")
    if version == 1 and document["preprocessing"] != FORMAT_1_PREPROCESSING:
        raise Altered(f"{MODEL_FILE} asks for a preprocessing that format 1 does not have")
    if not _files_are_well_formed(document["files"]) or not _weights_are_well_formed(document["weights"]):
        raise Altered(f"{MODEL_FILE} does not describe its files and weights as format {version} does")
    if not _is_temperature(document.get("temperature", 1.0)):
        raise Altered(f"{MODEL_FILE} has the temperature {str(document['temperature'])[:50]!r}")
    if document["digest"] != _labels_digest(document):
        raise Altered(f"{MODEL_FILE} does not match its own digest")


def network_and_classes(document: dict[str, Any]) -> tuple[ModelConfig, ClassSet]:
    """Returns the network and the classes of a checked document. Raises Altered where they do not fit together."""
    try:
        model_config = _network(document)
        class_set = ClassSet.from_dict(document["classes"])
    except ValueError as error:
        raise Altered(f"{MODEL_FILE}: {error}") from error
    if isinstance(model_config, OnnxConfig) != (network_file(document["files"]) == ONNX_FILE):
        raise Altered(f"{MODEL_FILE} lists the files of another kind of network")
    if isinstance(model_config, OnnxConfig) and model_config.facts.gives_ids and "temperature" in document:
        raise Altered(f"{MODEL_FILE} has a temperature for a network that gives class ids")
    if class_set.n_classes != model_config.n_classes:
        raise Altered(f"{MODEL_FILE} names {class_set.n_classes} classes for {model_config.n_classes} outputs")
    return model_config, class_set


def _network(document: dict[str, Any]) -> ModelConfig:
    network = document["network"]
    if not isinstance(network, dict):
        raise ValueError("the network is not a JSON object")
    if document["format_version"] == 1:
        return _network_of_format_1(network)
    size, classes = document["image_size"], document["classes"]
    if not isinstance(size, list) or len(size) != 2 or not all(type(side) is int for side in size):
        raise ValueError(f"image_size is {str(size)[:50]!r}, not [height, width]")
    names = classes.get("classes") if isinstance(classes, dict) else None
    return config_of(
        network,
        image_height_px=size[0],
        image_width_px=size[1],
        n_classes=len(names) if isinstance(names, list) else 0,
        preprocessing=Preprocessing.from_dict(document["preprocessing"]),
    )


def _network_of_format_1(network: dict[str, Any]) -> UnetConfig:
    if network.keys() != _FORMAT_1_NETWORK:
        raise ValueError(f"the network must have the keys {_listed(_FORMAT_1_NETWORK)}")
    for name, value in network.items():
        if type(value) is not int and not (name == "dropout" and type(value) is float):
            raise ValueError(f"{name} is {str(value)[:50]!r}, not a number of its kind")
    return UnetConfig(**network)


def _files_are_well_formed(files: Any) -> bool:
    return (
        isinstance(files, dict)
        and files.keys() in ({WEIGHTS_FILE, METRICS_FILE}, {ONNX_FILE, METRICS_FILE})
        and all(isinstance(entry, dict) and entry.keys() == {"size_bytes", "sha256"} for entry in files.values())
        and all(_is_count(entry["size_bytes"]) for entry in files.values())
    )


def _weights_are_well_formed(weights: Any) -> bool:
    return (
        isinstance(weights, list)
        and all(isinstance(entry, dict) and entry.keys() == {"name", "shape", "dtype"} for entry in weights)
        and all(isinstance(entry["name"], str) and entry["dtype"] == "float32" for entry in weights)
        and all(isinstance(entry["shape"], list) and len(entry["shape"]) <= 8 for entry in weights)
        and all(_is_count(size) for entry in weights for size in entry["shape"])
        and len({entry["name"] for entry in weights}) == len(weights)
    )


def _is_temperature(value: Any) -> bool:
    return type(value) is float and 1 / MAX_TEMPERATURE <= value <= MAX_TEMPERATURE


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= MAX_WEIGHTS_BYTES


def _labels_digest(document: dict[str, Any]) -> str:
    content = {key: value for key, value in document.items() if key not in ("digest", "files")}
    content["weights_file"] = document["files"][network_file(document["files"])]
    return storage.sha256(json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode())


def _listed(keys: Any) -> str:
    return ", ".join(sorted(str(key)[:50] for key in keys)[:20])
