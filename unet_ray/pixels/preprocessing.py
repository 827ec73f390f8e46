"""What a network is shown of a frame: resized, fitted and, on the device, normalised; the model's own, in one function.

Shapes: `B` batch, `H`, `W` the frame's px, `h`, `w` the network's px, `C` colour. Sizes are always (height, width).

`Preprocessing` stands in the model folder. The order is fixed: `decode_input` or `network_input` make a uint8 picture
in RGB, wherever frames are read; `normalized` says what the network then computes from it, on the device or here.
`frame_box` says which part of the picture shows the frame, and `network_mask` puts a mask where the picture is.

| `resize` | an output pixel is | the same as |
|---|---|---|
| `nearest` | the frame's pixel at its centre | `images.resize_nearest` |
| `bilinear` | the two nearest pixels of each axis, half-pixel centres, edge repeated | (1) |
| `bilinear-antialias` | a tent, as wide as the output pixel where that is wider than the frame's | (2) |
| `area` | the mean of what it covers of the frame, by share; where the picture is larger, too | (3) |
| `area-dct` | the same, of a JPEG that is decoded at 1/2, 1/4 or 1/8 where that is large enough | |

1. PyTorch's `interpolate(mode="bilinear", align_corners=False, antialias=False)`, OpenCV's `INTER_LINEAR`.
2. PyTorch's `antialias=True`, torchvision's `Resize`, Pillow's `BILINEAR`.
3. OpenCV's `INTER_AREA`, but where one axis shrinks and the other grows: there it looks at two pixels an axis only.
   Pillow's `BOX` and PyTorch's `area` are other filters: a pixel counts as a whole or not at all (151 and 147 levels).

`resampling` defines all but the first exactly: the mean to the nearest whole number, halves up, on every machine. Other
libraries round more than once, or otherwise. Largest differences in levels, and of how many values, for noise and
smooth pictures in seven pairs of sizes (torch 2.13, OpenCV 5.0, Pillow 13.0; 2026-11-30); 0.5 is the rounding:

| | to their floats | to their uint8 |
|---|---|---|
| `bilinear` and PyTorch | 0.52 (its coordinates are float32) | 1, of up to 38% |
| `bilinear` and OpenCV | 0.50 | 1, of up to 15% |
| `bilinear-antialias` and PyTorch | 0.50 | 1, of up to 20% |
| `bilinear-antialias` and Pillow | 0.50 | 1, of up to 20% |
| `area` and OpenCV | 0.50 | 1, of up to 5% |

`area-dct` saves time where a frame is much larger than the picture. From the bytes of a JPEG to the picture, ms of one
core (busy machine, 2026-11-30):

| JPEG to picture | `nearest` | `bilinear-antialias` | `area` | `area-dct` |
|---|---|---|---|---|
| 1280x1920 (631 KB) to 96x128, at 1/8 | 6.5 | 10.3 | 9.6 | 4.7 |
| 480x640 (80 KB) to 96x128, at 1/4 | 0.9 | 1.5 | 1.4 | 0.8 |
| 1280x1920 to 512x1024: 1/2 has too few columns | 7.7 | 18 | 18 | 18 |

Its pictures are others than those of `area`: libjpeg takes means before it rounds and converts colours. So a PNG and a
JPEG of one picture may get other masks.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from unet_ray.classes import IGNORED_ID
from unet_ray.pixels import images
from unet_ray.pixels.resampling import resample

Resize = Literal["nearest", "bilinear", "bilinear-antialias", "area", "area-dct"]
Fit = Literal["stretch", "pad"]
Channels = Literal["RGB", "BGR"]

_DIVISORS = (8, 4, 2)
"""Parts of its size at which a JPEG is read: at others, decoders differ (`images.decode_reduced_frame`)."""

_CHOICES: dict[str, tuple[str, ...]] = {
    "resize": get_args(Resize),
    "fit": get_args(Fit),
    "channels": get_args(Channels),
}


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """What becomes of a frame before a network's first layer. The defaults are those of the first model folders.

    Raises:
        ValueError: one line: a value that is none of the allowed ones.
    """

    resize: Resize = "nearest"
    """By the table in this module's docstring."""
    fit: Fit = "stretch"
    """`stretch`: the frame fills the picture, whatever its aspect ratio. `pad`: it keeps its aspect ratio, larger or
    smaller, lies at the top left, and the rest is the mean's colour, so about 0 for the network (as MMSegmentation)."""
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Taken from each channel, in units of the uint8 values (0 to 255), in the order of `channels`."""
    std: tuple[float, float, float] = (255.0, 255.0, 255.0)
    """What each channel is then divided by, in the same units and order."""
    channels: Channels = "RGB"
    """The order in which the network takes the colours."""

    def __post_init__(self) -> None:
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; allowed are {', '.join(allowed)}")
        for name, least in (("mean", 0), ("std", 1)):
            _check_numbers(name, getattr(self, name), least)
            object.__setattr__(self, name, tuple(map(float, getattr(self, name))))  # 0 and 0.0 are one digest

    @property
    def keeps_values(self) -> bool:
        """Whether a network takes the picture's values as they are: 0 to 255, in RGB."""
        return (self.mean, self.std, self.channels) == ((0.0,) * 3, (1.0,) * 3, "RGB")

    def to_dict(self) -> dict[str, Any]:
        """Plain types, as JSON takes them."""
        return dataclasses.asdict(self) | {"mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_dict(cls, mapping: Mapping[str, Any]) -> Preprocessing:
        """What `to_dict` gave; each key has to be there.

        Raises:
            ValueError: one line: a missing or unknown key, or what `Preprocessing` refuses.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        if not isinstance(mapping, Mapping) or set(mapping) != set(names):
            keys = ", ".join(map(str, mapping)) if isinstance(mapping, Mapping) else repr(mapping)
            raise ValueError(f"preprocessing has the keys {keys or 'none'}; it needs {', '.join(names)}")
        numbers = {name: _as_tuple(mapping[name]) for name in ("mean", "std")}
        return cls(**{**mapping, **numbers})


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _check_numbers(name: str, values: Any, least: float) -> None:
    """Raises ValueError where these are not three numbers in the units of uint8 values."""

    def is_fine(value: Any) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= 255

    if not (isinstance(values, tuple) and len(values) == 3 and all(map(is_fine, values))):
        raise ValueError(
            f"{name} is {values!r}; allowed are three numbers from {least} to 255"
            " (those of a network that takes values from 0 to 1, times 255)"
        )


DEFAULT_PREPROCESSING = Preprocessing()
"""Nearest neighbour, stretched, divided by 255: the notebook's."""

AS_IT_IS = Preprocessing(std=(1.0, 1.0, 1.0))
"""A picture's values stay 0 to 255: for a network that normalises itself."""


def frame_box(
    frame_size: tuple[int, int], network_size: tuple[int, int], preprocessing: Preprocessing
) -> tuple[int, int, int, int]:
    """(top, left, height, width) of what shows the frame in the network's picture, px; with `stretch` all of it.

    With `pad` the side that fills the picture is exact, the other is rounded, halves up, and at least 1 px.
    """
    (frame_h, frame_w), (h, w) = frame_size, network_size
    if preprocessing.fit == "stretch":
        return 0, 0, h, w
    if frame_h * w <= h * frame_w:
        return 0, 0, _scaled(frame_h, w, frame_w), w
    return 0, 0, h, _scaled(frame_w, h, frame_h)


def _scaled(side_px: int, numerator: int, denominator: int) -> int:
    return max(1, (2 * side_px * numerator + denominator) // (2 * denominator))


def network_input(image_HWC: np.ndarray, size: tuple[int, int], preprocessing: Preprocessing) -> np.ndarray:
    """A frame, uint8 [H, W, 3], as the picture that a network of this size takes, uint8 [h, w, 3], in RGB.

    With `area-dct` it is `area`: nothing is left to be saved. A frame that has the size already comes back itself.
    """
    frame_size = (image_HWC.shape[0], image_HWC.shape[1])
    return _fitted(images.ReducedFrame(pixels=image_HWC, frame_size=frame_size, divisor=1), size, preprocessing)


def decode_input(
    data: bytes, size: tuple[int, int], preprocessing: Preprocessing, *, max_pixels: int = images.MAX_PIXELS
) -> tuple[np.ndarray, tuple[int, int]]:
    """A frame's bytes as the network's picture, uint8 [h, w, 3] in RGB, and the frame's own (height, width).

    With `area-dct`, a JPEG is read at the smallest of 1/8, 1/4 and 1/2 at which both sides are still at least as long
    as the picture needs; any other file, and a JPEG of which libjpeg warns, is read whole.

    Raises:
        ImageRefused: exactly as `images.decode_frame`.
    """

    def divisor_of(frame_size: tuple[int, int]) -> int:
        return dct_divisor(frame_size, size, preprocessing) if preprocessing.resize == "area-dct" else 1

    frame = images.decode_reduced_frame(data, divisor_of, max_pixels=max_pixels)
    return _fitted(frame, size, preprocessing), frame.frame_size


def dct_divisor(frame_size: tuple[int, int], network_size: tuple[int, int], preprocessing: Preprocessing) -> int:
    """What a JPEG's sides are divided by when it is read for `area-dct`: 8, 4, 2 or 1."""
    box_size = frame_box(frame_size, network_size, preprocessing)[2:]

    def is_enough(divisor: int) -> bool:
        return all(-(-side // divisor) >= needed for side, needed in zip(frame_size, box_size, strict=True))

    return next((divisor for divisor in _DIVISORS if is_enough(divisor)), 1)


def _fitted(frame: images.ReducedFrame, size: tuple[int, int], preprocessing: Preprocessing) -> np.ndarray:
    box_size = frame_box(frame.frame_size, size, preprocessing)[2:]
    picture_HWC = _resized(frame, box_size, preprocessing.resize)
    return picture_HWC if box_size == size else padded(picture_HWC, size, padding_color(preprocessing))


def _resized(frame: images.ReducedFrame, size: tuple[int, int], resize: Resize) -> np.ndarray:
    if resize == "nearest":
        return images.resize_nearest(frame.pixels, *size)
    by = "area" if resize == "area-dct" else resize
    return resample(frame.pixels, size, by, frame_size=frame.frame_size, step=frame.divisor)


def padded(image: np.ndarray, size: tuple[int, int], value: np.ndarray | int) -> np.ndarray:
    """An image or a mask, uint8, at the top left of one of (height, width) whose rest has a value."""
    whole = np.empty((*size, *image.shape[2:]), np.uint8)
    whole[...] = value
    whole[: image.shape[0], : image.shape[1]] = image
    return whole


def padding_color(preprocessing: Preprocessing) -> np.ndarray:
    """The colour beside a frame that keeps its aspect ratio, uint8 [3] in RGB: the mean, rounded, halves up."""
    color = np.array([math.floor(value + 0.5) for value in preprocessing.mean], np.uint8)
    return color[::-1] if preprocessing.channels == "BGR" else color


def network_mask(
    mask_HW: np.ndarray, size: tuple[int, int], preprocessing: Preprocessing, *, fill: int = IGNORED_ID
) -> np.ndarray:
    """A mask, uint8 [H, W], where the network's picture shows its frame, uint8 [h, w], by nearest neighbour.

    It gains no id but `fill`, which is where the picture shows no frame.
    """
    frame_size = (mask_HW.shape[0], mask_HW.shape[1])
    box_size = frame_box(frame_size, size, preprocessing)[2:]
    small = images.resize_nearest(mask_HW, *box_size)
    return small if box_size == size else padded(small, size, fill)


def normalized(images_BHWC: np.ndarray, preprocessing: Preprocessing) -> np.ndarray:
    """Pictures, uint8 [..., 3] in RGB, as the network's first layer computes them: float32, (x - mean) * (1 / std).

    Both constants are rounded to float32 once, and the channels are then in the order of `channels`.
    """
    ordered = images_BHWC[..., ::-1] if preprocessing.channels == "BGR" else images_BHWC
    scale = (1 / np.array(preprocessing.std, np.float64)).astype(np.float32)
    return (ordered.astype(np.float32) - np.array(preprocessing.mean, np.float32)) * scale
