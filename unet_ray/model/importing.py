"""A network made elsewhere becomes a model folder: its ONNX file, looked at, tried, and put under a digest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from unet_ray import storage
from unet_ray.classes import ClassSet
from unet_ray.messages import count
from unet_ray.model.architecture import OnnxConfig
from unet_ray.model.bundle import write_onnx_bundle
from unet_ray.model.model_json import MODEL_FILE
from unet_ray.model.onnx_facts import Size
from unet_ray.model.onnx_file import find_facts, read_onnx
from unet_ray.model.onnx_trial import N_FRAMES, try_network
from unet_ray.pixels.images import ImageRefused, decode_frame
from unet_ray.pixels.preprocessing import Preprocessing, network_input


@dataclass(frozen=True, kw_only=True)
class ImportedModel:
    """What became of an import."""

    model: str
    """URI of the model folder."""
    digest: str
    lines: tuple[str, ...]
    """What the trial has shown."""


def import_onnx(
    onnx: str,
    out: str,
    class_set: ClassSet,
    preprocessing: Mapping[str, Any],
    *,
    image_size: Size | None = None,
    layout: str | None = None,
    output: str | None = None,
    kind: str | None = None,
    frames: str | None = None,
) -> ImportedModel:
    """Makes a model folder of an ONNX file, which is data and runs no code of its own.

    Args:
        onnx: URI of the file; weights beside it (`net.onnx.data`) are taken in.
        out: URI of the model folder; nothing may lie there yet.
        class_set: the classes of its output, in their order.
        preprocessing: what it was trained with, as fields of `Preprocessing`; a network that takes uint8 normalises
            itself.
        image_size: (height, width) px; None where the file says it.
        layout: `nchw` or `nhwc` of the input, where the file leaves it open.
        output: name of the output, where there are several.
        kind: `logits`, `probabilities` or `ids`, where the values leave it open.
        frames: URI of a folder of pictures for the trial; made ones without it.

    Raises:
        ValueError: one line: the file, or what it gives, is not what can label frames.
        unet_ray.storage.StorageError: trouble with storage.
    """
    out = storage.resolve(out)
    if storage.exists(out):
        raise ValueError(f"{out} exists already; give a new path, or delete it first")
    storage.require_writable(out, "--out")
    data = read_onnx(onnx)
    facts = find_facts(data, onnx, n_classes=class_set.n_classes, layout=layout, output=output, kind=kind)
    size = facts.image_size(image_size)
    of_its_own = {"std": (1.0, 1.0, 1.0)} if facts.dtype == "uint8" else {}
    as_trained = Preprocessing(**{**of_its_own, **preprocessing})
    trial = try_network(
        data,
        facts,
        size=size,
        preprocessing=as_trained,
        images_NHWC=None if frames is None else _some_pictures(frames, size, as_trained),
    )
    config = OnnxConfig(
        image_height_px=size[0],
        image_width_px=size[1],
        n_classes=class_set.n_classes,
        preprocessing=as_trained,
        facts=trial.facts,
    )
    digest = write_onnx_bundle(out, data, config, class_set, {"import": trial.record})
    return ImportedModel(model=storage.join(out, MODEL_FILE).rpartition("/")[0], digest=digest, lines=trial.lines)


def _some_pictures(folder: str, size: Size, preprocessing: Preprocessing) -> np.ndarray:
    """The first pictures of a folder that can be read, as the network takes them, uint8 [N, h, w, 3]."""
    try:
        uris = sorted(storage.join(folder, file.path) for file in storage.list_files(folder))
    except FileNotFoundError as error:
        raise ValueError(f"--frames {folder}: no such folder") from error
    pictures = [picture for uri in _spread(uris) if (picture := _picture(uri, size, preprocessing)) is not None]
    if not pictures:
        raise ValueError(f"--frames {folder} holds no picture in {count(len(uris), 'file')}; give a folder of frames")
    return np.stack(pictures)


def _spread(uris: Sequence[str]) -> list[str]:
    places = sorted({int(at) for at in np.linspace(0, len(uris) - 1, N_FRAMES)})
    return [uris[index] for index in places] if uris else []


def _picture(uri: str, size: Size, preprocessing: Preprocessing) -> np.ndarray | None:
    try:
        return network_input(decode_frame(storage.read_bytes(uri)), size, preprocessing)
    except ImageRefused:
        return None
