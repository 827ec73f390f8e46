"""A trained model as a folder, its digest, and the refusal of what is broken.

The folder holds `weights.safetensors`, `metrics.json` and `model.json`, which is written last: without it the folder is
not whole. `model.json`, format 1:

| key | content |
|---|---|
| `format_version` | 1 |
| `network` | the fields of `ModelConfig` |
| `preprocessing` | how a frame becomes the network's input; always `PREPROCESSING` in format 1 |
| `classes` | the class set, as `ClassSet.to_dict` gives it |
| `weights` | a list of `{name, shape, dtype}`, one a tensor, names such as `conv2d/kernel`; dtype is `float32` |
| `files` | `{"weights.safetensors": {size_bytes, sha256}, "metrics.json": {size_bytes, sha256}}` |
| `digest` | sha256 of all that a label depends on: the keys above as canonical JSON, without `metrics.json`'s entry |

Reading never runs code from the folder (no pickle, no Keras `load_model`) and imports no Keras: only building does. A
folder from a stranger costs no more memory than the weights that it really has, `MAX_WEIGHTS_BYTES` at most.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError
from safetensors import numpy as safetensors_numpy

from unet_ray import storage
from unet_ray.classes import ClassSet
from unet_ray.model.architecture import ModelConfig

if TYPE_CHECKING:
    import keras

FORMAT_VERSION = 1
PREPROCESSING = {"channels": "RGB", "resize": "nearest", "network_input": "uint8, divided by 255 in the network"}
MODEL_FILE = "model.json"
WEIGHTS_FILE = "weights.safetensors"
METRICS_FILE = "metrics.json"
MAX_JSON_BYTES = 1_000_000
MAX_WEIGHTS_BYTES = 4_000_000_000
# The notebook's 46 tensors need a header of 4 kB.
MAX_HEADER_BYTES = 1_000_000
_KEYS = frozenset({"format_version", "network", "preprocessing", "classes", "weights", "files", "digest"})


@dataclass(frozen=True, kw_only=True, eq=False)
class Bundle:
    """A trained model, read and checked, not yet built: light enough for a driver, and it pickles."""

    uri: str
    """Folder that holds model.json."""
    model_config: ModelConfig
    """The network."""
    class_set: ClassSet
    """What its output channels mean."""
    metrics: dict[str, Any]
    """What training measured, as it was given to `save_bundle`."""
    weights: dict[str, np.ndarray]
    """Float32 tensors by name, such as `conv2d/kernel`."""
    digest: str
    """sha256, 64 hex digits, of all that a label depends on; metrics are not part of it."""

    def build_model(self, *, dtype_policy: str | None = None) -> keras.Model:
        """Build the network and set its weights; see `unet.build_unet` for inputs, outputs and `dtype_policy`.

        Raises:
            ValueError: the weights' names or shapes are not the network's.
        """
        from unet_ray.model import unet  # here, so that reading a bundle imports no Keras

        try:
            # Before the build: a network of other sizes than its weights could be far larger than they are.
            unet.check_weight_shapes(unet.weight_shapes(self.model_config), self.weights)
        except ValueError as error:
            raise ValueError(f"{self.uri} is not a model that fits together: {error}") from error
        model = unet.build_unet(self.model_config, dtype_policy=dtype_policy)
        unet.set_named_weights(model, self.weights)
        return model


def save_bundle(
    uri: str, model: keras.Model, model_config: ModelConfig, class_set: ClassSet, metrics: Mapping[str, Any]
) -> str:
    """Write a trained Keras model, built by `unet.build_unet(model_config)`, as a bundle; see `write_bundle`."""
    from unet_ray.model import unet  # here, so that reading a bundle imports no Keras

    return write_bundle(uri, unet.named_weights(model), model_config, class_set, metrics)


def write_bundle(
    uri: str,
    weights: Mapping[str, np.ndarray],
    model_config: ModelConfig,
    class_set: ClassSet,
    metrics: Mapping[str, Any],
) -> str:
    """Write a bundle; until its last file is whole, the folder is not a model folder. Equal arguments, equal bytes.

    Args:
        uri: the bundle's own folder (`RUN/model`); a bundle in it is replaced.
        weights: float32 tensors as `unet.named_weights` gives them, all finite.
        model_config: the network.
        class_set: its classes, as many as the network has outputs.
        metrics: plain JSON types, None where a value is undefined.

    Returns:
        The bundle's digest.
    """
    assert class_set.n_classes == model_config.n_classes, (class_set.n_classes, model_config.n_classes)
    assert all(tensor.dtype == np.float32 and np.isfinite(tensor).all() for tensor in weights.values())
    tensors = {name: np.ascontiguousarray(weights[name]) for name in sorted(weights)}
    payloads = {
        WEIGHTS_FILE: safetensors_numpy.save(tensors),
        METRICS_FILE: _to_json(dict(metrics)),
    }
    assert len(payloads[METRICS_FILE]) <= MAX_JSON_BYTES, len(payloads[METRICS_FILE])
    document: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "network": dataclasses.asdict(model_config),
        "preprocessing": PREPROCESSING,
        "classes": class_set.to_dict(),
        "weights": [{"name": name, "shape": list(t.shape), "dtype": t.dtype.name} for name, t in tensors.items()],
        "files": {name: {"size_bytes": len(data), "sha256": storage.sha256(data)} for name, data in payloads.items()},
    }
    document["digest"] = _labels_digest(document)

    # The old marker first: a kill from here on leaves a folder that says what it lacks, not one that looks altered.
    storage.delete(storage.join(uri, MODEL_FILE))
    for name, data in payloads.items():
        storage.write_whole(storage.join(uri, name), data)
    storage.write_whole(storage.join(uri, MODEL_FILE), _to_json(document))
    return document["digest"]


def read_bundle(uri: str) -> Bundle:
    """Read and check a model folder.

    Args:
        uri: the folder of a training run, or its `model/`, or a copy of that.

    Raises:
        ValueError: one line: the folder is not a model folder, is incomplete or altered, or of an unknown format.
        unet_ray.storage.StorageError: trouble with storage.
    """
    folder = _find_folder(storage.resolve(uri))
    document = _read_document(folder)
    data = {name: _read_payload(folder, name, document["files"][name]) for name in (WEIGHTS_FILE, METRICS_FILE)}
    model_config, class_set = _network_and_classes(folder, document)
    metrics = _parse_json(folder, METRICS_FILE, data[METRICS_FILE])
    return Bundle(
        uri=folder,
        model_config=model_config,
        class_set=class_set,
        metrics=metrics,
        weights=_load_weights(folder, data[WEIGHTS_FILE], document["weights"]),
        digest=document["digest"],
    )


def _find_folder(uri: str) -> str:
    for folder in (uri, storage.join(uri, "model")):
        if storage.exists(storage.join(folder, MODEL_FILE)):
            return folder
    if not storage.exists(uri):
        raise ValueError(f"{uri} does not exist; give the folder that `unet-ray train` wrote, or its model/")
    raise ValueError(
        f"{uri} is not a model folder: {MODEL_FILE} is missing; give the folder that `unet-ray train` wrote, or its "
        "model/ (a training that has not finished has none yet)"
    )


def _read_document(folder: str) -> dict[str, Any]:
    """Read `model.json` and check its form and its digest."""
    document = _parse_json(folder, MODEL_FILE, _read_limited(folder, MODEL_FILE, MAX_JSON_BYTES))
    version = document.get("format_version")
    if type(version) is not int or version != FORMAT_VERSION:
        raise ValueError(
            f"{folder} has the model format version {repr(version)[:50]}, this unet_ray reads {FORMAT_VERSION}; use "
            "the unet_ray that wrote it, or a newer one"
        )
    if document.keys() != _KEYS:
        raise _altered(folder, f"{MODEL_FILE} has the keys {_listed(document)}, expected {_listed(_KEYS)}")
    if document["preprocessing"] != PREPROCESSING:
        raise _altered(folder, f"{MODEL_FILE} asks for a preprocessing that format {FORMAT_VERSION} does not have")
    if not _files_are_well_formed(document["files"]) or not _weights_are_well_formed(document["weights"]):
        raise _altered(folder, f"{MODEL_FILE} does not describe its files and weights as format 1 does")
    if document["digest"] != _labels_digest(document):
        raise _altered(folder, f"{MODEL_FILE} does not match its own digest")
    return document


def _files_are_well_formed(files: Any) -> bool:
    return (
        isinstance(files, dict)
        and files.keys() == {WEIGHTS_FILE, METRICS_FILE}
        and all(isinstance(entry, dict) and entry.keys() == {"size_bytes", "sha256"} for entry in files.values())
        and all(_is_count(entry["size_bytes"]) for entry in files.values())
    )


def _weights_are_well_formed(weights: Any) -> bool:
    return (
        isinstance(weights, list)
        and all(isinstance(entry, dict) and entry.keys() == {"name", "shape", "dtype"} for entry in weights)
        and all(isinstance(entry["name"], str) and entry["dtype"] == "float32" for entry in weights)
        and all(isinstance(entry["shape"], list) and len(entry["shape"]) <= 4 for entry in weights)
        and all(_is_count(size) for entry in weights for size in entry["shape"])
        and len({entry["name"] for entry in weights}) == len(weights)
    )


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= MAX_WEIGHTS_BYTES


def _network_and_classes(folder: str, document: dict[str, Any]) -> tuple[ModelConfig, ClassSet]:
    network = document["network"]
    names = {field.name for field in dataclasses.fields(ModelConfig)}
    if not isinstance(network, dict) or network.keys() != names:
        raise _altered(folder, f"the network in {MODEL_FILE} must have the keys {_listed(names)}")
    for name, value in network.items():
        if type(value) is not int and not (name == "dropout" and type(value) is float):
            raise _altered(folder, f"{name} in {MODEL_FILE} is {str(value)[:50]!r}, not a number of its kind")
    try:
        model_config = ModelConfig(**network)
        class_set = ClassSet.from_dict(document["classes"])
    except ValueError as error:
        raise _altered(folder, f"{MODEL_FILE}: {error}") from error
    if class_set.n_classes != model_config.n_classes:
        raise _altered(folder, f"{MODEL_FILE} names {class_set.n_classes} classes for {model_config.n_classes} outputs")
    return model_config, class_set


def _read_limited(folder: str, name: str, limit_bytes: int) -> bytes:
    uri = storage.join(folder, name)
    try:
        size_bytes = storage.info(uri).size_bytes
        if size_bytes > limit_bytes:
            raise _altered(folder, f"{name} has {size_bytes:,} bytes, at most {limit_bytes:,} are allowed")
        return storage.read_bytes(uri, 0, limit_bytes)
    except FileNotFoundError as error:
        raise ValueError(f"{folder} is incomplete: {name} is missing; copy the whole folder, or train again") from error


def _read_payload(folder: str, name: str, entry: dict[str, Any]) -> bytes:
    """Read a file that `model.json` vouches for, never more than it should have."""
    limit_bytes = MAX_JSON_BYTES if name == METRICS_FILE else MAX_WEIGHTS_BYTES
    data = _read_limited(folder, name, min(limit_bytes, entry["size_bytes"]))
    if len(data) < entry["size_bytes"]:
        raise ValueError(
            f"{folder} is incomplete: {name} ends after {len(data):,} of {entry['size_bytes']:,} bytes; copy the whole "
            "folder, or train again"
        )
    if storage.sha256(data) != entry["sha256"]:
        raise _altered(folder, f"{name} has another sha256 than {MODEL_FILE} says")
    return data


def _load_weights(folder: str, data: bytes, listed: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    header_bytes = int.from_bytes(data[:8], "little")
    content_bytes = sum(4 * math.prod(entry["shape"]) for entry in listed)
    if header_bytes > MAX_HEADER_BYTES or len(data) != 8 + header_bytes + content_bytes:
        raise _altered(
            folder, f"{WEIGHTS_FILE} has {len(data):,} bytes, its {len(listed)} tensors need {content_bytes:,}"
        )
    try:
        weights = safetensors_numpy.load(data)
    except (SafetensorError, KeyError) as error:  # KeyError: a dtype that numpy does not have
        raise _altered(folder, f"{WEIGHTS_FILE}: {error}") from error
    tensors = {name: (list(tensor.shape), tensor.dtype.name) for name, tensor in weights.items()}
    if tensors != {entry["name"]: (entry["shape"], entry["dtype"]) for entry in listed}:
        raise _altered(folder, f"{WEIGHTS_FILE} holds other tensors than {MODEL_FILE} lists")
    if not all(np.isfinite(tensor).all() for tensor in weights.values()):
        raise ValueError(f"{folder} cannot be used: {WEIGHTS_FILE} holds values that are not finite; train again")
    return weights


def _to_json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _parse_json(folder: str, name: str, data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise _altered(folder, f"{name} is not whole JSON ({reason})") from error
    if not isinstance(value, dict):
        raise _altered(folder, f"{name} is not a JSON object")
    return value


def _labels_digest(document: dict[str, Any]) -> str:
    content = {key: value for key, value in document.items() if key not in ("digest", "files")}
    content["weights_file"] = document["files"][WEIGHTS_FILE]
    return storage.sha256(json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode())


def _listed(keys: Any) -> str:
    return ", ".join(sorted(str(key)[:50] for key in keys)[:20])


def _altered(folder: str, what: str) -> ValueError:
    return ValueError(f"{folder} is altered or damaged: {what}; copy the whole folder again, or train again")
