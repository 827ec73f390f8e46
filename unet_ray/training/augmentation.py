"""Augmentation: varied views of a training frame and its mask, seeded.

Shapes: `H` height px, `W` width px, `C` colour (red, green, blue).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from unet_ray.classes import IGNORED_ID


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """How training frames vary. A range without width, or a change of 0, switches a part off."""

    flip: bool = True
    """Mirror left and right in half of the cases."""
    scale: tuple[float, float] = (0.5, 1.0)
    """Smallest and largest share of the frame's sides that a crop shows; above 1, what lies outside is ignored."""
    brightness: float = 0.2
    """Largest relative change of brightness."""
    contrast: float = 0.2
    """Largest relative change of the distance from the mean brightness."""
    saturation: float = 0.2
    """Largest relative change of the distance from grey."""

    def __post_init__(self) -> None:
        smallest, largest = self.scale
        if not 0 < smallest <= largest:
            raise ValueError(f"scale is {self.scale}; give two numbers with 0 < smallest <= largest")
        for name in ("brightness", "contrast", "saturation"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 0")


def augment(
    image_HWC: np.ndarray,
    mask_HW: np.ndarray,
    out_hw: tuple[int, int],
    config: AugmentConfig,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """One varied view of a frame at full resolution and its encoded mask, both uint8, at the network's size.

    Frame and mask show the same window: its sides are the same share of the frame's sides (drawn so that halving and
    doubling are alike likely), its place is anywhere in the frame. Both are sampled by nearest neighbour: a mask gains
    no id, and the network meets frames as it will in use, where they are resized by nearest neighbour too. Outside the
    frame the mask is `IGNORED_ID` and the image black, as beyond the edges of a padded convolution.

    Every call takes seven numbers from `rng`: switching one part off leaves the others as they were.
    """
    if image_HWC.shape[:2] != mask_HW.shape:
        raise ValueError(f"the frame is {image_HWC.shape[:2]} and its mask {mask_HW.shape}; they must be of one size")
    draw = rng.random(7)
    smallest, largest = config.scale
    share = float(smallest * (largest / smallest) ** draw[1])
    rows, rows_inside = _window(image_HWC.shape[0], share, draw[2], out_hw[0])
    columns, columns_inside = _window(image_HWC.shape[1], share, draw[3], out_hw[1])
    if config.flip and draw[0] < 0.5:
        columns, columns_inside = columns[::-1], columns_inside[::-1]
    image = image_HWC.take(rows, axis=0).take(columns, axis=1)
    mask = mask_HW.take(rows, axis=0).take(columns, axis=1)
    inside = rows_inside[:, None] & columns_inside
    changes = (config.brightness, config.contrast, config.saturation)
    if any(changes):
        factors = [max(0.0, 1 + change * (2 * at - 1)) for change, at in zip(changes, draw[4:], strict=True)]
        image = _recolored(image, inside, *factors)
    if not inside.all():
        image[~inside] = 0
        mask[~inside] = IGNORED_ID
    return image, mask


def _window(in_px: int, share: float, position: float, out_px: int) -> tuple[np.ndarray, np.ndarray]:
    """The source row of each output row, and whether it lies in the frame; share 1 gives `images.resize_nearest`."""
    scale = np.float32(in_px * share) / np.float32(out_px)
    offset = np.float32(position * in_px * (1 - share))
    rows = np.floor((np.arange(out_px, dtype=np.float32) + np.float32(0.5)) * scale + offset).astype(np.int64)
    inside = (rows >= 0) & (rows < in_px) if share > 1 else np.ones(out_px, bool)
    return np.clip(rows, 0, in_px - 1), inside


def _recolored(
    image_HWC: np.ndarray, inside_HW: np.ndarray, brightness: float, contrast: float, saturation: float
) -> np.ndarray:
    """Brightness, contrast about the mean grey, saturation about each pixel's grey, as one affine map, clipped once.

    Grey is 0.299 R + 0.587 G + 0.114 B (ITU-R BT.601). With the gain a = brightness * contrast and the lift
    b = (1 - contrast) * brightness * mean grey, a pixel becomes saturation * a * rgb + (1 - saturation) * a * grey + b.
    """
    rgb_HWC = image_HWC.astype(np.float32)
    grey_HW = rgb_HWC[..., 0] * np.float32(0.299)
    grey_HW += rgb_HWC[..., 1] * np.float32(0.587)
    grey_HW += rgb_HWC[..., 2] * np.float32(0.114)
    mean_grey = float(grey_HW.mean(where=inside_HW)) if inside_HW.any() else 0.0
    gain = brightness * contrast
    grey_HW *= np.float32((1 - saturation) * gain)
    grey_HW += np.float32((1 - contrast) * brightness * mean_grey + 0.5)  # 0.5: rounds when it becomes whole
    rgb_HWC *= np.float32(saturation * gain)
    rgb_HWC += grey_HW[..., None]
    return np.clip(rgb_HWC, 0, 255, out=rgb_HWC).astype(np.uint8)
