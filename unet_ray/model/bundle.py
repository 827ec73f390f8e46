"""A trained model as a folder, its digest, and the refusal of what is broken.

The folder holds `weights.safetensors`, `metrics.json` and `model.json` (see `model_json`), which is written last:
without it the folder is not whole.

Reading never runs code from the folder (no pickle, no Keras `load_model`) and imports no Keras: only building does. A
folder from a stranger costs no more memory than the weights that it really has, `MAX_WEIGHTS_BYTES` at most.
"""

from __future__ import annotations

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
from unet_ray.model.architecture import ModelConfig, OnnxConfig, PythonConfig
from unet_ray.model.model_json import (
    MAX_WEIGHTS_BYTES,
    METRICS_FILE,
    MODEL_FILE,
    ONNX_FILE,
    WEIGHTS_FILE,
    Altered,
    check_document,
    document_of,
    network_and_classes,
    seal,
)
from unet_ray.model.network_check import check_network

if TYPE_CHECKING:
    import keras

MAX_JSON_BYTES = 4_000_000
"""EfficientNetV2L, of 1,331 weights, needs 0.8 MB for its layers and weights."""
# The notebook's 46 tensors need a header of 4 kB.
MAX_HEADER_BYTES = 1_000_000


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
    temperature: float | None = None
    """What logits are divided by before the softmax, so that confidences are calibrated; None: they are not."""
    onnx: bytes = b""
    """The file of a network made elsewhere, which has no weights by name."""

    def require_buildable(self) -> None:
        """Raises ValueError where the network cannot be built here; those that are built in can."""
        try:
            shapes = {name: tensor.shape for name, tensor in self.weights.items()}
            check_network(self.model_config, weights=shapes)
        except ValueError as error:
            raise ValueError(f"{self.uri} cannot be used: {error}") from error

    def build_model(self, *, dtype_policy: str | None = None, image_size: tuple[int, int] | None = None) -> keras.Model:
        """Builds the network and sets its weights; see `networks.build_network` for inputs, outputs and `dtype_policy`.

        Args:
            dtype_policy: of activations; weights stay float32.
            image_size: height and width of the input, where it shall not be the model's own.

        Raises:
            ValueError: the weights' names or shapes are not the network's.
        """
        if self.onnx:
            raise ValueError(f"{self.uri} is a network as ONNX, which is no Keras model; use its model.onnx as it is")
        from unet_ray.model import networks, weights  # here, so that reading a bundle imports no Keras

        config = self.model_config.sized(image_size) if image_size else self.model_config
        try:
            # Before the build: a network of other sizes than its weights could be far larger than they are. What a
            # function builds that the user allowed is the user's.
            if not isinstance(config, PythonConfig):
                weights.check_weight_shapes(weights.weight_shapes(config), self.weights)
            model = networks.build_network(config, dtype_policy=dtype_policy)
            weights.set_named_weights(model, self.weights)
        except ValueError as error:
            raise ValueError(f"{self.uri} is not a model that fits together: {error}") from error
        return model


def save_bundle(
    uri: str, model: keras.Model, model_config: ModelConfig, class_set: ClassSet, metrics: Mapping[str, Any]
) -> str:
    """Write a trained Keras model, built by `networks.build_network(model_config)`; see `write_bundle`."""
    from unet_ray.model.weights import named_weights  # here, so that reading a bundle imports no Keras

    return write_bundle(uri, named_weights(model), model_config, class_set, metrics)


def write_bundle(
    uri: str,
    weights: Mapping[str, np.ndarray],
    model_config: ModelConfig,
    class_set: ClassSet,
    metrics: Mapping[str, Any],
    *,
    temperature: float | None = None,
) -> str:
    """Write a bundle; until its last file is whole, the folder is not a model folder. Equal arguments, equal bytes.

    Args:
        uri: the bundle's own folder (`RUN/model`); a bundle in it is replaced.
        weights: float32 tensors as `weights.named_weights` gives them, all finite.
        model_config: the network.
        class_set: its classes, as many as the network has outputs.
        metrics: plain JSON types, None where a value is undefined.
        temperature: see `Bundle`.

    Returns:
        The bundle's digest.
    """
    assert all(tensor.dtype == np.float32 and np.isfinite(tensor).all() for tensor in weights.values())
    tensors = {name: np.ascontiguousarray(weights[name]) for name in sorted(weights)}
    document = document_of(model_config, class_set, tensors, temperature=temperature)
    return _write(uri, document, {WEIGHTS_FILE: safetensors_numpy.save(tensors)}, metrics)


def write_onnx_bundle(
    uri: str, onnx: bytes, model_config: OnnxConfig, class_set: ClassSet, metrics: Mapping[str, Any]
) -> str:
    """Write a network made elsewhere as a bundle; see `write_bundle`. The file holds all of its weights."""
    return _write(uri, document_of(model_config, class_set, {}), {ONNX_FILE: onnx}, metrics)


def _write(uri: str, document: dict[str, Any], network: Mapping[str, bytes], metrics: Mapping[str, Any]) -> str:
    payloads = {**network, METRICS_FILE: _to_json(dict(metrics))}
    assert len(payloads[METRICS_FILE]) <= MAX_JSON_BYTES, len(payloads[METRICS_FILE])
    seal(document, payloads)

    # The old marker first: a kill from here on leaves a folder that says what it lacks, not one that looks altered.
    storage.delete(storage.join(uri, MODEL_FILE))
    for name, data in payloads.items():
        storage.write_whole(storage.join(uri, name), data)
    storage.write_whole(storage.join(uri, MODEL_FILE), _to_json(document))
    return document["digest"]


def read_bundle(uri: str, *, allow_network: str | None = None) -> Bundle:
    """Read and check a model folder.

    Args:
        uri: the folder of a training run, or its `model/`, or a copy of that.
        allow_network: `package.module:function` of a network that the user lets a model folder name, to be imported
            where it is built.

    Raises:
        ValueError: one line: the folder is not a model folder, is incomplete or altered, of an unknown format, or of a
            network that is built by another function than the one that is allowed.
        unet_ray.storage.StorageError: trouble with storage.
    """
    folder = _find_folder(storage.resolve(uri))
    document = _read_document(folder)
    data = {name: _read_payload(folder, name, entry) for name, entry in document["files"].items()}
    try:
        model_config, class_set = network_and_classes(document)
    except Altered as error:
        raise _altered(folder, str(error)) from error
    _require_allowed(folder, model_config, allow_network)
    metrics = _parse_json(folder, METRICS_FILE, data[METRICS_FILE])
    return Bundle(
        uri=folder,
        model_config=model_config,
        class_set=class_set,
        metrics=metrics,
        weights=_load_weights(folder, data[WEIGHTS_FILE], document["weights"]) if WEIGHTS_FILE in data else {},
        digest=document["digest"],
        temperature=document.get("temperature"),
        onnx=data.get(ONNX_FILE, b""),
    )


@dataclass(frozen=True, kw_only=True)
class Description:
    """What a model folder says of itself, without its weights."""

    uri: str
    """Folder that holds model.json."""
    document: dict[str, Any]
    """`model.json`, see `model_json`; its digest is checked, the network that it describes is not."""
    metrics: dict[str, Any]
    """`metrics.json`."""


def read_description(uri: str) -> Description:
    """Read `model.json` and `metrics.json` of a model folder, and nothing of its weights.

    Args:
        uri: as `read_bundle` takes it.

    Raises:
        ValueError: as `read_bundle`.
        unet_ray.storage.StorageError: trouble with storage.
    """
    folder = _find_folder(storage.resolve(uri))
    document = _read_document(folder)
    data = _read_payload(folder, METRICS_FILE, document["files"][METRICS_FILE])
    return Description(uri=folder, document=document, metrics=_parse_json(folder, METRICS_FILE, data))


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
    try:
        check_document(document)
    except Altered as error:
        raise _altered(folder, str(error)) from error
    except ValueError as error:
        raise ValueError(f"{folder} {error}") from error
    return document


def _require_allowed(folder: str, model_config: ModelConfig, allow_network: str | None) -> None:
    if isinstance(model_config, PythonConfig) and model_config.function != allow_network:
        given = f", not {allow_network}" if allow_network else ""
        raise ValueError(
            f"{folder} is a network that the function {model_config.function} builds{given}; if you trust it, give "
            f"--allow-network {model_config.function}"
        )


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


def _altered(folder: str, what: str) -> ValueError:
    return ValueError(f"{folder} is altered or damaged: {what}; copy the whole folder again, or train again")
