"""Windows over a frame: where they lie and how much each counts where they overlap.

Shapes: `h`, `w` a window's height and width in px.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from unet_ray.model.architecture import ModelConfig


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """Windows over a frame: their size and the step from one to the next, (height, width) in pixels."""

    window: tuple[int, int]
    stride: tuple[int, int]

    def __post_init__(self) -> None:
        for window_px, stride_px, axis in zip(self.window, self.stride, ("height", "width"), strict=True):
            if not 1 <= stride_px <= window_px:
                raise ValueError(
                    f"--stride is {stride_px} px in {axis} for a window of {window_px}; it must be 1 to {window_px}, "
                    "or pixels between the windows get no label"
                )

    def corners(self, height_px: int, width_px: int) -> list[tuple[int, int]]:
        """Upper left corners (y, x); the last window of a row or column is moved back into the frame."""
        rows, columns = (
            [*range(0, size_px - window_px, stride_px), size_px - window_px]
            for size_px, window_px, stride_px in zip((height_px, width_px), self.window, self.stride, strict=True)
        )
        return [(y, x) for y in rows for x in columns]

    def weights(self) -> np.ndarray:
        """Weight of each pixel of a window, float32 [h, w]: 1 in the middle, less towards the border, never 0."""
        rows, columns = (np.minimum(np.arange(1, n + 1), np.arange(n, 0, -1)) / ((n + 1) // 2) for n in self.window)
        return np.outer(rows, columns).astype(np.float32)


def choose_tiling(
    inference: str, window: tuple[int, int] | None, stride: tuple[int, int] | None, model: ModelConfig
) -> Tiling | None:
    """Returns the windows of `--inference slide`, None for `whole`.

    Raises:
        ValueError: `--window` or `--stride` without `slide`, or sizes that the network does not take.
    """
    if inference == "whole":
        if window or stride:
            raise ValueError("--window and --stride are for --inference slide; give that too, or leave them out")
        return None
    window = window or (model.image_height_px, model.image_width_px)
    step = 2 ** (model.depth - 1)
    if any(side < step or side % step for side in window):
        raise ValueError(f"--window is {window[0]} {window[1]}; for this network both must be multiples of {step}")
    return Tiling(window=window, stride=stride or ((window[0] + 1) // 2, (window[1] + 1) // 2))
