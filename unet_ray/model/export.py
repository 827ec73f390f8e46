"""A bundle as a file or folder that runs without unet_ray: Keras, TensorFlow SavedModel, ONNX.

Each takes `image_BHWC` (B any number of frames; uint8 RGB, 0 to 255, resized to the network's size as `model.json` says
under `preprocessing`) and gives `logits_BHWK`, float32; the mask is their argmax over the last axis, at a frame's own
size that of the logits interpolated bilinearly.

An ONNX file says so itself, in `metadata_props`, each value as JSON:

| key | value |
|---|---|
| `class_names` | a list, by class id |
| `class_colors` | a list of `[red, green, blue]`, by class id |
| `image_size` | `[height, width]` of the input, px |
| `resize`, `fit` | how frames become images of that size (`preprocessing`) |
| `mean`, `std`, `channels` | what the network does itself first: `(x - mean) / std`, in this order of colours |
| `input`, `output` | what it takes and gives, in words |
| `temperature` | what logits are divided by before a softmax, null where they are not calibrated |
| `model_digest` | the digest in model.json, as in `run.json` of labels |
"""

from __future__ import annotations

import importlib.util
import json
import tempfile
import warnings
from pathlib import Path

import keras

from unet_ray import storage
from unet_ray.model.bundle import Bundle, read_bundle

# The format and the end of the file's name that it asks for; a SavedModel is a folder.
FORMATS = {"keras": ".keras", "savedmodel": "", "onnx": ".onnx"}


def export_model(model: str, out: str, export_format: str, *, allow_network: str | None = None) -> str:
    """Write a trained model for use without unet_ray and without Ray.

    Args:
        model: URI of a training run's folder or of its `model/`.
        out: URI of the file to write (`….keras`, `….onnx`), for `savedmodel` of a folder; nothing may lie there yet.
        export_format: one of `FORMATS`. `onnx` needs the extra `unet-ray[onnx]`.
        allow_network: see `read_bundle`.

    Returns:
        The URI that was written.

    Raises:
        ValueError: the model folder, the format or `out` cannot be used.
    """
    out = storage.resolve(out)
    _check(out, export_format)
    bundle = read_bundle(model, allow_network=allow_network)
    if bundle.model_config.preprocessing.resize == "area-dct":
        raise ValueError(
            f"{bundle.uri} reads JPEG files at a part of their size (--resize area-dct), which an exported network "
            "cannot keep: it takes images; train with --resize area"
        )
    network = bundle.build_model(dtype_policy="float32")
    with tempfile.TemporaryDirectory(prefix="unet_ray-export-") as scratch:
        local = Path(scratch) / ("model" + FORMATS[export_format])
        _write_local(network, local, export_format)
        if export_format == "onnx":
            _add_metadata(local, bundle)
        files = sorted(path for path in local.rglob("*") if path.is_file()) if local.is_dir() else [local]
        # A SavedModel is what has a saved_model.pb: that file last, so that a part of one is none.
        for path in sorted(files, key=lambda path: path.name == "saved_model.pb"):
            target = out if path == local else storage.join(out, *path.relative_to(local).parts)
            storage.write_whole(target, path.read_bytes())
    return out


def _check(out: str, export_format: str) -> None:
    if export_format not in FORMATS:
        raise ValueError(f"--format is {export_format!r}; choose one of {', '.join(FORMATS)}")
    ending = FORMATS[export_format]
    if not storage.name(out).endswith(ending):
        raise ValueError(f"--out is {out}; a model of the format {export_format} is a file whose name ends in {ending}")
    if storage.exists(out):
        raise ValueError(f"{out} exists already; give a new path, or delete it first")
    storage.require_writable(out, "--out")
    if export_format == "onnx" and importlib.util.find_spec("tf2onnx") is None:
        raise ValueError("the format onnx needs the package tf2onnx; pip install 'unet-ray[onnx]'")


def _write_local(network: keras.Model, path: Path, export_format: str) -> None:
    if export_format == "keras":
        network.save(path)
    elif export_format == "savedmodel":
        network.export(path, format="tf_saved_model", verbose=False)
    else:
        network(keras.ops.zeros((1, *network.input.shape[1:]), dtype="uint8"))  # Keras refuses one never called
        with warnings.catch_warnings():
            # Keras 3.15.1 looks for np.object before it puts it back for tf2onnx (keras/src/export/tf2onnx_lib.py).
            warnings.filterwarnings("ignore", message="In the future `np.object`", category=FutureWarning)
            _add_erfc_to_tf2onnx()
            network.export(path, format="onnx", verbose=False)


def _add_metadata(path: Path, bundle: Bundle) -> None:
    """Writes into an ONNX file what a user of it has to know; see this module's docstring."""
    import onnx  # of the extra `onnx`

    config, classes = bundle.model_config, bundle.class_set.classes
    model = onnx.load(path)
    metadata = {
        "class_names": [item.name for item in classes],
        "class_colors": [list(item.color) for item in classes],
        "image_size": list(config.image_size),
        **config.preprocessing.to_dict(),
        "input": "uint8 [N, height, width, 3], RGB, 0 to 255; the network normalises it",
        "output": "float32 [N, height, width, classes], logits",
        "temperature": bundle.temperature,
        "model_digest": bundle.digest,
    }
    onnx.helper.set_model_props(model, {name: json.dumps(value) for name, value in metadata.items()})
    onnx.save(model, path)


def _add_erfc_to_tf2onnx() -> None:
    """TensorFlow 2.21 computes GELU by `erfc`, which tf2onnx 1.17 does not know: 1 - erf."""
    import numpy as np
    from tf2onnx.handler import tf_op

    class Erfc:
        @classmethod
        def version_9(cls, ctx, node, **_options) -> None:
            """Takes its place in the graph, as of ONNX's ninth set of operators."""
            shape, dtype = ctx.get_shape(node.output[0]), ctx.get_dtype(node.output[0])
            one = ctx.make_const(f"{node.name}/one", np.array(1, np.float32))
            erf = ctx.make_node("Erf", [node.input[0]])
            ctx.remove_node(node.name)
            inputs = [one.output[0], erf.output[0]]
            ctx.make_node("Sub", inputs, name=node.name, outputs=node.output, shapes=[shape], dtypes=[dtype])

    tf_op("Erfc")(Erfc)
