"""Augmentation: varied views of a training frame and its mask, seeded.

Shapes: `H` height px, `W` width px, `C` colour (red, green, blue).
"""

from __future__ import annotations

import dataclasses

import numpy as np

from unet_ray.classes import IGNORED_ID
from unet_ray.config import AugmentConfig
from unet_ray.pixels.images import resize_nearest
from unet_ray.pixels.preprocessing import (
    DEFAULT_PREPROCESSING,
    Preprocessing,
    frame_box,
    network_input,
    padded,
    padding_color,
)


def augment(
    image_HWC: np.ndarray,
    mask_HW: np.ndarray,
    out_hw: tuple[int, int],
    config: AugmentConfig,
    rng: np.random.Generator,
    preprocessing: Preprocessing = DEFAULT_PREPROCESSING,
) -> tuple[np.ndarray, np.ndarray]:
    """One varied view of a frame at full resolution and its encoded mask, both uint8, at the network's size.

    Frame and mask show the same window: its sides are the same share of the frame's sides (drawn so that halving and
    doubling are alike likely), its place is anywhere in the frame. The image is resized as the model's preprocessing
    says, so that the network meets frames as it will in use; the mask by nearest neighbour, so that it gains no id.
    Outside the frame, and beside one that keeps its aspect ratio, the mask is `IGNORED_ID`; the image is black outside,
    as beyond the edges of a padded convolution.

    Every call takes seven numbers from `rng`: switching one part off leaves the others as they were.
    """
    if image_HWC.shape[:2] != mask_HW.shape:
        raise ValueError(f"the frame is {image_HWC.shape[:2]} and its mask {mask_HW.shape}; they must be of one size")
    draw = rng.random(7)
    smallest, largest = config.scale
    share = float(smallest * (largest / smallest) ** draw[1])
    box_hw = frame_box(mask_HW.shape, out_hw, preprocessing)[2:]
    show = _nearest_window if preprocessing.resize == "nearest" else _smooth_window
    image, mask, inside = show(image_HWC, mask_HW, box_hw, share, (draw[2], draw[3]), preprocessing)
    if config.flip and draw[0] < 0.5:
        image, mask, inside = image[:, ::-1], mask[:, ::-1], inside[:, ::-1]
    changes = (config.brightness, config.contrast, config.saturation)
    if any(changes):
        factors = [max(0.0, 1 + change * (2 * at - 1)) for change, at in zip(changes, draw[4:], strict=True)]
        image = _recolored(image, inside, *factors)
    if not inside.all():
        image, mask = np.where(inside[..., None], image, 0).astype(np.uint8), np.where(inside, mask, IGNORED_ID)
    if box_hw == out_hw:
        return image, mask.astype(np.uint8, copy=False)
    return padded(image, out_hw, padding_color(preprocessing)), padded(mask, out_hw, IGNORED_ID)


def paste_classes(
    image_HWC: np.ndarray,
    mask_HW: np.ndarray,
    other_image_HWC: np.ndarray,
    other_mask_HW: np.ndarray,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """A view with the pixels of half of another view's classes, drawn by `rng`, pasted where they are in that one.

    ClassMix (Olsson et al. 2021, https://arxiv.org/abs/2007.07936), with true masks. All uint8, of one size. Of an odd
    number of classes the larger half is pasted; pixels that are ignored never are.
    """
    present = np.setdiff1d(other_mask_HW, [IGNORED_ID])
    chosen = rng.permutation(present)[: (len(present) + 1) // 2]
    is_pasted_HW = np.isin(other_mask_HW, chosen)
    image_HWC = np.where(is_pasted_HW[..., None], other_image_HWC, image_HWC)
    return image_HWC, np.where(is_pasted_HW, other_mask_HW, mask_HW)


Window = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Image, mask, and whether each pixel lies in the frame."""


def _nearest_window(
    image_HWC: np.ndarray,
    mask_HW: np.ndarray,
    out_hw: tuple[int, int],
    share: float,
    position: tuple[float, float],
    preprocessing: Preprocessing,
) -> Window:
    rows, rows_inside = _window(image_HWC.shape[0], share, position[0], out_hw[0])
    columns, columns_inside = _window(image_HWC.shape[1], share, position[1], out_hw[1])
    image, mask = (array.take(rows, axis=0).take(columns, axis=1) for array in (image_HWC, mask_HW))
    return image, mask, rows_inside[:, None] & columns_inside


def _smooth_window(
    image_HWC: np.ndarray,
    mask_HW: np.ndarray,
    out_hw: tuple[int, int],
    share: float,
    position: tuple[float, float],
    preprocessing: Preprocessing,
) -> Window:
    """A window of whole pixels, cut out and then resized."""
    sides = [max(1, round(side * share)) for side in mask_HW.shape]
    starts = [round(at * (side - part)) for at, side, part in zip(position, mask_HW.shape, sides, strict=True)]
    rows, columns = (start + np.arange(part) for start, part in zip(starts, sides, strict=True))
    inside_2 = [(at >= 0) & (at < side) for at, side in zip((rows, columns), mask_HW.shape, strict=True)]
    inside = inside_2[0][:, None] & inside_2[1]
    rows, columns = (np.clip(at, 0, side - 1) for at, side in zip((rows, columns), mask_HW.shape, strict=True))
    image, mask = (array.take(rows, axis=0).take(columns, axis=1) for array in (image_HWC, mask_HW))
    stretched = dataclasses.replace(preprocessing, fit="stretch")
    small = network_input(image, out_hw, stretched)
    return small, resize_nearest(mask, *out_hw), resize_nearest(inside.view(np.uint8), *out_hw).astype(bool)


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
