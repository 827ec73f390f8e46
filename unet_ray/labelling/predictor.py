"""A trained model in this process: frames to masks, the same to the bit as `segment` writes them, and no Ray.

Shapes: `H` height px, `W` width px, `C` colour (red, green, blue); `h`, `w` the network's input.

>>> model = unet_ray.load("runs/first")
>>> model.predict("drives/drive07/000001.png").overlay().save("look.png")
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
from PIL import Image

from unet_ray import storage
from unet_ray.classes import ClassSet
from unet_ray.config import Device, Precision, SegmentConfig
from unet_ray.drawing import overlays
from unet_ray.errors import require
from unet_ray.labelling.decoding import DecodedFrame, DecodeOptions, decode
from unet_ray.messages import shown_path
from unet_ray.model.bundle import Bundle, read_bundle
from unet_ray.model.devices import configure_tensorflow, has_bfloat16, op_threads, visible_gpus
from unet_ray.model.label_options import LabelOptions, default_batch_size
from unet_ray.model.onnx_labels import require_labelling_options
from unet_ray.model.tiling import choose_tiling
from unet_ray.model.xla_check import xla_problem
from unet_ray.options.config_types import AnyPath
from unet_ray.pixels import images
from unet_ray.pixels.preprocessing import network_input

if TYPE_CHECKING:
    from unet_ray.model.labeler import Labeler

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # its notices of every process name no trouble of the user's

Picture = AnyPath | Image.Image | np.ndarray
"""A file at any URI, a Pillow image, or uint8 RGB [H, W, 3]."""

_FRAMES_AT_ONCE = 32
"""Frames of a list that are in memory decoded."""


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Prediction:
    """What a model says of one frame; a notebook shows it."""

    mask: np.ndarray
    """Class ids, uint8 [H, W], of the frame's size (with `mask_size="model"` of the network's)."""
    confidence: float | None
    """Mean over the pixels of the largest class probability; None of a network that gives class ids alone."""
    class_pixels: dict[str, int]
    """Pixels of each class in the mask."""
    class_set: ClassSet
    """Names and colours of the classes."""
    frame: Callable[[], np.ndarray] = field(repr=False)
    """Returns the frame, uint8 [H, W, 3]."""

    def overlay(self) -> Image.Image:
        """Returns the frame with the mask over it, in the frame's size."""
        return Image.fromarray(overlays.overlay(self.frame(), self.mask, self.class_set))

    def __repr__(self) -> str:
        height_px, width_px = self.mask.shape
        return f"Prediction({height_px}x{width_px}: {self._shares()})"

    def _shares(self, most: int = 3) -> str:
        """`road 34.5%, sky 24.2%, confidence 0.91`."""
        ordered = sorted(self.class_pixels.items(), key=lambda item: -item[1])[:most]
        shares = [f"{name} {pixels / self.mask.size:.1%}" for name, pixels in ordered if pixels]
        return ", ".join([*shares, *([] if self.confidence is None else [f"confidence {self.confidence:.2f}"])])

    def _repr_png_(self) -> bytes:
        return overlays.png_to_show(np.asarray(self.overlay()))

    def _repr_html_(self) -> str:
        present = [item for item in self.class_set.classes if self.class_pixels[item.name]]
        legend = [(item.name, item.color) for item in present]
        return overlays.figure_html(self._repr_png_(), self._shares(), legend)


class Model:
    """A trained model that is ready to label frames; see `load`."""

    def __init__(self, bundle: Bundle, labeler: Labeler, decode_options: DecodeOptions, options: LabelOptions) -> None:
        self.uri = bundle.uri
        """Folder that holds model.json."""
        self.class_set = bundle.class_set
        """What the ids of a mask mean."""
        self.image_size = bundle.model_config.image_size
        """Height and width of the network's input, px."""
        self.metrics = bundle.metrics
        """What training measured."""
        self._labeler, self._decode_options, self._options = labeler, decode_options, options

    @overload
    def predict(self, image: Picture) -> Prediction: ...

    @overload
    def predict(self, image: list[Any] | tuple[Any, ...]) -> list[Prediction]: ...

    def predict(self, image: Picture | list[Any] | tuple[Any, ...]) -> Prediction | list[Prediction]:
        """Labels one frame of any size, or each of a list.

        Args:
            image: a path or URI, a Pillow image, or an array uint8 [H, W, 3] in RGB; or a list of these.

        Raises:
            ImageRefused: a frame that `segment` would reject, with the same reason and text (a ValueError).
            ValueError: an array of another type or shape, an empty list.
            FileNotFoundError: a file that is not there.
            StorageError: the store did not answer.
        """
        if not isinstance(image, list | tuple):
            return self._predict([_opened(image)])[0]
        require(len(image) > 0, "the list of images is empty; give at least one")
        predictions: list[Prediction] = []
        for start in range(0, len(image), _FRAMES_AT_ONCE):
            part = image[start : start + _FRAMES_AT_ONCE]
            predictions += self._predict([_opened(item, f"image {start + n}: ") for n, item in enumerate(part)])
        return predictions

    def _predict(self, frames: Sequence[_Opened]) -> list[Prediction]:
        decoded = [frame.decode(self._decode_options) for frame in frames]
        sizes = [(frame.height_px or 0, frame.width_px or 0) for frame in decoded]
        labels = self._labeler.label([frame.image for frame in decoded if frame.image is not None], sizes)
        return [
            Prediction(
                mask=labels.masks[n],
                confidence=None if np.isnan(labels.confidence_N[n]) else float(labels.confidence_N[n]),
                class_pixels=dict(zip(self.class_set.names, labels.pixels_NK[n].tolist(), strict=True)),
                class_set=self.class_set,
                frame=frame.read,
            )
            for n, frame in enumerate(frames)
        ]

    def __repr__(self) -> str:
        height_px, width_px = self.image_size
        return (
            f"Model({shown_path(self.uri)!r}: {height_px}x{width_px}, classes {self.class_set.name}, "
            f"{self._options.precision} on {self._options.device})"
        )


def load(
    model: AnyPath,
    *,
    device: Device = "auto",
    precision: Precision = "auto",
    inference: Literal["whole", "slide"] = "whole",
    window: tuple[int, int] | None = None,
    stride: tuple[int, int] | None = None,
    tta: Literal["none", "flip"] = "none",
    mask_size: Literal["native", "model"] = "native",
    max_frame_megapixels: float = SegmentConfig.max_frame_megapixels,
    allow_network: str | None = None,
) -> Model:
    """Loads a trained model into this process; the options are those of `segment`, and no Ray is started.

    Of a U-Net of 32 filters at 96x128 with 23 classes, loading and the first frame take 5.5 s of processor time, 4.2 of
    them TensorFlow's start and the network; a later frame takes 0.07 s, and one of a new range of sizes 0.4 s once (2
    cores with AVX512-BF16, bfloat16, frames of 240x320 and 480x640, beside other work, 2026-11-30). With the demo's 16
    filters the first result was there after 4.9 s (the same machine, load 4).

    The options of a store come from the environment. TensorFlow gets one thread for each operation and labels several
    frames at once instead, for the whole process: another number of threads would be other last bits than `segment`'s.

    Args:
        model: a run's folder or its `model/`, also of an imported network; local or at a URI.
        device: `auto` takes a GPU where TensorFlow sees one, but for networks as ONNX.
        precision: `auto` is bfloat16 where the device has it, else float32.
        inference: show the network the whole frame, or with `slide` windows of it at the frame's own scale.
        window: height and width of a window of `slide` in px.
        stride: steps from window to window in px, down and across.
        tta: `flip` takes the mean of a frame and its mirror image.
        mask_size: `native`, the frame's own, or `model`, the network's.
        max_frame_megapixels: a file with more pixels is refused before it is decoded.
        allow_network: the function that the model folder may name as its network.

    Raises:
        ValueError: no model folder, one that is damaged, or options that do not fit it.
        StorageError: the store did not answer.
    """
    for name, value, allowed in (
        ("device", device, ("auto", "gpu", "cpu")),
        ("precision", precision, ("auto", "float32", "bfloat16", "float16")),
        ("inference", inference, ("whole", "slide")),
        ("tta", tta, ("none", "flip")),
        ("mask_size", mask_size, ("native", "model")),
    ):
        require(value in allowed, f"{name} is {value!r}; it must be one of {', '.join(allowed)}")
    bundle = read_bundle(os.fspath(model), allow_network=allow_network)
    tiling = choose_tiling(inference, window, stride, bundle.model_config)
    require_labelling_options(bundle, slides=tiling is not None, tta=tta, precision=precision)
    device = device if device != "auto" else "gpu" if not bundle.onnx and visible_gpus() else "cpu"
    n_threads = len(os.sched_getaffinity(0))
    options = LabelOptions(
        precision="float32" if bundle.onnx else _precision(precision, device),
        # A thread takes one frame, so that a single one waits for no others; the batch changes no bit.
        batch_size=n_threads if device == "cpu" else default_batch_size(device, bundle.model_config.image_size),
        mask_size=mask_size,
        tiling=tiling,
        tta=tta,
        device=device,
        n_threads=n_threads,
        xla=device == "gpu" and not bundle.onnx and xla_problem() is None,
        allow_network=allow_network,
    )
    decode_options = DecodeOptions(
        network_size=None if tiling else bundle.model_config.image_size,
        preprocessing=bundle.model_config.preprocessing,
        max_pixels=round(max_frame_megapixels * 1e6),
        timeout_s=SegmentConfig.frame_timeout_s,
    )
    return Model(bundle, _labeler(bundle, options), decode_options, options)


def _precision(precision: Precision, device: str) -> str:
    return precision if precision != "auto" else "bfloat16" if has_bfloat16(device) else "float32"


def _labeler(bundle: Bundle, options: LabelOptions) -> Labeler:
    """Builds and compiles the network; where TensorFlow has computed something before, with the threads that it has."""
    from unet_ray.model.labeler import Labeler

    device = "cpu" if bundle.onnx else options.device  # labels of what ONNX Runtime gives are made on the CPU
    try:
        configure_tensorflow(device, options.n_threads, op_threads=1, reproducible=True)
    except RuntimeError:  # it has begun to compute
        if op_threads() != 1:
            warnings.warn(
                "TensorFlow was used in this process before: its threads stay as they are, so that single pixels may "
                "differ from segment's; load the model first",
                stacklevel=3,
            )
    labeler = Labeler(bundle, options)
    labeler.warm_up()
    return labeler


@dataclass(frozen=True, kw_only=True, eq=False)
class _Opened:
    """A picture that was given, as a frame."""

    decode: Callable[[DecodeOptions], DecodedFrame]
    """Returns what the network is shown of it; raises ImageRefused."""
    read: Callable[[], np.ndarray]
    """Returns all of it, uint8 [H, W, 3]."""


def _opened(picture: Picture, where: str = "") -> _Opened:
    if isinstance(picture, str | os.PathLike):
        uri = os.fspath(picture)
        data = storage.read_bytes(storage.resolve(uri))
        read = functools.partial(images.decode_frame, data, max_pixels=10**9)
        return _Opened(decode=functools.partial(_decoded, uri, data), read=read)
    frame_HWC = _checked(images.pixels_of(picture) if isinstance(picture, Image.Image) else picture, where)
    return _Opened(decode=functools.partial(_fitted, frame_HWC), read=lambda: frame_HWC)


def _decoded(uri: str, data: bytes, options: DecodeOptions) -> DecodedFrame:
    frame = decode(data, options)
    if frame.reason is not None:
        raise images.ImageRefused(frame.reason, f"{uri}: {frame.error}")
    return frame


def _fitted(frame_HWC: np.ndarray, options: DecodeOptions) -> DecodedFrame:
    size = options.network_size
    image_HWC = network_input(frame_HWC, size, options.preprocessing) if size else frame_HWC
    return DecodedFrame(image=image_HWC, height_px=frame_HWC.shape[0], width_px=frame_HWC.shape[1])


def _checked(picture: object, where: str) -> np.ndarray:
    """Raises ValueError where this is no frame: values from 0 to 1 say nothing of what they were made of."""
    allowed = "a path, a Pillow image, or an array uint8 [height, width, 3] in RGB"
    if not isinstance(picture, np.ndarray):
        raise ValueError(f"{where}{type(picture).__name__} is no image; give {allowed}")
    is_frame = picture.dtype == np.uint8 and picture.ndim == 3 and picture.shape[2] == 3 and picture.size > 0
    if not is_frame:
        raise ValueError(f"{where}the image is {picture.dtype} of shape {picture.shape}; give {allowed}")
    return picture
